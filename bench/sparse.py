"""Rank files of models of any size that take no disk: real DTensors, pickled without their data.

torch.serialization.skip_data writes a checkpoint of fake tensors with every record in its place and
nothing in it: a sparse file. Such records carry no CRC-32, so a conversion reports them as
unverifiable. Sentinels, random bytes at the beginning and end of some local tensors, are the truth.
"""

from __future__ import annotations

import json
import os
import random
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

_SENTINEL_BYTES = 64


@dataclass(frozen=True, slots=True)
class Sentinel:
    """Bytes written into a tensor: where they lie in it, row-major, in bytes."""

    name: str
    at: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SparseMade:
    """A sparse checkpoint; ``nbytes`` are those of its tensors."""

    source: Path
    nbytes: int
    tensors: int
    sentinels: tuple[Sentinel, ...]


MODELS = {
    "1B": lambda: transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "8B": lambda: transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    ),
    "70B": lambda: transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    ),
    "671B": lambda: transformers.DeepseekV3Config(),
}  # fmt: skip
"""Configs as their authors published them (DeepseekV3Config's defaults are DeepSeek-V3's)."""


def make_sparse(out: Path, model: str, world: int) -> SparseMade:
    """Write bfloat16 rank files of ``model`` as FSDP2 would on ``world`` ranks."""
    config = MODELS[model]()
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    config.architectures = [type(built).__name__]
    shapes = {n: t.shape for n, t in built.state_dict().items()}
    nbytes = sum(s.numel() for s in shapes.values()) * 2
    source = out / "actor"
    source.mkdir(parents=True)
    config.save_pretrained(source / "huggingface")
    (source / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world}))
    rng = random.Random(0)
    # One-to-one in the Hub's layout for these models: attention, norms, embedding.
    marked = [n for n in shapes if "experts" not in n and len(shapes[n]) == 2]
    marked = rng.sample(marked, min(24, len(marked)))
    sentinels: list[Sentinel] = []
    for rank in range(world):
        sentinels += _write_rank(source, shapes, marked, rank, world, rng)
    return SparseMade(source, nbytes, len(shapes), tuple(sentinels))


def _write_rank(
    source: Path,
    shapes: dict[str, torch.Size],
    marked: list[str],
    rank: int,
    world: int,
    rng: random.Random,
) -> list[Sentinel]:
    path = source / f"model_world_size_{world}_rank_{rank}.pt"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    places = {}
    try:
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
        state: OrderedDict[str, DTensor] = OrderedDict()
        for name, shape in shapes.items():
            sizes, at = compute_local_shape_and_global_offset(shape, mesh, [Shard(0)])
            stride = torch.empty(shape, device="meta").stride()
            with FakeTensorMode():
                local = torch.empty(sizes, dtype=torch.bfloat16)
                state[name] = DTensor.from_local(
                    local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
                )
            if name in marked and sizes[0]:
                row = shape[1:].numel() * 2
                places[name] = (at[0] * row, sizes[0] * row)
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, path)
        with FakeTensorMode():
            saved = torch.load(path, weights_only=False)
    finally:
        dist.destroy_process_group()
    found = []
    with path.open("r+b") as stream:
        # Which rank has what is read, and must not be skipped with the weights.
        ranks = next(iter(saved.values())).device_mesh._rank_map
        os.pwrite(stream.fileno(), mesh._rank_map.numpy().tobytes(), _start(ranks))
        for name, (at_byte, nbytes) in places.items():
            start = _start(saved[name]._local_tensor)
            for here in (0, nbytes - _SENTINEL_BYTES):
                data = rng.randbytes(_SENTINEL_BYTES)
                os.pwrite(stream.fileno(), data, start + here)
                found.append(Sentinel(name, at_byte + here, data))
    return found


def _start(tensor: torch.Tensor) -> int:
    """Return where torch says that the data of a tensor lie in its file."""
    start: int = tensor.untyped_storage()._checkpoint_offset  # type: ignore[attr-defined]
    return start


def sentinels_in(path: Path, made: SparseMade) -> Iterator[tuple[Sentinel, bool]]:
    """Yield the sentinels of the tensors in an output file, and whether each is where it should be."""
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        for s in made.sentinels:
            if s.name in names:
                tensor = file.get_slice(s.name)
                row = tensor.get_shape()[1] * 2
                first, last = s.at // row, (s.at + len(s.data) - 1) // row
                raw = tensor[first : last + 1].reshape(-1).view(torch.uint8)
                inner = s.at - first * row
                yield s, raw[inner : inner + len(s.data)].numpy().tobytes() == s.data
