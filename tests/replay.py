"""Evaluate recipes on real arrays in the slow and obvious way: the reference for the tracer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from streamconv.ir.boxes import check_tiling
from streamconv.ir.dtypes import BY_TORCH, DType
from streamconv.ir.recipe import Cast, Gather, Recipe, SourceRef, View, Zero

Array = np.ndarray


def dtype_of(tensor: torch.Tensor) -> DType:
    """Return our name of a torch tensor's dtype."""
    return BY_TORCH[str(tensor.dtype).removeprefix("torch.")]


def array(tensor: torch.Tensor) -> Array:
    """Return a torch tensor as a numpy array of the same bits."""
    # Copied, since a tensor of one element counts as contiguous whatever its stride.
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().flatten())
    bits = flat.view(torch.uint8).numpy()
    return bits.view(dtype_of(tensor).to_numpy()).reshape(tuple(tensor.shape))


def replay(recipe: Recipe, sources: Mapping[str, Array]) -> Array:
    """Return the output tensor that ``recipe`` describes."""
    made = _view(recipe.view, sources)
    assert made.dtype == recipe.dtype.to_numpy(), (made.dtype, recipe.dtype)
    return made


def _view(view: View, sources: Mapping[str, Array]) -> Array:
    base = _base(view.base, sources).reshape(-1)
    if math.prod(view.shape):
        last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
        assert 0 <= view.offset <= last < base.size
    index = np.full(view.shape, view.offset)
    for d, (size, stride) in enumerate(zip(view.shape, view.strides, strict=True)):
        index += (np.arange(size) * stride).reshape(
            [-1 if k == d else 1 for k in range(index.ndim)]
        )
    made = base[index]
    for op in view.ops:
        if isinstance(op, Zero):
            made = np.zeros_like(made)
        else:
            made = (
                made.astype(op.dtype.to_numpy()) if isinstance(op, Cast) else _add(made, op.value)
            )
    return made


def _add(values: Array, number: float) -> Array:
    return values + np.asarray(number, dtype=values.dtype)


def _base(base: SourceRef | Gather, sources: Mapping[str, Array]) -> Array:
    if isinstance(base, SourceRef):
        assert sources[base.fqn].shape == base.shape
        return sources[base.fqn]
    assert check_tiling(base.shape, [p.box for p in base.parts]) is None
    pieces = [(p, _view(p.view, sources)) for p in base.parts]
    made = np.empty(base.shape, dtype=pieces[0][1].dtype)
    for part, piece in pieces:
        assert piece.shape == part.box.sizes
        spans = zip(part.box.offsets, part.box.ends, strict=True)
        made[tuple(slice(a, b) for a, b in spans)] = piece
    return made
