"""HuggingFace's tensors under the names of trainers that have models of their own.

Each function takes a model apart as its trainer's loader would: written from the trainers' own maps
and not from the rules that undo it. ``CASES`` names what each of them is tried on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from scripts.makers import tiny_families
from scripts.makers.tiny_families import (
    HEAD,
    LATENT,
    MOE,
    ROUTED,
    TIED,
    TINY,
    State,
    Tiny,
    TinyModel,
    values,
)

Config = Mapping[str, Any]
_LAYER = re.compile(r"model\.layers\.([0-9]+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.([0-9]+)\.(\w+)_proj\.weight")


def _norms_that_add(state: State, _: dict[str, Any]) -> None:
    """Keep norms where bfloat16 can add one and take it away again."""
    for name in state:
        if "norm" in name:
            state[name] = (state[name].clamp(-0.5, 0.5) * 64).round() / 64 + 0.0  # no -0.0


MORE: dict[str, Tiny] = {
    # Without the layer for multi-token prediction, which torchtitan has not.
    **{
        f"{name}_alone": dataclasses.replace(tiny_families.FAMILIES[f"{name}_vl"], by_hand=None)
        for name in ("qwen3_5", "qwen3_5_moe")
    },
    "gemma": Tiny("GemmaForCausalLM", "GemmaConfig", TINY | HEAD | TIED),
    "gemma3_norms": Tiny(
        "Gemma3ForCausalLM", "Gemma3TextConfig", TINY | HEAD | TIED, _norms_that_add
    ),
    "olmo": Tiny("OlmoForCausalLM", "OlmoConfig", TINY),
    "olmo2": Tiny("Olmo2ForCausalLM", "Olmo2Config", TINY),
    "olmo3": Tiny("Olmo3ForCausalLM", "Olmo3Config", TINY),
    "flex_olmo": Tiny(
        "FlexOlmoForCausalLM", "FlexOlmoConfig", TINY | {"num_experts": 5, "num_experts_per_tok": 2}
    ),
    "phi3": Tiny("Phi3ForCausalLM", "Phi3Config", TINY),
    "phi": Tiny("PhiForCausalLM", "PhiConfig", TINY),
    "gpt_neox": Tiny(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {k: v for k, v in TINY.items() if k != "num_key_value_heads"},
    ),
    "llama4": Tiny(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        TINY
        | HEAD
        | {"num_local_experts": 5, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
    ),
    "deepseek_halves": Tiny(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        TINY | ROUTED | LATENT | {"rope_interleave": False},
    ),
    "qwen3_moe_square": Tiny(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", TINY | MOE | HEAD | {"moe_intermediate_size": 48}
    ),
}


def make(name: str) -> TinyModel:
    """Return a tiny model, of Megatron's families or of these."""
    return tiny_families.build(name, MORE[name]) if name in MORE else tiny_families.make(name)


