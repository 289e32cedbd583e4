"""Tiny models of real transformers architectures, filled with values that betray a mistake.

The shapes are chosen to shard unevenly: 509 rows of the embedding divide by no world size, 90
rows of an MLP leave a short last piece, 28 rows of a key projection over 8 ranks and 6 experts
over 4 leave the last ranks empty.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 509
EXPERTS = 6

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 56,
    "intermediate_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)

DEEPSEEK_V3: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 22,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}

MROPE = {"type": "mrope", "mrope_section": [2, 2, 3]}
VISION_IDS = {
    "image_token_id": 505,
    "video_token_id": 506,
    "vision_start_token_id": 503,
    "vision_end_token_id": 504,
}
VISUAL: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 56,
    "intermediate_size": 90,
    "num_heads": 4,
    "patch_size": 14,
    "out_hidden_size": 56,
}

# architecture name → (config class, model class, settings beside COMMON)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dense": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "tied": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    # The config says tied, the trainer broke the tie: both weights must survive.
    "tied_differs": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "critic": ("Qwen2Config", "Qwen2ForTokenClassification", {"num_labels": 1}),
    "value_head": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"head_dim": 14}),
    "moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 14,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 22,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 22,
            "shared_expert_intermediate_size": 30,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 14},
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", DEEPSEEK_V3),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 14},
    ),
    "qwen2_vl": (
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**COMMON, "rope_scaling": MROPE},
            "vision_config": {"depth": 2, "embed_dim": 56, "hidden_size": 56, "num_heads": 4},
            **VISION_IDS,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**COMMON, "rope_scaling": MROPE},
            "vision_config": {**VISUAL, "fullatt_block_indexes": [1]},
            **VISION_IDS,
        },
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**COMMON, "head_dim": 14},
            "vision_config": {
                **VISUAL,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            **VISION_IDS,
        },
    ),
    "internvl": (
        "InternVLConfig",
        "InternVLForConditionalGeneration",
        {
            "text_config": {**COMMON, "model_type": "qwen2"},
            "vision_config": {
                "hidden_size": 56,
                "intermediate_size": 90,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": [28, 28],
                "patch_size": [14, 14],
            },
            "image_token_id": 505,
        },
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 56, "n_layer": 2, "n_head": 4}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 14, "tie_word_embeddings": True},
    ),
}

Buffers = dict[str, Callable[[], torch.Tensor]]

ODD_BUFFERS: Buffers = {
    "odd_int8": lambda: torch.arange(-5, 6, dtype=torch.int8),
    "odd_int64": lambda: torch.arange(7, dtype=torch.int64) << 40,
    "odd_bool": lambda: torch.tensor([True, False, True, True, False]),
    "odd_float8": lambda: torch.linspace(-4, 4, 8).to(torch.float8_e4m3fn),
    "odd_complex64": lambda: torch.complex(torch.arange(3.0), -torch.arange(3.0)),
    # One value, as in verl#7610: concatenating replicas turned (1,) into (8,).
    "odd_one": lambda: torch.tensor([0.5]),
    "odd_scalar": lambda: torch.tensor(-1.5),
    "odd_empty": lambda: torch.empty(0, 3),
}
COMPLEX128_BUFFERS: Buffers = {
    "odd_complex128": lambda: torch.complex(torch.arange(3.0).double(), torch.ones(3).double()),
}


def config(arch: str, **overrides: Any) -> PreTrainedConfig:
    """The architecture's config; ``overrides`` replace single settings."""
    config_class, _, settings = ARCHITECTURES[arch]
    common = {} if "text_config" in settings else COMMON
    made = getattr(transformers, config_class)(**{**common, **settings, **overrides})
    assert isinstance(made, PreTrainedConfig)
    return made


def build(arch: str, *, dtype: str = "float32", buffers: Buffers | None = None) -> PreTrainedModel:
    """The model with deterministic values, in evaluation mode.

    ``dtype`` is a torch dtype name, or ``mixed``: bf16 weights, fp32 norms and fp16 biases.
    ``buffers`` are registered on the inner model as persistent buffers.
    """
    _, model_class, _ = ARCHITECTURES[arch]
    model = getattr(transformers, model_class)(config(arch))
    assert isinstance(model, PreTrainedModel)
    model.config.architectures = [model_class]  # a config loaded from the Hub has it
    if arch == "value_head":
        model.v_head = ValueHead(model.config.hidden_size)
    if arch == "tied_differs":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    if dtype == "mixed":
        model.to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.float()
            elif name.endswith("bias"):
                parameter.data = parameter.data.half()
        model.config.dtype = torch.bfloat16
    else:
        model.to(getattr(torch, dtype))
        model.config.dtype = getattr(torch, dtype)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.data = buffer.data.float()  # transformers keeps it so when it loads
    for name, make in (buffers or {}).items():
        model.base_model.register_buffer(name, make())
    fill(model)
    return model.eval()


class ValueHead(nn.Module):
    """The head that trl's AutoModelForCausalLMWithValueHead adds: ``v_head.summary``."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)


def fill(model: nn.Module) -> None:
    """Give every parameter values of its own, whatever the order of the parameters.

    A fresh model has norms of ones and biases of zeros, which hide swapped or shifted pieces.
    Buffers that the model itself brings (the router bias of DeepSeek) are filled as well.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values(name, parameter.shape, parameter.dtype))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(values(name, buffer.shape, buffer.dtype))


def values(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Normal values seeded by ``name``, the first of them −0.0, denormals and tiny ones.

    No extremes: a cast to a narrower dtype turns them into infinities, a case of its own.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    flat = torch.randn(math.prod(shape), generator=generator).to(dtype)
    info = torch.finfo(dtype)
    special = torch.tensor(
        [-0.0, info.smallest_normal / 4, -info.smallest_normal / 8, info.tiny],
        dtype=torch.float64,
    ).to(dtype)
    flat[: special.numel()] = special[: flat.numel()]
    return flat.reshape(shape)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB entries with special tokens and a chat template."""
    bpe = Tokenizer(tokenizer_models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["A rank file is what one rank wrote."] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )
