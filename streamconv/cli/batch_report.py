"""What ``batch`` and ``status`` print: lines while it works, a summary of a round, a table."""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from streamconv.batch.state import Record
from streamconv.cli.output import say_json, sorted_notices, tell
from streamconv.cli.progress import Spinner
from streamconv.errors import listed, shown
from streamconv.system.memory import tree_bytes
from streamconv.units import format_duration, format_size

if TYPE_CHECKING:
    from streamconv.batch.round import Round
    from streamconv.batch.runner import What
    from streamconv.batch.tasks import Task

_LINE_EVERY_SECONDS = 10.0
_COUNTED = (
    ("converted", "converted"),
    ("done", "done before"),
    ("failed", "failed"),
    ("waiting", "not whole yet"),
    ("elsewhere", "in other hands"),
    ("gone", "lost: their source went away"),
    ("left", "not begun: the disk is full"),
    ("pruned", "left out by retention"),
)


def _rate(record: Record) -> str:
    rate = record.bytes_per_second
    return f"{format_size(rate)}/s" if rate else ""


def _line(text: str) -> None:
    """Tell a line with the time: a batch runs for days."""
    tell(f"{datetime.now():%H:%M:%S} {text}")  # noqa: DTZ005 - local time, for people


class BatchLines:
    """Tells on stderr what happens to each output, and when."""

    def __init__(self, *, quiet: bool, progress: bool = True) -> None:
        self._quiet = quiet
        self._tells_progress = progress
        self._last: dict[str, float] = {}
        self._noticed: set[str] = set()

    def __call__(self, what: What, task: Task, text: str) -> None:
        """Tell a line, or keep silent."""
        record, name = task.record, shown(task.record.name)
        text = "\n".join(map(shown, text.split("\n")))
        if what == "failed":
            _line(f"error: {name}: {text}")
        elif self._quiet or what == "queued":
            return
        elif what == "started":
            self._last[name] = time.monotonic()
            _line(f"{name}: converting within {format_size(record.budget_bytes)}")
        elif what == "progress":
            if self._tells_progress:
                self._progress(name, record)
        elif what == "left":
            _line(f"{name}: {text}")
        elif what == "done":
            speed = f" in {format_duration(record.seconds)}" if record.seconds else ""
            verified = ", verified" if record.verified else ""
            _line(f"{name}: done, {format_size(record.write_bytes)}{speed}{verified}")
            # Once each: the checkpoints of a run have the same to say.
            for notice in [n for n in sorted_notices(record.notices)[0] if n not in self._noticed]:
                self._noticed.add(notice)
                _line(f"{name}: notice: {shown(notice)}")
        else:
            _line(f"{name}: {what if what != 'elsewhere' else 'left to another'}: {text}")

    def _progress(self, name: str, record: Record) -> None:
        now = time.monotonic()
        if now - self._last.get(name, now) >= _LINE_EVERY_SECONDS and record.total_bytes:
            self._last[name] = now
            done, total = record.done_bytes, record.total_bytes
            _line(f"{name}: {format_size(done)} of {format_size(total)} ({100 * done // total}%)")


class LiveView(Spinner):
    """One line at the bottom of a terminal: how many of all are done, how fast, how long, memory.

    ``budget_bytes`` is that of the batch. The sizes of outputs that wait are not known before they are
    planned: they are taken to be as large as the others.
    """

    def __init__(self, budget_bytes: int) -> None:
        super().__init__("looking at the checkpoints")
        self._budget_bytes = budget_bytes
        self._began = time.monotonic()
        self._queued: set[str] = set()
        self._running: dict[str, Record] = {}
        self._outcomes: Counter[str] = Counter()
        self._moved = 0

    def hear(self, what: What, task: Task) -> None:
        """Take note of what happens to an output."""
        record = task.record
        if what == "queued":
            self._queued.add(task.key)
        elif what in ("started", "progress"):
            self._running[task.key] = record
        elif what in ("done", "failed", "gone", "elsewhere", "left"):
            self._running.pop(task.key, None)
            self._queued.discard(task.key)
            self._outcomes[what] += 1
            self._moved += record.write_bytes if what == "done" else 0

    def text(self, width: int) -> str:
        """Return the line in at most ``width`` columns."""
        running = list(self._running.values())
        if not running:
            return ""
        done = sum(r.done_bytes for r in running)
        total = sum(r.total_bytes for r in running)
        seconds = time.monotonic() - self._began
        rate = (self._moved + done) / seconds if seconds else 0.0
        moving = f" ({format_size(done)} of {format_size(total)})" if total else ", planning"
        parts = [
            f"{self._outcomes['done']} of {self._outcomes.total() + len(self._queued)} done",
            *([f"{self._outcomes['failed']} failed"] if self._outcomes["failed"] else []),
            f"{len(running)} running{moving}",
        ]
        if total and rate:
            known = self._outcomes["done"] + sum(r.total_bytes > 0 for r in running)
            left = (self._moved + total) / known * (self._outcomes["done"] + len(self._queued))
            left -= self._moved + done
            parts += [f"{format_size(rate)}/s", f"{format_duration(left / rate)} left"]
        parts.append(f"memory {format_size(tree_bytes())} of {format_size(self._budget_bytes)}")
        while len(parts) > 1 and len("  ".join(parts)) > width:
            parts.pop()
        return "  ".join(parts)[:width]


def json_lines(what: What, task: Task, text: str) -> None:
    """Tell what happens to an output as a JSON line on stdout."""
    record = task.record
    facts: dict[str, Any] = {"event": what, "name": record.name, "source": record.source}
    if what == "progress":
        facts |= {"done_bytes": record.done_bytes, "total_bytes": record.total_bytes}
    elif what in ("done", "failed", "gone"):
        facts |= _record_json(record)
    if text:
        facts["text"] = text
    say_json(facts)


def round_json(made: Round) -> dict[str, Any]:
    """Return what a round came to as plain data."""
    return {
        "counts": dict(made.counts),
        "lost": [r.name for r in made.lost],
        "seconds": round(made.seconds, 3),
        "peak_bytes": made.peak_bytes,
        "budget_bytes": made.budget_bytes,
        "removals": [
            {
                "kind": r.kind,
                "path": str(r.path),
                "nbytes": r.nbytes,
                "applied": r.applied,
                "refused": r.refused,
            }
            for r in made.removals
        ],
        "problems": [p.to_json() for p in made.problems],
        "notices": made.notices,
        "exit_code": made.exit_code,
    }


def render_round(made: Round, *, applied: bool) -> str:
    """Return what a round came to as text."""
    counts = [f"{made.counts[key]} {word}" for key, word in _COUNTED if made.counts[key]]
    lines = [shown(str(removal)) for removal in made.removals]
    if not applied and any(not r.refused for r in made.removals):
        lines.append("nothing was removed: --apply does it")
    lines += _reasons(r for r in made.records if r.state == "waiting")
    text = ", ".join(counts) or "no checkpoint found"
    if made.peak_bytes:
        text += (
            f"; {format_duration(made.seconds)}, peak memory {format_size(made.peak_bytes)} "
            f"of {format_size(made.budget_bytes)}"
        )
    return "\n".join([*lines, text])


def preview_json(made: Round) -> dict[str, Any]:
    """Return what a round would do as plain data."""
    tasks = [
        {"name": t.record.name, "source": t.record.source, "output": t.record.output}
        for t in made.tasks
    ]
    return {"event": "preview", "convert": tasks, **round_json(made)}


def render_preview(made: Round) -> str:
    """Return what a round would do as text."""
    lines = [
        f"would convert {shown(t.record.source)} to {shown(t.record.output)}" for t in made.tasks
    ]
    lines += [shown(f"notice: {notice}") for notice in made.notices]
    lines += [shown(str(removal)) for removal in made.removals]
    counts = [f"{len(made.tasks)} to convert"]
    counts += [f"{made.counts[key]} {word}" for key, word in _COUNTED if made.counts[key]]
    return "\n".join([*lines, f"{', '.join(counts)}; nothing was written"])


def _record_json(record: Record) -> dict[str, Any]:
    data = record.to_json()
    for key in ("evidence", "snapshot", "marks", "options", "seen", "generation"):
        del data[key]  # how we recognise it: of no use to anybody else
    return data


def status_json(records: Sequence[Record]) -> dict[str, Any]:
    """Return how a batch stands as plain data."""
    return {
        "counts": dict(Counter(r.state for r in records)),
        "checkpoints": [_record_json(r) for r in records],
    }


def _reasons(records: Iterable[Record]) -> list[str]:
    """Return why outputs are not done: a line for each reason, with the names that it is true of."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for r in records:
        if r.reason:
            reasons[r.reason].append(shown(r.name))
    return [f"{listed(names, 3)}: {shown(reason)}" for reason, names in reasons.items()]


_COLOURS = {"done": "green", "failed": "red", "running": "cyan", "gone": "yellow"}


def print_status(records: Sequence[Record], last: int = 0, *, clear: bool = False) -> None:
    """Print the table of outputs, the ``last`` alone, and what is wrong with which of all."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("output", "step", "state", "size", "time", "speed", "peak", "verified", "when"):
        right = title in ("step", "size", "time", "speed", "peak")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    shown_records = records[-last:] if last else records
    for r in shown_records:
        state = r.state
        if state == "running" and r.total_bytes:
            state = f"running {100 * r.done_bytes // r.total_bytes}%"  # type: ignore[assignment]
        elif state == "failed" and r.attempts > 1:
            state = f"failed ×{r.attempts}"  # type: ignore[assignment]
        finished = r.state == "done"
        table.add_row(
            Text(shown(r.name)),
            "" if r.step is None else str(r.step),
            Text(state, style=_COLOURS.get(r.state, "")),
            format_size(r.write_bytes) if finished else "",
            format_duration(r.seconds) if finished and r.seconds else "",
            _rate(r) if finished else "",
            format_size(r.peak_bytes) if finished and r.peak_bytes else "",
            {None: "", True: "yes", False: "no"}[r.verified],
            f"{datetime.fromtimestamp(r.finished_at):%Y-%m-%d %H:%M}" if r.finished_at else "",  # noqa: DTZ006 - local time, for people
        )
    if clear and sys.stdout.isatty():
        console.clear()
    console.print(table)
    if len(shown_records) < len(records):
        console.print(f"and {len(records) - len(shown_records)} before them (--last 0 shows all)")
    reasons = _reasons(records)
    if reasons:
        console.print()
    for line in reasons:
        console.print(Text(line))
    counts = Counter(r.state for r in records)
    console.print()
    console.print(Text(", ".join(f"{n} {state}" for state, n in sorted(counts.items()))))
