"""The manifest, ``streamconv.json``: which source made which model, and what every byte must hash to.

Written line by line from the plan and the journal, so that a model of any size needs no memory for
it. Deterministic but for the ``run`` block.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from streamconv._version import __version__
from streamconv.executor import FinishedFile
from streamconv.plan import Plan


def write_manifest(
    path: Path,
    plan: Plan,
    finished: Iterable[FinishedFile],
    digests: Callable[[str], Mapping[str, str]],
    side: Iterable[tuple[str, int, str]],
    run: Mapping[str, Any],
    *,
    sync: bool,
) -> None:
    """Write the manifest of a finished output.

    ``finished`` are the weight files, ``digests`` returns those of the tensors of one of them, ``side``
    are the other files as (name, bytes, xxh3_128), ``run`` the timings, budget and peak of this run.
    """
    head = plan.head
    files: list[dict[str, Any]] = [
        {"name": f.name, "nbytes": f.nbytes, "xxh3_128": f.xxh3}
        | ({"sha256": f.sha256} if f.sha256 else {})
        for f in finished
    ]
    files += [{"name": n, "nbytes": size, "xxh3_128": digest} for n, size, digest in side]
    top: dict[str, Any] = {
        "streamconv": __version__,
        "job": head.job,
        "plan_digest": plan.digest,
        "unverifiable_bytes": head.totals.unverifiable_bytes,
        "notices": list(head.notices),
        "skipped": [[s.name, s.reason] for s in head.skipped],
        "files": sorted(files, key=lambda f: str(f["name"])),
    }
    with path.open("w", encoding="utf-8") as out:
        text = json.dumps(top, indent=1, ensure_ascii=False)
        out.write(text[: text.rindex("\n}")] + ',\n "tensors": {')
        separator = "\n"
        for output, tensors in plan.sections():
            hashes = digests(output.name)
            for t in tensors:
                if t.same_as:
                    continue
                entry = {
                    "file": output.name,
                    "dtype": t.dtype.name,
                    "shape": list(t.shape),
                    "xxh3_128": hashes[t.name],
                    "sources": [s.fqn for s in t.sources],
                }
                out.write(f"{separator}  {json.dumps(t.name)}: {json.dumps(entry)}")
                separator = ",\n"
        out.write(f'\n }},\n "run": {json.dumps(dict(run))}\n}}\n')
        out.flush()
        if sync:
            os.fsync(out.fileno())
