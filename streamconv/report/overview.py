"""The report of a batch: what it made, how it stood to its budget, and how every checkpoint stands."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamconv.options import is_routine
from streamconv.report.charts import Limit, Span, bar_chart, gantt, line_chart
from streamconv.report.page import drawn, write_page
from streamconv.report.throughput import rates
from streamconv.report.timeline import Timeline
from streamconv.units import format_duration, format_size

_MAX_NOTICES = 20


# What became of a checkpoint, as people call it.
_WORDS = {
    "done": "converted",
    "failed": "failed",
    "gone": "lost",
    "waiting": "not whole yet",
    "queued": "to be converted",
    "running": "running",
    "pruned": "left out",
}
_CHARTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("Time", "seconds", format_duration),
    ("Speed", "bytes_per_second", lambda v: f"{format_size(v)}/s"),
    ("Size", "write_bytes", format_size),
)


def _step_charts(done: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """Return the charts of what each output took, by step: of one that is left out it is not known."""
    charts = []
    for title, key, text in _CHARTS:
        bars = [
            (r["name"] if r["step"] is None else str(r["step"]), float(r[key]))
            for r in done
            if r[key]
        ]
        if len(bars) > 1:
            charts.append((title, drawn(bar_chart(bars, title=title, value_text=text))))
    return charts


def write_overview(
    path: Path,
    *,
    outputs: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    spans: Sequence[Span],
    timeline: Timeline | None,
    budget_bytes: int,
    peak_bytes: int,
    seconds: float,
    problems: Sequence[str],
    removals: Sequence[str],
    links: Mapping[str, str],
    next_round: str = "",
) -> None:
    """Write the page about a batch.

    ``records`` are as ``status --json`` tells them, ``spans`` the conversions of this round,
    ``timeline`` their memory and bytes (None where there was nothing to do), ``links`` the pages of
    single conversions by output, ``next_round`` when the batch looks again.
    """
    done = [r for r in records if r["state"] == "done"]
    notices = [text for r in done for text in r["notices"] if not is_routine(text)]
    facts: dict[str, Any] = {
        "made_at": time.time(),
        "host": platform.node(),
        "next_round": next_round,
        "words": _WORDS,
        "step_charts": _step_charts(done),
        "outputs": list(outputs),
        "records": list(records),
        "counts": Counter(r["state"] for r in records),
        "written_bytes": sum(r["write_bytes"] for r in done),
        "budget_bytes": budget_bytes,
        "peak_bytes": peak_bytes,
        "seconds": seconds,
        "converted": sum(s.state == "done" for s in spans),
        "problems": list(problems),
        "removals": list(removals),
        "links": dict(links),
        "notices": Counter(notices).most_common(_MAX_NOTICES),
        "gantt": None,
        "memory_chart": None,
        "speed_chart": None,
    }
    if timeline is not None and spans:
        memory = [(s.seconds, float(s.memory_bytes)) for s in timeline.samples]
        limit = Limit(budget_bytes, f"budget {format_size(budget_bytes)}")
        facts["gantt"] = drawn(gantt(spans, title="conversions over time"))
        facts["memory_chart"] = drawn(
            line_chart(memory, title="memory over time", value_text=format_size, limit=limit)
        )
        facts["speed_chart"] = drawn(
            line_chart(
                rates(timeline.samples),
                title="throughput over time",
                value_text=lambda v: f"{format_size(v)}/s",
            )
        )
    write_page(path, "batch.html", **facts)
