"""A tiny model of every model type that transformers has, by making its default config small.

Sizes are recognised by what configs call them; what a type needs beyond that stands in
:data:`SETTINGS`. A model counts as small when it is built on the meta device and its parameters are
counted, so that a size which was not recognised fills no memory.
"""

from __future__ import annotations

import copy
import importlib
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

LAYERS = 2
VOCABULARY = 320
_MOST_PARAMETERS = 30_000_000

TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image and text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "any to text": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "sequence to sequence": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech to text": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "sequence classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "audio classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
"""What a model is for, and the library's table of such classes."""

# The first pattern that matches a key decides. Numbers only; a list takes the value in each place.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(\w+_)?(vocab_size|n_vocab|vocab_size_per_layer_input)", VOCABULARY),
    (r".*(num|n)_(key_value|kv)_heads|multi_query_group_num|num_kv_heads|kv_n_heads", 2),
    (r".*(attention_heads|num_heads|n_heads|n_head|num_head|heads|linear_num_value_heads)", 4),
    (r"linear_num_key_heads", 2),
    (r"(qk_rope_head_dim|qk_nope_head_dim|qk_pos_emb_head_dim)", 8),
    (r"(q_lora_rank|kv_lora_rank|.*lora_rank|.*_rank|.*low_rank.*|lora_r)", 16),
    (
        r".*(head_dim|attention_head_dim|kv_channels|d_kv|head_size|d_head|qk_head_dim|v_head_dim)",
        16,
    ),
    (r"rotary_dim|partial_rotary_dim", 8),
    (r"(num_experts_per_tok|moe_k|moe_topk|top_k|num_selected_experts|num_experts_per_token)", 2),
    (r"(n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|n_shared_experts)", 1),
    (r"(num|n|moe_num)_(\w+_)?experts|num_local_experts|moe_num_experts|num_experts", 4),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    (r"(num_nextn_predict_layers|mtp_\w+|num_mtp\w*)", 0),
    (r"(moe_intermediate_size|expert_ffn_hidden_size|\w*expert_intermediate_size|expert_dim)", 32),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|mlp_dim|d_inner|ffn_size)\w*", 96),
    (r"(hidden_sizes|embed_dims|encoder_hidden_size|decoder_hidden_size)", 64),
    (
        r".*(hidden_size|d_model|n_embd|embed_dim|hidden_dim|model_dim|projection_dim|output_dim)",
        64,
    ),
    (r"(embedding_size|emb_dim|dim|lm_hidden_size|token_embedding_size|word_embed_proj_dim)", 64),
    (r"(\w+_)?(num_\w*layers|n_layers?|layers|depth|num_blocks|depths|layer_num)", LAYERS),
    (r"(state_size|mamba_d_state|ssm_state_size|d_state)", 8),
    (r"(mamba_chunk_size|chunk_size)", 8),
    (r"(mamba_n_heads|mamba_num_heads)", 8),
    (r"(image_size|img_size|input_size)", 28),
    (r"patch_size", 14),
    (
        r"(n_positions|max_position_embeddings|max_\w+_positions|max_sequence_length|seq_length)",
        128,
    ),
)
_COMPILED = tuple((re.compile(pattern), value) for pattern, value in _SIZES)
_TOKEN = re.compile(r"\w*(token_id|token_index|token_ids|_idx|_id)", re.ASCII)

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BOTH = ["sliding_attention", "full_attention"]
_SLIDING_AND_FULL = {"layer_types": _BOTH, "rope_parameters": dict.fromkeys(_BOTH, _ROPE)}

SETTINGS: dict[str, dict[str, Any]] = {
    "bros": {
        "dim_bbox_sinusoid_emb_2d": 16,
        "dim_bbox_sinusoid_emb_1d": 2,
        "dim_bbox_projection": 16,
    },
    "chameleon": {"vocabulary_map": {"<image>": 60}},
    "cohere_compass": {"text_config": _SLIDING_AND_FULL},
    "cohere_compass_text": _SLIDING_AND_FULL,
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "donut-swin": {"num_heads": [4, 4, 4, 4]},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}, "head_dim": 16}
    },
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "fuyu": {"hidden_size": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hy_v4_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}},
    "levit": {
        "key_dim": [16, 16, 16],
        "down_ops": [["Subsample", 16, 4, 4, 2, 2], ["Subsample", 16, 4, 4, 2, 2]],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mobilebert": {"intra_bottleneck_size": 64, "true_hidden_size": 64},
    "phi4_multimodal": {"audio_config": {"nemo_final_size": 4}},
    # Experts that are not square: transformers 5 tells whether to transpose them by their shape.
    "qwen3_vl_moe": {"text_config": {"moe_intermediate_size": 40}},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16]},
    "swin": {"num_heads": [4, 4, 4, 4]},
    "xlstm": {"embedding_dim": 64},
    # As wide as version 4 makes them in any case.
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "hybrid_layer_ids": [1]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
}
"""What is set in a type's config after it has been made small; nested as the config is."""


