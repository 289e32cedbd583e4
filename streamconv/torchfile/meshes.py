"""Three generations of pickled DeviceMesh, reduced to one record: which ranks, and where is ours.

* torch ≤ 2.9: ``mesh`` is an int32 tensor among the storages (a sub-mesh is a strided view of it,
  with an offset), ``mesh_dim_names``.
* 2.10 to 2.12: ``_rank_map`` (such a tensor, 1-D, the root's ranks), ``_layout`` with ``shape`` and
  ``stride`` into it, ``_mesh_dim_names``. The ranks are those of the row that holds this file's rank.
* 2.13: the same, but ``_layout.axes`` is one ``_FlatLayout`` a mesh dimension, whose own shape and
  stride have several entries for a flattened dimension and none for one of size 1, and
  ``_flatten_rank_map`` repeats the rank map as integers.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from streamconv.errors import BadInputError
from streamconv.torchfile.allowlist import (
    DEVICE_MESH,
    FLAT_LAYOUT,
    MESH_LAYOUT,
    REBUILD_TENSOR,
)
from streamconv.torchfile.inert import Inert, InertStorage
from streamconv.torchfile.values import tensor_parts

_MAX_RANKS = 1 << 20
_LATER = ("_layout", "_rank_map", "_mesh_dim_names")


@dataclass(frozen=True, slots=True)
class Mesh:
    """A device mesh as one rank saw it.

    ``ranks`` are the global ranks in row-major order of ``shape``; ``coordinates`` those of the
    rank that wrote the file, None when it is not in the mesh. ``generation`` names the torch
    releases that pickle it so.
    """

    dim_names: tuple[str, ...]
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    coordinates: tuple[int, ...] | None
    generation: str

    def __str__(self) -> str:
        return ", ".join(f"{n}={s}" for n, s in zip(self.dim_names, self.shape, strict=True))


ReadStorage = Callable[[InertStorage, int, int], bytes]
"""Return (storage, first byte, nbytes) of a small storage of the same file."""


def read_mesh(value: Any, rank: int, where: str, read_storage: ReadStorage) -> Mesh:
    """Return the mesh that the inert record ``value`` describes, seen from global rank ``rank``."""
    state = value.state if isinstance(value, Inert) and type(value) is DEVICE_MESH else None
    if type(state) is not dict:
        raise _bad("no DeviceMesh", where)
    if "mesh" in state and not state.keys().isdisjoint(_LATER):
        raise _bad("a device mesh of two torch releases at once", where)
    names = state.get("mesh_dim_names", state.get("_mesh_dim_names"))
    if "mesh" in state:
        generation = "2.2 to 2.9"
        shape, ranks = _int_tensor(state["mesh"], where, read_storage)
        coordinates = _coordinates(ranks, shape, rank)
    else:
        axes, generation = _axes(state.get("_layout"), where)
        shape, ranks, coordinates = _from_layout(
            axes, _rank_map(state, where, read_storage), rank, where
        )
    if names is None:
        names = tuple(f"dim{d}" for d in range(len(shape)))
    if (
        type(names) is not tuple
        or len(names) != len(shape)
        or not all(type(n) is str for n in names)
    ):
        raise _bad("mesh_dim_names do not fit the mesh", where)
    if len(set(ranks)) != len(ranks):
        raise _bad("a rank occurs twice in a device mesh", where)
    _check_seen(state, rank, coordinates, where)
    return Mesh(names, shape, ranks, coordinates, generation)


def _bad(what: str, where: str, **parts: str) -> BadInputError:
    return BadInputError(what, where=where, **parts)


def is_ints(value: object) -> TypeGuard[tuple[int, ...]]:
    """Whether ``value`` is a tuple (or torch.Size) of exact ints, none negative."""
    return isinstance(value, tuple) and all(type(n) is int and n >= 0 for n in value)


def _check_seen(
    state: dict[Any, Any], rank: int, coordinates: tuple[int, ...] | None, where: str
) -> None:
    """Compare with what the writing process noted about itself: a renamed file shows here."""
    own_rank = state.get("_rank")
    if type(own_rank) is int and own_rank != rank:
        raise _bad(
            "the file was written by another rank than its name says",
            where,
            expected=f"rank {rank}",
            found=f"rank {own_rank}",
            hint="was it renamed, or copied over another file?",
        )
    seen = state.get("_coordinate_on_dim")
    if type(seen) is list:
        seen = tuple(seen)
    if seen is None or not is_ints(seen):
        seen = None
    if ("_coordinate_on_dim" in state) and seen != coordinates:
        raise _bad(
            "the file was written by another rank than its name says",
            where,
            expected=f"mesh coordinates {coordinates} for rank {rank}",
            found=f"{seen}",
            hint="was it renamed, or copied over another file?",
        )


def _coordinates(ranks: Sequence[int], shape: tuple[int, ...], rank: int) -> tuple[int, ...] | None:
    if rank not in ranks:
        return None
    index = ranks.index(rank)
    result: list[int] = []
    for size in reversed(shape):
        index, at = divmod(index, size)
        result.append(at)
    return tuple(reversed(result))


def _int_tensor(
    value: Any, where: str, read_storage: ReadStorage
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (shape, elements in row-major order) of a small integer tensor in the same file."""
    if type(value) is not REBUILD_TENSOR:
        raise _bad("a device mesh without its rank tensor", where)
    dtype, storage, numel, offset, shape, strides = tensor_parts(value)
    if not is_ints((offset, *shape, *strides)) or len(shape) != len(strides):
        raise _bad("a device mesh with a malformed rank tensor", where)
    sizes, steps = shape, strides
    code = {"int32": "i", "int64": "q"}.get(dtype.torch)
    if code is None or not 0 < math.prod(sizes) <= _MAX_RANKS or numel > _MAX_RANKS:
        raise _bad("a device mesh with a malformed rank tensor", where)
    last = offset + sum((n - 1) * s for n, s in zip(sizes, steps, strict=True))
    if last >= numel:
        raise _bad("a device mesh whose rank tensor reaches past its storage", where)
    width = struct.calcsize(code)
    raw = struct.unpack(
        f"<{last + 1 - offset}{code}",
        read_storage(storage, offset * width, (last + 1 - offset) * width),
    )
    indices = itertools.product(
        *(range(0, n * s, s) if s else [0] * n for n, s in zip(sizes, steps, strict=True))
    )
    return sizes, tuple(raw[sum(i)] for i in indices)


