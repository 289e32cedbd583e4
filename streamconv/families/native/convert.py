"""A checkpoint with a trainer's own names and a config.json in, recipes of HuggingFace's out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from streamconv import families
from streamconv.errors import BadInputError
from streamconv.families import ops
from streamconv.families.converted import Converted, extras, put_together, settings_of
from streamconv.families.engine import Headers, apply
from streamconv.families.native.dialect import Dialect
from streamconv.families.prediction import check_prediction
from streamconv.families.rules import Dims, Family, compiled
from streamconv.families.settings import check_settings
from streamconv.ir.recipe import Recipe
from streamconv.ir.source import Skipped
from streamconv.options import JobOptions
from streamconv.tracing.hf import MetaModel, build_meta
from streamconv.tracing.wrappers import without_markers

_SCORE = {f"lm_head.{kind}": f"score.{kind}" for kind in ("weight", "bias")}


@dataclass(frozen=True, slots=True)
class Described:
    """The model that a config.json describes, and whose rules of a dialect hold for it.

    ``reference`` is the config of a model that transformers has.
    """

    family: Family
    dims: Dims
    model: MetaModel | None
    reference: Mapping[str, Any]
    notices: tuple[str, ...]


def describe(
    dialect: Dialect, config: Mapping[str, Any] | None, run: Mapping[str, Any], job: JobOptions
) -> Described:
    """Return whose rules hold for a model with the names of ``dialect``, and its sizes.

    ``run`` is what lies beside the weights says of it (:mod:`~streamconv.families.native.beside`).
    Raises :class:`BadInputError` where config.json is missing, contradicts that, or is of a model that
    the dialect has no rules for.
    """
    if config is None:
        raise BadInputError(
            f"the tensors have {dialect.name}'s names, and there is no config.json",
            expected="config.json of the model that was trained, as HuggingFace has it",
            hint="--hf-config DIR names a folder that has it, and the tokenizer",
        )
    why_not = dialect.refused.get(str(config.get("model_type")))
    if why_not and job.family is None:
        raise BadInputError(
            f"{dialect.name}'s checkpoints of model type {config['model_type']!r} are not read",
            where="config.json",
            found=why_not,
            hint=f"let {dialect.name} export it",
        )
    family = families.choose(config, job.family, dialect.families, dialect.name)
    notices = [f"the tensors have {dialect.name}'s names, and are read as the family {family.name}"]
    reference = family.reference(config)
    model = build_meta(reference)
    vision = config.get("vision_config") if model is None else model.vision_settings
    dims = Dims(settings_of(model, reference, notices), run, vision)
    if run:
        dims.check_heads()
        notices += check_settings(dims, family, dialect.name)
    return Described(_with_head(family, model), dims, model, reference, tuple(notices))


def convert(
    dialect: Dialect,
    tensors: Headers,
    config: Mapping[str, Any] | None,
    run: Mapping[str, Any],
    job: JobOptions,
) -> Converted:
    """Return how ``tensors``, whose names are those of ``dialect``, become HuggingFace's.

    ``run`` is as in :func:`describe`. Raises :class:`BadInputError` where config.json is missing, is
    of a model that the dialect has no rules for, or contradicts the tensors, and for unknown tensors.
    """
    described = describe(dialect, config, run, job)
    family, dims, model = described.family, described.dims, described.model
    prefix = dialect.prefix(tensors) or ""
    original = {without_markers(name).removeprefix(prefix): name for name in tensors}
    if len(original) != len(tensors):
        raise BadInputError(
            "two tensors have the same name without what wrappers leave in it",
            found=", ".join(sorted(set(tensors) - set(original.values()))[:4]),
        )
    notices = list(described.notices)
    if prefix:
        notices.append(f"{prefix!r} is left out of their names")
    dropped = dict(_dropped(dialect, family, original))
    if dropped:
        reasons = {reason: name for name, reason in dropped.items()}
        notices += [f"left out: {name} and its like: {why}" for why, name in reasons.items()]
    given = {name: tensors[original[name]] for name in original if name not in dropped}
    notices += untold_heads(described)
    predicting: set[int] = set()
    if dialect.prediction is not None:
        notices += check_prediction({n: s for n, (s, _) in given.items()}, dims, dialect.prediction)
        predicting = {at[1] for n in given if (at := dialect.prediction.number(n))}
    made = apply(family, dims, given, whose=dialect.name)
    return put_together(
        (Recipe(r.name, r.dtype, r.view.map_sources(original)) for r in made),
        model,
        described.reference,
        config or {},
        extras=extras(family, dims, predicting),
        notices=notices,
        skipped=(Skipped(original[name], reason) for name, reason in dropped.items()),
    )


def _with_head(family: Family, model: MetaModel | None) -> Family:
    """The output layer of a reward model has the same name, and another one in HuggingFace's class."""
    if (
        model is None
        or "lm_head.weight" in model.hub_shapes
        or "score.weight" not in model.hub_shapes
    ):
        return family
    rules = (
        dataclasses.replace(r, targets=tuple(_SCORE.get(t, t) for t in r.targets))
        for r in family.rules
    )
    return dataclasses.replace(family, rules=tuple(rules))


def _dropped(
    dialect: Dialect, family: Family, names: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    for pattern, reason in (*dialect.dropped, *family.dropped):
        expression = compiled(pattern)
        for name in names:
            if expression.fullmatch(name):
                yield name, reason


def untold_heads(described: Described) -> tuple[str, ...]:
    """Tell that nothing in the tensors could contradict the numbers of heads."""
    family, dims = described.family, described.dims
    if "num_attention_heads" in dims.megatron or not any(
        r.how in ops.BY_HEADS for r in family.rules
    ):
        return ()
    notice = (
        f"rows are put in order for {dims.heads} query heads and {dims.groups} key and value heads, as "
        "config.json says: the tensors could not contradict other numbers of the same product"
    )
    return (notice,)
