"""Casts give torch's bits. Every one of the 2**32 floats: ``python -m tests.test_casts``."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from streamconv.dtypes import BF16, F16, F32, DType
from streamconv.errors import BadInputError
from streamconv.kernels import run
from streamconv.lowering import Dim
from streamconv.recipe import Cast

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16}
# The first magnitude that rounds to infinity; NaNs begin one above infinity's pattern.
TOO_LARGE = {"F16": 0x477FF000, "BF16": 0x7F7F8000}
LARGEST = {"F16": 0x7BFF, "BF16": 0x7F7F}
QUIET_NAN = {"F16": 0x7E00, "BF16": 0x7FC0}
INFINITY = 0x7F800000


def cast(bits: np.ndarray, dtype: DType) -> np.ndarray:
    """Cast floats, given as their bits, with our kernel; return the result's bits."""
    out = bytearray(2 * bits.size)
    dims = (Dim(bits.size, 1, 1),)
    run(memoryview(out), dtype, memoryview(bits).cast("B"), F32, dims, (Cast(dtype),), what="t")
    return np.frombuffer(out, np.uint16)


def differences(bits: np.ndarray, dtype: DType) -> int:
    """Count the floats, of those that the kernel takes, whose cast differs from torch's.

    NaNs are one quiet NaN with us (torch writes one of two, by the path it takes).
    """
    magnitude = bits & 0x7FFFFFFF
    bits = bits[(magnitude < TOO_LARGE[dtype.name]) | (magnitude >= INFINITY)]
    if not bits.size:
        return 0
    expected = torch.from_numpy(bits.view(np.float32)).to(TORCH[dtype.name]).view(torch.int16)
    expected = expected.numpy().view(np.uint16)
    nan = (bits & 0x7FFFFFFF) > INFINITY
    return int((cast(bits, dtype) != np.where(nan, QUIET_NAN[dtype.name], expected)).sum())


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_every_exponent_and_every_way_to_round(dtype: DType) -> None:
    ends = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x2FFF, 0x3000, 0x3001, 0x5A5A]
    ends += [0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFF, *(1 << k for k in range(16))]
    bits = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | np.array(ends, np.uint32)
    assert differences(bits.reshape(-1), dtype) == 0


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("sign", [0, 1 << 31], ids=["positive", "negative"])
def test_the_first_value_that_would_become_infinite_is_refused(dtype: DType, sign: int) -> None:
    bits = np.zeros(1000, np.uint32)
    bits[500] = sign | (TOO_LARGE[dtype.name] - 1)
    assert cast(bits, dtype)[500] & 0x7FFF == LARGEST[dtype.name]
    bits[500] += 1
    with pytest.raises(BadInputError, match="does not fit"):
        cast(bits, dtype)


def main() -> int:
    """Compare all 2**32 floats."""
    step = 1 << 24
    total = 0
    for dtype in (F16, BF16):
        found = 0
        for lo in range(0, 1 << 32, step):
            found += differences(np.arange(lo, lo + step, dtype=np.uint64).astype(np.uint32), dtype)
        print(f"{dtype}: {found} of {1 << 32} differ", flush=True)
        total += found
    return bool(total)


if __name__ == "__main__":
    sys.exit(main())