_VARIANTS: tuple[Mapping[str, Any], ...] = (
    {},
    {"kv": 4},
    {"head_dim": None},
    {"kv": 4, "head_dim": None},
    {"head_dim": 16},
    {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_d_ssm": 128},
    {"num_heads": 8, "head_dim": 16, "conv_dim": 64},
    {"out_features": ["stage1"], "out_indices": None},
    {"per_layer_config": None, "head_dim": 16},
    {"num_key_value_heads": 4, "shared_expert_intermediate_size": 32},
)
"""What else is tried where sizes do not go together: values for keys wherever they stand."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A class of transformers, and the model type whose config it takes."""

    model_type: str
    name: str
    task: str


class NotSmallError(Exception):
    """A config that could not be made small, or whose class cannot be built of it."""


def architectures() -> list[Architecture]:
    """Return every class of :data:`TASKS` once, with the model type that is its own."""
    found: dict[str, Architecture] = {}
    for task, table in TASKS.items():
        for model_type, names in getattr(modeling_auto, table).items():
            for name in names if isinstance(names, tuple | list) else (names,):
                known = found.get(name)
                if model_type not in CONFIG_MAPPING_NAMES:
                    continue
                if known is None or (
                    _is_home(model_type, name) and not _is_home(known.model_type, name)
                ):
                    found[name] = Architecture(model_type, name, known.task if known else task)
    return sorted(found.values(), key=lambda a: (a.model_type, a.name))


def _is_home(model_type: str, name: str) -> bool:
    """Whether a class comes from the package of a model type; others borrow it."""
    module: str = transformers._class_to_module.get(name, "")
    return module.split(".")[1:2] == [model_type_to_module_name(model_type)]


def build(
    architecture: Architecture, change: Callable[[Any], None] = lambda _: None
) -> PreTrainedModel:
    """Return a small model of float32 numbers that are different everywhere.

    ``change`` may write other settings into the dict of the config before the model is made.
    """
    module = model_type_to_module_name(architecture.model_type)
    package = importlib.import_module(f"transformers.models.{module}")
    config_class = getattr(package, CONFIG_MAPPING_NAMES[architecture.model_type])
    model_class = getattr(package, architecture.name, None)
    if model_class is None:
        model_class = getattr(importlib.import_module("transformers"), architecture.name)
    reasons: dict[str, None] = {}
    for variant in _VARIANTS:
        try:
            return _build(architecture, config_class, model_class, variant, change)
        except Exception as error:  # noqa: BLE001 - whatever a class says of a config
            words = " ".join(str(error).split())[:200]
            reasons[f"{type(error).__name__}: {words}"] = None
    raise NotSmallError(next(iter(reasons)))


def _build(
    architecture: Architecture,
    config_class: Any,
    model_class: Any,
    variant: Mapping[str, Any],
    change: Callable[[Any], None],
) -> PreTrainedModel:
    settings = small(config_class().to_dict(), variant)
    _merge(settings, SETTINGS.get(architecture.model_type, {}))
    change(settings)
    for key in ("model_type", "transformers_version", "architectures", "dtype"):
        settings.pop(key, None)

    def config() -> Any:
        made = config_class(**copy.deepcopy(settings))
        if not isinstance(made, model_class.config_class):
            nested = [c for c in vars(made).values() if isinstance(c, model_class.config_class)]
            made = nested[0]
        made.architectures = [architecture.name]
        return made

    with torch.device("meta"), no_init_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        meta = model_class(config())
    amount = sum(p.numel() for p in meta.parameters())
    if amount > _MOST_PARAMETERS:
        raise NotSmallError(f"{amount:,} parameters")
    model = model_class(config()).float().eval()
    model.config.dtype = torch.float32
    fill(model)
    return model


def small(config: Any, variant: Mapping[str, Any] = {}) -> Any:
    """Return a default config, as a dict, with its sizes made small."""
    config = {str(k): v for k, v in config.items()}
    depths = {v for k, v in config.items() if type(v) is int and ("layers" in k or k == "depth")}
    made: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key not in ("rope_parameters", "rope_scaling"):
            made[key] = small(value, variant)
        elif isinstance(value, list) and len(value) > LAYERS and len(value) in depths:
            made[key] = _few(value)
        elif isinstance(value, list) and value and all(type(v) is int for v in value):
            size = _size(key, value[0], variant)
            made[key] = value if size is None else [size for _ in value]
        elif type(value) is int and value > 0:
            size = _size(key, value, variant)
            if size is None and value >= VOCABULARY and _TOKEN.fullmatch(key):
                size = 10 + zlib.crc32(key.encode()) % (VOCABULARY - 20)
            made[key] = value if size is None else size
        else:
            made[key] = value
        if key in variant:
            made[key] = variant[key]
    return {k: v for k, v in made.items() if k not in variant or v is not None}


def _size(key: str, value: int, variant: Mapping[str, Any]) -> int | None:
    for pattern, size in _COMPILED:
        if pattern.fullmatch(key):
            if size == 2 and "heads" in pattern.pattern and "kv" in variant:
                size = variant["kv"]
            return min(size, value) if value else value
    return None


def _few(values: list[Any]) -> list[Any]:
    """Return as many entries as there are layers, of as many kinds as can be."""
    kinds = list({repr(v): v for v in values}.values())[:LAYERS]
    return sorted([*kinds, *values[: LAYERS - len(kinds)]], key=values.index)


def _merge(config: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _merge(config[key], value)
        else:
            config[key] = value


def fill(model: torch.nn.Module) -> None:
    """Give every parameter and every stored buffer of fractions values of its own."""
    # What is not saved is computed, and has to stay what it is.
    stored = set(model.state_dict()) - set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    with torch.no_grad():
        for name, tensor in _tensors(model):
            if name in stored and tensor.is_floating_point():
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                scale = 1 / math.sqrt(max(tensor.shape[-1] if tensor.dim() else 1, 1))
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
