"""Gemma 4, dense and with experts, alone and beside towers: as Megatron-Bridge builds it.

Layers with full attention have heads of another width, and may take their keys for values; the last
ones may take the keys and values of a layer before them. Megatron's ``linear_qkv`` has rows for all of
them, which Megatron-Bridge fills when it loads and leaves out when it exports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamconv.families import ops
from streamconv.families.blocks import INPUT_NORM, MLP, MLP_NORM, OUT, QK_NORM, QKV, TOP, D, L
from streamconv.families.ops import Tensor
from streamconv.families.rules import Applies, Dims, Family, Rule, moved, renamed, replaced, rule
from streamconv.families.vision import kept, language
from streamconv.tracing.later import torch


def qkv(dims: Dims, tensor: Tensor) -> tuple[Tensor | None, ...]:
    """``[g·(n/g + 2)·d, H]``, by the kind of layer → q, and k and v where the layer has its own."""
    alike = dims.kind == "full_attention" and bool(dims.get("attention_k_eq_v"))
    width, groups = dims.head_dim, dims.groups
    per = dims.heads // groups
    dims.expect(
        f"the rows of queries, keys and values ({dims.heads} query heads and {groups} groups of width "
        f"{width})",
        groups * (per + 2) * width,
        tensor.shape[0],
    )
    grouped = tensor.reshape(groups, per + 2, width, *tensor.shape[1:])
    query, key, value = torch.split(grouped, [per, 1, 1], dim=1)
    return (
        query.flatten(0, 2),
        None if dims.reuses_keys else key.flatten(0, 2),
        None if dims.reuses_keys or alike else value.flatten(0, 2),
    )


_ALL = (
    *TOP,
    *replaced(QKV, qkv),
    *OUT,
    *QK_NORM,
    rule(D + "layer_scalar", L + "layer_scalar", ops.copy),
)
_DENSE = (
    *INPUT_NORM,
    *renamed(MLP_NORM, targets={"post_attention_layernorm": "pre_feedforward_layernorm"}),
    *moved(
        D,
        L,
        {
            "post_self_attn_layernorm": "post_attention_layernorm",
            "post_mlp_layernorm": "post_feedforward_layernorm",
            "per_layer_input_gate": "per_layer_input_gate",
            "per_layer_projection": "per_layer_projection",
            "post_per_layer_input_norm": "post_per_layer_input_norm",
        },
        ops.copy,
    ),
    *MLP[len(MLP_NORM) :],
    rule("per_layer_embedding.weight", "model.embed_tokens_per_layer.weight", ops.vocab),
    *moved(
        "",
        "model.",
        {
            "per_layer_model_proj": "per_layer_model_projection",
            "per_layer_proj_norm": "per_layer_projection_norm",
        },
        ops.copy,
    ),
)
# Beside the experts there is the dense MLP, as their shared one.
_MOE = (
    *moved(
        D,
        L,
        {
            "self_attention.linear_proj.post_layernorm": "post_attention_layernorm",
            "pre_mlp_layernorm": "pre_feedforward_layernorm_2",
            "pre_shared_expert_layernorm": "pre_feedforward_layernorm",
            "mlp.post_shared_expert_layernorm": "post_feedforward_layernorm_1",
            "mlp.post_moe_layernorm": "post_feedforward_layernorm_2",
            "post_ffn_layernorm": "post_feedforward_layernorm",
            "mlp.router": "router.proj",
        },
        ops.copy,
    ),
    rule(D + "self_attention.linear_qkv.layer_norm_weight", L + "input_layernorm.weight", ops.copy),
    *(
        rule(f"{D}mlp.router.{name}", f"{L}router.{name}", ops.copy)
        for name in ("scale", "per_expert_scale")
    ),
    *renamed(MLP[len(MLP_NORM) :], sources={"mlp.": "mlp.shared_experts."}),
    rule(D + "mlp.experts.experts.linear_fc1.weight", L + "experts.gate_up_proj", ops.experts),
    rule(D + "mlp.experts.experts.linear_fc2.weight", L + "experts.down_proj", ops.experts),
)
_TOWERS = {n: f"model.{n}" for n in ("vision_tower", "embed_vision", "audio_tower", "embed_audio")}


def _with_experts(config: Mapping[str, Any]) -> bool:
    return bool((config.get("text_config") or config).get("enable_moe_block"))


def _without_experts(config: Mapping[str, Any]) -> bool:
    return not _with_experts(config)


def _families(name: str, rules: tuple[Rule, ...], when: Applies) -> tuple[Family, Family]:
    """Return the families of the language model alone, and beside towers."""
    return (
        Family(name=f"{name}_text", model_types=("gemma4_text",), rules=rules, when=when),
        Family(
            name=name,
            model_types=("gemma4",),
            rules=(*language(rules, "model.language_model."), *kept(_TOWERS)),
            when=when,
            untrained=tuple(f"{target}.{{rest}}" for target in _TOWERS.values()),
        ),
    )


FAMILIES = (
    *_families("gemma4_moe", (*_ALL, *_MOE), _with_experts),
    *_families("gemma4", (*_ALL, *_DENSE), _without_experts),
)
