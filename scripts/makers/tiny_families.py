"""Tiny HuggingFace models of every family that Megatron trains, as ``save_pretrained`` writes them.

``make(name)`` gives the config and the state dict under the names of the *files*: of transformers'
own classes where it has them, by hand where it has not (kimi_k2, mimo, multi-token prediction,
which transformers leaves out of every model). Sizes are chosen so that a mixed-up axis shows:
six heads in two groups, heads of another width than hidden / heads, 61 words, 5 experts.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from scripts.makers.models import values

State = dict[str, torch.Tensor]

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
TIED = {"tie_word_embeddings": True}
HEAD = {"head_dim": 12}
MOE = {"moe_intermediate_size": 14, "num_experts": 5, "num_experts_per_tok": 2}
LOCAL_MOE = {"num_local_experts": 5, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 18}
ROUTED = {
    "moe_intermediate_size": 14,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": 22,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
INDEXED = {"index_n_heads": 3, "index_head_dim": 8, "index_topk": 4}
LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "ssm_state_size": 4,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 8,
}
IDS = {
    "image_token_id": 57,
    "video_token_id": 58,
    "vision_start_token_id": 59,
    "vision_end_token_id": 60,
}
VISUAL = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_heads": 4,
    "patch_size": 2,
    "out_hidden_size": 48,
}
DEEP = VISUAL | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16, "depth": 3}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 2,
    "vision_use_head": False,
}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "image_size": 16,
    "patch_size": 4,
}
INTERN = {
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": [8, 8],
    "patch_size": [2, 2],
}
AUDIO = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 36,
    "num_mel_bins": 8,
    "output_dim": 48,
    "downsample_hidden_size": 16,
    "max_source_positions": 20,
}
LLAMA4_TEXT = {
    "num_hidden_layers": 4,
    "intermediate_size": 14,
    "intermediate_size_mlp": 20,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 4,
}
LLAMA4_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 24,
    "projector_output_dim": 24,
    "vision_output_dim": 24,
}
ROPE_SECTIONS = {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}


def vision_language(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    return {"text_config": text, "vision_config": vision, **IDS, **tied}


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model: transformers' class and config class, the settings, and what is added by hand."""

    model_class: str
    config_class: str
    settings: dict[str, Any]
    by_hand: Callable[[State, dict[str, Any]], None] | None = None
    """Changes state dict and config.json as the family's release has them."""
    extra: tuple[str, ...] = ()
    """Patterns of tensors that transformers itself does not load."""
    loads: bool = True
    """Whether transformers has the model type."""


@dataclass(frozen=True, slots=True)
class TinyModel:
    """What ``make`` returns; ``state`` has the names, shapes and dtypes of the files."""

    name: str
    config: dict[str, Any]
    state: State = field(repr=False)
    tiny: Tiny = field(repr=False)


def prediction_of_deepseek(state: State, config: dict[str, Any]) -> None:
    """Turn the last layer into the multi-token prediction layer of DeepSeek's releases."""
    last = config["num_hidden_layers"] - 1
    hidden = config["hidden_size"]
    prefix = f"model.layers.{last}."
    for name, shape in {
        "enorm.weight": (hidden,),
        "hnorm.weight": (hidden,),
        "eh_proj.weight": (hidden, 2 * hidden),
        "shared_head.norm.weight": (hidden,),
    }.items():
        add(state, prefix + name, shape)
    # The releases repeat what the layer shares with the model.
    state[prefix + "embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
    state[prefix + "shared_head.head.weight"] = state["lm_head.weight"].clone()
    config["num_hidden_layers"] = last
    config["num_nextn_predict_layers"] = 1
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:last]
    if "mlp_layer_types" in config:
        config["mlp_layer_types"] = config["mlp_layer_types"][:last]


def head_alone(state: State, config: dict[str, Any]) -> None:
    """Make it a critic of verl: a head without bias, and the config of the actor."""
    del state["score.bias"]
    config["architectures"] = ["Qwen3ForCausalLM"]
    for name in ("num_labels", "id2label", "label2id"):
        config.pop(name, None)


def prediction_of_hy_v3(state: State, config: dict[str, Any]) -> None:
    """The same in Hunyuan 3, which repeats nothing."""
    prediction_of_deepseek(state, config)
    prefix = f"model.layers.{config['num_hidden_layers']}."
    state[prefix + "final_layernorm.weight"] = state.pop(prefix + "shared_head.norm.weight")
    del state[prefix + "embed_tokens.weight"], state[prefix + "shared_head.head.weight"]


def deepseek_v1(state: State, config: dict[str, Any]) -> None:
    """DeepSeek's first model with experts, whose class is on the Hub only: no bias of experts."""
    for name in [n for n in state if n.endswith("e_score_correction_bias")]:
        del state[name]
    config["model_type"] = "deepseek"
    config["architectures"] = ["DeepseekForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"}


