"""The report of a batch: what it made, how it stood to its budget, and how every checkpoint stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamconv.report.charts import Limit, Span, gantt, line_chart
from streamconv.report.page import drawn, write_page
from streamconv.report.throughput import rates
from streamconv.report.timeline import Timeline
from streamconv.units import format_size

_MAX_NOTICES = 20


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
) -> None:
    """Write the page about a batch.

    ``records`` are as ``status --json`` tells them, ``spans`` the conversions of this round,
    ``timeline`` their memory and bytes (None where there was nothing to do), ``links`` the pages of
    single conversions by output.
    """
    done = [r for r in records if r["state"] == "done"]
    facts: dict[str, Any] = {
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
        "notices": Counter(text for r in done for text in r["notices"]).most_common(_MAX_NOTICES),
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
