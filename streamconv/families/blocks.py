"""Tables of rules that families share: embeddings, attention, MLPs, experts, multi-token prediction.

Left are Megatron-Core's canonical names (:mod:`streamconv.formats.megatron.names`), right
HuggingFace's. A norm has two homes: fused into the projection after it (Transformer Engine) or a
module of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from streamconv.families import ops
from streamconv.families.ops import Tensor
from streamconv.families.rules import Dims, Rule, moved, renamed, rule

D = "decoder.layers.{layer}."
L = "model.layers.{layer}."

TOP = (
    rule("embedding.word_embeddings.weight", "model.embed_tokens.weight", ops.vocab),
    rule("decoder.final_layernorm.weight", "model.norm.weight", ops.copy),
    rule("output_layer.weight", "lm_head.weight", ops.vocab),
)

INPUT_NORM = (
    rule(D + "self_attention.linear_qkv.layer_norm_weight", L + "input_layernorm.weight", ops.copy),
    rule(D + "input_layernorm.weight", L + "input_layernorm.weight", ops.copy),
)

QKV = tuple(
    rule(
        f"{D}self_attention.linear_qkv.{kind}",
        tuple(f"{L}self_attn.{p}_proj.{kind}" for p in "qkv"),
        ops.qkv,
    )
    for kind in ("weight", "bias")
)

OUT = tuple(
    rule(f"{D}self_attention.linear_proj.{kind}", f"{L}self_attn.o_proj.{kind}", ops.copy)
    for kind in ("weight", "bias")
)

QK_NORM = tuple(
    rule(f"{D}self_attention.{p}_layernorm.weight", f"{L}self_attn.{p}_norm.weight", ops.copy)
    for p in "qk"
)

# Norms over all heads at once, which slime and ms-swift build beside Megatron's attention.
WIDE_QK_NORM = tuple(
    rule(f"{D}self_attention.{p}_norm.weight", f"{L}self_attn.{p}_norm.weight", ops.copy)
    for p in "qk"
)

ATTENTION = (*INPUT_NORM, *QKV, *OUT, *QK_NORM)

MLP_NORM = (
    rule(D + "mlp.linear_fc1.layer_norm_weight", L + "post_attention_layernorm.weight", ops.copy),
    rule(D + "pre_mlp_layernorm.weight", L + "post_attention_layernorm.weight", ops.copy),
)

MLP = (
    *MLP_NORM,
    *(
        r
        for kind in ("weight", "bias")
        for r in (
            rule(
                f"{D}mlp.linear_fc1.{kind}",
                (f"{L}mlp.gate_proj.{kind}", f"{L}mlp.up_proj.{kind}"),
                ops.gate_up,
            ),
            rule(f"{D}mlp.linear_fc2.{kind}", f"{L}mlp.down_proj.{kind}", ops.copy),
        )
    ),
)

ROUTER = (rule(D + "mlp.router.weight", L + "mlp.gate.weight", ops.copy),)

EXPERT_BIAS = (
    rule(D + "mlp.router.expert_bias", L + "mlp.gate.e_score_correction_bias", ops.copy),
)

EXPERTS = (
    rule(
        D + "mlp.experts.experts.linear_fc1.weight",
        (
            L + "mlp.experts.{expert}.gate_proj.weight",
            L + "mlp.experts.{expert}.up_proj.weight",
        ),
        ops.expert_gate_up,
    ),
    rule(
        D + "mlp.experts.experts.linear_fc2.weight",
        L + "mlp.experts.{expert}.down_proj.weight",
        ops.experts,
    ),
)

SHARED_EXPERTS = (
    rule(
        D + "mlp.shared_experts.linear_fc1.weight",
        (L + "mlp.shared_experts.gate_proj.weight", L + "mlp.shared_experts.up_proj.weight"),
        ops.gate_up,
    ),
    rule(
        D + "mlp.shared_experts.linear_fc2.weight",
        L + "mlp.shared_experts.down_proj.weight",
        ops.copy,
    ),
)

# The shared expert of Qwen: named in the singular, and with a gate.
GATED_SHARED_EXPERT = (
    *renamed(SHARED_EXPERTS, targets={"shared_experts": "shared_expert"}),
    rule(D + "mlp.shared_experts.gate_weight", L + "mlp.shared_expert_gate.weight", ops.copy),
)

DENSE = (*TOP, *ATTENTION, *MLP)
MOE = (*DENSE, *ROUTER, *EXPERTS)

MLA = (
    rule(D + "input_layernorm.weight", L + "input_layernorm.weight", ops.copy),
    rule(D + "self_attention.linear_q_proj.weight", L + "self_attn.q_proj.weight", ops.copy),
    rule(D + "self_attention.linear_q_down_proj.weight", L + "self_attn.q_a_proj.weight", ops.copy),
    rule(D + "self_attention.linear_q_up_proj.weight", L + "self_attn.q_b_proj.weight", ops.copy),
    rule(
        D + "self_attention.linear_kv_down_proj.weight",
        L + "self_attn.kv_a_proj_with_mqa.weight",
        ops.copy,
    ),
    rule(D + "self_attention.linear_kv_up_proj.weight", L + "self_attn.kv_b_proj.weight", ops.copy),
    rule(D + "self_attention.linear_proj.weight", L + "self_attn.o_proj.weight", ops.copy),
    *(
        rule(D + f"self_attention.{norm}", L + f"self_attn.{part}_a_layernorm.weight", ops.copy)
        for part in ("q", "kv")
        for norm in (f"linear_{part}_up_proj.layer_norm_weight", f"{part}_layernorm.weight")
    ),
)


# The indexer of DeepSeek's sparse attention (DSA), which chooses what a token attends to.
_INDEXER = L + "self_attn.indexer."
INDEXER = (
    *(
        rule(f"{D}self_attention.core_attention.indexer.{source}", _INDEXER + target, ops.copy)
        for source, target in (
            ("linear_wq_b.weight", "wq_b.weight"),
            ("linear_wk.weight", "wk.weight"),
            ("k_norm.weight", "k_norm.weight"),
            ("k_norm.bias", "k_norm.bias"),
            ("linear_weights_proj.weight", "weights_proj.weight"),
        )
    ),
    # slime's own module has the part with rotary positions first.
    *(
        rule(f"{D}self_attention.{name}", _INDEXER + name, ops.swapped_index_heads)
        for name in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias")
    ),
    rule(D + "self_attention.weights_proj.weight", _INDEXER + "weights_proj.weight", ops.copy),
)


def mtp(layer_rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return the rules of layers for multi-token prediction, kept as layers after the last one.

    Their own layer follows ``layer_rules``. The released models repeat the embedding and the output
    layer in each of them, and what serves them reads it there; Megatron shares them.
    """
    source, target = "mtp.layers.{mtp}.", "model.layers.{mtp_layer}."
    return (
        rule(
            (source + "enorm.weight", "embedding.word_embeddings.weight"),
            (target + "enorm.weight", target + "embed_tokens.weight"),
            with_vocab,
        ),
        rule(source + "hnorm.weight", target + "hnorm.weight", ops.copy),
        rule(source + "eh_proj.weight", target + "eh_proj.weight", ops.copy),
        rule(
            (source + "final_layernorm.weight", "output_layer.weight"),
            (target + "shared_head.norm.weight", target + "shared_head.head.weight"),
            with_vocab,
        ),
        *mtp_layer(layer_rules, target),
    )


