"""What the bytes of a step say: every record against its CRC-32, read once and remembered.

A step in whose favour sources are deleted must be whole between the ends of its files, too: its
optimizer is never converted, and its weights need not have been. What was found of a file is kept in
the output folder and holds as long as the file looks the same: the next rounds do not read it again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from streamconv.batch.state import write_whole
from streamconv.errors import SourceChangedError, StreamconvError
from streamconv.files.inputs import LocalFile, cannot_read, open_input
from streamconv.files.jsonfile import COUNT, FLAG, TEXT, Leaf, mismatches, read_json
from streamconv.formats.dcp.folder import INDEX, read_index
from streamconv.torchfile.checksums import check_records
from streamconv.torchfile.window import FileWindow
from streamconv.torchfile.zipdir import read_directory

_FOLDER = "readings"
_MAX_BYTES = 256 << 20
_SAVE_EVERY_SECONDS = 5.0
TORCH_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".distcp"})
_WITHOUT_CHECKSUMS = frozenset({".safetensors"})
ZIP, ZIP_END, ZIP_END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22
_WHOLE_NUMBER = Leaf("a whole number", lambda v: type(v) is int and abs(v) < 1 << 63)
_SHAPE: Any = {
    "steps": {str: {str: (COUNT, *[_WHOLE_NUMBER] * 2, COUNT, _WHOLE_NUMBER, TEXT, FLAG)}},
}


@dataclass(frozen=True, slots=True)
class _Mark:
    """How a file looks: another content has another one, whoever set its times.

    ``index_ns`` is when the index beside it changed that says where its records lie.
    """

    nbytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    index_ns: int = 0

    @staticmethod
    def of(path: Path, fd: int | None = None) -> _Mark:
        status = path.stat() if fd is None else os.fstat(fd)
        index = path.with_name(INDEX)
        index_ns = index.stat().st_ctime_ns if path.suffix == ".distcp" and index.is_file() else 0
        return _Mark(
            status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, index_ns
        )


@dataclass(frozen=True, slots=True)
class _Found:
    """What reading a file came to: its ``damage``, and whether checksums vouch for all of it."""

    mark: _Mark
    damage: str
    checked: bool


class Readings:
    """What was read of the steps of one run.

    ``damaged`` are steps that were found to be damaged in this round, and how; ``unchecked`` the files
    without checksums of steps that were relied on.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / _FOLDER / f"{name}.json"
        self._steps: dict[str, dict[str, _Found]] | None = None
        self._saved = time.monotonic()
        self.damaged: dict[Path, str] = {}
        self.unchecked: dict[Path, list[str]] = {}

    def damage(self, step: Path, names: Iterable[str], *, read: bool) -> str:
        """Return what is damaged of a step's files, of which ``names`` are all.

        Without ``read`` only what is known already is told. Raises ``OSError``.
        """
        if self._steps is None:
            self._steps = self._load()
        known, now = self._steps.get(step.name, {}), {}
        changed = False
        try:
            records = _Records()
            for name in sorted(n for n in names if (step / n).is_file()):  # no links to folders
                mark = _Mark.of(step / name)
                found = known.get(name)
                if found is None or found.mark != mark:
                    if not read:
                        continue
                    found, lasting = _read(step / name, mark, records)
                    changed = True
                    if not lasting:
                        return found.damage
                now[name] = found
                self._steps[step.name] = {**known, **now}
                if changed and time.monotonic() - self._saved > _SAVE_EVERY_SECONDS:
                    self._save(step.parent)
                if found.damage:
                    self.damaged[step] = found.damage
                    return found.damage
        finally:
            # Whoever is stopped in the middle goes on from there.
            if changed:
                self._save(step.parent)
        unchecked = [name for name, found in now.items() if not found.checked]
        if read and unchecked:
            self.unchecked[step] = unchecked
        return ""

    def _load(self) -> dict[str, dict[str, _Found]]:
        try:
            data = read_json(self._path, most_bytes=_MAX_BYTES)
        except (StreamconvError, OSError):
            return {}
        if any(mismatches(data, _SHAPE)):
            return {}
        return {
            step: {
                name: _Found(_Mark(*mark), damage, checked)
                for name, (*mark, damage, checked) in files.items()
            }
            for step, files in data["steps"].items()
        }

    def _save(self, run_dir: Path) -> None:
        """Keep what is known of steps that are there; a disk that takes none costs another reading."""
        self._saved = time.monotonic()
        steps = self._steps or {}
        data = {
            "steps": {
                step: {n: [*astuple(f.mark), f.damage, f.checked] for n, f in files.items()}
                for step, files in steps.items()
                if (run_dir / step).is_dir()
            }
        }
        try:
            self._path.parent.mkdir(exist_ok=True)
            write_whole(self._path, json.dumps(data))
        except (StreamconvError, OSError):
            return


