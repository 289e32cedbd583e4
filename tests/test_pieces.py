"""A view as a tensor of its own: its boxes hold just what torch's own view would."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.ir.boxes import Box, contiguous_strides
from streamconv.ir.dtypes import F32
from streamconv.ir.pieces import keeps_columns, matrix_of, spread, stored_view
from streamconv.ir.recipe import Cast, SourceRef, View
from streamconv.ir.source import GlobalTensor, ShardLayout, ShardTable
from tests.test_lowering import numpy_view, sharded


def tensor(layout: ShardLayout, storages: list[np.ndarray]) -> GlobalTensor:
    table = ShardTable()
    for k, storage in enumerate(storages):
        table.append(0, k, 0, storage.size * 8, 1, 0)
    return GlobalTensor("t", F32, layout, table)


def values(made: GlobalTensor, storages: list[np.ndarray]) -> np.ndarray:
    """Put a tensor together from its storages, in the slow and obvious way."""
    whole = np.full(made.shape, -1)
    layout = made.layout
    for j, box in enumerate(layout.boxes):
        storage = storages[made.shards[j].key]
        index = np.full(box.sizes, layout.storage_offsets[j])
        for axis, (size, step) in enumerate(zip(box.sizes, layout.strides[j], strict=True)):
            shape = [-1 if a == axis else 1 for a in range(len(box.sizes))]
            index = index + (np.arange(size) * step).reshape(shape)
        whole[tuple(slice(a, b) for a, b in zip(box.offsets, box.ends, strict=True))] = storage[
            index
        ]
    return whole


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_it_holds_what_the_view_shows(data: st.DataObject) -> None:
    full, layout, storages = data.draw(sharded())
    shown = data.draw(numpy_view(full))
    if 0 in shown.shape or 0 in shown.strides:
        return
    itemsize = full.itemsize
    offset = (
        shown.__array_interface__["data"][0] - full.__array_interface__["data"][0]
    ) // itemsize
    strides = tuple(s // itemsize for s in shown.strides)
    if min(strides, default=0) < 0:
        return
    view = View(SourceRef("t", full.shape), shown.shape, strides, offset)
    made = stored_view("made", view, {"t": tensor(layout, storages)})
    assert np.array_equal(values(made, storages), shown)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_one_stands_for_several(data: st.DataObject, times: int) -> None:
    full, layout, storages = data.draw(sharded().filter(lambda s: s[0].ndim in (2, 3)))
    held = 1 if full.ndim == 2 else full.shape[0]
    made = spread(tensor(layout, storages), held * times)
    expected = np.repeat(full.reshape(held, *full.shape[-2:]), times, axis=0)
    assert np.array_equal(values(made, storages), expected)
    if held > 1:
        with pytest.raises(ValueError, match="does not stand for"):
            spread(tensor(layout, storages), held * times + 1)


def test_what_is_computed_is_stored_nowhere() -> None:
    source = ShardLayout((2, 2), (Box.whole((2, 2)),), ((2, 1),), (0,))
    view = View(SourceRef("t", (2, 2)), (2, 2), (2, 1), 0, (Cast(F32),))
    with pytest.raises(ValueError, match="not stored anywhere"):
        stored_view("made", view, {"t": tensor(source, [np.arange(4)])})


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "kept"),
    [
        ((4, 3), (3, 1), 0, True),
        ((2, 3), (6, 1), 3, True),  # every other row
        ((3, 4), (1, 3), 0, False),  # transposed
        ((4, 2), (3, 1), 1, False),  # some columns
        ((2, 3), (3, 1), 1, False),  # rows that begin in the middle
    ],
)
def test_rows_are_told_from_other_views(shape, strides, offset, kept) -> None:
    view = View(SourceRef("t", (4, 3)), shape, strides, offset)
    assert keeps_columns(view, (4, 3)) is kept


def test_a_square_that_is_transposed_is_no_rows() -> None:
    view = View(SourceRef("t", (3, 3)), (3, 3), (1, 3))
    assert not keeps_columns(view, (3, 3))


def test_which_matrix_a_view_is_of() -> None:
    source = (5, 4, 3)
    rows = contiguous_strides((2, 3))
    assert matrix_of(View(SourceRef("t", source), (2, 3), rows, 3 * 12 + 6), source) == 3
    assert matrix_of(View(SourceRef("t", source), (4, 3), (3, 1), 3 * 12 + 6), source) is None
