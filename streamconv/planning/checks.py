"""The planner: from a checkpoint's metadata and the model's expectations to what is made.

No byte of a weight is read. Every source tensor is used or reported as skipped, every expected
tensor is made exactly once; what is missing or of a wrong shape is an error that lists the names.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence

from streamconv.errors import BadInputError, UsageError, listed
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import BY_TORCH, DType
from streamconv.ir.recipe import Cast, Recipe
from streamconv.ir.source import Checkpoint, GlobalTensor, Skipped
from streamconv.options import JobOptions
from streamconv.planning import shape_causes
from streamconv.tracing.model import Model

_LISTED = 12
# Numbers that no trained weight is of; bytes, and floats of eight bits, may be codes with a scale.
_NO_FRACTIONS = {"BOOL", "I16", "U16", "I32", "U32", "I64", "U64", "C64", "complex128"}
_LAYER = re.compile(r"(?:[^.]*[^.\d][^.]*\.)*\d+\.")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_OTHER_CONFIG = "check that config.json belongs to this checkpoint (--hf-config DIR names another)"


def decide_plain(checkpoint: Checkpoint, model: Model | None) -> dict[str, GlobalTensor]:
    """Return all tensors, the undecided ones read as the model's shapes say.

    Plain tensors on several ranks are dim-0 pieces or replicas, and nothing in the file tells.
    Raises :class:`BadInputError` with the question where the model does not tell either.
    """
    tensors = dict(checkpoint.tensors)
    unclear = []
    for fqn, found in checkpoint.undecided.items():
        pieces, copies = found.pieces, found.copies
        expected = (
            (model.state_shapes.get(fqn) or model.hub_shapes.get(fqn))
            if model is not None
            else None
        )
        fits = [t for t in (pieces, copies) if t.shape == expected]
        if fits == [copies] and found.differing:
            raise BadInputError(
                "ranks that should hold the same tensor have diverged, or their files are of "
                "different steps",
                where=fqn,
                expected=f"the same {list(copies.shape)} on every rank, which is the model's shape",
                found=f"different values on {found.differing}",
                hint="the files do not say which of them is right",
            )
        if len(fits) != 1 and pieces.shape != copies.shape:
            unclear.append((fqn, found, expected))
        else:
            tensors[fqn] = fits[0] if fits else copies
    if unclear:
        fqn, found, expected = next((u for u in unclear if u[1].differing), unclear[0])
        as_pieces, as_copies = list(found.pieces.shape), list(found.copies.shape)
        diverged = " of ranks that have diverged" if found.differing else ""
        raise BadInputError(
            f"{len(unclear)} tensors are either pieces or whole copies, and nothing says which",
            where=", ".join([fqn, *(n for n, *_ in unclear if n != fqn)][:_LISTED]),
            expected=f"{fqn}: {list(expected)}" if expected else "the model's shape of each tensor",
            found=f"{fqn}: {as_pieces} as pieces along dim 0, or {as_copies} as copies{diverged}"
            + (f" (the values on {found.differing} differ)" if found.differing else ""),
            hint="name a folder with the model's config.json: --hf-config DIR",
        )
    return tensors


def expected_shapes(model: Model | None, options: JobOptions) -> Mapping[str, Shape]:
    """Return the tensors that the model should have, none where no model is known."""
    if model is None:
        return {}
    return model.hub_shapes if options.layout == "hub" else model.state_shapes


def check_recipes(
    recipes: Sequence[Recipe],
    model: Model,
    options: JobOptions,
    extras: Sequence[re.Pattern[str]] | None = None,
) -> list[str]:
    """Compare what will be made with what the model expects; return notices.

    ``extras`` are for a checkpoint whose names were made by rules and not found: patterns of names
    that are known although the model lacks them. Then any other name is an error, and so is what
    does not fit a class that only stands in for the config's. Raises :class:`BadInputError` that
    lists names that are missing or such, and wrong shapes.
    """
    by_rules = extras is not None
    expected = expected_shapes(model, options)
    made = {r.name: r.view.shape for r in recipes}
    aliases = {alias for alias, _ in model.tied}
    missing = [n for n in expected if n not in made and n not in model.optional | aliases]
    wrong = [n for n, shape in made.items() if n in expected and expected[n] != shape]
    unknown = [
        n
        for n in made
        if n not in expected
        and not model.is_optional_unexpected(n)
        and not any(p.fullmatch(n) for p in extras or ())
    ]
    notices = []
    if made and len(unknown) == len(made):
        raise BadInputError(
            f"no tensor of the checkpoint is one of {model.architecture}'s",
            where=listed(unknown, _LISTED),
            expected=listed(expected, _LISTED),
            found="the names of another model, or a trainer's own that there are no rules for",
            hint=_OTHER_CONFIG,
        )
    if (missing or wrong) and not (model.certain or by_rules):
        notices.append(
            f"{len(missing)} tensors that {model.architecture} has are not in the checkpoint and "
            f"{len(wrong)} differ in shape; config.json names a class that transformers lacks"
        )
    elif wrong:
        first = wrong[0]
        raise BadInputError(
            f"{len(wrong)} tensors do not have the shape that {model.architecture} expects",
            where=listed(wrong, _LISTED),
            expected=f"{first}: {list(expected[first])}",
            found=f"{first}: {list(made[first])}",
            hint=shape_causes.cause(expected, {n: made[n] for n in wrong}) or _OTHER_CONFIG,
        )
    elif missing:
        raise BadInputError(
            f"{len(missing)} tensors that {model.architecture} needs are not in the checkpoint",
            where=listed(missing, _LISTED),
            hint=shape_causes.cause_of_missing(missing, made) or _OTHER_CONFIG,
        )
    if more := _more_layers(unknown, {*model.hub_shapes, *model.state_shapes} if unknown else ()):
        raise BadInputError(
            f"the checkpoint has layers that {model.architecture} of this config.json does not have",
            where=listed(more, _LISTED),
            hint="is its number of layers (num_hidden_layers or the like) that of the model that was "
            "trained? --hf-config DIR names another config.json, --config KEY=VALUE changes it",
        )
    if unknown:
        # What loads the model would ignore them in silence: it would not compute what was trained.
        if by_rules:
            raise BadInputError(
                f"{len(unknown)} tensors of the checkpoint are none that {model.architecture} has",
                where=listed(unknown, _LISTED),
                hint=_OTHER_CONFIG,
            )
        if options.strict:
            raise BadInputError(
                f"{len(unknown)} tensors are unknown to {model.architecture}",
                where=listed(unknown, _LISTED),
                hint="without --strict they are written, too",
            )
        notices.append(
            f"{len(unknown)} tensors are unknown to {model.architecture} and are written under "
            f"their own names: {listed(unknown, _LISTED)}"
        )
    return notices


def _more_layers(unknown: Iterable[str], expected: Collection[str]) -> list[str]:
    """Return the layers among ``unknown`` that consist of what other layers of the model consist of.

    Layers that predict further tokens have more than that, and the model need not have them.
    """
    layers: dict[str, list[str]] = {}
    for name in unknown:
        if found := _LAYER.match(name):
            layers.setdefault(found[0], []).append(name)
    known = {found[0] for n in expected if (found := _LAYER.match(n))}
    parts = {_NUMBER.sub("N", n) for n in expected} if layers else set()
    return [
        layer.rstrip(".")
        for layer, names in layers.items()
        if layer not in known and all(_NUMBER.sub("N", n) in parts for n in names)
    ]


def check_kinds(recipes: Iterable[Recipe], model: Model | None) -> None:
    """Raise :class:`BadInputError` for integers and the like where the model has floats.

    transformers casts them in silence.
    """
    odd = {r.name: r.dtype for r in recipes if r.dtype.name in _NO_FRACTIONS}
    wrong = sorted(model.hold_fractions(list(odd))) if model is not None and odd else []
    if wrong:
        raise BadInputError(
            f"{len(wrong)} weights are not of floating-point numbers, and those of the model are",
            where=listed(wrong, _LISTED),
            found=f"{wrong[0]}: {odd[wrong[0]]}",
            hint="save the weights as they are trained, or with the scales of the codes that they are",
        )


def check_loads(recipes: Iterable[Recipe], model: Model, *, sure: bool) -> None:
    """Raise :class:`BadInputError` unless ``model`` comes out when the library loads the outputs.

    Whatever made the names, the library has the last word: what it has no name for it passes over,
    and what it misses it makes up, both in silence. Not ``sure`` is who has only a class that stands in
    for the config's: what it misses proves nothing. Outputs that the model is not known to have
    (:func:`check_recipes` tells of them) may be passed over.
    """
    loaded = model.load({r.name: (r.view.shape, r.dtype) for r in recipes})
    unexpected = [n for n in loaded.unexpected if n in model.hub_shapes]
    missing = loaded.missing if sure else ()
    misshapen = loaded.misshapen if sure else ()
    problems = (
        ("filled by nothing", missing),
        ("passed over", unexpected),
        ("lost, as another fills the same place", [second for _, second in loaded.clashing]),
        ("not made", [f"{name} ({told})" for name, told in loaded.failed]),
        (
            "of another shape",
            [f"{name} (expected {list(a)}, found {list(b)})" for name, a, b in misshapen],
        ),
    )
    # A few of each kind: an error has room for that much.
    found = [f"{len(names)} {what}: {listed(names, 2)}" for what, names in problems if names]
    if found:
        raise BadInputError(
            f"transformers would not load the planned tensors as {model.architecture}'s",
            found="; ".join(found),
            hint=f"{_OTHER_CONFIG}; if it does, this is an error of streamconv's: please report it. "
            "--layout memory writes the names of the state dict instead",
        )


def with_dtypes(
    recipes: Iterable[Recipe],
    options: JobOptions,
    model: Model | None,
    declared: DType | None,
    fixed: Container[str] = (),
) -> list[Recipe]:
    """Return the recipes with the casts that ``--dtype`` asks for.

    Only F64, F32, F16 and BF16 are cast; tensors that match ``keep_dtype``, that transformers keeps in
    float32, or that are ``fixed`` (quantized weights, their scales) are left alone. Raises for a dtype
    that safetensors cannot hold.
    """
    target = None
    if options.dtype == "auto":
        if declared is None:
            raise UsageError(
                "config.json declares no dtype",
                hint="say which: --dtype bfloat16, float16 or float32",
            )
        if not declared.castable:
            raise UsageError(
                "config.json declares a dtype that weights are not cast to",
                expected="bfloat16, float16, float32 or float64",
                found=str(declared),
                hint="say which: --dtype bfloat16, float16 or float32; or leave --dtype out",
            )
        target = declared
    elif options.dtype != "keep":
        target = BY_TORCH[options.dtype]
    recipes = list(recipes)
    castable = [r.name for r in recipes if r.dtype.castable and r.dtype != target]
    in_fp32: frozenset[str] = frozenset()
    if model is not None and target is not None and castable:
        in_fp32 = model.kept_fp32(castable, target)
    result = []
    for r in recipes:
        if not r.dtype.writable:
            raise BadInputError(
                f"safetensors cannot hold {r.dtype}",
                where=r.name,
                hint="remove the tensor from the checkpoint, or store it as another type",
            )
        kept = any(fnmatch.fnmatchcase(r.name, p) for p in options.keep_dtype) or r.name in fixed
        if (
            target is not None
            and r.dtype.castable
            and r.dtype != target
            and not kept
            and r.name not in in_fp32
        ):
            view = dataclasses.replace(r.view, ops=(*r.view.ops, Cast(target)))
            r = Recipe(r.name, target, view)
        result.append(r)
    return result


@dataclasses.dataclass(frozen=True, slots=True)
class Ties:
    """What becomes of tied weights.

    ``dropped``: aliases whose bytes lie in the very same storage. ``compared``: alias to kept name,
    equal by their CRC-32, confirmed while streaming. ``kept``: aliases that differ, or of which
    nothing is known, and are written.
    """

    dropped: dict[str, str]
    compared: dict[str, str]
    kept: dict[str, str]


def decide_ties(
    recipes: Iterable[Recipe], model: Model | None, tensors: Mapping[str, GlobalTensor]
) -> Ties:
    """Decide for each pair that the config ties whether its alias can be left out."""
    ties = Ties({}, {}, {})
    by_name = {r.name: r for r in recipes}
    for alias, kept in model.tied if model is not None else ():
        a, b = by_name.get(alias), by_name.get(kept)
        if a is None or b is None:
            continue
        ta, tb = _whole_source(a, tensors), _whole_source(b, tensors)
        if (
            ta is None
            or tb is None
            or a.dtype != b.dtype
            or a.view.ops != b.view.ops
            or ta.layout != tb.layout
        ):
            ties.kept[alias] = kept
        elif ta.shards.files == tb.shards.files and ta.shards.starts == tb.shards.starts:
            ties.dropped[alias] = kept
        elif ta.shards.crcs == tb.shards.crcs and all(
            crc or not nbytes for crc, nbytes in zip(ta.shards.crcs, ta.shards.nbytes, strict=True)
        ):
            ties.compared[alias] = kept
        else:
            ties.kept[alias] = kept
    return ties


def _whole_source(recipe: Recipe, tensors: Mapping[str, GlobalTensor]) -> GlobalTensor | None:
    whole = recipe.view.whole
    return tensors[whole.fqn] if whole is not None else None


def dtype_histogram(pairs: Iterable[tuple[DType, int]]) -> dict[str, int]:
    """Return the bytes per dtype name, largest first."""
    counts: Counter[str] = Counter()
    for dtype, nbytes in pairs:
        counts[dtype.torch] += nbytes
    return dict(counts.most_common())


def main_float_dtype(recipes: Iterable[Recipe], others: Container[str] = ()) -> DType | None:
    """Return the floating dtype that most output bytes have: what config.json should declare.

    ``others`` do not count: quantized weights and their scales.
    """
    counts: Counter[DType] = Counter()
    for r in recipes:
        if r.dtype.castable and r.name not in others:
            counts[r.dtype] += r.nbytes
    return counts.most_common(1)[0][0] if counts else None


def unused(
    tensors: Mapping[str, GlobalTensor], recipes: Iterable[Recipe], told: Container[str] = ()
) -> list[Skipped]:
    """Return the source tensors that no recipe draws from and that are not ``told`` of already."""
    used = {fqn for r in recipes for fqn in r.view.sources()}
    return [
        Skipped(n, "no output tensor is made of it")
        for n in tensors
        if n not in used and n not in told
    ]
