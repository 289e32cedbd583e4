"""Low-rank updates (LoRA): adds ``scale * (left @ right)`` to what a move takes out of a matrix.

The factors are read in tiles, and the product is made in blocks that stay in the CPU's cache, so that
neither needs memory that the budget does not give. The bits do not depend on tiles or blocks: every
element is a sum over the rank in rising order, each step rounded to float32. BLAS would be faster, but
sums in an order that changes with the shape of a block, and with the CPU.
"""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Literal, NamedTuple

import numpy as np

from streamconv.errors import UnfitValuesError
from streamconv.executor.kernels import Array, apply, check_finite, strided
from streamconv.executor.windows import PRODUCT_BLOCK_ELEMENTS, Segment, Window
from streamconv.ir.dtypes import F32, DType
from streamconv.ir.lowering import Dim, MoveOp, Patch, ProductAt, patches
from streamconv.ir.planned import PlannedTensor
from streamconv.ir.recipe import Cast

Side = Literal["left", "right"]

# A block and its temporaries stay in the second-level cache.
_BLOCK_COLUMNS = 4096
# How many tiles are kept beside the two that each thread has in hand.
_KEPT_TILES = 4


class Factors:
    """Tiles of the factors of products, as float32; safe to use from several threads.

    ``fill`` brings a window of a tensor into a buffer. No more than ``max_bytes`` are held as long as
    at most ``threads`` threads hold a tile of each side at a time.
    """

    def __init__(
        self, fill: Callable[[Window, memoryview], None], max_bytes: int, threads: int
    ) -> None:
        self._fill = fill
        self._tile_bytes = max(1, max_bytes // (_KEPT_TILES + 2 * threads))
        self._kept: OrderedDict[tuple[object, ...], Array] = OrderedDict()
        self._lock = threading.Lock()

    def tile_size(self, rank: int) -> int:
        """Return how many rows of a left factor, or columns of a right one, a tile has."""
        return max(1, self._tile_bytes // (max(rank, 1) * F32.itemsize))

    def tile(self, tensor: PlannedTensor, number: int, side: Side, index: int) -> Array:
        """Return tile ``index`` of a factor of product ``number`` of ``tensor``."""
        # The plan has no two tensors of one name, and a lazy slice is no other matrix.
        key = (tensor.name, number, side, index)
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
            while len(self._kept) >= _KEPT_TILES:
                self._kept.popitem(last=False)
            tile = self._kept[key] = self._read(tensor.factor(number, side), side, index)
            return tile

    def _read(self, factor: PlannedTensor, side: Side, index: int) -> Array:
        rows, columns = factor.shape
        step = self.tile_size(columns if side == "left" else rows)
        lo = index * step
        if side == "left":
            hi = min(lo + step, rows)
            shape = (hi - lo, columns)
            runs = [(lo * columns, hi * columns)]
        else:
            hi = min(lo + step, columns)
            shape = (rows, hi - lo)
            runs = [(k * columns + lo, k * columns + hi) for k in range(rows)]
            if hi - lo == columns:
                runs = [(0, rows * columns)]
        segments = []
        at = 0
        for first, end in runs:
            segments.append(Segment(factor, first, end, at))
            at += (end - first) * F32.itemsize
        buffer = memoryview(mmap.mmap(-1, max(at, 1)))
        self._fill(Window(at, tuple(segments)), buffer)
        array: Array = np.frombuffer(buffer[:at], dtype=np.float32).reshape(shape)
        return array


def add_product(
    out: memoryview,
    out_dtype: DType,
    data: memoryview,
    data_dtype: DType,
    dims: Sequence[Dim],
    src_offset: int,
    ops: Sequence[MoveOp],
    tensor: PlannedTensor,
    factors: Factors,
) -> None:
    """Copy the walk ``dims`` from ``data`` into ``out`` with the product added.

    As :func:`streamconv.executor.kernels.run`; the first of ``ops`` is the :class:`ProductAt`, and
    ``src_offset`` the storage element at which ``data`` begins. Raises :class:`UnfitValuesError` where
    the update is not finite, or the sum does not fit the output's type.
    """
    at = ops[0]
    if not isinstance(at, ProductAt):
        raise TypeError(f"no low-rank update: {at}")
    rest = tuple(ops[1:])
    if not rest or not isinstance(rest[0], Cast):
        rest = (Cast(data_dtype), *rest)
    size = factors.tile_size(tensor.products[at.product].rank)
    for patch in patches(dims, src_offset, at):
        for rows, columns, dst in _blocks(patch, size):
            left = factors.tile(tensor, at.product, "left", rows.tile)[rows.within]
            right = factors.tile(tensor, at.product, "right", columns.tile)[:, columns.within]
            update = _product(left, right, tensor.products[at.product].scale)
            if not np.isfinite(update).all():
                raise UnfitValuesError(
                    "the update of an adapter is not finite",
                    where=tensor.name,
                    hint="the adapter's own values are infinite, NaN or too large: training diverged",
                )
            src = (
                at.start
                - src_offset
                + (rows.first - at.row) * at.row_step
                + (columns.first - at.column) * at.column_step
            )
            walk = (
                Dim(rows.size, rows.dst, rows.step * at.row_step),
                Dim(columns.size, columns.dst, columns.step * at.column_step),
            )
            source = strided(data[src * data_dtype.itemsize :], data_dtype.to_numpy(), walk, "src")
            target = strided(out[dst * out_dtype.itemsize :], out_dtype.to_numpy(), walk, "dst")
            wide = np.float64 if data_dtype.itemsize == 8 else np.float32
            with np.errstate(over="ignore", invalid="ignore"):
                total: Array = np.add(source.astype(wide), update, dtype=wide)
            check_finite((source, update), total, tensor.name)
            apply(rest, total, target, tensor.name)


def _product(left: Array, right: Array, scale: float) -> Array:
    total = np.zeros((left.shape[0], right.shape[1]), np.float32)
    term = np.empty_like(total)
    with np.errstate(all="ignore"):
        for k in range(left.shape[1]):
            # Two steps and not a dot: no library may fuse them or change their order.
            np.multiply(left[:, k, None], right[k], out=term)
            np.add(total, term, out=total)
        total *= np.float32(scale)
    return total


class _Cut(NamedTuple):
    """Some indices along one axis of the matrix, ``step`` apart, all within one tile."""

    first: int
    size: int
    step: int
    dst: int  # elements of the output between two of them
    tile: int
    within: slice  # where in the tile they are


def _blocks(patch: Patch, tile: int) -> Iterator[tuple[_Cut, _Cut, int]]:
    """Yield (rows, columns, first element of the output) of the blocks that make up ``patch``."""
    row_dim, outer_rows = _longest(patch.rows)
    column_dim, outer_columns = _longest(patch.columns)
    outer = (*outer_rows, *outer_columns, *patch.free)
    for index in product(*(range(d.size) for d in outer)):
        steps = [i * d.src for i, d in zip(index, outer, strict=True)]
        row = patch.row + sum(steps[: len(outer_rows)])
        column = patch.column + sum(steps[len(outer_rows) : len(outer_rows) + len(outer_columns)])
        dst = patch.dst_offset + sum(i * d.dst for i, d in zip(index, outer, strict=True))
        for at, columns in _cuts(column, column_dim, tile, _BLOCK_COLUMNS):
            for i, rows in _cuts(
                row, row_dim, tile, max(1, PRODUCT_BLOCK_ELEMENTS // columns.size)
            ):
                yield rows, columns, dst + at * columns.dst + i * rows.dst


def _longest(dims: Sequence[Dim]) -> tuple[Dim, tuple[Dim, ...]]:
    if not dims:
        return Dim(1, 0, 1), ()
    k = max(range(len(dims)), key=lambda i: dims[i].size)
    return dims[k], (*dims[:k], *dims[k + 1 :])


def _cuts(first: int, dim: Dim, tile: int, most: int) -> Iterator[tuple[int, _Cut]]:
    """Yield (how many steps precede, cut) for the indices ``first + i * dim.src``."""
    i = 0
    while i < dim.size:
        here = first + i * dim.src
        number, at = divmod(here, tile)
        size = min(dim.size - i, most, (tile - 1 - at) // dim.src + 1)
        within = slice(at, at + (size - 1) * dim.src + 1, dim.src)
        yield i, _Cut(here, size, dim.src, dim.dst, number, within)
        i += size
