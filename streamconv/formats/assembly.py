"""Global tensors of stored pieces, whose places in the tensor are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from streamconv.errors import BadInputError
from streamconv.ir.boxes import Box, Shape
from streamconv.ir.dtypes import DType
from streamconv.ir.source import GlobalTensor, Record, ShardLayout, ShardTable


@dataclass(frozen=True, slots=True)
class Stored:
    """A piece as it lies in its record: its box, the strides of the data, and where they are."""

    box: Box
    strides: Shape
    storage_offset: int
    record: Record


class Assembler:
    """Makes global tensors of stored pieces; tensors that are cut alike share their layout."""

    def __init__(self) -> None:
        self._layouts: dict[ShardLayout, ShardLayout] = {}

    def tensor(
        self, name: str, dtype: DType, shape: Shape, pieces: Sequence[Stored]
    ) -> GlobalTensor:
        """Return the tensor; raises :class:`BadInputError` unless ``pieces`` tile ``shape``."""
        pieces = sorted(pieces, key=lambda p: p.box.offsets)
        table = ShardTable()
        for piece in pieces:
            table.append(*astuple(piece.record))
        try:
            layout = ShardLayout(
                shape,
                tuple(p.box for p in pieces),
                tuple(p.strides for p in pieces),
                tuple(p.storage_offset for p in pieces),
            )
            layout = self._layouts.setdefault(layout, layout)
            return GlobalTensor(name, dtype, layout, table, _cut(shape, pieces))
        except ValueError as error:
            raise BadInputError(
                "the pieces of a tensor do not make it up",
                where=name,
                found=str(error),
                hint="the checkpoint is incomplete or damaged",
            ) from None


def _cut(shape: Shape, pieces: Sequence[Stored]) -> str:
    """Return in words along which dimensions a tensor is cut."""
    if len(pieces) == 1:
        return "whole"
    parts = (
        f"dim {d} in {n}"
        for d in range(len(shape))
        if (n := len({p.box.offsets[d] for p in pieces})) > 1
    )
    return ", ".join(parts)
