"""Models that no test machine has room for: ``python -m bench.scale [--only "in 64"] [--work DIR]``.

Rank files are sparse (see :mod:`bench.sparse`); the output goes to a btrfs with compression in a
file, mounted in a mount namespace of this process, so that 141 GB take a few. Each model is planned
(``streamconv plan -o``), the plan is run in 64 MB, sentinels are looked for, and the models in 8
files are also converted in one command in 500 MB. 671B is too much for that: it is written into
memory, and each finished file is looked through and emptied while the next one is written.
Needs root, util-linux, btrfs-progs and 12 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from bench.measure import conditions, own_memory, record, streamconv, table
from bench.sparse import SparseMade, make_sparse, sentinels_in
from streamconv.output.staging import staging_path

_MOUNTED = "STREAMCONV_BENCH_MOUNTED"


@dataclass(frozen=True, slots=True)
class Case:
    """A model and its rank files; whether it is converted, too, and whether outputs are emptied."""

    model: str
    world: int
    converted: bool = True
    emptied: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} in {self.world} files"


CASES = (
    Case("1B", 8),
    Case("8B", 8),
    Case("70B", 8),
    Case("70B", 64, converted=False),
    Case("671B", 256, converted=False, emptied=True),
)


def mount(work: Path, name: str, *, in_memory: bool) -> Path:
    """Return a folder on a file system of its own: a compressing one, or one in memory."""
    folder = work / name
    folder.mkdir()
    if in_memory:  # as large as what is written, or `run` would refuse; most of it never at once
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2t", "tmpfs", folder], check=True)
        return folder
    image = work / f"{name}.img"
    with image.open("wb") as stream:
        stream.truncate(2 << 40)
    subprocess.run(["mkfs.btrfs", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop,compress-force=zstd:1,noatime", image, folder], check=True)
    return folder


class Watch:
    """Looks for the sentinels in the files of an output.

    With ``emptied``, a thread does so while the output is written, and frees the room of each file
    once there is a later one; as a context manager it ends that thread.
    """

    def __init__(self, output: Path, made: SparseMade, *, emptied: bool) -> None:
        self._output = output
        self._made = made
        self._seen: set[str] = set()
        self._right = 0
        self._wrong: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._empty)
        self._emptied = emptied

    def _look(self, path: Path) -> None:
        self._seen.add(path.name)
        for sentinel, right in sentinels_in(path, self._made):
            self._right += right
            if not right:
                self._wrong.append(f"{sentinel.name} at byte {sentinel.at} in {path.name}")

    def _empty(self) -> None:
        while not self._over.wait(0.5):
            written = sorted((staging_path(self._output) / "files").glob("*.safetensors"))
            for path in written[:-1]:
                if path.name not in self._seen:
                    self._look(path)
                    punch = ["fallocate", "--punch-hole", "--offset", "0", "--length"]
                    subprocess.run([*punch, str(path.stat().st_size), path], check=True)

    def __enter__(self) -> Watch:
        if self._emptied:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self._emptied:
            self._thread.join()

    def told(self) -> str:
        """Look through what is left and return how many sentinels were right; ends if one is not."""
        for path in sorted(self._output.glob("*.safetensors")):
            if path.name not in self._seen:
                self._look(path)
        asked = len(self._made.sentinels)
        if self._wrong or self._right != asked:
            sys.exit(f"{self._right} of {asked} sentinels right; wrong: {self._wrong[:5]}")
        return f"{self._right} sentinels right"


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
        with Watch(out / "model", made, emptied=case.emptied) as watch:
            run = streamconv("run", plan, out / "model", "--max-mem", "64MB")
        unverifiable = run.last["unverifiable_bytes"]
        right = watch.told()
        shutil.rmtree(out / "model")
        converted = "-"
        if case.converted:
            whole = streamconv(made.source, out / "model", "--max-mem", "500MB")
            Watch(out / "model", made, emptied=False).told()
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
        disk, memory = (mount(work, n, in_memory=n == "memory") for n in ("disk", "memory"))
        rows = []
        with own_memory():
            for case in CASES:
                if options.only in case.name:
                    rows.append(measure(case, work, memory if case.emptied else disk))
                    print(*rows[-1], sep=" | ", flush=True)
    finally:
        for name in ("disk", "memory"):
            subprocess.run(["umount", "-q", "-l", work / name], check=False)
        shutil.rmtree(work, ignore_errors=True)
    head = (
        "model",
        "bytes, tensors",
        "plan: time, peak",
        "plan's size",
        "run in 64 MB: time, peak",
        "convert in 500 MB: time, peak",
        "checked",
    )
    if not options.only:
        record("scale", f"{conditions()}.\n\n{table(head, rows)}")


if __name__ == "__main__":
    main()
