"""The globals that a weights-only pickle may name, and the stand-in each resolves to.

Measured on files by torch 2.4 to 2.13; a name has as many rows as it had homes. Keyed by (module,
name): the name alone is not unique (``Shard`` is a placement and a ShardedTensor's piece). Nothing
here is ever imported. A format with more globals of its own passes them to the unpickler beside
these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Self

from streamconv.ir.dtypes import BY_TORCH
from streamconv.torchfile.inert import (
    Frozen,
    Function,
    Inert,
    InertDict,
    InertSize,
    Kept,
    Rebuild,
    RefusedPickleError,
    StandIn,
    Token,
    stand_in,
)

Globals = Mapping[tuple[str, str], StandIn]

# What is called or built, under the one name by which the readers know it.
REBUILD_TENSOR = stand_in("torch._utils._rebuild_tensor_v2", Function)
REBUILD_TENSOR_V3 = stand_in("torch._utils._rebuild_tensor_v3", Function)
REBUILD_PARAMETER = stand_in("torch._utils._rebuild_parameter", Function)
REBUILD_PARAMETER_WITH_STATE = stand_in("torch._utils._rebuild_parameter_with_state", Rebuild)
REBUILD_META_TENSOR = stand_in("torch._utils._rebuild_meta_tensor_no_storage", Function)
REBUILD_WRAPPER = stand_in("torch._utils._rebuild_wrapper_subclass", Function)
REBUILD_FROM_TYPE = stand_in("torch._tensor._rebuild_from_type_v2", Rebuild)

DTENSOR = stand_in("torch.distributed.tensor.DTensor", Token)
DTENSOR_2_4 = stand_in("torch.distributed._tensor.api.DTensor", Token)
DTENSOR_SPEC = stand_in("torch.distributed.tensor._dtensor_spec.DTensorSpec")
TENSOR_META = stand_in("torch.distributed.tensor._dtensor_spec.TensorMeta")
SHARD_ORDER_ENTRY = stand_in("torch.distributed.tensor._dtensor_spec.ShardOrderEntry")
SHARD = stand_in("torch.distributed.tensor.placement_types.Shard")
STRIDED_SHARD = stand_in("torch.distributed.tensor.placement_types._StridedShard")
REPLICATE = stand_in("torch.distributed.tensor.placement_types.Replicate")
PARTIAL = stand_in("torch.distributed.tensor.placement_types.Partial")

DEVICE_MESH = stand_in("torch.distributed.device_mesh.DeviceMesh")
MESH_LAYOUT = stand_in("torch.distributed._mesh_layout._MeshLayout")
FLAT_LAYOUT = stand_in("torch.distributed._mesh_layout._FlatLayout")

_SHARDED = "torch.distributed._shard.sharded_tensor"
SHARDED_TENSOR = stand_in(f"{_SHARDED}.api.ShardedTensor", Token)
PROCESS_GROUP_STATE = stand_in(f"{_SHARDED}.api.ShardedTensor.ProcessGroupState")
SHARDED_TENSOR_SHARD = stand_in(f"{_SHARDED}.shard.Shard")
SHARDED_TENSOR_METADATA = stand_in(f"{_SHARDED}.metadata.ShardedTensorMetadata")
SHARD_METADATA = stand_in("torch.distributed._shard.metadata.ShardMetadata")


_MEMORY_FORMATS = "TORCH_CONTIGUOUS_FORMAT TORCH_CHANNELS_LAST TORCH_PRESERVE_FORMAT"

_ENUM_MEMBERS: Globals = {
    (owner, name): stand_in(f"{owner}.{name}", Token)
    for owner, names in (
        (f"{_SHARDED}.metadata.MEM_FORMAT_ENCODING", _MEMORY_FORMATS),
        ("torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING", _MEMORY_FORMATS),
        ("torch.distributed.checkpoint.planner.WriteItemType", "TENSOR SHARD BYTE_IO"),
    )
    for name in names.split()
}
MEMBERS: Globals = {
    **_ENUM_MEMBERS,
    (SHARDED_TENSOR.path, "ProcessGroupState"): PROCESS_GROUP_STATE,
}
"""(class, name): what a pickle may get from a class by its name."""


class InertGetattr(Inert):
    """``builtins.getattr``: how protocol 2 spells nested classes, and Python 3.11 members of enums.

    It looks a name up in :data:`MEMBERS` and nowhere else. What is only reported, a class or an object
    whose method is kept, has a member of every name, which is as inert.
    """

    __slots__ = ()
    path = "builtins.getattr"

    def __new__(cls, *args: object) -> Self:
        """Return the stand-in for the member, never an attribute of anything."""
        if len(args) == 2:
            owner, name = args
            found: StandIn | None = None
            if isinstance(owner, Frozen) and type(name) is str:
                found = MEMBERS.get((owner.path, name))
            kind = owner if isinstance(owner, type) else type(owner)
            if found is None and issubclass(kind, Kept) and _is_reported(name):
                found = stand_in(f"{kind.path}.{name}"[:200], Kept)
            if found is not None:
                return found  # type: ignore[return-value]  # a type: NEWOBJ may follow
        raise RefusedPickleError("a call of builtins.getattr")


def _is_reported(name: object) -> bool:
    # Protocol 2 makes an object whose __new__ takes keywords by a partial of that.
    return type(name) is str and (
        name == "__new__" or (name.isidentifier() and not name.startswith("__"))
    )


STORAGE_DTYPES: dict[Frozen, str] = {}
"""The stand-ins of typed storages, and the torch name of their element type."""

DTYPES: dict[Frozen, str] = {}
"""The stand-ins of ``torch.float32`` and so on, and their names."""

UNTYPED_STORAGE = stand_in("torch.storage.UntypedStorage", Token)

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
# The last two are named so that they are refused as dtypes, not as unknown globals.
_DTYPE_NAMES = (*BY_TORCH, "complex32", "float4_e2m1fn_x2")

# Only passed around, or kept as they come because nothing needs to look inside.
_PASSIVE: tuple[tuple[str, type[Inert], str], ...] = (
    ("torch", Token, "Tensor"),
    ("torch.nn.parameter", Token, "Parameter Buffer"),
    ("torch", Inert, "device"),
    ("torch.serialization", Inert, "_get_layout"),
    # protocol 2 calls these by their names, and bytes that are not empty by _codecs.encode
    *(
        (module, Inert, "set frozenset complex bytes bytearray")
        for module in ("builtins", "__builtin__")
    ),
    ("torch.distributed.remote_device", Inert, "_remote_device"),
    (f"{_SHARDED}.metadata", Inert, "TensorProperties MEM_FORMAT_ENCODING"),
    (
        "torch.distributed._shard.sharding_spec.api",
        Inert,
        "EnumerableShardingSpec DevicePlacementSpec",
    ),
    ("torch.distributed._shard.sharding_spec.chunk_sharding_spec", Inert, "ChunkShardingSpec"),
    # numpy scalars beside the weights (step counters)
    ("numpy.core.multiarray", Inert, "scalar"),
    ("numpy._core.multiarray", Inert, "scalar"),
    ("numpy", Inert, "dtype"),
    ("_codecs", Inert, "encode"),
)

_HOMES: tuple[tuple[StandIn, tuple[str, ...]], ...] = (
    (InertDict, ("collections",)),
    (InertSize, ("torch",)),
    (InertGetattr, ("__builtin__", "builtins")),
    (UNTYPED_STORAGE, ("torch.storage", "torch")),
    (REBUILD_TENSOR, ("torch._utils",)),
    (REBUILD_TENSOR_V3, ("torch._utils",)),
    (REBUILD_PARAMETER, ("torch._utils",)),
    (REBUILD_PARAMETER_WITH_STATE, ("torch._utils",)),
    (REBUILD_META_TENSOR, ("torch._utils",)),
    (REBUILD_WRAPPER, ("torch._utils",)),
    (REBUILD_FROM_TYPE, ("torch._tensor",)),
    (DTENSOR, ("torch.distributed.tensor", "torch.distributed.tensor._api")),
    (DTENSOR_2_4, ("torch.distributed._tensor.api", "torch.distributed._tensor")),
    (
        DTENSOR_SPEC,
        ("torch.distributed.tensor._dtensor_spec", "torch.distributed._tensor.placement_types"),
    ),
    (
        TENSOR_META,
        ("torch.distributed.tensor._dtensor_spec", "torch.distributed._tensor.placement_types"),
    ),
    (SHARD_ORDER_ENTRY, ("torch.distributed.tensor._dtensor_spec",)),
    *(
        (
            placement,
            (
                "torch.distributed.tensor.placement_types",
                "torch.distributed._tensor.placement_types",
            ),
        )
        for placement in (SHARD, STRIDED_SHARD, REPLICATE, PARTIAL)
    ),
    (DEVICE_MESH, ("torch.distributed.device_mesh", "torch.distributed._tensor.device_mesh")),
    (MESH_LAYOUT, ("torch.distributed._mesh_layout",)),
    (FLAT_LAYOUT, ("torch.distributed._mesh_layout",)),
    (SHARDED_TENSOR, (f"{_SHARDED}.api",)),
    (SHARDED_TENSOR_SHARD, (f"{_SHARDED}.shard",)),
    (SHARDED_TENSOR_METADATA, (f"{_SHARDED}.metadata",)),
    (SHARD_METADATA, ("torch.distributed._shard.metadata",)),
    (
        stand_in(f"{_SHARDED}.api.ShardedTensorBase", Token),
        (f"{_SHARDED}.api",),
    ),
)


def build_globals(rows: Iterable[tuple[str, type[Inert], str]]) -> dict[tuple[str, str], StandIn]:
    """Return stand-ins for rows of (module, base, names): how a format adds its own globals."""
    return {
        (module, name): stand_in(f"{module}.{name}", base)
        for module, base, names in rows
        for name in names.split()
    }


def _weights() -> Globals:
    table: dict[tuple[str, str], StandIn] = build_globals(_PASSIVE)
    for kind, modules in _HOMES:
        for module in modules:
            table[module, kind.path.rpartition(".")[2]] = kind
    for name, dtype in _STORAGES.items():
        kind = stand_in(f"torch.{name}", Token)
        table["torch", name] = kind
        STORAGE_DTYPES[kind] = dtype
    for name in _DTYPE_NAMES:
        kind = stand_in(f"torch.{name}", Token)
        table["torch", name] = kind
        DTYPES[kind] = name
    return table


WEIGHTS: Globals = _weights()

KEPT: Globals = {
    **WEIGHTS,
    **build_globals(
        (
            *((module, Kept, "frozenset complex bytes") for module in ("builtins", "__builtin__")),
            ("_codecs", Kept, "encode"),
            ("numpy.core.multiarray", Kept, "scalar"),
            ("numpy._core.multiarray", Kept, "scalar"),
        )
    ),
}
"""The same where other globals are only reported: then these may be keys of a dict as well."""
