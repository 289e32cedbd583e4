"""Commands of the user's that run when an output is done or has failed.

The facts are in the environment, so that no name of a checkpoint is ever part of a shell command.
One runs at a time, beside the conversions: an upload must not hold up the reading of their events.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections import deque
from contextlib import suppress
from typing import IO

from streamconv.batch.state import Record

_END_SECONDS = 1.0


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
    return {f"STREAMCONV_{k}": str(v).replace("\0", "\\0") for k, v in facts.items()}


class Hooks:
    """Runs the hooks of finished records, one after the other; ``problems`` says which failed."""

    def __init__(self, on_done: str | None, on_error: str | None) -> None:
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
            if process.poll() is None:
                return
            self._running = None
            err.seek(0)
            said = err.read().decode(errors="replace").strip().splitlines()[-1:]
            err.close()
            if process.returncode:
                self.problems.append(
                    f"{record.name}: the hook for {record.state} ended with exit code "
                    f"{process.returncode}" + (f": {said[0]}" if said else "")
                )
        if self._waiting:
            command, record = self._waiting.popleft()
            err = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the command has ended
            process = subprocess.Popen(  # noqa: S602 - the user's own command, no word of ours in it
                command,
                shell=True,
                env={**os.environ, **environment(record)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
                start_new_session=True,  # so that what the shell started can be ended with it
            )
            self._running = (process, err, record)

    def stop(self) -> None:
        """End what runs and forget what waits."""
        self._waiting.clear()
        if self._running is None:
            return
        process, err, _ = self._running
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
                break
        err.close()
        self._running = None
