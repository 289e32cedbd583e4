"""The source IR: what a checkpoint holds and where its bytes lie, whatever the format.

Every input format lowers to this. A :class:`GlobalTensor` is cut into local shards; a
:class:`ShardLayout` says how (boxes of the global index space, and the strides of each piece inside
its storage) and is shared by all the tensors that are cut alike, a :class:`ShardTable` says where
(one column entry per box). 1024 rank files of 2000 tensors are two million shards, hence columns of
machine integers and not two million objects.

Byte layout: a shard's element at local index ``i`` lies at byte
``record_start + (storage_offset + sum(i[d] * strides[d])) * itemsize`` of its file. A record is one
stored entry of a zip (one torch storage); its local header begins ``header_nbytes`` before it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from streamconv.errors import shown
from streamconv.files.names import check_file_name, check_tensor_name
from streamconv.ir.boxes import Box, Shape, check_tiling
from streamconv.ir.dtypes import DType


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that holds weights, and what identifies it.

    ``path`` is relative to the checkpoint's root. ``directory_hash`` is the xxh3_128 hex digest of
    the zip central directory (which holds every record's CRC-32), or of the file ``index`` (relative
    to the root) that plays its part for a folder of files that are not one zip from end to end.
    ``entry_prefix`` is what precedes ``/data/<key>`` in the entry names, empty where records are not
    zip entries. ``evidence`` stands for the weights where ``directory_hash`` covers no checksum of them
    (:mod:`streamconv.formats.identity`); it is empty where it does.
    """

    path: str
    nbytes: int
    mtime_ns: int
    directory_hash: str
    entry_prefix: str = ""
    index: str = ""
    evidence: str = ""
    version: str = ""

    def __post_init__(self) -> None:
        check_file_name(self.path)


@dataclass(frozen=True, slots=True)
class Record:
    """One stored entry: where it lies, and what its bytes must sum up to.

    ``crc32`` is 0 where the writer switched checksums off; a record whose bytes sum up to something
    else is then unverifiable, not wrong.
    """

    file: int
    key: int
    start: int
    nbytes: int
    crc32: int
    header_nbytes: int


class ShardLayout:
    """How a global tensor of ``shape`` is cut into stored pieces; immutable and shared.

    ``boxes[j]``, ``strides[j]`` and ``storage_offsets[j]`` describe piece ``j``; the latter two count
    elements of the storage. Construction fails with ``ValueError`` unless the boxes tile the shape.
    """

    __slots__ = ("boxes", "shape", "storage_offsets", "strides")

    def __init__(
        self,
        shape: Shape,
        boxes: tuple[Box, ...],
        strides: tuple[Shape, ...],
        storage_offsets: tuple[int, ...],
    ) -> None:
        if not len(boxes) == len(strides) == len(storage_offsets):
            raise ValueError("a layout needs one stride tuple and one offset per box")
        problem = check_tiling(shape, boxes)
        if problem:
            raise ValueError(problem)
        self.shape = shape
        self.boxes = boxes
        self.strides = strides
        self.storage_offsets = storage_offsets

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardLayout) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return self.shape, self.boxes, self.strides, self.storage_offsets


@dataclass(slots=True)
class ShardTable:
    """Where the pieces of one tensor lie: column entry ``j`` belongs to box ``j`` of its layout.

    A column's integers are as narrow as what it holds allows.
    """

    files: array[int] = field(default_factory=lambda: array("H"))
    keys: array[int] = field(default_factory=lambda: array("H"))
    starts: array[int] = field(default_factory=lambda: array("I"))
    nbytes: array[int] = field(default_factory=lambda: array("H"))
    crcs: array[int] = field(default_factory=lambda: array("I"))
    header_nbytes: array[int] = field(default_factory=lambda: array("H"))

    def append(
        self, file: int, key: int, start: int, nbytes: int, crc32: int, header_nbytes: int
    ) -> None:
        """Add the record that holds the next box."""
        try:
            self.files.append(file)
            self.keys.append(key)
            self.starts.append(start)
            self.nbytes.append(nbytes)
            self.crcs.append(crc32)
            self.header_nbytes.append(header_nbytes)
        except OverflowError:
            self._append_wider(file, key, start, nbytes, crc32, header_nbytes)

    def _append_wider(self, *entry: int) -> None:
        complete = len(self.header_nbytes)
        for name, value in zip(self.__slots__, entry, strict=True):
            column = getattr(self, name)
            del column[complete:]
            if value.bit_length() > 8 * column.itemsize:
                column = array("I" if value.bit_length() <= 32 else "Q", column)
                setattr(self, name, column)
            column.append(value)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, j: int) -> Record:
        return Record(
            self.files[j],
            self.keys[j],
            self.starts[j],
            self.nbytes[j],
            self.crcs[j],
            self.header_nbytes[j],
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[j] for j in range(len(self)))


