"""Models that no test machine has room for: ``python -m bench.scale [--only "in 64"] [--work DIR]``.

Rank files are sparse (see :mod:`bench.sparse`); the output goes to a btrfs with compression in a
file, mounted in a mount namespace of this process, so that 141 GB take a few. Each model is planned
(``streamconv plan -o``), the plan is run in 64 MB, sentinels are looked for, and the models in 8
files are also converted in one command in 450 MB. 671B is planned whole and run for some minutes.
Needs root, util-linux and btrfs-progs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.measure import conditions, record, streamconv, table
from bench.sparse import SparseMade, make_sparse, wrong_sentinels

_MOUNTED = "STREAMCONV_BENCH_MOUNTED"
_PART_SECONDS = 180


@dataclass(frozen=True, slots=True)
class Case:
    """A model and its rank files; whether its plan is run to the end, and whether it is converted."""

    model: str
    world: int
    whole: bool = True
    converted: bool = True

    @property
    def name(self) -> str:
        return f"{self.model} in {self.world} files"


CASES = (
    Case("1B", 8),
    Case("8B", 8),
    Case("70B", 8),
    Case("70B", 64, converted=False),
    Case("671B", 256, whole=False, converted=False),
)


def mount(work: Path) -> Path:
    """Return a folder on a compressing file system of its own."""
    image, folder = work / "btrfs.img", work / "out"
    with image.open("wb") as stream:
        stream.truncate(2 << 40)
    folder.mkdir()
    subprocess.run(["mkfs.btrfs", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop,compress-force=zstd:1,noatime", image, folder], check=True)
    return folder


def part(plan: Path, target: Path) -> tuple[int, float]:
    """Run a plan for a while and stop it; return its peak and the bytes of output it came to."""
    run = streamconv("run", plan, target, "--max-mem", "64MB", seconds=_PART_SECONDS)
    if run.code != 128 + signal.SIGTERM:
        sys.exit(f"the run was not at work when it was to be stopped: exit {run.code}")
    events = [json.loads(line) for line in run.out.splitlines()]
    done = max((e.get("done_bytes", 0) for e in events), default=0)
    return run.peak_bytes, done


def checked(output: Path, made: SparseMade) -> str:
    wrong = wrong_sentinels(output, made)
    if wrong:
        sys.exit(f"sentinels are wrong: {wrong[:5]}")
    return f"{len(made.sentinels)} sentinels right"


def measure(case: Case, work: Path, out: Path) -> list[object]:
    """Return one row of the table."""
    source, plan = work / "source", work / "plan.jsonl"
    made = make_sparse(source, case.model, case.world)
    try:
        planning = streamconv("plan", made.source, "-o", plan)
        row: list[object] = [
            case.name,
            f"{made.nbytes / 1e9:.1f} GB, {made.tensors}",
            f"{planning.seconds:.1f} s, {planning.peak_bytes / 1e6:.0f} MB",
            f"{plan.stat().st_size / 1e6:.1f} MB",
        ]
        if not case.whole:
            peak, done = part(plan, out / "model")
            return [
                *row,
                f"stopped after {_PART_SECONDS} s at {done / 1e9:.0f} GB, {peak / 1e6:.1f} MB",
                "-",
                "-",
            ]
        run = streamconv("run", plan, out / "model", "--max-mem", "64MB")
        unverifiable = run.last["unverifiable_bytes"]
        right = checked(out / "model", made)
        shutil.rmtree(out / "model")
        converted = "-"
        if case.converted:
            whole = streamconv(made.source, out / "model", "--max-mem", "450MB")
            checked(out / "model", made)
            converted = f"{whole.seconds:.1f} s, {whole.peak_bytes / 1e6:.0f} MB"
        return [
            *row,
            f"{run.seconds:.1f} s, {run.peak_bytes / 1e6:.1f} MB",
            converted,
            f"{right}, {unverifiable / 1e9:.1f} GB unverifiable",
        ]
    finally:
        shutil.rmtree(source)
        shutil.rmtree(out / "model", ignore_errors=True)
        for left in out.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)


def main() -> None:
    if _MOUNTED not in os.environ:
        os.environ[_MOUNTED] = "1"
        os.execvp("unshare", ["unshare", "-m", sys.executable, "-m", "bench.scale", *sys.argv[1:]])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--only", default="", help="part of a row's name; nothing is recorded")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="streamconv-scale-", dir=options.work))
    try:
        out = mount(work)
        rows = []
        for case in CASES:
            if options.only in case.name:
                rows.append(measure(case, work, out))
                print(*rows[-1], sep=" | ", flush=True)
        subprocess.run(["umount", out], check=True)
    finally:
        subprocess.run(["umount", "-q", "-l", work / "out"], check=False)
        shutil.rmtree(work, ignore_errors=True)
    head = (
        "model",
        "bytes, tensors",
        "plan: time, peak",
        "plan's size",
        "run in 64 MB: time, peak",
        "convert in 450 MB: time, peak",
        "checked",
    )
    if not options.only:
        record("scale", f"{conditions()}.\n\n{table(head, rows)}")


if __name__ == "__main__":
    main()