def _rank_map(state: dict[Any, Any], where: str, read_storage: ReadStorage) -> tuple[int, ...]:
    ranks = _int_tensor(state.get("_rank_map"), where, read_storage)[1]
    flat = state.get("_flatten_rank_map")  # since 2.13 for hashing, and no more than that
    if flat is not None and flat != ranks:
        raise _bad("a device mesh whose two rank maps differ", where)
    return ranks


_Axis = tuple[tuple[int, ...], tuple[int, ...]]


def _axes(layout: Any, where: str) -> tuple[list[_Axis], str]:
    """Return one (shape, stride) a mesh dimension, each possibly of several entries, or none."""
    state = layout.state if isinstance(layout, Inert) and type(layout) is MESH_LAYOUT else None
    if type(state) is not dict:
        raise _bad("a device mesh without its layout", where)
    axes = state.get("axes")
    if type(axes) is tuple:
        flat = [a.state if isinstance(a, Inert) and type(a) is FLAT_LAYOUT else None for a in axes]
        pairs = [
            (a.get("shape"), a.get("stride")) if type(a) is dict else (None, None) for a in flat
        ]
        generation = "2.13"
    else:
        shape, stride = state.get("shape"), state.get("stride")
        if type(shape) is int and type(stride) is int:
            shape, stride = (shape,), (stride,)
        if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride):
            raise _bad("a device mesh with a malformed layout", where)
        pairs = list(zip(shape, stride, strict=True))
        generation = "2.10 to 2.12"
    result: list[_Axis] = []
    for sizes, steps in pairs:
        if type(sizes) is int and type(steps) is int:
            sizes, steps = (sizes,), (steps,)
        if not is_ints(sizes) or not is_ints(steps) or len(sizes) != len(steps) or 0 in sizes:
            raise _bad("a device mesh with a malformed layout", where)
        result.append((sizes, steps))
    return result, generation


def _from_layout(
    axes: list[_Axis], rank_map: tuple[int, ...], rank: int, where: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
    """Return (shape, ranks, coordinates) of the row of the layout that holds ``rank``.

    The layout's digits (size, step) are part of a mixed-radix number system over positions of the rank
    map; the digits it lacks pick the row, and stay as they are for ``rank``.
    """
    shape = tuple(math.prod(sizes) for sizes, _ in axes)
    digits = sorted(
        (step, size)
        for sizes, steps in axes
        for size, step in zip(sizes, steps, strict=True)
        if size > 1
    )
    reach = 1
    for step, size in digits:
        if step < 1 or step % reach:
            raise _bad("a device mesh with an overlapping layout", where)
        reach = step * size
    if math.prod(shape) > _MAX_RANKS or len(rank_map) % reach:
        raise _bad("a device mesh whose layout does not fit its ranks", where)
    if rank not in rank_map:
        return shape, (), None
    position = rank_map.index(rank)
    row = position - sum(position // step % size * step for step, size in digits)
    coordinates: list[int] = []
    per_axis: list[list[int]] = []
    for sizes, steps in axes:
        at = 0
        for size, step in zip(sizes, steps, strict=True):
            at = at * size + (position // step % size if size > 1 else 0)
        coordinates.append(at)
        per_axis.append(
            [
                sum(i)
                for i in itertools.product(
                    *(
                        [k * step for k in range(size)]
                        for size, step in zip(sizes, steps, strict=True)
                    )
                )
            ]
        )
    ranks = tuple(rank_map[row + sum(i)] for i in itertools.product(*per_axis))
    return shape, ranks, tuple(coordinates)
