"""Placements become boxes: literal cases, and whatever torch's own DTensor makes of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from streamconv.ir.boxes import Box, Shape, check_tiling
from streamconv.ir.placements import (
    REPLICATE,
    Kind,
    Piece,
    Placement,
    cut_order,
    local_pieces,
    shard,
    strided,
)


def boxes(
    shape: Shape, mesh: Shape, placements: list[Placement], at: Shape, **more: object
) -> list[tuple[Shape, Shape]]:
    found = local_pieces(shape, mesh, placements, at, **more)  # type: ignore[arg-type]
    return [(p.box.offsets, p.box.sizes) for p in found]


def everywhere(mesh: Shape) -> Iterator[Shape]:
    return itertools.product(*map(range, mesh))


# --- literal -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "rows"), [(0, (0, 3)), (1, (3, 3)), (2, (6, 3)), (3, (9, 2))])
def test_eleven_rows_on_four(at: int, rows: tuple[int, int]) -> None:
    assert boxes((11, 6), (4,), [shard(0)], (at,)) == [((rows[0], 0), (rows[1], 6))]


def test_trailing_ranks_are_empty() -> None:
    assert [len(boxes((5, 2), (4,), [shard(0)], (r,))) for r in range(4)] == [1, 1, 1, 0]
    assert [len(boxes((1,), (4,), [shard(0)], (r,))) for r in range(4)] == [1, 0, 0, 0]


def test_replicas_hold_the_same() -> None:
    for ddp in range(2):
        assert boxes((8,), (2, 4), [REPLICATE, shard(0)], (ddp, 2)) == [((4,), (2,))]


def test_two_dims() -> None:
    assert boxes((8, 6), (2, 3), [shard(0), shard(1)], (1, 2)) == [((4, 4), (4, 2))]


def test_left_to_right_and_right_to_left() -> None:
    plain = [boxes((8,), (2, 2), [shard(0), shard(0)], c)[0][0][0] for c in everywhere((2, 2))]
    tp = [boxes((8,), (2, 2), [strided(0, 2), shard(0)], c)[0][0][0] for c in everywhere((2, 2))]
    assert plain == [0, 2, 4, 6]
    assert tp == [0, 4, 2, 6]  # the table in torch's docstring of _StridedShard


def test_explicit_order() -> None:
    order = ((0, (1, 0)),)
    tp = [
        boxes((8,), (2, 2), [shard(0), shard(0)], c, shard_order=order)[0][0][0]
        for c in everywhere((2, 2))
    ]
    assert tp == [0, 4, 2, 6]


def test_scalar_and_no_mesh_dim() -> None:
    assert boxes((), (4,), [REPLICATE], (1,)) == [((), ())]
    assert boxes((3, 4), (), [], ()) == [((0, 0), (3, 4))]
    assert boxes((0, 4), (2,), [REPLICATE], (0,)) == []


# --- two meanings of _StridedShard ---------------------------------------------------------------


def test_uneven_strided_as_fsdp2_stores_it() -> None:
    """9 rows on fsdp 4 × tp 2: tp cuts 5 + 4, fsdp cuts 2 2 1 0 and 1 1 1 1."""
    found = [boxes((9,), (4, 2), [strided(0, 2), shard(0)], c) for c in everywhere((4, 2))]
    assert found == [
        [((0,), (2,))], [((5,), (1,))], [((2,), (2,))], [((6,), (1,))],
        [((4,), (1,))], [((7,), (1,))], [], [((8,), (1,))],
    ]  # fmt: skip


def test_stored_shape_chooses_the_other_meaning() -> None:
    """torch's own left-to-right reading gives row 8 to rank (3, 0), and nothing to (3, 1)."""
    placements = [strided(0, 2), shard(0)]
    for at, rows in (((3, 0), 1), ((3, 1), 0)):
        shape, offset = _compute_local_shape_and_global_offset(
            (9,), (4, 2), list(at), _torch(placements)
        )
        assert shape == (rows,)
        found = boxes((9,), (4, 2), placements, at, local_shape=(rows,))
        assert found == ([((8,), (1,))] if rows else [])
        assert not rows or offset == (8,)


def test_several_boxes_in_one_local_tensor() -> None:
    """A split factor that no mesh dim explains: every fourth of each half."""
    found = local_pieces((8, 3), (4,), [strided(0, 2)], (1,))
    assert found == (
        Piece(Box((1, 0), (1, 3)), (0, 0)),
        Piece(Box((5, 0), (1, 3)), (1, 0)),
    )


