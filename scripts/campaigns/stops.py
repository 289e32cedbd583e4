"""SIGTERM and SIGINT at random moments: the end comes within 5 s, and the same command goes on.

Half of the runs are ``convert`` as it is. The others are ``run PLAN`` on a disk that is so slow that
one system call takes a minute: a write, an fsync, a read, an open.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

from scripts.campaigns.common import (
    SMALL_FILES,
    Figures,
    Job,
    finish,
    hidden,
    is_complete,
    main,
    prepare,
    run,
    scratch,
    start,
)

_SECONDS = 5.0
_SLOW = ("pwrite", "fsync", "preadv", "open")


def campaign(work: Path, count: int, seed: int) -> Figures:
    job, rng = prepare(work), random.Random(seed)
    figures = Figures()
    whole = ("convert", job.source, *SMALL_FILES)
    with scratch(work) as folder:
        usual = run(*whole, folder / "out", "-q").seconds
    longest = 0.0
    for number in range(count):
        signum = rng.choice((signal.SIGTERM, signal.SIGINT))
        if number % 2:
            stuck = (rng.choice(_SLOW), rng.randint(1, 5))
            found, seconds = _stop(work, job, (*stuck, "run", job.plan), signum, 2 * usual / 3)
        else:
            found, seconds = _stop(work, job, whole, signum, rng.uniform(0, usual))
        figures.merge(found)
        longest = max(longest, seconds)
    figures.add("ms the longest end", round(longest * 1000))
    return figures


def _stop(
    work: Path,
    job: Job,
    command: tuple[object, ...],
    signum: signal.Signals,
    delay: float,
) -> tuple[Figures, float]:
    figures = Figures()
    stuck = command[0] in _SLOW
    what = f"{command[:2]}, {signum.name} after {delay:.2f} s"
    figures.add("stuck disks" if stuck else "random points")
    with scratch(work) as folder:
        out = folder / "out"
        module = "scripts.campaigns.slow_io" if stuck else "streamconv"
        process, mark = start(*command, out, "-q", module=module)
        time.sleep(delay)
        process.send_signal(signum)
        outcome = finish(process, mark)
        if outcome.code == 128 + signum:
            figures.add(f"ended with {128 + signum}")
        elif outcome.code == -signum:
            figures.add("ended before it was ours to handle")
        elif outcome.code == 0:
            figures.add("done before the signal")
        else:
            figures.breach(f"{what}: code {outcome.code}, {outcome.last_words}")
        if outcome.seconds > _SECONDS:
            figures.breach(f"{what}: ended after {outcome.seconds:.1f} s")
        if outcome.orphans:
            figures.breach(f"{what}: {len(outcome.orphans)} processes outlived it")
        if out.exists() and not is_complete(out, job.expected):
            figures.breach(f"{what}: half an output")
        again = run(*command[2 if stuck else 0 :], out, "-q")
        if again.code != 0 or not is_complete(out, job.expected):
            figures.breach(f"{what}: then code {again.code}, {again.last_words}")
        if left := hidden(folder) + hidden(out):
            figures.breach(f"{what}: then {left} left")
    return figures, outcome.seconds


if __name__ == "__main__":
    main(campaign, count=100)
