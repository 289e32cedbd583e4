"""Makes rank files of any size, one rank at a time, with a truth that is computed, not stored.

``python -m scripts.makers.large OUT --bytes 4000000000 --world 8`` writes OUT/actor as FSDP2 would:
DTensors of a real torch on a mesh of WORLD ranks, storages padded to the size of rank 0's, CRCs on.
The model is a Qwen2 of whole layers, its embedding and head a sixteenth of the whole each, so
that the largest tensor is far larger than a small memory budget.

``cut`` says how tensors are cut: ``rows`` (FSDP2), ``columns`` (Shard(1) where there is a dim 1) or
``grid`` (rows over fsdp, columns over tp). ``experts`` makes the model a Qwen3-MoE instead, whose
experts are fused tensors.

A rank's file needs that rank's bytes in memory and no other's. No values travel between ranks
because every element is a function of its place: element i of a tensor, counted in row-major
order of the whole tensor, is element (i + crc32(name)) mod PERIOD of one block of random values.
PERIOD is prime, so a row, a shard or a window that lands in the wrong place or tensor meets other
values. ``LargeMade.expected`` computes any rows of any tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

PERIOD = 1_048_573
Cut = Literal["rows", "columns", "grid", "hybrid"]


@dataclass(frozen=True, slots=True)
class LargeMade:
    """A large checkpoint and its truth."""

    source: Path
    shapes: dict[str, tuple[int, ...]]
    """Every tensor with its whole shape; the names in memory are the Hub's but for fused experts."""
    dtype: torch.dtype

    def expected(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a tensor."""
        shape = self.shapes[name]
        rows = range(shape[0])[start:stop]
        out = torch.empty(len(rows), *shape[1:], dtype=self.dtype)
        _fill(out, name, rows.start)
        return out


def make_large(
    out: Path,
    total_bytes: int,
    world: int = 8,
    *,
    dtype: torch.dtype = torch.float32,
    hidden_size: int | None = None,
    vocab_size: int | None = None,
    lora_rank: int = 0,
    cut: Cut = "rows",
    experts: int = 0,
) -> LargeMade:
    """Write about ``total_bytes`` of weights as ``world`` rank files under ``out``/actor.

    A model has whole layers, so the bytes are met to within half of one. ``vocab_size`` makes
    the embedding and the head larger or smaller than the default sixteenth each. With ``lora_rank``
    every projection carries an adapter, beside it and under PEFT's names.
    """
    if experts:
        config, build = _moe_config(total_bytes, dtype, experts), transformers.Qwen3MoeForCausalLM
    else:
        config = _config(total_bytes, dtype, hidden_size, vocab_size)
        build = transformers.Qwen2ForCausalLM
    with torch.device("meta"):
        model = build(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if lora_rank:
        shapes = _with_adapters(shapes, lora_rank)
    made = LargeMade(out / "actor", shapes, dtype)

    made.source.mkdir(parents=True)
    if lora_rank:
        meta = {"r": lora_rank, "lora_alpha": 2 * lora_rank, "task_type": "CAUSAL_LM"}
        (made.source / "lora_train_meta.json").write_text(json.dumps(meta))
    config.architectures = [build.__name__]
    config.dtype = dtype
    config.save_pretrained(made.source / "huggingface")
    (made.source / "fsdp_config.json").write_text(
        json.dumps({"FSDP_version": 2, "world_size": world}, indent=4)
    )
    for rank in range(world):
        _write_rank(made, rank, world, cut)
    return made


def _with_adapters(shapes: dict[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module, _, leaf = f"base_model.model.{name}".rpartition(".")
        if not module.endswith("_proj"):
            found[f"{module}.{leaf}"] = shape
            continue
        found[f"{module}.base_layer.{leaf}"] = shape
        if leaf == "weight":
            found[f"{module}.lora_A.default.weight"] = (rank, shape[1])
            found[f"{module}.lora_B.default.weight"] = (shape[0], rank)
    return found


def _config(
    total_bytes: int, dtype: torch.dtype, hidden_size: int | None, vocab_size: int | None
) -> transformers.Qwen2Config:
    hidden = hidden_size or (1024 if total_bytes >= 1 << 30 else 256)
    elements = total_bytes // dtype.itemsize
    vocab = vocab_size or max(elements // 16 // hidden, 8) | 1  # odd: shards unevenly
    intermediate = hidden * 11 // 4
    attention = 2 * hidden * hidden + 2 * hidden * (hidden // 4) + hidden + 2 * (hidden // 4)
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    layers = max(1, round((elements - 2 * vocab * hidden) / layer))
    return transformers.Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )


def _moe_config(total_bytes: int, dtype: torch.dtype, experts: int) -> transformers.Qwen3MoeConfig:
    hidden, intermediate = 1024, 512
    vocab = 8191
    layer = 3 * hidden * hidden + 3 * experts * hidden * intermediate
    layers = max(1, round((total_bytes // dtype.itemsize - 2 * vocab * hidden) / layer))
    return transformers.Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        moe_intermediate_size=intermediate,
        num_experts=experts,
        num_experts_per_tok=2,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,
    )


def _write_rank(made: LargeMade, rank: int, world: int, cut: Cut) -> None:
    # The fake backend stands for ranks that never communicate; what is pickled is the same.
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        if cut == "grid":
            mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("fsdp", "tp"))
        elif cut == "hybrid":
            mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("ddp", "fsdp"))
        else:
            mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
        state: OrderedDict[str, DTensor] = OrderedDict()
        for name, shape in made.shapes.items():
            placements = _placements(cut, len(shape))
            sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
            rows = torch.empty(sizes[0], *shape[1:], dtype=made.dtype)
            _fill(rows, name, offsets[0])
            local = rows
            if sizes[1:] != shape[1:]:
                local = rows[:, offsets[1] : offsets[1] + sizes[1]].contiguous()
            elif cut == "rows":
                # FSDP2 pads every rank's storage to the size of the first one's.
                local = torch.zeros(math.ceil(shape[0] / world), *shape[1:], dtype=made.dtype)
                local = local[: sizes[0]].copy_(rows)
            stride = torch.empty(shape, device="meta").stride()
            state[name] = DTensor.from_local(
                local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
            )
        torch.save(state, made.source / f"model_world_size_{world}_rank_{rank}.pt")
    finally:
        dist.destroy_process_group()


def _placements(cut: Cut, ndim: int) -> list[Placement]:
    match cut:
        case "rows":
            return [Shard(0)]
        case "columns":
            return [Shard(min(1, ndim - 1))]
        case "hybrid":
            return [Replicate(), Shard(0)]
        case "grid":
            return [Shard(0), Shard(1) if ndim > 1 else Replicate()]


def _fill(out: torch.Tensor, name: str, first_row: int) -> None:
    """Fill ``out``, which holds rows of a tensor from ``first_row`` on."""
    block = _block(out.dtype)
    flat = out.view(-1)
    position = (zlib.crc32(name.encode()) + first_row * math.prod(out.shape[1:])) % PERIOD
    done = 0
    while done < flat.numel():
        count = min(PERIOD - position, flat.numel() - done)
        flat[done : done + count] = block[position : position + count]
        done += count
        position = 0


@cache
def _block(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(PERIOD, generator=torch.Generator().manual_seed(0)).to(dtype)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--bytes", type=lambda text: int(float(text)), required=True)
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made = make_large(
        arguments.out, arguments.bytes, arguments.world, dtype=getattr(torch, arguments.dtype)
    )
    print(f"{len(made.shapes)} tensors in {arguments.world} files under {made.source}")


if __name__ == "__main__":
    main()
