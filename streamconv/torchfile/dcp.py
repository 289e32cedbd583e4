"""The index of torch's distributed checkpoints (DCP): the pickle ``.metadata``, read without torch.

It holds ``state_dict_metadata`` (name → size, dtype and pieces of a tensor, or a mark that the value
is an object) and ``storage_data`` ((name, offsets) → file, position, length). A third part,
``all_local_plans`` (Megatron only), repeats the pieces for every rank and is not looked at.

Megatron-Core before 0.16 pickles two of these classes under names of its own; whoever has no
Megatron cannot load such a file with torch, here the names are stand-ins like all others.

Traps: ``MetadataIndex`` objects are keys of a dict, so their stand-in must have a hash; it is that of
a tuple of checked strings and integers that nothing can change later. An index of an object has no
``offset`` in its state at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from streamconv.errors import BadInputError, StreamconvError, UnsafeInputError
from streamconv.ir.boxes import Box, Shape
from streamconv.ir.dtypes import DType
from streamconv.torchfile.allowlist import build_globals
from streamconv.torchfile.inert import Inert, InertSize, RefusedPickleError
from streamconv.torchfile.unpickle import load_inert
from streamconv.torchfile.values import MALFORMED, dtype_of

# The index of a large mixture-of-experts model with its optimizer: a million pieces.
_MAX_NBYTES = 512 << 20
_FILE_NAME = re.compile(r"(?!\.)[\w.+-]{1,255}", re.ASCII)
_MAX_RANK = 32


class InertIndex(Inert):
    """``MetadataIndex``: ``state`` is (name, offsets); offsets are None for what is not a tensor."""

    __slots__ = ()
    path = "torch.distributed.checkpoint.metadata.MetadataIndex"

    def __setstate__(self, state: object) -> None:
        if self.state is not None or type(state) is not dict:
            raise RefusedPickleError(f"a state of another form for {self.path}")
        fqn, offsets = state.get("fqn"), state.get("offset")
        if type(fqn) is not str or not (offsets is None or _is_size(offsets)):
            raise RefusedPickleError(f"a state of another form for {self.path}")
        self.state = (fqn, None if offsets is None else tuple(offsets))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InertIndex) and self.state == other.state

    def __hash__(self) -> int:  # type: ignore[override]
        if self.state is None:
            raise RefusedPickleError(f"a dict key {self.path} without a state")
        return hash(self.state)


def _is_size(value: object) -> bool:
    # Megatron-FSDP gives the pieces of its uneven DTensors as plain tuples.
    return type(value) in (InertSize, tuple) and all(type(n) is int for n in value)  # type: ignore[attr-defined]


_DCP = "torch.distributed.checkpoint"
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
_GLOBALS = {
    **build_globals(
        (
            (
                f"{_DCP}.metadata",
                Inert,
                "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata",
            ),
            (f"{_DCP}.metadata", Inert, "TensorProperties StorageMeta _MEM_FORMAT_ENCODING"),
            (f"{_DCP}.filesystem", Inert, "_StorageInfo _StoragePrefix"),
            (
                f"{_DCP}.planner",
                Inert,
                "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
            ),
            (_MCORE, Inert, "MCoreMetadata MCoreSavePlan"),
            *((m, Inert, "PosixPath PurePosixPath") for m in ("pathlib", "pathlib._local")),
            ("io", Inert, "BytesIO"),
        )
    ),
    (f"{_DCP}.metadata", "MetadataIndex"): InertIndex,
}
_METADATA = (_GLOBALS[f"{_DCP}.metadata", "Metadata"], _GLOBALS[_MCORE, "MCoreMetadata"])
_TENSOR = _GLOBALS[f"{_DCP}.metadata", "TensorStorageMetadata"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, and the ``nbytes`` bytes at ``offset`` of ``file`` that hold its record."""

    box: Box
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class DcpTensor:
    """A tensor of the checkpoint: element type, shape, and the pieces it was written in."""

    name: str
    dtype: DType
    shape: Shape
    pieces: tuple[Piece, ...]


