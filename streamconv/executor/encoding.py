"""Floats to fp8 in blocks: one scale for each block, and codes of 8 bits.

The scale of a block is its largest magnitude over 448, no less than 1e-12, or the power of two above
that; a code is the e4m3 nearest to ``value / scale``, ties to even. All of it is float32 and depends on
nothing but the block, so that tiles, threads and budgets do not show.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from streamconv.errors import UnfitValuesError
from streamconv.executor.codes import decoding
from streamconv.executor.products import rectangle
from streamconv.executor.windows import ENCODE_BYTES, PRODUCT_BLOCK_ELEMENTS, Segment, Window
from streamconv.ir.planned import PlannedTensor
from streamconv.ir.recipe import Encode

Array = np.ndarray[Any, np.dtype[Any]]

_LARGEST = np.float32(448)
_LEAST_SCALE = np.float32(1e-12)


class Encoder:
    """Makes the codes and the scales of tensors that are quantized; ``fill`` brings their floats.

    The scales of a tensor are kept from its codes to its scales, which follow in the file.
    """

    def __init__(self, fill: Callable[[Window, memoryview], None]) -> None:
        self._fill = fill
        self._grids: dict[object, Array] = {}
        self._lock = threading.Lock()

    def fill(self, segment: Segment, out: memoryview) -> None:
        """Bring the bytes of a segment of codes, or of scales, into ``out``."""
        tensor, encode = segment.tensor, segment.tensor.encode
        if encode is None:
            raise TypeError(f"{tensor.name} is not quantized")
        with self._lock:
            self._fill_one(segment, tensor, encode, out)

    def _fill_one(
        self, segment: Segment, tensor: PlannedTensor, encode: Encode, out: memoryview
    ) -> None:
        # Codes and scales are made of the same floats.
        key = tuple(s.fqn for s in tensor.sources), tensor.moves, tensor.terms
        if encode.part == "scales":
            grid = self._grids.pop(key, None)
            if grid is None or grid.shape != encode.grid or np.isnan(grid).any():
                grid = self._grid(encode)
                self._bands(tensor, encode, grid, 0, encode.shape[0] * encode.shape[1], None)
            raw = memoryview(grid.reshape(-1)[segment.lo : segment.hi].tobytes())
            out[: len(raw)] = raw
            if segment.hi < grid.size:
                self._grids[key] = grid
            return
        grid = self._grids.get(key)
        if grid is None or segment.lo == 0:
            self._grids.clear()
            grid = self._grids[key] = self._grid(encode)
        self._bands(tensor, encode, grid, segment.lo, segment.hi, out)

    @staticmethod
    def _grid(encode: Encode) -> Array:
        return np.full(encode.grid, np.nan, np.float32)

    def _bands(
        self,
        tensor: PlannedTensor,
        encode: Encode,
        grid: Array,
        lo: int,
        hi: int,
        out: memoryview | None,
    ) -> None:
        """Fill the grid with the scales of elements ``[lo, hi)``, and ``out`` with their codes."""
        rows, columns = encode.shape
        high, wide = encode.block
        floats = tensor.floats()
        most = ENCODE_BYTES // 4
        # Whole bands where they fit, else some blocks of one.
        across = columns if high * columns <= most else max(1, most // (high * wide)) * wide
        down = max(1, most // (high * columns)) * high if across == columns else high
        for top in range(lo // columns // high * high, -(-hi // columns), down):
            band = range(top, min(top + down, rows))
            for left in range(0, columns, across):
                piece = range(left, min(left + across, columns))
                values = rectangle(self._fill, floats, band, piece)
                scales = _scales(values, encode, tensor.name)
                i, j = top // high, left // wide
                grid[i : i + scales.shape[0], j : j + scales.shape[1]] = scales
                if out is not None:
                    _write_codes(values, scales, encode, band, piece, lo, hi, out)


def _scales(values: Array, encode: Encode, what: str) -> Array:
    high, wide = encode.block
    by_column = np.arange(0, values.shape[1], wide)
    amax = np.empty((-(-values.shape[0] // high), len(by_column)), np.float32)
    for k in range(len(amax)):
        band = values[k * high : (k + 1) * high]
        tops = np.maximum(band.max(axis=0), -band.min(axis=0))
        amax[k] = np.maximum.reduceat(tops, by_column)
    if not np.isfinite(amax).all():
        raise UnfitValuesError(
            "a weight that is to be quantized holds NaN or an infinity",
            where=what,
            hint="training diverged; --keep-dtype leaves a tensor as it is",
        )
    scales = np.maximum(amax / _LARGEST, _LEAST_SCALE)
    if encode.rule.endswith("ue8m0"):
        bits = scales.view(np.uint32)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
        scales = (exponent << 23).astype(np.uint32).view(np.float32)
    made: Array = scales
    return made


def _write_codes(
    values: Array,
    scales: Array,
    encode: Encode,
    band: range,
    piece: range,
    lo: int,
    hi: int,
    out: memoryview,
) -> None:
    high, wide = encode.block
    columns = encode.shape[1]
    column_of = np.arange(len(piece)) // wide
    step = max(1, PRODUCT_BLOCK_ELEMENTS // len(piece))
    for at in range(0, len(band), step):
        rows = np.arange(at, min(at + step, len(band)))
        codes = encoded(values[rows[0] : rows[-1] + 1] / scales[rows // high][:, column_of])
        for row, made in zip(rows, codes, strict=True):
            begin = (band.start + int(row)) * columns + piece.start
            first, end = max(begin, lo), min(begin + len(piece), hi)
            if first < end:
                out[first - lo : end - lo] = memoryview(made[first - begin : end - begin])


def encoded(values: Array) -> Array:
    """Return the e4m3 codes nearest to finite float32, ties to even; what is out of range is 448."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Rounded to odd, 8 bits of the fraction say to which of 4 the whole of it rounds.
    index = (bits >> 16) | ((bits & 0xFFFF) != 0)
    codes: Array = _encoding().take(index)
    return codes


@cache
def _encoding() -> Array:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    magnitude = np.abs(upper.view(np.float32))
    known = decoding("e4m3")[:127]
    with np.errstate(invalid="ignore"):
        above = np.minimum(np.searchsorted(known, magnitude), 126)
        below = np.maximum(above - 1, 0)
        middle = (known[below].astype(np.float64) + known[above]) / 2
        # Of two neighbours one has an even code.
        up = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))
    code = np.where(up | (magnitude == known[above]), above, below)
    code[np.isnan(magnitude)] = 127
    table = (code | (upper >> 31) << 7).astype(np.uint8)
    table.setflags(write=False)
    made: Array = table
    return made