def _pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the two rows of a rotary pair side by side, as complex numbers are kept."""
    rows, rest = weight.shape[0], weight.shape[1:]
    return (
        weight.view(heads, 2, rows // heads // 2, *rest)
        .transpose(1, 2)
        .reshape(rows, *rest)
        .clone()
    )


def _heads(config: Config) -> tuple[int, int]:
    return config["num_attention_heads"], config["num_key_value_heads"]


def _stack(found: State, name: str, expert: int, weight: torch.Tensor) -> None:
    """Collect the experts of a layer: :func:`_stacked` puts them together."""
    found[f"{name}#{expert:04d}"] = weight


def _stacked(found: State, how: Callable[[list[torch.Tensor]], torch.Tensor]) -> State:
    experts: dict[str, list[torch.Tensor]] = {}
    made = {}
    for name in sorted(found):
        if "#" in name:
            experts.setdefault(name.partition("#")[0], []).append(found[name])
        else:
            made[name] = found[name]
    return made | {name: how(weights) for name, weights in experts.items()}


_W = {"gate": "w1", "down": "w2", "up": "w3"}


def torchtitan(config: Config, state: State, *, release: str = "0.3") -> State:
    """Return torchtitan's state dict; releases before 0.3 have other names."""
    new = release == "0.3"
    kind = config["model_type"]
    qkv = "attention.qkv_linear.w" if new else "attention.w"
    experts = "moe.routed_experts.inner_experts." if new else "moe.experts."
    latent = "q_lora_rank" in config
    layers = config.get("text_config", config)["num_hidden_layers"]
    top = {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "lm_head.weight" if new else "output.weight",
    }
    inner = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "self_attn.kv_a_proj_with_mqa": "attention.wkv_a",
        "self_attn.kv_a_layernorm": "attention.kv_norm",
        "self_attn.kv_b_proj": "attention.wkv_b",
        "self_attn.q_a_proj": "attention.wq_a",
        "self_attn.q_a_layernorm": "attention.q_norm",
        "self_attn.q_b_proj": "attention.wq_b",
        "self_attn.q_norm": "attention.q_norm",
        "self_attn.k_norm": "attention.k_norm",
        "mlp.gate": "moe.router.gate",
        "mlp.router": "moe.router.gate",
        "feed_forward.router": "moe.router.gate",
        "shared_head.norm": "mtp_norm",
        **{f"mlp.{x}_proj": f"feed_forward.{w}" for x, w in _W.items()},
        **{f"feed_forward.{x}_proj": f"feed_forward.{w}" for x, w in _W.items()},
        **{f"mlp.shared_experts.{x}_proj": f"moe.shared_experts.{w}" for x, w in _W.items()},
        **{
            f"feed_forward.shared_expert.{x}_proj": f"moe.shared_experts.{w}" for x, w in _W.items()
        },
        **{f"self_attn.{x}_proj": f"{'attention.w' if latent else qkv}{x}" for x in "qkv"},
        **{f"mlp.shared_expert.{x}_proj": f"moe.shared_experts.{w}" for x, w in _W.items()},
        "mlp.shared_expert_gate": "moe.shared_experts.gate",
    }
    if kind.startswith("qwen3_5"):
        inner |= {f"self_attn.{x}_proj": f"attn.w{x}" for x in "qkvo"}
        inner |= {f"self_attn.{x}_norm": f"attn.{x}_norm" for x in "qk"}
    made: State = {}
    for name, weight in state.items():
        name = name.replace("model.language_model.", "model.")
        if name.startswith("model.visual."):
            made |= _titan_tower(name.removeprefix("model.visual."), weight)
            continue
        if name in top:
            made[top[name]] = weight
            continue
        match = _LAYER.fullmatch(name)
        assert match is not None, name
        number, rest = int(match[1]), match[2]
        layer = f"layers.{number}." if number < layers else f"mtp_layers.{number - layers}."
        if number >= layers and rest.startswith(("embed_tokens.", "shared_head.head.")):
            continue  # torchtitan has one of each
        if kind in ("llama", "mistral") and rest == "self_attn.q_proj.weight":
            weight = _pairs(weight, _heads(config)[0])
        if kind in ("llama", "mistral") and rest == "self_attn.k_proj.weight":
            weight = _pairs(weight, _heads(config)[1])
        expert = _EXPERT.fullmatch(rest)
        if expert:
            w = _W[expert[2]]
            axes = {"w1": "_EFD", "w2": "_EDF", "w3": "_EFD"}[w] if new else ""
            _stack(made, f"{layer}{experts}{w}{axes}", int(expert[1]), weight)
        elif rest == "mlp.gate.e_score_correction_bias":
            made[f"{layer}moe.expert_bias{'_E' if new else ''}"] = weight
        elif rest.startswith("linear_attn."):
            made |= {
                f"{layer}attn.{part}": piece
                for part, piece in _titan_linear(config, rest.partition(".")[2], weight).items()
            }
        elif rest == "self_attn.sinks":
            made[f"{layer}attention.sinks"] = weight
        elif rest.startswith("mlp.experts.") and kind == "gpt_oss":
            which = "mlp1" if "gate_up" in rest else "mlp2"
            bias = rest.endswith("bias")
            axes = {"mlp1": ("_EGD", "_EG"), "mlp2": ("_EDF", "_ED")}[which][bias] if new else ""
            value = weight if bias else weight.transpose(1, 2).contiguous()
            made[f"{layer}{experts}{which}_{'bias' if bias else 'weight'}{axes}"] = value
        elif rest == "feed_forward.experts.gate_up_proj":
            gate, up = weight.transpose(1, 2).chunk(2, dim=1)
            made[f"{layer}{experts}w1"] = gate.contiguous()
            made[f"{layer}{experts}w3"] = up.contiguous()
        elif rest == "feed_forward.experts.down_proj":
            made[f"{layer}{experts}w2"] = weight.transpose(1, 2).contiguous()
        else:
            module, _, parameter = rest.rpartition(".")
            made[f"{layer}{inner.get(module, module)}.{parameter}"] = weight
    return _stacked(made, torch.stack)


