"""Replicas: are the bytes that two ranks hold of one tensor the same?"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamconv.boxes import Shape
from streamconv.dtypes import DType
from streamconv.source import Record
from streamconv.torchfile.rankfile import Stored

_COMPARE_NBYTES = 1 << 20

Span = tuple[Path, int, int]
"""Bytes of a file: where they start, and how many."""


def same_span(one: Span, two: Span) -> bool:
    """Whether two spans hold equal bytes; read a MiB at a time."""
    if one[2] != two[2]:
        return False
    with one[0].open("rb") as first, two[0].open("rb") as second:
        for done in range(0, one[2], _COMPARE_NBYTES):
            count = min(_COMPARE_NBYTES, one[2] - done)
            if os.pread(first.fileno(), count, one[1] + done) != os.pread(
                second.fileno(), count, two[1] + done
            ):
                return False
    return True


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

    @property
    def dtype(self) -> DType:
        """Return the element type."""
        return self.stored.spec.dtype

    @property
    def record(self) -> Record:
        """Return the record that holds the storage."""
        _, key, start, nbytes, crc32, header_nbytes = self.stored
        return Record(self.file, key, start, nbytes, crc32, header_nbytes)


class Comparer:
    """Compares local tensors: by the CRC-32 of their records where that tells, else by their bytes.

    ``paths`` are the files, by their numbers; ``replicas`` counts what :meth:`drop` was told.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.replicas = 0
        self.replica_nbytes = 0

    def same(self, one: Local, two: Local) -> bool:
        """Whether both are the same tensor, element for element."""
        if one.dtype is not two.dtype or one.shape != two.shape:
            return False
        if (one.strides, one.storage_offset) == (two.strides, two.storage_offset):
            first, second = one.stored, two.stored
            if first.crc32 and first.crc32 == second.crc32 and first.nbytes == second.nbytes:
                return True
            if first.crc32 and second.crc32 and not (first.spec.padded or second.spec.padded):
                return False
        # A CRC covers the whole storage, which may hold other parameters too, or there is none.
        return one.strides == two.strides and same_span(self._span(one), self._span(two))

    def drop(self, replica: Local) -> None:
        """Count ``replica``, which was found equal to what is kept."""
        self.replicas += 1
        self.replica_nbytes += replica.dtype.itemsize * math.prod(replica.shape)

    def path(self, local: Local) -> Path:
        """Return the file that holds ``local``."""
        return self.paths[local.file]

    def _span(self, local: Local) -> Span:
        size = local.dtype.itemsize
        last = sum((n - 1) * s for n, s in zip(local.shape, local.strides, strict=True))
        nbytes = 0 if 0 in local.shape else (last + 1) * size
        return self.path(local), local.stored.start + local.storage_offset * size, nbytes
