"""Step-3.5 and Step-3.7 (with a vision tower): one gate for each query head, stacked experts.

Megatron has the gates in the projection of queries, keys and values. Its development branch keeps a row
a head behind all of them, as HuggingFace's model has it. Every release up to 0.19 has a gate for each
element of a head instead, which Megatron-Bridge fills with the same row and reads back from the first:
what such a run trained is another function than HuggingFace's model can be. Layers with a window have
more heads than others, and Step-3.5's norms are zero-centred on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamconv.errors import BadInputError
from streamconv.families.blocks import (
    EXPERT_BIAS,
    EXPERTS,
    INPUT_NORM,
    MLP,
    OUT,
    QK_NORM,
    ROUTER,
    SHARED_EXPERTS,
    TOP,
    D,
    L,
    plain_mtp,
    with_vocab,
)
from streamconv.families.ops import Tensor
from streamconv.families.rules import Dims, Family, prefixed, renamed, rule
from streamconv.families.vision import kept
from streamconv.tracing.later import torch

_QKV = D + "self_attention.linear_qkv.weight"


def _shape(dims: Dims) -> tuple[int, int, int]:
    """Return the query heads, the groups and the width of a head of this layer."""
    heads = dims.heads
    if dims.kind == "sliding_attention":
        heads = dims.number("num_sliding_attention_heads", "num_attention_heads")
    else:
        dims.check_heads()
    if not dims.groups or heads % dims.groups:
        dims.expect("the query heads, which the groups share evenly", dims.groups, heads)
    return heads, dims.groups, dims.head_dim


def qkv_and_gate(dims: Dims, qkv: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    """``[g·(n/g + 2)·d, H]`` and ``[n, H]`` → q, k, v and the gate."""
    heads, groups, width = _shape(dims)
    what = f"{heads} query heads and {groups} groups of width {width}"
    rows = (heads + 2 * groups) * width
    dims.expect(f"the rows of queries, keys and values ({what})", rows, qkv.shape[0])
    dims.expect("the gates of query heads", heads, gate.shape[0])
    grouped = qkv.reshape(groups, -1, width, *qkv.shape[1:])
    query, key, value = torch.split(grouped, [heads // groups, 1, 1], dim=1)
    return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2), gate


def gated_qkv(dims: Dims, tensor: Tensor) -> tuple[Tensor, ...]:
    """``[g·(n/g + 2)·d + n, H]`` → the same; a gate for each element is refused."""
    heads, groups, width = _shape(dims)
    if tensor.shape[0] == 2 * (heads + groups) * width:
        raise BadInputError(
            "this run trained a gate for each element of a head, HuggingFace's model has one a head",
            expected=f"{(heads + 2 * groups) * width + heads} rows, of a Megatron-Core that has "
            "head_wise_attn_gate (its development branch)",
            found=f"{tensor.shape[0]} rows, as attention_output_gate makes them",
            hint="what Megatron-Bridge exports of it keeps the first of each head's gates, and is "
            "another model than the trained one",
        )
    rows = (heads + 2 * groups) * width
    return qkv_and_gate(dims, tensor[:rows], tensor[rows:])


_TARGETS = tuple(f"{L}self_attn.{x}_proj.weight" for x in "qkvg")
_LAYER = (
    *INPUT_NORM,
    rule((_QKV + "._qkv", _QKV + "._gate"), _TARGETS, qkv_and_gate),
    rule(_QKV, _TARGETS, gated_qkv),
    *OUT,
    *QK_NORM,
    *MLP,
    *renamed(
        (*ROUTER, *EXPERT_BIAS, *EXPERTS, *SHARED_EXPERTS),
        targets={
            "mlp.gate.weight": "moe.gate.weight",
            "mlp.gate.e_score_correction_bias": "moe.router_bias",
            "mlp.experts.{expert}.": "moe.",
            "mlp.shared_experts.": "share_expert.",
        },
    ),
)
_NEXT = "model.layers.{mtp_layer}."
_HEAD = _NEXT + "transformer.shared_head."
_RULES = (
    *TOP,
    *_LAYER,
    rule(
        ("mtp.layers.{mtp}.final_layernorm.weight", "output_layer.weight"),
        (_HEAD + "norm.weight", _HEAD + "output.weight"),
        with_vocab,
    ),
    *plain_mtp(_LAYER, _NEXT, "transformer.shared_head.norm"),
)
_PROJECTOR = {"image_insert_embedding.align_projector": "vit_large_projector"}
_SEEING = ("vision_model.{rest}", "vit_large_projector.{rest}")


def _with_tower(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Transformers has the language model only as a part of the one that sees."""
    if config.get("model_type") != "step3p5":
        return config
    text = {k: v for k, v in config.items() if k != "auto_map"}
    return {
        "model_type": "step3p7",
        "architectures": ["Step3p7ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"num_hidden_layers": 1},
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }


FAMILIES = (
    Family(
        name="step3p5",
        model_types=("step3p5",),
        rules=_RULES,
        extras=(_NEXT + "{rest}",),
        reference=_with_tower,
        lacks=_SEEING,
        zero_centred_norms=True,
    ),
    Family(
        name="step3p7",
        model_types=("step3p7",),
        rules=(
            *prefixed(_RULES, sources="language_model."),
            *kept({"vision_model": "vision_model", **_PROJECTOR}),
        ),
        extras=(_NEXT + "{rest}",),
        untrained=_SEEING,
        zero_centred_norms=True,
    ),
)
