"""CRC-32 of source records, taken as their bytes stream past in any order.

A zip record carries one CRC-32 over all its bytes; the executor reads it in pieces, as the windows
of the output ask for them, and maybe in several runs of the program. Each piece's CRC is kept for
its interval and neighbours are combined, so that no byte is read twice for the check's sake.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache

from isal import isal_zlib

_POLYNOMIAL = 0xEDB88320  # reflected CRC-32 (ISO 3309), as zip uses it


def crc32(data: bytes | memoryview, start: int = 0) -> int:
    """Return the CRC-32 of ``data``, going on from ``start``."""
    return int(isal_zlib.crc32(data, start))


def _times(matrix: tuple[int, ...], vector: int) -> int:
    result = 0
    for column in matrix:
        if not vector:
            break
        if vector & 1:
            result ^= column
        vector >>= 1
    return result


@lru_cache(maxsize=64)
def _zeros_operator(log2_bytes: int) -> tuple[int, ...]:
    """Return the GF(2) matrix that appends ``2**log2_bytes`` zero bytes to a CRC."""
    if log2_bytes == 0:
        matrix = (_POLYNOMIAL, *(1 << n for n in range(31)))  # one zero bit
        for _ in range(3):  # two, four, eight
            matrix = tuple(_times(matrix, column) for column in matrix)
        return matrix
    half = _zeros_operator(log2_bytes - 1)
    return tuple(_times(half, column) for column in half)


def crc32_combine(first: int, second: int, second_nbytes: int) -> int:
    """Return the CRC-32 of two byte strings put together, from their CRCs and the second's length.

    The method is Mark Adler's in zlib's ``crc32_combine``.
    """
    for bit in range(second_nbytes.bit_length()):
        if second_nbytes >> bit & 1:
            first = _times(_zeros_operator(bit), first)
    return first ^ second


class Coverage:
    """Which bytes of one record have been seen, and their CRCs.

    Intervals ``[start, end)`` are disjoint, sorted and never adjacent. ``start`` and ``end`` count
    bytes from the start of the record.
    """

    __slots__ = ("_crcs", "_ends", "_starts")

    def __init__(self, intervals: Iterable[tuple[int, int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._crcs: list[int] = []
        for start, end, crc in intervals:
            self._starts.append(start)
            self._ends.append(end)
            self._crcs.append(crc)

    def add(self, start: int, data: memoryview) -> None:
        """Take in ``data``, the record's bytes from ``start`` on; bytes seen before are passed over."""
        end = start + len(data)
        at = start
        while at < end:
            k = bisect_right(self._starts, at) - 1
            if k >= 0 and self._ends[k] > at:
                at = self._ends[k]
                continue
            until = min(end, self._starts[k + 1]) if k + 1 < len(self._starts) else end
            piece = data[at - start : until - start]
            if k >= 0 and self._ends[k] == at:
                # The usual case by far: the next piece of a record that streams in order.
                self._crcs[k] = crc32(piece, self._crcs[k])
                self._ends[k] = until
            else:
                k += 1
                self._starts.insert(k, at)
                self._ends.insert(k, until)
                self._crcs.insert(k, crc32(piece))
            self._join_next(k)
            at = until

    def merge(self, intervals: Iterable[tuple[int, int, int]]) -> None:
        """Take in what another reader of the record has seen, as :meth:`intervals` gave it.

        Where that was seen in part here, it is passed over, and so may be missing in the end. Raises
        :class:`ValueError` where the same bytes had another CRC.
        """
        for start, end, crc in intervals:
            k = bisect_right(self._starts, start) - 1
            if k >= 0 and (self._starts[k], self._ends[k]) == (start, end):
                if self._crcs[k] != crc:
                    raise ValueError(f"bytes {start} to {end} have two checksums")
                continue
            after = self._starts[k + 1] if k + 1 < len(self._starts) else end
            if (k >= 0 and self._ends[k] > start) or after < end:
                continue
            self._starts.insert(k + 1, start)
            self._ends.insert(k + 1, end)
            self._crcs.insert(k + 1, crc)
            self._join_next(k + 1)
            if k >= 0:
                self._join_next(k)

    def _join_next(self, k: int) -> None:
        if k + 1 < len(self._starts) and self._starts[k + 1] == self._ends[k]:
            nbytes = self._ends[k + 1] - self._starts[k + 1]
            self._crcs[k] = crc32_combine(self._crcs[k], self._crcs[k + 1], nbytes)
            self._ends[k] = self._ends[k + 1]
            del self._starts[k + 1], self._ends[k + 1], self._crcs[k + 1]

    def whole(self, nbytes: int) -> int | None:
        """Return the CRC-32 of the whole record, or None while bytes are missing."""
        if nbytes == 0:
            return 0
        if self._starts == [0] and self._ends[0] == nbytes:
            return self._crcs[0]
        return None

    def missing(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """Yield the intervals of ``[0, nbytes)`` that have not been seen."""
        at = 0
        for start, end in zip(list(self._starts), list(self._ends), strict=True):
            if at < start:
                yield at, start
            at = end
        if at < nbytes:
            yield at, nbytes

    def intervals(self) -> list[tuple[int, int, int]]:
        """Return ``(start, end, crc)`` of what has been seen: what a journal keeps."""
        return list(zip(self._starts, self._ends, self._crcs, strict=True))
