"""Pinning: hard links to a checkpoint's files, so that the trainer's rotation cannot take them away.

Rotation removes names, and bytes live as long as they have one. The links lie on the source's file
system: in the batch's folder where that is on the same one, else in a hidden folder of the run.
Large files that the conversion does not read (optimizer states) are left out: they would hold disk
space for nothing.

Beside each batch's folder of links lies its lease. Links are removed when their lease is free *and*
nobody has shown life for a while: locks of one machine need not be seen on another.
"""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from streamconv.batch import leases
from streamconv.batch.leases import Lease
from streamconv.batch.ready import file_clock_ns
from streamconv.errors import StreamconvError

_FOLDER = "pins"
_LEASE = ".lease"
_SMALL_BYTES = 64 << 20
# A lease that was free, of another machine: whether its locks are seen here is not certain.
_FREE_SECONDS = 3600.0
# No lease, or a file system without locks: time alone must tell.
_UNKNOWN_SECONDS = 86400.0


class Holder:
    """The pins of one batch, which nobody else touches as long as it or a worker of its lives."""

    def __init__(self) -> None:
        # In another PID namespace a process of the same number may run, on a host of the same name.
        self._name = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}-{os.getpid()}"
        self._leases: dict[Path, Lease] = {}

    def folder(self, place: Path) -> Path:
        """Return where this batch keeps its pins below ``place``."""
        return place / _FOLDER / self._name

    @property
    def fds(self) -> tuple[int, ...]:
        """Return what a process inherits that reads pins, so that they stay as long as it lives."""
        return tuple(lease.fd for lease in self._leases.values())

    def pin(
        self,
        source: Path,
        needed: Collection[str],
        places: Iterable[Path],
        beside: Collection[Path] = (),
    ) -> Path:
        """Do as :func:`pin` in ``places`` below folders of :meth:`folder`, with leases on these."""
        leased = []
        for place in places:
            folder = place.parent
            if folder not in self._leases:
                with suppress(OSError):
                    # Nobody else has its name; who holds it only looks whether it is free.
                    lease = leases.take(folder.with_name(folder.name + _LEASE), wait=True)
                    if lease is not None:
                        lease.say(leases.boot_clock()[0])
                        self._leases[folder] = lease
            if folder in self._leases:
                leased.append(place)
        try:
            return pin(source, needed, leased, beside)
        finally:
            self._give_back()

    def unpin(self, pinned: Path) -> None:
        """Remove the links; the files stay where they have another name."""
        unpin(pinned)
        self._give_back()

    def beat(self) -> None:
        """Show that this batch is alive."""
        for lease in self._leases.values():
            lease.beat()

    def _give_back(self) -> None:
        for folder in [f for f in self._leases if not f.exists()]:
            self._leases.pop(folder).release()


def remove_left_behind(place: Path) -> None:
    """Remove the pins of batches that are gone, wherever they ran."""
    folder = place / _FOLDER
    if not folder.is_dir():
        return
    names = {p.name.removesuffix(_LEASE) for p in folder.iterdir()}
    now_ns = file_clock_ns(folder) if names else 0
    for name in sorted(names):
        with suppress(OSError):
            _remove_if_left(folder / name, now_ns)


def _remove_if_left(pins: Path, now_ns: int) -> None:
    path = pins.with_name(pins.name + _LEASE)
    if path.is_symlink() or pins.is_symlink():
        return
    if not path.exists():
        if _idle_seconds(pins, now_ns) >= _UNKNOWN_SECONDS:
            shutil.rmtree(pins, ignore_errors=True)
        return
    lease = leases.take(path)
    if lease is None:
        return
    # A lock of this very kernel tells for certain; one of another machine may not be seen here.
    here = path.read_text(errors="replace") == leases.boot_clock()[0]
    wait = _UNKNOWN_SECONDS if not lease.locked else 0.0 if here else _FREE_SECONDS
    if not wait or _idle_seconds(path, now_ns) >= wait:
        shutil.rmtree(pins, ignore_errors=True)
        lease.release()


def _idle_seconds(path: Path, now_ns: int) -> float:
    return (now_ns - path.lstat().st_mtime_ns) / 1e9


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
