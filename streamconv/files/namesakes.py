"""Names of an output's files that get in each other's way, here or on the file system it goes to.

Some file systems take two names for one: those that ignore case, or how accents are written.
"""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from streamconv.errors import BadInputError


def refuse_overlaps(names: Iterable[str]) -> None:
    """Raise :class:`BadInputError` where a name stands twice, or one for a file and a folder."""
    seen: set[str] = set()
    names = list(names)
    folders = {str(parent): name for name in names for parent in PurePosixPath(name).parents}
    for name in names:
        other = name if name in seen else folders.get(name)
        if other is not None:
            raise BadInputError(
                "two files of the output would be in each other's place",
                where=name,
                found=other if other != name else "the name twice",
                hint="rename or move away what lies under that name beside config and tokenizer",
            )
        seen.add(name)


def refuse_folded(folder: Path, names: Iterable[str]) -> None:
    """Raise :class:`BadInputError` where the file system of ``folder`` takes two names for one."""
    for one, other in _alike(names):
        probe = folder / "names"
        try:
            path = probe / one
            path.parent.mkdir(parents=True)
            path.touch()
            same = os.path.lexists(probe / other)
        finally:
            shutil.rmtree(probe, ignore_errors=True)
        if same:
            raise BadInputError(
                "the file system of the output takes two of its files for one",
                where=str(folder.parent),
                found=f"{one} and {other}",
                hint="choose an output folder on another disk, or remove one of the two",
            )


def _alike(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of names that some file system takes for one, folders among them."""
    seen: dict[str, str] = {}
    names = list(names)
    folders = {str(p) for name in names for p in PurePosixPath(name).parents} - {"."}
    for name in (*names, *sorted(folders)):
        other = seen.setdefault(_folded(name), name)
        if other != name and not (name in folders and other in folders):
            yield other, name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
