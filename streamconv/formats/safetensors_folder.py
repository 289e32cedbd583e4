"""A HuggingFace folder of safetensors files as a source: the base model that an adapter is merged into.

Which files count is what ``model.safetensors.index.json`` says; without one, ``model.safetensors`` or
the only safetensors file. There are no checksums in them: a change shows by size and time alone.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import xxhash

from streamconv.boxes import Box, contiguous_strides
from streamconv.errors import BadInputError, UsageError
from streamconv.planned import INDEX
from streamconv.safefile import FileTensor, read_header
from streamconv.source import GlobalTensor, ShardLayout, ShardTable, SourceFile

_MAX_INDEX_NBYTES = 256 << 20


def identify(folder: Path) -> tuple[SourceFile, ...]:
    """Return the weight files with size, time and hash of the header.

    Raises :class:`UsageError` where there are none, :class:`BadInputError` for a damaged index.
    """
    return tuple(_identify(path) for path in _files(folder))


def read(folder: Path, first_file: int) -> tuple[tuple[SourceFile, ...], dict[str, GlobalTensor]]:
    """Return the weight files and the tensors; the files are numbered from ``first_file`` on."""
    paths = _files(folder)
    found: dict[str, GlobalTensor] = {}
    for number, path in enumerate(paths, first_file):
        for name, tensor in read_header(path).items():
            if name in found:
                raise BadInputError(
                    "two files hold a tensor of one name", where=str(path), found=name
                )
            found[name] = _tensor(tensor, number)
    _check_index(folder, found)
    return tuple(map(_identify, paths)), found


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UsageError("--base names no folder", where=str(folder))
    weight_map = _weight_map(folder)
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
        absent = [n for n in names if "/" in n or not (folder / n).is_file()]
        if absent:
            raise BadInputError(
                f"the index names {len(absent)} files that are not there",
                where=str(folder / INDEX),
                found=", ".join(absent[:5]),
            )
        return [folder / n for n in names]
    files = sorted(folder.glob("*.safetensors"))
    whole = folder / "model.safetensors"
    if whole in files:
        return [whole]
    if len(files) != 1:
        raise UsageError(
            "--base names no folder of a model in safetensors files",
            where=str(folder),
            expected=f"{INDEX}, or model.safetensors",
            found=", ".join(f.name for f in files[:5]) or "no safetensors file",
        )
    return files


def _weight_map(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_INDEX_NBYTES:
            raise ValueError("too large")
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(v, str) for v in found.values()):
            raise TypeError("a file name that is no string")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInputError(
            "the index of the weights cannot be read", where=str(path), found=str(error)[:200]
        ) from error
    return dict(found)


def _check_index(folder: Path, found: dict[str, GlobalTensor]) -> None:
    weight_map = _weight_map(folder)
    absent = [n for n in weight_map or () if n not in found]
    if absent:
        raise BadInputError(
            f"{len(absent)} tensors of the index are in no file",
            where=str(folder / INDEX),
            found=", ".join(absent[:5]),
        )


def _identify(path: Path) -> SourceFile:
    stat = path.stat()
    with path.open("rb") as stream:
        prefix = stream.read(8)
        header = stream.read(min(int.from_bytes(prefix, "little"), stat.st_size))
    digest = xxhash.xxh3_128_hexdigest(prefix + header)
    # Absolute, for the plan's root is the checkpoint's.
    return SourceFile(str(path.absolute()), stat.st_size, stat.st_mtime_ns, digest)


def _tensor(tensor: FileTensor, file: int) -> GlobalTensor:
    nbytes = tensor.end - tensor.begin
    table = ShardTable(
        files=array("I", [file]),
        keys=array("I", [0]),
        starts=array("Q", [tensor.begin]),
        nbytes=array("Q", [nbytes]),
        crcs=array("I", [0]),
        header_nbytes=array("H", [0]),
    )
    layout = ShardLayout(
        tensor.shape, (Box.whole(tensor.shape),), (contiguous_strides(tensor.shape),), (0,)
    )
    return GlobalTensor(tensor.name, tensor.dtype, layout, table, "whole, of the base model")
