"""What a batch remembers of every checkpoint, and shows to whoever looks.

In the output folder::

    status.json                          everything, for people and programs: a view, written last
    .streamconv-batch/jobs/NAME.json     one record per output, written by whoever holds its lock
    .streamconv-batch/locks/NAME.lock    held while a batch works on that output
    .streamconv-batch/pins/…             hard links to sources that are being read
    .streamconv-batch/readings/…         what was read of steps to train on: see :mod:`readings`
    .streamconv-batch/removals/…         what is being removed: see :mod:`removal`
    .streamconv-batch/rules/…            which retention rules are at work: see :mod:`rules`

One file per output, so that two batches never write the same one. Every file appears whole. A record
that is lost costs time and nothing else: the output's manifest says what it was made of. Outputs are
known by their names in the folder, so that it can be moved and copied.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args
from urllib.parse import quote

import filelock
import xxhash

from streamconv._version import __version__
from streamconv.batch.evidence import output_evidence
from streamconv.batch.leases import NO_FILE
from streamconv.batch.record_file import SCHEMA, NewerRecordError, read_record_file, shape_of
from streamconv.errors import LockedError, StreamconvError, UsageError
from streamconv.files import askedfile
from streamconv.files.names import MANIFEST
from streamconv.files.userkey import state_folder
from streamconv.options import NO_CONFIG
from streamconv.storage.address import Address, place

STATUS = "status.json"
FOLDER = ".streamconv-batch"
# File systems take 255; a suffix and a process's number come on top.
_MAX_NAME_BYTES = 180
State = Literal["waiting", "queued", "running", "done", "failed", "gone", "pruned"]


@dataclass(slots=True)
class Record:
    """What is known of one output.

    ``state``: ``waiting`` (its source is not whole yet), ``queued``, ``running``, ``done``,
    ``failed``, ``gone`` (the source went before it could be converted), ``pruned`` (removed by
    retention). ``attempts`` counts failures since the last success.
    ``root`` is the run that the source belongs to, ``relative`` where in it that lies. ``snapshot`` is
    the digest of how the source looked, ``marks`` that of what also changes where only the content
    does, ``seen`` since when it looks so, by the clock of each machine that saw it; ``options`` the
    digest of what decides the output, ``job`` that of the conversion that was to be made last,
    ``content`` that of the last source that was whole. ``generation`` counts the looks at the folder:
    that content appeared in this one, written at ``written_ns``. ``evidence`` is what a finished output
    looked like: see :func:`output_evidence`. ``due`` tells the note of its hook from those of the
    outputs before it.
    ``seconds`` is how long all of it took, planning included, ``bytes_per_second`` how fast bytes
    moved. Times are seconds since the epoch.
    """

    name: str
    output: str
    source: str = ""
    run: str = ""
    step: int | None = None
    model: str = ""
    format: str = ""
    state: State = "waiting"
    reason: str = ""
    attempts: int = 0
    root: str = ""
    relative: str = ""
    snapshot: str = ""
    marks: str = ""
    seen: dict[str, float] = field(default_factory=dict)
    options: str = ""
    job: str = ""
    content: str = ""
    generation: int = 0
    written_ns: int = 0
    evidence: list[list[Any]] = field(default_factory=list)
    started_at: float | None = None
    finished_at: float | None = None
    seconds: float = 0.0
    bytes_per_second: float | None = None
    read_bytes: int = 0
    write_bytes: int = 0
    done_bytes: int = 0
    total_bytes: int = 0
    peak_bytes: int = 0
    budget_bytes: int = 0
    tensors: int = 0
    verified: bool | None = None
    notices: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    due: str = ""
    host: str = ""
    pid: int = 0

    def interrupt(self) -> None:
        """Note that the conversion was ended before its end."""
        self.state, self.reason = "queued", "interrupted; the next batch goes on with it"

    def take_over(self, manifest: dict[str, Any], reason: str = "") -> None:
        """Take the output for done that is there, and tell what its manifest says of it.

        Raises ``OSError`` where a file of it is missing.
        """
        output = place(self.output)
        self.evidence = output_evidence(output, [*(f["name"] for f in manifest["files"]), MANIFEST])
        self.finished(manifest.get("notices", ()), reason)
        self.write_bytes = sum(f["nbytes"] for f in manifest["files"])
        self.tensors = len(manifest["tensors"])
        run = manifest.get("run", {})
        self.seconds, self.read_bytes = run.get("seconds", 0.0), run.get("read_bytes", 0)
        self.bytes_per_second = self.read_bytes / self.seconds if self.seconds else None
        self.peak_bytes, self.budget_bytes = run.get("peak_bytes", 0), run.get("budget_bytes", 0)
        self.finished_at = (output / MANIFEST).stat().st_mtime

    def finished(self, notices: Sequence[str], reason: str = "") -> None:
        """Take note that the output is done, and of what its conversion said."""
        self.state, self.error, self.attempts = "done", None, 0
        self.notices = list(notices)
        self.reason = reason or (NO_CONFIG if NO_CONFIG in self.notices else "")

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain data."""
        return {"schema": SCHEMA, **asdict(self)}

    @staticmethod
    def from_json(data: dict[str, Any], folder: Path) -> Record:
        """Rebuild the record of an output in ``folder``, wherever that was when it was written.

        What another release put there and this one does not know is dropped.
        """
        known = {f.name for f in fields(Record)}
        told = {k: v for k, v in data.items() if k in known}
        return Record(**{**told, "output": str(folder / data["name"])})


