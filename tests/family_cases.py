"""What the tests of families share: a tiny model taken apart, and a plan without files."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from scripts.makers.megatron_inverse import invert
from scripts.makers.megatron_walk import Walk
from scripts.makers.tiny_families import State, TinyModel, make
from streamconv.families import convert as family_conversion
from streamconv.families.converted import Converted
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


@functools.cache
def taken_apart(case: Case) -> tuple[TinyModel, Walk]:
    model = make(case.name)
    return model, invert(model.config, model.state, **dict(case.inverse))


def plan(
    model: TinyModel, tensors: State, megatron_facts: dict[str, Any] | None = None
) -> Converted:
    """Plan in this process, with the checks that a conversion makes."""
    headers = {key: (tuple(t.shape), dtype_of(t)) for key, t in tensors.items()}
    converted = family_conversion.convert(headers, model.config, megatron_facts or {}, JobOptions())
    if converted.model is not None:
        checks.check_recipes(converted.recipes, converted.model, JobOptions(), converted.extras)
    return converted
