"""Commands of the user's that run when an output is done, has failed or is gone.

Each runs at least once for each output. What is due is noted before the conversion begins, in
``.streamconv-batch/hooks/NAME.DUE.json`` of the output folder, and the note goes when the command has
succeeded; so whatever is killed meanwhile, the next round makes up for it. Each conversion has a note
of its own, whose name its record holds: a command that was begun for the output before it can only
remove the note of that one. A command that fails is repeated by the rounds that follow, with growing
pauses.

The facts are in the environment, so that no name of a checkpoint is ever part of a shell command.
One runs at a time, beside the conversions: an upload must not hold up the reading of their events.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from streamconv.batch.hook_process import HookProcess
from streamconv.batch.state import Record, batch_folder, file_name, write_whole
from streamconv.errors import LockedError, StreamconvError
from streamconv.files.jsonfile import COUNT, NUMBER, mismatches, object_or_empty
from streamconv.files.lockfile import locked_file
from streamconv.storage.address import place
from streamconv.system.signals import how_it_ended
from streamconv.units import format_duration

_POLL_SECONDS = 0.05
# What execve takes of one variable is 128 kB.
_MAX_FACT_CHARS = 1 << 14
_MAX_NOTE_BYTES = 1 << 16
_DUE_BYTES = 4
MOST_ATTEMPTS = 20
_PROMPT_ATTEMPTS = 3
_PAUSE_SECONDS = 60.0
_MAX_PAUSE_SECONDS = 6 * 3600.0
# So long nobody has tried: whoever wanted the command has given it up.
_FORGOTTEN_SECONDS = 7 * 86400.0


def environment(record: Record, attempt: int = 1) -> dict[str, str]:
    """Return the facts of a record as environment variables."""
    error = record.error or {}
    facts = {
        "STATE": record.state,
        "NAME": record.name,
        "RUN": record.run,
        "STEP": "" if record.step is None else record.step,
        "MODEL": record.model,
        "FORMAT": record.format,
        "SOURCE": record.source,
        "OUTPUT": record.output,
        "SECONDS": round(record.seconds, 3),
        "READ_BYTES": record.read_bytes,
        "WRITE_BYTES": record.write_bytes,
        "PEAK_BYTES": record.peak_bytes,
        "VERIFIED": {None: "", True: "yes", False: "no"}[record.verified],
        "ATTEMPTS": record.attempts,
        "ERROR": record.reason if record.state in ("failed", "gone") else "",
        "ERROR_KIND": error.get("kind") or "",
        "EXIT_CODE": error.get("exit_code") or 0,
        "HOOK_ATTEMPT": attempt,
    }
    return {f"STREAMCONV_{k}": _fact(str(v)) for k, v in facts.items()}


def _fact(text: str) -> str:
    # A NUL cannot be in an environment; in a file's name neither, but a message may quote one.
    text = text.replace("\0", "\\0")[:_MAX_FACT_CHARS]
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # a message with what no file's name has
        return text.encode(errors="backslashreplace").decode()
    return text


@dataclass(frozen=True, slots=True)
class _Note:
    """What is remembered of a command that is due: how often it was tried, and when it may be again."""

    attempts: int = 0
    not_before: float = 0.0


_NOTE = {"attempts": COUNT, "not_before": NUMBER}


def _folder(record: Record) -> Path:
    depth = len(PurePosixPath(record.name).parts)
    return batch_folder(place(record.output).parents[depth - 1]) / "hooks"


def note_path(record: Record) -> Path:
    """Return where it is noted that a command is due for the last conversion of an output."""
    folder, name = _folder(record), file_name(record.name)
    if record.due:
        return folder / f"{name}.{record.due}.json"
    # Of a record that was lost: the note that is there.
    found = sorted(folder.glob(f"{name}.{'[0-9a-f]' * 2 * _DUE_BYTES}.json"))
    return found[0] if found else folder / f"{name}.json"


def lock_path(record: Record) -> Path:
    """Return the lock that the command of an output holds as long as it runs."""
    return _folder(record) / f"{file_name(record.name)}.lock"


def _read(path: Path) -> _Note | None:
    """Return a note, None where nothing is due; one that is damaged says that something is."""
    if not os.path.lexists(path):
        return None
    data = object_or_empty(path, most_bytes=_MAX_NOTE_BYTES)
    return _Note() if any(mismatches(data, _NOTE)) else _Note(data["attempts"], data["not_before"])


def awaits_hook(record: Record) -> str:
    """Return why an output must stay for the sake of a command that reads it, or nothing."""
    path = note_path(record)
    try:
        age = time.time() - path.lstat().st_mtime
    except OSError:
        return ""
    return "" if age > _FORGOTTEN_SECONDS else "its --on-done has not succeeded yet"


def forget_hook(record: Record) -> None:
    """Let nothing be due for an output, whose lock the caller holds.

    Without the lock another batch may be at work on it: what it has just noted would be lost.
    """
    with suppress(OSError):
        note_path(record).unlink()


@dataclass(slots=True)
class _Running:
    process: HookProcess
    record: Record
    note: _Note
    lock: ExitStack
    until: float


class Hooks:
    """Runs the hooks of finished records, one after the other; ``problems`` says which failed.

    One that takes longer than ``limit_seconds`` is ended: a batch must not wait for it for ever.
    """

    def __init__(self, on_done: str | None, on_error: str | None, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._commands = {"done": on_done, "failed": on_error, "gone": on_error}
        self._waiting: deque[Record] = deque()
        self._running: _Running | None = None
        self.problems: list[str] = []

    def expect(self, record: Record, save: Callable[[Record], bool]) -> None:
        """Note that a command will be due when this output is finished, however this process ends.

        ``save`` keeps the record, which is told the name of the note, and returns whether the disk took
        it; the caller holds the output's lock. What was due for the output that is to be replaced is
        due no more.
        """
        before, due = note_path(record), record.due
        if any(self._commands.values()):
            record.due = secrets.token_hex(_DUE_BYTES)
            if not self._note(record):
                record.due = due
        if save(record) and record.due != due:
            with suppress(OSError):
                before.unlink()

    def _note(self, record: Record) -> bool:
        path = note_path(record)
        try:
            if _read(path) is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._write(path, _Note())
        except OSError as error:
            self._problem(record, f"could not be noted as due: {error.strerror}")
            return False
        return True

    def settle(self, record: Record) -> None:
        """Forget what is due where no command is for how a conversion ended; its lock is held."""
        ended = record.state in ("done", "gone") and any(self._commands.values())
        if ended and not self._commands[record.state]:
            forget_hook(record)

    def add(self, record: Record) -> None:
        """Take up a finished record: its command is due now."""
        if self._commands.get(record.state):
            self._note(record)
            self._waiting.append(replace(record))
        self.poll()

    def resume(self, records: Iterable[Record]) -> None:
        """Take up what an earlier round left undone."""
        for record in records:
            if self._commands.get(record.state):
                note, now = _read(note_path(record)), time.time()
                # A later one is of a clock that was ahead.
                if note is not None and not now < note.not_before <= now + _MAX_PAUSE_SECONDS:
                    self._waiting.append(replace(record))

    @property
    def busy(self) -> bool:
        """Whether a command runs or waits."""
        self.poll()
        return self._running is not None

    def finish(self) -> None:
        """Wait until every command that is due has run."""
        while self.busy:
            time.sleep(_POLL_SECONDS)

    def poll(self) -> None:
        """Collect a command that has ended, and start the next."""
        if self._running is not None:
            running = self._running
            code = running.process.poll()
            if code is None and time.monotonic() < running.until:
                return
            self._running = None
            if code is None:
                running.process.end()
            self._end(running, code)
        while self._waiting and self._running is None:
            self._start(self._waiting.popleft())

    def _start(self, record: Record) -> None:
        """Run the command of a record, unless another batch does, or did, or replaces the output."""
        path = note_path(record)
        note, lock, fd = _Note(), ExitStack(), None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The command inherits it, and so holds it as long as it lives, also when we are killed.
            held = locked_file(lock_path(record), place(record.output), wait_seconds=0.0)
            fd = lock.enter_context(held)
            found = _read(path)
            if found is None:
                lock.close()
                return
            note = replace(found, attempts=found.attempts + 1)
            pause = _pause_seconds(note.attempts)
            self._write(path, replace(note, not_before=time.time() + pause if pause else 0.0))
        except LockedError:
            return
        except (OSError, StreamconvError) as error:  # a full disk, say: better twice than never
            self._problem(record, f"could not be noted as begun: {error}")
        command = self._commands[record.state] or ""
        try:
            process = HookProcess(command, environment(record, note.attempts), fd)
        except OSError as error:
            self._problem(record, f"could not be started: {error.strerror}")
            lock.close()
            return
        self._running = _Running(process, record, note, lock, time.monotonic() + self._limit)

    def _end(self, running: _Running, code: int | None) -> None:
        said = running.process.last_line()
        record, attempts = running.record, running.note.attempts
        if code == 0 or attempts >= MOST_ATTEMPTS:
            forget_hook(record)
        which = f"(attempt {attempts} of {MOST_ATTEMPTS}) " if attempts > 1 else ""
        if code is None:
            self._problem(record, f"{which}was ended after {format_duration(self._limit)}", said)
        elif code:
            self._problem(record, f"{which}ended with {how_it_ended(code)}", said)
        running.lock.close()

    def _write(self, path: Path, note: _Note) -> None:
        write_whole(path, json.dumps({"attempts": note.attempts, "not_before": note.not_before}))

    def _problem(self, record: Record, what: str, said: str = "") -> None:
        hook = {"done": "--on-done", "failed": "--on-error", "gone": "--on-error"}
        name = hook.get(record.state, "its hook")  # before its end, either may be due
        self.problems.append(f"{record.name}: {name} {what}" + (f": {said}" if said else ""))

    def stop(self) -> None:
        """End what runs; what waits is due still, and the next round's."""
        self._waiting.clear()
        if self._running is not None:
            self._running.process.end()
            self._running.lock.close()
            self._running = None


def _pause_seconds(attempts: int) -> float:
    """Return how long to wait after so many attempts: the first few follow with the next rounds."""
    if attempts <= _PROMPT_ATTEMPTS:
        return 0.0
    return float(min(_PAUSE_SECONDS * 2 ** (attempts - _PROMPT_ATTEMPTS - 1), _MAX_PAUSE_SECONDS))
