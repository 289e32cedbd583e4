"""Weights that become fp8: which of a model's do, and what config.json says of them then.

What stays as it is, released models keep so: norms, embeddings, heads, routers, convolutions, vision
towers, biases. A matrix is quantized where its name says that it is a projection of the language model.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from streamconv.errors import UsageError
from streamconv.executor.windows import ENCODE_BYTES
from streamconv.ir.dtypes import BY_NAME, F32, DType
from streamconv.ir.recipe import Cast, Encode, Recipe
from streamconv.quantization.decoding import Decoded
from streamconv.quantization.scales import without

_BLOCK = (128, 128)
_E4M3 = BY_NAME["F8_E4M3"]
_PROJECTION = re.compile(
    r"(?:(?:q|k|v|o|qkv|gate|up|down|gate_up|q_a|q_b|kv_a|kv_b|out)_proj(?:_with_mqa)?"
    r"|in_proj_(?:qkvz|qkv|z)|wq_[ab]|w[123])\.weight"
)
_STAYS = re.compile(
    r"(?:^|\.)(?:visual|vision\w*|audio\w*|image\w*|multi_modal_projector|mtp_block|indexer|router"
    r"|shared_expert_gate|eh_proj)(?:\.|$)"
)
# What serving engines read as one matrix: all of it is quantized, or nothing.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def chosen_weights(recipes: Sequence[Recipe], rule: str, kept: Collection[str]) -> frozenset[str]:
    """Return which weights are quantized; ``kept`` are patterns of names that stay as they are.

    Raises :class:`UsageError` where there are none.
    """
    chosen = {r.name for r in recipes if _fits(r, kept)}
    names = {r.name for r in recipes}
    for group in _FUSED:
        for name in sorted(names):
            module, _, leaf = name.removesuffix(".weight").rpartition(".")
            if leaf in group:
                parts = {f"{module}.{part}.weight" for part in group} & names
                if not parts <= chosen:
                    chosen -= parts
    if not chosen:
        raise UsageError(f"--quantize {rule}: no weight of this model can be quantized")
    return frozenset(chosen)


def others_as(
    dtype: DType, recipes: Sequence[Recipe], chosen: Collection[str], decoded: Decoded | None
) -> list[Recipe]:
    """Return the recipes with what was quantized and is not ``chosen`` cast to ``dtype``."""
    return [
        _cast(r, dtype)
        if r.name not in chosen and decoded is not None and decoded.takes_part(r)
        else r
        for r in recipes
    ]


def quantized(recipes: Sequence[Recipe], rule: str, chosen: Collection[str]) -> list[Recipe]:
    """Return the recipes with codes and scales in the place of ``chosen``, the scales right behind."""
    made = []
    for r in recipes:
        if r.name in chosen:
            made += _pair(r, rule)
        else:
            made.append(r)
    return made


def _fits(r: Recipe, kept: Collection[str]) -> bool:
    shape = r.view.shape
    return (
        r.dtype.castable
        and len(shape) == 2
        # Behind its codes a scale of float32 must be aligned.
        and math.prod(shape) % 4 == 0
        and 0 < shape[1] <= ENCODE_BYTES // 4
        and _PROJECTION.fullmatch(".".join(r.name.split(".")[-2:])) is not None
        and _STAYS.search(r.name) is None
        and not any(fnmatch.fnmatchcase(r.name, p) for p in kept)
    )


def _pair(r: Recipe, rule: str) -> list[Recipe]:
    rows, columns = r.view.shape
    block = (1, columns) if rule == "fp8-channel" else _BLOCK
    scale = f"{r.name}_scale" if rule == "fp8-channel" else f"{r.name}_scale_inv"
    floats = _cast(r, F32).view
    codes = Encode(rule, block, (rows, columns), "codes")
    scales = dataclasses.replace(codes, part="scales")
    return [Recipe(r.name, _E4M3, floats, codes), Recipe(scale, F32, floats, scales)]


def _cast(r: Recipe, dtype: DType) -> Recipe:
    if r.dtype == dtype and (dtype != F32 or not r.view.ops):
        return r
    view = dataclasses.replace(r.view, ops=(*r.view.ops, Cast(dtype)))
    return Recipe(r.name, dtype, view)


def described(
    config: Mapping[str, Any], recipes: Sequence[Recipe], rule: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the config of a model that ``rule`` has quantized, and what was changed."""
    changed, _ = without(config)
    stays = [
        r.name.removesuffix(".weight")
        for r in recipes
        if r.encode is None and len(r.view.shape) == 2 and r.name.endswith(".weight")
    ]
    if rule == "fp8-channel":
        said: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "ignore": stays,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": _eight_bits("channel", dynamic=False),
                    "input_activations": _eight_bits("token", dynamic=True),
                }
            },
        }
    else:
        said = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(_BLOCK),
            "modules_to_not_convert": stays,
            # vLLM of before 0.11 reads this name only.
            "ignored_layers": stays,
        }
        if rule.endswith("ue8m0"):
            said["scale_fmt"] = "ue8m0"
    changed["quantization_config"] = said
    count = sum(1 for r in recipes if r.encode is not None and r.encode.part == "codes")
    return changed, [
        f"config.json: quantization_config says that {count} weights are quantized ({rule})"
    ]


def _eight_bits(strategy: str, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "dynamic": dynamic,
        "strategy": strategy,
    }
