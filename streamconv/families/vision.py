"""Rules for vision towers that Megatron's own modules hold.

Where a trainer keeps HuggingFace's module instead, names and values stay as they are and one rule
with ``{rest}`` does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from streamconv.families import ops
from streamconv.families.rules import Dims, How, Rule, prefixed, renamed, rule

B = "vision_model.decoder.layers.{layer}."

# HuggingFace's prefixes of a language model within another, and modules that often stand beside it.
WITHIN = ("language_model.model.", "language_model.lm_head.")
BESIDE = {name: name for name in ("vision_tower", "multi_modal_projector")}


def joined_qkv(dims: Dims, tensor: ops.Tensor) -> ops.Tensor:
    """``[heads·3·d, …]`` → ``[3·heads·d, …]``: Megatron keeps q, k and v of a head together."""
    heads = dims.vision.number("num_heads", "num_attention_heads")
    per_head = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
    return per_head.transpose(0, 1).flatten(0, 2)


def qkv(dims: Dims, tensor: ops.Tensor) -> tuple[ops.Tensor, ...]:
    """``[heads·3·d, …]`` → q, k and v ``[heads·d, …]``."""
    return joined_qkv(dims, tensor).chunk(3)


def kept(modules: Mapping[str, str]) -> tuple[Rule, ...]:
    """Return the rules of modules that are HuggingFace's own, by Megatron's and HuggingFace's prefix.

    ms-swift has them all in one module ``visual``, under their last name in HuggingFace's model.
    """
    swift = {f"visual.{target.rpartition('.')[2]}": target for target in modules.values()}
    return tuple(
        rule(source + ".{rest}", target + ".{rest}", ops.copy)
        for source, target in (*swift.items(), *modules.items())
    )


def language(
    rules: Iterable[Rule], model: str, head: str = "lm_head.", *, below: str = "language_model."
) -> tuple[Rule, ...]:
    """Return the rules of a language model that is a part of a model.

    ``model`` and ``head`` are HuggingFace's prefixes of it, ``below`` Megatron's.
    """
    targets = {"model.": model, "lm_head.": head}  # what is put in has "model." in it, too
    return prefixed(renamed(rules, targets=targets), sources=below)


def both(source: str, target: str, how: How = ops.copy) -> tuple[Rule, ...]:
    """Return the rules of a module's weight and bias."""
    return tuple(rule(f"{source}.{x}", f"{target}.{x}", how) for x in ("weight", "bias"))


def norm(source: str, target: str) -> tuple[Rule, ...]:
    """Return the rules of a norm that is fused into the projection after it."""
    return tuple(
        rule(f"{source}.layer_norm_{x}", f"{target}.{x}", ops.copy) for x in ("weight", "bias")
    )


def together(sources: Mapping[str, str]) -> Rule:
    """Return the rule of tensors that are copied, and are all there or none.

    Of a model that transformers has no class for, nothing else tells that one is missing.
    """
    return rule(tuple(sources), tuple(sources.values()), lambda _, *tensors: tensors)


def blocks(target: str) -> tuple[Rule, ...]:
    """Return the rules of attention and norms; ``target`` is HuggingFace's prefix of a layer."""
    return (
        *norm(B + "self_attention.linear_qkv", target + "norm1"),
        *both(B + "self_attention.linear_qkv", target + "attn.qkv", joined_qkv),
        *both(B + "self_attention.linear_proj", target + "attn.proj"),
        *norm(B + "mlp.linear_fc1", target + "norm2"),
    )
