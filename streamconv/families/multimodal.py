"""Language models of other families beside towers for pictures and sound that are HuggingFace's own.

Names before the language model differ between trainers and models, its tensors do not. A tower, or a
part that no trainer touches (what speaks in an omni model), may be absent: it is the released model's.
"""

from __future__ import annotations

from streamconv.families.blocks import DENSE, MOE, TOP
from streamconv.families.deepseek import KIMI_K2
from streamconv.families.glm import GLM4, GLM4_MOE
from streamconv.families.rules import Family, Rule, without_class
from streamconv.families.vision import kept, language

_VISUAL = {"visual": "model.visual", "vision_model": "model.visual"}
_WITHIN = ("language_model.model.", "language_model.lm_head.")
_PIXTRAL = {"vision_tower": "vision_tower", "multi_modal_projector": "multi_modal_projector"}
_THINKER = ("thinker.model.", "thinker.lm_head.")
_SENSES = {
    "thinker.visual": "thinker.visual",
    "thinker.audio_model": "thinker.audio_tower",
    "thinker.audio_tower": "thinker.audio_tower",
}


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
        rules=(*language(DENSE, *_WITHIN), *kept(_PIXTRAL)),
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
        name="internvl",
        model_types=("internvl",),
        rules=(*language(MOE, *_WITHIN), *kept(_PIXTRAL)),
        untrained=("vision_tower.{rest}", "multi_modal_projector.{rest}"),
    ),
    Family(
        name="internvl_chat",
        model_types=("internvl_chat",),
        rules=(
            *language(MOE, *_WITHIN),
            *kept({"vision_model": "vision_model", "mlp1": "mlp1"}),
        ),
        untrained=("vision_model.{rest}", "mlp1.{rest}"),
    ),
    Family(
        name="kimi_k25",
        model_types=("kimi_k25",),
        rules=(
            *language(KIMI_K2, *_WITHIN),
            *kept({"vision_tower": "vision_tower", "mm_projector": "mm_projector"}),
        ),
        reference=without_class,
        untrained=("vision_tower.{rest}", "mm_projector.{rest}"),
    ),
    Family(
        name="qwen2_audio",
        model_types=("qwen2_audio",),
        rules=(
            *language(DENSE, *_WITHIN),
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
