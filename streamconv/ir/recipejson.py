"""Recipes as plain data for JSON, and back: the same objects, whatever order they are in."""

from __future__ import annotations

from typing import Any

from streamconv.ir.boxes import Box, Shape
from streamconv.ir.dtypes import BY_NAME
from streamconv.ir.recipe import (
    AddScalar,
    Cast,
    Gather,
    Op,
    Part,
    Recipe,
    SourceRef,
    Sum,
    View,
    Zero,
)


def to_json(recipe: Recipe) -> list[Any]:
    """Return ``recipe`` as lists, texts and numbers; raises ``TypeError`` for a low-rank update."""
    base = recipe.view.whole
    if base is not None and not recipe.view.ops:
        return [recipe.name, recipe.dtype.name, base.fqn, base.shape]
    return [recipe.name, recipe.dtype.name, _view(recipe.view)]


def from_json(data: list[Any]) -> Recipe:
    """Return the recipe that :func:`to_json` has written; raises ``ValueError`` and the like."""
    dtype = BY_NAME[data[1]]
    if len(data) == 4:
        return Recipe.identity(data[0], data[2], _shape(data[3]), dtype)
    name, _, view = data
    return Recipe(name, dtype, _view_of(view))


def _view(view: View) -> list[Any]:
    base: list[Any]
    if isinstance(view.base, SourceRef):
        base = [view.base.fqn, view.base.shape]
    elif isinstance(view.base, Sum):
        raise TypeError("no model's recipe is a sum")
    else:
        parts = [[p.box.offsets, p.box.sizes, _view(p.view)] for p in view.base.parts]
        base = [None, view.base.shape, parts]
    return [base, view.shape, view.strides, view.offset, [op_to_json(op) for op in view.ops]]


def _view_of(data: list[Any]) -> View:
    (fqn, shape, *parts), sizes, strides, offset, ops = data
    base: SourceRef | Gather
    if fqn is None:
        (found,) = parts
        made = (Part(Box(_shape(o), _shape(s)), _view_of(v)) for o, s, v in found)
        base = Gather(_shape(shape), tuple(made))
    else:
        base = SourceRef(fqn, _shape(shape))
    return View(base, _shape(sizes), _shape(strides), offset, tuple(map(_op_of, ops)))


def op_to_json(op: Op) -> list[Any]:
    """Return an operation on single elements as plain data; raises ``TypeError`` for any other."""
    match op:
        case Cast(dtype):
            return ["cast", dtype.name]
        case AddScalar(value):
            return ["add", value]
        case Zero():
            return ["zero"]
    raise TypeError(f"{type(op).__name__} is not an operation on single elements")


def _op_of(data: list[Any]) -> Op:
    match data:
        case ["cast", name]:
            return Cast(BY_NAME[name])
        case ["add", value]:
            return AddScalar(value)
        case ["zero"]:
            return Zero()
    raise ValueError(f"not an operation: {data}")


def _shape(values: list[int]) -> Shape:
    return tuple(values)
