"""What the tests of families share: a tiny model taken apart, and a plan without files."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scripts.makers.megatron_inverse import invert
from scripts.makers.megatron_walk import Walk
from scripts.makers.tiny_families import FAMILIES, TinyModel, make
from streamconv.families import convert as family_conversion
from streamconv.families.converted import Converted
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import DType
from streamconv.options import JobOptions
from streamconv.planning import checks
from tests.replay import dtype_of


@dataclass(frozen=True, slots=True)
class Case:
    """A tiny model and the form that Megatron keeps it in."""

    name: str
    inverse: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.inverse)])


KEPT_TOWER = (("megatron_tower", False),)
CASES = (
    *map(Case, FAMILIES),
    Case("qwen2_5_vl", KEPT_TOWER),
    Case("qwen3_5_vl", KEPT_TOWER),
    Case("gemma3_vl", KEPT_TOWER),
    Case("internvl_chat", (("megatron_tower", True),)),
    Case("deepseek_v32_wide", (("variant", "indexer of slime"),)),
    Case("olmoe", (("variant", "wide norms"),)),
    Case("glm4", (("variant", "norms of ms-swift"),)),
    *(Case(name, (("swift", True),)) for name in ("qwen3_omni", "glm4v", "internvl")),
    Case("llama", (("variant", "HybridModel"),)),
    Case("deepseek_v3_mtp", (("variant", "HybridModel"),)),
    Case("qwen3_next_mtp", (("variant", "slime"),)),
    Case("qwen3_5_vl", (("variant", "slime throughout"),)),
    Case("qwen3_next_mtp", (("variant", "ms-swift"),)),
    Case("qwen3_5_vl", (("variant", "ms-swift"),)),
    Case("qwen3_next", (("variant", "ms-swift, decoupled"),)),
    Case("qwen3_5", (("variant", "ms-swift, decoupled"),)),
    Case("qwen3_next", (("variant", "ms-swift, HuggingFace's module"),)),
    Case("qwen3_5", (("variant", "ms-swift, HuggingFace's module"),)),
)


@functools.cache
def taken_apart(case: Case) -> tuple[TinyModel, Walk]:
    model = make(case.name)
    return model, invert(model.config, model.state, **dict(case.inverse))


def plan(
    model: TinyModel,
    tensors: Mapping[str, torch.Tensor | tuple[Shape, DType]],
    megatron_facts: dict[str, Any] | None = None,
) -> Converted:
    """Plan in this process, with the checks that a conversion makes.

    ``tensors`` may be told by shape and dtype alone.
    """
    headers = {
        key: t if isinstance(t, tuple) else (tuple(t.shape), dtype_of(t))
        for key, t in tensors.items()
    }
    converted = family_conversion.convert(headers, model.config, megatron_facts or {}, JobOptions())
    if converted.model is not None:
        checks.check_recipes(converted.recipes, converted.model, JobOptions(), converted.extras)
    return converted