def plain_mtp(layer_rules: Iterable[Rule], target: str, behind: str) -> tuple[Rule, ...]:
    """The same where nothing is repeated; ``behind`` is the name of the norm after the layer.

    ``target`` is the prefix of such a layer in HuggingFace's names.
    """
    source = "mtp.layers.{mtp}."
    same = {name: name for name in ("enorm", "hnorm", "eh_proj")}
    return (
        *moved(source, target, same | {"final_layernorm": behind}, ops.copy),
        *mtp_layer(layer_rules, target),
    )


def mtp_beside(layer_rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same of one layer that is beside the model and not in it, under the names of Qwen3-Next."""
    names = {
        "enorm": "pre_fc_norm_embedding",
        "hnorm": "pre_fc_norm_hidden",
        "eh_proj": "fc",
        "final_layernorm": "norm",
    }
    return (
        *moved("mtp.layers.{mtp}.", "mtp.", names, ops.copy),
        *mtp_layer(layer_rules, "mtp.layers.{mtp}."),
    )


def with_vocab(dims: Dims, norm: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
    """A norm, and a repeated embedding or output layer without padding."""
    return norm, ops.vocab(dims, shared)


def mtp_layer(layer_rules: Iterable[Rule], target: str) -> tuple[Rule, ...]:
    """Return the rules of the layer within ``mtp.layers.{mtp}``, which HuggingFace calls ``target``."""
    return renamed(
        layer_rules, sources={D: "mtp.layers.{mtp}.transformer_layer."}, targets={L: target}
    )
