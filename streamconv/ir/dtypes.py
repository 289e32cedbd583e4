"""Element types: one record per dtype, named as torch, numpy and safetensors name it.

The safetensors names and their bit widths are those of the format's own ``Dtype`` enum
(safetensors 0.8, ``safetensors/src/tensor.rs``). A dtype without a safetensors name (complex128)
can be read and reported but never written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    ``name`` is the safetensors name (or torch's where safetensors has none), ``torch`` the attribute
    of the torch module, ``itemsize`` the bytes of one element, ``numpy`` the numpy name, or the
    ml_dtypes name where numpy has none.
    """

    name: str
    torch: str
    itemsize: int
    numpy: str
    writable: bool = True

    @property
    def castable(self) -> bool:
        """Whether ``--dtype`` may touch it: only the plain floating types, never fp8 or integers."""
        return self.name in ("F64", "F32", "F16", "BF16")

    def to_numpy(self) -> np.dtype[np.generic]:
        """Return the numpy dtype (little endian), importing ml_dtypes only for what numpy lacks."""
        return _numpy_dtype(self.numpy)

    def __str__(self) -> str:
        return self.torch


@cache
def _numpy_dtype(name: str) -> np.dtype[np.generic]:
    import numpy as np

    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        dtype: np.dtype[np.generic] = np.dtype(getattr(ml_dtypes, name))
        return dtype


_ALL = (
    DType("BOOL", "bool", 1, "bool"),
    DType("U8", "uint8", 1, "uint8"),
    DType("I8", "int8", 1, "int8"),
    DType("F8_E5M2", "float8_e5m2", 1, "float8_e5m2"),
    DType("F8_E4M3", "float8_e4m3fn", 1, "float8_e4m3fn"),
    DType("F8_E8M0", "float8_e8m0fnu", 1, "float8_e8m0fnu"),
    DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 1, "float8_e4m3fnuz"),
    DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 1, "float8_e5m2fnuz"),
    DType("I16", "int16", 2, "int16"),
    DType("U16", "uint16", 2, "uint16"),
    DType("F16", "float16", 2, "float16"),
    DType("BF16", "bfloat16", 2, "bfloat16"),
    DType("I32", "int32", 4, "int32"),
    DType("U32", "uint32", 4, "uint32"),
    DType("F32", "float32", 4, "float32"),
    DType("C64", "complex64", 8, "complex64"),
    DType("F64", "float64", 8, "float64"),
    DType("I64", "int64", 8, "int64"),
    DType("U64", "uint64", 8, "uint64"),
    DType("complex128", "complex128", 16, "complex128", writable=False),
)

BY_NAME = {d.name: d for d in _ALL}
BY_TORCH = {d.torch: d for d in _ALL}

F16, BF16, F32 = (BY_NAME[n] for n in ("F16", "BF16", "F32"))
