"""Makes Megatron checkpoints of HuggingFace tensors: the way back of what is tested, in plain torch.

:func:`canonical` renames and fuses as Megatron-Core's own loaders do (one name at a time, no table
shared with the package). :func:`save` writes what it returns with torch's distributed checkpoint
writer in one process, cut into the pieces that the ranks of a parallel run would write, in any of
Megatron-Core's three flavours of naming.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

State = dict[str, torch.Tensor]
Flavour = Literal["stacked", "per layer", "singleton"]

_NAMES = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "model.norm.bias": "decoder.final_layernorm.bias",
    "lm_head.weight": "output_layer.weight",
}
_IN_LAYER = {
    "self_attn.o_proj": "self_attention.linear_proj",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "self_attn.q_a_proj": "self_attention.linear_q_down_proj",
    "self_attn.q_b_proj": "self_attention.linear_q_up_proj",
    "self_attn.kv_a_proj_with_mqa": "self_attention.linear_kv_down_proj",
    "self_attn.kv_b_proj": "self_attention.linear_kv_up_proj",
    "mlp.gate_up_proj": "mlp.linear_fc1",
    "mlp.down_proj": "mlp.linear_fc2",
    "mlp.gate": "mlp.router",
    "block_sparse_moe.gate": "mlp.router",
    "mlp.shared_experts.down_proj": "mlp.shared_experts.linear_fc2",
    "mlp.shared_expert.down_proj": "mlp.shared_experts.linear_fc2",
    "post_self_attn_layernorm": "post_self_attn_layernorm",
    "post_mlp_layernorm": "post_mlp_layernorm",
}
_BIAS = {
    "mlp.gate.e_score_correction_bias",
    "block_sparse_moe.e_score_correction_bias",
    "mlp.moe_statics.e_score_correction_bias",
}


def canonical(hf: Mapping[str, torch.Tensor], *, heads: int, groups: int, head_dim: int) -> State:
    """Return Megatron's tensors of a model that HuggingFace names as in ``hf``, one tensor a layer."""
    made: State = {_NAMES[n]: t for n, t in hf.items() if n in _NAMES}
    layers: dict[str, State] = {}
    for name, tensor in hf.items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if found:
            layers.setdefault(f"decoder.layers.{found[1]}.", {})[found[2]] = tensor
    for prefix, layer in layers.items():
        made |= {prefix + n: t for n, t in _layer(layer, heads, groups, head_dim).items()}
    return made


def _layer(hf: State, heads: int, groups: int, head_dim: int) -> State:
    hf, made = dict(hf), State()
    routed = any(".gate.weight" in n for n in hf)
    latent = any("kv_a_proj" in n for n in hf)
    for kind in ("weight", "bias"):
        before = "input_layernorm" if latent else f"self_attention.linear_qkv.layer_norm_{kind}"
        after = "pre_mlp_layernorm" if routed else f"mlp.linear_fc1.layer_norm_{kind}"
        for norm, new in (("input_layernorm", before), ("post_attention_layernorm", after)):
            if f"{norm}.{kind}" in hf:
                made[new if kind in new else f"{new}.{kind}"] = hf.pop(f"{norm}.{kind}")
        if not latent and f"self_attn.q_proj.{kind}" in hf:
            q, k, v = (hf.pop(f"self_attn.{p}_proj.{kind}") for p in "qkv")
            made[f"self_attention.linear_qkv.{kind}"] = _fuse(q, k, v, heads, groups, head_dim)
    if "self_attn.q_proj.weight" in hf:
        made["self_attention.linear_q_proj.weight"] = hf.pop("self_attn.q_proj.weight")
    for part in ("q", "kv"):
        if f"self_attn.{part}_a_layernorm.weight" in hf:
            norm = f"self_attention.linear_{part}_up_proj.layer_norm_weight"
            made[norm] = hf.pop(f"self_attn.{part}_a_layernorm.weight")
    made |= _experts(hf)
    for base, new in (("mlp", "mlp"), ("mlp.shared_experts", "mlp.shared_experts")):
        for old in (base, base.replace("shared_experts", "shared_expert")):
            if f"{old}.gate_proj.weight" in hf:
                parts = (hf.pop(f"{old}.{p}_proj.weight") for p in ("gate", "up"))
                made[f"{new}.linear_fc1.weight"] = torch.cat(tuple(parts))
    if "mlp.up_proj.weight" in hf:
        made["mlp.linear_fc1.weight"] = hf.pop("mlp.up_proj.weight")
    if "mlp.shared_expert_gate.weight" in hf:
        made["mlp.shared_experts.gate_weight"] = hf.pop("mlp.shared_expert_gate.weight")
    for name, tensor in hf.items():
        if name in _BIAS:
            made["mlp.router.expert_bias"] = tensor.flatten()
        else:
            stem, _, kind = name.rpartition(".")
            made[f"{_IN_LAYER[stem]}.{kind}"] = tensor
    return made


