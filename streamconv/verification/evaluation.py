"""Recipes as torch computes them: a slice of a tensor at a time, where all of it would not fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import DType
from streamconv.ir.recipe import (
    AddProduct,
    Cast,
    Decode,
    Gather,
    MulScale,
    SourceRef,
    Sum,
    View,
    Zero,
)
from streamconv.options import AverageOptions
from streamconv.verification.torch_floats import Pieces, added


class LostValuesError(Exception):
    """A finite value of the source is infinite in the type of the output."""


class TooLargeError(Exception):
    """A step would need more memory than the budget leaves."""


@dataclass(frozen=True, slots=True)
class Computing:
    """A tensor of the output before it is rounded: of one checkpoint, or the sum of several."""

    views: Sequence[View]
    sources: Sequence[Mapping[str, Pieces]]
    average: AverageOptions | None
    tile: int

    def box(self, lo: Shape, sizes: Shape) -> torch.Tensor:
        """Return its elements in the box ``lo``, ``sizes``."""
        found = [
            evaluate(view, lo, sizes, pieces, self.tile)
            for view, pieces in zip(self.views, self.sources, strict=True)
        ]
        if self.average is None or not found[0].is_floating_point():
            return found[0]
        return added(found, self.average.weights, self.average.divisor)


def tiles(shape: Shape, most: int) -> Iterator[tuple[int, Shape, Shape]]:
    """Yield (first element, offsets, sizes) of boxes of at most ``most`` elements, in memory order."""
    row, dim = 1, len(shape)
    while dim and row * shape[dim - 1] <= most:
        dim -= 1
        row *= shape[dim]
    if not math.prod(shape):
        return
    if not dim:
        yield 0, (0,) * len(shape), shape
        return
    step = most // row
    tail = shape[dim:]
    for k, index in enumerate(itertools.product(*map(range, shape[: dim - 1]))):
        for at in range(0, shape[dim - 1], step):
            size = min(step, shape[dim - 1] - at)
            first = (k * shape[dim - 1] + at) * row
            yield first, (*index, at, *(0,) * len(tail)), (*(1,) * len(index), size, *tail)


def evaluate(
    view: View, lo: Shape, sizes: Shape, pieces: Mapping[str, Pieces], limit: int
) -> torch.Tensor:
    """Return the elements of ``view`` in the box ``lo``, ``sizes``, as a recipe defines them.

    Raises :class:`TooLargeError` where the part of its base that they come from exceeds ``limit``
    bytes.
    """
    first = view.offset + sum(a * s for a, s in zip(lo, view.strides, strict=True))
    last = first + sum((n - 1) * s for n, s in zip(sizes, view.strides, strict=True))
    strides = _strides(view.base.shape)
    # The smallest box of the base that holds elements first to last in one stretch.
    low: list[int] = []
    extent: list[int] = []
    start, end = first, last
    apart = False
    for size, stride in zip(view.base.shape, strides, strict=True):
        a, b = (0, size - 1) if apart else (start // stride, end // stride)
        low.append(a)
        extent.append(b - a + 1)
        apart = apart or a != b
        start, end = start - a * stride, end - b * stride
    if isinstance(view.base, Sum):
        raise AssertionError("no model's recipe is a sum")
    base = _box(view.base, tuple(low), tuple(extent), pieces, limit)
    begin = sum(a * s for a, s in zip(low, strides, strict=True))
    made = base.view(-1).as_strided(sizes, view.strides, first - begin)
    for op in view.ops:
        if isinstance(op, AddProduct | MulScale | Decode):
            raise AssertionError("adapters and scales are left to the other reader")
        if isinstance(op, Zero):
            made = torch.zeros_like(made)
        elif isinstance(op, Cast):
            made = cast_to(made, torch_dtype(op.dtype))
        else:
            made = made + op.value
    return made


def _box(
    base: SourceRef | Gather,
    lo: Shape,
    sizes: Shape,
    pieces: Mapping[str, Pieces],
    limit: int,
) -> torch.Tensor:
    if isinstance(base, SourceRef):
        check_size(math.prod(sizes) * pieces[base.fqn].dtype.itemsize, limit)
        return pieces[base.fqn].box(lo, sizes)
    made: torch.Tensor | None = None
    for part in base.parts:
        ranges = [
            (max(a, c), min(a + n, d))
            for a, n, c, d in zip(lo, sizes, part.box.offsets, part.box.ends, strict=True)
        ]
        if any(a >= b for a, b in ranges):
            continue
        inner = tuple(a - c for (a, _), c in zip(ranges, part.box.offsets, strict=True))
        value = evaluate(part.view, inner, tuple(b - a for a, b in ranges), pieces, limit)
        if made is None:
            check_size(math.prod(sizes) * value.dtype.itemsize, limit)
            made = torch.empty(sizes, dtype=value.dtype)
        made[tuple(slice(a - c, b - c) for (a, b), c in zip(ranges, lo, strict=True))] = value
    if made is None:
        raise TooLargeError("a part of a recipe that nothing fills")
    return made


def _strides(shape: Shape) -> Shape:
    return tuple(torch.empty(shape, device="meta").stride())


def cast_to(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``tensor`` in another type, as torch rounds it.

    Raises :class:`LostValuesError` where a finite value becomes infinite: the output holds the same
    infinity then, and would pass.
    """
    made = tensor.to(dtype)
    if made.dtype != tensor.dtype and made.is_floating_point():
        lost = made.isinf() & tensor.isfinite()
        if lost.any():
            worst = tensor[lost].abs().max().item()
            raise LostValuesError(
                f"{worst:.6g}, which {str(dtype).removeprefix('torch.')} cannot hold"
            )
    return made


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return what torch calls a dtype."""
    found: torch.dtype = getattr(torch, dtype.torch)
    return found


def check_size(nbytes: int, limit: int) -> None:
    """Raise :class:`TooLargeError` for a slice of so many bytes where a tile may have ``limit``."""
    # A little more than a tile: a tile's rows need not begin where the base's rows begin.
    if nbytes > 2 * limit:
        raise TooLargeError("its slices are larger than the budget")
