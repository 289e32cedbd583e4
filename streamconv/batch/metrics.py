"""A text file for Prometheus' node_exporter (``--collector.textfile.directory``)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from streamconv.batch.state import Record, State, write_whole
from streamconv.files import askedfile


def render(records: Iterable[Record], round_ended: float = 0.0) -> str:
    """Return the metrics of records in the text exposition format, deterministic in order.

    ``round_ended`` is when the last round of the batch ended (seconds since 1970), 0 before the first.
    """
    by_run: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_run[record.run].append(record)
    lines: list[str] = []

    def metric(name: str, text: str, samples: list[tuple[dict[str, str], float]]) -> None:
        lines.append(f"# HELP streamconv_{name} {text}")
        lines.append(f"# TYPE streamconv_{name} gauge")
        for labels, value in samples:
            inside = ",".join(f'{k}="{_escaped(v)}"' for k, v in labels.items())
            lines.append(f"streamconv_{name}{{{inside}}} {value:.17g}")

    runs = sorted(by_run.items())
    counts = {run: Counter(r.state for r in group) for run, group in runs}
    metric(
        "checkpoints",
        "Checkpoints of a run by state.",
        [({"run": r, "state": s}, counts[r][s]) for r, _ in runs for s in get_args(State)],
    )
    done = {run: [r for r in group if r.state == "done"] for run, group in runs}
    metric(
        "last_success_timestamp_seconds",
        "When a conversion last finished.",
        [
            ({"run": r}, max((x.finished_at or 0.0 for x in g), default=0.0))
            for r, g in done.items()
        ],
    )
    metric(
        "last_step",
        "The highest step that is converted.",
        [({"run": r}, max((x.step or 0 for x in g), default=0)) for r, g in done.items()],
    )
    metric(
        "written_bytes",
        "The size of all outputs that are there.",
        [({"run": r}, sum(x.write_bytes for x in g)) for r, g in done.items()],
    )
    metric(
        "peak_memory_bytes",
        "The largest peak of a conversion.",
        [({"run": r}, max((x.peak_bytes for x in g), default=0)) for r, g in done.items()],
    )
    metric(
        "failed_attempts",
        "Failed attempts at checkpoints that are not converted yet.",
        [({"run": r}, sum(x.attempts for x in g)) for r, g in runs],
    )
    lines += [
        "# HELP streamconv_last_round_timestamp_seconds When the last round of the batch ended.",
        "# TYPE streamconv_last_round_timestamp_seconds gauge",
        f"streamconv_last_round_timestamp_seconds {round_ended:.17g}",
    ]
    return "\n".join(lines) + "\n"


def write(path: Path, records: Iterable[Record], round_ended: float) -> None:
    """Write the metrics, whole at any moment."""
    text = render(records, round_ended)
    write_whole(askedfile.checked(path, askedfile.METRICS), text, askedfile.METRICS)


def _escaped(text: str) -> str:
    text = text.encode(errors="backslashreplace").decode()  # a name that is not text
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