def _titan_linear(config: Config, name: str, weight: torch.Tensor) -> State:
    text = config.get("text_config", config)
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    sizes = (keys, keys, text["linear_num_value_heads"] * text["linear_value_head_dim"])
    fused = {"in_proj_qkv.weight": "in_proj", "conv1d.weight": "conv"}
    if name not in fused:
        return {name: weight}
    parts = zip("qkv", weight.split(sizes), strict=True)
    return {f"{fused[name]}_{x}.weight": part.clone() for x, part in parts}


def _titan_tower(name: str, weight: torch.Tensor) -> State:
    name = name.replace("blocks.", "layers.").replace("patch_embed.proj.", "patch_embed.")
    name = "vision_encoder." + name.replace("pos_embed.weight", "pos_embed")
    if name.endswith("patch_embed.weight"):
        return {name: weight.flatten(1)}
    if ".attn.qkv." in name:
        parts = zip("qkv", weight.chunk(3), strict=True)
        return {name.replace(".qkv.", f".w{x}."): part.clone() for x, part in parts}
    return {name: weight}


def meta(config: Config, state: State) -> State:
    """Return Meta's own names: torchtitan's of old, with the frequencies of the rotary embedding."""
    width = config["hidden_size"] // config["num_attention_heads"]
    return torchtitan(config, state, release="0.2") | {"rope.freqs": torch.arange(width / 2)}


