"""The identity of a job: which source, which options. Equal identities make equal outputs.

A job's digest is cheap to take (the ends of the rank files, the side files), so that a rerun of a
finished job is recognized without planning it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xxhash

from streamconv.options import JobOptions
from streamconv.plan import SCHEMA
from streamconv.planned import SideFile
from streamconv.source import SourceFile

_DEFAULTS = JobOptions().to_json()


def chosen_options(options: JobOptions) -> dict[str, Any]:
    """Return the options that differ from the defaults, without the paths among them.

    Only these are hashed: a release that adds an option must not turn every output that is there
    into another job's. One that changes a default must raise ``SCHEMA``.
    """
    return {k: v for k, v in _without_paths(options).items() if v != _DEFAULTS[k]}


def _without_paths(options: JobOptions) -> dict[str, Any]:
    given = options.to_json()
    # What lies there takes part as one of the inputs.
    given["lora"]["base"] = None
    return {k: v for k, v in given.items() if k not in ("hf_config", "model")}


def identified(file: SourceFile) -> list[str | int]:
    """Return what identifies a file of the source: name, size, and what stands for its bytes."""
    return [file.path, file.nbytes, " ".join(filter(None, (file.directory_hash, file.evidence)))]


def why_another(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words in what two jobs differ, as far as a user can tell from it what to do."""
    other = "another job's"
    if any(before.get(k) != now.get(k) for k in ("schema", "format", "options", "side")):
        return other
    files = [[*j.get("source", ()), *j.get("inputs", ())] for j in (before, now)]
    if [f[:-1] for f in files[0]] != [f[:-1] for f in files[1]]:
        return other
    anew = [(old[-1], new[-1]) for old, new in zip(*files, strict=True) if old != new]
    if all(str(old).partition(" ")[0] == str(new).partition(" ")[0] for old, new in anew):
        # Then it is the evidence that differs.
        return (
            "of these files before they were written anew, or copied without their times (nothing in "
            f"{len(anew)} of them is a checksum of the weights, so times and samples count)"
        )
    return "of this checkpoint before its files were written anew"


def job_identity(
    format_name: str,
    files: Iterable[SourceFile],
    side: Iterable[SideFile],
    options: JobOptions,
    inputs: Iterable[Sequence[str | int]] = (),
) -> dict[str, Any]:
    """Return what makes a job this job, with its ``digest``.

    ``inputs`` are what else takes part, each with what identifies it (``lora_plan.adapter_inputs``).
    Paths are relative, so that a checkpoint that was moved is still the same. Where the central
    directory's hash covers every record's CRC-32, times are left out; elsewhere a file's evidence tells
    whether it was written anew. ``given`` is no part of the digest: where the config came from and
    which model was picked, for whoever plans it again.
    """
    identity: dict[str, Any] = {
        "schema": SCHEMA,
        "format": format_name,
        "options": _without_paths(options),
        "source": [identified(f) for f in files],
        "side": [[s.name, s.xxh3] for s in side],
    }
    if more := [list(i) for i in inputs]:
        identity["inputs"] = more
    hashed = {**identity, "options": chosen_options(options)}
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    given = {
        "hf_config": str(options.hf_config.absolute()) if options.hf_config else None,
        "model": options.model,
    }
    return {**identity, "given": given, "digest": xxhash.xxh3_128_hexdigest(text.encode())}
