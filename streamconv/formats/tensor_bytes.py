"""The bytes of a tensor as a file holds them: read piece by piece, looked at for what is not finite."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from streamconv.errors import BadInputError
from streamconv.files.inputs import InputFile, opened, readable
from streamconv.ir.dtypes import DType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

STEP_BYTES = 1 << 20
# An exponent of all ones is NaN or infinity; of fp8 without infinities all bits but the sign are.
_MASKS = {
    "F64": ("u8", 0x7FF << 52),
    "F32": ("u4", 0xFF << 23),
    "C64": ("u4", 0xFF << 23),
    "F16": ("u2", 0x1F << 10),
    "BF16": ("u2", 0xFF << 7),
    "F8_E5M2": ("u1", 0x1F << 2),
    "F8_E4M3": ("u1", 0x7F),
    "F8_E8M0": ("u1", 0xFF),
}


def pieces(path: Path, begin: int, nbytes: int, step: int = STEP_BYTES) -> Iterator[bytes]:
    """Yield ``nbytes`` of a file in pieces of ``step``; :class:`BadInputError` where some are gone."""
    with readable(path), opened(path) as file, io.BufferedReader(file.stream()) as stream:
        stream.seek(begin)
        for at in range(begin, begin + nbytes, step):
            piece = stream.read(min(step, begin + nbytes - at))
            # What is cut off in an element is not a tensor.
            if len(piece) < min(step, begin + nbytes - at):
                raise BadInputError("the file became shorter", where=str(path))
            yield piece


def is_finite(dtype: DType, data: Iterable[bytes]) -> bool:
    """Whether no number is NaN or an infinity, in ``data`` of whole elements; integers are finite."""
    if dtype.name not in _MASKS:
        return True
    import numpy as np

    kind, bits = _MASKS[dtype.name]
    mask = np.dtype(kind).type(bits)
    return not any(
        bool(((np.frombuffer(piece, mask.dtype) & mask) == mask).any()) for piece in data
    )


class ElementReader:
    """Reads a few elements here and there in ``paths``; the files are open until the end."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._open: dict[int, InputFile] = {}
        self._stack = ExitStack()

    def read(
        self, file: int, start: int, dtype: DType, at: int, numel: int
    ) -> npt.NDArray[np.generic]:
        """Return ``numel`` elements from ``at`` on of the record that begins at byte ``start``."""
        import numpy as np

        path = self._paths[file]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(opened(path))
        nbytes = numel * dtype.itemsize
        data = self._open[file].pread(nbytes, start + at * dtype.itemsize)
        if len(data) < nbytes:
            raise BadInputError("the file became shorter", where=str(path))
        return np.frombuffer(data, dtype.to_numpy())

    def __enter__(self) -> ElementReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def rounds_to(wide: npt.NDArray[np.generic], narrow: npt.NDArray[np.generic]) -> bool:
    """Whether each element of ``narrow`` is that of ``wide``, cast; a NaN is a NaN."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        cast = wide.astype(narrow.dtype)
    return bool(np.all((cast == narrow) | ((cast != cast) & (narrow != narrow))))
