"""Native names: what trainers with models of their own call the tensors, and whose a name is.

A :class:`~streamconv.families.native.dialect.Dialect` is the set of names of one trainer: a table of
families (rules from its names to HuggingFace's) and the names that tell it from others. Whose names a
checkpoint has is found in the names alone, whatever they have in front; that the guess was right is
proved afterwards, when every tensor of the model is made exactly once and none is left over.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection

from streamconv.families.native.dialect import Dialect

_MODULES = ("torchtitan", "olmo_core", "torchtune", "litgpt")


def dialects() -> tuple[Dialect, ...]:
    """Return every dialect."""
    return tuple(importlib.import_module(f"{__name__}.{m}").DIALECT for m in _MODULES)


def of_layers(names: Collection[str]) -> Dialect | None:
    """Return in whose layers all of ``names`` are, though they are not a whole model; else None."""
    found = sorted(names)
    return next((d for d in dialects() if d.prefix_of(found) is not None), None)


def find(names: Collection[str]) -> Dialect | None:
    """Return whose names these are, None where they are not a trainer's own."""
    return next((d for d in dialects() if d.prefix(names) is not None), None)
