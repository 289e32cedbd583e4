"""DeepSeek V2 to V3.2, Kimi-K2, Moonlight, GLM-4.7-Flash, GLM-5: latent attention, shared experts.

The first layers are dense. V3.2 and GLM-5 choose what a token attends to (DSA).
"""

from __future__ import annotations

from streamconv.families.blocks import (
    EXPERT_BIAS,
    EXPERTS,
    INDEXER,
    MLA,
    MLP,
    ROUTER,
    SHARED_EXPERTS,
    TOP,
    mtp,
)
from streamconv.families.rules import Family, borrowing

_LAYER = (*MLA, *INDEXER, *MLP, *ROUTER, *EXPERT_BIAS, *EXPERTS, *SHARED_EXPERTS)


# DeepSeek-V3 under a model type of its own, which transformers lacks.
KIMI = borrowing({"kimi_k2": ("deepseek_v3", "DeepseekV3ForCausalLM")})

# Without layers for multi-token prediction.
KIMI_K2 = (*TOP, *_LAYER)

FAMILIES = (
    Family(
        name="deepseek",
        model_types=(
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "kimi_k2",
            "glm4_moe_lite",
            "glm_moe_dsa",
        ),
        rules=(*TOP, *_LAYER, *mtp(_LAYER)),
        extras=("model.layers.{mtp_layer}.{rest}",),
        reference=KIMI,
    ),
)
