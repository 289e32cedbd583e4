"""Boxes: hyper-rectangles of an index space, and the check that some of them tile it exactly.

A box is ``offsets`` and ``sizes`` counted in elements, as in torch's DCP. Everything here is a pure
function of integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """The elements ``offsets[d] <= i[d] < offsets[d] + sizes[d]`` for every dimension ``d``."""

    offsets: Shape
    sizes: Shape

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes):
            raise ValueError(f"offsets {self.offsets} and sizes {self.sizes} differ in rank")
        if any(v < 0 for v in (*self.offsets, *self.sizes)):
            raise ValueError(f"negative box: offsets {self.offsets}, sizes {self.sizes}")

    @staticmethod
    def whole(shape: Shape) -> Box:
        """Return the box that is all of ``shape``."""
        return Box((0,) * len(shape), shape)

    @property
    def ends(self) -> Shape:
        """Return the first index past the box in every dimension."""
        return tuple(o + s for o, s in zip(self.offsets, self.sizes, strict=True))

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.sizes)

    def inside(self, shape: Shape) -> bool:
        """Whether the box fits into a tensor of ``shape``."""
        return len(shape) == len(self.sizes) and all(
            e <= s for e, s in zip(self.ends, shape, strict=True)
        )

    def intersect(self, other: Box) -> Box | None:
        """Return what both share, or None where they share no element."""
        if self.numel == 0 or other.numel == 0:
            return None
        lo = tuple(map(max, self.offsets, other.offsets))
        hi = tuple(map(min, self.ends, other.ends))
        sizes = tuple(b - a for a, b in zip(lo, hi, strict=True))
        return Box(lo, sizes) if all(s > 0 for s in sizes) else None

    def __str__(self) -> str:
        return (
            "[" + ", ".join(f"{o}:{e}" for o, e in zip(self.offsets, self.ends, strict=True)) + "]"
        )


def contiguous_strides(shape: Shape) -> Shape:
    """Return the element strides of a C-contiguous tensor of ``shape``."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def flat_boxes(shape: Shape, lo: int, hi: int) -> Iterator[Box]:
    """Yield the boxes that are the elements ``[lo, hi)`` of a tensor counted in C order, in order.

    At most two for each dimension but the last, and one: ragged ends, and whole rows between them.

    >>> [str(b) for b in flat_boxes((4, 5), 3, 17)]
    ['[0:1, 3:5]', '[1:3, 0:5]', '[3:4, 0:2]']
    """
    if not 0 <= lo <= hi <= math.prod(shape):
        raise ValueError(f"elements {lo} to {hi} of the shape {list(shape)}")
    if lo == hi:
        return
    if hi - lo == math.prod(shape):
        yield Box.whole(shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-lo // row), hi // row
    if lo // row == last or lo % row:
        # What lies in the row of the first element: all of it, maybe.
        index = lo // row
        for box in flat_boxes(shape[1:], lo - index * row, min(hi - index * row, row)):
            yield Box((index, *box.offsets), (1, *box.sizes))
        if lo // row == last:
            return
    if first < last:
        yield Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))
    if hi % row:
        for box in flat_boxes(shape[1:], 0, hi - last * row):
            yield Box((last, *box.offsets), (1, *box.sizes))


def find_overlap(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """Return the indices of two boxes that share an element, or None.

    A sweep along the dimension with the most distinct offsets, so that shards of any one dimension
    cost n·log n rather than n².
    """
    full = [i for i, b in enumerate(boxes) if b.numel]
    if not full:
        return None
    rank = len(boxes[full[0]].sizes)
    if rank == 0:
        return (full[0], full[1]) if len(full) > 1 else None
    axis = max(range(rank), key=lambda d: len({boxes[i].offsets[d] for i in full}))
    full.sort(key=lambda i: boxes[i].offsets[axis])
    active: list[int] = []
    for i in full:
        start = boxes[i].offsets[axis]
        active = [j for j in active if boxes[j].offsets[axis] + boxes[j].sizes[axis] > start]
        for j in active:
            if boxes[i].intersect(boxes[j]) is not None:
                return (min(i, j), max(i, j))
        active.append(i)
    return None


def find_hole(shape: Shape, boxes: Sequence[Box]) -> Box | None:
    """Return a box of ``shape`` that none of ``boxes`` covers, or None when they cover it all."""
    for hole in _uncovered(Box.whole(shape), [b for b in boxes if b.numel]):
        return hole
    return None


def _uncovered(space: Box, boxes: Sequence[Box]) -> Iterator[Box]:
    # A stack of our own: with 1024 ranks the recursion would be as deep.
    stack = [(space, 0)] if space.numel else []
    while stack:
        space, k = stack.pop()
        while k < len(boxes):
            shared = space.intersect(boxes[k])
            k += 1
            if shared is not None:
                stack += [(piece, k) for piece in reversed(list(_subtract(space, shared)))]
                break
        else:
            yield space


def _subtract(space: Box, hole: Box) -> Iterator[Box]:
    """Yield disjoint boxes that make up ``space`` without ``hole`` (which lies inside it)."""
    lo, hi = list(space.offsets), list(space.ends)
    for d in range(len(lo)):
        for a, b in ((lo[d], hole.offsets[d]), (hole.ends[d], hi[d])):
            if a < b:
                offsets, ends = (*lo[:d], a, *lo[d + 1 :]), [*hi[:d], b, *hi[d + 1 :]]
                yield Box(offsets, tuple(e - o for o, e in zip(offsets, ends, strict=True)))
        lo[d], hi[d] = hole.offsets[d], hole.ends[d]


def check_tiling(shape: Shape, boxes: Sequence[Box]) -> str | None:
    """Return None when ``boxes`` cover every element of ``shape`` exactly once, else what is wrong."""
    if _follow_each_other(shape, boxes):
        return None
    for k, box in enumerate(boxes):
        if box.numel and not box.inside(shape):
            return f"piece {k} {box} lies outside the shape {list(shape)}"
    overlap = find_overlap(boxes)
    if overlap is not None:
        i, j = overlap
        return f"pieces {i} {boxes[i]} and {j} {boxes[j]} overlap"
    if sum(b.numel for b in boxes) != math.prod(shape):
        return f"no piece holds {find_hole(shape, boxes)} of the shape {list(shape)}"
    return None


def _follow_each_other(shape: Shape, boxes: Sequence[Box]) -> bool:
    """Whether each box is a stretch of elements in C order that begins where the one before ends.

    So are shards of dimension 0 and pieces of a flattened tensor, of which there may be thousands.
    """
    strides = contiguous_strides(shape)
    at = 0
    for box in boxes:
        if len(box.sizes) != len(shape):
            return False
        numel, wide = 1, True  # wide: all dimensions so far, from the last, are whole
        begin = 0
        for offset, size, whole, stride in zip(
            reversed(box.offsets),
            reversed(box.sizes),
            reversed(shape),
            reversed(strides),
            strict=True,
        ):
            if not wide and size != 1:
                return False
            if offset + size > whole:
                return False
            wide = wide and size == whole
            begin += offset * stride
            numel *= size
        if numel == 0:
            continue
        if begin != at:
            return False
        at += numel
    return at == math.prod(shape)
