"""The journal of a staged run: what it was begun with, and which files are finished.

``journal.jsonl`` is one line, which seals the plan and the choices that hold for all of it. Each
finished file has a note of its own, ``done/NAME.json``, so that files may be written by several
processes, on several machines, in any order: a note is written once, whole, by whoever wrote the file,
and two who wrote the same file wrote the same bytes. Every note is sealed with the user's key, for this
plan and this target; a finished file counts only with the very bytes that were written. What does not
fit was not written by a run of this user for this target, and counts for nothing.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from streamconv.files import newfile
from streamconv.files.durable import fsync_directory, hash_stream
from streamconv.files.userkey import Sealer, same_seal
from streamconv.ir.finished import FinishedFile, SharedRecord
from streamconv.options import RunOptions

JOURNAL = "journal.jsonl"
FORMER = "former.json"
DONE = "done"
# A million tensors in a file.
_LONGEST_NOTE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Choices:
    """What was chosen when a run was begun and holds for all its parts: see :class:`RunOptions`."""

    overwrite: bool = False
    source_crc: bool = True
    sha256: bool = False
    sync: bool = True

    @classmethod
    def of(cls, run: RunOptions) -> Choices:
        """Return those of a run's options."""
        return cls(run.overwrite, run.source_crc, run.sha256, run.sync)


@dataclass(frozen=True, slots=True)
class FileNote:
    """What is kept in memory of a finished file; its tensors' digests stay on the disk.

    ``mtime_ns`` is the file's, ``read_bytes`` and ``seconds`` are what writing it took, ``peak_bytes``
    is the most that the process which wrote it had in memory until then. ``unverifiable_bytes`` have
    no checksum in the source. ``version`` is that of an object in a store.
    """

    finished: FinishedFile
    proof: str
    mtime_ns: int
    read_bytes: int
    unverifiable_bytes: int
    seconds: float
    peak_bytes: int
    version: str = ""


