"""Views of stored tensors as tensors of their own: the same bytes, under another name and shape.

A view that only takes elements lies in its sources' records as boxes with strides, as every stored
tensor does. So queries, keys and values of a fused weight, or one expert of many, can each be what an
op needs its base to be: a whole matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import product

from streamconv.ir.boxes import Box, Shape, contiguous_strides
from streamconv.ir.lowering import Move, lower, walks_along
from streamconv.ir.recipe import View
from streamconv.ir.source import GlobalTensor, ShardLayout, ShardTable


def stored_view(name: str, view: View, tensors: Mapping[str, GlobalTensor]) -> GlobalTensor:
    """Return ``view`` as the tensor ``name``; ``tensors`` are what it may draw from, by FQN.

    Raises ``ValueError`` for a view that computes, and for sources of several types.
    """
    fqns = view.sources()
    if any(v.ops for v in view.walk()) or len({tensors[f].dtype for f in fqns}) != 1:
        raise ValueError(f"{name}: not stored anywhere as it is")
    table = ShardTable()
    boxes: list[tuple[Box, Shape, int]] = []
    for move in lower(view, lambda fqn: tensors[fqn].layout):
        record = tensors[fqns[move.source]].shards[move.shard]
        for piece in _boxes(move, view.shape):
            boxes.append(piece)
            table.append(
                record.file,
                record.key,
                record.start,
                record.nbytes,
                record.crc32,
                record.header_nbytes,
            )
    layout = ShardLayout(view.shape, *zip(*boxes, strict=True)) if boxes else None
    if layout is None:
        raise ValueError(f"{name}: a tensor without elements")
    return GlobalTensor(name, tensors[fqns[0]].dtype, layout, table, f"of {', '.join(fqns)}"[:200])


def _boxes(move: Move, shape: Shape) -> Iterator[tuple[Box, Shape, int]]:
    """Yield (box of the output, strides in storage, storage offset) of what a move writes."""
    for axes, start, src_offset in walks_along(move, shape):
        unrolled = [(a, d) for a, dims in enumerate(axes) for d in dims if d.dst != 1]
        along = [next((d for d in dims if d.dst == 1), None) for dims in axes]
        sizes = tuple(d.size if d is not None else 1 for d in along)
        strides = tuple(d.src if d is not None else 0 for d in along)
        for index in product(*(range(d.size) for _, d in unrolled)):
            offsets, src = list(start), src_offset
            for i, (axis, d) in zip(index, unrolled, strict=True):
                offsets[axis] += i * d.dst
                src += i * d.src
            yield Box(tuple(offsets), sizes), strides, src


def spread(tensor: GlobalTensor, size: int) -> GlobalTensor:
    """Return a tensor of ``size`` matrices of one, or of fewer, each of which stands for several.

    ``tensor`` is ``[rows, columns]``, or ``[n, rows, columns]`` with ``n`` dividing ``size``. Raises
    ``ValueError`` for any other.
    """
    layout = tensor.layout
    held = 1 if len(layout.shape) == 2 else layout.shape[0]
    if len(layout.shape) not in (2, 3) or not held or size % held:
        raise ValueError(f"{tensor.fqn}: {list(layout.shape)} does not stand for {size} matrices")
    if layout.shape[0] == size and len(layout.shape) == 3:
        return tensor
    times = size // held
    table = ShardTable()
    cut: list[tuple[Box, Shape, int]] = []
    for j, (box, strides, offset) in enumerate(
        zip(layout.boxes, layout.strides, layout.storage_offsets, strict=True)
    ):
        if len(layout.shape) == 2:
            box, strides = Box((0, *box.offsets), (1, *box.sizes)), (0, *strides)
        r = tensor.shards[j]
        for k in range(box.sizes[0]):
            at = (box.offsets[0] + k) * times
            moved = Box((at, *box.offsets[1:]), (times, *box.sizes[1:]))
            cut.append((moved, (0, *strides[1:]), offset + k * strides[0]))
            table.append(r.file, r.key, r.start, r.nbytes, r.crc32, r.header_nbytes)
    shape = (size, *layout.shape[-2:])
    return GlobalTensor(
        tensor.fqn,
        tensor.dtype,
        ShardLayout(shape, *zip(*cut, strict=True)),
        table,
        tensor.placement,
    )


def keeps_columns(view: View, source: Shape) -> bool:
    """Whether a view of one tensor of the shape ``source`` only takes rows of its last axis, whole.

    Such a view may be taken of the left factor of a product as well as of the product.
    """
    columns = source[-1]
    if len(view.shape) != 2 or view.shape[-1] != columns:
        return False
    return all(
        (m.dst_offset - m.src_offset) % columns == 0
        and all((d.dst - d.src) % columns == 0 for d in m.dims)
        for m in _moves(view, source)
    )


def matrix_of(view: View, source: Shape) -> int | None:
    """Return which matrix of ``source`` ``[n, rows, columns]`` a view is of; None for several."""
    plane = math.prod(source[-2:])
    found = {
        n
        for m in _moves(view, source)
        for n in (
            m.src_offset // plane,
            (m.src_offset + sum((d.size - 1) * d.src for d in m.dims)) // plane,
        )
    }
    return found.pop() if len(found) == 1 else None


def _moves(view: View, source: Shape) -> list[Move]:
    """Return the moves that make ``view`` of one whole tensor of the shape ``source``."""
    layout = ShardLayout(source, (Box.whole(source),), (contiguous_strides(source),), (0,))
    return lower(view, lambda _: layout)
