"""Speed beside ``cat``: ``python -m bench.speed [--bytes N] [--rounds N] [--work DIR] [--only NAME]``.

Makes float32 checkpoints of real DTensors, and for each kind of work in turn runs ``cat`` of the same
rank files into one file, streamconv in 64 MB, and ``cat`` again; the ratio of speeds is taken within
a round. Warm: sources cached, ``--no-sync``. Cold: sources dropped, output durable for both. Then the
whole command, ``streamconv SRC DST`` in 500 MB: what it takes beside its executing part.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import cat, conditions, own_memory, ready, record, streamconv, table
from scripts.makers.large import LargeMade, make_large


@dataclass(frozen=True, slots=True)
class Work:
    """One row of the table. ``warm`` and ``cold`` are the ratios aimed at, if any."""

    name: str
    cut: str
    warm: float | None
    cold: float | None
    plan: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    experts: int = 0


WORKS = (
    Work("same dtype, dim 0", "rows", 0.95, 1.1),
    Work("same dtype, dim 0, `--direct`", "rows", None, None, run=("--direct",)),
    Work("float32 to bfloat16", "rows", 0.95, 1.1, plan=("--dtype", "bfloat16")),
    Work("float32 to float16", "rows", 0.5, 0.9, plan=("--dtype", "float16")),
    Work("`--checksum sha256`", "rows", 0.35, 0.75, run=("--checksum", "sha256")),
    Work("dim 1", "columns", 0.75, 1.0),
    Work("fsdp × tp, dims 0 and 1", "grid", 0.75, 1.0),
    Work("fused experts to Hub names", "rows", 0.9, 1.0, experts=16),
)

HEAD = (
    "work",
    "warm, `--no-sync`",
    "cold, durable",
    "start and planning, aim 3 s",
    "peak of the tree",
)


def ratio(
    files: Sequence[Path], plan: Path, folder: Path, flags: Sequence[str], *, cold: bool
) -> tuple[float, int]:
    """Return the ratio of one round, and the peak; ``flags`` are those of ``run``."""
    before = cat(files, folder / "cat", cold=cold)
    ready(files, cold=cold)
    sync = () if cold else ("--no-sync",)
    ours = streamconv("run", plan, folder / "out", *flags, *sync)
    shutil.rmtree(folder / "out")
    after = cat(files, folder / "cat", cold=cold)
    return (before + after) / 2 / ours.last["seconds"], ours.peak_bytes


def beside(source: Path, folder: Path, flags: Sequence[str]) -> float:
    """Return the seconds that starting and planning add to the executing part."""
    ready(source.glob("*.pt"), cold=False)
    whole = streamconv(source, folder / "out", "--max-mem", "500MB", "--no-sync", *flags)
    shutil.rmtree(folder / "out")
    return whole.seconds - whole.last["seconds"]


def told(rounds: Sequence[tuple[float, int]], aim: float | None) -> str:
    """Return the median and the range of the ratios of some rounds, beside the aim, if any."""
    ratios = [r for r, _ in rounds]
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    text = f"{median:.2f} ({low:.2f} to {high:.2f})"
    return text if aim is None else f"{text}, aim {aim}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=lambda t: int(float(t)), default=2_000_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--only", default="", help="rows whose name contains this; not recorded")
    options = parser.parse_args()
    made: dict[tuple[str, int], LargeMade] = {}
    rows = []
    with (
        own_memory(),
        tempfile.TemporaryDirectory(prefix="streamconv-bench-", dir=options.work) as name,
    ):
        folder = Path(name)
        for work in (w for w in WORKS if options.only in w.name):
            key = work.cut, work.experts
            if key not in made:
                for old in made.values():
                    shutil.rmtree(old.source.parent)
                made = {
                    key: make_large(
                        folder / "run", options.bytes, 8, cut=work.cut, experts=work.experts
                    )
                }
            plan = folder / "plan.jsonl"
            streamconv("plan", made[key].source, "-o", plan, *work.plan)
            cells, peaks = [], []
            for cold, aim in ((False, work.warm), (True, work.cold)):
                files = sorted(made[key].source.glob("*.pt"))
                flags = ("--max-mem", "64MB", *work.run)
                rounds = [
                    ratio(files, plan, folder, flags, cold=cold) for _ in range(options.rounds)
                ]
                peaks += [p for _, p in rounds]
                cells.append(told(rounds, aim))
            flags = (*work.plan, *work.run)
            more = [beside(made[key].source, folder, flags) for _ in range(options.rounds)]
            cells.append(f"{statistics.median(more):.1f} s ({min(more):.1f} to {max(more):.1f})")
            rows.append((work.name, *cells, f"{max(peaks) / 1e6:.1f} MB"))
            print(*rows[-1], sep=" | ", flush=True)
    text = (
        f"{conditions()}. {options.bytes / 1e9:g} GB in 8 rank files, medians (and ranges) of "
        f"{options.rounds} rounds, `--max-mem 64MB`, source CRC-32 and xxh3_128 on.\n\n"
        + table(HEAD, rows)
    )
    if not options.only:
        record("speed", text)


if __name__ == "__main__":
    main()
