"""Progress and the final summary.

A bar on a terminal, a line every few seconds elsewhere (both on stderr), one JSON object per event
on stdout for programs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from streamconv.cli.output import bottom, say, say_json, sorted_notices, tell
from streamconv.errors import shown
from streamconv.options import Event, Notice, Phase, Progress, Result
from streamconv.units import counted, format_duration, format_size

Listener = Callable[[Event], None]

_LINE_EVERY_SECONDS = 5.0
_DRAW_EVERY_SECONDS = 0.1
_SHORTEST_BAR = 10
_LONGEST_BAR = 40
_SIGNS = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_PHASES = {
    "plan": "planning",
    "compare": "comparing what lies there with the source",
    "resume": "checking what an earlier run finished",
    "write": "writing",
    "publish": "putting the output in its place",
}


@contextlib.contextmanager
def listen(*, json: bool, quiet: bool) -> Iterator[Listener]:
    """Yield what events should be given to, as suits where our output goes."""
    if json:
        yield _json_line
    elif quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with Spinner() as listener:
            yield listener
    else:
        yield PlainLines()


def _json_line(event: Event) -> None:
    say_json(event.to_json())


class PlainLines:
    """Tells phases and notices at once, progress only every few seconds."""

    def __init__(
        self, tell: Callable[[str], None] = tell, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._last = clock()

    def __call__(self, event: Event) -> None:
        """Tell an event, or keep silent."""
        if isinstance(event, Notice):
            self._tell(f"notice: {shown(event.text)}")
            return
        if isinstance(event, Phase):
            self._tell(_PHASES[event.name])
            return
        now = self._clock()
        if now - self._last >= _LINE_EVERY_SECONDS:
            self._last = now
            done, total = event.done_bytes, event.total_bytes
            share = 100 * done // total if total else 100
            self._tell(f"{format_size(done)} of {format_size(total)} ({share}%), {_speed(event)}")


def _rate(event: Progress) -> float:
    # What an earlier run wrote counts as done but took none of this run's time.
    done = event.done_bytes - event.reused_bytes
    return done / event.seconds if event.seconds else 0.0


def _left(event: Progress) -> str:
    rate = _rate(event)
    return format_duration((event.total_bytes - event.done_bytes) / rate) if rate else "?"


def _speed(event: Progress) -> str:
    memory = f"{format_size(event.memory_bytes)} / {format_size(event.budget_bytes)}"
    return f"{format_size(_rate(event))}/s, {_left(event)} left, memory {memory}"


def bar_line(event: Progress, width: int) -> str:
    """Return how far a conversion is in at most ``width`` columns: what matters most, and a bar.

    Percentage, speed and the time left come first; then memory and bytes, where there is room.
    """
    done, total = event.done_bytes, event.total_bytes
    share = done / total if total else 1.0
    memory = f"memory {_of(event.memory_bytes, event.budget_bytes)}"
    parts = [f"{int(100 * share):3d}%", f"{format_size(_rate(event))}/s", f"{_left(event)} left"]
    for more, at in ((memory, 3), (_of(done, total), 1)):
        if len("  ".join([*parts, more])) + _SHORTEST_BAR + 1 <= width:
            parts.insert(at, more)
    room = width - len("  ".join(parts)) - 1
    if room < _SHORTEST_BAR:
        return "  ".join(parts)[:width]
    length = min(room, _LONGEST_BAR)
    filled = int(length * share)
    return f"{parts[0]} {'━' * filled}{'─' * (length - filled)}  " + "  ".join(parts[1:])


def _of(part: int, whole: int) -> str:
    """Return two sizes, the unit of both said once where it is the same."""
    first, second = format_size(part), format_size(whole)
    number, _, unit = first.partition(" ")
    return f"{number}/{second}" if second.endswith(f" {unit}") else f"{first}/{second}"


class Spinner:
    """One line at the bottom of a terminal: a phase with its time, or how far the bytes are.

    A thread draws it, so that it also moves while nothing is heard. Others write above it through
    :func:`streamconv.cli.output.tell`.
    """

    def __init__(self, phase: str = "", *, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._phase = phase
        self._since = time.monotonic()
        self._progress: Progress | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._drawn = False
        self._thread = threading.Thread(target=self._draw_on, daemon=True, name="spinner")

    def __enter__(self) -> Spinner:
        bottom.line = self
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        self.clear()
        bottom.line = None

    def __call__(self, event: Event) -> None:
        """Show an event; a notice stays above."""
        if isinstance(event, Notice):
            tell(f"notice: {shown(event.text)}")
        elif isinstance(event, Phase):
            self._phase, self._since, self._progress = _PHASES[event.name], time.monotonic(), None
        else:
            self._progress = event

    def clear(self) -> None:
        """Remove the line."""
        with self._lock:
            if self._drawn:
                self._stream.write("\r\x1b[2K")
                self._stream.flush()
                self._drawn = False

    def text(self, width: int) -> str:
        """Return what the line says now, in at most ``width`` columns."""
        if self._progress is not None:
            return bar_line(self._progress, width)
        passed = time.monotonic() - self._since
        sign = _SIGNS[int(passed * 10) % len(_SIGNS)]
        return f"{sign} {self._phase}  {format_duration(passed)}"[:width] if self._phase else ""

    def _draw_on(self) -> None:
        while not self._ended.wait(_DRAW_EVERY_SECONDS):
            try:
                # The last column stays free: some terminals wrap as soon as it is written to.
                text = self.text(os.get_terminal_size(self._stream.fileno()).columns - 1)
                with self._lock:
                    self._stream.write(f"\r\x1b[2K{text}")
                    self._stream.flush()
                    self._drawn = True
            except OSError:  # the terminal has gone
                return


@contextlib.contextmanager
def working(phase: str, *, json: bool = False, quiet: bool = False) -> Iterator[None]:
    """Show on a terminal that something goes on, and for how long."""
    if json or quiet or not sys.stderr.isatty():
        yield
    else:
        with Spinner(phase):
            yield


def summarize(result: Result, *, json: bool, quiet: bool) -> None:
    """Print what a conversion did."""
    if json:
        say_json({"event": "result", **result_json(result)})
    elif not quiet:
        say(render_result(result))


def result_json(result: Result) -> dict[str, Any]:
    """Return a result as plain data."""
    return {
        "status": result.status,
        "output": str(result.output),
        "seconds": round(result.seconds, 3),
        "read_bytes": result.read_bytes,
        "write_bytes": result.write_bytes,
        "reused_bytes": result.reused_bytes,
        "peak_bytes": result.peak_bytes,
        "budget_bytes": result.budget_bytes,
        "files": result.files,
        "tensors": result.tensors,
        "unverifiable_bytes": result.unverifiable_bytes,
        "notices": list(result.notices),
    }


def render_result(result: Result) -> str:
    """Return the final summary."""
    if result.status == "nothing-to-do":
        return (
            f"nothing to do: {shown(str(result.output))} is already the complete output of this job"
        )
    told, routine = sorted_notices(result.notices)
    lines = [f"notice: {shown(text)}" for text in told]
    if result.unverifiable_bytes:
        lines.append(
            f"unverifiable: {format_size(result.unverifiable_bytes)} of the source carry no checksum"
        )
    lines.append(
        f"done: {shown(str(result.output))} ({counted(result.tensors, 'tensor')}, "
        f"{counted(result.files, 'file')}, "
        f"{format_size(result.write_bytes)})"
    )
    if result.reused_bytes:
        lines.append(f"reused {format_size(result.reused_bytes)} of an earlier run")
    rate = result.read_bytes / result.seconds if result.seconds else 0.0
    lines.append(
        f"read {format_size(result.read_bytes)} in {result.seconds:.1f} s ({format_size(rate)}/s); "
        f"peak memory {format_size(result.peak_bytes)} of {format_size(result.budget_bytes)}"
    )
    lines += [routine] if routine else []
    return "\n".join(lines)
