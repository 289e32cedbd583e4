"""The memory that a process may take on account of what strangers wrote, and what to say when it ends.

The limit is one on private memory (RLIMIT_DATA): unlike the address space it does not count what
libraries map of their own files, and it is set from outside before the process reads anything. What
hits it is either monstrous, and unsafe whatever the budget, or it would fit a larger budget; the sizes
of the files tell the two apart.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

from streamconv.errors import StreamconvError, UnsafeInputError

# Metadata is never worth more than this, whatever the budget.
PARSE_BYTES = 1 << 30
# What a byte of a pickle or of JSON takes at most as objects, and what an interpreter takes without.
_BYTES_A_BYTE = 128
_EMPTY_BYTES = 64 << 20
# Private pages that a process maps and never touches (stacks of threads), less than it has of them; and
# pages of libraries that are resident beside its own: measured with torch and transformers loaded.
_UNTOUCHED_BYTES = 35 * 10**6
_LIBRARY_BYTES = 90 * 10**6
# The same of an interpreter that has loaded neither.
_PYTHON_BYTES = 11 * 10**6


class MemoryNeededError(MemoryError):
    """A file says more than the memory has room for that is left; a larger budget would do.

    Not one of ours: nobody who makes do without a file that is damaged may make do without this one.
    """

    def __init__(self, where: str, nbytes: int, needed_bytes: int) -> None:
        super().__init__(where)
        self.where = where
        self.nbytes = nbytes
        self.needed_bytes = needed_bytes


def share_of(budget_bytes: int, others_bytes: int, *, torch: bool = True) -> int:
    """Return the limit with which a process stays within a budget of which others take a part.

    ``torch``: the process loads torch and transformers.
    """
    libraries = _LIBRARY_BYTES - _UNTOUCHED_BYTES if torch else _PYTHON_BYTES
    return max(1 << 20, budget_bytes - others_bytes - libraries)


def bind(nbytes: int, pid: int = 0) -> int | None:
    """Limit the private memory of a process, for good; return the limit that it had before."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
    before = None if hard == resource.RLIM_INFINITY else hard
    limit = nbytes if before is None else min(nbytes, before)
    resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))
    return before


@contextmanager
def within(nbytes: int) -> Iterator[None]:
    """Limit the private memory of this process for a while: files that it maps later count, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def limit() -> int | None:
    """Return the limit of this process, None where it has none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if soft == resource.RLIM_INFINITY else soft


def too_much(where: str, nbytes: int) -> StreamconvError | MemoryNeededError:
    """Return what to raise where reading ``nbytes`` of metadata in ``where`` ran out of memory."""
    most, _ = resource.getrlimit(resource.RLIMIT_AS)  # while metadata is read
    most = PARSE_BYTES if most == resource.RLIM_INFINITY else most
    # With so much it can be read, or never will be.
    need = min(_EMPTY_BYTES + _BYTES_A_BYTE * nbytes, most)
    mine = limit()
    if mine is not None and mine < need:
        return MemoryNeededError(where, nbytes, need)
    return UnsafeInputError(
        "the file asks for too much memory", where=where, found=f"{nbytes} bytes that say far more"
    )
