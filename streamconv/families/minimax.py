"""MiniMax-M2: experts under Mixtral's names, queries and keys normed over all heads at once."""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import MOE, WIDE_QK_NORM, D, L
from streamconv.families.moe import MIXTRAL_NAMES
from streamconv.families.rules import Family, renamed, rule

FAMILIES = (
    Family(
        name="minimax_m2",
        model_types=("minimax_m2",),
        rules=(
            *renamed(MOE, targets=MIXTRAL_NAMES),
            rule(
                D + "mlp.router.expert_bias",
                L + "block_sparse_moe.e_score_correction_bias",
                ops.copy,
            ),
            *WIDE_QK_NORM,
        ),
    ),
)
