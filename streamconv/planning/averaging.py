"""Several checkpoints that become one model: the weighted sum of what would be written of each.

Each is read and named as if it were converted alone, so that they need not have one format, mesh or
world size in common; then they must make the same tensors.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.errors import BadInputError, listed
from streamconv.ir.boxes import contiguous_strides
from streamconv.ir.dtypes import BY_NAME, DType
from streamconv.ir.recipe import Cast, Recipe, Sum, Term, View
from streamconv.ir.source import GlobalTensor, SourceFile
from streamconv.options import AverageOptions
from streamconv.planning.checks import Ties
from streamconv.quantization import scales
from streamconv.tracing.model import Model

# What two config.json of one model may differ in.
_NO_MATTER = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}
)
_LISTED = 6
_F64 = BY_NAME["F64"]


@dataclass(frozen=True)
class Member:
    """What would be written of one of the checkpoints, whose place is ``root``.

    ``made`` tells of tensors that were quantized what they become, by their names.
    """

    root: Path
    recipes: Sequence[Recipe]
    tensors: Mapping[str, GlobalTensor]
    files: tuple[SourceFile, ...]
    ties: Ties
    made: Mapping[str, DType]


@dataclass(frozen=True)
class Summed:
    """The sums of the members' tensors, and the files that they lie in, those of the first first.

    ``recipes`` are of float64, and rounded by nothing yet. ``dtypes`` are what they become unless
    another type is asked for.
    """

    recipes: list[Recipe]
    tensors: dict[str, GlobalTensor]
    files: tuple[SourceFile, ...]
    ties: Ties
    dtypes: Mapping[str, frozenset[DType]]

    def rounded(self, recipes: Sequence[Recipe], but: Collection[str]) -> list[Recipe]:
        """Return ``recipes`` with those that nothing rounds yet of the type that they become.

        What is quantized (``but``) is not rounded before. Raises :class:`BadInputError` where the
        members have several types and nobody says which is meant.
        """
        return [
            r if r.view.ops or not r.dtype.castable or r.name in but else self._rounded(r)
            for r in recipes
        ]

    def _rounded(self, r: Recipe) -> Recipe:
        if len(self.dtypes[r.name]) > 1:
            raise BadInputError(
                "the checkpoints hold a tensor in several types",
                where=r.name,
                found=", ".join(sorted(map(str, self.dtypes[r.name]))),
                hint="say what their average is to be: --dtype bfloat16, float16 or float32",
            )
        (dtype,) = self.dtypes[r.name]
        return Recipe(r.name, dtype, dataclasses.replace(r.view, ops=(Cast(dtype),)))


def refuse_other_config(
    root: Path,
    own: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
    model: Model | None,
) -> None:
    """Raise :class:`BadInputError` where the checkpoint in ``root`` is of another model.

    ``own`` is its own config, ``config`` that of all, which describes ``model``. What transformers
    reads alike is the same, under whatever names; how weights are stored does not matter.
    """
    if own is None or config is None:
        return
    here, there = _meaning(own), _meaning(config)
    keys = [k for k in sorted({*here, *there}) if here.get(k) != there.get(k)]
    if keys and model is not None and model.reads_alike(there, here):
        return
    if keys:
        raise BadInputError(
            "a checkpoint of another model cannot be averaged with this one",
            where=str(root),
            expected="the same config.json",
            found=f"another {listed(keys, _LISTED)}",
            hint="--hf-config DIR names the folder whose config holds for all of them",
        )


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in scales.without(config)[0].items() if k not in _NO_MATTER}


def moved(
    tensors: Mapping[str, GlobalTensor], number: int, first_file: int
) -> dict[str, GlobalTensor]:
    """Return the tensors of one of several checkpoints under names of their own, by their old ones.

    Their files are numbered from ``first_file`` on.
    """
    tables: dict[int, Any] = {}
    found = {}
    for name, tensor in tensors.items():
        # Tensors that share a table go on to do so: the plan knows them by it.
        table = tables.get(id(tensor.shards))
        if table is None:
            files = array("I", (f + first_file for f in tensor.shards.files))
            table = tables[id(tensor.shards)] = dataclasses.replace(tensor.shards, files=files)
        found[name] = dataclasses.replace(tensor, fqn=f"{number}:{tensor.fqn}", shards=table)
    return found


def summed(members: Sequence[Member], average: AverageOptions, model: Model | None) -> Summed:
    """Return the weighted sum of what would be written of each of ``members``.

    Raises :class:`BadInputError` where they do not make the same tensors, of the same shapes.
    """
    files: list[SourceFile] = []
    tensors: dict[str, GlobalTensor] = {}
    made: list[dict[str, Recipe]] = []
    for k, member in enumerate(members, 1):
        own = moved(member.tensors, k, len(files)) if k > 1 else dict(member.tensors)
        names = {old: t.fqn for old, t in own.items()}
        tensors |= {t.fqn: t for t in own.values()}
        files += member.files if k == 1 else [_absolute(f, member.root) for f in member.files]
        made.append(
            {
                r.name: dataclasses.replace(r, view=r.view.map_sources(names)) if k > 1 else r
                for r in member.recipes
            }
        )
    for found in made:
        _with_tied(found, model)
    first = made[0]
    for member, found in zip(members[1:], made[1:], strict=True):
        _refuse_others(members[0], first, member, found)
    recipes = []
    dtypes: dict[str, frozenset[DType]] = {}
    for name, r in first.items():
        terms = tuple(
            Term(weight, found[name].dtype, found[name].view)
            for weight, found in zip(average.weights, made, strict=True)
        )
        shape = r.view.shape
        view = View(Sum(shape, terms, average.divisor), shape, contiguous_strides(shape))
        recipes.append(Recipe(name, _F64 if r.dtype.castable else r.dtype, view))
        kinds = (m.made.get(name, t.dtype) for m, t in zip(members, terms, strict=True))
        dtypes[name] = frozenset(kinds)
    return Summed(recipes, tensors, tuple(files), _ties(members, model), dtypes)


def told(members: Sequence[Member], average: AverageOptions) -> str:
    """Return what a user should know: what is added up, and whether the weights make a mean."""
    # By their numbers and names: a manifest does not depend on where its sources lay.
    parts = (
        f"{w:.6g} x {k} ({m.root.name})"
        for k, (w, m) in enumerate(zip(average.weights, members, strict=True), 1)
    )
    over = "" if average.divisor == 1 else f", divided by {average.divisor:g}"
    total = math.fsum(average.weights) / average.divisor
    odd = "" if abs(total - 1) < 1e-9 else f" (the weights add up to {total:.6g})"
    return f"written is {' + '.join(parts)}{over}{odd}"


def _absolute(file: SourceFile, root: Path) -> SourceFile:
    """Return a file of a checkpoint that is not the plan's root."""
    index = str(root.absolute() / file.index) if file.index else ""
    return dataclasses.replace(file, path=str(root.absolute() / file.path), index=index)


