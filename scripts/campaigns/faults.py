"""A disk that fails: ENOSPC and EIO at every system call, short reads and writes, a full disk.

Whatever fails, nothing is published, the exit code is the right one and no process is left; then
the same command succeeds. COUNT bounds the calls that are struck; COUNT/20 more are of ``convert``.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from scripts.campaigns import strace
from scripts.campaigns.common import (
    SMALL_FILES,
    Figures,
    Job,
    each,
    hidden,
    is_complete,
    main,
    prepare,
    run,
    scratch,
)
from scripts.campaigns.strace import PLACING, READING, WRITING, Call
from streamconv.conversion.job import run_plan
from streamconv.errors import NoSpaceError
from streamconv.options import Event, Phase, RunOptions

_OPENING = ("openat", "flock", "fadvise64", "sync_file_range", "newfstatat", "fstat", "getdents64")
# Which exit codes are right for a failure, besides 0 where it was of no consequence: EIO where
# the source is read is bad input or a failure.
_RIGHT = {"ENOSPC": {7}, "EIO": {1, 5}}
# What a plan asks for beyond its output.
_MARGIN_BYTES = 4 << 20


def campaign(work: Path, count: int, seed: int) -> Figures:
    rng = random.Random(seed)
    job = prepare(work)
    figures = Figures()
    for what, command, most in (
        ("run", ("run", job.plan), count),
        ("convert", ("convert", job.source, *SMALL_FILES), count // 20),
    ):
        points = _points(work, command) if most else []
        if most < len(points):
            points = rng.sample(points, most)
        figures.add(f"failing calls of {what}", len(points))
        figures.merge(each(points, partial(_fail_once, work, job, command)))
    figures.merge(_short_io(work, job))
    figures.merge(_full_disks(work, job, max(2, count // 10), rng))
    return figures


def _points(work: Path, command: tuple[object, ...]) -> list[tuple[Call, str]]:
    """Return every call about the folder that is worked in, with the errors that it may give."""
    with scratch(work) as folder:
        names = WRITING + PLACING + READING + _OPENING
        calls = strace.calls(*command, folder / "out", "-q", names=names, about=str(work.parent))
    points = [(call, "EIO") for call in calls]
    writing = WRITING + PLACING
    return points + [
        (call, "ENOSPC") for call in calls if call.name in writing or "O_CREAT" in call.line
    ]


def _fail_once(
    work: Path, job: Job, command: tuple[object, ...], point: tuple[Call, str]
) -> Figures:
    call, error = point
    figures = Figures()
    with scratch(work) as folder:
        out = folder / "out"
        outcome, failed = strace.struck(call, f"error={error}", *command, out, "-q")
        where = f"{command[0]}, {error} at {call}"
        if outcome.code == 0:
            figures.add("of no consequence")
            if not is_complete(out, job.expected):
                figures.breach(f"{where}: code 0 without the output")
        elif str(work.parent) not in failed:
            figures.add("struck at something else")  # a library, a pipe, /proc
        elif outcome.code in _RIGHT[error]:
            figures.add(f"refused with {outcome.code}")
            if out.exists():
                if is_complete(out, job.expected):
                    figures.add("published before it failed")
                else:
                    figures.breach(f"{where}: half an output")
            if not 1 <= len(outcome.stderr.splitlines()) <= 5 or "Traceback" in outcome.stderr:
                figures.breach(f"{where}: says {outcome.last_words!r}")
        else:
            figures.breach(f"{where}: code {outcome.code}, {outcome.last_words}")
        if outcome.orphans:
            figures.breach(f"{where}: {len(outcome.orphans)} processes outlived it")
        again = run(*command, out, "-q")
        if again.code != 0 or not is_complete(out, job.expected):
            figures.breach(f"{where}: then code {again.code}, {again.last_words}")
        if left := hidden(folder) + hidden(out):
            figures.breach(f"{where}: then {left} left")
    return figures


def _short_io(work: Path, job: Job) -> Figures:
    figures = Figures()
    module = "scripts.campaigns.short_io"
    for command in (("run", job.plan), ("convert", job.source, *SMALL_FILES)):
        with scratch(work) as folder:
            outcome = run(*command, folder / "out", "-q", module=module)
            figures.add("runs with every read and write short")
            if outcome.code != 0 or not is_complete(folder / "out", job.expected):
                figures.breach(f"short I/O, {command[0]}: {outcome.code}, {outcome.last_words}")
    return figures


def _full_disks(work: Path, job: Job, count: int, rng: random.Random) -> Figures:
    """Too small a disk from the beginning, and one that fills up on the way."""
    figures = Figures()
    needed = sum(map(len, job.expected.values()))
    for k in range(count):
        with scratch(work) as folder, _disk(folder) as resize:
            if not resize:
                figures.add("full disks not tried: mounting is not allowed here")
                return figures
            figures.add("full disks")
            out = folder / "out"
            if k % 2:
                resize(rng.randrange(1 << 16, needed + _MARGIN_BYTES))
                outcome = run("run", job.plan, out, "-q")
                code, said = outcome.code, outcome.stderr
            else:
                resize(4 * (needed + _MARGIN_BYTES))
                code, said = _run_beside_ballast(job, out, rng.randrange(needed))
            where = f"full disk {k}"
            if code != 7 or "expected: " not in said or " free" not in said:
                figures.breach(f"{where}: code {code}, {said}")
            if out.exists():
                figures.breach(f"{where}: published")
            (folder / "ballast").unlink(missing_ok=True)
            resize(4 * (needed + _MARGIN_BYTES))
            again = run("run", job.plan, out, "-q")
            if again.code != 0 or not is_complete(out, job.expected):
                figures.breach(f"{where}: then code {again.code}, {again.last_words}")
    return figures


def _run_beside_ballast(job: Job, out: Path, leave: int) -> tuple[int, str]:
    """Run the plan on a disk of which all but ``leave`` bytes get used up once it writes."""

    def fill(event: Event) -> None:
        if event == Phase("write"):
            free = os.statvfs(out.parent)
            (out.parent / "ballast").write_bytes(b"\1" * (free.f_bavail * free.f_frsize - leave))

    try:
        run_plan(job.plan, out, RunOptions(on_event=fill))
    except NoSpaceError as error:
        return error.exit_code, str(error)
    return 0, ""


@contextmanager
def _disk(folder: Path) -> Iterator[object]:
    """Mount a memory disk on ``folder``; yield how to change its size, or None where one cannot."""

    def mount(*options: str) -> bool:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", *options, "none", folder], capture_output=True
        )
        return done.returncode == 0

    if not mount("-o", "size=1m"):
        yield None
        return
    try:
        yield lambda nbytes: mount("-o", f"remount,size={nbytes}")
    finally:
        subprocess.run(["umount", folder], check=True)


if __name__ == "__main__":
    main(campaign, count=10_000)