_SHAPE = shape_of(Record, get_args(State))


class Store:
    """The records of one output folder.

    ``trouble`` is what the system refused when one was saved or locked, ``newer`` how many records are
    there that a later release wrote: they and their outputs are left alone. ``folder`` holds them.
    """

    def __init__(self, output: Path, folder: Path | None = None) -> None:
        self.output = output
        self.folder = folder or batch_folder(output)
        self._records: dict[str, Record] = {}
        self._unsaved: set[str] = set()
        self.trouble: OSError | StreamconvError | None = None
        self.newer = 0

    def begin(self) -> None:
        """Make the folders and read the records that are there."""
        self.trouble = None
        for name in ("jobs", "locks"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        records, self.newer = _read_all(self.output, self.folder)
        self._records = {r.name: r for r in records}
        self._unsaved = set()

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def get(self, name: str) -> Record:
        """Return the record of an output; a fresh one where nothing is known."""
        record = self._records.get(name)
        if record is None:
            record = self._records[name] = Record(name, str(self.output / name))
        return record

    def reload(self, name: str) -> Record:
        """Return the record as another batch may have left it meanwhile; the output's lock is held.

        What is there of one that the disk did not take is older than what is known here.
        """
        read = _read_record(self._path(name), self.output)
        if read is not None and name not in self._unsaved:
            if read.state == "running":
                read.interrupt()  # whoever ran it would hold the lock
            self._records[name] = read
        return self.get(name)

    def save(self, record: Record) -> bool:
        """Make a record appear on disk, whole; return whether the disk took it.

        Where the disk takes none it is still known here, and ``trouble`` says why: no conversion is
        ended for the sake of what is remembered of it.
        """
        self._records[record.name] = record
        data = record.to_json()
        del data["output"]  # where it lies now, its name and the folder say
        taken = self._write(self._path(record.name), data)
        (self._unsaved.discard if taken else self._unsaved.add)(record.name)
        return taken

    def _write(
        self,
        path: Path,
        data: dict[str, Any],
        indent: int | None = None,
        kind: askedfile.Kind | None = None,
    ) -> bool:
        try:
            write_whole(path, json.dumps(data, ensure_ascii=False, indent=indent), kind)
        except StreamconvError as error:
            self.trouble = error
        except OSError as error:
            error.filename = str(path)  # not the part that was to take its place
            self.trouble = error
        else:
            return True
        return False

    def _path(self, name: str) -> Path:
        return self.folder / "jobs" / f"{file_name(name)}.json"

    def claim(self, name: str) -> filelock.BaseFileLock:
        """Return the held lock of an output; raises :class:`LockedError` where another has it.

        One that is not a file is nobody's: see ``trouble``.
        """
        lock = filelock.FileLock(self.folder / "locks" / f"{file_name(name)}.lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise LockedError("another batch is at work on this output", where=name) from error
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            self.trouble = error  # of this output, and of no other
            raise LockedError("its lock is not a file", where=name) from error
        try:
            _read_record(self._path(name), self.output)
        except NewerRecordError:
            lock.release()
            raise LockedError("its record is a newer streamconv's", where=name) from None
        return lock

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Hold the lock of an output for a moment; raises :class:`LockedError` as :meth:`claim`."""
        lock = self.claim(name)
        try:
            yield
        finally:
            lock.release()

    def publish(self, facts: dict[str, Any]) -> None:
        """Write ``status.json``: ``facts`` about the batch, and every record; see :meth:`save`."""
        records = sorted(self, key=order)
        data = {
            "streamconv": __version__,
            "written_at": time.time(),
            "counts": dict(Counter(r.state for r in records)),
            "batch": facts,
            "checkpoints": [r.to_json() for r in records],
        }
        self._write(status_path(self.output), data, indent=1, kind=askedfile.STATUS)


def file_name(name: str) -> str:
    """Return what a file or folder about the output ``name`` is called: no path, and short enough.

    >>> file_name("run/global_step_10")
    'run%2Fglobal_step_10'
    """
    quoted = quote(os.fsencode(name), safe="")
    if len(quoted) <= _MAX_NAME_BYTES:
        return quoted
    return f"{quoted[:_MAX_NAME_BYTES]}-{xxhash.xxh3_64_hexdigest(os.fsencode(name))}"


def order(record: Record) -> tuple[str, int, str, str]:
    """Return what records are sorted by: run, step, model."""
    return (record.run, -1 if record.step is None else record.step, record.model, record.name)


def batch_folder(output: Path) -> Path:
    """Return where a batch keeps what it remembers of an output folder.

    For one in a store that is the user's state folder: stores have no locks that end with a process.
    Another machine's batch knows what is there by the manifests, and no two work on one output at once:
    each conversion holds a lock in the store.
    """
    if not isinstance(output, Address):
        return output / FOLDER
    folder = state_folder()
    if folder is None:
        raise UsageError(
            "what a batch remembers of outputs in a store has no place on this machine",
            where=str(output),
            hint="XDG_STATE_HOME names a folder for it",
        )
    return folder / "batches" / xxhash.xxh3_64_hexdigest(str(output).encode())


def status_path(output: Path) -> Path:
    """Return where ``status.json`` of an output folder lies."""
    return (batch_folder(output) if isinstance(output, Address) else output) / STATUS


def holds_batch(folder: Path) -> bool:
    """Whether ``folder`` is the output folder of a batch."""
    return not isinstance(folder, Address) and (folder / FOLDER / "jobs").is_dir()


def read_records(output: Path) -> list[Record]:
    """Return the records of an output folder as they are now, by run and step.

    One that says ``running`` though its process is gone is ``failed``: interrupted.
    """
    return _read_all(output)[0]


def _read_all(output: Path, folder: Path | None = None) -> tuple[list[Record], int]:
    """Return the records, and how many more a later release wrote."""
    folder = (folder or batch_folder(output)) / "jobs"
    output = output.absolute()
    records, newer = [], 0
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            record = _read_record(path, output)
        except NewerRecordError:
            newer += 1
            continue
        if record is None:
            continue
        if record.state == "running" and not _alive(record):
            record.interrupt()
        records.append(record)
    return sorted(records, key=order), newer


def _read_record(path: Path, output: Path) -> Record | None:
    """Return a record, None for one that is lost; raises :class:`NewerRecordError`."""
    data = read_record_file(path, _SHAPE)
    if data is None or path.name != f"{file_name(data['name'])}.json":
        return None
    if not _is_inside(data["name"]):
        return None
    return Record.from_json(data, output)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _alive(record: Record) -> bool:
    if record.host != socket.gethostname():
        return True  # on another machine: it must be believed
    return record.pid == os.getpid() or Path(f"/proc/{record.pid}").exists()


def is_intact(record: Record) -> bool:
    """Whether the output that ``record`` speaks of still looks as it did when it was finished."""
    if not record.evidence:
        return False
    try:
        now = output_evidence(place(record.output), (name for name, *_ in record.evidence))
    except OSError:
        return False
    return now == record.evidence


def write_whole(path: Path, text: str, kind: askedfile.Kind | None = None) -> None:
    """Write a file that others read at any moment: they see the old one or the new one.

    With a ``kind`` it replaces nothing but a file of that kind.

    Bytes of a file's name that are not text are written as JSON escapes lone surrogates.
    """
    with askedfile.written(path, kind, errors="backslashreplace") as out:
        out.write(text)
