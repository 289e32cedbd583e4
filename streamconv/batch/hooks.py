"""Commands of the user's that run when an output is done or has failed.

The facts are in the environment, so that no name of a checkpoint is ever part of a shell command.
One runs at a time, beside the conversions: an upload must not hold up the reading of their events.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from contextlib import suppress
from typing import IO

from streamconv.batch.state import Record
from streamconv.durations import format_duration

_END_SECONDS = 1.0
_TAIL_BYTES = 1 << 14
# What execve takes of one variable is 128 kB.
_MAX_FACT_CHARS = 1 << 14


def last_line(said: IO[bytes]) -> str:
    """Return the last line of what a process said, however much that was."""
    said.seek(max(0, said.seek(0, os.SEEK_END) - _TAIL_BYTES))
    return next(iter(said.read().decode(errors="replace").strip().splitlines()[-1:]), "")


def environment(record: Record) -> dict[str, str]:
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
        "ERROR": record.reason if record.state == "failed" else "",
        "ERROR_KIND": error.get("kind", ""),
        "EXIT_CODE": error.get("exit_code", 0),
    }
    # A NUL cannot be in an environment; in a file's name neither, but a message may quote one.
    return {
        f"STREAMCONV_{k}": str(v).replace("\0", "\\0")[:_MAX_FACT_CHARS] for k, v in facts.items()
    }


class Hooks:
    """Runs the hooks of finished records, one after the other; ``problems`` says which failed.

    One that takes longer than ``limit_seconds`` is ended: a batch must not wait for it for ever.
    """

    def __init__(self, on_done: str | None, on_error: str | None, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._until = 0.0
        self._commands = {"done": on_done, "failed": on_error}
        self._waiting: deque[tuple[str, Record]] = deque()
        self._running: tuple[subprocess.Popen[bytes], IO[bytes], Record] | None = None
        self.problems: list[str] = []

    def add(self, record: Record) -> None:
        """Take up a finished record, if there is a command for its state."""
        command = self._commands.get(record.state)
        if command:
            self._waiting.append((command, record))
        self.poll()

    @property
    def busy(self) -> bool:
        """Whether a command runs or waits."""
        self.poll()
        return self._running is not None

    def poll(self) -> None:
        """Collect a command that has ended, and start the next."""
        if self._running is not None:
            process, err, record = self._running
            late = process.poll() is None and time.monotonic() >= self._until
            if process.poll() is None and not late:
                return
            self._running = None
            if late:
                _end(process)
            said = last_line(err)
            err.close()
            if late:
                self._problem(record, f"was ended after {format_duration(self._limit)}", said)
            elif process.returncode:
                self._problem(record, f"ended with exit code {process.returncode}", said)
        while self._waiting and self._running is None:
            command, record = self._waiting.popleft()
            err = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the command has ended
            try:
                process = subprocess.Popen(  # noqa: S602 - the user's own command, no word of ours in it
                    command,
                    shell=True,
                    env={**os.environ, **environment(record)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=err,
                    start_new_session=True,  # so that what the shell started can be ended with it
                )
            except OSError as error:
                err.close()
                self._problem(record, f"could not be started: {error.strerror}")
            else:
                self._running = (process, err, record)
                self._until = time.monotonic() + self._limit

    def _problem(self, record: Record, what: str, said: str = "") -> None:
        hook = "done" if record.state == "done" else "error"
        self.problems.append(f"{record.name}: --on-{hook} {what}" + (f": {said}" if said else ""))

    def stop(self) -> None:
        """End what runs and forget what waits."""
        self._waiting.clear()
        if self._running is None:
            return
        process, err, _ = self._running
        _end(process)
        err.close()
        self._running = None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
