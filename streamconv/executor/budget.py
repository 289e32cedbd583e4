"""The memory budget: what a run needs, and how large its windows may be within what it may have.

Sizes are resident bytes. The budget is for the whole process tree, so a peak is the largest sum of
resident set sizes over the process and its children.
"""

from __future__ import annotations

import sys

from streamconv.errors import BudgetError
from streamconv.executor.windows import (
    CAST_THREADS,
    ENCODE_BYTES,
    FACTOR_READ_BYTES,
    KNOWLEDGE_SHARE,
    MAX_WINDOW_BYTES,
    MIN_WINDOW_BYTES,
    PRODUCT_BLOCK_ELEMENTS,
    SCRATCH_BYTES,
    SUM_ELEMENTS,
    Ahead,
)
from streamconv.ir.planned import Totals
from streamconv.system.memory import resident_bytes
from streamconv.units import format_size

# What a Python heap may grow by between two windows: plan lines, read lists, thread stacks.
_RESERVE_BYTES = 10 << 20
# It is loaded by the first copy that is not small and plain.
_NUMPY_BYTES = 12 << 20
# What is kept of each tensor of an output file while it is written: header, digest, journal, manifest.
# The reserve has room for so many.
_ENTRY_BYTES = 1000
_RESERVED_ENTRIES = 2000
# A reader's stack, and what the allocator keeps for its thread.
_THREAD_BYTES = 64 << 10
# Measured peak of the planning child (torch, transformers and a traced meta model) and of the
# process that waits for it; bench/RESULTS.md has the figures. Refusing early beats being killed.
# Kernels that map libraries in large pages (6.18 was seen to) count 45 MB more of torch's code.
PLANNING_FLOOR_BYTES = 490 * 10**6
# The same where nothing has to be asked of transformers: both are Python with our own modules.
REMEMBERED_FLOOR_BYTES = 64 * 10**6
_REMEMBERED_CHILD_BYTES = 30 * 10**6
# Where the checkpoint is in a store both have its client, and the child a cache of what it reads.
_STORE_CHILD_BYTES = 24 * 10**6

# What an object store's client takes beside answers: connections, TLS, its threads.
_CLIENT_BYTES = 10 << 20
# And of an answer, while it is copied.
_ANSWER_BYTES = 3 << 19
MIN_REQUEST_BYTES = 1 << 20
# One request in flight, and windows of as much together.
_LEAST_AHEAD_BYTES = 2 * (MIN_REQUEST_BYTES + _ANSWER_BYTES)
_REQUEST_BYTES = ((600 << 20, 8 << 20), (280 << 20, 4 << 20), (120 << 20, 2 << 20))
_MOST_REQUESTS = 64

# Factors of low-rank updates: tiles that are worth a read, and more than any adapter's matrix has.
_MIN_FACTOR_BYTES = 1 << 20
_MAX_FACTOR_BYTES = 64 << 20
# A budget this small gives them the least, so that the smallest budget that works can be named.
_SMALL_RUN_BYTES = 64 << 20