def internlm3(state: State, config: dict[str, Any]) -> None:
    del state
    config["model_type"] = "internlm3"
    config["architectures"] = ["InternLM3ForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"}
    config["qkv_bias"], config["bias"] = config.pop("attention_bias"), config.pop("mlp_bias")


def prediction_of_nemotron_h(state: State, config: dict[str, Any]) -> None:
    """Add two predictions, each of a layer with attention and one with experts."""
    kinds = config["layers_block_type"]
    hidden = config["hidden_size"]
    for number in range(4):
        like = kinds.index(("full_attention", "moe")[number % 2])
        for name in [n for n in state if n.startswith(f"backbone.layers.{like}.")]:
            rest = name.removeprefix(f"backbone.layers.{like}.")
            add(state, f"mtp.layers.{number}.{rest}", tuple(state[name].shape))
        around = {"enorm": (hidden,), "hnorm": (hidden,), "eh_proj": (hidden, 2 * hidden)}
        for name, shape in (around if number % 2 == 0 else {"final_layernorm": (hidden,)}).items():
            add(state, f"mtp.layers.{number}.{name}.weight", shape)
    config["num_nextn_predict_layers"] = 2
    config["mtp_layers_block_type"] = ["full_attention", "moe"]


def kimi_k25(state: State, config: dict[str, Any]) -> None:
    """Make it Kimi-K2.5 as released; what transformers 5.24 saves of it has names of no release."""
    names = {"model.layers.": "language_model.model.layers.", "lm_head.": "language_model.lm_head."}
    names |= {x: f"language_model.{x}" for x in ("model.embed_tokens.", "model.norm.")}
    for name in list(state):
        old = next(x for x in names if name.startswith(x))
        state[names[old] + name.removeprefix(old)] = state.pop(name)
    for block in range(2):
        prefix = f"vision_tower.encoder.blocks.{block}."
        for name, shape in {"norm0": (8,), "wqkv": (24, 8), "wo": (8, 8)}.items():
            add(state, f"{prefix}{name}.weight", shape)
            add(state, f"{prefix}{name}.bias", shape[:1])
    add(state, "vision_tower.patch_embed.pos_emb.weight", (4, 4, 8))
    add(state, "mm_projector.proj.0.weight", (32, 32))
    text = dict(config)
    config.clear()
    config.update(model_type="kimi_k25", text_config=text, vision_config={"patch_size": 2})
    config["architectures"] = ["KimiK25ForConditionalGeneration"]


def internvl_chat(state: State, config: dict[str, Any]) -> None:
    """Make it an InternVL of the remote code's: the language model whole, a tower, an MLP."""
    for name in list(state):
        state["language_model." + name] = state.pop(name)
    for layer in range(2):
        prefix = f"vision_model.encoder.layers.{layer}."
        for name, rows, columns in INTERN_VIT:
            add(state, f"{prefix}{name}.weight", (rows, columns)[: 2 if columns else 1])
            add(state, f"{prefix}{name}.bias", (rows,))
        for name in ("ls1", "ls2"):
            add(state, prefix + name, (8,))
    for name, shape in {
        "vision_model.embeddings.class_embedding": (1, 1, 8),
        "vision_model.embeddings.position_embedding": (1, 5, 8),
        "vision_model.embeddings.patch_embedding.weight": (8, 3, 2, 2),
        "vision_model.embeddings.patch_embedding.bias": (8,),
        "mlp1.0.weight": (32,),
        "mlp1.0.bias": (32,),
        "mlp1.1.weight": (48, 32),
        "mlp1.1.bias": (48,),
        "mlp1.3.weight": (48, 48),
        "mlp1.3.bias": (48,),
    }.items():
        add(state, name, shape)
    text = dict(config)
    config.clear()
    tower = {"patch_size": 2, "num_attention_heads": 4, "num_hidden_layers": 2}
    config.update(model_type="internvl_chat", llm_config=text, vision_config=tower)
    config["architectures"] = ["InternVLChatModel"]
    config["auto_map"] = {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}


INTERN_VIT = (
    ("attn.qkv", 24, 8),
    ("attn.proj", 8, 8),
    ("norm1", 8, 0),
    ("norm2", 8, 0),
    ("mlp.fc1", 20, 8),
    ("mlp.fc2", 8, 20),
)
"""Modules of a layer, with rows and columns."""


def kimi_vl(state: State, config: dict[str, Any]) -> None:
    """Make it Kimi-VL as released, whose projector has another name than Kimi-K2.5's."""
    kimi_k25(state, config)
    for name in [n for n in state if n.startswith("mm_projector.")]:
        state["multi_modal_projector" + name.removeprefix("mm_projector")] = state.pop(name)
    config.update(model_type="kimi_vl", architectures=["KimiVLForConditionalGeneration"])


