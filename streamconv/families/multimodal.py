"""Language models of other families beside towers for pictures and sound that are HuggingFace's own.

Names before the language model differ between trainers and models, its tensors do not. A tower, or a
part that no trainer touches (what speaks in an omni model), may be absent: it is the released model's.
"""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import DENSE, MOE, ROUTER, SHARED_EXPERTS, TOP, D, L
from streamconv.families.deepseek import KIMI_K2
from streamconv.families.glm import GLM4, GLM4_MOE
from streamconv.families.rules import Family, Rule, renamed, rule, without_class
from streamconv.families.vision import BESIDE, WITHIN, kept, language

_VISUAL = {"visual": "model.visual", "vision_model": "model.visual"}
_THINKER = ("thinker.model.", "thinker.lm_head.")
_SENSES = {
    "thinker.visual": "thinker.visual",
    "thinker.audio_model": "thinker.audio_tower",
    "thinker.audio_tower": "thinker.audio_tower",
}


# Layers with experts and without take turns; the experts' tensors are HuggingFace's transposed.
_LLAMA4 = (
    *(
        rule(
            f"{D}mlp.experts.experts.linear_{source}.weight",
            f"{L}feed_forward.experts.{target}",
            ops.expert_columns,
        )
        for source, target in (("fc1", "gate_up_proj"), ("fc2", "down_proj"))
    ),
    *renamed(
        (*DENSE, *ROUTER, *SHARED_EXPERTS),
        targets={
            ".mlp.gate.": ".feed_forward.router.",
            ".mlp.shared_experts.": ".feed_forward.shared_expert.",
            ".mlp.": ".feed_forward.",
        },
    ),
)


def _thinker(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Megatron-Bridge has the thinker in a module, ms-swift only its parts."""
    return (
        *language(rules, *_THINKER, below="thinker.language_model."),
        *language(rules, *_THINKER),
        *kept(_SENSES),
    )


def _alone(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The thinker without the rest, whose model type is one of its own."""
    bare = {k: v.removeprefix("thinker.") for k, v in _SENSES.items()}
    return (
        *language(rules, "model.", below="thinker.language_model."),
        *language(rules, "model."),
        *kept(bare),
    )


FAMILIES = (
    Family(
        name="mistral3",
        model_types=("mistral3",),
        rules=(*language(DENSE, *WITHIN), *kept(BESIDE)),
        untrained=("vision_tower.{rest}", "multi_modal_projector.{rest}"),
    ),
    Family(
        name="glm4v",
        model_types=("glm4v",),
        rules=(*language(GLM4, "model.language_model."), *kept(_VISUAL)),
        untrained=("model.visual.{rest}",),
    ),
    Family(
        name="glm4v_moe",
        model_types=("glm4v_moe",),
        rules=(*language((*TOP, *GLM4_MOE), "model.language_model."), *kept(_VISUAL)),
        untrained=("model.visual.{rest}",),
    ),
    Family(
        name="qwen2_vl",
        model_types=("qwen2_vl",),
        rules=(*language(DENSE, "model."), *kept({"visual": "visual"})),
        untrained=("visual.{rest}",),
    ),
    Family(
        name="kimi_k25",
        model_types=("kimi_k25",),
        rules=(
            *language(KIMI_K2, *WITHIN),
            *kept({"vision_tower": "vision_tower", "mm_projector": "mm_projector"}),
        ),
        reference=without_class,
        untrained=("vision_tower.{rest}", "mm_projector.{rest}"),
    ),
    Family(
        name="kimi_vl",
        model_types=("kimi_vl",),
        rules=(*language(KIMI_K2, *WITHIN), *kept(BESIDE)),
        untrained=tuple(f"{n}.{{rest}}" for n in BESIDE),
    ),
    Family(
        name="llama4",
        model_types=("llama4",),
        rules=(
            *language(_LLAMA4, *WITHIN),
            *kept({n: n for n in ("vision_model", "multi_modal_projector")}),
        ),
        untrained=("vision_model.{rest}", "multi_modal_projector.{rest}"),
    ),
    Family(
        name="qwen2_audio",
        model_types=("qwen2_audio",),
        rules=(
            *language(DENSE, *WITHIN),
            *kept({"audio_tower": "audio_tower", "multi_modal_projector": "multi_modal_projector"}),
        ),
        untrained=("audio_tower.{rest}", "multi_modal_projector.{rest}"),
    ),
    Family(
        name="qwen_omni",
        model_types=("qwen3_omni_moe", "qwen2_5_omni", "qwen3_asr"),
        rules=_thinker(MOE),
        untrained=(
            "talker.{rest}",
            "code2wav.{rest}",
            "token2wav.{rest}",
            "thinker.visual.{rest}",
            "thinker.audio_tower.{rest}",
        ),
    ),
    Family(
        name="qwen_omni_thinker",
        model_types=("qwen3_omni_moe_thinker", "qwen2_5_omni_thinker"),
        rules=_alone(MOE),
        untrained=("visual.{rest}", "audio_tower.{rest}"),
    ),
)
