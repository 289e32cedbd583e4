"""Two runs on one output: one wins, the other is told that it is locked, or finds the work done."""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path

from scripts.campaigns.common import (
    Figures,
    Job,
    finish,
    hidden,
    is_complete,
    main,
    prepare,
    scratch,
    start,
)


def campaign(work: Path, count: int, seed: int) -> Figures:
    job, rng = prepare(work), random.Random(seed)
    figures = Figures()
    for number in range(count):  # one after the other: each has two processes already
        figures.merge(_race(work, job, number, rng.choice((0.0, 0.0, rng.uniform(0, 0.15)))))
    return figures


def _race(work: Path, job: Job, number: int, lead: float) -> Figures:
    figures = Figures()
    figures.add("races")
    with scratch(work) as folder:
        out = folder / "out"
        begin = partial(start, "run", job.plan, out, "-q")
        one = begin()
        time.sleep(lead)
        ends = [finish(*p) for p in (one, begin())]
        codes = sorted(e.code if e.code is not None else -1 for e in ends)
        if codes == [0, 11]:
            figures.add("one won, the other was told 11")
        elif codes == [0, 0]:
            figures.add("the later one found it done")
        else:
            figures.breach(f"race {number}: {codes}, {[e.last_words for e in ends]}")
        if not is_complete(out, job.expected) or hidden(folder) or hidden(out):
            figures.breach(f"race {number}: left {hidden(folder)}, or no whole output")
    return figures


if __name__ == "__main__":
    main(campaign, count=200)
