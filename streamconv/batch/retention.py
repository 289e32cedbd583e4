"""Which outputs are kept, and the careful removal of the others.

Nothing is removed unless asked to apply; an output only where its folder holds what its manifest
lists and nothing else; a source only after its output was verified against it and while that output
is there unchanged, and never the newest whole step of a run, from which training goes on.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from streamconv.batch.discover import Candidate
from streamconv.batch.places import output_inside
from streamconv.batch.ready import Snapshot, look_at, read_tracker
from streamconv.batch.state import Record, Store, file_name, is_intact
from streamconv.errors import LockedError, StreamconvError
from streamconv.manifest import read_manifest
from streamconv.planned import MANIFEST
from streamconv.sizes import format_size

_TRASH = "trash"


@dataclass(frozen=True, slots=True)
class Rule:
    """Keep the ``last`` steps and those that ``every`` divides; both None keeps everything."""

    last: int | None = None
    every: int | None = None

    @property
    def active(self) -> bool:
        """Whether anything is ever removed."""
        return self.last is not None or self.every is not None

    def kept(self, steps: Iterable[int]) -> set[int]:
        """Return the steps to keep."""
        steps = set(steps)
        if not self.active:
            return steps
        last = set(sorted(steps)[-self.last :]) if self.last else set()
        return last | ({s for s in steps if s % self.every == 0} if self.every else set())

    def surplus(self, records: Iterable[Record]) -> list[Record]:
        """Return the records that are not kept; one without a step always is."""
        groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for record in records:
            groups[record.run, record.model].append(record)
        surplus = []
        for group in groups.values():
            kept = self.kept(r.step for r in group if r.step is not None)
            surplus += [r for r in group if r.step is not None and r.step not in kept]
        return surplus


@dataclass(frozen=True, slots=True)
class Removal:
    """A folder that was removed, or would be; ``refused`` says why it must not."""

    kind: str  # "output" or "source"
    path: Path
    nbytes: int
    applied: bool = False
    refused: str = ""

    def __str__(self) -> str:
        if self.refused:
            return f"kept {self.kind} {self.path}: {self.refused}"
        did = "removed" if self.applied else "would remove"
        return f"{did} {self.kind} {self.path} ({format_size(self.nbytes)})"


def remove_output(record: Record, store: Store, *, apply: bool) -> Removal:
    """Remove a finished output, or say what would be removed."""
    path = Path(record.output)
    refused = _why_not_output(path, store.output)
    if refused or not apply:
        return Removal("output", path, record.write_bytes, refused=refused)
    try:
        with store.holding(record.name):
            _remove(path, store.folder / _TRASH / file_name(record.name))
            for parent in path.parents:
                if parent == store.output:
                    break
                with contextlib.suppress(OSError):  # not empty: another's
                    parent.rmdir()
            record.state, record.reason, record.evidence = "pruned", "removed by retention", []
            store.save(record)
    except LockedError as error:
        return Removal("output", path, record.write_bytes, refused=error.what)
    return Removal("output", path, record.write_bytes, applied=True)


def _why_not_output(path: Path, root: Path) -> str:
    if path.is_symlink() or not path.is_dir():
        return "it is no folder"
    if not path.resolve().is_relative_to(root.resolve()) or path.resolve() == root.resolve():
        return "it lies outside the output folder"
    try:
        manifest = read_manifest(path)
    except StreamconvError as error:
        return error.what
    if manifest is None:
        return "it has no manifest of ours"
    listed = {MANIFEST, *(f["name"] for f in manifest["files"])}
    there = (
        p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_symlink() or not p.is_dir()
    )
    strange = [name for name in there if name not in listed]
    return f"it holds what its manifest does not list: {strange[0]}" if strange else ""


def remove_source(
    record: Record, store: Store, candidate: Candidate, newest: int, *, apply: bool
) -> Removal:
    """Remove the source of a verified output, or say what would be removed.

    ``newest`` is the highest step of the run that was converted.
    """
    path = candidate.path
    try:
        with store.holding(record.name):
            now = look_at(candidate)
            refused = _why_not_source(store.reload(record.name), candidate, newest, now)
            if apply and not refused:
                _remove(path, _aside(path))
    except LockedError as error:
        return Removal("source", path, 0, refused=error.what)
    except OSError as error:
        return Removal("source", path, 0, refused=str(error.strerror))
    return Removal("source", path, now.nbytes, applied=apply and not refused, refused=refused)


def _why_not_source(record: Record, candidate: Candidate, newest: int, now: Snapshot) -> str:
    tracker = read_tracker(candidate.run_dir)
    if candidate.step is None or candidate.relative == Path():
        return "it is no step of a run"
    if candidate.step >= newest or (tracker is not None and candidate.step == tracker.step):
        return "training goes on from it"
    if record.state != "done" or record.verified is not True:
        return "its output has not been verified against it (--verify)"
    if not is_intact(record):
        return "its output is not as it was when it was verified"
    if now.digest != record.snapshot:
        return "it changed since it was converted"
    output = output_inside(candidate.path)
    return f"an output lies in it: {output}" if output is not None else ""


def finish_removals(store: Store) -> None:
    """Remove what a batch that was killed had put aside to remove."""
    asides = [_aside(Path(r.source)) for r in store if r.state == "done"]
    for path in (store.folder / _TRASH, *asides):
        shutil.rmtree(path, ignore_errors=True)


def _aside(source: Path) -> Path:
    return source.with_name(f".{source.name}.streamconv-deleted")


def _remove(path: Path, aside: Path) -> None:
    """Remove a folder whole: no reader ever sees a part of it under its name."""
    aside.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)  # another batch may be finishing it
