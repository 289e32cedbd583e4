"""Nemotron-4 and Minitron: LayerNorms with a bias, an MLP without a gate."""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import ATTENTION, MLP_NORM, TOP, D, L
from streamconv.families.rules import Family, renamed, rule

_NORMS = tuple(
    r
    for r in (*ATTENTION, *MLP_NORM, *TOP)
    if "norm" in r.sources[0] and "_proj" not in r.targets[0]
)

FAMILIES = (
    Family(
        name="nemotron",
        model_types=("nemotron",),
        rules=(
            *TOP,
            *ATTENTION,
            *MLP_NORM,
            rule(D + "mlp.linear_fc1.weight", L + "mlp.up_proj.weight", ops.copy),
            rule(D + "mlp.linear_fc2.weight", L + "mlp.down_proj.weight", ops.copy),
            # A fused norm is layer_norm_weight and layer_norm_bias, one of its own norm.weight.
            *renamed(
                _NORMS,
                sources={"norm.weight": "norm.bias", "norm_weight": "norm_bias"},
                targets={"norm.weight": "norm.bias"},
            ),
        ),
        zero_centred_norms=True,
    ),
)
