"""MiMo-7B and MiMo-V2-Flash: layers for multi-token prediction under names of their own.

MiMo-V2-Flash has values narrower than keys, and in layers with a window other numbers of heads.
"""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import (
    ATTENTION,
    DENSE,
    EXPERT_BIAS,
    EXPERTS,
    INPUT_NORM,
    MLP,
    OUT,
    QKV,
    ROUTER,
    TOP,
    D,
    L,
    mtp_layer,
    plain_mtp,
)
from streamconv.families.rules import Dims, Family, borrowing, renamed, replaced, rule
from streamconv.tracing.later import torch


def uneven_qkv(dims: Dims, tensor: ops.Tensor) -> tuple[ops.Tensor, ...]:
    """Group by group ``n/g`` queries and a key of one width, a value of another → q, k, v."""
    windowed = dims.kind in ("sliding_attention", "mtp")
    own = dims.get("swa_num_key_value_heads") or 2 * dims.groups
    groups = own if windowed else dims.groups
    width, narrow, per = dims.head_dim, dims.number("v_head_dim"), dims.heads // groups
    rows = [per * width, width, narrow]
    dims.expect(
        f"the rows of queries, keys and values ({dims.heads} query heads, {groups} groups, widths "
        f"{width} and {narrow})",
        groups * sum(rows),
        tensor.shape[0],
    )
    by_group = tensor.reshape(groups, sum(rows), *tensor.shape[1:])
    return tuple(part.flatten(0, 1) for part in torch.split(by_group, rows, dim=1))


_V2 = (
    *INPUT_NORM,
    *replaced(QKV, uneven_qkv),
    *OUT,
    rule(
        D + "self_attention.core_attention.softmax_offset",
        L + "self_attn.attention_sink_bias",
        ops.copy,
    ),
    *MLP,
    *ROUTER,
    *EXPERT_BIAS,
    *EXPERTS,
)

_M = "mtp.layers.{mtp}."
_L = "model.mtp_layers.{mtp}."


FAMILIES = (
    Family(
        name="mimo",
        model_types=("mimo",),
        rules=(
            *DENSE,
            rule(_M + "enorm.weight", _L + "token_layernorm.weight", ops.copy),
            rule(_M + "hnorm.weight", _L + "hidden_layernorm.weight", ops.copy),
            # Megatron joins [embedding, hidden], MiMo [hidden, embedding].
            rule(_M + "eh_proj.weight", _L + "input_proj.weight", ops.swapped_halves),
            rule(_M + "final_layernorm.weight", _L + "final_layernorm.weight", ops.copy),
            *mtp_layer((*ATTENTION, *MLP), _L),
        ),
        extras=("model.mtp_layers.{mtp}.{rest}",),
        # Without its extra layers it is Qwen2.
        reference=borrowing({"mimo": ("qwen2", "Qwen2ForCausalLM")}),
    ),
    Family(
        name="mimo_v2_flash",
        model_types=("mimo_v2_flash",),
        rules=(
            *TOP,
            *_V2,
            *plain_mtp(
                renamed(_V2, targets={"post_attention_layernorm.": "pre_mlp_layernorm."}),
                "model.mtp.layers.{mtp}.",
                "final_layernorm",
            ),
        ),
        extras=("model.mtp.layers.{mtp}.{rest}",),
    ),
)