class DcpIndex:
    """What ``.metadata`` says. ``tensors`` and ``objects`` are names; :meth:`tensor` gives details."""

    def __init__(self, data: bytes, where: str) -> None:
        self._where = where
        value: Any = load_inert(data, where, extra_globals=_GLOBALS, max_nbytes=_MAX_NBYTES)

        def is_tensor(entry: object) -> bool:
            return type(entry) is _TENSOR

        if type(value) not in _METADATA:
            raise BadInputError(
                "no index of a torch distributed checkpoint",
                where=where,
                found=type(value).__name__,
            )
        try:
            state: Any = getattr(value, "state", None)
            entries, places = state["state_dict_metadata"], state["storage_data"]
            self._tensors: dict[str, Any] = {n: e.state for n, e in entries.items() if is_tensor(e)}
            self.objects = tuple(n for n, e in entries.items() if n not in self._tensors)
            self._places: dict[Any, Any] = {
                index.state: info.state for index, info in places.items()
            }
        except MALFORMED:
            raise self._malformed() from None
        if not all(type(n) is str for n in (*self._tensors, *self.objects)):
            raise UnsafeInputError("a name in the index is not text", where=where)

    @property
    def tensors(self) -> Iterator[str]:
        """Return the names of all tensors."""
        return iter(self._tensors)

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor."""
        try:
            size = self._tensors[name]["size"]
        except MALFORMED:
            raise self._malformed(name) from None
        return self._size(size, name)

    def tensor(self, name: str) -> DcpTensor:
        """Return a tensor with its pieces, as they are listed (whether they tile it is not checked).

        Raises :class:`BadInputError` for a piece that no file holds, or a layout newer than known.
        """
        state = self._tensors[name]
        try:
            properties = state["properties"].state
            # torch pickles the properties as a tuple; older releases as a dict.
            kind = properties[0] if type(properties) is tuple else properties["dtype"]
            return DcpTensor(
                name,
                dtype_of(kind),
                self.shape(name),
                tuple(self._piece(name, chunk.state) for chunk in state["chunks"]),
            )
        except StreamconvError as error:
            error.where = error.where or f"{self._where}, {name}"
            raise
        except MALFORMED:
            raise self._malformed(name) from None

    def object_record(self, name: str) -> Piece | None:
        """Return where the record of an object lies, None where the index does not say."""
        place = self._places.get((name, None))
        return None if place is None else self._record(name, Box((), ()), place)

    def records(self) -> Iterator[Piece]:
        """Yield where every record lies, of tensors and of objects, without its box."""
        for (name, _), place in self._places.items():
            yield self._record(name, Box((), ()), place)

    def _piece(self, name: str, chunk: Any) -> Piece:
        offsets = self._size(chunk["offsets"], name)
        sizes = self._size(chunk["sizes"], name)
        if len(offsets) != len(sizes):
            raise self._malformed(name)
        place = self._places.get((name, offsets))
        if place is None:
            raise BadInputError(
                "the index lists a piece of a tensor that no file holds",
                where=f"{self._where}, {name}",
                expected=f"a record for the piece at {list(offsets)}",
            )
        return self._record(name, Box(offsets, sizes), place)

    def _record(self, name: str, box: Box, place: Any) -> Piece:
        if place.get("transform_descriptors"):
            raise BadInputError(
                "the records of this checkpoint are compressed or encrypted, which cannot be streamed",
                where=f"{self._where}, {name}",
                found="transform_descriptors in the index",
                hint="save it again without extensions of the storage writer",
            )
        file, offset, nbytes = place["relative_path"], place["offset"], place["length"]
        if type(file) is not str or not _FILE_NAME.fullmatch(file):
            raise UnsafeInputError(
                "the index names a file outside the checkpoint's folder",
                where=f"{self._where}, {name}",
                found=str(file)[:80],
            )
        if not (type(offset) is type(nbytes) is int and offset >= 0 and nbytes >= 0):
            raise self._malformed(name)
        return Piece(box, file, offset, nbytes)

    def _size(self, value: Any, name: str) -> Shape:
        if not _is_size(value) or len(value) > _MAX_RANK or any(n < 0 for n in value):
            raise self._malformed(name)
        return tuple(value)

    def _malformed(self, name: str = "") -> BadInputError:
        return BadInputError(
            "the index is pickled in a way that no known torch release does",
            where=f"{self._where}, {name[:200]}" if name else self._where,
        )
