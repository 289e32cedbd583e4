"""Pinning: hard links to a checkpoint's files, so that the trainer's rotation cannot take them away.

Rotation removes names, and bytes live as long as they have one. The links lie on the source's file
system: in the batch's folder where that is on the same one, else in a hidden folder of the run.
Large files that the conversion does not read (optimizer states) are left out: they would hold disk
space for nothing.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from streamconv.errors import StreamconvError

_FOLDER = "pins"
_SMALL_BYTES = 64 << 20


def folder(place: Path) -> Path:
    """Return where this process keeps its pins below ``place``: no other one ever touches them."""
    return place / _FOLDER / f"{socket.gethostname()}-{os.getpid()}"


def remove_left_behind(place: Path) -> None:
    """Remove the pins of batches on this machine that were killed."""
    host = socket.gethostname()
    for path in (place / _FOLDER).glob(f"{host}-*"):
        pid = path.name.removeprefix(f"{host}-")
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)


def pin(
    source: Path, needed: Collection[str], places: Iterable[Path], beside: Collection[Path] = ()
) -> Path:
    """Link the files of ``source`` into the first of ``places`` on its file system; return where.

    ``needed`` are the weight files, relative to ``source``, ``beside`` what belongs to it and lies in
    the folder that holds it (config, tokenizer). The pinned folder has the name of the source's, for
    names tell formats. Raises :class:`StreamconvError` where no place will do.
    """
    reasons = []
    for place in places:
        target = place / source.name
        try:
            target.mkdir(parents=True)
            _link_tree(source, target, set(needed))
            for path in beside:
                link = place / path.relative_to(source.absolute().parent)
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, link, follow_symlinks=False)
        except OSError as error:
            shutil.rmtree(place, ignore_errors=True)
            reasons.append(f"{place}: {error.strerror or error}")
            continue
        return target
    raise StreamconvError(
        "the source could not be pinned with hard links",
        where=str(source),
        found="; ".join(reasons),
    )


def unpin(pinned: Path) -> None:
    """Remove the links; the files stay where they have another name."""
    shutil.rmtree(pinned.parent, ignore_errors=True)
    with suppress(OSError):  # others are still needed
        pinned.parent.parent.rmdir()


def _link_tree(source: Path, target: Path, needed: set[str]) -> None:
    for folder, below, names in os.walk(source):
        inside = Path(folder).relative_to(source)
        below.sort()
        (target / inside).mkdir(exist_ok=True)
        for name in names:
            relative = (inside / name).as_posix()
            path = Path(folder, name)
            if relative in needed or path.lstat().st_size <= _SMALL_BYTES:
                os.link(path, target / inside / name, follow_symlinks=False)
