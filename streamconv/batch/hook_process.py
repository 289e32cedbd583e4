"""A user's command as a process: what it says is bounded, and it ends with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

_END_SECONDS = 0.5
_DRAIN_SECONDS = 0.2
_READ_BYTES = 1 << 16
_TAIL_BYTES = 1 << 14


class HookProcess:
    """A shell command in a process group of its own, with ``facts`` in its environment.

    It inherits the descriptor ``lock``, where there is one, and so do the processes it starts. Raises
    ``OSError`` where it cannot be started.
    """

    def __init__(self, command: str, facts: Mapping[str, str], lock: int | None) -> None:
        self._tail = b""
        self._process = subprocess.Popen(  # noqa: S602 - the user's own command, no word of ours in it
            command,
            shell=True,
            env={**os.environ, **facts},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that what the shell started can be ended with it
            pass_fds=() if lock is None else (lock,),
        )
        assert self._process.stderr is not None  # noqa: S101 - a pipe, see above
        # Read as it comes, so that gigabytes take no room and a full pipe stops nobody; and as long as
        # anybody holds the other end, so that what the command leaves running is not killed by a word.
        self._reader = threading.Thread(
            target=self._read, args=(self._process.stderr,), daemon=True, name="hook-stderr"
        )
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            while data := os.read(stream.fileno(), _READ_BYTES):
                self._tail = (self._tail + data)[-_TAIL_BYTES:]

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self._process.poll()

    def last_line(self) -> str:
        """Return the last line of what it said, however much that was."""
        self._reader.join(_DRAIN_SECONDS)
        return last_line(self._tail)

    def end(self) -> None:
        """End it and all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)


def last_line(said: bytes) -> str:
    """Return the last line that is not empty."""
    return next(iter(said.decode(errors="replace").strip().splitlines()[-1:]), "")