class Journal:
    """What is finished of a staged run in the folder ``root``: ``notes``, by the files' names."""

    def __init__(self, root: Path, sealer: Sealer, *, sync: bool) -> None:
        self._path = root / JOURNAL
        self._folder = root / DONE
        self._sealer = sealer
        self._sync = sync
        self._plan = b""
        self.choices = Choices()
        self.notes: dict[str, FileNote] = {}

    def begin(self, plan: bytes, choices: Choices, names: Sequence[str]) -> None:
        """Begin the journal of a plan, given by its digest, whose output files are ``names``."""
        self._plan, self.notes = plan, {}
        for folder in {(self._folder / name).parent for name in names}:
            folder.mkdir(parents=True, exist_ok=True)
        self.choose(choices)

    def choose(self, choices: Choices) -> None:
        """Let what remains to be done be done with these choices."""
        self.choices = choices
        self._write(self._path, "line", {"plan": self._plan.hex(), "choices": asdict(choices)})

    def note_former(self, versions: Mapping[str, str]) -> None:
        """Note what is to be deleted before the first file is written: names, and their versions."""
        self._write(self._path.with_name(FORMER), "former", dict(versions))

    def former(self) -> dict[str, str]:
        """Return what was to be deleted first; nothing where nothing was, or it is done."""
        return self._read(self._path.with_name(FORMER), "former") or {}

    def forget_former(self) -> None:
        """Note that all of it is deleted."""
        self._path.with_name(FORMER).unlink(missing_ok=True)

    def resume(self, plan: bytes) -> bool:
        """Read the journal where it is that of this plan; return whether it is."""
        first = self._first()
        if first is None or first.get("plan") != plan.hex():
            return False
        self._plan = plan
        self.choices = Choices(**first["choices"])
        self.refresh()
        return True

    def refresh(self) -> None:
        """Read which files are finished by now, whoever wrote them."""
        self.notes = {}
        for path in sorted(self._folder.rglob("*.json")):
            data = self._read(path, "done")
            name = str(path.relative_to(self._folder)).removesuffix(".json")
            if data is not None and data["file"]["name"] == name:
                self.notes[name] = self._note(data)

    def is_ours(self) -> bool:
        """Whether a run of this user has begun the journal for this target, of whatever plan."""
        return self._first() is not None

    def record(
        self,
        finished: FinishedFile,
        path: Path,
        shared: Sequence[SharedRecord],
        *,
        read_bytes: int,
        unverifiable_bytes: int,
        seconds: float,
        peak_bytes: int,
        version: str = "",
    ) -> None:
        """Note that the file at ``path`` is finished (it is durable by now), with what it saw.

        ``version`` is an object's.
        """
        data = {
            "file": {k: v for k, v in asdict(finished).items() if k != "keyed"},
            "proof": self._proof(finished),
            "mtime_ns": path.stat().st_mtime_ns,
            "read_bytes": read_bytes,
            "unverifiable_bytes": unverifiable_bytes,
            "seconds": round(seconds, 3),
            "peak_bytes": peak_bytes,
            "shared": [s.to_json() for s in shared],
        }
        if version:
            data["version"] = version
        self._write(self._at(finished.name), "done", data)
        self.notes[finished.name] = self._note(data)

    @staticmethod
    def _note(data: dict[str, Any]) -> FileNote:
        finished = replace(FinishedFile(**data["file"]), tensors={})
        names = {f.name for f in fields(FileNote)} - {"finished"}
        rest = {name: data[name] for name in names if name in data or name != "version"}
        return FileNote(finished, **rest)

    def forget(self, name: str) -> None:
        """Take back a finished file whose bytes are not there any more."""
        del self.notes[name]
        self._at(name).unlink(missing_ok=True)

    def holds(self, name: str, path: Path) -> bool:
        """Whether ``path`` is the finished file ``name``, with the very bytes that were written."""
        fd = newfile.reopen(path)
        if fd is None:
            return False
        with io.FileIO(fd) as stream:
            return self.has_bytes(name, stream)

    def has_bytes(self, name: str, stream: io.RawIOBase) -> bool:
        """Whether a stream has the very bytes that were written of the finished file ``name``."""
        xxh3, keyed = hash_stream(stream, self._sealer.seed)
        note = self.notes[name]
        found = replace(note.finished, xxh3=xxh3, keyed=keyed)
        return same_seal(self._proof(found), note.proof)

    def looks_finished(self, name: str, path: Path) -> bool:
        """Whether ``path`` is the finished file ``name``; one that looks as it did is not read.

        Whoever wrote it has hashed it: another machine need not read the whole output again.
        """
        note = self.notes[name]
        try:
            status = path.lstat()
        except OSError:
            return False
        same = (status.st_size, status.st_mtime_ns) == (note.finished.nbytes, note.mtime_ns)
        return same or self.holds(name, path)

    def tensor_digests(self, name: str) -> dict[str, str]:
        """Return the xxh3_128 of each tensor of a finished file."""
        return dict(self._noted(name)["file"]["tensors"])

    def shared(self, name: str) -> Iterator[SharedRecord]:
        """Yield what was seen of the source's shared records while a finished file was written."""
        yield from map(SharedRecord.from_json, self._noted(name)["shared"])

    def _noted(self, name: str) -> dict[str, Any]:
        data = self._read(self._at(name), "done")
        if data is None:
            raise FileNotFoundError(2, "the note of a finished file is gone", str(self._at(name)))
        return data

    def note_path(self, name: str) -> Path:
        """Return where the note of a file lies, or will."""
        return self._at(name)

    def _at(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _first(self) -> dict[str, Any] | None:
        return self._read(self._path, "line")

    def _proof(self, finished: FinishedFile) -> str:
        return self._sealer.seal(
            "file", os.fsencode(finished.name), finished.keyed.encode(), finished.xxh3.encode()
        )

    def _seal(self, kind: str, text: bytes) -> str:
        # What is noted is of its plan; the journal's line, which names the plan, tells of which.
        return self._sealer.seal(kind, b"" if kind == "line" else self._plan, text)

    def _write(self, path: Path, kind: str, data: dict[str, Any]) -> None:
        text = json.dumps(data).encode()
        with newfile.replacing(path) as fd:
            line = memoryview(self._seal(kind, text).encode() + b" " + text + b"\n")
            while line:
                line = line[os.write(fd, line) :]
            if self._sync:
                os.fsync(fd)
        if self._sync:
            fsync_directory(path.parent)

    def _read(self, path: Path, kind: str) -> dict[str, Any] | None:
        """Return what a file of the journal says; None where it is not there, or is not ours."""
        fd = newfile.reopen(path)
        if fd is None:
            return None
        with os.fdopen(fd, "rb") as stream:
            line = stream.readline(_LONGEST_NOTE_BYTES)
            more = stream.read(1)
        seal, _, text = line.rstrip(b"\n").partition(b" ")
        right = same_seal(seal.decode("latin-1"), self._seal(kind, text))
        if more or not line.endswith(b"\n") or not right:
            return None
        data: dict[str, Any] = json.loads(text)
        return data