def _fuse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, groups: int, head_dim: int
) -> torch.Tensor:
    """Join the queries of each group with its key and its value."""
    per = heads // groups * head_dim
    parts = []
    for g in range(groups):
        parts.append(q[g * per : (g + 1) * per])
        parts.append(k[g * head_dim : (g + 1) * head_dim])
        parts.append(v[g * head_dim : (g + 1) * head_dim])
    return torch.cat(parts)


def _experts(hf: State) -> State:
    """Take the experts out of ``hf`` and return them stacked."""
    found: dict[int, State] = {}
    for name in list(hf):
        match = re.fullmatch(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight", name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = hf.pop(name)
    if not found:
        return {}
    gate, up, down = (
        ("w1", "w3", "w2") if "w1" in found[0] else ("gate_proj", "up_proj", "down_proj")
    )
    fc1 = [torch.cat((found[e][gate], found[e][up])) for e in range(len(found))]
    return {
        "mlp.experts.experts.linear_fc1.weight": torch.stack(fc1),
        "mlp.experts.experts.linear_fc2.weight": torch.stack(
            [found[e][down] for e in range(len(found))]
        ),
    }


# --- writing -------------------------------------------------------------------------------------


@dataclass
class Pieces:
    """A tensor that torch's writer stores as several boxes: (offsets, sizes), one record each."""

    whole: torch.Tensor
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(chunk.offsets), k),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self.whole),
                    size=self.whole.size(),
                ),
            )
            for k, chunk in enumerate(self.__create_chunk_list__())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for offsets, sizes in self.boxes:
            if tuple(index.offset or ()) == offsets:
                box = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
                return self.whole[box].clone()
        raise KeyError(index)


def save(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    *,
    flavour: Flavour = "stacked",
    tp: int = 1,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write ``state`` (canonical names) as a torch_dist folder; ``extra`` are further entries."""
    made: dict[str, Any] = {}
    for name, tensor in _flavoured(state, flavour).items():
        made[name] = Pieces(tensor, list(_boxes(name, tuple(tensor.shape), tp)))
    made |= extra or {}
    folder.mkdir(parents=True)
    dcp.save(
        made,
        storage_writer=dcp.FileSystemWriter(folder, thread_count=2),
        planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
        no_dist=True,
    )
    run = argparse.Namespace(tensor_model_parallel_size=tp, num_layers=2)
    torch.save({"args": run, "iteration": 3, "checkpoint_version": 3.0}, folder / "common.pt")
    sign = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(sign))


def _flavoured(state: Mapping[str, torch.Tensor], flavour: Flavour) -> State:
    made: State = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"(decoder\.layers\.)(\d+)\.(.*)", name)
        if flavour == "stacked" and layer:
            stacks.setdefault(layer[1] + layer[3], {})[int(layer[2])] = tensor
        elif flavour == "singleton" and ".linear_fc1.weight" in name:
            for key, one in _by_expert(name, tensor):
                made[f"{key}_w"], made[f"{key}_v"] = one.chunk(2)
        elif flavour == "singleton":
            made |= _by_expert(name, tensor)
        else:
            made[name] = tensor
    return made | {n: torch.stack([s[k] for k in sorted(s)]) for n, s in stacks.items()}


def _by_expert(name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
    if ".experts.experts." not in name:
        return [(name, tensor)]
    front, back = name.split(".experts.experts.")
    return [(f"{front}.experts.experts.{e}.{back}", one) for e, one in enumerate(tensor)]


def _boxes(
    name: str, shape: tuple[int, ...], tp: int
) -> Iterable[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield what the ranks hold: layers and experts one by one, columns or rows by ``tp``."""
    single = (re.search(r"decoder\.layers\.[a-z]", name) is not None) + (
        ".experts.experts.l" in name
    )
    rest = shape[single:]
    cuts = [(0,) * len(rest), rest]
    parts: list[tuple[tuple[int, ...], tuple[int, ...]]] = [(cuts[0], cuts[1])]
    halves = 2 if name.endswith("linear_fc1.weight") else 1
    if re.search(r"linear_(fc1|qkv|q_up_proj|kv_up_proj)\.(weight|bias)|embeddings|output", name):
        step = rest[0] // (halves * tp)
        parts = [((k * step, *cuts[0][1:]), (step, *rest[1:])) for k in range(halves * tp)]
        assert step * halves * tp == rest[0], name
    elif re.search(r"linear_(fc2|proj)\.weight", name):
        step = rest[1] // tp
        parts = [((0, k * step), (rest[0], step)) for k in range(tp)]
    lead: list[tuple[int, ...]] = [()]
    for size in shape[:single]:
        lead = [(*before, k) for before in lead for k in range(size)]
    for index in lead:
        for offsets, sizes in parts:
            yield (*index, *offsets), ((1,) * single + sizes)
