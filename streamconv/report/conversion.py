"""The report of one conversion: from its manifest, and from the timeline where it ran just now."""

from __future__ import annotations

import math
import platform
import re
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from streamconv.errors import StreamconvError
from streamconv.files import askedfile
from streamconv.ir.dtypes import BY_NAME
from streamconv.options import Result, RunOptions, is_routine, typed_flags
from streamconv.output.manifest import read_manifest
from streamconv.report.charts import Limit, bar_chart, line_chart
from streamconv.report.page import drawn, embedded, write_page
from streamconv.report.throughput import rates
from streamconv.report.timeline import Timeline
from streamconv.units import format_size

# The number of a layer, and what stands before it: "model.layers", "visual.blocks".
_LAYER = re.compile(r"^(.*?)\.(\d+)(?:\.|$)", re.ASCII)
_MAX_GROUPS = 4
_MAX_OTHERS = 12
_PLAIN_ROWS = 2000
_PHASES = {"plan": "planning", "write": "writing", "publish": "publishing", "verify": "verifying"}


def convert_reported(
    report: Path,
    convert: Callable[[RunOptions], Result],
    run: RunOptions,
    *,
    notice_refusal: bool = False,
) -> Result:
    """Run a conversion, watch it, and write its report: to where nothing of others lies.

    ``notice_refusal``: where it cannot be written, the output is done all the same, and has a notice.
    """
    askedfile.checked(report, askedfile.PAGE)
    with Timeline() as timeline:
        result = convert(replace(run, on_event=timeline.listening(run.on_event)))
    try:
        write_report(report, result, timeline)
    except (OSError, StreamconvError) as error:
        if not notice_refusal:
            raise
        refused = StreamconvError.of_system(error) if isinstance(error, OSError) else error
        why = str(refused).replace("\n ", ";")
        notices = (*result.notices, f"its report could not be written: {why}")
        return replace(result, notices=notices)
    return result


def write_report(path: Path, result: Result, timeline: Timeline) -> None:
    """Write the page about a finished output."""
    manifest = read_manifest(result.output) or {}
    tensors = manifest.get("tensors", {})
    in_file = Counter(t["file"] for t in tensors.values())
    files = [f | {"tensors": in_file[f["name"]]} for f in manifest.get("files", ())]
    nbytes = {name: tensor_bytes(t) for name, t in tensors.items()}
    layers, others = by_layer(nbytes)
    ran = result.status == "done"
    budget = Limit(result.budget_bytes, f"budget {format_size(result.budget_bytes)}")
    phases = [(at, _PHASES.get(name, name)) for at, name in timeline.phases]
    memory = [(s.seconds, float(s.memory_bytes)) for s in timeline.samples]
    ends = [*(at for at, _ in timeline.phases[1:]), timeline.seconds]
    times = {name: end - at for (at, name), end in zip(timeline.phases, ends, strict=False)}
    facts = {
        "made_at": time.time(),
        "total_seconds": timeline.seconds,
        "planning_seconds": times.get("plan"),
        "machine": _machine(),
        "options": _chosen(manifest.get("job", {})),
        "notices": [n for n in manifest.get("notices", ()) if not is_routine(n)],
        "routine": [n for n in manifest.get("notices", ()) if is_routine(n)],
        "source_files": len(manifest.get("source_files", ())),
        "result": result,
        "manifest": manifest,
        "job": manifest.get("job", {}),
        "run": manifest.get("run", {}),
        "files": files,
        "weights_bytes": sum(nbytes.values()),
        "tensor_count": len(tensors),
        "dtypes": _by_dtype(tensors, nbytes),
        "memory_chart": drawn(
            line_chart(
                memory,
                title="memory over time",
                value_text=format_size,
                limit=budget,
                phases=phases,
            )
        )
        if ran
        else None,
        "speed_chart": drawn(
            line_chart(
                rates(timeline.samples),
                title="throughput over time",
                value_text=lambda v: f"{format_size(v)}/s",
                phases=phases,
            )
        )
        if ran
        else None,
        "layer_charts": [
            (
                prefix,
                _alike(bars),
                drawn(bar_chart(bars, title=f"size of {prefix}", value_text=format_size)),
            )
            for prefix, bars in layers
        ],
        "others": others,
        "table": embedded(table(tensors, nbytes, manifest.get("source_files", ()))),
        "plain_rows": list(plain_rows(tensors, nbytes)),
    }
    write_page(path, "conversion.html", **facts)


