"""Lowered moves, replayed with numpy, give what torch's own views give."""

from __future__ import annotations

import itertools
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.errors import BadInputError
from streamconv.ir.boxes import Box, contiguous_strides
from streamconv.ir.dtypes import BF16
from streamconv.ir.lowering import Move, clip, lower
from streamconv.ir.recipe import Cast, Gather, Part, SourceRef, View
from streamconv.ir.source import ShardLayout, ShardTable


def replay(moves: list[Move], numel: int, storages: list[np.ndarray]) -> np.ndarray:
    out = np.full(numel, -1, dtype=np.int64)
    written = np.zeros(numel, dtype=np.int64)
    for m in moves:
        dst, src = np.array(m.dst_offset), np.array(m.src_offset)
        for d in m.dims:
            steps = np.arange(d.size)
            dst = dst[..., None] + steps * d.dst
            src = src[..., None] + steps * d.src
        out[dst] = storages[m.shard][src]
        np.add.at(written, dst, 1)
    assert (written == 1).all(), "every output element is written exactly once"
    return out


def grid_layout(shape: tuple[int, ...], cuts: list[list[int]]) -> tuple[ShardLayout, list[Box]]:
    boxes = [Box((), ())]
    for size, points in zip(shape, cuts, strict=True):
        edges = sorted({0, size, *(p for p in points if p < size)})
        boxes = [
            Box((*b.offsets, lo), (*b.sizes, hi - lo))
            for b in boxes
            for lo, hi in itertools.pairwise(edges)
        ]
    strides = tuple(contiguous_strides(b.sizes) for b in boxes)
    return ShardLayout(shape, tuple(boxes), strides, tuple(range(len(boxes)))), boxes


def storages_of(full: np.ndarray, boxes: list[Box]) -> list[np.ndarray]:
    """Each shard lies in its own storage behind as many foreign elements as its number says."""
    pieces = [
        full[tuple(slice(o, o + s) for o, s in zip(b.offsets, b.sizes, strict=True))] for b in boxes
    ]
    return [np.concatenate([np.full(j, -7), p.reshape(-1)]) for j, p in enumerate(pieces)]


@st.composite
def sharded(draw: st.DrawFn) -> tuple[np.ndarray, ShardLayout, list[np.ndarray]]:
    shape = tuple(draw(st.lists(st.integers(1, 8), min_size=1, max_size=4)))
    cuts = [draw(st.lists(st.integers(1, 7), max_size=3)) for _ in shape]
    full = np.arange(np.prod(shape)).reshape(shape)
    layout, boxes = grid_layout(shape, cuts)
    return full, layout, storages_of(full, boxes)


