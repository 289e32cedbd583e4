"""What ``plan``, ``inspect`` and ``verify`` print: plain data first, text from it second."""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from streamconv.cli.output import columns, sorted_notices
from streamconv.errors import shown
from streamconv.files.names import in_words, shown_all
from streamconv.ir.planfile import Plan
from streamconv.storage.address import Address, place
from streamconv.units import counted, format_duration, format_size

if TYPE_CHECKING:
    from streamconv.environment.forecast import Forecast
    from streamconv.verification.report import Report

_LONGEST_LIST = 20
# With a store `run` has threads of the client when the bytes move, and `convert` more modules, too.
_STORE_RUN_MORE_BYTES = 4 * 10**6
_CONVERT_MORE_BYTES = 8 * 10**6


def plan_report(plan: Plan, dst: Path | None, budget_bytes: int | None = None) -> dict[str, Any]:
    """Return what a plan amounts to, as plain data; sizes in bytes.

    With ``dst`` both disks are measured for a moment; ``budget_bytes`` is what the user chose.
    """
    from streamconv.api import disk_free_bytes
    from streamconv.environment.forecast import forecast
    from streamconv.executor.budget import beside_bytes, smallest_convert_bytes, smallest_run_bytes
    from streamconv.executor.writer import upload_share
    from streamconv.system.memory import available_bytes

    head = plan.head
    available, limit = available_bytes()
    outputs = plan.outputs()
    beside = beside_bytes(head.totals, max((o.tensors for o in outputs), default=0))
    # `run` has the byte path loaded, and clients of stores, when it looks what is left for windows.
    importlib.import_module("streamconv.conversion.job")
    root = place(head.root)
    for where in (root, dst):
        if isinstance(where, Address):
            _ = where.bucket
    if isinstance(dst, Address):
        # The least that is written with.
        beside += upload_share(0, max((o.nbytes for o in outputs), default=0))[1]
    from_store = isinstance(root, Address)
    smallest_run = smallest_run_bytes(beside, from_store=from_store)
    smallest_convert = smallest_convert_bytes(remembered=plan.remembered, from_store=from_store)
    if isinstance(dst, Address) or from_store:
        smallest_run += _STORE_RUN_MORE_BYTES
        smallest_convert = max(smallest_convert, smallest_run + _CONVERT_MORE_BYTES)
    return {
        "source": head.root,
        "format": head.job.get("format"),
        "options": head.job.get("options"),
        "job_digest": head.job.get("digest"),
        "plan_digest": plan.digest,
        "totals": asdict(head.totals),
        "outputs": [{"name": o.name, "nbytes": o.nbytes, "tensors": o.tensors} for o in outputs],
        "side_files": [{"name": s.name, "nbytes": s.nbytes} for s in head.side],
        "written_files": [w.name for w in head.written],
        "source_files": [{"path": f.path, "nbytes": f.nbytes} for f in head.files],
        "disk_needed_bytes": 0 if isinstance(dst, Address) else plan.disk_bytes(),
        "disk_free_bytes": disk_free_bytes(dst) if _on_disk(dst) else None,
        "memory": {
            "smallest_convert_bytes": smallest_convert,
            "smallest_run_bytes": smallest_run,
            "default_budget_bytes": available,
            "default_budget_from": limit,
        },
        "forecast": None
        if dst is None
        else _forecast_json(forecast(plan, dst, budget_bytes or available)),
        "skipped": [{"name": s.name, "reason": s.reason} for s in head.skipped],
        "notices": list(head.notices),
    }


def _on_disk(dst: Path | None) -> TypeGuard[Path]:
    return dst is not None and not isinstance(dst, Address)


def _forecast_json(told: Forecast) -> dict[str, Any]:
    data = asdict(told)
    for key in ("source", "output"):
        data[key]["mount"] = str(data[key]["mount"])
    return data


