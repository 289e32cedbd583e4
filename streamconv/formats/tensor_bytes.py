"""The bytes of a tensor as a file holds them: read piece by piece, looked at for what is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from streamconv.errors import BadInputError
from streamconv.files.inputs import readable
from streamconv.ir.dtypes import DType

STEP_BYTES = 1 << 20
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


def pieces(path: Path, begin: int, nbytes: int, step: int = STEP_BYTES) -> Iterator[bytes]:
    """Yield ``nbytes`` of a file in pieces of ``step``; :class:`BadInputError` where some are gone."""
    with readable(path), path.open("rb", buffering=0) as stream:
        stream.seek(begin)
        left = nbytes
        while left:
            piece = stream.read(min(left, step))
            # A local file gives all that it has; one cut off in an element is no tensor.
            if len(piece) < min(left, step):
                raise BadInputError("the file became shorter", where=str(path))
            yield piece
            left -= len(piece)


def is_finite(dtype: DType, data: Iterable[bytes]) -> bool:
    """Whether no number is NaN or an infinity, in ``data`` of whole elements; integers are finite."""
    mask = _MASKS.get(dtype.name)
    return mask is None or not any(
        bool(((np.frombuffer(piece, mask.dtype) & mask) == mask).any()) for piece in data
    )
