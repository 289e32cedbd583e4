"""The memory budget: what the machine can give, what a run needs, and what it really took.

Sizes are resident bytes. The budget is for the whole process tree, so a peak is the largest sum of
resident set sizes over the process and its children.
"""

from __future__ import annotations

import contextlib
import resource
import threading
from dataclasses import dataclass
from pathlib import Path

from streamconv.errors import BudgetError
from streamconv.sizes import format_size
from streamconv.windows import (
    CAST_THREADS,
    FACTOR_READ_BYTES,
    KNOWLEDGE_SHARE,
    MAX_WINDOW_BYTES,
    MIN_WINDOW_BYTES,
    SCRATCH_BYTES,
)

_PAGE_BYTES = 4096
# What a Python heap may grow by between two windows: plan lines, read lists, thread stacks.
_RESERVE_BYTES = 10 << 20
# What is kept of each tensor of an output file while it is written: header, digest, journal, manifest.
# The reserve has room for so many.
_ENTRY_BYTES = 1000
_RESERVED_ENTRIES = 2000
# A reader's stack, and what the allocator keeps for its thread.
_THREAD_BYTES = 64 << 10
# Left to the rest of the machine when the user names no budget.
_HEADROOM = 0.15
# Measured peak of the planning child (torch, transformers and a traced meta model) and of the
# process that waits for it; bench/RESULTS.md has the figures. Refusing early beats being killed.
PLANNING_FLOOR_BYTES = 440 * 10**6

# Factors of low-rank updates: tiles that are worth a read, and more than any adapter's matrix has.
_MIN_FACTOR_BYTES = 1 << 20
_MAX_FACTOR_BYTES = 64 << 20
# A budget this small gives them the least, so that the smallest budget that works can be named.
_SMALL_RUN_BYTES = 64 << 20

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def available_bytes(cgroup_root: Path = _CGROUP, own_cgroup: str | None = None) -> tuple[int, str]:
    """Return what may be used by default, and where the limit comes from.

    The smallest of the machine's available memory, what the cgroups (v1 or v2, this one's and its
    ancestors') leave and what a process may map, less 15 %.
    """
    limits = [(memory_state().available_bytes, "available memory")]
    mappable, _ = resource.getrlimit(resource.RLIMIT_AS)
    if mappable != resource.RLIM_INFINITY:
        limits.append((mappable, "the limit of `ulimit -v`"))
    limits += _cgroup_limits(cgroup_root, own_cgroup or _read(Path("/proc/self/cgroup")))
    nbytes, source = min(limits)
    return int(nbytes * (1 - _HEADROOM)), source


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class MemoryState:
    """What the machine has: memory that can be had without swapping, and swap."""

    available_bytes: int
    swap_bytes: int
    swap_used_bytes: int


def memory_state(meminfo: Path = _MEMINFO) -> MemoryState:
    """Return the state of the machine's memory, whatever a cgroup allows of it."""
    values: dict[str, int] = {}
    for line in _read(meminfo).splitlines():
        name, _, rest = line.partition(":")
        if rest.split()[1:] == ["kB"]:
            values[name] = int(rest.split()[0]) * 1024
    swap = values.get("SwapTotal", 0)
    available = values.get("MemAvailable", 1 << 62)
    return MemoryState(available, swap, swap - values.get("SwapFree", 0))


def _cgroup_limits(root: Path, membership: str) -> list[tuple[int, str]]:
    found = []
    for line in membership.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            base, limit_name, version, anon = root, "memory.max", "v2", "anon"
        elif "memory" in controllers.split(","):
            base, limit_name, version, anon = (
                root / "memory",
                "memory.limit_in_bytes",
                "v1",
                "total_rss",
            )
        else:
            continue
        # Inside a container the path is the host's and the container's own limit is at the root.
        here = base / path.strip("/")
        for folder in {here, *here.parents} if here.is_relative_to(base) else {base}:
            if not folder.is_relative_to(base):
                continue
            text = _read(folder / limit_name).strip()
            if text.isdigit() and int(text) < 1 << 60:
                used = next(
                    (
                        int(s.split()[1])
                        for s in _read(folder / "memory.stat").splitlines()
                        if s.split()[:1] == [anon]
                    ),
                    0,
                )
                found.append((max(0, int(text) - used), f"cgroup {version} limit"))
    return found


def resident_bytes(pid: str = "self") -> int:
    """Return the resident set size of a process, 0 where it is gone."""
    text = _read(Path(f"/proc/{pid}/statm"))
    return int(text.split()[1]) * _PAGE_BYTES if text else 0


def tree_bytes() -> int:
    """Return the resident bytes of this process and all its descendants."""
    total, pending = 0, ["self"]
    while pending:
        pid = pending.pop()
        total += resident_bytes(pid)
        with contextlib.suppress(OSError):  # it may end between two looks at it
            for task in Path(f"/proc/{pid}/task").iterdir():
                pending += _read(task / "children").split()
    return total


