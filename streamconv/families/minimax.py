"""MiniMax-M2 and M3: experts under Mixtral's names.

M2 norms queries and keys over all heads at once. M3 has shared experts, an indexer for sparse
attention, which Megatron keeps beside the layers, and a vision tower that stays HuggingFace's.
"""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import MOE, SHARED_EXPERTS, WIDE_QK_NORM, D, L
from streamconv.families.moe import MIXTRAL_NAMES
from streamconv.families.rules import Family, moved, renamed, rule, without_class
from streamconv.families.vision import kept, language

_M2 = (
    *renamed(MOE, targets=MIXTRAL_NAMES),
    rule(
        D + "mlp.router.expert_bias",
        L + "block_sparse_moe.e_score_correction_bias",
        ops.copy,
    ),
)
_TOWER = ("vision_tower", "multi_modal_projector", "patch_merge_mlp")

FAMILIES = (
    Family(
        name="minimax_m2",
        model_types=("minimax_m2",),
        rules=(*_M2, *WIDE_QK_NORM),
    ),
    Family(
        name="minimax_m3",
        model_types=("minimax_m3", "minimax_m3_vl"),
        rules=(
            *language(
                (*_M2, *renamed(SHARED_EXPERTS, targets={".mlp.": ".block_sparse_moe."})),
                "language_model.model.",
                "language_model.lm_head.",
            ),
            *moved(
                "lightning_indexers.{layer}.",
                "language_model.model.layers.{layer}.self_attn.index_",
                {n: n for n in ("q_proj", "k_proj", "q_norm", "k_norm")},
                ops.copy,
            ),
            *kept({n: n for n in _TOWER}),
        ),
        reference=without_class,
        untrained=tuple(f"{n}.{{rest}}" for n in _TOWER),
    ),
)
