"""Qwen3-Next and Qwen3.5, dense and with experts: most layers have linear attention (GatedDeltaNet).

Megatron keeps each part of the linear attention's projections in a tensor of its own, flat.
Qwen3-Next interleaves them by key head, Qwen3.5 does not. The norms are zero-centred on both sides
but for the one behind the linear attention, which is only so in Megatron. The other attention
layers have a gate for each query head.
"""

from __future__ import annotations

import torch

from streamconv.families import ops
from streamconv.families.blocks import (
    EXPERTS,
    GATED_SHARED_EXPERT,
    INPUT_NORM,
    MLP,
    OUT,
    QK_NORM,
    QKV,
    ROUTER,
    TOP,
    D,
    L,
    mtp_layer,
)
from streamconv.families.ops import Tensor
from streamconv.families.qwen3_vl import TOWER
from streamconv.families.rules import Dims, Family, Rule, prefixed, renamed, replaced, rule

_A = D + "self_attention."
_N = L + "linear_attn."
_QKV = tuple(f"{_A}in_proj.weight.{x}" for x in ("query", "key", "value"))
_Z = _A + "in_proj.weight.z"
_BETA_ALPHA = tuple(f"{_A}in_proj.weight.{x}" for x in ("beta", "alpha"))


def joined(dims: Dims, *parts: Tensor) -> Tensor:
    """Queries, keys and values ``[rows, …]`` → one after the other."""
    dims.expect("the rows of the linear attention", _rows(dims)[:3], [p.shape[0] for p in parts])
    return torch.cat(parts)


def by_key_head(dims: Dims, *parts: Tensor) -> Tensor:
    """Queries, keys, values and gates ``[rows, H]`` → those of the first key head, the second, …"""
    dims.expect("the rows of the linear attention", _rows(dims), [p.shape[0] for p in parts])
    return _interleaved(dims, parts)


def gates_by_key_head(dims: Dims, *parts: Tensor) -> Tensor:
    """Beta and alpha ``[value heads, H]`` → those of the first key head, the second, …"""
    heads = dims.number("linear_num_value_heads")
    dims.expect("the value heads of the linear attention", [heads] * 2, [len(p) for p in parts])
    return _interleaved(dims, parts)


def _rows(dims: Dims) -> list[int]:
    keys = dims.number("linear_num_key_heads") * dims.number("linear_key_head_dim")
    values = dims.number("linear_num_value_heads") * dims.number("linear_value_head_dim")
    return [keys, keys, values, values]


def _interleaved(dims: Dims, parts: tuple[Tensor, ...]) -> Tensor:
    heads = dims.number("linear_num_key_heads")
    grouped = [p.reshape(heads, -1, *p.shape[1:]) for p in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def plus_one(dims: Dims, norm: Tensor) -> Tensor:
    """Undo Megatron's zero-centred norm, where the run had one."""
    centred = (
        dims.megatron.get(name) for name in ("layernorm_zero_centered_gamma", "apply_layernorm_1p")
    )
    return norm if next((c for c in centred if c is not None), True) is False else norm + 1


_LINEAR = (
    rule(_A + "in_proj.layer_norm_weight", L + "input_layernorm.weight", ops.copy),
    rule(
        tuple(f"{_A}conv1d.weight.{x}" for x in ("query", "key", "value")),
        _N + "conv1d.weight",
        joined,
    ),
    rule(_A + "A_log", _N + "A_log", ops.copy),
    rule(_A + "dt_bias", _N + "dt_bias", ops.copy),
    rule(_A + "out_norm.weight", _N + "norm.weight", plus_one),
    rule(_A + "out_proj.weight", _N + "out_proj.weight", ops.copy),
)
_NEXT = (
    *_LINEAR,
    rule((*_QKV, _Z), _N + "in_proj_qkvz.weight", by_key_head),
    rule(_BETA_ALPHA, _N + "in_proj_ba.weight", gates_by_key_head),
)
_3_5 = (
    *_LINEAR,
    rule(_QKV, _N + "in_proj_qkv.weight", joined),
    rule(_Z, _N + "in_proj_z.weight", ops.copy),
    rule(_BETA_ALPHA[0], _N + "in_proj_b.weight", ops.copy),
    rule(_BETA_ALPHA[1], _N + "in_proj_a.weight", ops.copy),
)

_LAYER = (
    *INPUT_NORM,
    *replaced(QKV, ops.gated_qkv),
    *OUT,
    *QK_NORM,
    *MLP,
    *ROUTER,
    *EXPERTS,
    *GATED_SHARED_EXPERT,
)
# One layer for multi-token prediction, beside the model and not in it.
_MTP = (
    *(
        rule(f"mtp.layers.{{mtp}}.{source}.weight", f"mtp.{target}.weight", ops.copy)
        for source, target in (
            ("enorm", "pre_fc_norm_embedding"),
            ("hnorm", "pre_fc_norm_hidden"),
            ("eh_proj", "fc"),
            ("final_layernorm", "norm"),
        )
    ),
    *mtp_layer(_LAYER, "mtp.layers.{mtp}."),
)


def _multimodal(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules of a language model that is one part of a model."""
    inner = renamed(rules, targets={"model.": "model.language_model."})
    return prefixed(inner, sources="language_model.")


_LANGUAGE = (*TOP, *_LAYER, *_3_5)

FAMILIES = (
    Family(
        name="qwen3_next",
        model_types=("qwen3_next",),
        rules=(*TOP, *_LAYER, *_NEXT, *_MTP),
        extras=("mtp.{rest}",),
        zero_centred_norms=True,
    ),
    Family(
        name="qwen3_5_text",
        model_types=("qwen3_5_text", "qwen3_5_moe_text"),
        rules=(*_LANGUAGE, *_MTP),
        extras=("mtp.{rest}",),
        zero_centred_norms=True,
    ),
    Family(
        name="qwen3_5",
        model_types=("qwen3_5", "qwen3_5_moe"),
        rules=(
            *_multimodal(_LANGUAGE),
            *prefixed(_MTP, sources="language_model."),
            *TOWER,
            # mbridge keeps HuggingFace's tower.
            rule("vision_model.{rest}", "model.visual.{rest}", ops.copy),
        ),
        extras=("mtp.{rest}",),
        zero_centred_norms=True,
    ),
)