def _high_water_bytes() -> int:
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class PeakMeter:
    """Samples the process tree in the background; ``peak_bytes`` is the largest sum seen.

    VmHWM of this process counts too where it rose meanwhile: a spike between two samples is still
    a spike.
    """

    def __init__(self, interval_seconds: float = 0.05) -> None:
        self._interval = interval_seconds
        self._stop = threading.Event()
        self._hwm_before = _high_water_bytes()
        self._sampled = tree_bytes()
        self.now_bytes = self._sampled
        self._thread = threading.Thread(target=self._sample, daemon=True, name="peak-meter")

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self.now_bytes = tree_bytes()
            self._sampled = max(self._sampled, self.now_bytes)

    @property
    def peak_bytes(self) -> int:
        """Return the peak so far."""
        hwm = _high_water_bytes()
        return max(self._sampled, hwm if hwm > self._hwm_before else 0)

    def __enter__(self) -> PeakMeter:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def smallest_run_bytes(buffer_bytes: int = 0) -> int:
    """Return the smallest budget with which this process could execute a plan now.

    ``buffer_bytes`` are needed beside windows and reads.
    """
    need = resident_bytes() + _RESERVE_BYTES + buffer_bytes + _window_cost(MIN_WINDOW_BYTES)
    # The next process, which is told this, may be a little larger by chance.
    need += 1 << 20
    return -(-need // 10**6) * 10**6


def _window_cost(window_bytes: int) -> int:
    # Two windows (one is filled while the other is written) and the read buffer, which is as large
    # as a window up to 4 MiB.
    return 2 * window_bytes + min(window_bytes, 4 << 20)


def factor_bytes(budget_bytes: int) -> int:
    """Return what may be held of the factors of low-rank updates, where a plan has any."""
    share = (budget_bytes - resident_bytes() - _SMALL_RUN_BYTES) // 4
    return min(max(_MIN_FACTOR_BYTES, share), _MAX_FACTOR_BYTES)


def beside_bytes(
    tensors: int, *, merging: bool, factors: int = _MIN_FACTOR_BYTES, io_threads: int = 1
) -> int:
    """Return what a run needs beside windows and reads.

    ``tensors``: the most that an output file has; ``merging``: whether there are low-rank updates, of
    whose factors ``factors`` bytes are held.
    """
    need = max(0, tensors - _RESERVED_ENTRIES) * _ENTRY_BYTES + io_threads * _THREAD_BYTES
    if merging:
        need += factors + max(io_threads, CAST_THREADS) * SCRATCH_BYTES + FACTOR_READ_BYTES
    return need


def shares(
    budget_bytes: int,
    *,
    merging: bool,
    tensors: int = 0,
    io_threads: int = 1,
    buffer_bytes: int = 0,
) -> tuple[int, int]:
    """Return how large a window may grow, and what may be held of the factors of low-rank updates.

    ``merging``, ``tensors``: as for :func:`beside_bytes`. Raises :class:`BudgetError` where no window
    fits.
    """
    factors = factor_bytes(budget_bytes)
    beside = beside_bytes(tensors, merging=merging, factors=factors, io_threads=io_threads)
    return window_bytes(budget_bytes, buffer_bytes + beside), factors


def window_bytes(budget_bytes: int, buffer_bytes: int = 0) -> int:
    """Return how large a window may grow; raises :class:`BudgetError` where none fits.

    The budget is a ceiling and no target: more than 256 MiB gains nothing. ``buffer_bytes`` are
    needed beside windows and reads.
    """
    free = budget_bytes - resident_bytes() - _RESERVE_BYTES - buffer_bytes
    if free < _window_cost(MIN_WINDOW_BYTES):
        smallest = smallest_run_bytes(buffer_bytes)
        raise BudgetError(
            "the memory budget is too small to move tensors",
            expected=f"at least {format_size(smallest)}",
            found=format_size(budget_bytes),
            hint=f"--max-mem {smallest // 10**6}MB is the smallest that works",
        )
    # Two windows, and what is known of their tensors.
    large = (free - (4 << 20)) * KNOWLEDGE_SHARE // (2 * KNOWLEDGE_SHARE + 1)
    size = large if free > 12 << 20 else free // 3
    return min(size // 4096 * 4096, MAX_WINDOW_BYTES)


def smallest_convert_bytes() -> int:
    """Return the smallest budget with which this process could plan and convert now."""
    need = max(PLANNING_FLOOR_BYTES, resident_bytes() + 370 * 10**6)
    return -(-need // 10**7) * 10**7


def check_planning(budget_bytes: int) -> None:
    """Raise :class:`BudgetError` where the planning child would not fit into the budget."""
    need = smallest_convert_bytes()
    if budget_bytes < need:
        raise BudgetError(
            "the memory budget is too small to plan: the model's structure comes from transformers",
            expected=f"at least {format_size(need)}",
            found=format_size(budget_bytes),
            hint=f"--max-mem {need // 10**6}MB is the smallest that works; or plan where there is "
            "more memory (`streamconv plan SRC -o PLAN`) and then `streamconv run PLAN DST`",
        )
