"""Tables of the codes that quantized weights are stored in: what each byte stands for.

Written out from the formats and not taken from a library: libraries differ in what is out of range, and
in NaN.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from streamconv.ir.recipe import Code

Array = np.ndarray[Any, np.dtype[Any]]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@cache
def decoding(code: Code) -> Array:
    """Return the float32 that each of the 256 bytes stands for."""
    byte = np.arange(256)
    if code == "exp2":
        # By its bits: 2^-127 is not a normal float32.
        exact = np.where(byte == 255, np.nan, np.ldexp(1.0, byte - 127))
    elif code in ("low4", "high4"):
        half = byte & 15 if code == "low4" else byte >> 4
        exact = np.array(_E2M1)[half & 7] * np.where(half & 8, -1.0, 1.0)
    else:
        mantissa_bits, bias = (3, 7) if code == "e4m3" else (2, 15)
        fraction = byte & ((1 << mantissa_bits) - 1)
        exponent = (byte & 127) >> mantissa_bits
        unit = 1 << mantissa_bits
        exact = np.where(
            exponent == 0,
            np.ldexp(fraction / unit, 1 - bias),
            np.ldexp(1 + fraction / unit, exponent - bias),
        )
        if code == "e4m3":
            exact[byte & 127 == 127] = np.nan
        else:
            special = exponent == 31
            exact[special] = np.where(fraction[special] == 0, np.inf, np.nan)
        exact = np.where(byte & 128, -exact, exact)
    table = exact.astype(np.float32)
    table.setflags(write=False)
    return table
