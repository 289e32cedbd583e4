"""Replicas: are the bytes that two ranks hold of one tensor the same? One rule for all formats.

Where a checksum tells, no byte is read: equal CRC-32 of the two records and equal views of them are
equal tensors. A CRC covers the whole storage, which may hold padding or other parameters, and 0 is
none: then the elements themselves are compared, a MiB at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv.errors import BadInputError
from streamconv.files.inputs import InputFile, opened
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import DType
from streamconv.ir.source import Record
from streamconv.torchfile.rankfile import Stored

if TYPE_CHECKING:
    import numpy.typing as npt

_READ_NBYTES = 1 << 20
_TILE_NUMEL = 1 << 16


@dataclass(frozen=True, slots=True)
class Local:
    """What one rank file holds of a parameter: a view of a stored record."""

    file: int
    stored: Stored
    shape: Shape
    strides: Shape
    storage_offset: int

    @staticmethod
    def of(file: int, stored: Stored) -> Local:
        """Return the tensor ``stored`` of file number ``file``."""
        spec = stored.spec
        return Local(file, stored, spec.shape, spec.strides, spec.storage_offset)

    def part(self, offsets: Shape, sizes: Shape) -> Local:
        """Return the box of it that begins at ``offsets``."""
        shift = sum(o * s for o, s in zip(offsets, self.strides, strict=True))
        return Local(self.file, self.stored, sizes, self.strides, self.storage_offset + shift)

    @property
    def dtype(self) -> DType:
        """Return the element type."""
        return self.stored.spec.dtype

    @property
    def record(self) -> Record:
        """Return the record that holds the storage."""
        _, key, start, nbytes, crc32, header_nbytes = self.stored
        return Record(self.file, key, start, nbytes, crc32, header_nbytes)

    @property
    def place(self) -> tuple[object, ...]:
        """Return which elements of its record it shows; strides of single steps tell nothing."""
        steps = tuple(s for n, s in zip(self.shape, self.strides, strict=True) if n > 1)
        return self.storage_offset, steps, self.stored.nbytes

    @property
    def fills_record(self) -> bool:
        """Whether every byte of its record is an element of it, once."""
        return math.prod(self.shape) * self.dtype.itemsize == self.stored.nbytes and _is_dense(
            self.shape, self.strides
        )


class Replicas:
    """Compares local tensors, and counts those that :meth:`drop` was told of.

    ``paths`` are the files, by their numbers.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.dropped = 0
        self.dropped_nbytes = 0

    def same(self, one: Local, two: Local) -> bool:
        """Whether both are the same tensor, element for element."""
        if one.dtype is not two.dtype or one.shape != two.shape:
            return False
        if 0 in one.shape:
            return True
        first, second = one.stored, two.stored
        if one.place == two.place:
            if first.crc32 and first.crc32 == second.crc32:
                return True
            if first.crc32 and second.crc32 and one.fills_record:
                return False
        return _same_elements(self._view(one), self._view(two))

    def drop(self, replica: Local) -> None:
        """Count ``replica``, which was found equal to what is kept."""
        self.count(replica.dtype.itemsize * math.prod(replica.shape))

    def count(self, nbytes: int) -> None:
        """Count a replica of ``nbytes`` bytes."""
        self.dropped += 1
        self.dropped_nbytes += nbytes

    def path(self, local: Local) -> Path:
        """Return the file that holds ``local``."""
        return self.paths[local.file]

    def _view(self, local: Local) -> _View:
        itemsize = local.dtype.itemsize
        start = local.stored.start + local.storage_offset * itemsize
        return _View(self.path(local), start, local.shape, local.strides, itemsize)


@dataclass(frozen=True, slots=True)
class _View:
    """Elements of a file: the first lies at byte ``start``, strides count elements."""

    path: Path
    start: int
    shape: Shape
    strides: Shape
    itemsize: int

    @property
    def span_nbytes(self) -> int:
        """Return the bytes from the first element to the end of the last."""
        steps = zip(self.shape, self.strides, strict=True)
        return (sum((n - 1) * s for n, s in steps) + 1) * self.itemsize

    def ordered(self, dims: Sequence[int]) -> _View:
        """Return the same elements with the dimensions in another order."""
        shape, strides = (tuple(t[d] for d in dims) for t in (self.shape, self.strides))
        return _View(self.path, self.start, shape, strides, self.itemsize)

    def box(self, offsets: Shape, sizes: Shape) -> _View:
        shift = sum(o * s for o, s in zip(offsets, self.strides, strict=True)) * self.itemsize
        return _View(self.path, self.start + shift, sizes, self.strides, self.itemsize)

    def read(self, file: InputFile) -> npt.NDArray[Any]:
        """Return the elements, each as its bytes; in no more pieces than their distances ask for."""
        import numpy as np

        span = self.span_nbytes
        if span > max(_READ_NBYTES, 4 * math.prod(self.shape) * self.itemsize):
            # Far apart: along the longest way, in two halves.
            ways = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
            dim = ways.index(max(ways))
            half = self.shape[dim] // 2
            sizes = (half, self.shape[dim] - half)
            parts = [
                self.box(
                    tuple(half * k if d == dim else 0 for d in range(len(self.shape))),
                    tuple(sizes[k] if d == dim else n for d, n in enumerate(self.shape)),
                ).read(file)
                for k in range(2)
            ]
            return np.concatenate(parts, axis=dim)
        raw = _read(file, self.start, span, self.path)
        strides = (*(s * self.itemsize for s in self.strides), 1)
        return np.ndarray((*self.shape, self.itemsize), np.uint8, raw, 0, strides)


def _same_elements(one: _View, two: _View) -> bool:
    # In the order of their distances in the file, so that the last dimension is read in one go.
    dims = [d for d, n in enumerate(one.shape) if n > 1]
    dims.sort(key=lambda d: -one.strides[d])
    one, two = one.ordered(dims), two.ordered(dims)
    import numpy as np

    with opened(one.path) as first, opened(two.path) as second:
        if one.strides == two.strides and _is_dense(one.shape, one.strides):
            nbytes = one.span_nbytes
            return all(
                _read(first, one.start + at, min(_READ_NBYTES, nbytes - at), one.path)
                == _read(second, two.start + at, min(_READ_NBYTES, nbytes - at), two.path)
                for at in range(0, nbytes, _READ_NBYTES)
            )
        return all(
            np.array_equal(
                one.box(offsets, sizes).read(first),
                two.box(offsets, sizes).read(second),
            )
            for offsets, sizes in _tiles((0,) * len(dims), one.shape)
        )


def _tiles(offsets: Shape, sizes: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Cut a box into tiles that are short in every dimension: both orders of reading are bearable."""
    if math.prod(sizes) <= _TILE_NUMEL:
        yield offsets, sizes
        return
    dim = sizes.index(max(sizes))
    half = sizes[dim] // 2
    yield from _tiles(offsets, (*sizes[:dim], half, *sizes[dim + 1 :]))
    yield from _tiles(
        (*offsets[:dim], offsets[dim] + half, *offsets[dim + 1 :]),
        (*sizes[:dim], sizes[dim] - half, *sizes[dim + 1 :]),
    )


def _is_dense(shape: Shape, strides: Shape) -> bool:
    """Whether the elements fill what they span, each once."""
    expected = 1
    for step, size in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n > 1):
        if step != expected:
            return False
        expected *= size
    return True


def _read(file: InputFile, start: int, nbytes: int, path: Path) -> bytes:
    data = file.pread(nbytes, start)
    if len(data) < nbytes:
        raise BadInputError("the file became shorter while replicas were compared", where=str(path))
    return data
