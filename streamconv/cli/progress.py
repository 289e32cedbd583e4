"""Progress and the final summary.

A bar on a terminal, a line every few seconds elsewhere (both on stderr), one JSON object per event
on stdout for programs.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from streamconv.cli.output import say, say_json, tell
from streamconv.errors import shown
from streamconv.options import Event, Notice, Phase, Progress, Result
from streamconv.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.progress import TaskID

Listener = Callable[[Event], None]

_LINE_EVERY_SECONDS = 5.0
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
        with _bar() as listener:
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


def _speed(so_far: Progress) -> str:
    # What an earlier run wrote counts as done but took none of this run's time.
    done = so_far.done_bytes - so_far.reused_bytes
    rate = done / so_far.seconds if so_far.seconds else 0.0
    left = format_duration((so_far.total_bytes - so_far.done_bytes) / rate) if rate else "?"
    memory = f"{format_size(so_far.memory_bytes)} / {format_size(so_far.budget_bytes)}"
    return f"{rate / 1e9:.2f} GB/s, {left} left, memory {memory}"


@contextlib.contextmanager
def _bar() -> Iterator[Listener]:
    from rich import progress as bars
    from rich.console import Console

    progress = bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True, highlight=False, markup=False),
        transient=True,
    )
    task: TaskID | None = None

    def listener(event: Event) -> None:
        nonlocal task
        if isinstance(event, Notice):
            progress.console.print(f"notice: {shown(event.text)}")
            return
        if task is None:
            task = progress.add_task("", total=None, figures="")
        if isinstance(event, Phase):
            progress.update(task, description=_PHASES[event.name], refresh=True)
            return
        done, total = event.done_bytes, event.total_bytes
        progress.update(
            task,
            completed=done,
            total=total,
            figures=f"{format_size(done)} of {format_size(total)}, {_speed(event)}",
        )

    with progress:
        yield listener


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
    lines = [f"notice: {shown(text)}" for text in result.notices]
    if result.unverifiable_bytes:
        lines.append(
            f"unverifiable: {format_size(result.unverifiable_bytes)} of the source carry no checksum"
        )
    lines.append(
        f"done: {shown(str(result.output))} ({result.tensors} tensors, {result.files} files, "
        f"{format_size(result.write_bytes)})"
    )
    if result.reused_bytes:
        lines.append(f"reused {format_size(result.reused_bytes)} of an earlier run")
    rate = result.read_bytes / result.seconds / 1e9 if result.seconds else 0.0
    lines.append(
        f"read {format_size(result.read_bytes)} in {result.seconds:.1f} s ({rate:.2f} GB/s); "
        f"peak memory {format_size(result.peak_bytes)} of {format_size(result.budget_bytes)}"
    )
    return "\n".join(lines)
