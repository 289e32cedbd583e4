"""Flat groups: parameters laid one after the other into a vector that ranks share.

Byte layout: each rank's file holds its piece of the vector as one contiguous 1-D tensor. So a parameter
is a range of elements in one or many pieces, and each such range is a few boxes of the parameter's
shape (:func:`streamconv.ir.boxes.flat_boxes`), whose strides are those of the whole parameter. All
numbers here count elements.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from streamconv.formats.assembly import Stored as Piece
from streamconv.ir.boxes import Box, Shape, contiguous_strides, flat_boxes
from streamconv.ir.dtypes import DType
from streamconv.ir.source import Record
from streamconv.torchfile.rankfile import Stored


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor, or what one model-parallel rank holds of one: pieces that tile ``shape``."""

    dtype: DType
    shape: Shape
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive elements of a stored tensor, from storage element ``at`` on."""

    record: Record
    at: int
    numel: int


class Vector:
    """1-D tensors of some files, (number of the file, tensor), one after the other."""

    def __init__(self, pieces: Iterable[tuple[int, Stored]]) -> None:
        self._runs: list[Run] = []
        self._starts: list[int] = []
        self.numel = 0
        for file, stored in pieces:
            spec = stored.spec
            if spec.shape[0]:
                self._starts.append(self.numel)
                self._runs.append(Run(record_of(file, stored), spec.storage_offset, spec.shape[0]))
                self.numel += spec.shape[0]

    def cut(self, lo: int, hi: int) -> Iterator[Run]:
        """Yield where the elements ``[lo, hi)`` lie, in order."""
        k = bisect_right(self._starts, lo) - 1
        while lo < hi:
            run = self._runs[k]
            skip = lo - self._starts[k]
            numel = min(hi - lo, run.numel - skip)
            yield Run(run.record, run.at + skip, numel)
            lo += numel
            k += 1


def record_of(file: int, stored: Stored) -> Record:
    """Return the record that holds ``stored`` of file number ``file``."""
    _, key, start, nbytes, crc32, header_nbytes = stored
    return Record(file, key, start, nbytes, crc32, header_nbytes)


class Cutter:
    """Makes parts of runs; parameters of one shape that are cut alike share their boxes."""

    def __init__(self) -> None:
        self._boxes: dict[tuple[Shape, int, int], tuple[tuple[Box, int], ...]] = {}

    def part(self, dtype: DType, shape: Shape, runs: Iterable[Run]) -> Part:
        """Return the parameter of ``shape`` whose elements are those of ``runs``, in C order."""
        strides = contiguous_strides(shape)
        pieces: list[Piece] = []
        lo = 0
        for run in runs:
            hi = lo + run.numel
            for box, ahead in self._cut(shape, strides, lo, hi):
                pieces.append(Piece(box, strides, run.at + ahead, run.record))
            lo = hi
        return Part(dtype, shape, tuple(pieces))

    def _cut(self, shape: Shape, strides: Shape, lo: int, hi: int) -> tuple[tuple[Box, int], ...]:
        key = (shape, lo, hi)
        found = self._boxes.get(key)
        if found is None:
            found = self._boxes[key] = tuple(
                (b, sum(o * s for o, s in zip(b.offsets, strides, strict=True)) - lo)
                for b in flat_boxes(shape, lo, hi)
            )
        return found


def whole(file: int, stored: Stored) -> Part:
    """Return a tensor that one file holds."""
    spec = stored.spec
    piece = Piece(Box.whole(spec.shape), spec.strides, spec.storage_offset, record_of(file, stored))
    return Part(spec.dtype, spec.shape, (piece,))


def common_dtype(pieces: Sequence[tuple[int, Stored]]) -> DType | None:
    """Return the element type of all ``pieces``; None where they differ, or are none."""
    dtypes = {stored.spec.dtype for _, stored in pieces}
    return next(iter(dtypes)) if len(dtypes) == 1 else None
