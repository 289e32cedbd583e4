"""InternVL: HuggingFace's conversion of it, and the one whose code is on the Hub (``internvl_chat``).

ms-swift keeps HuggingFace's tower; mbridge has InternViT in Megatron's own modules.
"""

from __future__ import annotations

from streamconv.families.blocks import MOE
from streamconv.families.ops import copy
from streamconv.families.rules import Family, rule
from streamconv.families.vision import (
    BESIDE,
    WITHIN,
    B,
    blocks,
    both,
    kept,
    language,
    together,
)

_V = "vision_model.encoder.layers.{layer}."
_E = "vision_model.embeddings."
_P = "vision_projection.encoder."
_INTERN_VIT = (
    together(
        {
            "vision_model.class_token": _E + "class_embedding",
            "vision_model.position_embedding": _E + "position_embedding",
            "vision_model.conv1.weight": _E + "patch_embedding.weight",
            "vision_model.conv1.bias": _E + "patch_embedding.bias",
        }
    ),
    together(
        {
            _P + "linear_fc1.layer_norm_weight": "mlp1.0.weight",
            _P + "linear_fc1.layer_norm_bias": "mlp1.0.bias",
            _P + "linear_fc1.weight": "mlp1.1.weight",
            _P + "linear_fc1.bias": "mlp1.1.bias",
            _P + "linear_fc2.weight": "mlp1.3.weight",
            _P + "linear_fc2.bias": "mlp1.3.bias",
        }
    ),
    *blocks(_V),
    *both(B + "mlp.linear_fc1", _V + "mlp.fc1"),
    *both(B + "mlp.linear_fc2", _V + "mlp.fc2"),
    *(rule(B + name, _V + name, copy) for name in ("ls1", "ls2")),
)

FAMILIES = (
    Family(
        name="internvl",
        model_types=("internvl",),
        rules=(*language(MOE, *WITHIN), *kept(BESIDE)),
        untrained=tuple(f"{n}.{{rest}}" for n in BESIDE),
    ),
    Family(
        name="internvl_chat",
        model_types=("internvl_chat",),
        rules=(
            *language(MOE, *WITHIN),
            *_INTERN_VIT,
            *kept({"vision_model": "vision_model", "mlp1": "mlp1"}),
        ),
        untrained=("vision_model.{rest}", "mlp1.{rest}"),
    ),
)
