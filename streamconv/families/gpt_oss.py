"""gpt-oss: attention sinks, and experts in one tensor with gate and up columns in turn.

The released files are quantized (``*_blocks``, ``*_scales``); a trained model's are these.
"""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import ATTENTION, MLP_NORM, TOP, D, L
from streamconv.families.ops import Tensor
from streamconv.families.rules import Dims, Family, rule
from streamconv.tracing.later import torch


def alternating(dims: Dims, fc1: Tensor) -> Tensor:
    """``[E, 2I]``, gate then up → ``[E, 2I]``, gate and up in turn."""
    gate, up = ops.expert_gate_up(dims, fc1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def alternating_columns(dims: Dims, fc1: Tensor) -> Tensor:
    """``[E, 2I, H]`` → ``[E, H, 2I]``, gate and up columns in turn."""
    return alternating(dims, fc1).transpose(1, 2)


_FC1 = D + "mlp.experts.experts.linear_fc1."
_FC2 = D + "mlp.experts.experts.linear_fc2."
_EXPERTS = L + "mlp.experts."

FAMILIES = (
    Family(
        name="gpt_oss",
        model_types=("gpt_oss",),
        rules=(
            *TOP,
            *ATTENTION,
            *MLP_NORM,
            rule(
                D + "self_attention.core_attention.softmax_offset",
                L + "self_attn.sinks",
                ops.copy,
            ),
            rule(D + "mlp.router.weight", L + "mlp.router.weight", ops.copy),
            rule(D + "mlp.router.bias", L + "mlp.router.bias", ops.copy),
            rule(_FC1 + "weight", _EXPERTS + "gate_up_proj", alternating_columns),
            rule(_FC1 + "bias", _EXPERTS + "gate_up_proj_bias", alternating),
            rule(_FC2 + "weight", _EXPERTS + "down_proj", ops.expert_columns),
            rule(_FC2 + "bias", _EXPERTS + "down_proj_bias", ops.experts),
        ),
    ),
)
