"""From placements to boxes: which part of the global tensor a rank's local tensor is.

Pure functions of integers. Each mesh dimension that shards a tensor dimension cuts the current
index range as torch.chunk does: pieces of ceil(n / parts), the last ones short or empty.

**Order of the cuts.** Plain ``Shard`` placements cut from the left to the right of the mesh. FSDP2 with
tensor parallelism cuts tp first although fsdp stands left of it; torch writes that as
``_StridedShard(dim, split_factor)`` on the fsdp dimension, where the split factor is the number of
pieces that exist before it cuts (``DTensorSpec._maybe_convert_StridedShard_to_shard_order`` in
torch 2.13). Since 2.10 a spec may also carry an explicit ``shard_order``.

**Trap: two meanings of _StridedShard.** Read as an order of cuts, every local tensor is one box,
and that is what FSDP2 really stores. Read left to right, as ``distribute_tensor`` and
``compute_local_shape_and_global_offset`` do, the strided dimension takes the i-th piece of each of
``split_factor`` groups: a list of intervals that is cut further. On even sizes both agree; on uneven
ones they can differ even in the local shape (9 rows on 4×2: rank (3, 0) holds nothing or row 8).
Here the order is tried first, the list where the split factors describe no order or the stored
shape says so. The list can make one local tensor several boxes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from streamconv.ir.boxes import Box, Shape


class Kind(StrEnum):
    """The kinds of placement that torch knows."""

    SHARD = "Shard"
    STRIDED = "_StridedShard"
    REPLICATE = "Replicate"
    PARTIAL = "Partial"


@dataclass(frozen=True, slots=True)
class Placement:
    """What one mesh dimension does to a tensor; ``dim`` is the tensor dimension it shards."""

    kind: Kind
    dim: int = 0
    split_factor: int = 1

    def __str__(self) -> str:
        if self.kind is Kind.SHARD:
            return f"Shard({self.dim})"
        if self.kind is Kind.STRIDED:
            return f"_StridedShard({self.dim}, sf={self.split_factor})"
        return f"{self.kind.value}()"


REPLICATE = Placement(Kind.REPLICATE)


def shard(dim: int) -> Placement:
    """Return a plain ``Shard(dim)``."""
    return Placement(Kind.SHARD, dim)


def strided(dim: int, split_factor: int) -> Placement:
    """Return a ``_StridedShard(dim, split_factor=split_factor)``."""
    return Placement(Kind.STRIDED, dim, split_factor)


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the global tensor, and the index at which it begins inside the local tensor."""

    box: Box
    local_offsets: Shape


Intervals = tuple[tuple[int, int], ...]
"""Half-open ranges of global indices, in the order in which the local tensor holds them."""

ShardOrder = tuple[tuple[int, tuple[int, ...]], ...]
"""(tensor dim, the mesh dims that cut it, first cut first), as in torch's ``shard_order``."""


def local_pieces(
    shape: Shape,
    mesh_shape: Shape,
    placements: Sequence[Placement],
    coordinates: Shape,
    *,
    local_shape: Shape | None = None,
    shard_order: ShardOrder | None = None,
) -> tuple[Piece, ...]:
    """Return the pieces of a tensor of ``shape`` that the rank at ``coordinates`` holds.

    ``local_shape`` is the shape the rank stored: it chooses between the two meanings of
    ``_StridedShard``, and anything else than what the placements say raises ``ValueError``, as do
    placements that make no sense. An empty local tensor gives no piece.
    """
    _check(shape, mesh_shape, placements, coordinates)
    readings: list[list[Intervals]] = []
    order = cut_order(mesh_shape, placements, shard_order)
    if order is not None:
        readings.append(_ordered(shape, mesh_shape, order, coordinates))
    if any(p.kind is Kind.STRIDED for p in placements):
        readings.append(_left_to_right(shape, mesh_shape, placements, coordinates))
    if not readings:
        raise ValueError(f"shard_order {shard_order} does not fit {_names(placements)}")
    for intervals in readings:
        if local_shape is None or local_shape == tuple(map(_length, intervals)):
            return _pieces(intervals)
    raise ValueError(
        f"a local shape of {list(map(_length, readings[0]))} follows from {_names(placements)} of "
        f"{list(shape)} on mesh {list(mesh_shape)} at {list(coordinates)}, but "
        f"{list(local_shape or ())} is stored"
    )