def olmo_core(config: Config, state: State) -> State:
    """Return OLMo-core's state dict."""
    kind = config["model_type"]
    norms = {
        "llama": ("attention_norm", "feed_forward_norm", "", ""),
        "qwen3": ("attention_norm", "feed_forward_norm", "", ""),
        "gemma3_text": (
            "attention_norm",
            "post_attention_norm",
            "feed_forward_norm",
            "post_feed_forward_norm",
        ),
    }.get(kind, ("", "attention_norm", "", "feed_forward_norm"))
    modules = dict(
        zip(
            (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
            norms,
            strict=True,
        )
    )
    modules |= {f"self_attn.{x}_proj": f"attention.w_{x}" for x in "qkv"}
    modules |= {f"self_attn.{x}_norm": f"attention.{x}_norm" for x in "qk"}
    modules |= {"self_attn.o_proj": "attention.w_out"}
    modules |= {f"mlp.{x}_proj": f"feed_forward.{w}" for x, w in _W.items()}
    top = {
        "model.embed_tokens.weight": "embeddings.weight",
        "model.norm.weight": "lm_head.norm.weight",
        "lm_head.weight": "lm_head.w_out.weight",
    }
    made: State = {}
    for name, weight in state.items():
        if kind == "gemma3_text" and "norm" in name:
            weight = weight + 1.0
        if name in top:
            made[top[name]] = weight
            continue
        match = _LAYER.fullmatch(name)
        assert match is not None, name
        layer, rest = f"blocks.{match[1]}.", match[2]
        expert = _EXPERT.fullmatch(rest)
        if expert:
            mlp = f"{layer}feed_forward_moe.experts.mlp.{_W[expert[2]]}"
            _stack(made, mlp, int(expert[1]), weight)
        elif rest == "mlp.gate.weight":
            made[layer + "feed_forward_moe.router.weight"] = weight.flatten()
        else:
            module, _, parameter = rest.rpartition(".")
            made[f"{layer}{modules[module]}.{parameter}"] = weight
    return _stacked(made, lambda weights: torch.cat(weights, dim=1).T.contiguous())


def torchtune(config: Config, state: State) -> State:
    """Return torchtune's state dict."""
    kind = config["model_type"]
    n, g = _heads(config)
    made: State = {}
    for name, weight in state.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            made[
                {
                    "model.embed_tokens.weight": "tok_embeddings.weight",
                    "model.norm.weight": "norm.scale",
                    "lm_head.weight": "output.weight",
                    "score.weight": "output.weight",
                }[name]
            ] = weight
            continue
        layer, rest = f"layers.{match[1]}.", match[2]
        module, _, parameter = rest.rpartition(".")
        if kind in ("llama", "mistral", "gemma") and module in (
            "self_attn.q_proj",
            "self_attn.k_proj",
        ):
            weight = _pairs(weight, n if module.endswith("q_proj") else g)
        if module == "self_attn.qkv_proj":
            width = config["hidden_size"] // n
            parts = weight.split((n * width, g * width, g * width))
            made |= {f"{layer}attn.{x}_proj.weight": p for x, p in zip("qkv", parts, strict=True)}
        elif module == "mlp.gate_up_proj":
            made[layer + "mlp.w1.weight"], made[layer + "mlp.w3.weight"] = weight.chunk(2)
        elif module.endswith("norm"):
            norm = {
                "input_layernorm": "sa_norm",
                "post_attention_layernorm": "mlp_norm",
                "self_attn.q_norm": "attn.q_norm",
                "self_attn.k_norm": "attn.k_norm",
            }[module]
            made[f"{layer}{norm}.scale"] = weight
        else:
            words = {
                "self_attn.o_proj": "attn.output_proj",
                **{f"self_attn.{x}_proj": f"attn.{x}_proj" for x in "qkv"},
                **{f"mlp.{x}_proj": f"mlp.{w}" for x, w in _W.items()},
            }
            made[f"{layer}{words[module]}.{parameter}"] = weight
    return {name: weight.clone() for name, weight in made.items()}


_FC = {"gate": "fc_1", "up": "fc_2", "down": "proj"}
_EXPERT_FC = {f"{x}_proj": fc for x, fc in _FC.items()} | {"w1": "fc_1", "w3": "fc_2", "w2": "proj"}


def litgpt(config: Config, state: State, *, legacy: bool = False) -> State:
    """Return litgpt's state dict; ``legacy`` is before 0.5.5: each group of heads together."""
    kind = config["model_type"]
    n, g = config["num_attention_heads"], config.get("num_key_value_heads", 0)
    g = g or n
    width = config.get("head_dim") or config["hidden_size"] // n
    around = kind in ("gemma2", "gemma3_text", "olmo2")
    modules = {
        "input_layernorm": "norm_1",
        "post_attention_layernorm": "post_attention_norm" if around else "norm_2",
        "pre_feedforward_layernorm": "norm_2",
        "post_feedforward_layernorm": "post_mlp_norm",
        "self_attn.o_proj": "attn.proj",
        "self_attn.dense": "attn.proj",
        "attention.dense": "attn.proj",
        "self_attn.q_norm": "attn.norm_q",
        "self_attn.k_norm": "attn.norm_k",
        "mlp.fc1": "mlp.fc",
        "mlp.fc2": "mlp.proj",
        "mlp.dense_h_to_4h": "mlp.fc",
        "mlp.dense_4h_to_h": "mlp.proj",
        "mlp.gate": "mlp.gate",
        "block_sparse_moe.gate": "mlp.gate",
        **{f"mlp.{x}_proj": f"mlp.{fc}" for x, fc in _FC.items()},
    }
    top = {
        "model.embed_tokens": "transformer.wte",
        "gpt_neox.embed_in": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "model.final_layernorm": "transformer.ln_f",
        "gpt_neox.final_layer_norm": "transformer.ln_f",
        "lm_head": "lm_head",
        "embed_out": "lm_head",
    }
    made: State = {}
    for name, weight in state.items():
        module, _, parameter = name.rpartition(".")
        match = re.fullmatch(r"(?:model|gpt_neox)\.layers\.([0-9]+)\.(.+)", module)
        if match is None:
            made[f"{top[module]}.{parameter}"] = weight
            continue
        layer, rest = f"transformer.h.{match[1]}.", match[2]
        expert = re.fullmatch(r"(?:mlp|block_sparse_moe)\.experts\.([0-9]+)\.(\w+)", rest)
        if re.fullmatch(r"self_attn\.[kv]_proj", rest):
            continue
        if rest == "self_attn.q_proj":
            q, k, v = (state[name.replace("q_proj", f"{x}_proj")] for x in "qkv")
        elif rest == "self_attn.qkv_proj":
            q, k, v = weight.split((n * width, g * width, g * width))
        elif rest == "attention.query_key_value":
            grouped = weight.view(g, n // g + 2, width, *weight.shape[1:])
            q = grouped[:, :-2].flatten(0, 2)
            k, v = grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1)
        elif expert:
            made[f"{layer}mlp.experts.{expert[1]}.{_EXPERT_FC[expert[2]]}.{parameter}"] = weight
            continue
        elif rest == "mlp.gate_up_proj":
            gate, up = weight.chunk(2)
            made |= {layer + "mlp.fc_1.weight": gate.clone(), layer + "mlp.fc_2.weight": up.clone()}
            continue
        else:
            made[f"{layer}{modules[rest]}.{parameter}"] = weight
            continue
        if legacy:
            rows = [
                part
                for group in range(g)
                for part in (
                    q[group * (n // g) * width : (group + 1) * (n // g) * width],
                    k[group * width : (group + 1) * width],
                    v[group * width : (group + 1) * width],
                )
            ]
            made[f"{layer}attn.attn.{parameter}"] = torch.cat(rows)
        else:
            made[f"{layer}attn.qkv.{parameter}"] = torch.cat((q, k, v))
    return made


@dataclasses.dataclass(frozen=True, slots=True)
class Native:
    """A trainer's state dict: how it is made, on which models, what stands before its names."""

    inverse: Callable[..., State]
    models: tuple[str, ...]
    prefix: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    def names(self, model: TinyModel) -> State:
        """Return the tensors of ``model`` as the trainer has them."""
        made = self.inverse(model.config, model.state, **dict(self.options))
        return {self.prefix + name: tensor for name, tensor in made.items()}


_TITAN = ("llama", "llama3_tied", "mistral", "qwen3", "qwen3_moe", "gpt_oss")
_HYBRID = ("qwen3_5", "qwen3_5_moe", "qwen3_5_alone", "qwen3_5_moe_alone")
_DEEPSEEK = ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "kimi_k2")

TRAINERS: dict[str, Native] = {
    "torchtitan": Native(
        torchtitan, (*_TITAN, *_DEEPSEEK, "deepseek_v3_mtp", "qwen3_moe_square", *_HYBRID)
    ),
    "torchtitan_0.2": Native(
        torchtitan, (*_TITAN, *_DEEPSEEK, "llama4"), options=(("release", "0.2"),)
    ),
    "meta": Native(meta, ("llama",)),
    "olmo_core": Native(
        olmo_core, ("llama", "qwen3", "olmo2", "olmo3", "gemma3_norms", "flex_olmo"), "model."
    ),
    "torchtune": Native(
        torchtune,
        (
            "llama",
            "llama3_tied",
            "mistral",
            "gemma",
            "qwen2",
            "qwen2_tied",
            "qwen2_reward",
            "qwen3",
            "phi3",
        ),
    ),
    "torchtune_dcp": Native(torchtune, ("llama",), "model."),
    "litgpt": Native(
        litgpt,
        (
            *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma", "gemma2"),
            *("gemma3", "olmo", "olmo2", "phi3", "phi", "gpt_neox"),
        ),
        "model.",
    ),
    "litgpt_0.5.4": Native(
        litgpt, ("llama", "qwen2", "gemma", "gpt_neox"), options=(("legacy", True),)
    ),
}


def balancing(state: State, layers: int, experts: int, *, new: bool) -> State:
    """Return the biases by which torchtitan balances experts, as buffers beside ``state``."""
    name = "moe.expert_bias_E" if new else "moe.expert_bias"
    return {
        f"layers.{k}.{name}": values(name, torch.Size((experts,)), torch.float32)
        for k in range(layers)
        if any(n.startswith(f"layers.{k}.moe.") for n in state)
    }
