"""A part that is believed dead, and comes back: what others have finished meanwhile stays as it is.

``part DST --part 1/1`` stops (SIGSTOP) at each of its writes, fsyncs, renames and removals in turn;
another one writes the part, ``finish`` publishes, and then the first one goes on where it was. So, too,
where ``finish`` itself is at work: it is stopped at each of its calls, a part runs, and it goes on.
COUNT bounds how many calls of each are struck, chosen at random.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil

from scripts.campaigns import strace
from scripts.campaigns.common import (
    Figures,
    Job,
    Outcome,
    each,
    finish,
    hidden,
    is_complete,
    main,
    prepare,
    run,
    scratch,
    start,
)
from scripts.campaigns.strace import Call

_WAIT_SECONDS = 60.0
_UNTOUCHED = (0, 2, 5)  # it was done, or says that what it was writing is gone


def campaign(work: Path, count: int, seed: int) -> Figures:
    rng = random.Random(seed)
    job = prepare(work)
    figures = Figures()
    for what, at_end in (("parts", False), ("finishes", True)):
        points = _points(work, job, at_end=at_end)
        if count < len(points):
            points = rng.sample(points, count)
        figures.merge(each(points, partial(_late, work, job, what, at_end)))
    return figures


def _part(out: Path) -> tuple[object, ...]:
    return ("part", out, "--part", "1/1", "--quiet")


def _command(out: Path, *, at_end: bool) -> tuple[object, ...]:
    return ("finish", out, "--quiet") if at_end else _part(out)


def _set_up(job: Job, out: Path, *, at_end: bool) -> None:
    commands: list[tuple[object, ...]] = [("begin", job.plan, out, "--quiet")]
    if at_end:
        commands.append(_part(out))
    for command in commands:
        done = run(*command)
        if done.code != 0:
            raise RuntimeError(f"{command[0]} fails undisturbed: {done.last_words}")


def _points(work: Path, job: Job, *, at_end: bool) -> list[Call]:
    with scratch(work) as folder:
        out = folder / "out"
        _set_up(job, out, at_end=at_end)
        names = strace.WRITING + strace.PLACING
        return strace.calls(*_command(out, at_end=at_end), names=names, about=folder.name)


def _late(work: Path, job: Job, what: str, at_end: bool, call: Call) -> Figures:
    figures, where = Figures(), f"{what}, {call}"
    with scratch(work) as folder:
        out = folder / "out"
        _set_up(job, out, at_end=at_end)
        outcome, others, stopped = _meanwhile(
            _command(out, at_end=at_end), call, out, at_end=at_end
        )
        figures.add(f"{what} stopped", stopped)
        for other in others:
            if other.code != 0:
                figures.breach(f"{where}: another: {other.code}, {other.last_words}")
        if outcome.code not in _UNTOUCHED or (at_end and outcome.code != 0):
            figures.breach(f"{where}: exit {outcome.code}, {outcome.last_words}")
        if not is_complete(out, job.expected):
            figures.breach(f"{where}: not the output")
        again = run("finish", out, "--quiet")
        if again.code != 0 or not is_complete(out, job.expected):
            figures.breach(f"{where}: finish again: {again.code}, {again.last_words}")
        if left := hidden(folder) + hidden(out):
            figures.breach(f"{where}: {left} left")
    return figures


def _meanwhile(
    command: tuple[object, ...], call: Call, out: Path, *, at_end: bool
) -> tuple[Outcome, list[Outcome], bool]:
    """Stop a command at a call; return its end, those of the others, and whether it stopped."""
    with tempfile.TemporaryDirectory() as logs:
        inject = f"inject={call.name}:signal=SIGSTOP:when={call.ordinal}"
        options = ("-f", "-q", "-o", f"{logs}/log", "-e", f"trace={call.name}", "-e", inject)
        process, mark = start(*command, wrap=("strace", *options))
        log, deadline = Path(logs) / "log", time.monotonic() + _WAIT_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and "stopped by SIGSTOP" in log.read_text(errors="replace"):
                break
            time.sleep(0.02)
        stopped = process.poll() is None
        others = []
        if stopped:
            others.append(run(*_part(out)))
            if not at_end:  # a finish that is stopped has the lock
                others.append(run("finish", out, "--quiet"))
            for child in psutil.Process(process.pid).children(recursive=True):
                os.kill(child.pid, signal.SIGCONT)
        elif not at_end:
            others.append(run("finish", out, "--quiet"))
        return finish(process, mark), others, stopped


if __name__ == "__main__":
    main(campaign, count=1000)
