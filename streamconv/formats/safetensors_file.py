"""Reading the header of a safetensors file, strictly: where each tensor's bytes lie.

Byte layout (safetensors README): 8 bytes little-endian header length, JSON, then the tensors' bytes,
which must cover the rest of the file without holes or overlaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.errors import BadInputError, UnsafeInputError
from streamconv.files.inputs import opened
from streamconv.files.jsonfile import TEXT, mismatches, read_json, unique_keys
from streamconv.files.memory_limit import too_much
from streamconv.files.names import INDEX, SINGLE
from streamconv.formats.tensor_bytes import STEP_BYTES, pieces
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import BY_NAME, DType

MAX_HEADER_BYTES = 100_000_000  # safetensors/src/tensor.rs
_MAX_SIZE = (1 << 63) - 1  # torch's own


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file: its type, and the bytes ``[begin, end)`` of the file that hold it."""

    name: str
    path: Path
    dtype: DType
    shape: Shape
    begin: int
    end: int

    def pieces(self, step: int = STEP_BYTES) -> Iterator[bytes]:
        """Yield the bytes in pieces of ``step``; raises :class:`BadInputError` where some are gone."""
        return pieces(self.path, self.begin, self.end - self.begin, step)


def read_header(path: Path) -> dict[str, FileTensor]:
    """Return the tensors of a safetensors file by name, in the order of their bytes.

    Raises what :func:`read_header_and_metadata` raises.
    """
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, FileTensor], dict[str, object]]:
    """Return the tensors of a safetensors file, and what its writer says in ``__metadata__``.

    Raises :class:`BadInputError` for a damaged file, :class:`UnsafeInputError` for an oversized
    header.
    """
    with opened(path) as file:
        size = file.status.st_size
        length = int.from_bytes(file.pread(8, 0), "little")
        if length > MAX_HEADER_BYTES:
            raise UnsafeInputError(
                "a safetensors header is too large",
                where=str(path),
                expected=f"at most {MAX_HEADER_BYTES} bytes",
                found=f"{length} bytes",
            )
        raw = b""
        while piece := file.pread(length - len(raw), 8 + len(raw)):
            raw += piece  # one read gives all of it, but for a signal
    try:
        if size < 8 or len(raw) != length:
            raise ValueError("the file is cut off in its header")
        header = json.loads(raw, object_pairs_hook=unique_keys)
        metadata = header.pop("__metadata__", None)
        tensors = [_tensor(path, n, t, 8 + length) for n, t in header.items()]
        tensors.sort(key=lambda t: (t.begin, t.end))
        at = 8 + length
        for t in tensors:
            if t.begin != at:
                raise ValueError(f"{t.name} begins at byte {t.begin}, not at {at}")
            at = t.end
        if at != size:
            raise ValueError(f"the tensors end at byte {at} of {size}")
    except MemoryError:
        raise too_much(str(path), length) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInputError(
            "not a valid safetensors file", where=str(path), found=str(error)[:200]
        ) from error
    return {t.name: t for t in tensors}, metadata if isinstance(metadata, dict) else {}


def _tensor(path: Path, name: str, entry: dict[str, Any], base: int) -> FileTensor:
    dtype = BY_NAME[entry["dtype"]]
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(n) is int and 0 <= n <= _MAX_SIZE for n in (*shape, begin, end)):
        raise ValueError(f"{name[:200]}: sizes that are not counts of 63 bits")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {end - begin} bytes for {dtype} {list(shape)}")
    return FileTensor(name, path, dtype, shape, base + begin, base + end)


def read_index(path: Path) -> tuple[dict[str, str], object]:
    """Return of an index which file holds each tensor, and the bytes of all tensors as it has them.

    Raises :class:`BadInputError` for a damaged index.
    """
    index = read_json(path, most_bytes=MAX_HEADER_BYTES)
    wrong = next(mismatches(index, {"weight_map": {str: TEXT}}), None)
    if wrong is not None:
        raise BadInputError("the index cannot be read", where=str(path), found=wrong)
    metadata = index.get("metadata")
    return index["weight_map"], metadata.get("total_size") if isinstance(metadata, dict) else None


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that a loader of this folder takes: the single one goes before an index.

    Without either all safetensors files. Raises :class:`BadInputError` for a damaged index, and for
    one that names what is not a file of this folder.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    return listed_files(index)


def listed_files(index: Path) -> list[Path]:
    """Return the files that an index names; raises :class:`BadInputError` where one is not there."""
    names = sorted(set(read_index(index)[0].values()))
    absent = [n for n in names if Path(n).name != n or not (index.parent / n).is_file()]
    if absent:
        outside = "/" in absent[0]
        raise BadInputError(
            f"the index names a file that is not {'in its folder' if outside else 'there'}",
            where=str(index),
            found=absent[0][:200],
        )
    return [index.parent / name for name in names]


def read_folder(folder: Path, *, nested: bool = False) -> dict[str, FileTensor]:
    """Return all tensors of a model folder; raises where a name occurs in two files.

    ``nested``: those of its sub-folders (an adapter's), too.
    """
    paths = (folder.rglob if nested else folder.glob)("*.safetensors")
    return read_files(sorted(paths), folder)


def read_files(paths: Iterable[Path], folder: Path) -> dict[str, FileTensor]:
    """Return all tensors of these files of a folder; raises where a name occurs in two of them."""
    found: dict[str, FileTensor] = {}
    for path in paths:
        for name, tensor in read_header(path).items():
            if name in found:
                raise BadInputError(
                    "two files hold a tensor of one name",
                    where=str(folder),
                    found=f"{name} in {found[name].path.name} and {path.name}",
                )
            found[name] = tensor
    return found
