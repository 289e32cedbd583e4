"""What conversions of a known model cost: ``python -m bench.again [--checkpoints N] [--finished N]``.

A checkpoint of 326 kB, so that what is counted is everything but the bytes: the first conversion, the
second, ``run``, a batch of N checkpoints of one run, and a batch that finds N of them done. CPU
seconds of the command and all its processes (getrusage), which tell something on a busy machine, too;
peaks are of the process tree. The cache and the compiled modules are the benchmark's own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.measure import conditions, measured, record, table
from scripts.measured import Ran

# The CPU seconds of `run` when it reads its first byte of a source.
_FIRST_BYTE = """
import os, resource, sys
read = os.preadv
def first(*arguments):
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(used.ru_utime + used.ru_stime, file=sys.stderr)
    os.preadv = read
    return read(*arguments)
os.preadv = first
from streamconv.__main__ import main
main()
"""


def command(*arguments: str | Path) -> Ran:
    return measured([sys.executable, "-m", "streamconv", *map(str, arguments)])


def row(what: str, aim: str, runs: Sequence[Ran]) -> tuple[str, str, str, str]:
    """Return a row of the table: the median of the CPU seconds, the range, the largest peak."""
    return (what, told([r.cpu_seconds for r in runs]), aim, peak(runs))


def told(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def peak(runs: Sequence[Ran]) -> str:
    return f"{max(r.peak_bytes for r in runs) / 1e6:.0f} MB"


def alone(folder: Path, source: Path, rounds: int) -> list[tuple[str, ...]]:
    """Measure single commands."""
    plan = folder / "plan.jsonl"
    outputs = (folder / f"out-{number}" for number in range(10**6))

    def convert(*flags: str) -> Ran:
        return command("convert", source, next(outputs), "--quiet", *flags)

    anew = [convert("--no-cache") for _ in range(rounds)]
    first = [convert()]
    again = [convert() for _ in range(rounds)]
    command("plan", source, "-o", plan)
    run = [command("run", plan, next(outputs), "--quiet") for _ in range(rounds)]
    before = [
        float(
            measured(
                [sys.executable, "-c", _FIRST_BYTE, "run", str(plan), str(next(outputs)), "--quiet"]
            ).err.split()[0]
        )
        for _ in range(rounds)
    ]
    start = [command("--help") for _ in range(rounds)]
    return [
        row("`convert --no-cache`", "2.6", anew),
        row("`convert`, first time", "2.6", first),
        row("`convert`, again", "0.5, 64 MB", again),
        row("`run PLAN`", "", run),
        ("… before its first byte", told(before), "0.15", ""),
        row("`--help`", "0.15", start),
    ]


def batches(folder: Path, step: Path, checkpoints: int, finished: int) -> list[tuple[str, ...]]:
    """Measure a batch of as many ``checkpoints``, and one that finds as many ``finished``."""
    run, models = folder / "run", folder / "models"

    def add(first: int, last: int) -> None:
        for number in range(first, last + 1):
            shutil.copytree(step, run / f"global_step_{number}", copy_function=os.link)

    def batch() -> Ran:
        return command("batch", run, models, "--settle", "0s", "--quiet")

    add(1, checkpoints)
    made = batch()
    add(checkpoints + 1, finished)
    (done,) = (models / "global_step_1").rglob("streamconv.json")
    for number in range(checkpoints + 1, finished + 1):
        output = (
            models / f"global_step_{number}" / done.parent.relative_to(models / "global_step_1")
        )
        shutil.copytree(done.parent, output)
    lost, known = batch(), batch()
    each = made.cpu_seconds / checkpoints
    return [
        (f"a checkpoint, in a batch of {checkpoints}", f"{each:.2f}", "0.4", peak([made])),
        row(f"a batch that finds {finished:,} done, of most without a record", "", [lost]),
        row(f"a batch that finds {finished:,} done", "seconds", [known]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=100)
    parser.add_argument("--finished", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="streamconv-bench-", dir=options.work) as name:
        folder = Path(name)
        os.environ["STREAMCONV_CACHE"] = str(folder / "cache")
        os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")
        os.environ["PYTHONDONTWRITEBYTECODE"] = ""
        made = folder / "made"
        subprocess.run(
            [sys.executable, "scripts/make_small_checkpoint.py", "--out", str(made)],
            check=True,
            capture_output=True,
        )
        (step,) = made.glob("global_step_*")
        command("plan", step, "--no-cache")  # compiles what is to be loaded
        rows = alone(folder, step / "actor", options.rounds)
        rows += batches(folder, step, options.checkpoints, options.finished)
    head = ("command", "CPU s", "aim", "peak of the tree")
    text = f"{conditions()}. Medians (and ranges) of {options.rounds}.\n\n{table(head, rows)}"
    record("again", text)


if __name__ == "__main__":
    main()
