"""DeepSeek V2 to V3.2, Kimi-K2, Moonlight, GLM-4.7-Flash, GLM-5: latent attention, shared experts.

The first layers are dense. V3.2 and GLM-5 choose what a token attends to (DSA); V4 has attention of its
own, and hyper-connections.
"""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import (
    EXPERT_BIAS,
    EXPERTS,
    INDEXER,
    MLA,
    MLP,
    ROUTER,
    SHARED_EXPERTS,
    TOP,
    D,
    L,
    mtp,
)
from streamconv.families.rules import (
    Dims,
    Family,
    Rule,
    borrowing,
    moved,
    prefixed,
    renamed,
    rule,
    without_class,
)
from streamconv.tracing.later import torch

_LAYER = (*MLA, *INDEXER, *MLP, *ROUTER, *EXPERT_BIAS, *EXPERTS, *SHARED_EXPERTS)


# DeepSeek-V3 under a model type of its own, which transformers lacks.
KIMI = borrowing({"kimi_k2": ("deepseek_v3", "DeepseekV3ForCausalLM")})

# Without layers for multi-token prediction.
KIMI_K2 = (*TOP, *_LAYER)

# DeepSeek-V4's files have DeepSeek's own names.
_N = "layers.{layer}."
_A = D + "self_attention."
_CORE = _A + "core_attention."


def _compressor(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *moved(
            source, target, {"linear_wkv": "wkv", "linear_wgate": "wgate", "norm": "norm"}, ops.copy
        ),
        rule(source + "ape", target + "ape", ops.copy),
    )


def _joined(_: Dims, *parts: ops.Tensor) -> ops.Tensor:
    """Three numbers → one tensor of them."""
    return torch.cat([part.reshape(1) for part in parts])


_V4 = (
    rule(D + "input_layernorm.weight", _N + "attn_norm.weight", ops.copy),
    rule(D + "pre_mlp_layernorm.weight", _N + "ffn_norm.weight", ops.copy),
    *moved(
        _A,
        _N + "attn.",
        {
            "linear_q_down_proj": "wq_a",
            "q_layernorm": "q_norm",
            "linear_q_up_proj": "wq_b",
            "linear_kv_proj": "wkv",
            "kv_layernorm": "kv_norm",
            "linear_proj": "wo_b",
        },
        ops.copy,
    ),
    rule(_A + "linear_o_group_proj", _N + "attn.wo_a.weight", ops.copy),
    rule(_CORE + "attn_sink", _N + "attn.attn_sink", ops.copy),
    *_compressor(_CORE + "compressor.", _N + "attn.compressor."),
    *_compressor(_CORE + "indexer.compressor.", _N + "attn.indexer.compressor."),
    *moved(
        _CORE + "indexer.",
        _N + "attn.indexer.",
        {"linear_wq_b": "wq_b", "linear_weights_proj": "scorer.weights_proj"},
        ops.copy,
    ),
    rule(D + "mlp.router.weight", _N + "ffn.gate.weight", ops.copy),
    rule(D + "mlp.router.expert_bias", _N + "ffn.gate.bias", ops.copy),
    rule(D + "mlp.router.tid2eid", _N + "ffn.gate.tid2eid", ops.copy),
    *renamed(
        (*EXPERTS, *SHARED_EXPERTS),
        targets={
            L + "mlp.": _N + "ffn.",
            "gate_proj": "w1",
            "up_proj": "w3",
            "down_proj": "w2",
        },
    ),
    *(
        r
        for block, name in (("self_attention", "attn"), ("mlp", "ffn"))
        for r in (
            rule(f"{D}{block}_hyper_connection.mapping_proj.weight", f"{_N}hc_{name}_fn", ops.copy),
            rule(f"{D}{block}_hyper_connection.bias", f"{_N}hc_{name}_base", ops.copy),
            rule(
                tuple(f"{D}{block}_hyper_connection.alpha_{x}" for x in ("pre", "post", "res")),
                f"{_N}hc_{name}_scale",
                _joined,
            ),
        )
    ),
)
_V4_HEAD_OF_MTP = tuple(
    rule(f"hc_head_{x}", f"hc_head_{x}", ops.copy) for x in ("fn", "base", "scale")
)
_V4_HEAD = prefixed(_V4_HEAD_OF_MTP, sources="decoder.")

FAMILIES = (
    Family(
        name="deepseek",
        model_types=(
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "kimi_k2",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "sarvam_mla",
        ),
        rules=(*TOP, *_LAYER, *mtp(_LAYER)),
        extras=("model.layers.{mtp_layer}.{rest}",),
        reference=KIMI,
    ),
    Family(
        name="deepseek_v4",
        model_types=("deepseek_v4",),
        rules=(
            rule("embedding.word_embeddings.weight", "embed.weight", ops.vocab),
            rule("decoder.final_layernorm.weight", "norm.weight", ops.copy),
            rule("output_layer.weight", "head.weight", ops.vocab),
            *_V4_HEAD,
            *_V4,
            *prefixed(_V4_HEAD_OF_MTP, sources="mtp.layers.{mtp}.", targets="mtp.{mtp}."),
            *moved(
                "mtp.layers.{mtp}.",
                "mtp.{mtp}.",
                {n: n for n in ("enorm", "hnorm", "e_proj", "h_proj")}
                | {"final_layernorm": "norm"},
                ops.copy,
            ),
            *renamed(
                _V4,
                sources={D: "mtp.layers.{mtp}.transformer_layer."},
                targets={"layers.{layer}.": "mtp.{mtp}."},
            ),
        ),
        reference=without_class,
        parts=(
            *(f"self_attention.core_attention.{module}." for module in ("indexer", "compressor")),
            *(f"mlp.router.{name}" for name in ("tid2eid", "expert_bias")),
        ),
    ),
)
