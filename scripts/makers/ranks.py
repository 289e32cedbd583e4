"""Writes a state dict as FSDP2 writes it on several ranks, without the ranks.

Real DTensors over torch's fake process group, which pickle as any other do: cut along the first
dimension into pieces of equal size, the last ones short or empty. What torch keeps whole (scalars)
is on every rank.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore


def write_ranks(folder: Path, state: Mapping[str, torch.Tensor], *, world: int) -> None:
    """Write ``model_world_size_W_rank_R.pt`` for every rank into ``folder``."""
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
            held = OrderedDict((n, piece(t, rank, world, mesh)) for n, t in state.items())
            torch.save(held, folder / f"model_world_size_{world}_rank_{rank}.pt")
        finally:
            dist.destroy_process_group()


def piece(tensor: torch.Tensor, rank: int, world: int, mesh: object) -> torch.Tensor:
    """Return the piece of ``tensor`` that FSDP2 leaves on ``rank``."""
    if tensor.dim() == 0:
        return tensor.clone()
    step = -(-tensor.shape[0] // world)
    local = tensor[rank * step : (rank + 1) * step].contiguous().clone()
    made: torch.Tensor = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return made
