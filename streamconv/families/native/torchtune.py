"""torchtune's names: ``attn`` and ``mlp`` in numbered layers, norms with a ``scale``.

Rotary embedding is kept in pairs of rows, but for Qwen (which works as HuggingFace's does) and Phi
(whose rows torchtune hands on as they are). A tied output layer is not stored.
"""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import L
from streamconv.families.native.dialect import Dialect
from streamconv.families.rules import Family, How, Rule, moved, rule

S = "layers.{layer}."
_KINDS = ("weight", "bias")


def _norms(names: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(
        rule(f"{source}.scale", f"{target}.weight", ops.copy) for source, target in names.items()
    )


_TOP = (
    *moved("", "", {"tok_embeddings": "model.embed_tokens", "output": "lm_head"}, ops.copy),
    *_norms(
        {
            "norm": "model.norm",
            S + "sa_norm": L + "input_layernorm",
            S + "mlp_norm": L + "post_attention_layernorm",
        }
    ),
    *moved(S + "attn.", L + "self_attn.", {"output_proj": "o_proj"}, ops.copy),
)
_MLP = moved(
    S + "mlp.", L + "mlp.", {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}, ops.copy
)


def _attention(queries: How, keys: How) -> tuple[Rule, ...]:
    return tuple(
        r
        for name, how in (("q_proj", queries), ("k_proj", keys), ("v_proj", ops.copy))
        for r in moved(S + "attn.", L + "self_attn.", {name: name}, how, _KINDS)
    )


_QK_NORM = _norms({f"{S}attn.{x}_norm": f"{L}self_attn.{x}_norm" for x in "qk"})

_FUSED = (
    rule(
        tuple(f"{S}attn.{x}_proj.weight" for x in "qkv"),
        L + "self_attn.qkv_proj.weight",
        ops.fused_qkv,
    ),
    rule(
        (S + "mlp.w1.weight", S + "mlp.w3.weight"),
        L + "mlp.gate_up_proj.weight",
        ops.fused_gate_up,
    ),
    *moved(S + "mlp.", L + "mlp.", {"w2": "down_proj"}, ops.copy),
)

DIALECT = Dialect(
    name="torchtune",
    marks=("tok_embeddings.weight", S + "attn.output_proj.weight"),
    families=(
        Family(
            name="llama",
            model_types=("llama", "mistral", "gemma"),
            rules=(*_TOP, *_attention(ops.paired_queries, ops.paired_keys), *_MLP),
        ),
        Family(
            name="qwen",
            model_types=("qwen2", "qwen3"),
            rules=(*_TOP, *_attention(ops.copy, ops.copy), *_QK_NORM, *_MLP),
        ),
        Family(name="phi3", model_types=("phi3",), rules=(*_TOP, *_FUSED)),
    ),
    refused={
        "gemma2": "torchtune runs mlp_norm before the MLP and mlp_scale behind it, and its own map to "
        "HuggingFace has the two the other way round: which of both a checkpoint means is not known"
    },
)
