"""Writes the layouts of trainers other than verl: finished models, pieces, single files.

By the libraries' own functions, in one process: where ranks wrote, torch's fake process group stands
for them.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from scripts.makers.ranks import piece, write_ranks

State = Mapping[str, torch.Tensor]


def tiny_llama(*, tied: bool = False, seed: int = 0) -> transformers.PreTrainedModel:
    """Return a llama of two layers with random weights in bfloat16."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def tiny_moe() -> transformers.PreTrainedModel:
    """Return a Qwen3-MoE, whose experts transformers holds in one tensor in memory."""
    torch.manual_seed(1)
    config = transformers.Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=64,
    )
    return transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)


def finished(
    folder: Path, model: transformers.PreTrainedModel, *, shard: str = "20KB", kind: str = "safe"
) -> Path:
    """Write a finished model of several files: ``safe``, ``bin`` (torch's zips) or ``legacy``."""
    model.save_pretrained(folder, max_shard_size=shard)
    if kind == "safe":
        return folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for path in sorted(folder.glob("*.safetensors")):
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / name, _use_new_zipfile_serialization=kind != "legacy")
        index["weight_map"] = {
            n: name if f == path.name else f for n, f in index["weight_map"].items()
        }
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def pieces(folder: Path, state: State, *, world: int) -> Path:
    """Write what torch's HuggingFace writer leaves of ``world`` ranks."""
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    folder.mkdir(parents=True)
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
            held = {n: piece(t, rank, world, mesh) for n, t in state.items()}
            _write_as(folder, held, rank)
        finally:
            dist.destroy_process_group()
    return folder


def _write_as(folder: Path, state: State, rank: int) -> None:
    """Write what one rank writes; which piece is whose, all ranks would have planned together."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    planner = dcp.DefaultSavePlanner()
    own = {n: t for n, t in state.items() if rank == 0 or isinstance(t, DTensor)}
    planner.set_up_planner(own, None, is_coordinator=rank == 0)
    writer.set_up_storage_writer(rank == 0)
    plan = planner.create_local_plan()
    writer.write_data(replace(plan, storage_data={"shard_index": rank + 1}), planner).wait()


def accelerate_ranks(folder: Path, state: State, *, world: int) -> Path:
    """Write what Accelerate leaves of FSDP2 with ``use_dcp=False``."""
    folder.mkdir(parents=True)
    write_ranks(folder, state, world=world)
    for rank in range(world):
        made = folder / f"model_world_size_{world}_rank_{rank}.pt"
        made.rename(folder / f"pytorch_model_fsdp_0_rank{rank}.bin")
        torch.save({"state": {}}, folder / f"optimizer_0_rank{rank}.bin")
    return folder


def veomni_ranks(folder: Path, state: State, *, world: int, groups: int) -> Path:
    """Write rank files as verl does with VeOmni: experts cut among ``groups`` of ranks, then by FSDP.

    Rank r is in group r mod ``groups``; a group's ranks share its experts along dim 1.
    """
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    folder.mkdir(parents=True)
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            whole = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
            both = init_device_mesh(
                "cpu", (world // groups, groups), mesh_dim_names=("ep_fsdp", "ep")
            )
            held = OrderedDict()
            for name, tensor in state.items():
                if ".experts." in name:
                    own = tensor.chunk(groups)[rank % groups]
                    local = own.chunk(world // groups, 1)[rank // groups].contiguous().clone()
                    held[name] = DTensor.from_local(
                        local, both["ep_fsdp"], [Shard(1)], run_check=False
                    )
                else:
                    held[name] = piece(tensor, rank, world, whole)
            torch.save(held, folder / f"model_world_size_{world}_rank_{rank}.pt")
        finally:
            dist.destroy_process_group()
    return folder


def write_single(path: Path, content: Any, *, legacy: bool = False) -> Path:
    """Write one torch file, a zip or of the old format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def write_safe(path: Path, state: State) -> Path:
    """Write one safetensors file."""
    save_file({n: t.contiguous() for n, t in state.items()}, path, metadata={"format": "pt"})
    return path