@dataclass(frozen=True, slots=True)
class GlobalTensor:
    """One tensor of the checkpoint: its FQN, element type, and its pieces.

    ``placement`` is for people (``Shard(0) over fsdp=8``). Construction fails with ``ValueError``
    when a piece would reach outside its record.
    """

    fqn: str
    dtype: DType
    layout: ShardLayout
    shards: ShardTable
    placement: str = ""

    def __post_init__(self) -> None:
        check_tensor_name(self.fqn)
        if len(self.shards) != len(self.layout.boxes):
            raise ValueError(
                f"{self.fqn}: {len(self.layout.boxes)} boxes, {len(self.shards)} places"
            )
        itemsize = self.dtype.itemsize
        for box, strides, offset, nbytes in zip(
            self.layout.boxes,
            self.layout.strides,
            self.layout.storage_offsets,
            self.shards.nbytes,
            strict=True,
        ):
            if box.numel:
                last = offset + sum((n - 1) * s for n, s in zip(box.sizes, strides, strict=True))
                if (last + 1) * itemsize > nbytes:
                    raise ValueError(f"{self.fqn}: {box} reaches past its storage of {nbytes} B")

    @property
    def shape(self) -> Shape:
        """Return the global shape."""
        return self.layout.shape

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole tensor."""
        return math.prod(self.layout.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Undecided:
    """A tensor that can be read in two ways; the model's shape decides.

    ``differing`` names two ranks that hold different values: where the model's shape is that of
    ``copies``, they have diverged. Empty where all hold the same.
    """

    pieces: GlobalTensor
    copies: GlobalTensor
    differing: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something in the checkpoint that does not become an output, and why."""

    name: str
    reason: str

    def __post_init__(self) -> None:
        # A plan is UTF-8, and what is left out may be called anything.
        object.__setattr__(self, "name", shown(self.name))
        object.__setattr__(self, "reason", shown(self.reason))


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint as metadata: no byte of a weight has been read.

    ``undecided`` holds tensors that can be read in two ways. ``halves`` are the tensors that are there
    twice, as the run computed with them: in 16 bits, where ``tensors`` has the masters. ``facts`` are
    for ``inspect``: JSON-able things worth telling. ``side_dir`` is the folder with config.json,
    tokenizer and so on, or None.
    ``naming`` says whose names the tensors have: HuggingFace's, Megatron-Core's, which a family turns
    into the former (:mod:`streamconv.families`), or those of a state dict that a trainer made up, in
    which a model's most often lie below a key (:mod:`streamconv.tracing.hf_names` finds them), or which
    has names of the trainer's own model (:mod:`streamconv.families.native`).
    ``modules`` says that every tensor is a parameter or a buffer of some module, and none a counter of
    the trainer's. ``unproved`` says what only the shapes of the model can prove, empty for nothing.
    """

    root: Path
    format: str
    files: tuple[SourceFile, ...]
    tensors: Mapping[str, GlobalTensor]
    undecided: Mapping[str, Undecided] = field(default_factory=lambda: MappingProxyType({}))
    halves: Mapping[str, GlobalTensor] = field(default_factory=lambda: MappingProxyType({}))
    side_dir: Path | None = None
    skipped: tuple[Skipped, ...] = ()
    notices: tuple[str, ...] = ()
    facts: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    naming: Literal["hf", "mcore", "trainer"] = "hf"
    modules: bool = False
    unproved: str = ""

    def headers(self) -> dict[str, tuple[Shape, DType]]:
        """Return shape and element type of every decided tensor."""
        return {name: (t.shape, t.dtype) for name, t in self.tensors.items()}

    @cached_property
    def nbytes(self) -> int:
        """Return the bytes of all decided tensors, each counted once."""
        return sum(t.nbytes for t in self.tensors.values())
