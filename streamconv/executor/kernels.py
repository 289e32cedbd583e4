"""Kernels: strided copies and elementwise ops between byte buffers, in numpy.

A kernel fills a hyper-rectangle of an output buffer from a strided walk over an input buffer. It
allocates nothing as large as its data, so that a window's memory is what the window says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamconv.errors import UnfitValuesError
from streamconv.executor.codes import decoding
from streamconv.ir.dtypes import DType
from streamconv.ir.lowering import Dim, MoveOp
from streamconv.ir.recipe import AddScalar, Cast, Decode, Zero

Array = np.ndarray[Any, np.dtype[Any]]

# Casts work on slices of this many elements, so that the check after a cast finds them in cache.
_CAST_ELEMENTS = 1 << 18


def strided(buffer: memoryview, dtype: np.dtype[Any], dims: Sequence[Dim], side: str) -> Array:
    """Return the walk ``dims`` over a buffer as an array; ``side`` is ``dst`` or ``src``.

    Raises ``ValueError`` for a walk that leaves the buffer.
    """
    # The plain constructor: it checks the walk, and takes a tenth of as_strided's time, of which
    # checkpoints of many small shards have a lot.
    shape = [d.size for d in dims]
    return np.ndarray(shape, dtype, buffer, 0, [getattr(d, side) * dtype.itemsize for d in dims])


def run(
    out: memoryview,
    out_dtype: DType,
    data: memoryview,
    data_dtype: DType,
    dims: Sequence[Dim],
    ops: Sequence[MoveOp],
    *,
    what: str,
) -> None:
    """Copy the walk ``dims`` from ``data`` into ``out``, applying ``ops`` to each element.

    Both walks begin at the first byte of their buffer; neither need be aligned. Raises
    :class:`UnfitValuesError`, naming ``what``, where a cast would turn a finite value into an infinite
    one.
    """
    if not ops:
        # Bytes are moved, not numbers: an integer view keeps signalling NaNs and odd bools intact.
        raw = np.dtype(f"u{out_dtype.itemsize}")
        np.copyto(
            strided(out, raw, dims, "dst"),
            strided(data, raw, dims, "src"),
        )
        return
    source = strided(data, data_dtype.to_numpy(), dims, "src")
    target = strided(out, out_dtype.to_numpy(), dims, "dst")
    if not dims:
        source, target = source.reshape(1), target.reshape(1)
    for part in _slices(source.shape):
        apply(ops, source[part], target[part], what)


def apply(ops: Sequence[MoveOp], value: Array, out: Array, what: str) -> None:
    """Write ``value`` to ``out``, of the same shape, with ``ops`` (one or more) applied in turn."""
    for op in ops[:-1]:
        value = _apply(op, value, None, what)
    _apply(ops[-1], value, out, what)


def apply_one(op: MoveOp, value: Array, what: str) -> Array:
    """Return what ``op`` makes of ``value``."""
    return _apply(op, value, None, what)


def _slices(shape: tuple[int, ...]) -> list[tuple[slice | int, ...]]:
    """Cut a walk along its outer dims into pieces of about ``_CAST_ELEMENTS``."""
    size = int(np.prod(shape))
    if size <= _CAST_ELEMENTS:
        return [(slice(None),)]
    rows, row = shape[0], size // shape[0]
    if row > _CAST_ELEMENTS:
        return [(i, *rest) for i in range(rows) for rest in _slices(shape[1:])]
    step = max(1, _CAST_ELEMENTS // row)
    return [(slice(i, i + step),) for i in range(0, rows, step)]


def _apply(op: MoveOp, value: Array, out: Array | None, what: str) -> Array:
    if isinstance(op, AddScalar):
        # In float32 and rounded once: what torch does for 16-bit floats, too.
        wide = np.dtype(np.float64 if value.dtype.itemsize == 8 else np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            made: Array = value.astype(wide)
            made += wide.type(op.value)
    elif isinstance(op, Zero):
        made = np.zeros_like(value)
    elif isinstance(op, Decode):
        value = made = decoding(op.code).take(value.view(np.uint8))
        if out is None:
            return made
    elif isinstance(op, Cast):
        made = value
        if op.dtype.name in ("BF16", "F16") and value.dtype.itemsize == 8:
            # numpy and ml_dtypes go from float64 straight or by way of float32; torch goes by way
            # of float32, and its bits are the ones people compare with.
            with np.errstate(over="ignore", invalid="ignore"):
                made = value.astype(np.float32)
    else:
        raise TypeError(f"no elementwise operation: {op}")
    if out is None:
        out = np.empty(value.shape, op.dtype.to_numpy() if isinstance(op, Cast) else value.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, made, casting="unsafe")
    # Held against what came in, not against a step on the way: that may be infinite already.
    check_finite((value,), out, what)
    return out


# By the bytes of an element and whether it is bfloat16: the bit pattern of +inf (patterns at or above
# it, sign aside, are inf and NaN) and that of the one quiet NaN that is written.
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 0x7FF << 52}
_QUIET_NAN = {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": 0x7FC00000, "float64": 0xFFF << 51}


def check_finite(inputs: Sequence[Array], out: Array, what: str) -> None:
    """Refuse infinite results of finite ``inputs``, and make every NaN in ``out`` the one quiet NaN.

    Raises :class:`UnfitValuesError`, naming ``what``.
    """
    dtype = out.dtype
    infinity = _INFINITY[dtype.name]
    bits = out.view(f"u{dtype.itemsize}")
    sign = 1 << (8 * dtype.itemsize - 1)
    # Two maxima find out whether there is anything to look at, many times faster than a mask.
    if not bits.size or (
        bits.view(f"i{dtype.itemsize}").max() < infinity and bits.max() < sign + infinity
    ):
        return
    magnitude = bits & bits.dtype.type(sign - 1)
    lost = magnitude == infinity
    for value in inputs:
        with np.errstate(invalid="ignore"):  # of a signalling NaN
            lost = lost & np.isfinite(value)
    if lost.any():
        worst = max(
            float(np.abs(np.broadcast_to(value, lost.shape)[lost].astype(np.float64)).max())
            for value in inputs
        )
        raise UnfitValuesError(
            f"a finite value does not fit into {dtype.name}",
            where=what,
            expected=f"values that {dtype.name} can hold",
            found=f"{worst:.6g} in {int(lost.sum())} or more elements",
            hint=_WAY_ON[dtype.name].format(what=what),
        )
    bits[magnitude > infinity] = _QUIET_NAN[dtype.name]


_WAY_ON = {
    "float16": "`--dtype bfloat16` or `--dtype float32` has room for it, or leave this tensor as it is "
    "with `--keep-dtype {what}`",
    "bfloat16": "`--dtype float32` may have room for it, or leave this tensor as it is with "
    "`--keep-dtype {what}`",
    "float32": "leave this tensor as it is with `--keep-dtype {what}`, or all with `--dtype keep`",
    "float64": "look at the checkpoint: training diverged",
}
