"""Boxes tile a shape or they do not: against a brute-force count of every element."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.ir.boxes import (
    Box,
    check_tiling,
    contiguous_strides,
    find_hole,
    find_overlap,
    flat_boxes,
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=3)))
    one = st.tuples(*(st.tuples(st.integers(0, n), st.integers(0, n)) for n in shape))
    corners = draw(st.lists(one, max_size=6))
    return shape, [
        Box(tuple(min(c) for c in box), tuple(abs(a - b) for a, b in box)) for box in corners
    ]


def counted(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    count = np.zeros(shape, int)
    for box in boxes:
        count[tuple(map(slice, box.offsets, box.ends))] += 1
    return count


@given(cases())
def test_against_counting(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    count = counted(shape, boxes)
    assert (check_tiling(shape, boxes) is None) == bool((count == 1).all())
    hole, overlap = find_hole(shape, boxes), find_overlap(boxes)
    assert (hole is None) == bool((count > 0).all())
    if hole is not None:
        assert hole.numel
        assert not counted(shape, boxes)[tuple(map(slice, hole.offsets, hole.ends))].any()
    assert (overlap is None) == bool((count < 2).all())
    if overlap is not None:
        assert boxes[overlap[0]].intersect(boxes[overlap[1]]) is not None


@pytest.mark.parametrize("missing", [0, 1, 500, 1023])
def test_one_of_a_thousand(missing: int) -> None:
    boxes = [Box((8 * k, 0), (8, 4)) for k in range(1024) if k != missing]
    expected = Box((8 * missing, 0), (8, 4))
    assert find_hole((8192, 4), boxes) == expected
    assert find_hole((8192, 4), boxes[::-1]) == expected


def test_outside() -> None:
    assert "outside" in (check_tiling((4,), [Box((2,), (3,))]) or "")
    assert "outside" in (check_tiling((4,), [Box((0, 0), (4, 1))]) or "")


@pytest.mark.parametrize(
    ("offsets", "sizes"), [((0,), (1, 1)), ((-1,), (1,)), ((0,), (-1,)), ((), (1,))]
)
def test_no_box(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rank|negative"):
        Box(offsets, sizes)


def test_literals() -> None:
    assert str(Box((1, 2), (3, 4))) == "[1:4, 2:6]"
    assert Box.whole((2, 3)) == Box((0, 0), (2, 3))
    assert Box((0, 0), (4, 4)).intersect(Box((2, 3), (4, 4))) == Box((2, 3), (2, 1))
    assert Box((0,), (4,)).intersect(Box((4,), (4,))) is None
    assert contiguous_strides((2, 3, 4)) == (12, 4, 1)
    assert contiguous_strides((2, 0, 4)) == (4, 4, 1)
    assert check_tiling((), [Box((), ())]) is None
    assert check_tiling((), []) is not None
    assert check_tiling((0, 3), []) is None


@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.data())
def test_a_flat_range_is_its_boxes_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    lo = data.draw(st.integers(0, numel))
    hi = data.draw(st.integers(lo, numel))
    index = np.arange(numel).reshape(shape)
    boxes = list(flat_boxes(shape, lo, hi))
    found = [
        int(i)
        for b in boxes
        for i in index[tuple(slice(o, e) for o, e in zip(b.offsets, b.ends, strict=True))].reshape(
            -1
        )
    ]
    assert found == list(range(lo, hi))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    ends = [*flat_boxes(shape, 0, lo), *boxes, *flat_boxes(shape, hi, numel)]
    assert check_tiling(shape, ends) is None
    if hi > lo:
        assert check_tiling(shape, [*ends[:-1]]) is not None or hi < numel
        assert check_tiling(shape, [*boxes, *ends]) is not None


def test_boxes_outside_the_shape_do_not_tile_it() -> None:
    assert check_tiling((2, 3), [Box((0, 0), (1, 3)), Box((1, 0), (1, 4))]) is not None
    assert check_tiling((2, 3), [Box((0, 0), (1, 2)), Box((0, 2), (1, 4))]) is not None
    assert check_tiling((4,), [Box((0, 0), (2, 2))]) is not None
