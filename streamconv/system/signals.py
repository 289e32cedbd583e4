"""How processes end: by SIGINT and SIGTERM, in order where that is quick; and with their parent.

The signals become ``SystemExit``, so that every ``with`` and ``finally`` on the way out runs. But
Python runs a handler only once the main thread is back from its system call, and on a slow disk a
write, a read or an fsync can take minutes. So the signal also wakes a thread that ends the process when
the orderly end takes too long. That is not worse than kill -9, which every run survives; children die
with their parent. Where the exception is lost, as in a ``__del__``, it is raised again.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A stop is promised within five seconds, and a batch that stops waits for its workers first.
GRACE_SECONDS = 3.5
WORKER_GRACE_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1
_AGAIN_SECONDS = 0.01
# The code that is told of exceptions which nobody can catch.
_LOSING: set[CodeType] = set()


def how_it_ended(code: int) -> str:
    """Return what the exit code that ``subprocess`` tells of a process says.

    >>> how_it_ended(3), how_it_ended(-9), how_it_ended(-40)
    ('exit code 3', 'SIGKILL', 'signal 40')
    """
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:  # most of the real-time signals have no name
        return f"signal {-code}"


class _Ended(SystemExit):
    """The end that a signal asks for."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


@contextmanager
def heeded(grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """End the process, with 128 + the signal as its exit code, when one of the signals arrives.

    ``grace_seconds`` is the time that an orderly end may take.
    """
    for signum in _SIGNALS:
        signal.signal(signum, _end)
    woken, wake = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(wake, False)  # what signal.set_wakeup_fd asks for
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    threading.Thread(
        target=_watch, args=(woken, grace_seconds), daemon=True, name="signal-watch"
    ).start()
    told_before = sys.unraisablehook

    def lost(told: sys.UnraisableHookArgs) -> None:
        if isinstance(told.exc_value, _Ended):
            _send_again(told.exc_value.signum)
        else:
            told_before(told)

    _LOSING.add(lost.__code__)
    sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = told_before
        signal.set_wakeup_fd(before)
        os.close(wake)  # the thread's cue, unless it has seen a signal


def end_with_parent(signum: signal.Signals, parent: int) -> bool:
    """Have the kernel send ``signum`` to this process when the process ``parent``, its parent, ends.

    Returns whether that one is still there: it may have ended before it was asked for.
    """
    import ctypes  # which the command line does without

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)
    return os.getppid() == parent


def _end(signum: int, frame: FrameType | None) -> None:
    # A second signal while cleaning up must not interrupt the cleaning.
    signal.signal(signum, signal.SIG_IGN)
    while frame is not None:
        if frame.f_code in _LOSING:
            _send_again(signum)  # raised here, it would be lost as the one before
            return
        frame = frame.f_back
    raise _Ended(signum)


def _send_again(signum: int) -> None:
    """Have the signal come once more whose ``SystemExit`` Python has just dropped."""
    signal.set_wakeup_fd(-1)  # the thread knows already
    signal.signal(signum, _end)
    # Later: whoever called this would drop it, too. Nothing here waits for the thread to start.
    _thread.start_new_thread(_kill_later, (signum,))


def _kill_later(signum: int) -> None:
    time.sleep(_AGAIN_SECONDS)
    os.kill(os.getpid(), signum)


def _watch(woken: int, grace_seconds: float) -> None:
    while (data := os.read(woken, 1)) and data[0] not in _SIGNALS:
        pass
    os.close(woken)
    if data:
        time.sleep(grace_seconds)
        os._exit(128 + data[0])
