"""litgpt's names: ``transformer.h.N``, with one projection for queries, keys and values.

``attn.qkv`` has all queries, all keys and all values; releases before 0.5.5 called it ``attn.attn`` and
kept each group of heads together, as Megatron does. Rotary embedding works as HuggingFace's does.
"""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import L
from streamconv.families.native.dialect import Dialect
from streamconv.families.ops import Tensor
from streamconv.families.rules import Dims, Family, moved, renamed, rule
from streamconv.tracing.later import torch

S = "transformer.h.{layer}."
_KINDS = ("weight", "bias")

_TOP = moved(
    "",
    "",
    {
        "transformer.wte": "model.embed_tokens",
        "transformer.ln_f": "model.norm",
        "lm_head": "lm_head",
    },
    ops.copy,
    _KINDS,
)
_QKV = tuple(
    rule(f"{S}attn.{name}.{kind}", tuple(f"{L}self_attn.{x}_proj.{kind}" for x in "qkv"), how)
    for name, how in (("qkv", ops.flat_qkv), ("attn", ops.qkv))
    for kind in _KINDS
)
_ATTENTION = (
    *_QKV,
    *moved(
        S + "attn.",
        L + "self_attn.",
        {"proj": "o_proj", "norm_q": "q_norm", "norm_k": "k_norm"},
        ops.copy,
        _KINDS,
    ),
)
_NORMS = moved(
    S, L, {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}, ops.copy, _KINDS
)
_MLP_NAMES = {"fc_1": "gate_proj", "fc_2": "up_proj", "proj": "down_proj"}
_MLP = moved(S + "mlp.", L + "mlp.", _MLP_NAMES, ops.copy, _KINDS)
_DENSE = (*_TOP, *_ATTENTION, *_NORMS, *_MLP)

_ONE_EXPERT = "experts.{expert}."
_EXPERTS = (
    *moved(S + "mlp.", L + "mlp.", {"gate": "gate"}, ops.copy),
    *moved(S + "mlp." + _ONE_EXPERT, L + "mlp." + _ONE_EXPERT, _MLP_NAMES, ops.copy),
)
_MIXTRAL_NAMES = {
    "mlp.gate.": "block_sparse_moe.gate.",
    "mlp.experts.": "block_sparse_moe.experts.",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
}

_AROUND = moved(
    S,
    L,
    {
        "norm_1": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "norm_2": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
    ops.copy,
)
_BEHIND = moved(
    S,
    L,
    {
        "post_attention_norm": "post_attention_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
    ops.copy,
)


def _grouped(dims: Dims, tensor: Tensor) -> Tensor:
    """All queries, all keys, all values → each group together: its queries, its key, its value."""
    d, g = dims.head_dim, dims.groups
    parts = (t.reshape(g, -1, d, *t.shape[1:]) for t in ops.flat_qkv(dims, tensor))
    return torch.cat(tuple(parts), dim=1).flatten(0, 2)


_NEOX = "gpt_neox.layers.{layer}."
_GPT_NEOX = (
    *moved("", "", {"transformer.wte": "gpt_neox.embed_in", "lm_head": "embed_out"}, ops.copy),
    *moved("", "", {"transformer.ln_f": "gpt_neox.final_layer_norm"}, ops.copy, _KINDS),
    *moved(
        S,
        _NEOX,
        {
            "norm_1": "input_layernorm",
            "norm_2": "post_attention_layernorm",
            "attn.attn": "attention.query_key_value",
            "attn.proj": "attention.dense",
            "mlp.fc": "mlp.dense_h_to_4h",
            "mlp.proj": "mlp.dense_4h_to_h",
        },
        ops.copy,
        _KINDS,
    ),
    *moved(S, _NEOX, {"attn.qkv": "attention.query_key_value"}, _grouped, _KINDS),
)

_PHI = (
    *renamed(_TOP, targets={"model.norm": "model.final_layernorm"}),
    *_QKV,
    *moved(
        S,
        L,
        {
            "norm_1": "input_layernorm",
            "attn.proj": "self_attn.dense",
            "mlp.fc": "mlp.fc1",
            "mlp.proj": "mlp.fc2",
        },
        ops.copy,
        _KINDS,
    ),
)


def _fused(dims: Dims, tensor: Tensor) -> Tensor:
    """All queries, all keys, all values: in one tensor on both sides."""
    ops.flat_qkv(dims, tensor)
    return tensor


_PHI3 = (
    *_TOP,
    *_NORMS,
    *moved(S + "attn.", L + "self_attn.", {"qkv": "qkv_proj"}, _fused),
    *moved(S, L, {"attn.proj": "self_attn.o_proj", "mlp.proj": "mlp.down_proj"}, ops.copy),
    rule(
        (S + "mlp.fc_1.weight", S + "mlp.fc_2.weight"),
        L + "mlp.gate_up_proj.weight",
        ops.fused_gate_up,
    ),
)

DIALECT = Dialect(
    name="litgpt",
    marks=("transformer.wte.weight", S + "attn.proj.weight"),
    families=(
        Family(
            name="llama",
            model_types=("llama", "mistral", "gemma", "olmo", "qwen2", "qwen3"),
            rules=_DENSE,
        ),
        Family(
            name="qwen3_moe",
            model_types=("qwen3_moe",),
            rules=(*_TOP, *_ATTENTION, *_NORMS, *_EXPERTS),
        ),
        Family(
            name="mixtral",
            model_types=("mixtral",),
            rules=(
                *_TOP,
                *_ATTENTION,
                *_NORMS,
                *renamed(_EXPERTS, targets=_MIXTRAL_NAMES),
            ),
        ),
        Family(
            name="gemma2",
            model_types=("gemma2", "gemma3_text"),
            rules=(*_TOP, *_ATTENTION, *_AROUND, *_MLP),
        ),
        Family(
            name="olmo2",
            model_types=("olmo2",),
            rules=(*_TOP, *_ATTENTION, *_BEHIND, *_MLP),
        ),
        Family(name="phi3", model_types=("phi3",), rules=_PHI3),
        Family(name="phi", model_types=("phi",), rules=_PHI),
        Family(name="gpt_neox", model_types=("gpt_neox",), rules=_GPT_NEOX),
    ),
)
