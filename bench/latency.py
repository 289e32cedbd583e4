"""Storage that is slow to answer: ``python -m bench.latency [--world N] [--milliseconds N]``.

The same plan is read in windows and tensor by tensor through a reader whose every read waits first,
as a network file system would. Prints the sizes of the reads, too.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.measure import conditions, record, table
from scripts.makers.large import make_large
from streamconv.api import plan as make_plan
from streamconv.executor.pipeline import WindowFiller, filled_windows
from streamconv.executor.reader import SourceReader
from streamconv.executor.records import RecordChecks
from streamconv.ir.planfile import Plan


class SlowReader(SourceReader):
    """Waits before each read, and counts reads by size."""

    def __init__(self, plan: Plan, seconds: float) -> None:
        super().__init__(Path(plan.head.root), plan.head.files)
        self.sizes: Counter[int] = Counter()
        self._seconds = seconds

    def read(self, file: int, offset: int, *buffers: memoryview) -> None:
        """Wait, then read."""
        self.sizes[sum(map(len, buffers)).bit_length()] += 1
        time.sleep(self._seconds)
        super().read(file, offset, *buffers)


def run(plan: Plan, seconds: float, *, one_by_one: bool, threads: int) -> tuple[float, SlowReader]:
    """Read all that the plan needs; return the seconds and the reader."""
    start = time.perf_counter()
    with SlowReader(plan, seconds) as reader:
        checks = RecordChecks(reader)
        filler = WindowFiller(reader, checks, max_bytes=256 << 20, io_threads=threads)
        for _, section in plan.sections():
            groups = ([t] for t in section) if one_by_one else [section]
            for group in groups:
                for _ in filled_windows(group, filler, checks):
                    pass
        filler.close()
    return time.perf_counter() - start, reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=int, default=1024)
    parser.add_argument("--bytes", type=lambda t: int(float(t)), default=400_000_000)
    parser.add_argument("--milliseconds", type=float, default=1.0)
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="streamconv-latency-", dir=options.work))
    rows = []
    try:
        # As wide as there are ranks, so that each holds a piece of nearly every tensor.
        made = make_large(work / "run", options.bytes, options.world, hidden_size=options.world)
        plan = make_plan(made.source)
        for name, one_by_one, threads in (
            ("tensor by tensor", True, 1),
            ("windows", False, 1),
            ("windows, `--io-threads 8`", False, 8),
        ):
            seconds, reader = run(
                plan, options.milliseconds / 1000, one_by_one=one_by_one, threads=threads
            )
            sizes = ", ".join(
                f"{n} of {1 << bits - 1}–{(1 << bits) - 1} B"
                for bits, n in sorted(reader.sizes.items())
            )
            rows.append((name, reader.reads, f"{seconds:.1f} s", sizes))
            print(*rows[-1], sep=" | ", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    text = (
        f"{conditions()}. {options.bytes / 1e6:.0f} MB, {len(made.shapes)} tensors in {options.world} "
        f"rank files, {options.milliseconds:g} ms before each read, windows of up to 256 MiB.\n\n"
    )
    record("latency", text + table(("how", "reads", "time", "sizes of the reads"), rows))


if __name__ == "__main__":
    main()
