"""What a plan consists of, in memory: of each tensor the sources, moves and bytes; files and totals.

:mod:`streamconv.ir.planfile` keeps it in a file; the byte path needs no more than this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from streamconv.files.names import check_file_name, check_tensor_name
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import F32, DType
from streamconv.ir.lowering import Move
from streamconv.ir.recipe import Encode
from streamconv.ir.source import Record, ShardTable, Skipped, SourceFile


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """A tensor of the checkpoint as a section needs it: its type, and where its shards lie."""

    fqn: str
    dtype: DType
    shards: ShardTable


@dataclass(frozen=True, slots=True)
class PlannedProduct:
    """``scale * (left @ right)``, which is added to a matrix of ``shape``.

    The moves make the float32 factors, C-contiguous, out of the tensor's sources: ``left`` of shape
    (rows, ``rank``), ``right`` of shape (``rank``, columns).
    """

    shape: Shape
    rank: int
    scale: float
    left: tuple[Move, ...]
    right: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class PlannedScale:
    """The scales that the blocks of a matrix are multiplied by.

    The moves make float32, C-contiguous, out of the tensor's sources: of the shape ``grid``, a scale
    for each ``block`` of rows and columns. ``outer`` makes one element, which multiplies the scales,
    or which they are divided by.
    """

    grid: tuple[int, int]
    block: tuple[int, int]
    moves: tuple[Move, ...]
    outer: tuple[Move, ...] = ()
    divide: bool = False


@dataclass(frozen=True, slots=True)
class PlannedTerm:
    """One of the tensors that are summed up: its moves make all elements of the sum, in ``dtype``."""

    weight: float
    dtype: DType
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of an output file.

    ``begin`` and ``end`` count bytes from the end of the file's header. ``last`` holds the indices
    (into ``sources``) of those that no later tensor of the plan draws from, and their records with
    them; where records are shared with later tensors, ``ended`` holds those that are not, as (source,
    shard). ``same_as`` names the tensor whose bytes this one repeats; such a tensor is compared and not
    written. ``products`` are what the moves' :class:`ProductAt` speak of, ``scales`` their
    :class:`ScaledAt`. With ``encode`` the moves make the floats that are quantized. With ``terms``
    there are no moves: those of each term are made, summed up and divided by ``divisor``.
    """

    name: str
    dtype: DType
    shape: Shape
    begin: int
    end: int
    sources: tuple[PlannedSource, ...]
    moves: tuple[Move, ...]
    last: tuple[int, ...] = ()
    same_as: str | None = None
    products: tuple[PlannedProduct, ...] = ()
    ended: tuple[tuple[int, int], ...] | None = None
    scales: tuple[PlannedScale, ...] = ()
    encode: Encode | None = None
    terms: tuple[PlannedTerm, ...] = ()
    divisor: float = 1.0

    def ended_records(self) -> Iterator[tuple[PlannedSource, Record]]:
        """Yield the records that no later tensor of the plan draws from, with a source that does."""
        if self.ended is not None:
            for k, j in self.ended:
                yield self.sources[k], self.sources[k].shards[j]
            return
        for k in self.last:
            for record in self.sources[k].shards:
                yield self.sources[k], record

    def __post_init__(self) -> None:
        check_tensor_name(self.name)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensor in the output."""
        return self.end - self.begin

    def factor(self, product: int, side: Literal["left", "right"]) -> PlannedTensor:
        """Return a factor of one of the products as a tensor of its own, to be read like any other."""
        p = self.products[product]
        shape = (p.shape[0], p.rank) if side == "left" else (p.rank, p.shape[1])
        moves = p.left if side == "left" else p.right
        return self._beside(f"{side} factor of its update", shape, moves)

    def floats(self) -> PlannedTensor:
        """Return what is quantized, as a tensor of its own."""
        if self.encode is None:
            raise TypeError(f"{self.name} is not quantized")
        shape = self.encode.shape
        nbytes = shape[0] * shape[1] * F32.itemsize
        return replace(self, dtype=F32, shape=shape, begin=0, end=nbytes, encode=None)

    def term(self, number: int) -> PlannedTensor:
        """Return one of the terms as a tensor of its own."""
        t = self.terms[number]
        nbytes = math.prod(self.shape) * t.dtype.itemsize
        return replace(self, dtype=t.dtype, begin=0, end=nbytes, moves=t.moves, terms=())

    def scale(self, number: int) -> PlannedTensor:
        """Return one of the scales as a tensor of its own."""
        s = self.scales[number]
        return self._beside("scale", s.grid, s.moves)

    def outer_scale(self, number: int) -> PlannedTensor | None:
        """Return what multiplies one of the scales, or divides it, if anything does."""
        s = self.scales[number]
        return self._beside("outer scale", (1, 1), s.outer) if s.outer else None

    def _beside(self, what: str, shape: Shape, moves: tuple[Move, ...]) -> PlannedTensor:
        nbytes = math.prod(shape) * F32.itemsize
        return PlannedTensor(f"{self.name} ({what})", F32, shape, 0, nbytes, self.sources, moves)


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file copied beside the weights: ``name`` in the output, ``path`` where it comes from."""

    name: str
    path: str
    nbytes: int
    xxh3: str

    def __post_init__(self) -> None:
        check_file_name(self.path)


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file that is made while planning; the plan holds its content."""

    name: str
    content: str


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What a plan's head says of such a file. The index of a large model is megabytes."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file: its name, its whole size, and its header as it will be written.

    ``header`` is the JSON text, padded with spaces; in the file an 8-byte length precedes it.
    ``shared`` are the records of the source, as (file, start), that other output files draw from, too.
    """

    name: str
    nbytes: int
    header: str
    tensors: int
    shared: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Totals:
    """What a plan amounts to; sizes in bytes, dtypes as bytes per torch name.

    ``merged`` counts the tensors that an adapter is merged into, ``scaled`` those that are made of
    quantized ones, ``encoded`` those that are quantized, ``summed`` those that are sums of several.
    """

    tensors: int
    parameters: int
    read_bytes: int
    write_bytes: int
    unverifiable_bytes: int
    source_dtypes: dict[str, int]
    output_dtypes: dict[str, int]
    merged: int = 0
    scaled: int = 0
    encoded: int = 0
    summed: int = 0

    @property
    def placed(self) -> bool:
        """Whether scales or factors are read beside the weights."""
        return bool(self.merged or self.scaled)


@dataclass(frozen=True, slots=True)
class PlanHead:
    """All of a plan but its sections."""

    root: str
    job: dict[str, Any]
    totals: Totals
    notices: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    files: tuple[SourceFile, ...]
    side: tuple[SideFile, ...]
    written: tuple[WrittenFile, ...]
