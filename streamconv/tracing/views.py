"""Views of views: compose index maps in exact integers, so that a copy of a copy is one recipe.

A gather is a C-contiguous tensor put together of parts. A view of it that touches one part only,
and whose every step stays inside that part, is a view of the part's own base: the gather vanishes.
That is what makes ``chunk(...).contiguous()`` of fused experts a plain strided view of the source.
"""

from __future__ import annotations

from streamconv.ir.boxes import Box, Shape, contiguous_strides
from streamconv.ir.recipe import Gather, Part, View


def canonical_strides(shape: Shape, strides: Shape) -> Shape:
    """Return ``strides`` with those that are never walked set to what a contiguous tensor has.

    A dimension of one element may carry any stride; so may all of them in an empty tensor. Set
    alike, equal views are equal and a contiguous view is known by ``contiguous_strides``.
    """
    if 0 in shape:
        return contiguous_strides(shape)
    if 1 not in shape:
        return strides
    made: list[int] = []
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        made.append(step if size == 1 else stride)
        step = made[-1] * size
    return tuple(reversed(made))


def permute_view(view: View, order: tuple[int, ...]) -> View:
    """Return ``view`` with its dimensions in ``order``."""
    shape = tuple(view.shape[d] for d in order)
    strides = tuple(view.strides[d] for d in order)
    return View(view.base, shape, strides, view.offset, view.ops)


def permute_gather(gather: Gather, order: tuple[int, ...]) -> Gather:
    """Return the gather of the same elements with its dimensions in ``order``."""
    parts = tuple(
        Part(
            Box(
                tuple(p.box.offsets[d] for d in order),
                tuple(p.box.sizes[d] for d in order),
            ),
            permute_view(p.view, order),
        )
        for p in gather.parts
    )
    return Gather(tuple(gather.shape[d] for d in order), parts)


def simplify(view: View) -> View:
    """Return an equal view that looks through every gather it can look through."""
    while isinstance(view.base, Gather):
        inner = _through(view, view.base)
        if inner is None:
            return view
        view = inner
    return view


def _through(view: View, gather: Gather) -> View | None:
    if 0 in view.shape:
        found = gather.parts[0].view
        return View(found.base, view.shape, view.strides, 0, found.ops + view.ops)
    if len(gather.parts) == 1:
        return _through_part(view, gather.shape, gather.parts[0])
    start = _unravel(view.offset, gather.shape)
    for part in gather.parts:
        low, ends = part.box.offsets, part.box.ends
        if all(a <= i < e for a, i, e in zip(low, start, ends, strict=True)):
            return _through_part(view, gather.shape, part)
    return None


def _through_part(view: View, shape: Shape, part: Part) -> View | None:
    """Return ``view`` as a view of the part's base, or None where it steps out of the part."""
    sizes, lows, highs, steps = _coalesce(shape, part)
    index = _unravel(view.offset, sizes)
    offset = part.view.offset + sum(
        (i - lo) * s for i, lo, s in zip(index, lows, steps, strict=True)
    )
    top = list(index)
    strides: list[int] = []
    for size, stride in zip(view.shape, view.strides, strict=True):
        if size == 1:
            strides.append(0)
            continue
        delta = _unravel(stride, sizes)
        strides.append(sum(d * s for d, s in zip(delta, steps, strict=True)))
        for d, step in enumerate(delta):
            top[d] += (size - 1) * step
    if not all(lo <= i and t < hi for i, t, lo, hi in zip(index, top, lows, highs, strict=True)):
        return None
    # The check bounds every digit of every index, so no digit ever carries and the map is affine.
    walked = canonical_strides(view.shape, tuple(strides))
    return View(part.view.base, view.shape, walked, offset, part.view.ops + view.ops)


def _coalesce(shape: Shape, part: Part) -> tuple[list[int], list[int], list[int], list[int]]:
    """Merge dimensions that the part's view walks as one: sizes, box lows, box highs, strides.

    Two neighbours merge where the part is whole along the inner one and the outer stride is the
    inner one's times its size; then a reshape across the two needs no copy.
    """
    sizes: list[int] = []
    lows: list[int] = []
    highs: list[int] = []
    steps: list[int] = []
    walk = zip(shape, part.box.offsets, part.box.ends, part.view.strides, strict=True)
    for size, low, high, step in reversed(tuple(walk)):
        if size == 1:
            continue
        inner_whole = sizes and lows[-1] == 0 and highs[-1] == sizes[-1]
        if inner_whole and (step == steps[-1] * sizes[-1] or high - low == 1):
            low, high = low * sizes[-1], high * sizes[-1]
            sizes[-1] *= size
            lows[-1], highs[-1] = low, high
        else:
            sizes.append(size)
            lows.append(low)
            highs.append(high)
            steps.append(step)
    return sizes[::-1], lows[::-1], highs[::-1], steps[::-1]


def _unravel(offset: int, shape: Shape | list[int]) -> list[int]:
    """Return the index of element ``offset`` of a C-contiguous ``shape``; the top digit is open."""
    index: list[int] = []
    for size in reversed(shape[1:]):
        offset, digit = divmod(offset, size)
        index.append(digit)
    if shape:
        index.append(offset)
    return index[::-1]