def test_docstring_of_to_replicate_tensor() -> None:
    """9 elements, split factor 2, 4 ranks: the example in torch's placement_types.py."""
    rows = [
        [i for p in local_pieces((9,), (4,), [strided(0, 2)], (r,))
         for i in range(p.box.offsets[0], p.box.ends[0])]
        for r in range(4)
    ]  # fmt: skip
    assert rows == [[0, 1, 5], [2, 3, 6], [4, 7], [8]]


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "mesh", "placements", "at", "message"),
    [
        ((4,), (2,), [Placement(Kind.PARTIAL)], (0,), "Partial"),
        ((4,), (2, 2), [REPLICATE, Placement(Kind.PARTIAL)], (0, 0), "Partial"),
        ((4,), (2,), [shard(1)], (0,), "1 dimensions"),
        ((4,), (2,), [shard(-1)], (0,), "1 dimensions"),
        ((), (2,), [shard(0)], (0,), "0 dimensions"),
        ((4,), (2,), [strided(0, 0)], (0,), "split factor"),
        ((4,), (2,), [strided(0, -2)], (0,), "split factor"),
        ((4,), (2,), [shard(0), shard(0)], (0,), "2 placements for a mesh of 1"),
        ((4,), (2, 2), [shard(0)], (0, 0), "1 placements for a mesh of 2"),
        ((4,), (2,), [shard(0)], (2,), "outside the mesh"),
        ((4,), (2,), [shard(0)], (-1,), "outside the mesh"),
    ],
)
def test_refused(
    shape: Shape, mesh: Shape, placements: list[Placement], at: Shape, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        local_pieces(shape, mesh, placements, at)


@pytest.mark.parametrize("stored", [(3, 6), (2, 6), (0, 6), (11, 6), (6, 3), (4,), ()])
def test_another_local_shape(stored: Shape) -> None:
    right = (3, 6) if stored != (3, 6) else (2, 6)
    at = (0,) if right == (3, 6) else (3,)
    with pytest.raises(ValueError, match="is stored"):
        local_pieces((11, 6), (4,), [shard(0)], at, local_shape=stored)


@pytest.mark.parametrize(
    "order", [((0, (0,)),), ((0, (0, 1, 1)),), ((1, (0, 1)),), (), ((0, (0, 2)),)]
)
def test_order_of_other_placements(order: object) -> None:
    with pytest.raises(ValueError, match="shard_order"):
        local_pieces((8,), (2, 2), [shard(0), shard(0)], (0, 0), shard_order=order)  # type: ignore[arg-type]


# --- any mesh, placements and shape --------------------------------------------------------------

shapes = st.lists(st.integers(0, 13), min_size=1, max_size=3).map(tuple)
meshes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def plain_cases(draw: st.DrawFn) -> tuple[Shape, Shape, list[Placement]]:
    shape, mesh = draw(shapes), draw(meshes)
    one = st.one_of(st.just(REPLICATE), st.integers(0, len(shape) - 1).map(shard))
    return shape, mesh, [draw(one) for _ in mesh]


@st.composite
def strided_cases(draw: st.DrawFn) -> tuple[Shape, Shape, list[Placement]]:
    """Plain cases in which every Shard may have become strided by what cuts to its right."""
    shape, mesh, placements = draw(plain_cases())
    for m, p in enumerate(placements):
        later = [
            n for n, q in zip(mesh[m + 1 :], placements[m + 1 :], strict=True)
            if q.kind is not Kind.REPLICATE and q.dim == p.dim
        ]  # fmt: skip
        if p.kind is Kind.SHARD and later and draw(st.booleans()):
            placements[m] = strided(p.dim, math.prod(later))
    return shape, mesh, placements


def _torch(placements: list[Placement]) -> list[TorchPlacement]:
    make = {
        Kind.SHARD: lambda p: Shard(p.dim),
        Kind.STRIDED: lambda p: _StridedShard(p.dim, split_factor=p.split_factor),
        Kind.REPLICATE: lambda _: Replicate(),
    }
    return [make[p.kind](p) for p in placements]


@settings(max_examples=300, deadline=None)
@given(plain_cases())
def test_equals_torch(case: tuple[Shape, Shape, list[Placement]]) -> None:
    shape, mesh, placements = case
    for at in everywhere(mesh):
        sizes, offsets = _compute_local_shape_and_global_offset(
            shape, mesh, list(at), _torch(placements)
        )
        expected = [] if 0 in sizes else [(tuple(offsets), tuple(sizes))]
        assert boxes(shape, mesh, placements, at, local_shape=tuple(sizes)) == expected


@settings(max_examples=300, deadline=None)
@given(strided_cases())
def test_tiles(case: tuple[Shape, Shape, list[Placement]]) -> None:
    """Ranks that differ only along replicated mesh dims hold the same; the rest tile exactly."""
    shape, mesh, placements = case
    replicated = [m for m, p in enumerate(placements) if p.kind is Kind.REPLICATE]
    groups: dict[Shape, list[Box]] = {}
    for at in everywhere(mesh):
        key = tuple(at[m] for m in replicated)
        groups.setdefault(key, []).extend(p.box for p in local_pieces(shape, mesh, placements, at))
    for found in groups.values():
        assert check_tiling(shape, found) is None
        assert found == next(iter(groups.values()))


@settings(max_examples=300, deadline=None)
@given(strided_cases())
def test_order_equals_torch(case: tuple[Shape, Shape, list[Placement]]) -> None:
    """The order of the cuts is what torch decodes from split factors."""
    _, mesh, placements = case

    class FakeMesh:
        @staticmethod
        def size(dim: int) -> int:
            return mesh[dim]

    expected = DTensorSpec._maybe_convert_StridedShard_to_shard_order(
        tuple(_torch(placements)),
        FakeMesh(),  # type: ignore[arg-type]
    )
    found = cut_order(mesh, placements)
    assert found == (None if expected is None else tuple((e[0], tuple(e[1])) for e in expected))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
)
def test_list_meaning_equals_torch(length: int, cuts: list[tuple[int, int]]) -> None:
    """Left to right with any split factors: the elements are those torch's _split_tensor picks."""
    mesh = tuple(n for n, _ in cuts)
    placements = [strided(0, sf) if sf > 1 else shard(0) for _, sf in cuts]
    assume(cut_order(mesh, placements) is None)
    for at in everywhere(mesh):
        rows = torch.arange(length)
        for p, n, c in zip(_torch(placements), mesh, at, strict=True):
            rows = p._split_tensor(rows, n, with_padding=False)[0][c]  # type: ignore[attr-defined]
        found = [
            i
            for piece in local_pieces((length,), mesh, placements, at)
            for i in range(piece.box.offsets[0], piece.box.ends[0])
        ]
        assert found == rows.tolist()


