"""What depends on where in a matrix an element lies: block-wise scales, and low-rank updates (LoRA).

The scales of quantized weights multiply what a move takes out of a matrix, ``scale * (left @ right)``
is added to it. Scales and factors are read in tiles, and blocks stay in the CPU's cache, so that
neither needs memory that the budget does not give. The bits do not depend on tiles or blocks: every
element of a product is a sum over the rank in rising order, each step rounded to float32. BLAS would
be faster, but sums in an order that changes with the shape of a block, and with the CPU.
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
from streamconv.executor.kernels import Array, apply, apply_one, check_finite, strided
from streamconv.executor.windows import PRODUCT_BLOCK_ELEMENTS, Segment, Window
from streamconv.ir.dtypes import F32, DType
from streamconv.ir.lowering import Dim, MoveOp, Patch, PlacedAt, ProductAt, ScaledAt, patches
from streamconv.ir.planned import PlannedTensor
from streamconv.ir.recipe import Cast

Side = Literal["left", "right"]

# A block and its temporaries stay in the second-level cache.
_BLOCK_COLUMNS = 4096
# How many tiles of the largest size are kept beside the two that each thread has in hand.
_KEPT_TILES = 4
# What Python holds for a tile beside its bytes: an array, a key of four, an entry.
_OBJECT_BYTES = 500


def _cost(tile: Array) -> int:
    """Return what is held for a tile, its Python objects included."""
    return tile.nbytes + _OBJECT_BYTES


class Factors:
    """Tiles of the factors of products, as float32; safe to use from several threads.

    ``fill`` brings a window of a tensor into a buffer. No more than ``max_bytes`` are held as long as
    at most ``threads`` threads hold a tile of each side, and of scales, at a time.
    """

    def __init__(
        self, fill: Callable[[Window, memoryview], None], max_bytes: int, threads: int
    ) -> None:
        self._fill = fill
        self._tile_bytes = max(1, max_bytes // (_KEPT_TILES + 3 * threads))
        self._kept: OrderedDict[tuple[object, ...], Array] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()

    def tile_size(self, rank: int) -> int:
        """Return how many rows of a left factor, or columns of a right one, a tile has."""
        return max(1, self._tile_bytes // (max(rank, 1) * F32.itemsize))

    def tile(self, tensor: PlannedTensor, number: int, side: Side, index: int) -> Array:
        """Return tile ``index`` of a factor of product ``number`` of ``tensor``."""
        return self._kept_tile(
            (tensor.name, number, side, index),
            lambda: self._read(tensor.factor(number, side), side, index),
        )

    def steps(self, tensor: PlannedTensor, op: PlacedAt) -> tuple[int, int]:
        """Return how many rows and columns of the matrix one tile of what ``op`` needs is for."""
        if isinstance(op, ProductAt):
            size = self.tile_size(tensor.products[op.number].rank)
            return size, size
        s = tensor.scales[op.number]
        high, wide = self._scale_tile(s.grid)
        return high * s.block[0], wide * s.block[1]

    def _scale_tile(self, grid: tuple[int, int]) -> tuple[int, int]:
        most = max(1, self._tile_bytes // F32.itemsize)
        wide = min(max(grid[1], 1), most)
        return max(1, min(grid[0], most // wide)), wide

    def scales(self, tensor: PlannedTensor, number: int, row: int, column: int) -> Array:
        """Return a tile of scale ``number`` of ``tensor``, finite all of it.

        Raises :class:`UnfitValuesError` where it is not.
        """
        return self._kept_tile(
            (tensor.name, number, row, column),
            lambda: self._read_scales(tensor, number, row, column),
        )

    def _kept_tile(self, key: tuple[object, ...], read: Callable[[], Array]) -> Array:
        # The plan has no two tensors of one name, and a lazy slice is not another matrix.
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
            # Small tiles are many: threads that each work on another matrix need all of them again.
            while self._held_bytes > (_KEPT_TILES - 1) * self._tile_bytes:
                self._held_bytes -= _cost(self._kept.popitem(last=False)[1])
            tile = self._kept[key] = read()
            self._held_bytes += _cost(tile)
            return tile

    def _read_scales(self, tensor: PlannedTensor, number: int, row: int, column: int) -> Array:
        s = tensor.scales[number]
        high, wide = self._scale_tile(s.grid)
        tile = self._rectangle(
            tensor.scale(number),
            range(row * high, min((row + 1) * high, s.grid[0])),
            range(column * wide, min((column + 1) * wide, s.grid[1])),
        )
        outer = tensor.outer_scale(number)
        if outer is not None:
            one = self._rectangle(outer, range(1), range(1))
            with np.errstate(all="ignore"):
                tile = tile / one if s.divide else tile * one
        if not np.isfinite(tile).all():
            raise UnfitValuesError(
                "a scale of quantized weights is not finite",
                where=tensor.name,
                hint="the checkpoint is damaged, or training diverged before it was quantized",
            )
        return tile

    def _read(self, factor: PlannedTensor, side: Side, index: int) -> Array:
        rows, columns = factor.shape
        step = self.tile_size(columns if side == "left" else rows)
        lo = index * step
        if side == "left":
            return self._rectangle(factor, range(lo, min(lo + step, rows)), range(columns))
        return self._rectangle(factor, range(rows), range(lo, min(lo + step, columns)))

    def _rectangle(self, tensor: PlannedTensor, rows: range, columns: range) -> Array:
        return rectangle(self._fill, tensor, rows, columns)


def rectangle(
    fill: Callable[[Window, memoryview], None], tensor: PlannedTensor, rows: range, columns: range
) -> Array:
    """Return some rows and columns of a matrix of float32, which ``fill`` brings."""
    width = tensor.shape[1]
    if len(columns) == width:
        runs = [(rows.start * width, rows.stop * width)]
    else:
        runs = [(k * width + columns.start, k * width + columns.stop) for k in rows]
    segments = []
    at = 0
    for first, end in runs:
        segments.append(Segment(tensor, first, end, at))
        at += (end - first) * F32.itemsize
    buffer = memoryview(mmap.mmap(-1, max(at, 1)))
    fill(Window(at, tuple(segments)), buffer)
    array: Array = np.frombuffer(buffer[:at], dtype=np.float32)
    return array.reshape(len(rows), len(columns))


def run_placed(
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
    """Copy the walk ``dims`` from ``data`` into ``out``, applying ``ops`` to each element.

    As :func:`streamconv.executor.kernels.run`, with a :class:`ScaledAt` or :class:`ProductAt` among the
    ops; ``src_offset`` is the storage element at which ``data`` begins. Raises
    :class:`UnfitValuesError` where scales or updates are not finite, or a result does not fit its type.
    """
    placed = [op for op in ops if isinstance(op, PlacedAt)]
    first = ops.index(placed[0])
    last = len(ops) - 1 - list(reversed(ops)).index(placed[-1])
    before, middle, rest = ops[:first], ops[first : last + 1], tuple(ops[last + 1 :])
    if not rest or not isinstance(rest[0], Cast):
        rest = (Cast(F32 if before else data_dtype), *rest)
    at = placed[0]
    steps = [factors.steps(tensor, op) for op in placed]
    for patch in patches(dims, src_offset, at):
        for rows, columns, dst in _blocks(patch, [s[0] for s in steps], [s[1] for s in steps]):
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
            value = strided(data[src * data_dtype.itemsize :], data_dtype.to_numpy(), walk, "src")
            target = strided(out[dst * out_dtype.itemsize :], out_dtype.to_numpy(), walk, "dst")
            for op in before:
                value = apply_one(op, value, tensor.name)
            for op in middle:
                if isinstance(op, ScaledAt):
                    value = _scaled(value, factors, tensor, op.number, rows, columns)
                elif isinstance(op, ProductAt):
                    value = _added(value, factors, tensor, op.number, rows, columns)
                else:
                    value = apply_one(op, value, tensor.name)
            apply(rest, value, target, tensor.name)


def _scaled(
    value: Array, factors: Factors, tensor: PlannedTensor, number: int, rows: _Cut, columns: _Cut
) -> Array:
    """Return the elements times the scales of their blocks."""
    high, wide = tensor.scales[number].block
    row_step, column_step = factors.steps(tensor, ScaledAt(number, 0, 0, 0, 0, 0))
    tile = factors.scales(tensor, number, rows.first // row_step, columns.first // column_step)
    row_of = (rows.first % row_step + rows.step * np.arange(rows.size)) // high
    column_of = (columns.first % column_step + columns.step * np.arange(columns.size)) // wide
    # Consecutive rows mostly share their scales.
    used, which = np.unique(row_of, return_inverse=True)
    spread = tile[used][:, column_of]
    if len(used) > 1:
        spread = spread[which]
    with np.errstate(over="ignore", invalid="ignore"):
        made: Array = np.multiply(value, spread, dtype=np.float32)
    check_finite((value, spread), made, tensor.name)
    return made


def _added(
    value: Array, factors: Factors, tensor: PlannedTensor, number: int, rows: _Cut, columns: _Cut
) -> Array:
    """Return the elements with those of a product added."""
    size = factors.tile_size(tensor.products[number].rank)
    row_tile, row_slice = rows.within(size)
    column_tile, column_slice = columns.within(size)
    left = factors.tile(tensor, number, "left", row_tile)[row_slice]
    right = factors.tile(tensor, number, "right", column_tile)[:, column_slice]
    update = _product(left, right, tensor.products[number].scale)
    if not np.isfinite(update).all():
        raise UnfitValuesError(
            "the update of an adapter is not finite",
            where=tensor.name,
            hint="the adapter's own values are infinite, NaN or too large: training diverged",
        )
    wide = np.float64 if value.dtype.itemsize == 8 else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        total: Array = np.add(value.astype(wide), update, dtype=wide)
    check_finite((value, update), total, tensor.name)
    return total


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
    """Some indices along one axis of the matrix, ``step`` apart, all within one tile of each kind."""

    first: int
    size: int
    step: int
    dst: int  # elements of the output between two of them

    def within(self, tile: int) -> tuple[int, slice]:
        """Return which tile of ``tile`` indices they are in, and where in it."""
        number, at = divmod(self.first, tile)
        return number, slice(at, at + (self.size - 1) * self.step + 1, self.step)


def _blocks(
    patch: Patch, row_tiles: Sequence[int], column_tiles: Sequence[int]
) -> Iterator[tuple[_Cut, _Cut, int]]:
    """Yield (rows, columns, first element of the output) of the blocks that make up ``patch``."""
    row_dim, outer_rows = _longest(patch.rows)
    column_dim, outer_columns = _longest(patch.columns)
    outer = (*outer_rows, *outer_columns, *patch.free)
    for index in product(*(range(d.size) for d in outer)):
        steps = [i * d.src for i, d in zip(index, outer, strict=True)]
        row = patch.row + sum(steps[: len(outer_rows)])
        column = patch.column + sum(steps[len(outer_rows) : len(outer_rows) + len(outer_columns)])
        dst = patch.dst_offset + sum(i * d.dst for i, d in zip(index, outer, strict=True))
        for at, columns in _cuts(column, column_dim, column_tiles, _BLOCK_COLUMNS):
            for i, rows in _cuts(
                row, row_dim, row_tiles, max(1, PRODUCT_BLOCK_ELEMENTS // columns.size)
            ):
                yield rows, columns, dst + at * columns.dst + i * rows.dst


def _longest(dims: Sequence[Dim]) -> tuple[Dim, tuple[Dim, ...]]:
    if not dims:
        return Dim(1, 0, 1), ()
    k = max(range(len(dims)), key=lambda i: dims[i].size)
    return dims[k], (*dims[:k], *dims[k + 1 :])


def _cuts(first: int, dim: Dim, tiles: Sequence[int], most: int) -> Iterator[tuple[int, _Cut]]:
    """Yield (how many steps precede, cut) for the indices ``first + i * dim.src``."""
    i = 0
    while i < dim.size:
        here = first + i * dim.src
        size = min(dim.size - i, most, *((t - 1 - here % t) // dim.src + 1 for t in tiles))
        yield i, _Cut(here, size, dim.src, dim.dst)
        i += size