@st.composite
def numpy_view(draw: st.DrawFn, array: np.ndarray) -> np.ndarray:
    """A chain of the view ops that torch offers, done by numpy without copying."""
    view = array
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["slice", "transpose", "split", "merge", "index"]))
        if kind == "slice" and view.ndim:
            d = draw(st.integers(0, view.ndim - 1))
            lo = draw(st.integers(0, view.shape[d] - 1))
            hi = draw(st.integers(lo + 1, view.shape[d]))
            step = draw(st.integers(1, 3))
            view = view[(slice(None),) * d + (slice(lo, hi, step),)]
        elif kind == "transpose" and view.ndim:
            view = view.transpose(draw(st.permutations(range(view.ndim))))
        elif kind == "index" and view.ndim > 1:
            d = draw(st.integers(0, view.ndim - 1))
            view = view[(slice(None),) * d + (draw(st.integers(0, view.shape[d] - 1)),)]
        elif kind in ("split", "merge") and view.ndim:
            if kind == "split":
                d = draw(st.integers(0, view.ndim - 1))
                n = view.shape[d]
                f = draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0]))
                target = (*view.shape[:d], f, n // f, *view.shape[d + 1 :])
            else:
                target = (-1,)
            reshaped = view.reshape(target)
            if np.shares_memory(reshaped, array):
                view = reshaped
    return view


def as_view(part: np.ndarray, whole: np.ndarray, fqn: str = "w") -> View:
    item = whole.itemsize
    offset = (part.__array_interface__["data"][0] - whole.__array_interface__["data"][0]) // item
    return View(
        SourceRef(fqn, whole.shape), part.shape, tuple(s // item for s in part.strides), offset
    )


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_any_view_of_any_sharding(data: st.DataObject) -> None:
    full, layout, storages = data.draw(sharded())
    part = data.draw(numpy_view(full))
    moves = lower(as_view(part, full), lambda _: layout)
    assert (replay(moves, part.size, storages) == part.reshape(-1)).all()


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_views_of_gathers_of_views(data: st.DataObject) -> None:
    full, layout, storages = data.draw(sharded())
    a = data.draw(numpy_view(full))
    copies = data.draw(st.integers(1, 3))
    stacked = np.ascontiguousarray(np.stack([a] * copies))
    gather = Gather(
        stacked.shape,
        tuple(
            Part(
                Box((k, *(0 for _ in a.shape)), (1, *a.shape)),
                View(
                    SourceRef("w", full.shape),
                    (1, *a.shape),
                    (0, *as_view(a, full).strides),
                    as_view(a, full).offset,
                ),
            )
            for k in range(copies)
        ),
    )
    part = data.draw(numpy_view(stacked))
    flat = as_view(part, stacked)
    moves = lower(View(gather, flat.shape, flat.strides, flat.offset), lambda _: layout)
    assert (replay(moves, part.size, storages) == part.reshape(-1)).all()


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_windows_of_moves_are_a_partition(data: st.DataObject) -> None:
    full, layout, storages = data.draw(sharded())
    part = data.draw(numpy_view(full))
    moves = lower(as_view(part, full), lambda _: layout)
    width = data.draw(st.integers(1, max(1, part.size)))
    pieces = [
        piece
        for lo in range(0, part.size, width)
        for m in moves
        for piece in clip(m, lo, min(lo + width, part.size))
    ]
    assert (replay(pieces, part.size, storages) == part.reshape(-1)).all()


def test_ops_run_inner_first() -> None:
    layout, _ = grid_layout((4,), [[]])
    inner = View(SourceRef("w", (4,)), (4,), (1,), 0, (Cast(BF16),))
    gather = Gather((4,), (Part(Box((0,), (4,)), inner),))
    (move,) = lower(View(gather, (4,), (1,), 0, ()), lambda _: layout)
    assert move.ops == (Cast(BF16),)


def test_a_dim0_shard_is_one_contiguous_move() -> None:
    layout, _ = grid_layout((8, 6), [[4], []])
    moves = lower(View(SourceRef("w", (8, 6)), (8, 6), (6, 1)), lambda _: layout)
    assert [(m.shard, m.dst_offset, m.src_offset, m.dims) for m in moves] == [
        (0, 0, 0, ((24, 1, 1),)),
        (1, 24, 1, ((24, 1, 1),)),
    ]


def test_scalars_and_empty_tensors() -> None:
    scalar = ShardLayout((), (Box((), ()),), ((),), (0,))
    (move,) = lower(View(SourceRef("s", ()), (), ()), lambda _: scalar)
    assert (move.dst_offset, move.src_offset, move.dims) == (0, 0, ())
    empty = ShardLayout((0, 4), (Box((0, 0), (0, 4)),), ((4, 1),), (0,))
    assert lower(View(SourceRef("e", (0, 4)), (0, 4), (4, 1)), lambda _: empty) == []


def test_a_small_diagonal_is_unrolled_and_a_large_one_refused() -> None:
    layout, _ = grid_layout((4, 4), [[], []])
    moves = lower(View(SourceRef("w", (4, 4)), (4,), (5,)), lambda _: layout)
    assert [m.src_offset for m in moves] == [0, 5, 10, 15]
    large, _ = grid_layout((2000, 2000), [[], []])
    with pytest.raises(BadInputError, match="not a union of at most 1024 boxes"):
        lower(View(SourceRef("w", (2000, 2000)), (2000,), (2001,)), lambda _: large)


def test_a_table_holds_what_its_columns_were_too_narrow_for() -> None:
    rows = [
        (1, 2, 3, 4, 5, 6),
        (70_000, 2, 1 << 40, 1 << 33, 0xFFFFFFFF, 6),
        (2, 1 << 17, 5, 70_000, 0, 9),
    ]
    table = ShardTable()
    for row in rows:
        table.append(*row)
    assert [astuple(record) for record in table] == rows
    with pytest.raises(OverflowError):
        table.append(0, 0, 1 << 64, 0, 0, 0)