def _machine() -> list[tuple[str, str]]:
    """Return where it ran, with what, and by which command."""
    versions = []
    for name in ("torch", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    rows = [
        ("host", platform.node()),
        ("python", f"{platform.python_version()}, {', '.join(versions)}"),
    ]
    if Path(sys.argv[0]).name in ("streamconv", "__main__.py"):
        rows.append(("command", shlex.join(["streamconv", *sys.argv[1:]])))
    return rows


def _chosen(job: Mapping[str, Any]) -> list[str]:
    """Return the options that differ from their defaults, as they are typed."""
    given = job.get("given") or {}
    named = [
        f"--{key.replace('_', '-')} {given[key]}"
        for key in ("model", "hf_config")
        if given.get(key)
    ]
    base = [f"--base {job['base']}"] if job.get("base") else []
    return [*typed_flags(job.get("options") or {}), *named, *base]


def _alike(bars: Sequence[tuple[str, float]]) -> str:
    """Return a line of words where all layers are of one size: then there is nothing to draw."""
    sizes = {size for _, size in bars}
    if len(sizes) > 1 or len(bars) < 2:
        return ""
    return f"{len(bars)} layers of {format_size(sizes.pop())} each"


def plain_rows(
    tensors: Mapping[str, Mapping[str, Any]], nbytes: Mapping[str, int]
) -> Iterator[tuple[str, str, str, int, str]]:
    """Yield the first tensors as (name, dtype, shape, bytes, file), for readers without scripts."""
    for name, t in islice(tensors.items(), _PLAIN_ROWS):
        yield name, t["dtype"], " × ".join(map(str, t["shape"])), nbytes[name], t["file"]


def tensor_bytes(entry: Mapping[str, Any]) -> int:
    """Return the bytes of a tensor of the manifest."""
    dtype = BY_NAME.get(entry["dtype"])
    shape: list[int] = entry["shape"]
    return math.prod(shape) * (dtype.itemsize if dtype else 0)


def by_layer(
    nbytes: Mapping[str, int],
) -> tuple[list[tuple[str, list[tuple[str, float]]]], list[tuple[str, int]]]:
    """Return the sizes of numbered layers by what they are called, and of all else by module."""
    groups: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    rest: dict[str, int] = defaultdict(int)
    for name, size in nbytes.items():
        match = _LAYER.match(name)
        if match:
            groups[match[1]][int(match[2])] += size
        else:
            rest[name.rpartition(".")[0] or name] += size
    largest = sorted(groups.items(), key=lambda g: -sum(g[1].values()))
    charts: list[tuple[str, list[tuple[str, float]]]] = [
        (prefix, [(str(n), float(size)) for n, size in sorted(layers.items())])
        for prefix, layers in largest[:_MAX_GROUPS]
    ]
    for prefix, layers in largest[_MAX_GROUPS:]:
        rest[f"{prefix}.*"] += sum(layers.values())
    others = sorted(rest.items(), key=lambda item: -item[1])
    if len(others) > _MAX_OTHERS:
        more = others[_MAX_OTHERS - 1 :]
        others = others[: _MAX_OTHERS - 1]
        others.append((f"{len(more)} more", sum(size for _, size in more)))
    return charts, others


def _by_dtype(
    tensors: Mapping[str, Mapping[str, Any]], nbytes: Mapping[str, int]
) -> list[dict[str, Any]]:
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, entry in tensors.items():
        totals[entry["dtype"]][0] += 1
        totals[entry["dtype"]][1] += nbytes[name]
    whole = sum(size for _, size in totals.values()) or 1
    return [
        {"name": name, "tensors": count, "nbytes": size, "share": size / whole}
        for name, (count, size) in sorted(totals.items(), key=lambda item: -item[1][1])
    ]


def table(
    tensors: Mapping[str, Mapping[str, Any]],
    nbytes: Mapping[str, int],
    source_files: Sequence[str] = (),
) -> dict[str, list[Any]]:
    """Return the tensors as rows for the script of the page, repeated words said once.

    A row is (name, dtype, shape, bytes, file, hash, sources, rank files, shards); dtype and file are
    places in their lists, sources are 0 where the only one has the tensor's own name, and rank files
    are ranges of the list of source files.
    """
    dtypes: dict[str, int] = {}
    files: dict[str, int] = {}
    rows = []
    for name, t in tensors.items():
        sources = t["sources"]
        rows.append(
            [
                name,
                dtypes.setdefault(t["dtype"], len(dtypes)),
                t["shape"],
                nbytes[name],
                files.setdefault(t["file"], len(files)),
                t["xxh3_128"],
                0 if sources == [name] else sources,
                t.get("source_files", ""),
                t.get("shards", 0),
            ]
        )
    return {
        "dtypes": list(dtypes),
        "files": list(files),
        "source_files": list(source_files),
        "rows": rows,
    }