def _forecast_rows(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    def rate(value: float | None) -> str:
        return f"{format_size(value)}/s" if value else "too little to measure"

    seconds = told["seconds"]
    speeds = f"reads {rate(told['read_rate'])}, writes {rate(told['write_rate'])}"
    time = "a moment" if seconds is None else f"about {format_duration(max(1.0, seconds))}"
    rows = [("time", f"{time} to move the bytes ({speeds})")]
    if told["store"] is not None:
        store = told["store"]
        many = f"{told['requests']:,} of up to {format_size(store['request_bytes'])}"
        each = f"{1000 * store['latency_seconds']:.0f} ms each"
        alone = f"one connection {rate(store['connection_rate'])}"
        rows.append(("requests", f"{many}, {store['at_once']} at once; {each}, {alone}"))
    rows.append(("machines", told["machines"]))
    return rows + [("warning", warning) for warning in told["warnings"]]


def render_plan(report: Mapping[str, Any]) -> str:
    """Return a plan report as text."""
    report = shown_all(report)
    totals, memory = report["totals"], report["memory"]
    free = report["disk_free_bytes"]
    needed = report["disk_needed_bytes"]
    disk = f"{format_size(needed)} needed" if needed else "none needed: the output is in a store"
    if free is not None:
        disk += f", {format_size(free)} free"
        disk += "" if free >= report["disk_needed_bytes"] else ": NOT ENOUGH"
    least = (
        f"{format_size(memory['smallest_convert_bytes'])} is the least `convert` plans in, "
        f"{format_size(memory['smallest_run_bytes'])} the least `run` works in"
    )
    default = (
        f"default budget {format_size(memory['default_budget_bytes'])} "
        f"({memory['default_budget_from']})"
    )
    files = counted(len(report["source_files"]), "file")
    rows = [
        ("source", f"{report['source']} ({report['format']}, {files})"),
        ("tensors", f"{totals['tensors']:,} with {totals['parameters']:,} elements"),
        ("dtypes in", _histogram(totals["source_dtypes"])),
        ("dtypes out", _histogram(totals["output_dtypes"])),
        ("read", format_size(totals["read_bytes"])),
        ("write", format_size(totals["write_bytes"])),
        ("disk", disk),
        ("memory", f"{least};\n{default}"),
    ]
    if report["forecast"] is not None:
        rows += _forecast_rows(report["forecast"])
    if totals["unverifiable_bytes"]:
        rows.append(("no checksum", format_size(totals["unverifiable_bytes"])))
    rows.append(("resumes", "by output file: a file that is not finished is written again"))
    outputs = [
        f"{o['name']}  {format_size(o['nbytes'])}, {counted(o['tensors'], 'tensor')}"
        for o in report["outputs"]
    ]
    parts = [columns(rows), _list("output files", outputs)]
    parts.append(_list("written", report["written_files"]))
    parts.append(_list("copied byte for byte", [s["name"] for s in report["side_files"]]))
    parts.append(_skipped(report["skipped"]))
    told, routine = sorted_notices(report["notices"])
    parts.append(_list("notices", told, longest=None))
    parts.append(routine)
    return "\n".join(p for p in parts if p)


def render_inspection(found: Mapping[str, Any]) -> str:
    """Return what is in a checkpoint as text."""
    found = shown_all(found)
    tensors = found.get("tensors")
    files = found["files"]
    rows = [
        ("format", str(found["format"])),
        ("root", str(found["root"])),
        ("side files", str(found.get("side_dir") or "none (no config, no tokenizer)")),
        ("files", f"{len(files)}, {format_size(sum(f['nbytes'] for f in files))}"),
        *((name.replace("_", " "), in_words(value)) for name, value in found["facts"].items()),
    ]
    if tensors is not None:
        rows.append(("tensors", f"{len(tensors)}"))
    table = [
        (t["name"], f"{t['dtype']}  {_shape(t['shape'])}  {t['placement']}  {_shards(t['shards'])}")
        for t in tensors or ()
    ]
    parts = [columns(rows), "", columns(table, indent="  ") if table else ""]
    parts.append(_skipped(found["skipped"]))
    parts.append(_list("notices", found["notices"], longest=None))
    return "\n".join(p for i, p in enumerate(parts) if p or i == 1)


def _shape(shape: list[int]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _shards(count: int) -> str:
    return counted(count, "shard")


def _histogram(nbytes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {format_size(n)}" for name, n in nbytes.items()) or "none"


def _list(title: str, items: Iterable[str], *, longest: int | None = _LONGEST_LIST) -> str:
    items = list(items)
    if not items:
        return ""
    shown = items if longest is None or len(items) <= longest else items[: longest - 1]
    lines = [f"{title}:", *(f"  {item}" for item in shown)]
    if len(shown) < len(items):
        lines.append(f"  and {len(items) - len(shown)} more (--json lists them all)")
    return "\n".join(lines)


def _skipped(skipped: Iterable[Mapping[str, str]]) -> str:
    """Return what is left out and why: every name, but grouped where one reason fits many."""
    skipped = list(skipped)
    counts = Counter(s["reason"] for s in skipped)
    items = []
    for reason, count in counts.items():
        names = [s["name"] for s in skipped if s["reason"] == reason]
        if count > _LONGEST_LIST:
            items.append(f"{names[0]} and {count - 1} more: {reason} (--json lists them all)")
        else:
            items += [f"{name}: {reason}" for name in names]
    return _list("skipped", items, longest=None)


_LISTED_ROWS = 20
_LISTED_PROBLEMS = 50


def _forward(found: Mapping[str, Any]) -> list[str]:
    """Return what running the model gave, as a table and a few lines."""
    lines = [f"{'logit':>10}  {'probability':>11}  {'id':>7}  after the last token"]
    lines += [
        f"{t['logit']:>10.4f}  {t['probability']:>11.4f}  {t['id']:>7}"
        + ("" if t["token"] is None else f"  {json.dumps(t['token'], ensure_ascii=False)}")
        for t in found["top"]
    ]
    reference = found.get("reference")
    if reference and "max_abs" in reference:
        text = (
            f"logits differ by {reference['max_abs']:.6g} of {reference['tolerance']:.6g} allowed"
        )
        if reference["kl"] is not None:
            text += f"; KL {reference['kl']:.3g}; same top token at {reference['top1']:.1%}"
        lines.append(text)
    peak, budget = format_size(found["peak_bytes"]), format_size(found["budget_bytes"])
    return [*lines, f"peak memory {peak} of {budget}"]


def _apart(difference: float) -> str:
    """Return the difference of two tensors; nothing of those whose values were not compared."""
    return f"{difference:.6g}" if math.isfinite(difference) else "-"


def render_verification(report: Report) -> str:
    """Return what a verification found, worst tensors first."""
    count = len(report.problems)
    lines = [f"checked  {shown(c)}" for c in report.checked]
    if report.rows:
        lines += ["", f"{'max |difference|':>16}  tensor"]
        lines += [
            f"{_apart(r['max_abs']):>16}  {shown(r['name'])}  {shown(r['what'])}"
            for r in report.rows[:_LISTED_ROWS]
        ]
        if len(report.rows) > _LISTED_ROWS:
            lines.append(f"{'…':>16}  and {len(report.rows) - _LISTED_ROWS} more")
        lines.append("")
    if report.forward is not None:
        lines += ["", *_forward(report.forward), ""]
    compared = {f"{r['name']}: {r['what']}" for r in report.rows}
    others = [p for p in report.problems if p not in compared]
    lines += [f"problem  {shown(p)}" for p in others[:_LISTED_PROBLEMS]]
    if len(others) > _LISTED_PROBLEMS:
        lines.append(f"problem  … and {len(others) - _LISTED_PROBLEMS} more")
    lines.append(
        "verified: all of it agrees" if report.passed else f"{count} problem{'s' * (count != 1)}"
    )
    return "\n".join(lines)
