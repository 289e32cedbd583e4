"""torchtitan's names (0.1 to 0.3), and those of Meta's ``consolidated.NN.pth``, from which they come.

0.3 put the projections of queries, keys and values into ``qkv_linear``, the experts into
``routed_experts.inner_experts`` with the letters of their axes behind their names, and calls
``lm_head`` what was ``output``. Llama's rotary embedding works on complex numbers, so its query and key
rows stand in pairs; that of Qwen3 and gpt-oss works as HuggingFace's does; DeepSeek's and Llama 4's is
complex in HuggingFace's models, too. Qwen3.5 (0.3) has a vision tower, and the parts of what its linear
attention fuses one by one.
"""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import L
from streamconv.families.deepseek import KIMI
from streamconv.families.native.dialect import Dialect
from streamconv.families.ops import Tensor
from streamconv.families.prediction import PredictionNames
from streamconv.families.qwen3_next import joined
from streamconv.families.rules import Dims, Family, How, Rule, moved, renamed, rule
from streamconv.tracing.later import torch

S = "layers.{layer}."

_TOP = moved(
    "",
    "",
    {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "lm_head": "lm_head",
        "output": "lm_head",
    },
    ops.copy,
)
_NORMS = moved(
    S, L, {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}, ops.copy
)
_MLP_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MLP = moved(S + "feed_forward.", L + "mlp.", _MLP_NAMES, ops.copy)
_DENSE = (*_TOP, *_NORMS, *_MLP)


def _attention(queries: How, keys: How, kinds: tuple[str, ...] = ("weight",)) -> tuple[Rule, ...]:
    target = L + "self_attn."
    return (
        *moved(S + "attention.", target, {"wo": "o_proj"}, ops.copy, kinds),
        *(
            r
            for source in (S + "attention.", S + "attention.qkv_linear.")
            for letter, how in (("q", queries), ("k", keys), ("v", ops.copy))
            for r in moved(source, target, {f"w{letter}": f"{letter}_proj"}, how, kinds)
        ),
    )


_PAIRED = _attention(ops.paired_queries, ops.paired_keys)
_PLAIN = _attention(ops.copy, ops.copy)
_QK_NORM = moved(
    S + "attention.", L + "self_attn.", {"q_norm": "q_norm", "k_norm": "k_norm"}, ops.copy
)

_MOE = S + "moe."
_INNER = _MOE + "routed_experts.inner_experts."
_EXPERTS = tuple(
    rule(source, L + f"mlp.experts.{{expert}}.{_MLP_NAMES[name]}.weight", ops.experts)
    for name, axes in (("w1", "EFD"), ("w2", "EDF"), ("w3", "EFD"))
    for source in (f"{_MOE}experts.{name}", f"{_INNER}{name}_{axes}")
)
_ROUTER = moved(_MOE, L + "mlp.", {"router.gate": "gate"}, ops.copy)
_SHARED = moved(_MOE + "shared_experts.", L + "mlp.shared_experts.", _MLP_NAMES, ops.copy)
_BIASES = (_MOE + "expert_bias", _MOE + "expert_bias_E")


def _same_pairs(dims: Dims, tensor: Tensor) -> Tensor:
    """A config can ask HuggingFace's DeepSeek for the other order of rows."""
    dims.expect("the order of rotary rows", "pairs", _order(dims))
    return tensor


def _order(dims: Dims) -> str:
    return "halves" if dims.get("rope_interleave") is False else "pairs"


_LATENT = (
    *moved(
        S + "attention.",
        L + "self_attn.",
        {"wkv_a": "kv_a_proj_with_mqa", "wq": "q_proj", "wq_b": "q_b_proj"},
        _same_pairs,
    ),
    *moved(
        S + "attention.",
        L + "self_attn.",
        {
            "wo": "o_proj",
            "wkv_b": "kv_b_proj",
            "wq_a": "q_a_proj",
            "kv_norm": "kv_a_layernorm",
            "q_norm": "q_a_layernorm",
        },
        ops.copy,
    ),
)
_DEEPSEEK_LAYER = (
    *_NORMS,
    *_MLP,
    *_LATENT,
    *_EXPERTS,
    *_ROUTER,
    *_SHARED,
)
_CORRECTED_LAYER = (
    *_DEEPSEEK_LAYER,
    *(rule(bias, L + "mlp.gate.e_score_correction_bias", ops.copy) for bias in _BIASES),
)