def _with_tied(found: dict[str, Recipe], model: Model | None) -> None:
    """Add what a checkpoint holds by another name only: an alias that it has no tensor for."""
    for alias, kept in model.tied if model is not None else ():
        if alias not in found and kept in found:
            found[alias] = dataclasses.replace(found[kept], name=alias)


def _ties(members: Sequence[Member], model: Model | None) -> Ties:
    """Return what becomes of tied weights: an alias is left out where all members tie it."""
    ties = Ties({}, {}, {})
    for alias, kept in model.tied if model is not None else ():
        if any(alias in m.ties.kept for m in members):
            ties.kept[alias] = kept
        elif any(alias in m.ties.compared for m in members):
            ties.compared[alias] = kept
        else:
            ties.dropped[alias] = kept
    return ties


def _refuse_others(
    first: Member, expected: Mapping[str, Recipe], member: Member, found: Mapping[str, Recipe]
) -> None:
    """Raise :class:`BadInputError` where two checkpoints do not make the same tensors."""
    for here, there, names in (
        (first, member, expected.keys() - found.keys()),
        (member, first, found.keys() - expected.keys()),
    ):
        if names:
            raise BadInputError(
                f"{len(names)} tensors of one checkpoint are not in another",
                where=listed(sorted(names), _LISTED),
                expected=f"in {there.root}, as in {here.root}",
                hint="only checkpoints of one model can be averaged",
            )
    for name, r in expected.items():
        other = found[name]
        floats = r.dtype.castable and other.dtype.castable
        if r.view.shape != other.view.shape or not (floats or r.dtype == other.dtype):
            raise BadInputError(
                "a tensor has another shape or type in another checkpoint",
                where=name,
                expected=f"{r.dtype} {list(r.view.shape)}, as in {first.root}",
                found=f"{other.dtype} {list(other.view.shape)} in {member.root}",
                hint="only checkpoints of one model can be averaged",
            )
