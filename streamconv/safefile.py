"""Reading the header of a safetensors file, strictly: where each tensor's bytes lie.

Byte layout (safetensors README): 8 bytes little-endian header length, JSON, then the tensors' bytes,
which must cover the rest of the file without holes or overlaps.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.boxes import Shape
from streamconv.dtypes import BY_NAME, DType
from streamconv.errors import BadInputError, UnsafeInputError

MAX_HEADER_BYTES = 100_000_000  # safetensors/src/tensor.rs


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file: its type, and the bytes ``[begin, end)`` of the file that hold it."""

    name: str
    path: Path
    dtype: DType
    shape: Shape
    begin: int
    end: int


def read_header(path: Path) -> dict[str, FileTensor]:
    """Return the tensors of a safetensors file by name, in the order of their bytes.

    Raises :class:`BadInputError` for a damaged file, :class:`UnsafeInputError` for an oversized
    header.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise UnsafeInputError(
                "a safetensors header is too large",
                where=str(path),
                expected=f"at most {MAX_HEADER_BYTES} bytes",
                found=f"{length} bytes",
            )
        raw = stream.read(length)
    try:
        if size < 8 or len(raw) != length:
            raise ValueError("the file is cut off in its header")
        header = json.loads(raw, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = [_tensor(path, n, t, 8 + length) for n, t in header.items()]
        tensors.sort(key=lambda t: (t.begin, t.end))
        at = 8 + length
        for t in tensors:
            if t.begin != at:
                raise ValueError(f"{t.name} begins at byte {t.begin}, not at {at}")
            at = t.end
        if at != size:
            raise ValueError(f"the tensors end at byte {at} of {size}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInputError(
            "this is no valid safetensors file", where=str(path), found=str(error)[:200]
        ) from error
    return {t.name: t for t in tensors}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _tensor(path: Path, name: str, entry: dict[str, Any], base: int) -> FileTensor:
    dtype = BY_NAME[entry["dtype"]]
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name}: sizes that are no counts")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {end - begin} bytes for {dtype} {list(shape)}")
    return FileTensor(name, path, dtype, shape, base + begin, base + end)


def read_folder(folder: Path, *, nested: bool = False) -> dict[str, FileTensor]:
    """Return all tensors of a model folder; raises where a name occurs in two files.

    ``nested``: those of its sub-folders (an adapter's), too.
    """
    found: dict[str, FileTensor] = {}
    for path in sorted((folder.rglob if nested else folder.glob)("*.safetensors")):
        for name, tensor in read_header(path).items():
            if name in found:
                raise BadInputError(
                    "two files hold a tensor of one name",
                    where=str(folder),
                    found=f"{name} in {found[name].path.name} and {path.name}",
                )
            found[name] = tensor
    return found