def _prediction(layer_rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Layers for multi-token prediction; the released models repeat embedding and output in each."""
    source, target = "mtp_layers.{mtp}.", "model.layers.{mtp_layer}."
    return (
        rule(
            (source + "enorm.weight", "tok_embeddings.weight"),
            (target + "enorm.weight", target + "embed_tokens.weight"),
            _both,
        ),
        rule(
            (source + "mtp_norm.weight", "lm_head.weight"),
            (target + "shared_head.norm.weight", target + "shared_head.head.weight"),
            _both,
        ),
        *moved(source, target, {"hnorm": "hnorm", "eh_proj": "eh_proj"}, ops.copy),
        *renamed(layer_rules, sources={S: source}, targets={L: target}),
    )


def _both(_: Dims, one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    return one, other


def _columns(dims: Dims, gate: Tensor, up: Tensor) -> Tensor:
    """Gate ``[E, I, H]``, up ``[E, I, H]`` → ``[E, H, 2I]``."""
    return torch.cat((ops.expert_columns(dims, gate), ops.expert_columns(dims, up)), dim=2)


_LLAMA4 = (
    *_TOP,
    *_NORMS,
    *_PLAIN,
    *moved(S + "feed_forward.", L + "feed_forward.", _MLP_NAMES, ops.copy),
    *moved(_MOE, L + "feed_forward.", {"router.gate": "router"}, ops.copy),
    *moved(_MOE + "shared_experts.", L + "feed_forward.shared_expert.", _MLP_NAMES, ops.copy),
    rule(
        (_MOE + "experts.w1", _MOE + "experts.w3"),
        L + "feed_forward.experts.gate_up_proj",
        _columns,
    ),
    rule(_MOE + "experts.w2", L + "feed_forward.experts.down_proj", ops.expert_columns),
)

_GPT_OSS = (
    *_TOP,
    *_NORMS,
    *_attention(ops.copy, ops.copy, ("weight", "bias")),
    rule(S + "attention.sinks", L + "self_attn.sinks", ops.copy),
    *moved(_MOE, L + "mlp.", {"router.gate": "router"}, ops.copy, ("weight", "bias")),
    *(
        rule(source, f"{L}mlp.experts.{target}", how)
        for name, axes, target, how in (
            ("mlp1_weight", "EGD", "gate_up_proj", ops.expert_columns),
            ("mlp1_bias", "EG", "gate_up_proj_bias", ops.experts),
            ("mlp2_weight", "EDF", "down_proj", ops.expert_columns),
            ("mlp2_bias", "ED", "down_proj_bias", ops.experts),
        )
        for source in (f"{_MOE}experts.{name}", f"{_INNER}{name}", f"{_INNER}{name}_{axes}")
    ),
)

_LINEAR = L + "linear_attn."
_HYBRID_LAYER = (
    *_NORMS,
    *_MLP,
    *moved(
        S + "attn.",
        L + "self_attn.",
        {
            **{f"w{x}": f"{x}_proj" for x in "qkvo"},
            **{f"{x}_norm": f"{x}_norm" for x in "qk"},
        },
        ops.copy,
    ),
    *(
        rule(tuple(f"{S}attn.{part}_{x}.weight" for x in "qkv"), _LINEAR + target, joined)
        for part, target in (("in_proj", "in_proj_qkv.weight"), ("conv", "conv1d.weight"))
    ),
    *moved(
        S + "attn.",
        _LINEAR,
        {x: x for x in ("in_proj_z", "in_proj_a", "in_proj_b", "norm", "out_proj")},
        ops.copy,
    ),
    rule(S + "attn.A_log", _LINEAR + "A_log", ops.copy),
    rule(S + "attn.dt_bias", _LINEAR + "dt_bias", ops.copy),
    *_EXPERTS,
    *_ROUTER,
    *renamed(_SHARED, targets={"shared_experts": "shared_expert"}),
    *moved(_MOE, L + "mlp.", {"shared_experts.gate": "shared_expert_gate"}, ops.copy),
)
_HYBRID = (*_TOP, *_HYBRID_LAYER)


def _patches(dims: Dims, tensor: Tensor) -> Tensor:
    """``[H, C·T·P·P]`` → ``[H, C, T, P, P]``: a projection of patches is a convolution."""
    channels = dims.vision.number("in_channels")
    size = dims.vision.number("patch_size")
    frames = dims.vision.number("temporal_patch_size")
    return tensor.reshape(tensor.shape[0], channels, frames, size, size)


_VISION, _VISUAL = "vision_encoder.", "model.visual."
_BLOCK, _VISUAL_BLOCK = _VISION + "layers.{layer}.", _VISUAL + "blocks.{layer}."
_KINDS = ("weight", "bias")
_TOWER = (
    rule(_VISION + "patch_embed.weight", _VISUAL + "patch_embed.proj.weight", _patches),
    rule(_VISION + "patch_embed.bias", _VISUAL + "patch_embed.proj.bias", ops.copy),
    rule(_VISION + "pos_embed", _VISUAL + "pos_embed.weight", ops.copy),
    *(
        rule(
            tuple(f"{_BLOCK}attn.w{x}.{kind}" for x in "qkv"),
            f"{_VISUAL_BLOCK}attn.qkv.{kind}",
            ops.fused_qkv,
        )
        for kind in _KINDS
    ),
    *moved(
        _BLOCK,
        _VISUAL_BLOCK,
        {x: x for x in ("norm1", "norm2", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")},
        ops.copy,
        _KINDS,
    ),
    *moved(
        _VISION + "merger.",
        _VISUAL + "merger.",
        {x: x for x in ("norm", "linear_fc1", "linear_fc2")},
        ops.copy,
        _KINDS,
    ),
)

_UNBIASED = tuple(
    (bias, "balances the load of experts: HuggingFace's model has no bias of the router's choice")
    for bias in _BIASES
)

DIALECT = Dialect(
    name="torchtitan (or Meta's llama)",
    marks=("tok_embeddings.weight", S + "attention_norm.weight", S + "ffn_norm.weight"),
    families=(
        Family(name="llama", model_types=("llama", "mistral"), rules=(*_DENSE, *_PAIRED)),
        Family(name="qwen3", model_types=("qwen3",), rules=(*_DENSE, *_PLAIN, *_QK_NORM)),
        Family(
            name="qwen3_moe",
            model_types=("qwen3_moe",),
            rules=(*_DENSE, *_PLAIN, *_QK_NORM, *_EXPERTS, *_ROUTER),
            dropped=_UNBIASED,
        ),
        Family(
            name="deepseek",
            model_types=("deepseek_v3", "kimi_k2"),
            rules=(*_TOP, *_CORRECTED_LAYER, *_prediction(_CORRECTED_LAYER)),
            extras=("model.layers.{mtp_layer}.{rest}",),
            reference=KIMI,
        ),
        Family(
            name="deepseek_v2",
            model_types=("deepseek_v2",),
            rules=(*_TOP, *_DEEPSEEK_LAYER),
            dropped=_UNBIASED,
        ),
        Family(name="llama4", model_types=("llama4_text",), rules=_LLAMA4, dropped=_UNBIASED),
        Family(
            name="qwen3_5_text",
            model_types=("qwen3_5_text", "qwen3_5_moe_text"),
            rules=_HYBRID,
            dropped=_UNBIASED,
        ),
        Family(
            name="qwen3_5",
            model_types=("qwen3_5", "qwen3_5_moe"),
            rules=(*renamed(_HYBRID, targets={"model.": "model.language_model."}), *_TOWER),
            dropped=_UNBIASED,
        ),
        Family(name="gpt_oss", model_types=("gpt_oss",), rules=_GPT_OSS, dropped=_UNBIASED),
    ),
    dropped=(
        ("rope.freqs", "rotary embedding, which is computed"),
        ("freqs_cis", "rotary embedding, which is computed"),
    ),
    prediction=PredictionNames(
        layers="layers.",
        predicting="mtp_layers.",
        inner="",
        final="norm.weight",
        behind="mtp_norm.weight",
    ),
)
