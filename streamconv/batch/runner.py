"""Runs conversions in processes of their own, as many at once as the ledger has shares for.

One loop, one thread: start what may start, read what the workers tell, settle what has ended. What
passes (a network disk that hiccups) is tried again after a while, what will not (bad input, a full
disk) is not.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import filelock

from streamconv import formats
from streamconv.batch import worker
from streamconv.batch.hook_process import last_line
from streamconv.batch.hooks import Hooks
from streamconv.batch.ledger import Ledger
from streamconv.batch.pins import Holder
from streamconv.batch.places import refusal_into_another
from streamconv.batch.state import Record, is_intact
from streamconv.batch.tasks import UNCOMPARED, Task, take_over_finished
from streamconv.conversion.job import identify, refuse_full_disk
from streamconv.errors import LockedError, NoSpaceError, StreamconvError
from streamconv.output.staging import staging_path
from streamconv.storage.address import Address
from streamconv.storage.buckets import forget
from streamconv.storage.objects import NoAnswerError
from streamconv.system.signals import how_it_ended

_DONE_MEANWHILE = "another batch has done it"
_PASSING = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT})
_BACKOFF_SECONDS = 2.0
_BACKOFF_FACTOR = 4.0
_BACKOFF_MAX_SECONDS = 300.0
_SAVE_EVERY_SECONDS = 2.0
_LISTEN_SECONDS = 0.25
_IDLE_SECONDS = 0.05
_END_SECONDS = 2.5
_READ_BYTES = 1 << 16
_TAIL_BYTES = 1 << 14

What = Literal[
    "queued",
    "started",
    "progress",
    "retry",
    "done",
    "failed",
    "gone",
    "elsewhere",
    "left",
    "notice",
]
Listener = Callable[[What, Task, str], None]


def backoff_seconds(tries: int) -> float:
    """Return how long to wait after so many tries.

    >>> [backoff_seconds(n) for n in (1, 2, 3, 9)]
    [2.0, 8.0, 32.0, 300.0]
    """
    return min(_BACKOFF_SECONDS * _BACKOFF_FACTOR ** (tries - 1), _BACKOFF_MAX_SECONDS)


@dataclass(slots=True)
class _Running:
    task: Task
    process: subprocess.Popen[bytes]
    err: IO[bytes]
    lock: filelock.BaseFileLock
    started: float
    rest: bytes = b""
    last: dict[str, Any] = field(default_factory=dict)
    saved: float = 0.0


class Runner:
    """Works off tasks. ``outcomes`` counts how they ended, by the last word told of each."""

    def __init__(
        self,
        ledger: Ledger,
        hooks: Hooks,
        listener: Listener,
        *,
        pins: Holder | None = None,
        retries: int = 3,
        command: Sequence[str] | None = None,
        every: Callable[[], None] = lambda: None,
        backoff: Callable[[int], float] = backoff_seconds,
    ) -> None:
        self._ledger = ledger
        self._hooks = hooks
        self._tell = listener
        self._pins = pins or Holder()
        self._retries = retries
        self._command = list(command or worker.command())
        self._every = every
        self._backoff = backoff
        self._selector = selectors.DefaultSelector()
        self._running: dict[str, _Running] = {}
        self._waiting: list[Task] = []
        self._taken_bytes: dict[tuple[str, ...], int] = {}
        self.outcomes: dict[What, int] = {}

    def run(self, tasks: Iterable[Task]) -> None:
        """Convert everything; failures are recorded and told, and stop nothing else."""
        self._waiting = list(tasks)
        told = time.monotonic()
        for task in self._waiting:
            self._tell("queued", task, "")
        try:
            for task in list(self._waiting):
                if task.refused is not None:
                    self._waiting.remove(task)
                    self._refuse(task, task.refused)
            # All at once: rotation will not wait until it is their turn.
            for task in self._waiting:
                if task.pin:
                    self._pin(task)
            while self._waiting or self._running or self._hooks.busy:
                self._start()
                self._listen()
                now = time.monotonic()
                if now - told >= _SAVE_EVERY_SECONDS:
                    told = now
                    self._pins.beat()
                    self._every()
        finally:
            self._stop()

    # Starting

    def _start(self) -> None:
        now = time.monotonic()
        for task in list(self._waiting):
            if len(self._running) >= self._ledger.slots or not self._waiting:
                return
            if task.not_before > now:
                continue
            share = self._ledger.grant(task.key, alone=task.alone)
            if share is None:
                continue
            self._waiting.remove(task)
            try:
                launched = self._launch(task, share)
            except OSError as error:  # no process to be had, or no file for its lock
                launched = False
                self._refuse(task, StreamconvError.of_system(error))
            if not launched:
                self._ledger.release(task.key)

    def _refuse(self, task: Task, error: StreamconvError) -> None:
        """Note a failure that needed no process."""
        try:
            with task.store.holding(task.record.name):
                if self._is_done_meanwhile(task):
                    self._end(task, "elsewhere", _DONE_MEANWHILE)
                    return
                _failed(task.record, error.to_json())
                task.store.save(task.record)
        except LockedError as held:
            self._end(task, "elsewhere", held.what)
            return
        except OSError as locking:
            task.store.trouble = locking
            _failed(task.record, error.to_json())
        self._hooks.add(task.record)
        self._end(task, "failed", str(error))

    def _launch(self, task: Task, share: int) -> bool:
        """Start a worker; False where another batch has the output, or has done it meanwhile."""
        refused = refusal_into_another(task.output, task.store.output)
        if refused is not None:  # which came meanwhile
            self._refuse(task, refused)
            return False
        full = self._full_disk(task)
        if full is not None:
            self._refuse(task, full)
            self._leave_waiting()
            return False
        try:
            lock = task.store.claim(task.record.name)
        except LockedError as error:
            self._end(task, "elsewhere", error.what)
            return False
        if self._is_done_meanwhile(task):
            lock.release()
            self._end(task, "elsewhere", _DONE_MEANWHILE)
            return False
        record = task.record
        task.tries += 1
        record.state, record.reason = "running", ""
        record.started_at, record.finished_at = time.time(), None
        record.done_bytes = record.total_bytes = 0
        record.budget_bytes = share
        record.host, record.pid = socket.gethostname(), os.getpid()
        self._hooks.expect(record, task.store.save)
        self._tell("started", task, "")
        try:
            process, err = self._worker()
        except OSError:
            lock.release()
            raise
        request = {
            "parent": os.getpid(),
            "source": str(task.pinned or task.candidate.path),
            "output": record.output,
            "job": task.job.to_json(),
            "run": {**task.run_options, "max_mem_bytes": share},
            "verify": task.verify,
            "report": None if task.report is None else str(task.report),
        }
        assert process.stdin is not None  # noqa: S101 - a pipe, see above
        assert process.stdout is not None  # noqa: S101 - a pipe, see above
        with contextlib.suppress(BrokenPipeError):  # it died at once: its exit code will tell
            process.stdin.write(json.dumps(request).encode())
            process.stdin.close()
        os.set_blocking(process.stdout.fileno(), False)
        running = _Running(task, process, err, lock, time.monotonic())
        self._running[task.key] = running
        self._selector.register(process.stdout, selectors.EVENT_READ, running)
        return True

    def _full_disk(self, task: Task) -> NoSpaceError | None:
        """Return what to say where not even half the room is left that such an output took before.

        That shows without planning. What is begun needs less, and is left to its plan.
        """
        kind, output = _alike(task.record), task.output
        if kind not in self._taken_bytes:
            done = (r for r in task.store if r.state == "done" and _alike(r) == kind)
            self._taken_bytes[kind] = min((r.write_bytes for r in done), default=0)
        if isinstance(output, Address) or staging_path(output).exists():
            return None
        try:
            refuse_full_disk(output, self._taken_bytes[kind] // 2)
        except NoSpaceError as error:
            return error
        return None

    def _is_done_meanwhile(self, task: Task) -> bool:
        """Take up the record as another batch may have left it: whether that one has done it."""
        wanted = task.record
        task.record = record = task.store.reload(wanted.name)
        same = (record.snapshot, record.options) == (wanted.snapshot, wanted.options)
        verified = record.verified is True or not task.verify
        return record.state == "done" and same and verified and is_intact(record)

    def _worker(self) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        """Start a worker; return it and the file with what it says on stderr."""
        # Not a pipe: nobody reads it before the end, and a full pipe would stop the worker.
        err = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the worker has ended
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                start_new_session=True,  # Ctrl-C is ours to hand on
                pass_fds=self._pins.fds,
            )
        except OSError:
            err.close()
            raise
        return process, err

    def _pin(self, task: Task) -> None:
        source = task.candidate.path
        if source.is_file():
            self._tell("notice", task, "not pinned: it is one file, and only folders are")
            return
        try:
            wanted = identify(source, task.job)
            location = formats.find_model(source)
            below = [f.path for f in location.identify()]
            needed = [(location.root / path).relative_to(source).as_posix() for path in below]
            side = [Path(s.path) for s in wanted.side] if task.job.hf_config is None else []
            beside = [path for path in side if _is_beside(path, source.absolute())]
            pinned = self._pins.pin(source, needed, task.pin_places, beside)
            if identify(pinned, task.job).digest == wanted.digest:
                task.pinned = pinned
                return
            self._pins.unpin(pinned)
            why = "what belongs to it lies outside its folder"
        except (StreamconvError, OSError) as error:
            why = str(error).replace("\n ", ";")
        self._tell("notice", task, f"not pinned: {why}")

    def _unpin(self, task: Task) -> None:
        if task.pinned is not None:
            self._pins.unpin(task.pinned)
            task.pinned = None

    # Listening

    def _listen(self) -> None:
        if not self._running:
            # Only hooks, or tasks that wait out a hiccup.
            time.sleep(_IDLE_SECONDS)
            return
        for key, _ in self._selector.select(_LISTEN_SECONDS):
            running: _Running = key.data
            data = os.read(key.fd, _READ_BYTES)
            if data:
                self._take(running, data)
            else:
                self._selector.unregister(key.fileobj)
                running.process.wait()
                self._settle(running)
        self._hooks.poll()

    def _take(self, running: _Running, data: bytes) -> None:
        *lines, running.rest = (running.rest + data).split(b"\n")
        for line in lines:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue  # something a library printed
            if not isinstance(event, dict):
                continue
            if event.get("event") in ("finished", "error"):
                running.last = event
            elif event.get("event") == "progress":
                self._progress(running, event)

    def _progress(self, running: _Running, event: dict[str, Any]) -> None:
        task, now = running.task, time.monotonic()
        task.record.done_bytes = event["done_bytes"]
        task.record.total_bytes = event["total_bytes"]
        self._tell("progress", task, "")
        if now - running.saved >= _SAVE_EVERY_SECONDS:
            running.saved = now
            task.store.save(task.record)

    # Settling

    def _settle(self, running: _Running) -> None:
        task, record, told = running.task, running.task.record, running.last
        record.finished_at = time.time()
        if told.get("event") == "finished":
            self._succeed(running, told)
        else:
            error = self._failure(running)
            number, kind = error.get("errno"), error.get("kind")
            if kind == "locked":
                record.state, record.reason = "queued", str(error["what"])
                self._close(running)
                self._end(task, "elsewhere", str(error["what"]))
            elif kind == "budget" and not task.alone and self._ledger.can_grant_more:
                task.alone = True
                self._again(running, "needs more memory than its share: tried again alone")
            elif (number in _PASSING or kind == NoAnswerError.kind) and task.tries <= self._retries:
                wait = self._backoff(task.tries)
                task.not_before = time.monotonic() + wait
                self._again(running, f"{_one_line(error)}: tried again in {wait:g} s")
            else:
                self._fail(running, error)

    def _succeed(self, running: _Running, told: dict[str, Any]) -> None:
        task, record = running.task, running.task.record
        # Of an output that was there already its conversion has spoken.
        record.finished(told["notices"] or record.notices)
        record.evidence, record.verified = told["evidence"], told["verified"]
        record.tensors = told["tensors"]
        record.write_bytes = told["write_bytes"]
        self._taken_bytes[_alike(record)] = told["write_bytes"]
        record.done_bytes = record.total_bytes = told["write_bytes"]
        if told["status"] == "done":
            record.seconds = time.monotonic() - running.started
            record.read_bytes, record.peak_bytes = told["read_bytes"], told["peak_bytes"]
            record.bytes_per_second = (
                told["read_bytes"] / told["seconds"] if told["seconds"] else None
            )
        self._close(running)
        self._hooks.add(record)
        self._end(task, "done", "")

    def _fail(self, running: _Running, error: dict[str, Any]) -> None:
        task, record = running.task, running.task.record
        record.seconds = time.monotonic() - running.started
        gone = not _still_there(task.pinned or task.candidate.path)
        if gone and take_over_finished(record, record.job, UNCOMPARED if task.verify else ""):
            self._close(running)
            self._hooks.add(record)
            self._end(task, "done", "")
            return
        if gone:
            record.state, record.error = "gone", error
            record.reason = "the source went away while it was converted"
        else:
            _failed(record, error)
        self._close(running)
        self._hooks.add(record)
        self._end(task, "gone" if gone else "failed", str(StreamconvError.from_json(error)))
        if error.get("exit_code") == NoSpaceError.exit_code:
            self._leave_waiting()

    def _leave_waiting(self) -> None:
        """Begin nothing more in this round: each conversion would fill the disk again, and fail."""
        for task in self._waiting:
            task.record.reason = "not begun: the disk is full"
            with contextlib.suppress(LockedError, OSError), task.store.holding(task.record.name):
                task.store.save(task.record)
            self._end(task, "left", task.record.reason)
        self._waiting.clear()

    def _again(self, running: _Running, why: str) -> None:
        running.task.record.state, running.task.record.reason = "queued", why
        self._close(running)
        self._waiting.append(running.task)
        self._tell("retry", running.task, why)

    def _failure(self, running: _Running) -> dict[str, Any]:
        """Return what the worker told, or what its end tells where it could not."""
        if running.last:
            return running.last
        code = running.process.returncode
        running.err.seek(max(0, running.err.seek(0, os.SEEK_END) - _TAIL_BYTES))
        said = last_line(running.err.read())
        name = how_it_ended(code)
        crash = StreamconvError(
            "the conversion process died without reporting an error",
            where=running.task.record.source,
            found=f"{name}; {said}" if said else name,
            hint="SIGKILL is most often the machine out of memory" if code == -9 else None,
        )
        return {**crash.to_json(), "kind": "crashed"}

    def _close(self, running: _Running) -> None:
        """Save the record while its lock is still held, then give everything back."""
        task = running.task
        task.store.save(task.record)
        self._hooks.settle(task.record)
        if running.process.stdout is not None:
            running.process.stdout.close()
        running.err.close()
        running.lock.release()
        self._ledger.release(task.key)
        del self._running[task.key]

    def _end(self, task: Task, what: What, text: str) -> None:
        self._unpin(task)
        self.outcomes[what] = self.outcomes.get(what, 0) + 1
        self._tell(what, task, text)

    def _stop(self) -> None:
        """End whatever still runs: after a signal, or an error of our own."""
        self._hooks.stop()
        for running in self._running.values():
            running.process.terminate()
        deadline = time.monotonic() + _END_SECONDS
        for running in list(self._running.values()):
            try:
                running.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
            running.task.record.interrupt()
            self._close(running)
            self._unpin(running.task)
        for task in self._waiting:
            self._unpin(task)
        self._selector.close()


def _alike(record: Record) -> tuple[str, ...]:
    """Return what the outputs of a run have in common that are about as large as each other."""
    return record.root, record.run, record.model, record.options


def _is_beside(path: Path, source: Path) -> bool:
    return path.is_relative_to(source.parent) and not path.is_relative_to(source)


def _failed(record: Record, error: dict[str, Any]) -> None:
    record.state, record.error, record.reason = "failed", error, _one_line(error)
    record.attempts += 1
    record.finished_at = time.time()


def _still_there(path: Path) -> bool:
    forget()
    try:
        return formats.detect(path) is not None
    except (StreamconvError, OSError):
        return isinstance(path, Address) or path.is_dir()


def _one_line(error: dict[str, Any]) -> str:
    what, where = str(error.get("what")), error.get("where")
    return f"{what} ({where})" if where else what
