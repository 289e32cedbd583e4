"""Tiny models of many architectures: how to make them, and configs that describe them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from streamconv.tracing.hf import MetaModel, build_meta

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HEAD = {"head_dim": 8}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_hidden_layers": 4,
}
SHARED = {"shared_expert_intermediate_size": 20}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
VISUAL = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 14,
    "out_hidden_size": 32,
}
DEEP = VISUAL | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
IDS = {
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 58,
    "vision_end_token_id": 59,
}
SECTIONS = {"mrope_section": [1, 1, 2]}
MROPE = {"rope_scaling": {"type": "mrope", **SECTIONS}}

# id: (model class, config class, settings)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TINY),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TINY),
    "tied": ("Qwen2ForCausalLM", "Qwen2Config", TINY | {"tie_word_embeddings": True}),
    "critic": ("Qwen2ForTokenClassification", "Qwen2Config", TINY | {"num_labels": 1}),
    "classifier": ("Qwen3ForSequenceClassification", "Qwen3Config", TINY | HEAD),
    "body": ("Qwen2Model", "Qwen2Config", TINY),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", TINY | HEAD),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", TINY | MOE | SHARED),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", TINY | MOE | HEAD),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", TINY | {"num_local_experts": 4}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", TINY | ROUTED | LATENT),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", TINY | ROUTED | LATENT),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", TINY | ROUTED | HEAD),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", TINY | {"num_experts": 4}),
    "minimax_m2": (
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        TINY | HEAD | {"num_local_experts": 4, "rotary_dim": 8},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        TINY | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", TINY | HEAD | {"num_local_experts": 4}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", TINY | {"num_local_experts": 4}),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", TINY | {"num_local_experts": 4}),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        TINY | {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        TINY | HEAD | {"num_local_experts": 4, "intermediate_size_mlp": 48},
    ),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", TINY | HEAD),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", TINY | HEAD),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        TINY | MOE | HEAD | SHARED | LINEAR,
    ),
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", TINY | HEAD | LINEAR),
    "qwen3_5_vl": (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {
            "text_config": TINY | HEAD | LINEAR,
            "vision_config": VISUAL | {"num_position_embeddings": 16},
            **IDS,
        },
    ),
    "qwen3_5_moe_vl": (
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {
            "text_config": TINY | HEAD | LINEAR | MOE | SHARED,
            "vision_config": VISUAL | {"num_position_embeddings": 16},
            **IDS,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": TINY | MROPE,
            "vision_config": VISUAL | {"fullatt_block_indexes": [1]},
            **IDS,
        },
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {"text_config": TINY | HEAD, "vision_config": DEEP, **IDS},
    ),
    "qwen2_5_omni_thinker": (
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "Qwen2_5OmniThinkerConfig",
        {
            "text_config": TINY | {"rope_scaling": {"rope_type": "default", **SECTIONS}},
            "vision_config": VISUAL,
            "audio_config": {
                "d_model": 32,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "encoder_layers": 2,
                "max_source_positions": 64,
                "num_mel_bins": 16,
                "output_dim": 32,
            },
        },
    ),
    # Rows beyond the vocabulary are stored, and not held.
    "inkling2_text": (
        "Inkling2ForCausalLM",
        "Inkling2TextConfig",
        TINY
        | HEAD
        | {
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["hybrid_sliding", "hybrid"],
            "swa_head_dim": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "d_rel": 8,
            "unpadded_vocab_size": 61,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": TINY | HEAD | {"model_type": "mistral"},
            "vision_config": TOWER | HEAD | {"model_type": "pixtral"},
            "image_token_index": 60,
        },
    ),
}
GEMMA3_VL = (
    "Gemma3ForConditionalGeneration",
    "Gemma3Config",
    {
        "text_config": TINY | HEAD | {"model_type": "gemma3_text"},
        "vision_config": TOWER | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
    },
)
QWEN3_VL_MOE = (
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3VLMoeConfig",
    {"text_config": TINY | MOE | HEAD, "vision_config": DEEP, **IDS},
)


def make(spec: tuple[str, str, dict[str, Any]]) -> Any:
    """Return a real tiny model of random weights."""
    model_class, config_class, settings = spec
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    model = getattr(transformers, model_class)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def dense(**changes: Any) -> dict[str, Any]:
    return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **TINY, **changes}


def sparse(**changes: Any) -> dict[str, Any]:
    base = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    return {**base, **TINY, **MOE, **HEAD, **changes}


def meta_of(config: Mapping[str, Any], state: Mapping[str, Any] = {}) -> MetaModel:
    meta = build_meta(config, state)
    assert meta is not None
    return meta
