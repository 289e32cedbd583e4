"""A Megatron checkpoint and a config.json in, recipes of HuggingFace tensors and their model out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from streamconv import families
from streamconv.errors import BadInputError, UsageError
from streamconv.families import causes
from streamconv.families.alike import check_alike
from streamconv.families.converted import Converted, extras, put_together, settings_of
from streamconv.families.engine import Headers, apply
from streamconv.families.hybrid import as_gpt
from streamconv.families.ops import copy
from streamconv.families.prediction import HYBRID, MEGATRON, check_prediction
from streamconv.families.rules import Dims, Family, compiled, rule
from streamconv.families.settings import check_settings
from streamconv.ir.recipe import Recipe
from streamconv.options import JobOptions
from streamconv.tracing.hf import MetaModel, build_meta

_LAYER = re.compile(r"(?:thinker\.)?(?:language_model\.)?decoder\.layers\.([0-9]+)\.")
_PREDICTION = re.compile(r"(?:language_model\.)?mtp\.layers\.([0-9]+)\.")
_OUTPUT = re.compile(r"(?:thinker\.)?(?:language_model\.)?output_layer\.(weight|bias)")
_EMBEDDING = re.compile(r"(?:thinker\.)?(?:language_model\.)?embedding\.word_embeddings\.weight")
_HEADS = (
    (".self_attention.linear_qkv.", "num_attention_heads", "attention"),
    (".self_attention.in_proj.", "linear_num_key_heads", "linear attention"),
    # No argument of a run tells them.
    ("vision_model.decoder.layers.", "", "vision tower"),
)
"""Part of a tensor's name, the argument that tells how many heads it has, and what to call them."""

_HEAD = tuple(
    rule(f"{prefix}output_layer.{kind}", f"score.{kind}", copy)
    for prefix in ("", "language_model.")
    for kind in ("weight", "bias")
)


def convert(
    tensors: Headers,
    config: Mapping[str, Any] | None,
    megatron: Mapping[str, Any],
    job: JobOptions,
) -> Converted:
    """Return how the tensors of a Megatron checkpoint (canonical names) become HuggingFace's.

    ``megatron`` is what the checkpoint says of its run. Raises :class:`BadInputError` where
    config.json is missing or contradicts the tensors, or a tensor is unknown.
    """
    described = describe(config, megatron, job, tensors)
    config, changes = described.config, described.changes
    family, dims, model = described.family, described.dims, described.model
    reference = described.reference
    notices = list(described.notices)
    original = None if family.hybrid else as_gpt(tensors)
    if original is not None:
        notices.append("the layers of Megatron's HybridModel are numbered as HuggingFace's")
        tensors = {original[name]: header for name, header in tensors.items()}
    _check_layers(dims, tensors)
    _check_output(dims, tensors)
    notices += check_run(described, tensors)
    notices += _flat_rows(config, tensors)
    notices += _cut_rows(dims, tensors)
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    recipes = apply(family, dims, tensors)
    names = HYBRID if family.hybrid else MEGATRON
    notices += check_prediction(shapes, dims, names, family.parts)
    if model is None:
        check_alike(shapes, dims, family.parts)
    if original is not None:
        back = {new: old for old, new in original.items()}
        recipes = [Recipe(r.name, r.dtype, r.view.map_sources(back)) for r in recipes]
    return put_together(
        recipes,
        model,
        reference,
        config,
        changes=changes,
        extras=extras(family, dims, _predictions(tensors)),
        notices=notices,
        untrained=map(compiled, family.untrained),
    )


@dataclass(frozen=True, slots=True)
class Described:
    """The model that a config.json describes, as far as a checkpoint of Megatron's needs to know.

    ``reference`` is the config of a model that transformers has; the others are as in
    :class:`Converted`.
    """

    family: Family
    dims: Dims
    model: MetaModel | None
    reference: Mapping[str, Any]
    config: Mapping[str, Any]
    changes: tuple[str, ...]
    notices: tuple[str, ...]


def describe(
    config: Mapping[str, Any] | None,
    megatron: Mapping[str, Any],
    job: JobOptions,
    tensors: Headers,
    beside: Collection[str] = (),
) -> Described:
    """Return whose rules hold for a checkpoint, and the sizes of its model.

    ``megatron`` is what the checkpoint says of its run, ``beside`` are the names of all its
    tensors where ``tensors`` are others, an adapter's.
    Raises :class:`BadInputError` where config.json
    is missing, or no family has its model type.
    """
    if config is None:
        raise BadInputError(
            "a Megatron checkpoint needs the model's config.json, and has none",
            expected="config.json in huggingface/ beside the weights",
            hint="--hf-config DIR names a folder that has it, and the tokenizer",
        )
    if job.layout == "memory":
        raise UsageError(
            "--layout memory is for checkpoints of transformers models",
            hint="leave it out: Megatron's tensors become those of the Hub",
        )
    if megatron.get("moe_mlp_glu_interleave_size"):
        raise BadInputError(
            "the experts' gate and up rows are interleaved in this checkpoint, which is not supported",
            found=f"moe_mlp_glu_interleave_size {megatron['moe_mlp_glu_interleave_size']}",
        )
    family = families.choose(config, job.family, names=tensors)
    notices = [f"Megatron's tensors are read as the family {family.name}"]
    config, changes = _for_these_weights(config, tensors)
    head = [m[1] for name in tensors if (m := _OUTPUT.fullmatch(name))] if changes.head else []
    reference = family.reference(config)
    model = build_meta(reference, [f"score.{kind}" for kind in head])
    if model is not None:
        model.forgo([compiled(pattern) for pattern in family.lacks])
    settings = settings_of(model, reference, notices)
    vision = config.get("vision_config") if model is None else model.vision_settings
    names = beside or tensors
    signs = (way for way, sign in family.signs.items() if any(map(re.compile(sign).search, names)))
    dims = Dims(settings, megatron, vision, frozenset(signs))
    if head:
        family = dataclasses.replace(family, rules=(*_HEAD, *family.rules))
    return Described(family, dims, model, reference, config, changes.told, tuple(notices))