def bailing(state: State, config: dict[str, Any]) -> None:
    """Make it a Ling of the remote code's: queries, keys and values in one tensor."""
    prediction_of_hy_v3(state, config)
    names = {
        "model.embed_tokens.": "model.word_embeddings.",
        ".self_attn.o_proj.": ".attention.dense.",
        ".self_attn.q_norm.": ".attention.query_layernorm.",
        ".self_attn.k_norm.": ".attention.key_layernorm.",
        "gate.e_score_correction_bias": "gate.expert_bias",
    }
    for name in list(state):
        if name.endswith(".q_proj.weight"):
            both = [state.pop(name.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
            fused = name.replace(".self_attn.q_proj.", ".attention.query_key_value.")
            state[fused] = torch.cat(both)
            continue
        old = next((x for x in names if x in name), None)
        if old is not None:
            state[name.replace(old, names[old])] = state.pop(name)
    config["model_type"] = "bailing_moe"
    config["architectures"] = ["BailingMoeV2ForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_bailing_moe_v2.X"}


def prediction_of_step(state: State, config: dict[str, Any]) -> None:
    """Turn the last layer into the prediction layer of Step's releases, which has a dense MLP."""
    text = config["text_config"]
    last, hidden, wide = (
        text["num_hidden_layers"] - 1,
        text["hidden_size"],
        text["intermediate_size"],
    )
    prefix = f"model.layers.{last}."
    for name in [n for n in state if n.startswith((prefix + "moe.", prefix + "share_expert."))]:
        del state[name]
    for name, shape in {
        "enorm": (hidden,),
        "hnorm": (hidden,),
        "eh_proj": (hidden, 2 * hidden),
        "transformer.shared_head.norm": (hidden,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }.items():
        add(state, f"{prefix}{name}.weight", shape)
    head = prefix + "transformer.shared_head.output.weight"
    state[head] = state["lm_head.weight"].clone()
    text["num_hidden_layers"], text["num_nextn_predict_layers"] = last, 1
    for name in ("layer_types", "mlp_layer_types"):
        text["mtp_" + name] = text[name][last:]
        text[name] = text[name][:last]
    del text["per_layer_config"][str(last)]


def step_alone(state: State, config: dict[str, Any]) -> None:
    """Make it Step-3.5, the language model alone, with the settings of its release's config.json."""
    for name in [n for n in state if n.startswith(("vision_model.", "vit_large_projector."))]:
        del state[name]
    text = dict(config["text_config"])
    config.clear()
    for name in ("per_layer_config", "mlp_layer_types", "mtp_layer_types", "mtp_mlp_layer_types"):
        del text[name]
    text |= {
        "moe_num_experts": text.pop("n_routed_experts"),
        "moe_top_k": text.pop("num_experts_per_tok"),
        "num_attention_groups": text.pop("num_key_value_heads"),
        "attention_other_setting": {"num_attention_heads": text.pop("num_sliding_attention_heads")},
        "moe_layers_enum": "1,2,3",
        "architectures": ["Step3p5ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_step3p5.Step3p5ForCausalLM"},
    }
    config.update(text)


def bailing_hybrid(state: State, config: dict[str, Any]) -> None:
    """Make it a Ling 2.5 of the remote code's: every second layer has latent attention."""
    prediction_of_hy_v3(state, config)
    for name in list(state):
        new = name.replace("model.embed_tokens.", "model.word_embeddings.")
        new = new.replace(".self_attn.", ".attention.").replace(".o_proj.", ".dense.")
        state[new.replace("gate.e_score_correction_bias", "gate.expert_bias")] = state.pop(name)
    for layer in (0, 2, 4):
        prefix = f"model.layers.{layer}.attention."
        for name in [n for n in state if n.startswith(prefix)]:
            del state[name]
        for name, shape in {
            "query_key_value": ((6 + 2 * 2) * 12, 48),
            "query_layernorm": (12,),
            "key_layernorm": (12,),
            "g_proj": (72, 48),
            "g_norm": (72,),
            "dense": (48, 72),
        }.items():
            add(state, f"{prefix}{name}.weight", shape)
    config.update(
        model_type="bailing_hybrid",
        architectures=["BailingMoeV2_5ForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_bailing_moe_v2_5.X"},
        num_key_value_heads=2,
        head_dim=12,
        layer_group_size=2,
        group_norm_size=4,
    )


def minimax_m3(state: State, config: dict[str, Any]) -> None:
    """Make it MiniMax-M3 as released: a language model with shared experts, an indexer, a tower."""
    for name in list(state):
        tensor = state.pop(name)
        if name.endswith("_norm.weight") and ".self_attn." in name:
            tensor = tensor[:12].clone()  # of one head
        state["language_model." + name] = tensor
    for layer in range(3):
        prefix = f"language_model.model.layers.{layer}."
        for name, shape in {
            "gate_proj": (14, 48),
            "up_proj": (14, 48),
            "down_proj": (48, 14),
        }.items():
            add(state, f"{prefix}block_sparse_moe.shared_experts.{name}.weight", shape)
        if layer:
            for name, shape in {"q_proj": (16, 48), "k_proj": (8, 48)}.items():
                add(state, f"{prefix}self_attn.index_{name}.weight", shape)
                add(state, f"{prefix}self_attn.index_{name.replace('proj', 'norm')}.weight", (8,))
    for layer in range(2):
        for name, shape in {"weight": (8, 8), "bias": (8,)}.items():
            add(state, f"vision_tower.encoder.layers.{layer}.fc.{name}", shape)
    add(state, "multi_modal_projector.linear.weight", (8, 8))
    text = dict(config)
    config.clear()
    config.update(model_type="minimax_m3_vl", text_config=text, vision_config={"patch_size": 2})
    config["architectures"] = ["MiniMaxM3SparseForConditionalGeneration"]


def deepseek_v4() -> State:
    """Return a model under the names of DeepSeek's own files; sizes are free but for experts'."""
    state: State = {}
    add(state, "embed.weight", (61, 48))
    add(state, "head.weight", (61, 48))
    add(state, "norm.weight", (48,))
    for prefix in ("", "mtp.0."):
        for name, shape in {"fn": (4, 192), "base": (4,), "scale": (1,)}.items():
            add(state, f"{prefix}hc_head_{name}", shape)
    for name in ("enorm", "hnorm", "norm"):
        add(state, f"mtp.0.{name}.weight", (48,))
    for name in ("e_proj", "h_proj"):
        add(state, f"mtp.0.{name}.weight", (48, 48))
    for number, prefix in enumerate((*(f"layers.{n}." for n in range(4)), "mtp.0.")):
        ratio = (4, 0, 4, 0, 0)[number]
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (48,),
            "ffn_norm.weight": (48,),
            "attn.wq_a.weight": (22, 48),
            "attn.q_norm.weight": (22,),
            "attn.wq_b.weight": (72, 22),
            "attn.wkv.weight": (12, 48),
            "attn.kv_norm.weight": (12,),
            "attn.wo_a.weight": (20, 36),
            "attn.wo_b.weight": (48, 20),
            "attn.attn_sink": (6,),
            "ffn.gate.weight": (4, 48),
            f"ffn.gate.{'tid2eid' if number < 2 else 'bias'}": (61, 2) if number < 2 else (4,),
            **{f"hc_{x}_{y}": z for x in ("attn", "ffn") for y, z in HYPER.items()},
        }
        for name in [f"experts.{e}" for e in range(4)] + ["shared_experts"]:
            widths = {"w1": (14, 48), "w3": (14, 48), "w2": (48, 14)}
            shapes |= {f"ffn.{name}.{w}.weight": shape for w, shape in widths.items()}
        if ratio:
            for inside, width in (("compressor.", 24), ("indexer.compressor.", 16)):
                shapes |= {f"attn.{inside}{x}.weight": (width, 48) for x in ("wkv", "wgate")}
                shapes |= {f"attn.{inside}ape": (ratio, width)}
                shapes |= {f"attn.{inside}norm.weight": (width // 2,)}
            shapes["attn.indexer.wq_b.weight"] = (24, 22)
            shapes["attn.indexer.scorer.weights_proj.weight"] = (3, 48)
        for name, shape in shapes.items():
            add(state, prefix + name, shape)
    return state


HYPER: dict[str, tuple[int, ...]] = {"fn": (24, 192), "base": (24,), "scale": (3,)}


def into_deepseek_v4(state: State, config: dict[str, Any]) -> None:
    state.clear()
    state.update(deepseek_v4())
    config.update(model_type="deepseek_v4", num_hidden_layers=4, n_routed_experts=4)
    config["architectures"] = ["DeepseekV4ForCausalLM"]
    config["compress_ratios"] = [4, 0, 4, 0]
    del config["layer_types"]


def prediction_of_mimo_v2(state: State, config: dict[str, Any]) -> None:
    """Add a prediction layer of MiMo-V2-Flash: with a window, and a dense MLP."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    for name, shape in {
        "enorm": (hidden,),
        "hnorm": (hidden,),
        "eh_proj": (hidden, 2 * hidden),
        "final_layernorm": (hidden,),
        "input_layernorm": (hidden,),
        "pre_mlp_layernorm": (hidden,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }.items():
        add(state, f"model.mtp.layers.0.{name}.weight", shape)
    for name in [n for n in state if n.startswith("model.layers.2.self_attn.")]:
        inner = name.replace("model.layers.2.", "model.mtp.layers.0.")
        add(state, inner, tuple(state[name].shape))


def prediction_of_exaone(state: State, config: dict[str, Any]) -> None:
    """Add K-EXAONE's prediction layer: beside the model, with a dense MLP."""
    for name in [n for n in state if n.startswith("model.layers.0.")]:
        inner = name.replace("model.layers.0.", "mtp.layers.0.")
        add(state, inner, tuple(state[name].shape))
    hidden = config["hidden_size"]
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        add(state, f"mtp.{name}.weight", (hidden,))
    add(state, "mtp.fc.weight", (hidden, 2 * hidden))
    config["num_nextn_predict_layers"] = 1


def kimi(state: State, config: dict[str, Any]) -> None:
    config["model_type"] = "kimi_k2"
    config["architectures"] = ["DeepseekV3ForCausalLM"]


def mimo(state: State, config: dict[str, Any]) -> None:
    """Rename the last layer to MiMo's prediction layer: ``model.mtp_layers.0``."""
    last = config["num_hidden_layers"] - 1
    hidden = config["hidden_size"]
    old, new = f"model.layers.{last}.", "model.mtp_layers.0."
    for name in [n for n in state if n.startswith(old)]:
        state[new + name.removeprefix(old)] = state.pop(name)
    for name, shape in {
        "token_layernorm.weight": (hidden,),
        "hidden_layernorm.weight": (hidden,),
        "input_proj.weight": (hidden, 2 * hidden),
        "final_layernorm.weight": (hidden,),
    }.items():
        add(state, new + name, shape)
    config["model_type"] = "mimo"
    config["architectures"] = ["MiMoForCausalLM"]
    config["num_hidden_layers"] = last
    config["num_nextn_predict_layers"] = 1
    config["layer_types"] = config["layer_types"][:last]


def prediction_of_qwen(state: State, config: dict[str, Any]) -> None:
    """Add Qwen3-Next's prediction layer: ``mtp.`` with a full-attention layer inside."""
    text = config.get("text_config", config)
    last = text["num_hidden_layers"] - 1
    layers = next(n for n in state if f"layers.{last}.self_attn" in n).split(f"{last}.")[0]
    for name in [n for n in state if n.startswith(f"{layers}{last}.")]:
        inner = name.replace(f"{layers}{last}.", "mtp.layers.0.")
        add(state, inner, tuple(state[name].shape))
    hidden = text["hidden_size"]
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        add(state, f"mtp.{name}.weight", (hidden,))
    add(state, "mtp.fc.weight", (hidden, 2 * hidden))
    if config["model_type"] != "qwen3_next":
        text["mtp_num_hidden_layers"] = 1


def experts_of_the_hub(state: State, config: dict[str, Any]) -> None:
    """Swap the last two axes: the released Qwen3-VL files have them so, and transformers reads both.

    Transformers itself saves them unswapped; other readers (vLLM) know only the release's form.
    """
    del config
    for name in [n for n in state if ".mlp.experts." in n]:
        state[name] = state[name].transpose(1, 2).contiguous()


def tower_of_the_hub(state: State, config: dict[str, Any]) -> None:
    """Name the tower as the released Gemma 3 files do; a fresh model leaves out the inner name."""
    del config
    for name in [n for n in state if n.startswith("vision_tower.")]:
        inner = name.removeprefix("vision_tower.").removeprefix("vision_model.")
        state["vision_tower.vision_model." + inner] = state.pop(name)


def add(state: State, name: str, shape: tuple[int, ...]) -> None:
    state[name] = values(name, torch.Size(shape), torch.bfloat16)


def qwen35(text: str, settings: dict[str, Any]) -> dict[str, Any]:
    return vision_language(
        settings | {"model_type": text}, VISUAL | {"num_position_embeddings": 16}
    )


GEMMA4 = (
    TINY
    | TIED
    | {
        "head_dim": 12,
        "global_head_dim": 24,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 61,
        "num_kv_shared_layers": 2,
    }
)
GEMMA4_MOE = GEMMA4 | {
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 14,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
GPT_OSS = TINY | HEAD | LOCAL_MOE | {"max_position_embeddings": 131072}
QWEN3_CRITIC = TINY | HEAD | {"num_labels": 1}
QWEN3_NEXT = TINY | MOE | HEAD | SHARED | LINEAR
QWEN3_5 = TINY | HEAD | LINEAR
STEP = {
    "text_config": TINY
    | HEAD
    | {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "num_sliding_attention_heads": 8,
        "sliding_window": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 14,
        "share_expert_dim": 18,
    },
    "vision_config": {
        "hidden_size": 32,
        "mlp_ratio": 1.5,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    },
    "image_token_id": 57,
}
QWEN3_5_MOE = QWEN3_5 | MOE | SHARED
TINY_HYBRID = {k: v for k, v in TINY.items() if k != "num_hidden_layers"} | HEAD | MAMBA
MTP_LAST = (r"model\.layers\.3\.",)

FAMILIES: dict[str, Tiny] = {
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", TINY),
    "llama3_tied": Tiny("LlamaForCausalLM", "LlamaConfig", TINY | TIED | HEAD),
    "llama_critic": Tiny("LlamaForTokenClassification", "LlamaConfig", TINY | {"num_labels": 1}),
    "mistral": Tiny("MistralForCausalLM", "MistralConfig", TINY | HEAD),
    "mixtral": Tiny("MixtralForCausalLM", "MixtralConfig", TINY | LOCAL_MOE),
    "qwen2": Tiny("Qwen2ForCausalLM", "Qwen2Config", TINY),
    "qwen2_tied": Tiny("Qwen2ForCausalLM", "Qwen2Config", TINY | TIED),
    "qwen2_reward": Tiny("Qwen2ForSequenceClassification", "Qwen2Config", TINY | {"num_labels": 1}),
    "qwen2_moe": Tiny("Qwen2MoeForCausalLM", "Qwen2MoeConfig", TINY | MOE | SHARED),
    "qwen2_moe_mixed": Tiny(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", TINY | MOE | SHARED | {"mlp_only_layers": [1]}
    ),
    "qwen3_critic": Tiny("Qwen3ForTokenClassification", "Qwen3Config", QWEN3_CRITIC, head_alone),
    "qwen2_5_vl": Tiny(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        vision_language(TINY | MROPE, VISUAL | {"fullatt_block_indexes": [1]}),
    ),
    "qwen3": Tiny("Qwen3ForCausalLM", "Qwen3Config", TINY | HEAD),
    "qwen3_moe": Tiny("Qwen3MoeForCausalLM", "Qwen3MoeConfig", TINY | MOE | HEAD),
    "qwen3_vl": Tiny(
        "Qwen3VLForConditionalGeneration", "Qwen3VLConfig", vision_language(TINY | HEAD, DEEP)
    ),
    "qwen3_vl_moe": Tiny(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        vision_language(TINY | HEAD | MOE, DEEP),
        experts_of_the_hub,
    ),
    "qwen3_next": Tiny("Qwen3NextForCausalLM", "Qwen3NextConfig", QWEN3_NEXT),
    "qwen3_next_mtp": Tiny(
        "Qwen3NextForCausalLM", "Qwen3NextConfig", QWEN3_NEXT, prediction_of_qwen, (r"mtp\.",)
    ),
    "qwen3_5": Tiny("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", QWEN3_5),
    "qwen3_5_moe": Tiny("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", QWEN3_5_MOE),
    "qwen3_5_vl": Tiny(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        qwen35("qwen3_5_text", QWEN3_5),
        prediction_of_qwen,
        (r"mtp\.",),
    ),
    "qwen3_5_moe_vl": Tiny(
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        qwen35("qwen3_5_moe_text", QWEN3_5_MOE),
        prediction_of_qwen,
        (r"mtp\.",),
    ),
    "olmoe": Tiny("OlmoeForCausalLM", "OlmoeConfig", TINY | {"num_experts": 5}),
    "deepseek_v2": Tiny("DeepseekV2ForCausalLM", "DeepseekV2Config", TINY | ROUTED | LATENT),
    "deepseek_v2_lite": Tiny(
        "DeepseekV2ForCausalLM", "DeepseekV2Config", TINY | ROUTED | LATENT | {"q_lora_rank": None}
    ),
    "deepseek_v3": Tiny("DeepseekV3ForCausalLM", "DeepseekV3Config", TINY | ROUTED | LATENT),
    "deepseek_v3_mtp": Tiny(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        TINY | ROUTED | LATENT | {"num_hidden_layers": 4},
        prediction_of_deepseek,
        MTP_LAST,
    ),
    "bailing_moe": Tiny(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        TINY
        | ROUTED
        | HEAD
        | {"use_qk_norm": True, "num_hidden_layers": 5, "first_k_dense_replace": 2},
        bailing,
        loads=False,
    ),
    "deepseek_v4": Tiny("Qwen2ForCausalLM", "Qwen2Config", TINY, into_deepseek_v4, loads=False),
    "exaone4": Tiny(
        "Exaone4ForCausalLM",
        "Exaone4Config",
        TINY | HEAD | {"sliding_window": 8, "sliding_window_pattern": 3},
    ),
    "mimo_v2_flash": Tiny(
        "MiMoV2FlashForCausalLM",
        "MiMoV2FlashConfig",
        TINY
        | HEAD
        | {
            "num_attention_heads": 8,
            "v_head_dim": 10,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 14,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        },
        prediction_of_mimo_v2,
        (r"model\.mtp\.",),
    ),
    "minimax_m3": Tiny(
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        TINY | HEAD | LOCAL_MOE | {"rotary_dim": 8},
        minimax_m3,
        loads=False,
    ),
    "kimi_k25": Tiny(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        TINY | ROUTED | LATENT | {"num_hidden_layers": 4, "first_k_dense_replace": 2},
        kimi_k25,
        loads=False,
    ),
    "kimi_vl": Tiny(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        TINY
        | ROUTED
        | LATENT
        | {"q_lora_rank": None, "num_hidden_layers": 4, "first_k_dense_replace": 2},
        kimi_vl,
        loads=False,
    ),
    "bailing_hybrid": Tiny(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        TINY | ROUTED | LATENT | {"num_hidden_layers": 6, "first_k_dense_replace": 2},
        bailing_hybrid,
        loads=False,
    ),
    "internvl_chat": Tiny("Qwen2ForCausalLM", "Qwen2Config", TINY, internvl_chat, loads=False),
    "mistral3": Tiny(
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": TINY | HEAD | {"model_type": "ministral3"},
            "vision_config": PIXTRAL,
            "spatial_merge_size": 2,
            "image_token_index": 57,
            "tie_word_embeddings": False,
        },
    ),
    "glm4v": Tiny(
        "Glm4vForConditionalGeneration",
        "Glm4vConfig",
        vision_language(TINY | ROPE_SECTIONS, VISUAL | {"image_size": 8}),
    ),
    "glm4v_moe": Tiny(
        "Glm4vMoeForConditionalGeneration",
        "Glm4vMoeConfig",
        vision_language(
            TINY | HEAD | ROUTED | ROPE_SECTIONS | {"attention_bias": True},
            VISUAL | {"image_size": 8},
        ),
    ),
    "qwen2_vl": Tiny(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        vision_language(
            TINY | MROPE,
            {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "patch_size": 2},
        ),
    ),
    "internvl": Tiny(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {
            "text_config": TINY | {"model_type": "qwen2"},
            "vision_config": INTERN,
            "image_token_id": 57,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2_audio": Tiny(
        "Qwen2AudioForConditionalGeneration",
        "Qwen2AudioConfig",
        {
            "text_config": TINY | {"model_type": "qwen2"},
            "audio_config": AUDIO,
            "audio_token_index": 57,
        },
    ),
    "qwen3_omni": Tiny(
        "Qwen3OmniMoeForConditionalGeneration",
        "Qwen3OmniMoeConfig",
        {
            "thinker_config": {
                "text_config": TINY | HEAD | MOE,
                "vision_config": DEEP,
                "audio_config": AUDIO,
            },
            "enable_audio_output": False,
        },
    ),
    "qwen2_5_omni_thinker": Tiny(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "Qwen2_5OmniThinkerConfig",
        {
            "text_config": TINY | ROPE_SECTIONS,
            "vision_config": VISUAL | {"fullatt_block_indexes": [1]},
            "audio_config": AUDIO,
        },
    ),
    "kimi_k2": Tiny(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        TINY | ROUTED | LATENT,
        kimi,
        loads=False,
    ),
    "deepseek_v1": Tiny(
        "Glm4MoeForCausalLM", "Glm4MoeConfig", TINY | ROUTED | HEAD, deepseek_v1, loads=False
    ),
    "deepseek_v32": Tiny(
        "DeepseekV32ForCausalLM",
        "DeepseekV32Config",
        TINY | ROUTED | LATENT | INDEXED | {"num_hidden_layers": 4},
        prediction_of_deepseek,
        MTP_LAST,
    ),
    "deepseek_v32_wide": Tiny(
        "DeepseekV32ForCausalLM",
        "DeepseekV32Config",
        TINY | ROUTED | LATENT | INDEXED | {"index_head_dim": 128},
    ),
    "glm_moe_dsa": Tiny(
        "GlmMoeDsaForCausalLM",
        "GlmMoeDsaConfig",
        TINY | ROUTED | LATENT | INDEXED | {"indexer_types": ["full", "full", "shared"]},
    ),
    "glm4_moe_lite": Tiny(
        "Glm4MoeLiteForCausalLM",
        "Glm4MoeLiteConfig",
        TINY | ROUTED | LATENT | {"num_hidden_layers": 4},
        prediction_of_deepseek,
        MTP_LAST,
    ),
    "dots1": Tiny("Dots1ForCausalLM", "Dots1Config", TINY | ROUTED | HEAD),
    "hy_v3": Tiny(
        "HYV3ForCausalLM",
        "HYV3Config",
        TINY | MOE | HEAD | {"num_hidden_layers": 4},
        prediction_of_hy_v3,
        MTP_LAST,
    ),
    "sarvam_mla": Tiny(
        "DeepseekV3ForCausalLM",
        "SarvamMLAConfig",
        TINY | ROUTED | LATENT | {"q_lora_rank": None},
    ),
    "sarvam_moe": Tiny("Glm4MoeForCausalLM", "SarvamMoEConfig", TINY | ROUTED | HEAD),
    "exaone_moe": Tiny(
        "ExaoneMoeForCausalLM",
        "ExaoneMoeConfig",
        TINY | MOE | HEAD | {"first_k_dense_replace": 1, "sliding_window": 4},
        prediction_of_exaone,
        (r"mtp\.",),
    ),
    "seed_oss": Tiny("SeedOssForCausalLM", "SeedOssConfig", TINY | HEAD),
    "smollm3": Tiny(
        "SmolLM3ForCausalLM", "SmolLM3Config", TINY | HEAD | TIED | {"no_rope_layers": [1, 0, 1]}
    ),
    "internlm3": Tiny(
        "LlamaForCausalLM",
        "LlamaConfig",
        TINY | HEAD | {"attention_bias": True, "mlp_bias": True},
        internlm3,
        loads=False,
    ),
    "glm4": Tiny("Glm4ForCausalLM", "Glm4Config", TINY | HEAD | {"attention_bias": True}),
    "glm4_moe": Tiny(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        TINY
        | ROUTED
        | HEAD
        | {"attention_bias": True, "use_qk_norm": True, "num_hidden_layers": 4},
        prediction_of_deepseek,
        MTP_LAST,
    ),
    "glm4_moe_air": Tiny(
        "Glm4MoeForCausalLM", "Glm4MoeConfig", TINY | ROUTED | HEAD | {"attention_bias": True}
    ),
    "gpt_oss": Tiny("GptOssForCausalLM", "GptOssConfig", GPT_OSS),
    "gpt_oss_square": Tiny(
        "GptOssForCausalLM", "GptOssConfig", GPT_OSS | {"intermediate_size": 48}
    ),
    "gemma2": Tiny("Gemma2ForCausalLM", "Gemma2Config", TINY | HEAD | TIED),
    "gemma3": Tiny("Gemma3ForCausalLM", "Gemma3TextConfig", TINY | HEAD | TIED),
    "gemma4": Tiny("Gemma4ForCausalLM", "Gemma4TextConfig", GEMMA4),
    "gemma4_moe": Tiny("Gemma4ForCausalLM", "Gemma4TextConfig", GEMMA4_MOE),
    "gemma3_vl": Tiny(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": TINY | HEAD | TIED | {"model_type": "gemma3_text"},
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": 60,
            **TIED,
        },
        tower_of_the_hub,
    ),
    "mimo": Tiny(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        TINY | {"num_hidden_layers": 4},
        mimo,
        loads=False,
    ),
    "minimax_m2": Tiny(
        "MiniMaxM2ForCausalLM", "MiniMaxM2Config", TINY | HEAD | LOCAL_MOE | {"rotary_dim": 8}
    ),
    "ernie4_5": Tiny("Ernie4_5ForCausalLM", "Ernie4_5Config", TINY | HEAD | TIED),
    "ernie4_5_moe": Tiny(
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        TINY
        | TIED
        | {
            "moe_num_experts": 5,
            "moe_k": 2,
            "moe_intermediate_size": 14,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
        },
    ),
    "nemotron_h": Tiny(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        TINY_HYBRID | {"hybrid_override_pattern": "M-M*-"},
    ),
    "nemotron_h_moe": Tiny(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        TINY_HYBRID
        | {
            "hybrid_override_pattern": "MEM*E",
            "moe_intermediate_size": 14,
            "moe_shared_expert_intermediate_size": 18,
            "moe_latent_size": 10,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        },
        prediction_of_nemotron_h,
        (r"mtp\.",),
    ),
    "falcon_h1": Tiny(
        "FalconH1ForCausalLM",
        "FalconH1Config",
        TINY
        | HEAD
        | {
            "mamba_d_ssm": 48,
            "mamba_n_heads": 6,
            "mamba_d_head": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 4,
            "mamba_d_conv": 4,
            "mamba_rms_norm": True,
        },
    ),
    "llama4": Tiny(
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {"text_config": TINY | HEAD | LOCAL_MOE | LLAMA4_TEXT, "vision_config": LLAMA4_TOWER},
    ),
    "step3p7": Tiny(
        "Step3p7ForConditionalGeneration", "Step3p7Config", STEP, prediction_of_step, MTP_LAST
    ),
    "step3p5": Tiny(
        "Step3p7ForConditionalGeneration", "Step3p7Config", STEP, step_alone, loads=False
    ),
    "nemotron": Tiny("NemotronForCausalLM", "NemotronConfig", TINY | HEAD),
}

FLOAT32 = re.compile(r"e_score_correction_bias$")
AROUND_ONE = re.compile(r"linear_attn\.norm\.weight$")


def fill(model: torch.nn.Module) -> None:
    """Give every tensor values of its own; the router's bias is float32, as in the releases.

    The norm behind linear attention is kept where bfloat16 can take one away and add it again.
    """
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if FLOAT32.search(name):
                tensor.data = values(name, tensor.shape, torch.float32)
            elif AROUND_ONE.search(name):
                tensor.copy_(torch.linspace(0.5, 2, tensor.numel()).reshape(tensor.shape))
            elif isinstance(tensor, torch.nn.Parameter):
                tensor.copy_(values(name, tensor.shape, tensor.dtype))


def make(name: str) -> TinyModel:
    """Return the family's tiny model; the same name gives the same values."""
    return build(name, FAMILIES[name])


def build(name: str, tiny: Tiny) -> TinyModel:
    """Return the tiny model that ``tiny`` describes."""
    config = getattr(transformers, tiny.config_class)(**copy.deepcopy(tiny.settings))
    config.dtype = torch.bfloat16
    model = getattr(transformers, tiny.model_class)(config)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # and not complex
            tensor.data = tensor.to(torch.bfloat16)
    fill(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        state = load_file(Path(folder) / "model.safetensors")
        written = json.loads((Path(folder) / "config.json").read_text())
    if tiny.by_hand is not None:
        tiny.by_hand(state, written)
    return TinyModel(name, written, state, tiny)
