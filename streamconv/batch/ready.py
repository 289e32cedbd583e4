"""Whether a checkpoint is whole: nothing is converted while it is still being written.

Trainers differ in what they write last. So a checkpoint is ready when every weight file has a valid
directory at its end and

* the tracker that trainers write last (``latest_checkpointed_iteration.txt``, DeepSpeed's
  ``latest``) names this step or a later one and is not older than the files, or
* nothing in it has changed for the settle time.

A tracker alone proves nothing about a run that went back to an earlier step and writes over it, hence
the second half of the first rule.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from streamconv.batch.discover import Candidate, step_number
from streamconv.errors import StreamconvError
from streamconv.sidefiles import candidates

_TRACKERS = ("latest_checkpointed_iteration.txt", "latest")
_MAX_TRACKER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint's files look like from outside: cheap to take, and to compare.

    ``digest`` covers names, sizes and times of change, ``newest_ns`` is the latest of the times,
    those of the folders included (they tell when a file came or went).
    """

    digest: str
    newest_ns: int
    nbytes: int


def look_at(candidate: Candidate) -> Snapshot:
    """Return how a checkpoint looks now, with what belongs to it and lies beside its folder.

    Raises ``OSError`` where it goes meanwhile.
    """
    seen = snapshot(candidate.path)
    if candidate.beside is None:
        return seen
    entries = [seen.digest]
    newest = seen.newest_ns
    for path in candidates(candidate.beside, candidate.path):
        status = path.lstat()
        newest = max(newest, status.st_mtime_ns)
        entries.append(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}")
    return Snapshot(_digest(entries), newest, seen.nbytes)


def snapshot(folder: Path) -> Snapshot:
    """Return how ``folder`` looks now; raises ``OSError`` where it goes meanwhile."""
    entries: list[str] = []
    newest = folder.stat().st_mtime_ns
    total = 0
    pending = [str(folder)]
    prefix = len(str(folder)) + 1
    while pending:
        with os.scandir(pending.pop()) as listing:
            for entry in listing:
                status = entry.stat(follow_symlinks=False)
                newest = max(newest, status.st_mtime_ns)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    total += status.st_size
                    entries.append(f"{entry.path[prefix:]}\0{status.st_size}\0{status.st_mtime_ns}")
    return Snapshot(_digest(entries), newest, total)


def _digest(entries: Iterable[str]) -> str:
    text = "\n".join(sorted(entries))
    return xxhash.xxh3_64_hexdigest(text.encode(errors="surrogateescape"))


@dataclass(frozen=True, slots=True)
class Tracker:
    """What a trainer's tracker file says: everything up to ``step`` was whole at ``mtime_ns``."""

    step: int
    mtime_ns: int


def read_tracker(run_dir: Path) -> Tracker | None:
    """Return what the tracker of a run says, None where there is none that can be understood."""
    for name in _TRACKERS:
        path = run_dir / name
        try:
            with path.open("rb") as stream:
                text = stream.read(_MAX_TRACKER_BYTES).decode(errors="replace").strip()
                mtime = os.fstat(stream.fileno()).st_mtime_ns
        except OSError:
            continue
        step = int(text) if text.isdecimal() else step_number(text)
        if step is not None:
            return Tracker(step, mtime)
    return None


@dataclass(frozen=True, slots=True)
class Verdict:
    """``ready``, or why not; ``settled`` says that waiting longer would change nothing."""

    ready: bool
    reason: str = ""
    settled: bool = False


def judge(
    candidate: Candidate,
    seen: Snapshot,
    tracker: Tracker | None,
    *,
    settle_seconds: float,
    still_seconds: float,
    now_ns: int,
    check_whole: Callable[[], None],
) -> Verdict:
    """Return whether the checkpoint can be converted now.

    ``still_seconds`` is for how long we ourselves have seen it unchanged: file times are another
    machine's, and its clock may be ahead. ``check_whole`` raises where a file is not.
    """
    age = (now_ns - seen.newest_ns) / 1e9
    settled = max(age, still_seconds) >= settle_seconds
    tracked = (
        tracker is not None
        and candidate.step is not None
        and candidate.step <= tracker.step
        and seen.newest_ns <= tracker.mtime_ns
    )
    if not settled and not tracked:
        behind = (
            tracker is not None and candidate.step is not None and candidate.step > tracker.step
        )
        why = "the tracker is not there yet" if behind else "it changed a moment ago"
        return Verdict(False, f"{why}; ready when unchanged for {settle_seconds:g} s")
    try:
        check_whole()
    except (StreamconvError, OSError) as error:
        what = str(error).splitlines()[0]
        if settled:
            return Verdict(True, f"not whole: {what}", settled=True)  # converting says why it fails
        return Verdict(False, f"not whole yet: {what}")
    return Verdict(True, settled=settled)
