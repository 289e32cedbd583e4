"""A large checkpoint: peak memory from outside, speed beside ``cat``, every bit checked.

``python -m bench.large_checkpoint --bytes 4000000000 --rounds 5`` makes a float32 checkpoint of 8
rank files with real torch, then in turn runs ``cat`` of the rank files into one file and streamconv's
executing part, and prints medians of their ratio. Peaks are the largest sum of resident bytes over
the process tree, sampled from outside every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors import safe_open

from tests.makers.large import LargeMade, make_large


def measured(command: list[str]) -> tuple[int, str]:
    """Run a command; return its peak of resident bytes and what it printed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    tree, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        try:
            for p in (tree, *tree.children(recursive=True)):
                total += p.memory_info().rss
        except psutil.NoSuchProcess:
            pass
        peak = max(peak, total)
        time.sleep(0.02)
    out = process.stdout.read() if process.stdout else ""
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit {process.returncode}")
    return peak, out


def streamconv(*arguments: str) -> tuple[int, dict[str, float]]:
    """Run streamconv; return its peak from outside and its own last event."""
    peak, out = measured([sys.executable, "-m", "streamconv", *arguments, "--json"])
    return peak, json.loads(out.splitlines()[-1])


def check(made: LargeMade, folder: Path) -> int:
    """Compare every element with the truth; return the number of tensors."""
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                found = file.get_slice(name)
                rows = found.get_shape()[0]
                for at in range(0, rows, 4096):
                    part = found[at : min(at + 4096, rows)]
                    expected = made.expected(name, at, min(at + 4096, rows))
                    if not torch.equal(part.view(torch.int32), expected.view(torch.int32)):
                        sys.exit(f"{name} differs at row {at}")
                count += 1
    if count != len(made.shapes):
        sys.exit(f"{count} tensors of {len(made.shapes)}")
    return count


def cat(files: list[Path], target: Path, *, cold: bool) -> float:
    """Concatenate files as ``cat`` does, durably when ``cold``; return the seconds."""
    if cold:
        drop(files)
    start = time.perf_counter()
    with target.open("wb") as out:
        subprocess.run(["cat", *map(str, files)], stdout=out, check=True)
        if cold:
            os.fdatasync(out.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def drop(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=4_000_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="streamconv-bench-", dir=options.work))
    try:
        made = make_large(work / "run", options.bytes, 8)
        source, plan = str(made.source), str(work / "plan.jsonl")
        peak, last = streamconv(source, str(work / "out"), "--max-mem", "512MB")
        tensors = check(made, work / "out")
        print(f"convert --max-mem 512MB: peak {peak / 1e6:.0f} MB, {tensors} tensors equal")
        shutil.rmtree(work / "out")
        files = sorted(made.source.glob("*.pt"))
        for dtype in ("keep", "bfloat16", "float16"):
            measured(
                [sys.executable, "-m", "streamconv", "plan", source, "-o", plan, "--dtype", dtype]
            )
            for cold in (False, True):
                ratios, peaks = [], []
                for _ in range(options.rounds):
                    before = cat(files, work / "cat", cold=cold)
                    if cold:
                        drop(files)
                    flags = [] if cold else ["--no-sync"]
                    peak, last = streamconv(
                        "run", plan, str(work / "out"), "--max-mem", "64MB", *flags
                    )
                    after = cat(files, work / "cat", cold=cold)
                    ratios.append((before + after) / 2 / last["seconds"])
                    peaks.append(peak)
                    shutil.rmtree(work / "out")
                print(
                    f"run --dtype {dtype}, {'cold, durable' if cold else 'warm'}: "
                    f"{statistics.median(ratios):.2f} of cat's speed "
                    f"({min(ratios):.2f} to {max(ratios):.2f}, {options.rounds} rounds), "
                    f"peak {max(peaks) / 1e6:.1f} MB of 64 MB",
                    flush=True,
                )
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
