"""ERNIE 4.5, dense and with experts."""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import DENSE, MOE, SHARED_EXPERTS, D, L
from streamconv.families.rules import Family, rule

FAMILIES = (
    Family(name="ernie4_5", model_types=("ernie4_5",), rules=DENSE),
    Family(
        name="ernie4_5_moe",
        model_types=("ernie4_5_moe",),
        rules=(
            *MOE,
            *SHARED_EXPERTS,
            rule(
                D + "mlp.router.expert_bias",
                L + "mlp.moe_statics.e_score_correction_bias",
                ops.row,
            ),
        ),
    ),
)
