"""The manifest, ``streamconv.json``: which source made which model, and what every byte must hash to.

Written line by line from the plan and the journal, so that a model of any size needs no memory for
it. Deterministic but for the ``run`` block. Whoever reads one finds it whole, of the right types, and
with names that stay in the folder, or gets an error: an output may come from a stranger.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from streamconv._version import __version__
from streamconv.errors import BadInputError
from streamconv.files.jsonfile import (
    COUNT,
    FLAG,
    NUMBER,
    TEXT,
    Leaf,
    mismatches,
    read_json,
    unique_keys,
)
from streamconv.files.names import MANIFEST, is_output_name, is_path
from streamconv.files.userkey import Sealer, same_seal, user_key
from streamconv.ir.finished import FinishedFile
from streamconv.ir.planfile import Plan

# A million tensors; whoever needs less memory than that checks the file's size before.
MAX_MANIFEST_BYTES = 256 << 20

_AVERAGE = {"sources": [TEXT], "weights": [NUMBER], "divisor": NUMBER}
_PATH = Leaf("a path", is_path)
_NAME = Leaf("the name of a file in this folder", is_output_name)
_XXH3 = Leaf("an xxh3_128", lambda v: _is_hex(v, 32))
_SHAPE: dict[str, Any] = {
    "streamconv": TEXT,
    "job": {
        "format": TEXT,
        "options": {
            "layout": TEXT,
            "dtype": TEXT,
            "keep_dtype": [TEXT],
            "max_shard_bytes": COUNT,
            "strict": FLAG,
            "family?": TEXT.or_null(),
            "lora?": {
                "mode?": TEXT,
                "base?": _PATH.or_null(),
                "alpha?": NUMBER.or_null(),
                "rank?": COUNT.or_null(),
                "rslora?": FLAG,
                "allow_zero?": FLAG,
            },
            "value_head?": TEXT,
            "masters?": TEXT,
            "quantize?": TEXT.or_null(),
            "average?": Leaf("what is averaged", lambda v: v is None or _is_average(v)),
        },
        "source": [(TEXT, COUNT, TEXT)],
        "side": [(_NAME, _XXH3)],
        "given?": {"hf_config?": _PATH.or_null(), "model?": TEXT.or_null()},
        "base?": _PATH.or_null(),
        "others?": [_PATH],
        "digest": _XXH3,
    },
    "plan_digest": TEXT,
    "unverifiable_bytes": COUNT,
    "notices": [TEXT],
    "skipped": [(TEXT, TEXT)],
    "files": [
        {
            "name": _NAME,
            "nbytes": COUNT,
            "xxh3_128": _XXH3,
            "sha256?": Leaf("a sha256", lambda v: _is_hex(v, 64)),
        }
    ],
    "tensors": {
        str: {
            "file": _NAME,
            "dtype": TEXT,
            "shape": [COUNT],
            "xxh3_128": _XXH3,
            "sources": [TEXT],
            "source_files?": TEXT,
            "shards?": COUNT,
        }
    },
    "source_files?": [TEXT],
    "run?": {
        "seconds?": NUMBER,
        "peak_bytes?": COUNT,
        "budget_bytes?": COUNT,
        "read_bytes?": COUNT,
        "source?": TEXT,
        "seal?": TEXT,
    },
}


_ENTRY = {key for key in _SHAPE["tensors"][str] if not key.endswith("?")}
_SHAPE_WITHOUT_ENTRIES = _SHAPE | {"tensors": {str: Leaf("an entry", lambda v: v is None)}}


def _without_entries(pairs: list[tuple[str, Any]]) -> dict[str, Any] | None:
    found = unique_keys(pairs)
    return None if found.keys() >= _ENTRY else found


def _is_average(value: Any) -> bool:
    return next(mismatches(value, _AVERAGE), None) is None


def _is_hex(value: Any, length: int) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", value) is not None


def read_manifest(folder: Path, *, entries: bool = True) -> dict[str, Any] | None:
    """Return the manifest of a finished output folder, None where there is none.

    Without ``entries`` it lists the names of the tensors with nothing about them: what there is about
    those of a large model would take more memory than the smallest budget. Every key that
    :func:`write_manifest` writes is there with its type, all names of files are those of files in the
    folder, each listed once. Raises :class:`BadInputError` where that is not so, and
    :class:`UnsafeInputError` for a monstrous file.
    """
    path = folder / MANIFEST
    if not (path.is_symlink() or path.exists()):
        return None
    try:
        manifest: dict[str, Any] = read_json(
            path, most_bytes=MAX_MANIFEST_BYTES, make=unique_keys if entries else _without_entries
        )
    except OSError as error:
        raise BadInputError(
            "the manifest cannot be read", where=str(path), found=str(error)
        ) from error
    wrong = next(mismatches(manifest, _SHAPE if entries else _SHAPE_WITHOUT_ENTRIES), None)
    if wrong is None:
        count = Counter(f["name"] for f in manifest["files"])
        wrong = next((f"files: {n} is listed twice" for n, k in count.items() if k > 1), None)
    if wrong is not None:
        raise BadInputError(
            "the manifest is not one that streamconv writes",
            where=str(path),
            found=wrong,
            hint="the folder is damaged or was changed: convert the checkpoint again",
        )
    return manifest


def is_ours(manifest: Mapping[str, Any]) -> bool:
    """Whether a run of this user wrote the manifest: its job and the hashes of its files.

    Neither another user nor another machine has the key, nor this one where it was lost.
    """
    seal = manifest.get("run", {}).get("seal", "")
    return same_seal(seal, _seal(manifest["job"]["digest"], manifest["files"]))


def _seal(job_digest: str, files: Iterable[Mapping[str, Any]]) -> str:
    """Return what proves who wrote an output; its place takes no part, as it may be moved."""
    rows = json.dumps([[f["name"], f["nbytes"], f["xxh3_128"]] for f in files])
    # Of any release: an output outlives the one that wrote it.
    return Sealer(user_key(), "output").seal("output", job_digest.encode(), rows.encode())


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers as ranges: ``0-3,7``. They count the manifest's ``source_files`` from 0."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


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
    are the other files as (name, bytes, xxh3_128), ``run`` the timings, budget and peak of this run,
    which are sealed with the user's key.
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
        "source_files": [f.path for f in head.files],
    }
    sealed = {**run, "seal": _seal(head.job["digest"], top["files"])}
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
                    "source_files": _ranges({file for s in t.sources for file in s.shards.files}),
                    "shards": sum(len(s.shards) for s in t.sources),
                }
                out.write(f"{separator}  {json.dumps(t.name)}: {json.dumps(entry)}")
                separator = ",\n"
        out.write(f'\n }},\n "run": {json.dumps(sealed)}\n}}\n')
        out.flush()
        if sync:
            os.fsync(out.fileno())