# --- values of real DTensors ---------------------------------------------------------------------


@pytest.fixture
def fake_world() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("shape", "mesh", "placements"),
    [
        ((11, 6), (4,), [shard(0)]),
        ((5, 7), (4,), [shard(1)]),
        ((11, 6), (2, 3), [shard(0), shard(0)]),
        ((11, 7), (2, 3), [shard(1), shard(0)]),
        ((12, 6), (2, 3), [strided(0, 3), shard(0)]),
        ((16, 2), (2, 2, 2), [strided(0, 4), strided(0, 2), shard(0)]),
        ((9, 2), (2, 2, 2), [REPLICATE, shard(1), shard(0)]),
        ((8, 3), (4,), [strided(0, 2)]),
    ],
)
@pytest.mark.usefixtures("fake_world")
def test_values_of_dtensors(shape: Shape, mesh: Shape, placements: list[Placement]) -> None:
    world = math.prod(mesh)
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for rank, at in enumerate(everywhere(mesh)):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        device_mesh = DeviceMesh("cpu", torch.arange(world).reshape(mesh))
        local = distribute_tensor(
            whole, device_mesh, _torch(placements), src_data_rank=None
        ).to_local()
        dist.destroy_process_group()
        built = torch.full_like(local, -1)
        for piece in local_pieces(shape, mesh, placements, at, local_shape=tuple(local.shape)):
            source = tuple(map(slice, piece.box.offsets, piece.box.ends))
            ends = (o + s for o, s in zip(piece.local_offsets, piece.box.sizes, strict=True))
            built[tuple(map(slice, piece.local_offsets, ends))] = whole[source]
        assert torch.equal(built, local), (rank, at)
