"""DeepSeek V2 and V3, Kimi-K2, Moonlight: latent attention, dense first layers, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamconv.families.blocks import (
    EXPERT_BIAS,
    EXPERTS,
    MLA,
    MLP,
    ROUTER,
    SHARED_EXPERTS,
    TOP,
    mtp,
)
from streamconv.families.rules import Family

_LAYER = (*MLA, *MLP, *ROUTER, *EXPERT_BIAS, *EXPERTS, *SHARED_EXPERTS)


def as_deepseek_v3(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Kimi-K2 is DeepSeek-V3 under a model type of its own, which transformers lacks."""
    if config.get("model_type") != "kimi_k2":
        return config
    return {k: v for k, v in config.items() if k != "auto_map"} | {"model_type": "deepseek_v3"}


FAMILIES = (
    Family(
        name="deepseek",
        model_types=("deepseek_v2", "deepseek_v3", "kimi_k2"),
        rules=(*TOP, *_LAYER, *mtp(_LAYER)),
        extras=("model.layers.{mtp_layer}.{rest}",),
        reference=as_deepseek_v3,
    ),
)
