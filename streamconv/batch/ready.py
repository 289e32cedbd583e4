"""Whether a checkpoint is whole: nothing is converted while it is still being written.

Trainers differ in what they write last. So a checkpoint is ready when every weight file has a valid
directory at its end and

* the tracker that trainers write last (``latest_checkpointed_iteration.txt``, DeepSpeed's
  ``latest``) names this step or a later one and is not older than the files, or
* a marker that says that the step is whole lies in it and is not older than the files, or
* nothing in it has changed for the settle time.

How long that is, only we ourselves can say: the times of files are another machine's, and a clock may
be minutes ahead. So it was seen twice as it is, so far apart by a clock that nobody sets; or its times
are older than any such clock would make it.

A tracker alone proves nothing about a run that went back to an earlier step and writes over it, hence
the second half of the first rule.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from streamconv.batch.discover import Candidate
from streamconv.batch.walk import walk
from streamconv.errors import StreamconvError
from streamconv.formats.steps import MARKERS, TRACKERS, named_step, read_tracker_file
from streamconv.planning.sidefiles import candidates
from streamconv.storage.address import Address
from streamconv.units import format_duration

# By how much clocks of the machines that write and convert may differ.
CLOCK_DOUBT_SECONDS = 3600.0
# What is further ahead than that is worth a word.
_AHEAD_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint's files look like from outside: cheap to take, and to compare.

    ``digest`` covers names, sizes and times of change, ``newest_ns`` is the latest of the times,
    those of the folders included (they tell when a file came or went), ``written_ns`` the latest of
    the files alone. ``marks`` changes as well where a file is another one with the same name, size and
    time; and where it only got another link.
    """

    digest: str
    newest_ns: int
    nbytes: int
    marks: str = ""
    written_ns: int = 0


def look_at(candidate: Candidate) -> Snapshot:
    """Return how a checkpoint looks now, with what belongs to it and lies beside its folder.

    Raises ``OSError`` where it goes meanwhile.
    """
    seen = snapshot(candidate.path)
    if candidate.beside is None:
        return seen
    entries, marks = [seen.digest], [seen.marks]
    newest, written = seen.newest_ns, seen.written_ns
    for path in candidates(candidate.beside, candidate.path):
        status = path.lstat()
        newest, written = max(newest, status.st_mtime_ns), max(written, status.st_mtime_ns)
        entries.append(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}")
        marks.append(f"{path.name}\0{status.st_ctime_ns}")
    return Snapshot(_digest(entries), newest, seen.nbytes, _digest(marks), written)


def snapshot(folder: Path) -> Snapshot:
    """Return how ``folder``, or a file, looks now; raises ``OSError`` where it goes meanwhile."""
    entries: list[str] = []
    marks: list[str] = []
    if isinstance(folder, Address):
        return _snapshot_in_store(folder)
    status = folder.stat()
    newest = status.st_mtime_ns
    if not stat.S_ISDIR(status.st_mode):
        entries.append(f"{folder.name}\0{status.st_size}\0{newest}")
        marks.append(f"{folder.name}\0{status.st_ctime_ns}")
        return Snapshot(_digest(entries), newest, status.st_size, _digest(marks), newest)
    total = written = 0
    for met in walk(folder):
        status = met.status
        newest = max(newest, status.st_mtime_ns)
        if not met.is_folder:
            total += status.st_size
            written = max(written, status.st_mtime_ns)
            entries.append(f"{met.name}\0{status.st_size}\0{status.st_mtime_ns}")
            marks.append(f"{met.name}\0{status.st_ctime_ns}")
    return Snapshot(_digest(entries), newest, total, _digest(marks), written)


def _snapshot_in_store(folder: Address) -> Snapshot:
    """Do the same where times need not be believed: versions tell what is another content."""
    found = folder.bucket.below(folder.key) or {folder.name: folder.bucket.look(folder.key)}
    entries = [f"{name}\0{f.nbytes}\0{f.version}" for name, f in found.items()]
    newest = max(f.mtime_ns for f in found.values())
    total = sum(f.nbytes for f in found.values())
    return Snapshot(_digest(entries), newest, total, written_ns=newest)


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
    for name in TRACKERS:
        text, mtime_ns = read_tracker_file(run_dir / name) or ("", 0)
        step = named_step(text)
        if step is not None:
            return Tracker(step, mtime_ns)
    return None


def marked_ns(candidate: Candidate) -> int:
    """Return when a trainer marked the checkpoint, or its step, as whole; 0 where none did."""
    times = []
    for folder in (candidate.path, *candidate.path.parents):
        for name in MARKERS if folder.is_relative_to(candidate.step_dir) else ():
            with contextlib.suppress(OSError):
                times.append((folder / name).stat().st_mtime_ns)
    return max(times, default=0)


def file_clock_ns(folder: Path) -> int:
    """Return what time it is for the file system of ``folder``, or for us where that is earlier.

    The server of a network disk gives files their times; what is old by an earlier clock is old.
    """
    ours = time.time_ns()
    path = folder / f".clock.{os.getpid()}"
    try:
        path.touch()
        os.utime(path)
        theirs = path.stat().st_mtime_ns
        path.unlink(missing_ok=True)
        return min(ours, theirs)
    except OSError:
        return ours


def lies_still(newest_ns: int, settle_seconds: float, *, still_seconds: float, now_ns: int) -> bool:
    """Whether what changed last at ``newest_ns`` has lain still so long, whatever the clocks say."""
    age = (now_ns - newest_ns) / 1e9
    return still_seconds >= settle_seconds or age >= settle_seconds + CLOCK_DOUBT_SECONDS


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

    ``still_seconds`` is for how long we ourselves have seen it unchanged. ``check_whole`` raises where
    a file is not whole.
    """
    settled = lies_still(seen.newest_ns, settle_seconds, still_seconds=still_seconds, now_ns=now_ns)
    tracked = (
        tracker is not None
        and candidate.step is not None
        and candidate.step <= tracker.step
        and seen.newest_ns <= tracker.mtime_ns
    ) or seen.newest_ns <= marked_ns(candidate)
    if not settled and not tracked:
        behind = (
            tracker is not None and candidate.step is not None and candidate.step > tracker.step
        )
        why = "the tracker is not there yet" if behind else "it changed a moment ago"
        ahead = (seen.newest_ns - now_ns) / 1e9
        if ahead > _AHEAD_SECONDS:
            why = f"its files are dated {format_duration(ahead)} in the future: see both clocks"
        return Verdict(False, f"{why}; ready when unchanged for {settle_seconds:g} s")
    try:
        check_whole()
    except (StreamconvError, OSError) as error:
        what = str(error).splitlines()[0]
        if settled:
            return Verdict(True, f"not whole: {what}", settled=True)  # converting says why it fails
        return Verdict(False, f"not whole yet: {what}")
    return Verdict(True, settled=settled)
