"""Three generations of pickled device meshes, by hand and by torch itself."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from streamconv.errors import BadInputError
from streamconv.torchfile import allowlist as allowed
from streamconv.torchfile.allowlist import WEIGHTS
from streamconv.torchfile.inert import Frozen, Inert, InertDict, InertStorage
from streamconv.torchfile.meshes import Mesh, read_mesh

INT32: Any = WEIGHTS["torch", "IntStorage"]
INT64: Any = WEIGHTS["torch", "LongStorage"]


def built(kind: Any, state: object) -> Any:
    made = kind()
    made.__setstate__(state)
    return made


def tensor(
    numel: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: Frozen = INT32
) -> Inert:
    storage = InertStorage()
    storage.kind, storage.key, storage.location, storage.numel = kind, "1", "cpu", numel
    return allowed.REBUILD_TENSOR(storage, offset, shape, strides, False, InertDict())


def ranks_in_order(storage: InertStorage, first: int, nbytes: int) -> bytes:
    """A storage that holds 0, 1, 2, …"""
    code = "i" if storage.kind is INT32 else "q"
    whole = struct.pack(f"<{storage.numel}{code}", *range(storage.numel))
    return whole[first : first + nbytes]


def read(state: object, rank: int) -> Mesh:
    return read_mesh(built(allowed.DEVICE_MESH, state), rank, "f.pt", ranks_in_order)


def old(mesh: Inert, names: object, **more: object) -> dict[str, object]:
    return {"device_type": "cpu", "mesh": mesh, "mesh_dim_names": names, **more}


def layout_2_10(shape: object, strides: object, world: int, names: object) -> dict[str, object]:
    layout = built(allowed.MESH_LAYOUT, {"shape": shape, "stride": strides})
    return {
        "_rank_map": tensor(world, 0, (world,), (1,)),
        "_layout": layout,
        "_mesh_dim_names": names,
    }


def layout_2_13(axes: list[tuple[Any, Any]], world: int, names: object) -> dict[str, object]:
    flat = tuple(built(allowed.FLAT_LAYOUT, {"shape": s, "stride": t}) for s, t in axes)
    return {
        "_rank_map": tensor(world, 0, (world,), (1,)),
        "_flatten_rank_map": tuple(range(world)),
        "_layout": built(allowed.MESH_LAYOUT, {"axes": flat}),
        "_mesh_dim_names": names,
    }


# --- the same mesh in three spellings ------------------------------------------------------------


@pytest.mark.parametrize("rank", range(6))
def test_two_by_three(rank: int) -> None:
    names = ("fsdp", "tp")
    at = divmod(rank, 3)
    for state in (
        old(tensor(6, 0, (2, 3), (3, 1)), names, _coordinate_on_dim=list(at)),
        layout_2_10((2, 3), (3, 1), 6, names),
        layout_2_13([((2,), (3,)), ((3,), (1,))], 6, names) | {"_rank": rank},
    ):
        mesh = read(state, rank)
        assert (mesh.dim_names, mesh.shape, mesh.coordinates) == (names, (2, 3), at)
        assert mesh.ranks == (0, 1, 2, 3, 4, 5)
    assert str(mesh) == "fsdp=2, tp=3"


@pytest.mark.parametrize("rank", range(6))
def test_sub_mesh(rank: int) -> None:
    """('fsdp',) of a 2 × 3 mesh: the ranks of one column."""
    column = rank % 3
    for state in (
        old(tensor(6, column, (2,), (3,)), ("fsdp",), _coordinate_on_dim=[rank // 3]),
        layout_2_10((2,), (3,), 6, ("fsdp",)),
        layout_2_10(2, 3, 6, ("fsdp",)),
        layout_2_13([((2,), (3,))], 6, ("fsdp",)) | {"_coordinate_on_dim": (rank // 3,)},
    ):
        mesh = read(state, rank)
        assert mesh.ranks == (column, column + 3)
        assert mesh.coordinates == (rank // 3,)


@pytest.mark.parametrize("rank", range(8))
def test_middle_of_a_cube(rank: int) -> None:
    """('fsdp',) of (ddp, fsdp, tp) = (2, 2, 2), and ('ddp', 'tp')."""
    ddp, fsdp, tp = rank // 4, rank // 2 % 2, rank % 2
    mesh = read(layout_2_13([((2,), (2,))], 8, ("fsdp",)), rank)
    assert mesh.ranks == (4 * ddp + tp, 4 * ddp + 2 + tp)
    assert mesh.coordinates == (fsdp,)
    mesh = read(layout_2_10((2, 2), (4, 1), 8, ("ddp", "tp")), rank)
    assert mesh.ranks == tuple(4 * d + 2 * fsdp + t for d in range(2) for t in range(2))
    assert mesh.coordinates == (ddp, tp)


@pytest.mark.parametrize("rank", range(8))
def test_flattened_dims(rank: int) -> None:
    """(ddp, fsdp) of the cube flattened into one dim of 4: several entries on one axis."""
    for state in (
        layout_2_13([((2, 2), (4, 2)), ((2,), (1,))], 8, ("dp", "tp")),
        layout_2_10(((2, 2), 2), ((4, 2), 1), 8, ("dp", "tp")),
    ):
        mesh = read(state, rank)
        assert (mesh.shape, mesh.coordinates) == ((4, 2), (rank // 2, rank % 2))
        assert mesh.ranks == tuple(range(8))


def test_dims_of_size_one() -> None:
    mesh = read(layout_2_13([((), ()), ((4,), (1,))], 4, ("ddp", "fsdp")), 2)
    assert (mesh.shape, mesh.coordinates, mesh.ranks) == ((1, 4), (0, 2), (0, 1, 2, 3))
    assert read(layout_2_13([((), ())], 1, ("fsdp",)), 0).coordinates == (0,)


def test_no_names() -> None:
    assert read(old(tensor(2, 0, (2,), (1,)), None), 1).dim_names == ("dim0",)


def test_int64_ranks() -> None:
    assert read(old(tensor(4, 0, (4,), (1,), INT64), ("fsdp",)), 3).coordinates == (3,)


def test_rank_outside_the_mesh() -> None:
    for state in (
        old(tensor(4, 0, (2,), (1,)), ("fsdp",), _coordinate_on_dim=None),
        layout_2_13([((2,), (1,))], 2, ("fsdp",)),
    ):
        assert read(state, 3).coordinates is None


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state",
    [
        old(tensor(4, 0, (4,), (1,)), ("fsdp",), _coordinate_on_dim=[2]),
        old(tensor(4, 0, (4,), (1,)), ("fsdp",), _coordinate_on_dim=None),
        layout_2_13([((4,), (1,))], 4, ("fsdp",)) | {"_rank": 2},
        layout_2_13([((4,), (1,))], 4, ("fsdp",)) | {"_coordinate_on_dim": (3,)},
    ],
)
def test_file_of_another_rank(state: dict[str, object]) -> None:
    with pytest.raises(BadInputError, match="another rank than its name says"):
        read(state, 1)


@pytest.mark.parametrize(
    "state",
    [
        None,
        (),
        {},
        {"mesh": None, "mesh_dim_names": ("a",)},
        old(tensor(4, 1, (4,), (1,)), ("fsdp",)),  # past its storage
        old(tensor(4, 0, (4,), (2,)), ("fsdp",)),
        old(tensor(4, -1, (4,), (1,)), ("fsdp",)),
        old(tensor(4, 0, (4,), (-1,)), ("fsdp",)),
        old(tensor(4, 0, (4,), (0,)), ("fsdp",)),  # one rank four times
        old(tensor(4, 0, (0,), (1,)), ("fsdp",)),
        old(tensor(4, 0, (4,), ()), ("fsdp",)),
        old(tensor(4, 0, (4,), (1,)), ("fsdp", "tp")),
        old(tensor(4, 0, (4,), (1,)), (1,)),
        old(tensor(4, 0, (4,), (1,)), "f"),
        old(tensor(1 << 40, 0, (1 << 40,), (1,)), ("fsdp",)),
        old(tensor(4, 0, (2.0, 2), (2, 1)), ("a", "b")),  # type: ignore[arg-type]
        old(tensor(4, 0, (4,), (1,), WEIGHTS["torch", "FloatStorage"]), ("fsdp",)),  # type: ignore[arg-type]
        layout_2_10((4,), (1, 1), 4, ("fsdp",)),
        layout_2_10((3,), (1,), 4, ("fsdp",)),  # four ranks are no multiple of three
        layout_2_10((2, 2), (1, 1), 4, ("a", "b")),  # the axes overlap
        layout_2_10((2, 2), (0, 1), 4, ("a", "b")),
        layout_2_10((1 << 20, 1 << 20), (1 << 20, 1), 4, ("a", "b")),
        layout_2_10(None, None, 4, ("fsdp",)),
        layout_2_13([((0,), (1,))], 4, ("fsdp",)),
        layout_2_13([((4,), (1,))], 4, None) | {"_layout": None},
        layout_2_13([("ab", (1, 1))], 4, ("fsdp",)),
        layout_2_13([((8,), (1,))], 4, ("fsdp",)),
    ],
)
def test_malformed(state: object) -> None:
    with pytest.raises(BadInputError):
        read(state, 1)
