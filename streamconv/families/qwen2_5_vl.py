"""Qwen2.5-VL: Qwen2 beside a vision tower with gated MLPs.

Megatron-Bridge keeps HuggingFace's tower (``visual.``), mbridge and verl build one of Megatron's
modules (``vision_model.``).
"""

from __future__ import annotations

from streamconv.families import ops, vision
from streamconv.families.blocks import DENSE
from streamconv.families.rules import Family, prefixed, rule

_BLOCK = "visual.blocks.{layer}."

_TOWER = (
    rule("vision_model.patch_embed.proj.weight", "visual.patch_embed.proj.weight", ops.copy),
    *vision.blocks(_BLOCK),
    *(
        rule(
            f"{vision.B}mlp.linear_fc1.{kind}",
            (f"{_BLOCK}mlp.gate_proj.{kind}", f"{_BLOCK}mlp.up_proj.{kind}"),
            ops.gate_up,
        )
        for kind in ("weight", "bias")
    ),
    *vision.both(vision.B + "mlp.linear_fc2", _BLOCK + "mlp.down_proj"),
    rule("vision_model.decoder.final_layernorm.weight", "visual.merger.ln_q.weight", ops.copy),
    *vision.both("vision_model.projection.encoder.linear_fc1", "visual.merger.mlp.0"),
    *vision.both("vision_model.projection.encoder.linear_fc2", "visual.merger.mlp.2"),
)

FAMILIES = (
    Family(
        name="qwen2_5_vl",
        model_types=("qwen2_5_vl",),
        rules=(
            *prefixed(DENSE, sources="language_model."),
            *vision.kept({"visual": "visual"}),
            *_TOWER,
        ),
        untrained=("visual.{rest}",),
    ),
)
