"""What comes of a family's rules, whoever's names they are for: recipes, their model, its config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamconv.families.rules import Dims, Family, compiled
from streamconv.ir.recipe import Recipe
from streamconv.ir.source import Skipped

if TYPE_CHECKING:
    from streamconv.tracing.hf import MetaModel
    from streamconv.tracing.model import Model


@dataclass(frozen=True, slots=True)
class Converted:
    """The outputs of a checkpoint, in the order of their names.

    ``config`` is what config.json has to say and ``changes`` how it differs from what it said;
    ``model`` is transformers' model of it, None where the library has none, ``architecture`` its
    class where config.json should name it; ``extras`` are patterns of names that the model may have
    beyond that. ``skipped`` are tensors that no output is made of. ``untrained`` are patterns of parts
    that may not be in the checkpoint at all.
    """

    recipes: tuple[Recipe, ...]
    model: Model | None
    architecture: str | None
    config: Mapping[str, Any]
    changes: tuple[str, ...]
    extras: tuple[re.Pattern[str], ...]
    notices: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()
    untrained: tuple[re.Pattern[str], ...] = ()


def settings_of(
    model: MetaModel | None, reference: Mapping[str, Any], notices: list[str]
) -> Mapping[str, Any]:
    """Return the settings of the (text) model; tell where the library cannot fill in its defaults."""
    if model is not None:
        return model.settings
    notices.append(
        f"transformers does not know the model type {reference.get('model_type')!r}: the names "
        "are the family's, shapes are checked as far as its rules do"
    )
    text = reference.get("text_config") or reference.get("llm_config")
    return {**reference, **(text if isinstance(text, Mapping) else {})}


def put_together(
    recipes: Iterable[Recipe],
    model: MetaModel | None,
    reference: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    changes: tuple[str, ...] = (),
    extras: Iterable[re.Pattern[str]],
    notices: Iterable[str],
    skipped: Iterable[Skipped] = (),
    untrained: Iterable[re.Pattern[str]] = (),
) -> Converted:
    """Return the outputs in the model's order. ``reference`` is the config that it was built of."""
    order = {name: k for k, name in enumerate(model.hub_shapes)} if model is not None else {}
    ordered = sorted(recipes, key=lambda r: (order.get(r.name, len(order)), _natural(r.name)))
    # A class that only stands in for the model's own must not be named in its config.
    stands_in = reference.get("model_type") != config.get("model_type")
    named = model is not None and model.certain and not stands_in
    return Converted(
        tuple(ordered),
        model,
        model.architecture if model is not None and named else None,
        config,
        changes,
        tuple(extras),
        tuple(notices),
        tuple(skipped),
        tuple(untrained),
    )


def left_out(found: Converted) -> tuple[str, ...]:
    """Return the tensors of parts of the model of which nothing is in the checkpoint."""
    if found.model is None:
        return ()
    made = {r.name for r in found.recipes}
    missing: list[str] = []
    for part in found.untrained:
        names = [n for n in found.model.hub_shapes if part.fullmatch(n)]
        if made.isdisjoint(names):
            missing += [n for n in names if n not in found.model.optional]
    return tuple(missing)


def extras(family: Family, dims: Dims, predictions: Iterable[int]) -> Iterator[re.Pattern[str]]:
    """Yield patterns of the names that the model may have beyond its class's: no ordinary layer's.

    ``predictions`` are the numbers of the layers for multi-token prediction.
    """
    numbers = sorted(predictions)
    for pattern in family.extras:
        if "{mtp_layer}" in pattern:
            for n in numbers:
                yield compiled(pattern.replace("{mtp_layer}", str(dims.layers + n)))
        else:
            yield compiled(pattern)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]