def cut_order(
    mesh_shape: Shape, placements: Sequence[Placement], shard_order: ShardOrder | None = None
) -> ShardOrder | None:
    """Return which mesh dims cut each tensor dim, in order; None where no order fits the placements."""
    cutting = {d: p for d, p in enumerate(placements) if p.kind in (Kind.SHARD, Kind.STRIDED)}
    if shard_order is not None:
        named = [(m, dim) for dim, mesh_dims in shard_order for m in mesh_dims]
        fits = sorted(named) == [(m, p.dim) for m, p in cutting.items()]
        return shard_order if fits else None
    orders: dict[int, list[int]] = {}
    for mesh_dim, placement in reversed(cutting.items()):
        order = orders.setdefault(placement.dim, [])
        pieces_before = 1
        for at in range(len(order) + 1):
            if pieces_before == placement.split_factor:
                order.insert(at, mesh_dim)
                break
            if at < len(order):
                pieces_before *= mesh_shape[order[at]]
        else:
            return None
    return tuple((dim, tuple(order)) for dim, order in sorted(orders.items()))


def _check(
    shape: Shape, mesh_shape: Shape, placements: Sequence[Placement], coordinates: Shape
) -> None:
    if not len(mesh_shape) == len(placements) == len(coordinates):
        raise ValueError(f"{len(placements)} placements for a mesh of {len(mesh_shape)} dimensions")
    if any(not 0 <= c < n for c, n in zip(coordinates, mesh_shape, strict=True)):
        raise ValueError(f"coordinates {coordinates} lie outside the mesh {mesh_shape}")
    for placement in placements:
        if placement.kind is Kind.PARTIAL:
            raise ValueError(
                "a Partial placement: the value is a sum over ranks that was never taken"
            )
        if placement.kind is not Kind.REPLICATE and not 0 <= placement.dim < len(shape):
            raise ValueError(f"{placement} of a tensor with {len(shape)} dimensions")
        if placement.split_factor < 1:
            raise ValueError(f"{placement} has no split factor")


def _names(placements: Sequence[Placement]) -> str:
    return f"({', '.join(map(str, placements))})"


def _length(intervals: Intervals) -> int:
    return sum(stop - start for start, stop in intervals)


def _chunk(length: int, parts: int, index: int) -> tuple[int, int]:
    """Return the range that piece ``index`` of torch.chunk takes; empty ones lie at the end."""
    step = -(-length // parts)
    return min(length, step * index), min(length, step * (index + 1))


def _ordered(
    shape: Shape, mesh_shape: Shape, order: ShardOrder, coordinates: Shape
) -> list[Intervals]:
    result: list[Intervals] = [((0, n),) for n in shape]
    for dim, mesh_dims in order:
        start, stop = 0, shape[dim]
        for m in mesh_dims:
            low, high = _chunk(stop - start, mesh_shape[m], coordinates[m])
            start, stop = start + low, start + high
        result[dim] = ((start, stop),)
    return result


def _left_to_right(
    shape: Shape, mesh_shape: Shape, placements: Sequence[Placement], coordinates: Shape
) -> list[Intervals]:
    result: list[Intervals] = [((0, n),) for n in shape]
    for m, placement in enumerate(placements):
        if placement.kind is Kind.REPLICATE:
            continue
        before = result[placement.dim]
        length = _length(before)
        taken: list[tuple[int, int]] = []
        for group in range(placement.split_factor):
            start, stop = _chunk(length, placement.split_factor, group)
            low, high = _chunk(stop - start, mesh_shape[m], coordinates[m])
            taken += _narrow(before, start + low, start + high)
        result[placement.dim] = _joined(taken)
    return result


def _narrow(intervals: Intervals, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the elements ``start:stop`` of the list that ``intervals`` spell."""
    result: list[tuple[int, int]] = []
    position = 0
    for low, high in intervals:
        a, b = max(start, position), min(stop, position + high - low)
        if a < b:
            result.append((low + a - position, low + b - position))
        position += high - low
    return result


def _joined(intervals: Sequence[tuple[int, int]]) -> Intervals:
    """Join neighbours that touch, so that an even split stays one box."""
    result: list[tuple[int, int]] = []
    for low, high in intervals:
        if result and result[-1][1] == low:
            result[-1] = (result[-1][0], high)
        else:
            result.append((low, high))
    return tuple(result)


def _pieces(intervals: Sequence[Intervals]) -> tuple[Piece, ...]:
    if not math.prod(map(_length, intervals)):
        return ()
    along: list[list[tuple[int, int, int]]] = []
    for ranges in intervals:
        position = 0
        rows: list[tuple[int, int, int]] = []
        for low, high in ranges:
            if low < high:
                rows.append((low, high - low, position))
            position += high - low
        along.append(rows)
    return tuple(
        Piece(
            Box(tuple(c[0] for c in corner), tuple(c[1] for c in corner)),
            tuple(c[2] for c in corner),
        )
        for corner in itertools.product(*along)
    )
