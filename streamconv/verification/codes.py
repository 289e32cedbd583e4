"""Whether the codes and scales of fp8 weights can be what they say, without a look at a source.

A code must not be NaN, a scale must be finite and positive, and a power of two where the config says
ue8m0. Of weights that were quantized here the largest code of each block is known, too: the scale was
made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from streamconv.formats.safetensors_file import FileTensor

Array = np.ndarray[Any, np.dtype[Any]]

_NAN, _LARGEST = 0x7F, 0x7E  # of e4m3; the largest is 448
_HALF = 0x76  # 224: the least that the largest of a block can be where scales are powers of two
_LEAST_SCALE = np.float32(1e-12)
# Blocks whose scale is this small hold next to nothing, and any code may be their largest.
_TINY = np.float32(2e-12)
_STEP_BYTES = 4 << 20


def code_problems(
    tensors: Mapping[str, FileTensor], owners: Mapping[str, str], rule: str | None
) -> Iterator[tuple[str, str]]:
    """Yield (name, what is wrong) for fp8 weights and their scales.

    ``owners`` tells of each scale the weight that it belongs to; ``rule`` is what quantized the
    weights, None where they were handed on.
    """
    for name, owner in owners.items():
        weight, scale = tensors.get(owner), tensors[name]
        if weight is None or weight.dtype.name != "F8_E4M3" or scale.dtype.name != "F32":
            continue
        grid = np.frombuffer(b"".join(scale.pieces()), np.float32)
        if not np.isfinite(grid).all() or (grid <= 0).any():
            yield name, "a scale is not a positive number"
            continue
        if rule is not None and rule.endswith("ue8m0") and (grid.view(np.uint32) & 0x7FFFFF).any():
            yield name, "a scale is not a power of two"
        if rule is not None and (grid < _LEAST_SCALE).any():
            yield name, "a scale is smaller than the least that is written"
        problem = _codes(weight, scale, grid, rule)
        if problem:
            yield owner, problem


def _codes(weight: FileTensor, scale: FileTensor, grid: Array, rule: str | None) -> str:
    """Return what is wrong with the codes of a weight; read in whole bands of blocks."""
    if rule is None or len(weight.shape) != 2 or len(scale.shape) != 2:
        found = (np.frombuffer(piece, np.uint8) for piece in weight.pieces())
        return "a code is NaN" if any(((p & 127) == _NAN).any() for p in found) else ""
    rows, columns = weight.shape
    high, wide = (1, columns) if rule == "fp8-channel" else (128, 128)
    expected = _HALF if rule.endswith("ue8m0") else _LARGEST
    scales = grid.reshape(scale.shape)
    if scales.shape != (-(-rows // high), -(-columns // wide)):
        return f"{list(scale.shape)} scales for {list(weight.shape)} codes"
    step = max(1, _STEP_BYTES // max(1, high * columns)) * high
    for k, piece in enumerate(weight.pieces(step * columns)):
        codes = (np.frombuffer(piece, np.uint8) & 127).reshape(-1, columns)
        across = np.maximum.reduceat(codes, np.arange(0, columns, wide), axis=1)
        largest = np.maximum.reduceat(across, np.arange(0, len(codes), high), axis=0)
        if (largest == _NAN).any():
            return "a code is NaN"
        top = k * (step // high)
        band = scales[top : top + len(largest)]
        if ((largest < expected) & (band > _TINY)).any():
            return f"no code of a block is as large as {rule} makes the largest"
    return ""
