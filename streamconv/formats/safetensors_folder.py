"""A HuggingFace folder of safetensors files as a source: the base model that an adapter is merged into.

Which files count is what a loader takes: ``model.safetensors``, what ``model.safetensors.index.json``
says, or the only safetensors file. There are no checksums in them: a change shows by size, time and
samples alone.
"""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import xxhash

from streamconv.errors import BadInputError, UsageError
from streamconv.files.inputs import cannot_read, open_input, readable
from streamconv.files.names import INDEX, SINGLE
from streamconv.formats.identity import evidence_of
from streamconv.formats.safetensors_file import (
    MAX_HEADER_BYTES,
    FileTensor,
    read_header,
    read_index,
    weight_files,
)
from streamconv.ir.boxes import Box, contiguous_strides
from streamconv.ir.source import GlobalTensor, ShardLayout, ShardTable, SourceFile

_STEP_NBYTES = 1 << 20


def identify(folder: Path) -> tuple[SourceFile, ...]:
    """Return the weight files with size, time and hash of the header.

    Raises :class:`UsageError` where there are none, :class:`BadInputError` for a damaged index.
    """
    return tuple(identify_file(path) for path in _files(folder))


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
            found[name] = global_tensor(tensor, number, "whole, of the base model")
    _check_index(folder, found)
    return tuple(map(identify_file, paths)), found


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UsageError("--base names no folder", where=str(folder))
    files = weight_files(folder)
    if len(files) != 1 and not (folder / INDEX).is_file():
        raise UsageError(
            "--base names no folder of a model in safetensors files",
            where=str(folder),
            expected=f"{INDEX}, or {SINGLE}",
            found=", ".join(f.name for f in files[:5]) or "no safetensors file",
            hint="save the model with save_pretrained first" if any(folder.glob("*.bin")) else None,
        )
    return files


def _check_index(folder: Path, found: dict[str, GlobalTensor]) -> None:
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return
    absent = [n for n in read_index(folder / INDEX)[0] if n not in found]
    if absent:
        raise BadInputError(
            f"{len(absent)} tensors of the index are in no file",
            where=str(folder / INDEX),
            found=", ".join(absent[:5]),
        )


def identify_file(path: Path, name: str = "") -> SourceFile:
    """Return a safetensors file with size, time and hash of its header.

    It is called ``name``, or where it lies: a plan's root is the checkpoint's.
    """
    try:
        fd = open_input(path)
    except FileNotFoundError as error:
        raise cannot_read(error, path) from error
    with os.fdopen(fd, "rb") as stream, readable(path):
        stat = os.fstat(fd)
        prefix = stream.read(8)
        digest = xxhash.xxh3_128(prefix)
        left = min(int.from_bytes(prefix, "little"), MAX_HEADER_BYTES)
        while left and (piece := stream.read(min(left, _STEP_NBYTES))):
            digest.update(piece)
            left -= len(piece)
    return SourceFile(
        name or str(path.absolute()),
        stat.st_size,
        stat.st_mtime_ns,
        digest.hexdigest(),
        evidence=evidence_of(path),
    )


def global_tensor(tensor: FileTensor, file: int, placement: str) -> GlobalTensor:
    """Return a tensor of file number ``file``; ``placement`` is for people."""
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
    return GlobalTensor(tensor.name, tensor.dtype, layout, table, placement)
