"""Qwen3-VL, dense and with experts: Qwen3 beside a vision tower of Megatron's own modules.

The experts are one tensor a layer, ``[E, H, 2I]`` and ``[E, I, H]`` as in the released files.
"""

from __future__ import annotations

from streamconv.families import ops, vision
from streamconv.families.blocks import DENSE, ROUTER, D, L
from streamconv.families.rules import Family, prefixed, renamed, rule

_BLOCK = "model.visual.blocks.{layer}."
_MERGERS = {
    "vision_model.merger.": "model.visual.merger.",
    "vision_model.decoder.deepstack_merger_list.{merger}.": (
        "model.visual.deepstack_merger_list.{merger}."
    ),
}

TOWER = (
    *vision.both("vision_model.patch_embed.proj", "model.visual.patch_embed.proj"),
    rule("vision_model.pos_embed.weight", "model.visual.pos_embed.weight", ops.copy),
    *vision.blocks(_BLOCK),
    *vision.both(vision.B + "mlp.linear_fc1", _BLOCK + "mlp.linear_fc1"),
    *vision.both(vision.B + "mlp.linear_fc2", _BLOCK + "mlp.linear_fc2"),
    *(
        r
        for source, target in _MERGERS.items()
        for r in (
            *vision.both(source + "patch_norm", target + "norm"),
            *vision.both(source + "linear_fc1", target + "linear_fc1"),
            *vision.both(source + "linear_fc2", target + "linear_fc2"),
        )
    ),
)

_EXPERTS = (
    rule(
        D + "mlp.experts.experts.linear_fc1.weight",
        L + "mlp.experts.gate_up_proj",
        ops.expert_columns,
    ),
    rule(
        D + "mlp.experts.experts.linear_fc2.weight",
        L + "mlp.experts.down_proj",
        ops.expert_columns,
    ),
)

FAMILIES = (
    Family(
        name="qwen3_vl",
        model_types=("qwen3_vl", "qwen3_vl_moe"),
        rules=(
            *prefixed(
                renamed((*DENSE, *ROUTER, *_EXPERTS), targets={"model.": "model.language_model."}),
                sources="language_model.",
            ),
            *TOWER,
            *vision.kept({"visual": "model.visual"}),  # ms-swift, slime
        ),
        untrained=("model.visual.{rest}",),
    ),
)
