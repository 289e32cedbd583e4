"""Qwen3-Next and Qwen3.5, dense and with experts: most layers have linear attention (GatedDeltaNet).

Megatron keeps each part of the linear attention's projections in a tensor of its own, flat.
Qwen3-Next interleaves them by key head, Qwen3.5 does not. The norms are zero-centred on both sides
but for the one behind the linear attention, which is only so in Megatron. The other attention
layers have a gate for each query head.

Trainers have modules of their own. slime keeps HuggingFace's, of linear attention and sometimes of the
other, too. ms-swift has one tensor for all parts of a projection, key head by key head, or (in older
releases, or where it is told to) HuggingFace's module; in its other layers each query head has its
gate right behind it, under the name and in the shape of Megatron's, where a group's gates follow its
queries. What else is in the checkpoint tells whose they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from streamconv.errors import BadInputError
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
    mtp_beside,
)
from streamconv.families.ops import Tensor
from streamconv.families.qwen3_vl import TOWER
from streamconv.families.rules import (
    Dims,
    Family,
    Rule,
    moved,
    prefixed,
    renamed,
    replaced,
    rule,
)
from streamconv.families.vision import kept
from streamconv.tracing.later import torch

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
    """Undo Megatron's zero-centred norm, where the run had one; ms-swift's is none."""
    if _SWIFT in dims.signs:
        return norm
    centred = (
        dims.megatron.get(name) for name in ("layernorm_zero_centered_gamma", "apply_layernorm_1p")
    )
    return norm if next((c for c in centred if c is not None), True) is False else norm + 1


_CORE, _SLIME, _SWIFT = "Megatron-Core", "slime", "ms-swift"
_MODULE = "HuggingFace's module"
_TRAINERS = frozenset({_CORE, _SLIME, _SWIFT})
_SIGNS: Mapping[str, str] = {
    # Megatron-Bridge's adapters are on modules of Megatron-Core.
    _CORE: r"\.self_attention\.(in_proj\.weight\.query$|linear_qkv\.adapter\.)",
    _SLIME: r"\.self_attention\.(linear_attn|self_attn)\.",
    _SWIFT: r"\.self_attention\.(in_proj|in_proj_qkvz|in_proj_qkv)\.(base_layer\.)?weight$",
    _MODULE: r"\.self_attention\.norm\.weight$",
}


def gated_qkv(dims: Dims, tensor: Tensor) -> tuple[Tensor, ...]:
    """Queries with their gates, keys and values, in the order of the trainer whose signs are seen."""
    trainers = dims.signs & _TRAINERS
    if len(trainers) != 1:
        raise BadInputError(
            "the linear attention of this checkpoint is of several trainers"
            if trainers
            else "whether its gate follows each query head, or a group's gates its queries, nothing in "
            "the checkpoint tells",
            expected=f"linear attention as one of {', '.join(sorted(_TRAINERS))} writes it",
            found=" and ".join(sorted(trainers)) or "none",
            hint="let the trainer export the model",
        )
    return ops.paired_qkv(dims, tensor) if _SWIFT in dims.signs else ops.gated_qkv(dims, tensor)


def _of_key_heads(dims: Dims, tensor: Tensor, parts: int) -> list[Tensor]:
    """Return queries, keys, values, gates, betas and alphas ``[key heads, rows, …]``, or the first."""
    heads, gates = dims.number("linear_num_key_heads"), dims.number("linear_num_value_heads")
    rows = [*_rows(dims), gates, gates][:parts]
    dims.expect("the rows of the linear attention", sum(rows), tensor.shape[0])
    by_head = tensor.reshape(heads, -1, *tensor.shape[1:])
    return [*torch.split(by_head, [n // heads for n in rows], dim=1)]


def parted_by_key_head(dims: Dims, tensor: Tensor) -> tuple[Tensor, ...]:
    """``[key heads · (q k v z b a), H]`` → all but the last two, and these, by key head."""
    parts = _of_key_heads(dims, tensor, 6)
    return torch.cat(parts[:4], 1).flatten(0, 1), torch.cat(parts[4:], 1).flatten(0, 1)


def parted(dims: Dims, tensor: Tensor) -> tuple[Tensor, ...]:
    """``[key heads · (q k v z b a), H]`` → queries, keys and values one after the other; z, b, a."""
    query, key, value, *rest = (p.flatten(0, 1) for p in _of_key_heads(dims, tensor, 6))
    return torch.cat((query, key, value)), *rest


def parted_qkvz(dims: Dims, tensor: Tensor) -> tuple[Tensor, ...]:
    """``[key heads · (q k v z), H]`` → queries, keys and values one after the other; z."""
    query, key, value, gate = (p.flatten(0, 1) for p in _of_key_heads(dims, tensor, 4))
    return torch.cat((query, key, value)), gate


def parted_ba(dims: Dims, tensor: Tensor) -> tuple[Tensor, ...]:
    """``[key heads · (b a), H]`` → betas, alphas."""
    heads, gates = dims.number("linear_num_key_heads"), dims.number("linear_num_value_heads")
    dims.expect("the value heads of the linear attention", 2 * gates, tensor.shape[0])
    beta, alpha = tensor.reshape(heads, -1, *tensor.shape[1:]).chunk(2, dim=1)
    return beta.flatten(0, 1), alpha.flatten(0, 1)


def convolution(dims: Dims, tensor: Tensor) -> Tensor:
    """``[key heads · (q k v), 1, K]`` → queries, keys and values one after the other.

    Of HuggingFace's module they already are.
    """
    parts = [p.flatten(0, 1) for p in _of_key_heads(dims, tensor, 3)]
    return tensor if _MODULE in dims.signs else torch.cat(parts)


def prediction_input(dims: Dims, tensor: Tensor) -> Tensor:
    """``[H, 2H]``, the half for the embedding first."""
    return ops.swapped_halves(dims, tensor) if _SLIME in dims.signs else tensor


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
    # slime
    rule(_A + "linear_attn.{rest}", _N + "{rest}", ops.copy),
    # ms-swift
    rule(_A + "conv1d.weight", _N + "conv1d.weight", convolution),
    rule(_A + "norm.weight", _N + "norm.weight", ops.copy),
)
_NEXT = (
    *_LINEAR,
    rule((*_QKV, _Z), _N + "in_proj_qkvz.weight", by_key_head),
    rule(_BETA_ALPHA, _N + "in_proj_ba.weight", gates_by_key_head),
    rule(
        _A + "in_proj.weight",
        (_N + "in_proj_qkvz.weight", _N + "in_proj_ba.weight"),
        parted_by_key_head,
    ),
    *moved(_A, _N, {name: name for name in ("in_proj_qkvz", "in_proj_ba")}, ops.copy),
)
_3_5 = (
    *_LINEAR,
    rule(_QKV, _N + "in_proj_qkv.weight", joined),
    rule(_Z, _N + "in_proj_z.weight", ops.copy),
    rule(_BETA_ALPHA[0], _N + "in_proj_b.weight", ops.copy),
    rule(_BETA_ALPHA[1], _N + "in_proj_a.weight", ops.copy),
    rule(
        _A + "in_proj.weight",
        tuple(f"{_N}in_proj_{x}.weight" for x in ("qkv", "z", "b", "a")),
        parted,
    ),
    rule(
        _A + "in_proj_qkvz.weight",
        (_N + "in_proj_qkv.weight", _N + "in_proj_z.weight"),
        parted_qkvz,
    ),
    rule(_A + "in_proj_ba.weight", (_N + "in_proj_b.weight", _N + "in_proj_a.weight"), parted_ba),
    *moved(_A, _N, {f"in_proj_{x}": f"in_proj_{x}" for x in ("qkv", "z", "b", "a")}, ops.copy),
)

_LAYER = (
    *INPUT_NORM,
    # slime
    rule(_A + "self_attn.{rest}", L + "self_attn.{rest}", ops.copy),
    rule(_A + "input_layernorm.weight", L + "input_layernorm.weight", ops.copy),
    *replaced(QKV, gated_qkv),
    *OUT,
    *QK_NORM,
    *MLP,
    *ROUTER,
    *EXPERTS,
    *GATED_SHARED_EXPERT,
)
_MTP = mtp_beside(_LAYER)
# slime joins hidden state and embedding in the other order, in this family alone.
_MTP_OF_NEXT = (
    rule("mtp.layers.{mtp}.eh_proj.weight", "mtp.fc.weight", prediction_input),
    *_MTP,
)


def _multimodal(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules of a language model that is one part of a model, or all that slime trains."""
    inner = renamed(rules, targets={"model.": "model.language_model."})
    return (*prefixed(inner, sources="language_model."), *inner)


_LANGUAGE = (*TOP, *_LAYER, *_3_5)

FAMILIES = (
    Family(
        name="qwen3_next",
        model_types=("qwen3_next",),
        rules=(*TOP, *_LAYER, *_NEXT, *_MTP_OF_NEXT),
        extras=("mtp.{rest}",),
        zero_centred_norms=True,
        signs=_SIGNS,
    ),
    Family(
        name="qwen3_5_text",
        model_types=("qwen3_5_text", "qwen3_5_moe_text"),
        rules=(*_LANGUAGE, *_MTP),
        extras=("mtp.{rest}",),
        zero_centred_norms=True,
        signs=_SIGNS,
    ),
    Family(
        name="qwen3_5",
        model_types=("qwen3_5", "qwen3_5_moe"),
        rules=(
            *_multimodal(_LANGUAGE),
            *prefixed(_MTP, sources="language_model."),
            *_MTP,
            *TOWER,
            # HuggingFace's tower: mbridge calls it so, ms-swift and slime leave its name.
            *kept({"vision_model": "model.visual", "visual": "model.visual"}),
        ),
        untrained=("model.visual.{rest}",),
        extras=("mtp.{rest}",),
        zero_centred_norms=True,
        signs=_SIGNS,
    ),
)
