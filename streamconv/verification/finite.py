"""Which tensors hold NaN or infinity: of a model that is to run, none should."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from streamconv.safefile import FileTensor

_STEP_BYTES = 1 << 20
# An exponent of all ones is NaN or infinity; of fp8 without infinities all bits but the sign are.
_MASKS: dict[str, np.unsignedinteger[Any]] = {
    "F64": np.uint64(0x7FF << 52),
    "F32": np.uint32(0xFF << 23),
    "C64": np.uint32(0xFF << 23),
    "F16": np.uint16(0x1F << 10),
    "BF16": np.uint16(0xFF << 7),
    "F8_E5M2": np.uint8(0x1F << 2),
    "F8_E4M3": np.uint8(0x7F),
    "F8_E8M0": np.uint8(0xFF),
}


def not_finite(tensors: Iterable[FileTensor]) -> list[str]:
    """Return the names of those that hold a number which is not finite; every byte is read."""
    return [t.name for t in tensors if t.dtype.name in _MASKS and _is_infected(t)]


def _is_infected(tensor: FileTensor) -> bool:
    mask = _MASKS[tensor.dtype.name]
    return any(
        bool(((np.frombuffer(piece, mask.dtype) & mask) == mask).any())
        for piece in tensor.pieces(_STEP_BYTES)
    )