def smallest_run_bytes(buffer_bytes: int = 0, *, from_store: bool = False) -> int:
    """Return the smallest budget with which this process could execute a plan now.

    ``buffer_bytes`` are needed beside windows and reads. ``from_store``: the source is in a
    store, whose client this process has loaded.
    """
    if from_store:
        need = resident_bytes() + _RESERVE_BYTES + _CLIENT_BYTES + buffer_bytes + _LEAST_AHEAD_BYTES
    else:
        need = _own_bytes() + buffer_bytes + _window_cost(MIN_WINDOW_BYTES)
    # The next process, which is told this, may be a little larger by chance.
    need += 1 << 20
    return -(-need // 10**6) * 10**6


def _own_bytes() -> int:
    """Return what this process takes beside its buffers, now and later."""
    numpy = 0 if "numpy" in sys.modules else _NUMPY_BYTES
    return resident_bytes() + _RESERVE_BYTES + numpy


def _window_cost(window_bytes: int) -> int:
    # Two windows (one is filled while the other is written) and the read buffer, which is as large
    # as a window up to 4 MiB.
    return 2 * window_bytes + min(window_bytes, 4 << 20)


def factor_bytes(budget_bytes: int) -> int:
    """Return what may be held of the factors of low-rank updates, where a plan has any."""
    share = (budget_bytes - resident_bytes() - _SMALL_RUN_BYTES) // 4
    return min(max(_MIN_FACTOR_BYTES, share), _MAX_FACTOR_BYTES)


def beside_bytes(
    totals: Totals,
    tensors: int = 0,
    *,
    factors: int = _MIN_FACTOR_BYTES,
    io_threads: int = 1,
) -> int:
    """Return what a run needs beside windows and reads to do what ``totals`` tell of.

    ``tensors``: the most that an output file has; ``factors``: what is held of the factors of low-rank
    updates, where there are any.
    """
    need = max(0, tensors - _RESERVED_ENTRIES) * _ENTRY_BYTES + io_threads * _THREAD_BYTES
    if totals.encoded:
        # Floats, those of the piece before them, a block of codes.
        need += 2 * ENCODE_BYTES + 2 * SCRATCH_BYTES + FACTOR_READ_BYTES
    if totals.summed:
        # The sum, a term of it, a block on its way from one type to another.
        need += 2 * 8 * SUM_ELEMENTS + 3 * 8 * PRODUCT_BLOCK_ELEMENTS
    if totals.placed:
        need += factors + max(io_threads, CAST_THREADS) * SCRATCH_BYTES + FACTOR_READ_BYTES
    return need


def shares(
    budget_bytes: int,
    totals: Totals,
    tensors: int = 0,
    *,
    io_threads: int = 1,
    buffer_bytes: int = 0,
) -> tuple[int, int]:
    """Return how large a window may grow, and what may be held of the factors of low-rank updates.

    ``totals``, ``tensors``: as for :func:`beside_bytes`; ``buffer_bytes`` are needed besides. Raises
    :class:`BudgetError` where no window fits.
    """
    factors = factor_bytes(budget_bytes)
    beside = beside_bytes(totals, tensors, factors=factors, io_threads=io_threads)
    return window_bytes(budget_bytes, buffer_bytes + beside), factors


def remote_shares(
    budget_bytes: int,
    totals: Totals,
    tensors: int = 0,
    *,
    most_requests: int | None = None,
    buffer_bytes: int = 0,
) -> tuple[int, int, Ahead]:
    """Return the same where the source is in a store, and how it is read.

    Half of what is free is for windows, half for requests in flight: each has a buffer of its own, and
    what the client holds of an answer. More small ones are faster than fewer large ones as long as a
    round trip is worth less than what one of them brings. Raises :class:`BudgetError` where
    nothing fits.
    """
    factors = factor_bytes(budget_bytes)
    beside = beside_bytes(totals, tensors, factors=factors)
    beside += _CLIENT_BYTES
    free = budget_bytes - resident_bytes() - _RESERVE_BYTES - buffer_bytes - beside
    if free < _LEAST_AHEAD_BYTES:
        smallest = smallest_run_bytes(buffer_bytes + beside - _CLIENT_BYTES, from_store=True)
        raise BudgetError(
            "the memory budget is too small to move tensors out of a store",
            expected=f"at least {format_size(smallest)}",
            found=format_size(budget_bytes),
            hint=f"--max-mem {smallest // 10**6}MB is the smallest that works",
        )
    request = next((n for at, n in _REQUEST_BYTES if free >= at), MIN_REQUEST_BYTES)
    fitting = free // 2 // (request + _ANSWER_BYTES + (SCRATCH_BYTES if totals.placed else 0))
    ahead = Ahead(max(1, min(fitting, most_requests or _MOST_REQUESTS)), request)
    window = free // 2 // ahead.windows * KNOWLEDGE_SHARE // (KNOWLEDGE_SHARE + 1)
    return min(max(window, 4096) // 4096 * 4096, MAX_WINDOW_BYTES), factors, ahead


def window_bytes(budget_bytes: int, buffer_bytes: int = 0) -> int:
    """Return how large a window may grow; raises :class:`BudgetError` where none fits.

    The budget is a ceiling and no target: more than 256 MiB gains nothing. ``buffer_bytes`` are
    needed beside windows and reads.
    """
    free = budget_bytes - _own_bytes() - buffer_bytes
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


def smallest_convert_bytes(*, remembered: bool = False, from_store: bool = False) -> int:
    """Return the smallest budget with which this process could plan and convert now.

    ``remembered``: transformers need not be asked about the model. ``from_store``: the checkpoint is
    in a store.
    """
    if remembered:
        more = _STORE_CHILD_BYTES if from_store else 0
        need = max(REMEMBERED_FLOOR_BYTES, resident_bytes() + _REMEMBERED_CHILD_BYTES) + more
        return -(-need // 10**6) * 10**6
    need = max(PLANNING_FLOOR_BYTES, resident_bytes() + 430 * 10**6)
    return -(-need // 10**7) * 10**7


def check_planning(budget_bytes: int, need_bytes: int | None = None) -> None:
    """Raise :class:`BudgetError` where a planning child with transformers would not fit.

    ``need_bytes`` is what the process needs that waits for this one, if not this one itself.
    """
    need = smallest_convert_bytes() if need_bytes is None else need_bytes
    if budget_bytes < need:
        raise BudgetError(
            "the memory budget is too small to plan: the model's structure comes from transformers",
            expected=f"at least {format_size(need)}",
            found=format_size(budget_bytes),
            hint=f"--max-mem {need // 10**6}MB is the smallest that works; or plan where there is "
            "more memory (`streamconv plan SRC -o PLAN`) and then `streamconv run PLAN DST`",
        )


def check_reading(budget_bytes: int, *, from_store: bool = False) -> None:
    """Raise :class:`BudgetError` where not even the metadata of a checkpoint could be read."""
    need = smallest_convert_bytes(remembered=True, from_store=from_store)
    loaded = smallest_convert_bytes()
    if budget_bytes < need:
        raise BudgetError(
            "the memory budget is too small to read a checkpoint's metadata",
            expected=f"at least {format_size(need)}, and {format_size(loaded)} where transformers has "
            "to be asked about the model",
            found=format_size(budget_bytes),
            hint=f"--max-mem {loaded // 10**6}MB is enough for both; or plan where there is more "
            "memory (`streamconv plan SRC -o PLAN`) and then `streamconv run PLAN DST`",
        )
