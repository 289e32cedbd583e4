"""The machine's memory: what may be used of it, and what processes really took.

Sizes are resident bytes. A peak is the largest sum of resident set sizes over a process and its
children.
"""

from __future__ import annotations

import contextlib
import resource
import threading
from dataclasses import dataclass
from pathlib import Path

_PAGE_BYTES = 4096
# Left to the rest of the machine when the user names no budget.
_HEADROOM = 0.15
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