def check_run(described: Described, tensors: Headers) -> list[str]:
    """Compare config.json with what the checkpoint says of its run; return notices."""
    dims = described.dims
    return [*check_settings(dims, described.family), *_untold_heads(dims, tensors)]


def _predictions(tensors: Headers) -> set[int]:
    return {int(m[1]) for name in tensors if (m := _PREDICTION.match(name))}


@dataclass(frozen=True, slots=True)
class _Changes:
    told: tuple[str, ...]
    head: bool


def _for_these_weights(
    config: Mapping[str, Any], tensors: Headers
) -> tuple[dict[str, Any], _Changes]:
    """Return the config without what holds for other weights than Megatron's.

    A value model (verl's critic) has one output a token, and its config is often the actor's.
    """
    config = dict(config)
    told: list[str] = []
    outputs = next(
        (s[0] for n, (s, _) in tensors.items() if _OUTPUT.fullmatch(n) and n.endswith("weight")), 0
    )
    head = outputs == 1
    if head and config.get("num_labels") != 1:
        config["num_labels"] = 1
        config.pop("id2label", None)
        config.pop("label2id", None)
        told.append("config.json: num_labels set to 1, this is a value model")
    return config, _Changes(tuple(told), head)


def _untold_heads(dims: Dims, tensors: Headers) -> tuple[str, ...]:
    """Tell which numbers of heads nothing in the checkpoint could contradict."""
    untold = [
        words
        for part, argument, words in _HEADS
        if argument not in dims.megatron and any(part in name for name in tensors)
    ]
    if not untold:
        return ()
    notice = (
        "the checkpoint does not tell the arguments of its run: whether config.json has the right "
        f"numbers of heads cannot be checked ({', '.join(untold)}), for others of the same product "
        "make up the same rows"
    )
    return (notice,)


def _flat_rows(config: Mapping[str, Any], tensors: Headers) -> tuple[str, ...]:
    """Tell of other rows under the same name and of the same shape.

    With the other rows went another name of the norms.
    """
    if config.get("model_type") != "olmoe" or any(".q_norm." in name for name in tensors):
        return ()
    notice = (
        "linear_qkv is read group by group, as Megatron keeps it. Releases of ms-swift before "
        "mcore-bridge 1.6.5 kept olmoe's as all queries, all keys and all values, which nothing in a "
        "checkpoint tells: `verify --forward --reference` shows it"
    )
    return (notice,)


def _cut_rows(dims: Dims, tensors: Headers) -> tuple[str, ...]:
    """Tell what is taken for padding of the vocabulary where the run does not say how large it is."""
    rows = next((s[0] for n, (s, _) in tensors.items() if _EMBEDDING.fullmatch(n)), 0)
    if rows <= dims.vocab or type(dims.megatron.get("vocab_size")) is int:
        return ()
    notice = (
        f"the last {rows - dims.vocab} of {rows} rows of the vocabulary are left out as padding, for "
        f"config.json says vocab_size {dims.vocab}; the checkpoint does not tell how many there were"
    )
    return (notice,)


def _check_layers(dims: Dims, tensors: Headers) -> None:
    found = {int(m[1]) for name in tensors if (m := _LAYER.match(name))}
    missing = sorted(set(range(dims.layers)) - found)
    beyond = sorted(found - set(range(dims.layers)))
    if not missing and not beyond:
        return
    cause = causes.of_layers(dims.layers, found, tensors, dims.megatron)
    if cause is not None:
        raise cause
    if beyond or missing == list(range(len(found), dims.layers)):
        dims.expect("the number of layers", dims.layers, max(found, default=-1) + 1)
    raise BadInputError(
        f"{len(missing)} of {dims.layers} layers are not in the checkpoint",
        where="decoder.layers." + ", ".join(map(str, missing[:12])),
        hint="the checkpoint is incomplete: pipeline stages are missing",
    )


def _check_output(dims: Dims, tensors: Headers) -> None:
    """A config that ties would have the embedding stand in for an output layer that was lost."""
    untied = dims.megatron.get("untie_embeddings_and_output_weights") is True
    if untied and not any(map(_OUTPUT.fullmatch, tensors)):
        raise BadInputError(
            "the output layer is not in the checkpoint",
            expected="output_layer.weight, as the run had untie_embeddings_and_output_weights",
            found="none",
            hint="the checkpoint is incomplete",
        )
