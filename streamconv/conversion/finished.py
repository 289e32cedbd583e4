"""Whether an output folder is the finished output of a job: what it says of itself, and proofs of it.

A run of this user seals what it publishes, with the hashes of its files: a look at their times is
enough, and what is newer than the manifest is read. An output that says to be this job's without that
seal may be another user's, or an older release's, or a stranger's who knew what would be asked for: it
is held against the source before it is taken for done.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from streamconv.errors import OutputExistsError, StreamconvError
from streamconv.files.durable import hash_file
from streamconv.files.names import MANIFEST
from streamconv.ir.planfile import Plan
from streamconv.options import Notice, Phase, Result, RunOptions
from streamconv.output.former import some
from streamconv.output.manifest import is_ours, read_manifest


def finished_output(dst: Path, digest: str) -> dict[str, Any] | None:
    """Return the manifest of ``dst`` where it says to be the whole output of the job, else None."""
    try:
        manifest = read_manifest(dst, entries=False)
    except StreamconvError:
        return None  # a damaged output is not whole
    if manifest is None:
        return None
    same = manifest["job"]["digest"] == digest
    return manifest if same and not missing_files(dst, manifest) else None


def nothing_to_do(dst: Path, manifest: Mapping[str, Any]) -> Result:
    """Return the result of converting into ``dst``, whose whole output ``manifest`` is of already."""
    files = manifest["files"]
    return Result(
        "nothing-to-do",
        dst,
        write_bytes=sum(f["nbytes"] for f in files),
        files=len(files),
        tensors=len(manifest["tensors"]),
    )


def missing_files(dst: Path, manifest: dict[str, Any]) -> list[str]:
    """Return which files of an output are not there, or of another size, and what is there."""
    found = []
    for file in manifest["files"]:
        path, size = dst / file["name"], file["nbytes"]
        if not path.is_file():
            found.append(f"{file['name']} is missing")
        elif path.stat().st_size != size:
            found.append(f"{file['name']} has {path.stat().st_size} bytes in place of {size}")
    return found


def _changed_since(dst: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Yield the files that are not as they were written: what is older than the manifest is."""
    written_ns = (dst / MANIFEST).stat().st_mtime_ns
    for file in manifest["files"]:
        path = dst / file["name"]
        if path.stat().st_mtime_ns > written_ns and hash_file(path) != file["xxh3_128"]:
            yield file["name"]


def proven_output(
    dst: Path,
    digest: str,
    run: RunOptions,
    budget: int,
    plan_at: Callable[[Path], Plan],
) -> dict[str, Any] | None:
    """Return the manifest of ``dst`` where it is the whole output of the job; None otherwise.

    Without this user's seal it is compared with the source, as the plan says that ``plan_at`` makes at
    a path. Raises :class:`OutputExistsError` where it differs, unless it is to be replaced, and where
    it was changed since this user's run wrote it.
    """
    manifest = finished_output(dst, digest)
    if manifest is None:
        return None
    if is_ours(manifest):
        changed = [*_changed_since(dst, manifest)]
        if not changed:
            return manifest
        raise OutputExistsError(
            "files of the output folder were changed since they were written",
            where=str(dst),
            found=some(changed),
            hint="move that away, or choose another folder",
        )
    from streamconv.verification.by_plan import plan_problems

    with tempfile.TemporaryDirectory(prefix="streamconv-") as scratch:
        plan = plan_at(Path(scratch) / "plan.jsonl")
        run.on_event(Phase("compare"))
        problems = plan_problems(dst, plan, budget, source_crc=run.source_crc)
        plan.close()
    if not problems:
        text = f"nothing shows that a run of this user wrote {dst}: every byte was compared, and agrees"
        run.on_event(Notice(text))
        return manifest
    if run.overwrite:
        return None
    raise OutputExistsError(
        "the output folder says to be this job's output, is not what the source gives, and nothing "
        "shows that a run of this user wrote it",
        where=str(dst),
        found=some(problems),
        hint="look at it; then move it away, or replace it with --overwrite",
    )
