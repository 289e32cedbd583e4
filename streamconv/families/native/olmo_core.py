"""OLMo-core's names: ``blocks.N``, the output layer with the last norm in it.

Rotary embedding works as HuggingFace's does, so no row moves. A block has the same norms' names whether
they stand before attention and MLP (Llama, Qwen3), behind them (OLMo 2 and 3) or both (Gemma 3): the
model type of config.json says where.
"""

from __future__ import annotations

from streamconv.errors import BadInputError
from streamconv.families import ops
from streamconv.families.blocks import L
from streamconv.families.native.dialect import Dialect
from streamconv.families.ops import Tensor
from streamconv.families.rules import Dims, Family, How, Rule, moved, rule

S = "blocks.{layer}."


def _minus_one(_: Dims, weight: Tensor) -> Tensor:
    """``w``, multiplied with, → ``w - 1``, to which the class adds 1."""
    return weight - 1


def _parts(norms: dict[str, str], norm: How = ops.copy) -> tuple[Rule, ...]:
    kinds = ("weight", "bias")
    attention = {"w_q": "q_proj", "w_k": "k_proj", "w_v": "v_proj", "w_out": "o_proj"}
    return (
        *moved("", "", {"embeddings": "model.embed_tokens", "lm_head.w_out": "lm_head"}, ops.copy),
        *moved("", "", {"lm_head.norm": "model.norm"}, norm),
        *moved(S + "attention.", L + "self_attn.", attention, ops.copy, kinds),
        *moved(S + "attention.", L + "self_attn.", {"q_norm": "q_norm", "k_norm": "k_norm"}, norm),
        *moved(S, L, norms, norm),
    )


_MLP = moved(
    S + "feed_forward.",
    L + "mlp.",
    {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
    ops.copy,
)


def _expert_rows(dims: Dims, tensor: Tensor) -> Tensor:
    """``[E·in, out]`` → ``[E, out, in]``."""
    return _by_expert(dims, tensor, tensor.shape[-1]).transpose(1, 2)


def _router(dims: Dims, tensor: Tensor) -> Tensor:
    """``[E·H]`` → ``[E, H]``."""
    return _by_expert(dims, tensor, dims.hidden)[:, 0] if tensor.dim() == 1 else tensor


def _by_expert(dims: Dims, tensor: Tensor, width: int) -> Tensor:
    if not dims.experts or tensor.numel() % (dims.experts * width):
        raise BadInputError(
            "the experts of config.json do not make up this tensor",
            expected=f"rows of {dims.experts} experts",
            found=str(list(tensor.shape)),
        )
    return tensor.reshape(dims.experts, -1, width)


_MOE = S + "feed_forward_moe."
_EXPERTS = (
    rule(_MOE + "router.weight", L + "mlp.gate.weight", _router),
    *(
        rule(f"{_MOE}experts.mlp.{w}", f"{L}mlp.experts.{{expert}}.{name}.weight", _expert_rows)
        for w, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    ),
)

_BEFORE = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
_BEHIND = {
    "attention_norm": "post_attention_layernorm",
    "feed_forward_norm": "post_feedforward_layernorm",
}
_AROUND = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "post_feed_forward_norm": "post_feedforward_layernorm",
}

DIALECT = Dialect(
    name="OLMo-core",
    marks=("embeddings.weight", S + "attention.w_out.weight"),
    families=(
        Family(name="llama", model_types=("llama", "qwen3"), rules=(*_parts(_BEFORE), *_MLP)),
        Family(name="olmo2", model_types=("olmo2", "olmo3"), rules=(*_parts(_BEHIND), *_MLP)),
        Family(
            name="gemma3",
            model_types=("gemma3_text",),
            rules=(*_parts(_AROUND, _minus_one), *_MLP),
        ),
        Family(name="flex_olmo", model_types=("flex_olmo",), rules=(*_parts(_BEHIND), *_EXPERTS)),
    ),
)
