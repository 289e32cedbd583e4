"""Lowering: from a recipe's views to moves between an output tensor and stored shards.

A view says where each element of an output lies in a C-contiguous tensor; that tensor is cut into
boxes. Both together give strided copies of hyper-rectangles ("moves"), never byte runs: a tensor of
any size needs about as many moves as it has shards. Pure integer arithmetic, no I/O.

The one idea: along one axis of a tensor of ``S`` elements, some dimensions of a view step by
multiples ``m0 > m1 > …``; the index along the axis is ``start + Σ i_k·m_k``, a mixed-radix number.
The indices that fall into an interval are a few hyper-rectangles: the whole rows in the middle, and
the ragged ends by recursion. The same cut serves shards (an interval per axis), gathers, and a
window of an output file (an interval of the flat output).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from streamconv.errors import BadInputError
from streamconv.ir.boxes import Box, Shape, contiguous_strides
from streamconv.ir.recipe import (
    AddProduct,
    AddScalar,
    Cast,
    Decode,
    Gather,
    MulScale,
    Op,
    Placed,
    Sum,
    View,
    Zero,
)
from streamconv.ir.source import ShardLayout

# No view that a known model makes needs a single step; what needs more would swell the plan.
_MAX_UNROLLED = 1024


class Dim(NamedTuple):
    """``size`` steps: ``dst`` elements apart in the output, ``src`` apart in the input."""

    size: int
    dst: int
    src: int


@dataclass(frozen=True, slots=True)
class PlacedAt:
    """What depends on where in a matrix the elements of one shard lie.

    The shard's first element is storage element ``start`` and lies at (``row``, ``column``); rows are
    ``row_step`` and columns ``column_step`` storage elements apart. ``number`` is that of the product,
    or the scale, among those of the output tensor.
    """

    number: int
    start: int
    row: int
    column: int
    row_step: int
    column_step: int


@dataclass(frozen=True, slots=True)
class ProductAt(PlacedAt):
    """A low-rank update as the elements of one shard see it."""


@dataclass(frozen=True, slots=True)
class ScaledAt(PlacedAt):
    """A block-wise scale as the elements of one shard see it."""


MoveOp = Cast | AddScalar | ProductAt | ScaledAt | Zero | Decode


class Patch(NamedTuple):
    """A rectangle of a matrix as a walk meets it.

    ``rows`` and ``columns`` step along one axis each: their ``src`` counts rows and columns, from
    (``row``, ``column``) on; ``free`` dims stand still on the matrix. ``dst_offset`` and ``dst`` are
    those of the output.
    """

    rows: tuple[Dim, ...]
    columns: tuple[Dim, ...]
    free: tuple[Dim, ...]
    row: int
    column: int
    dst_offset: int


@dataclass(frozen=True, slots=True)
class Move:
    """A strided copy: a hyper-rectangle of an output tensor out of one shard's storage.

    Offsets and strides count elements: ``dst_*`` of the C-contiguous output tensor, ``src_*`` of the
    record that holds the shard. ``source`` indexes the tensors the recipe draws from, ``shard`` the
    pieces of that tensor. ``ops`` turn a stored element into an output element.
    """

    source: int
    shard: int
    dst_offset: int
    src_offset: int
    dims: tuple[Dim, ...]
    ops: tuple[MoveOp, ...] = ()

    @property
    def last_dst(self) -> int:
        """Return the last output element that the move writes."""
        return self.dst_offset + sum((d.size - 1) * d.dst for d in self.dims)


@dataclass(frozen=True, slots=True)
class _Region:
    """Elements of an output (``dst``) and where they lie in a C-contiguous base (``src``)."""

    dims: tuple[Dim, ...]
    dst_offset: int
    src_offset: int


def lower(
    view: View,
    layout_of: Callable[[str], ShardLayout],
    order: Mapping[str, int] | None = None,
    numbers: Mapping[Placed, int] | None = None,
) -> list[Move]:
    """Return the moves that make ``view``, in the order of their output offsets.

    ``layout_of`` gives the layout of a global tensor, ``order`` the number of each source (by default
    its place in ``view.sources()``), ``numbers`` those of products and scales (:func:`numbered`).
    Raises :class:`BadInputError` for a view that is not a union of boxes (a diagonal, a window that
    overlaps itself).
    """
    if order is None:
        order = {fqn: k for k, fqn in enumerate(view.sources())}
    if numbers is None:
        numbers = numbered(view)
    dims = tuple(
        Dim(n, d, s)
        for n, d, s in zip(view.shape, contiguous_strides(view.shape), view.strides, strict=True)
    )
    moves: list[Move] = []
    if all(d.size for d in dims):
        _lower(_Region(dims, 0, view.offset), view, (), order, numbers, layout_of, moves)
    moves.sort(key=lambda m: m.dst_offset)
    return moves


def numbered(view: View) -> dict[Placed, int]:
    """Return the number of each low-rank update of a view, and of each of its scales."""
    numbers: dict[Placed, int] = {update: k for k, update in enumerate(view.products())}
    return numbers | {scaled: k for k, scaled in enumerate(view.scales())}


def _lower(
    region: _Region,
    view: View,
    outer_ops: tuple[Op, ...],
    order: Mapping[str, int],
    numbers: Mapping[Placed, int],
    layout_of: Callable[[str], ShardLayout],
    moves: list[Move],
) -> None:
    ops = view.ops + outer_ops
    base = view.base
    if isinstance(base, Sum):
        raise TypeError("what is summed up is made a term at a time, and cannot stand in a view")
    if not isinstance(base, Gather):
        layout = layout_of(base.fqn)
        for j, piece in _cut_by_boxes(
            region, base.shape, layout.boxes, layout.strides, layout.storage_offsets
        ):
            dims = merge_dims(piece.dims)
            placed = tuple(_placed(op, numbers, layout, j) for op in ops)
            moves.append(Move(order[base.fqn], j, piece.dst_offset, piece.src_offset, dims, placed))
        return
    boxes = [p.box for p in base.parts]
    strides = [p.view.strides for p in base.parts]
    offsets = [p.view.offset for p in base.parts]
    for j, piece in _cut_by_boxes(region, base.shape, boxes, strides, offsets):
        _lower(piece, base.parts[j].view, ops, order, numbers, layout_of, moves)


def _placed(op: Op, numbers: Mapping[Placed, int], layout: ShardLayout, shard: int) -> MoveOp:
    if not isinstance(op, AddProduct | MulScale):
        return op
    (row, column), (rows, columns) = layout.boxes[shard].offsets, layout.boxes[shard].sizes
    row_step, column_step = layout.strides[shard]
    # A dimension of one element may carry any stride: give it one that no step can reach.
    if columns == 1:
        column_step = 1 if row_step > 1 or rows == 1 else rows
    if rows == 1:
        row_step = columns * column_step
    start = layout.storage_offsets[shard]
    kind = ProductAt if isinstance(op, AddProduct) else ScaledAt
    return kind(numbers[op], start, row, column, row_step, column_step)


def patches(dims: Sequence[Dim], src_offset: int, at: PlacedAt) -> Iterator[Patch]:
    """Yield the rectangles of the matrix that a walk over a shard's storage meets.

    ``src_offset`` is the storage element at which the walk begins.
    """
    by_rows = at.row_step >= at.column_step
    outer, inner = sorted((at.row_step, at.column_step), reverse=True)
    first = src_offset - at.start
    last = first + sum((d.size - 1) * d.src for d in dims)
    region = _Region(tuple(dims), 0, first)
    for axes, free, start, dst_offset in _to_axes(region, (last // outer + 1, outer)):
        # ``inner`` is 1 but where a shard is a slice of a wider storage.
        along = tuple(Dim(d.size, d.dst, d.src // inner) for d in axes[1])
        across, (i, j) = tuple(axes[0]), (start[0], start[1] // inner)
        if not by_rows:
            along, across, i, j = across, along, j, i
        yield Patch(across, along, tuple(free), at.row + i, at.column + j, dst_offset)


def _cut_by_boxes(
    region: _Region,
    shape: Shape,
    boxes: Sequence[Box],
    strides: Sequence[Shape],
    offsets: Sequence[int],
) -> Iterator[tuple[int, _Region]]:
    """Cut ``region`` along ``boxes`` of its base.

    Yields ``(j, piece)``: what lies in box ``j``, its source now addressed inside that box's own
    storage (``offsets[j]`` and ``strides[j]``).
    """
    for axes, free, start, dst_offset in _to_axes(region, shape):
        reach = [
            o + sum((d.size - 1) * d.src for d in dims) for o, dims in zip(start, axes, strict=True)
        ]
        for j, box in enumerate(boxes):
            if any(
                o >= b + n or r < b
                for o, r, b, n in zip(start, reach, box.offsets, box.sizes, strict=True)
            ):
                continue
            cuts = [
                list(_cut_axis(dims, o, b, b + n))
                for dims, o, b, n in zip(axes, start, box.offsets, box.sizes, strict=True)
            ]
            for choice in product(*cuts):
                dst, src = dst_offset, offsets[j]
                dims: list[Dim] = list(free)
                for axis, (first, kept) in enumerate(choice):
                    step = strides[j][axis]
                    src += (start[axis] + first - box.offsets[axis]) * step
                    for (i, n), dim in zip(kept, axes[axis], strict=True):
                        dst += i * dim.dst
                        if n > 1:
                            dims.append(Dim(n, dim.dst, dim.src * step))
                yield j, _Region(tuple(dims), dst, src)


def _to_axes(
    region: _Region, shape: Shape
) -> Iterator[tuple[list[list[Dim]], list[Dim], list[int], int]]:
    """Split ``region`` so that every dim runs along one axis of ``shape`` and stays inside it.

    Yields ``(dims per axis with src counted along that axis, dims that stand still, start index per
    axis, dst offset)``; the dims of one axis are sorted by falling step.
    """
    steps = contiguous_strides(shape)
    rest = region.src_offset
    start = []
    for step in steps:
        index, rest = divmod(rest, step)
        start.append(index)
    axes: list[list[Dim]] = [[] for _ in shape]
    free: list[Dim] = []
    for dim in region.dims:
        if dim.size == 1:
            continue
        if dim.src == 0:
            free.append(dim)
            continue
        # Axes of size 1 share their stride with the next one and hold no step at all.
        axis = next((a for a, s in enumerate(steps) if s <= dim.src and shape[a] > 1), None)
        if axis is None or dim.src % steps[axis]:
            yield from _unroll(region, dim, shape)
            return
        axes[axis].append(Dim(dim.size, dim.dst, dim.src // steps[axis]))
    for axis, dims in enumerate(axes):
        dims.sort(key=lambda d: -d.src)
        inner = 0
        for dim in reversed(dims):
            if dim.src <= inner:
                raise BadInputError(f"a view over the shape {list(shape)} overlaps itself")
            inner += (dim.size - 1) * dim.src
        if start[axis] + inner >= shape[axis]:
            # A dim that runs past the end of this axis goes on in the next outer index: split it.
            for piece in _split_spill(region, axis, dims, start[axis], shape, steps):
                yield from _to_axes(piece, shape)
            return
    yield axes, free, start, region.dst_offset


def _unroll(
    region: _Region, dim: Dim, shape: Shape
) -> Iterator[tuple[list[list[Dim]], list[Dim], list[int], int]]:
    """Take each step of a dim that follows no axis (a diagonal, rows of other lengths) by itself."""
    if dim.size > _MAX_UNROLLED:
        raise BadInputError(
            f"a view with {dim.size} steps of {dim.src} over the shape {list(shape)} is not a union of"
            f" at most {_MAX_UNROLLED} boxes"
        )
    k = region.dims.index(dim)
    others = (*region.dims[:k], *region.dims[k + 1 :])
    for i in range(dim.size):
        piece = _Region(others, region.dst_offset + i * dim.dst, region.src_offset + i * dim.src)
        yield from _to_axes(piece, shape)


def _split_spill(
    region: _Region, axis: int, dims: list[Dim], start: int, shape: Shape, steps: Shape
) -> Iterator[_Region]:
    wide = dims[0]
    size, step = shape[axis], steps[axis]
    inner = sum((d.size - 1) * d.src for d in dims[1:])
    k = region.dims.index(Dim(wide.size, wide.dst, wide.src * step))
    before, after = region.dims[:k], region.dims[k + 1 :]
    per_row = size // wide.src
    if size % wide.src == 0 and start + inner < wide.src and wide.size % per_row == 0:
        # Regular: the dim is (outer rows × steps within a row), as a reshape that merged axes.
        split = (
            Dim(wide.size // per_row, wide.dst * per_row, wide.src * step * per_row),
            Dim(per_row, wide.dst, wide.src * step),
        )
        yield _Region((*before, *split, *after), region.dst_offset, region.src_offset)
        return
    # Ragged: the steps that fit whole, then the one that straddles (or the rest) on its own.
    fits = max(0, (size - 1 - inner - start) // wide.src + 1)
    first = min(max(fits, 1), wide.size)
    if first == wide.size:
        raise BadInputError(f"a view reaches outside the shape {list(shape)}")
    for i, n in ((0, first), (first, wide.size - first)):
        yield _Region(
            (*before, Dim(n, wide.dst, wide.src * step), *after),
            region.dst_offset + i * wide.dst,
            region.src_offset + i * wide.src * step,
        )


def _cut_axis(
    dims: Sequence[Dim], start: int, lo: int, hi: int
) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
    """Yield the hyper-rectangles of ``dims`` whose index along one axis lies in ``[lo, hi)``.

    ``dims`` are sorted by falling ``src`` and do not overlap. Yields ``(index of the first element
    relative to start, ((first, count) per dim))`` in rising order.
    """
    if not dims:
        if lo <= start < hi:
            yield 0, ()
        return
    (n, _, m), rest = dims[0], dims[1:]
    inner = sum((d.size - 1) * d.src for d in rest)
    touch_lo, touch_hi = max(0, -((start + inner - lo) // m)), min(n, (hi - 1 - start) // m + 1)
    whole_lo, whole_hi = max(0, -((start - lo) // m)), min(n, (hi - 1 - inner - start) // m + 1)
    if whole_lo >= whole_hi:
        whole_lo = whole_hi = touch_hi
    whole_rest = tuple((0, d.size) for d in rest)
    for i in range(touch_lo, min(whole_lo, touch_hi)):
        for first, kept in _cut_axis(rest, start + i * m, lo, hi):
            yield i * m + first, ((i, 1), *kept)
    if whole_lo < whole_hi:
        yield whole_lo * m, ((whole_lo, whole_hi - whole_lo), *whole_rest)
    for i in range(whole_hi, touch_hi):
        for first, kept in _cut_axis(rest, start + i * m, lo, hi):
            yield i * m + first, ((i, 1), *kept)


def walks_along(move: Move, shape: Shape) -> Iterator[tuple[list[list[Dim]], list[int], int]]:
    """Split a move so that every dim runs along one axis of the output tensor of ``shape``.

    Yields ``(dims per axis with dst counted along that axis, start index per axis, src offset)``.
    """
    # Turned around, as in :func:`clip_box`; no two elements of an output have one place.
    region = _Region(
        tuple(Dim(d.size, d.src, d.dst) for d in move.dims), move.src_offset, move.dst_offset
    )
    for axes, _, start, src_offset in _to_axes(region, shape):
        yield [[Dim(d.size, d.src, d.dst) for d in dims] for dims in axes], start, src_offset


def merge_dims(dims: Sequence[Dim]) -> tuple[Dim, ...]:
    """Return the same walk with as few dims as can be, outermost output step first."""
    merged: list[Dim] = []
    for dim in sorted((d for d in dims if d.size != 1), key=lambda d: -d.dst):
        if merged and merged[-1].dst == dim.size * dim.dst and merged[-1].src == dim.size * dim.src:
            merged[-1] = Dim(merged[-1].size * dim.size, dim.dst, dim.src)
        else:
            merged.append(dim)
    return tuple(merged)


def clip(move: Move, lo: int, hi: int) -> Iterator[Move]:
    """Yield the parts of ``move`` whose output elements lie in the flat range ``[lo, hi)``."""
    if lo <= move.dst_offset and move.last_dst < hi:
        yield move
        return
    # Here the output plays the part of the axis that is cut, hence src=dst.
    along = [Dim(d.size, d.dst, d.dst) for d in move.dims]
    for first, kept in _cut_axis(along, move.dst_offset, lo, hi):
        src = move.src_offset + sum(i * d.src for (i, _), d in zip(kept, move.dims, strict=True))
        dims = tuple(
            Dim(n, d.dst, d.src) for (_, n), d in zip(kept, move.dims, strict=True) if n > 1
        )
        yield Move(move.source, move.shard, move.dst_offset + first, src, dims, move.ops)


def clip_box(move: Move, shape: Shape, lo: Shape, sizes: Shape) -> Iterator[Move]:
    """Yield the parts of ``move`` that lie in a box of the output tensor of ``shape``.

    The result is addressed within a C-contiguous tensor of the box's ``sizes``.
    """
    # The move writes a walk over the output; turned around, the output is the base that is cut.
    region = _Region(
        tuple(Dim(d.size, d.src, d.dst) for d in move.dims), move.src_offset, move.dst_offset
    )
    strides = contiguous_strides(sizes)
    for _, piece in _cut_by_boxes(region, shape, [Box(lo, sizes)], [strides], [0]):
        dims = merge_dims([Dim(d.size, d.src, d.dst) for d in piece.dims])
        yield Move(move.source, move.shard, piece.src_offset, piece.dst_offset, dims, move.ops)