class _Records:
    """Where the records of ``.distcp`` files lie, as the index beside them says; read once a folder."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._places: Mapping[str, list[tuple[int, int]]] = {}

    def of(self, path: Path) -> list[tuple[int, int]]:
        """Return (position, bytes) of the records of a file; none where no index says."""
        if path.parent != self._folder:
            self._folder, self._places = path.parent, self._read(path.parent)
        return sorted(self._places.get(path.name, ()))

    @staticmethod
    def _read(folder: Path) -> Mapping[str, list[tuple[int, int]]]:
        places: dict[str, list[tuple[int, int]]] = {}
        if (folder / INDEX).is_file():
            for piece in read_index(folder).records():
                places.setdefault(piece.file, []).append((piece.offset, piece.nbytes))
        return places


def _read(path: Path, mark: _Mark, records: _Records) -> tuple[_Found, bool]:
    """Read a file; return what was found, and whether it will be found again."""
    if path.suffix in _WITHOUT_CHECKSUMS:
        return _Found(mark, "", checked=False), True
    try:
        fd = open_input(path)
    except (StreamconvError, OSError) as error:
        told = cannot_read(error, path) if isinstance(error, OSError) else error
        return _Found(mark, _text(told), checked=False), False
    try:
        checked = _check(fd, path, mark.nbytes, records)
        found = _Found(mark, "", checked)
    except StreamconvError as error:
        if isinstance(error, SourceChangedError) or isinstance(error.__cause__, OSError):
            return _Found(mark, _text(error), checked=False), False
        found = _Found(mark, _text(error), checked=False)
    finally:
        now = _Mark.of(path, fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    if now != mark:  # the reading may have met both
        return _Found(mark, f"{path} changed while it was read", checked=False), False
    return found, True


def _check(fd: int, path: Path, nbytes: int, records: _Records) -> bool:
    """Check the records of a file; return whether checksums vouch for all of them."""
    if path.suffix != ".distcp":
        return _check_file(
            FileWindow(LocalFile(fd, str(path)), 0, nbytes), path.suffix in TORCH_SUFFIXES
        )
    places, file = records.of(path), LocalFile(fd, str(path))
    whole = [_check_zip(FileWindow(file, start, size)) for start, size in places]
    return all(whole) and (bool(places) or not nbytes)


def _check_file(window: FileWindow, is_torchs: bool) -> bool:
    """Check what may be a file of torch's: of what it wrote under another name, the bytes tell."""
    if is_torchs:
        return _check_zip(window)
    if window.nbytes < ZIP_END_BYTES or window.read(0, len(ZIP)) != ZIP:
        return True  # no weights
    try:
        directory = read_directory(window)
    except StreamconvError:
        return False  # another zip
    return check_records(directory)


def _check_zip(window: FileWindow) -> bool:
    tail = min(window.nbytes, ZIP_END_BYTES)
    begins = window.read(0, min(window.nbytes, len(ZIP))) == ZIP
    ends = window.read(window.nbytes - tail, tail).startswith(ZIP_END)
    return (begins or ends) and check_records(read_directory(window))


def _text(error: StreamconvError) -> str:
    return f"{error.what} ({error.where})" if error.where else error.what
