"""What ``--overwrite`` replaces: the files of a former output, as they were written.

Everything else in the output folder is somebody's: notes, a repository, checkpoints, a config that was
edited, weights that were trained on. It is named, and nothing is replaced.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from streamconv.errors import BadInputError, OutputExistsError, UnsafeInputError, listed
from streamconv.files.durable import hash_file
from streamconv.files.names import MANIFEST
from streamconv.formats.safetensors_file import read_header
from streamconv.output.manifest import read_manifest
from streamconv.output.publication import PARTIAL, OldFile

# Ours while a conversion is at work, and a file system's own.
NOT_OUTPUT = frozenset({".streamconv", ".streamconv.lock", PARTIAL, "lost+found"})
# Whatever its time of change says, a file that a person may edit is read: it is soon done.
_SMALL_BYTES = 64 << 20
_SHOWN = 3


def is_empty(folder: Path) -> bool:
    """Whether nothing lies in a folder but what a conversion into it keeps there."""
    return not contents(folder)


def contents(folder: Path) -> list[str]:
    """Return the names of what lies in a folder, but for what a conversion into it keeps there."""
    return sorted(path.name for path in folder.iterdir() if path.name not in NOT_OUTPUT)


def some(names: list[str]) -> str:
    """Return the first few of many names, and how many more there are."""
    return listed(names, _SHOWN)


def former_output(folder: Path) -> tuple[OldFile, ...]:
    """Return the files of the output in ``folder``, which may be replaced.

    Raises :class:`OutputExistsError` that names what else lies there, or was changed since it was
    written.
    """
    try:
        manifest = read_manifest(folder, entries=False)
    except (BadInputError, UnsafeInputError) as error:
        raise OutputExistsError(
            f"which files streamconv wrote into the output folder is not known: {error.what}",
            where=str(folder),
            found=error.found,
            hint="move the folder away, or choose another",
        ) from error
    files: dict[str, dict[str, Any]] = {f["name"]: f for f in (manifest or {}).get("files", ())}
    written_ns = 0 if manifest is None else (folder / MANIFEST).lstat().st_mtime_ns

    def changed(name: str, status: os.stat_result) -> bool:
        return name in files and _was_changed(folder / name, status, files[name], written_ns)

    return _only(folder, [*files, *([] if manifest is None else [MANIFEST])], changed)


def refuse_more(folder: Path, old: tuple[OldFile, ...]) -> None:
    """Raise :class:`OutputExistsError` where ``folder`` holds more than ``old``, or that changed."""
    known = {o.name: o for o in old}
    _only(folder, known, lambda name, _: not known[name].is_at(folder))


def _only(
    folder: Path, ours: Collection[str], changed: Callable[[str, os.stat_result], bool]
) -> tuple[OldFile, ...]:
    """Return the files of ``folder``, which must all be in ``ours`` and not be ``changed``."""
    folders = {parent.as_posix() for name in ours for parent in PurePosixPath(name).parents}
    strange, altered, old = [], [], []
    for name, status in _walk(folder, folders):
        is_folder = stat.S_ISDIR(status.st_mode)
        if is_folder and name in folders:
            continue
        if name not in ours:
            strange.append(f"{name}/" if is_folder else name)
        elif changed(name, status):
            altered.append(name)
        else:
            old.append(OldFile(name, status.st_size, status.st_mtime_ns))
    _refuse(folder, strange, "the output folder holds what streamconv did not write")
    _refuse(folder, altered, "files of the output folder were changed since they were written")
    return tuple(old)


def _walk(folder: Path, into: Collection[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Yield everything in a folder and in those folders below it that are named."""
    left = [folder]
    while left:
        for path in sorted(left.pop().iterdir()):
            name = path.relative_to(folder).as_posix()
            if name in NOT_OUTPUT:
                continue
            status = path.lstat()
            yield name, status
            if stat.S_ISDIR(status.st_mode) and name in into:
                left.append(path)


def _was_changed(
    path: Path, status: os.stat_result, entry: dict[str, Any], written_ns: int
) -> bool:
    if not stat.S_ISREG(status.st_mode):
        return True
    if status.st_size != entry["nbytes"]:
        return status.st_size > entry["nbytes"] or not _is_cut_off(path, status.st_size)
    # The manifest was written last: what is older than it is as it was then.
    if status.st_mtime_ns <= written_ns and status.st_size > _SMALL_BYTES:
        return False
    return bool(hash_file(path) != entry["xxh3_128"])


def _is_cut_off(path: Path, size: int) -> bool:
    """Whether a file is what damage leaves, and nobody's work: empty, or weights without their end."""
    if size == 0:
        return True
    try:
        read_header(path)
    except BadInputError:
        return path.suffix == ".safetensors"
    except (UnsafeInputError, OSError):
        return False
    return False


def _refuse(folder: Path, names: list[str], what: str) -> None:
    if names:
        raise OutputExistsError(
            what,
            where=str(folder),
            found=some(names),
            hint="move that away, or choose another folder: --overwrite replaces an output alone",
        )
