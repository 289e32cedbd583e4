"""Parts of a model that Megatron did not train, and that are the released model's: ``--base`` names it.

A run may leave out the vision tower, or what lets a model speak. Of such a part nothing is in the
checkpoint; where some of it is, the rest is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamconv.errors import BadInputError, UsageError, listed
from streamconv.formats.huggingface import base as base_model
from streamconv.ir.recipe import Recipe
from streamconv.ir.source import Checkpoint, GlobalTensor, SourceFile
from streamconv.lora.adapters import named


@dataclass(frozen=True, slots=True)
class Filled:
    """What a base model gives: its files, numbered after the checkpoint's, its tensors, and recipes."""

    files: tuple[SourceFile, ...] = ()
    tensors: tuple[GlobalTensor, ...] = ()
    recipes: tuple[Recipe, ...] = ()


def fill(checkpoint: Checkpoint, missing: Sequence[str], base: Path | None) -> Filled:
    """Return the tensors ``missing``, by their names on the Hub, of the model in the folder ``base``.

    Raises :class:`BadInputError` where there is no such model, or where it lacks them, too.
    """
    if not missing:
        return Filled()
    if base is None:
        raise BadInputError(
            f"{len(missing)} tensors are not in the checkpoint, of parts that Megatron did not train",
            where=listed(missing),
            hint="they are those of the model that the run started from: --base DIR names its folder",
        )
    files, tensors = base_model.read(base, len(checkpoint.files))
    absent = [n for n in missing if n not in tensors]
    if absent:
        raise BadInputError(
            f"{len(absent)} tensors are neither in the checkpoint nor in the base model",
            where=listed(absent),
            found=f"{len(tensors)} tensors in {base}",
            hint="name the folder of the model that the run started from: --base DIR",
        )
    own = [named(f"{base.name}/{n}", tensors[n]) for n in missing]
    recipes = [
        Recipe.identity(name, t.fqn, t.shape, t.dtype) for name, t in zip(missing, own, strict=True)
    ]
    return Filled(files, tuple(own), tuple(recipes))


def refuse_idle(checkpoint: Checkpoint, base: Path | None) -> None:
    """Raise :class:`UsageError` for a base model of which nothing is needed."""
    if base is not None:
        raise UsageError(
            "--base is given, but nothing of the model is left out in this checkpoint",
            where=str(checkpoint.root),
            hint="leave out --base to convert the model as it is",
        )
