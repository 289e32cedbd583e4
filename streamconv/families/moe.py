"""Decoders with routed experts: Qwen2-MoE, Qwen3-MoE, OLMoE, Mixtral."""

from __future__ import annotations

from streamconv.families.blocks import GATED_SHARED_EXPERT, MOE, WIDE_QK_NORM
from streamconv.families.rules import Family, renamed

# Mixtral's names for a layer's router and experts; MiniMax-M2 has them too.
MIXTRAL_NAMES = {
    "mlp.gate.": "block_sparse_moe.gate.",
    "mlp.experts.{expert}.gate_proj.": "block_sparse_moe.experts.{expert}.w1.",
    "mlp.experts.{expert}.up_proj.": "block_sparse_moe.experts.{expert}.w3.",
    "mlp.experts.{expert}.down_proj.": "block_sparse_moe.experts.{expert}.w2.",
}

FAMILIES = (
    Family(name="qwen3_moe", model_types=("qwen3_moe",), rules=MOE),
    Family(name="olmoe", model_types=("olmoe",), rules=(*MOE, *WIDE_QK_NORM)),
    Family(name="qwen2_moe", model_types=("qwen2_moe",), rules=(*MOE, *GATED_SHARED_EXPERT)),
    Family(name="mixtral", model_types=("mixtral",), rules=renamed(MOE, targets=MIXTRAL_NAMES)),
)
