"""Makes the smallest rank files of every layout, for tests that need thousands of conversions.

Real torch, real torch.save, a few hundred numbers. The ranks are played one after the other over
torch's fake process group, which pickles as any other does. There is no config.json: what is made
of them are the tensors under their own names.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import (
    Shard as TensorShard,
)
from torch.distributed._shard.sharded_tensor import (
    ShardedTensor,
    ShardedTensorMetadata,
    TensorProperties,
)
from torch.distributed._shard.sharding_spec import ChunkShardingSpec, ShardMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "embed.weight": ((11, 6), torch.float32),
    "layers.0.up.weight": ((8, 6), torch.bfloat16),
    "layers.0.down.weight": ((6, 8), torch.float16),
    "layers.0.norm.weight": ((7,), torch.float32),
    "steps": ((3, 2), torch.int64),
}


def whole(name: str, salt: str = "") -> torch.Tensor:
    """The truth of a tensor; ``salt`` makes another step's."""
    shape, dtype = SHAPES[name]
    generator = torch.Generator().manual_seed(zlib.crc32((name + salt).encode()))
    bits = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator)
    values = bits.to(torch.uint8).view(dtype).reshape(shape)
    return torch.where(values.isfinite(), values, 1) if dtype.is_floating_point else values


Cut = Callable[[torch.Tensor, int, DeviceMesh], object]


def make_tiny(out: Path, layout: str, *, crc: bool = True, salt: str = "") -> Path:
    """Write the rank files of one of :data:`LAYOUTS` under ``out``; return their folder."""
    out.mkdir(parents=True)
    torch.serialization.set_crc32_options(crc)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ShardedTensor is deprecated is its point
        _play_ranks(out, layout, salt)
    torch.serialization.set_crc32_options(True)
    return out


def _play_ranks(out: Path, layout: str, salt: str) -> None:
    world, dims, names, cut = LAYOUTS[layout]
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            mesh = init_device_mesh("cpu", dims, mesh_dim_names=names)
            state = OrderedDict((n, cut(whole(n, salt), rank, mesh)) for n in SHAPES)
            torch.save(state, out / f"model_world_size_{world}_rank_{rank}.pt")
        finally:
            dist.destroy_process_group()


def _chunk(tensor: torch.Tensor, index: int, count: int) -> torch.Tensor:
    step = math.ceil(tensor.shape[0] / count)
    return tensor[index * step : (index + 1) * step]


def _dtensor(
    local: torch.Tensor, tensor: torch.Tensor, mesh: DeviceMesh, placements: list[Placement]
) -> DTensor:
    return DTensor.from_local(
        local.contiguous().clone(),
        mesh,
        placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _fsdp(tensor: torch.Tensor, rank: int, mesh: DeviceMesh) -> DTensor:
    return _dtensor(_chunk(tensor, rank, mesh.size()), tensor, mesh, [Shard(0)])


def _hsdp(tensor: torch.Tensor, rank: int, mesh: DeviceMesh) -> DTensor:
    _, index = divmod(rank, mesh.size(1))
    return _dtensor(_chunk(tensor, index, mesh.size(1)), tensor, mesh, [Replicate(), Shard(0)])


def _tensor_parallel(tensor: torch.Tensor, rank: int, mesh: DeviceMesh) -> DTensor:
    row, column = divmod(rank, mesh.size(1))
    if tensor.ndim == 1 or tensor.shape[0] % mesh.size():
        placements: list[Placement] = [Shard(0), Replicate()]
        local = _chunk(tensor, row, mesh.size(0))
    else:
        placements = [_StridedShard(0, split_factor=mesh.size(1)), Shard(0)]
        local = _chunk(_chunk(tensor, column, mesh.size(1)), row, mesh.size(0))
    return _dtensor(local, tensor, mesh, placements)


def _sharded_tensor(tensor: torch.Tensor, rank: int, mesh: DeviceMesh) -> ShardedTensor:
    world, rest = mesh.size(), list(tensor.shape[1:])
    places = []
    at = 0
    for index in range(world):
        rows = _chunk(tensor, index, world).shape[0]
        if rows:
            place = f"rank:{index}/cpu"
            places.append(ShardMetadata([at] + [0] * len(rest), [rows, *rest], place))
        at += rows
    metadata = ShardedTensorMetadata(
        places, tensor.shape, TensorProperties(dtype=tensor.dtype, requires_grad=False)
    )
    local = [
        TensorShard(_chunk(tensor, rank, world).contiguous().clone(), place)
        for place in places
        if place.placement is not None and place.placement.rank() == rank
    ]
    spec = ChunkShardingSpec(0, [f"rank:{r}/cpu" for r in range(world)])
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local, metadata, sharding_spec=spec
    )


def _replicated(tensor: torch.Tensor, rank: int, mesh: DeviceMesh) -> torch.Tensor:
    return tensor


LAYOUTS: dict[str, tuple[int, tuple[int, ...], tuple[str, ...], Cut]] = {
    "fsdp": (3, (3,), ("fsdp",), _fsdp),
    "hsdp": (4, (2, 2), ("ddp", "fsdp"), _hsdp),
    "fsdp-tp": (4, (2, 2), ("fsdp", "tp"), _tensor_parallel),
    "sharded-tensor": (3, (3,), ("fsdp",), _sharded_tensor),
    "plain": (1, (1,), ("fsdp",), _replicated),
}
"""World size, mesh sizes and names, and how a rank's piece is made."""
