"""The weight files of a finished model, and where each tensor lies in them.

Which files count is what a loader takes: ``model.safetensors``, what its index says, the only
safetensors file; then the same of ``pytorch_model.bin``, which torch wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import xxhash

from streamconv.errors import BadInputError
from streamconv.files.inputs import opened
from streamconv.files.names import BIN, BIN_INDEX, INDEX, SINGLE
from streamconv.formats.identity import evidence_of, identify_torch_file
from streamconv.formats.safetensors_file import (
    MAX_HEADER_BYTES,
    listed_files,
    read_header,
    read_index,
)
from streamconv.formats.whole_tensors import stored_tensor, whole_tensor
from streamconv.ir.source import GlobalTensor, Skipped, SourceFile
from streamconv.torchfile.single import read_torch_file

_STEP_NBYTES = 1 << 20
_SINGLE = (SINGLE, BIN, "adapter_model.safetensors", "adapter_model.bin")


def main_file(folder: Path) -> Path | None:
    """Return the file that shows that a model is here, an index or the only file, by names alone."""
    if not folder.is_dir():
        return None
    safe = sorted(folder.glob("*.safetensors"))
    named = [folder / SINGLE, folder / INDEX, *(safe if len(safe) == 1 else [])]
    return next((p for p in (*named, folder / BIN, folder / BIN_INDEX) if p.is_file()), None)


def find(folder: Path) -> list[Path]:
    """Return the weight files that a loader takes, none where there is no model.

    Raises :class:`BadInputError` for an index that is damaged, or names what is not there.
    """
    main = main_file(folder)
    if main is None:
        return []
    return listed_files(main) if main.name in (INDEX, BIN_INDEX) else [main]


def index_of(paths: Sequence[Path]) -> Path | None:
    """Return the index that these files were found by, None for a single file."""
    if not paths:
        return None
    name = INDEX if paths[0].suffix == ".safetensors" else BIN_INDEX
    path = paths[0].parent / name
    # The single file goes before an index that was left there, and an adapter's is none of a model.
    return path if path.is_file() and paths[0].name not in _SINGLE else None


def identify(paths: Iterable[Path], root: Path | None) -> tuple[SourceFile, ...]:
    """Return what identifies these files, relative to ``root``; absolute without one."""
    return tuple(
        identify_safetensors(p, root)
        if p.suffix == ".safetensors"
        else identify_torch_file(p, root)
        for p in paths
    )


def read(
    paths: Sequence[Path], root: Path | None, first_file: int = 0, *, placement: str = "whole"
) -> tuple[tuple[SourceFile, ...], dict[str, GlobalTensor], tuple[Skipped, ...]]:
    """Return the files, numbered from ``first_file`` on, their tensors, and what is left out.

    ``root`` is as in :func:`identify`.

    Raises :class:`BadInputError` where a name occurs twice, or the index has one that no file has.
    """
    files = list(identify(paths, root))
    found: dict[str, GlobalTensor] = {}
    skipped: list[Skipped] = []
    for number, path in enumerate(paths, first_file):
        if path.suffix == ".safetensors":
            tensors = {n: whole_tensor(t, number, placement) for n, t in read_header(path).items()}
        else:
            contents = read_torch_file(path)
            tensors = {
                n: stored_tensor(n, s, number, path, placement) for n, s in contents.tensors.items()
            }
            skipped += [Skipped(n, reason) for n, reason in contents.skipped]
            files[number - first_file] = replace(
                files[number - first_file], entry_prefix=contents.prefix
            )
        twice = next((n for n in tensors if n in found), None)
        if twice is not None:
            raise BadInputError("two files hold a tensor of one name", where=str(path), found=twice)
        found |= tensors
    index = index_of(paths)
    absent = [n for n in read_index(index)[0] if n not in found] if index else []
    if absent:
        raise BadInputError(
            f"{len(absent)} tensors of the index are in no file",
            where=str(index),
            found=", ".join(absent[:5]),
        )
    return tuple(files), found, tuple(skipped)


def identify_safetensors(path: Path, root: Path | None) -> SourceFile:
    """Return what identifies a safetensors file: size, time, the hash of its header, and samples."""
    with opened(path) as file:
        stat = file.status
        prefix = file.pread(8, 0)
        digest = xxhash.xxh3_128(prefix)
        at, end = 8, 8 + min(int.from_bytes(prefix, "little"), MAX_HEADER_BYTES)
        while piece := file.pread(min(end - at, _STEP_NBYTES), at):
            digest.update(piece)
            at += len(piece)
    return SourceFile(
        str(path.absolute()) if root is None else path.relative_to(root).as_posix(),
        stat.st_size,
        stat.st_mtime_ns,
        digest.hexdigest(),
        evidence=evidence_of(path),
    )
