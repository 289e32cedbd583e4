"""A store that is slow to answer, read and written: ``python -m bench.stores [--work DIR]``.

A server of our own (``scripts/object_store.py``) in a process of its own waits before each answer and
bounds each connection. ``run PLAN`` reads from it and writes to a disk, reads from a disk and writes
into it, and does both, for several budgets; the process is watched from outside. Beside each way
stands a plain copy of the rank files by obstore, all at once: what the store and its client give here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import obstore
import obstore.store

from bench.measure import conditions, table
from scripts.makers.large import make_large
from scripts.measured import watched
from scripts.object_store import environment
from streamconv.api import plan as make_plan
from streamconv.units import parse_size


def run(plan: Path, target: str, budget: str, env: dict[str, str]) -> list[object]:
    """Run a plan; return budget, MB/s, peak, whether it kept to the budget, CPU seconds."""
    command = [sys.executable, "-m", "streamconv", "run", str(plan), target, "--no-sync"]
    done = watched([*command, "--max-mem", budget, "--quiet"], os.environ | env)
    if done.code:
        return [budget, "-", done.err.splitlines()[0], "-", "-"]
    rate = plan_bytes(plan) / done.seconds / 1e6
    kept = "yes" if done.peak_bytes <= parse_size(budget) else "NO"
    cpu = f"{done.cpu_seconds:.1f}"
    return [budget, f"{rate:.0f}", f"{done.peak_bytes / 1e6:.0f} MB", kept, cpu]


def copied(source: Path, target: str) -> list[object]:
    """Copy the rank files by obstore, out of a store (``target`` is a folder) or into one."""
    seconds, nbytes = time.monotonic(), 0
    ranks = sorted(source.glob("*.pt"))
    with ThreadPoolExecutor(len(ranks)) as pool:
        nbytes = sum(pool.map(lambda path: _copied(path, target), ranks))
    rate = nbytes / (time.monotonic() - seconds) / 1e6
    return ["copy", f"{rate:.0f}", "-", "-", "-"]


def _copied(path: Path, target: str) -> int:
    """Copy one: ``disk to store``, ``store to store``, or to the folder that is named."""
    disk = obstore.store.from_url("s3://disk", client_options={"allow_http": True})
    out = obstore.store.from_url("s3://out", client_options={"allow_http": True})
    with ExitStack() as stack:
        if target == "disk to store":
            pieces = iter(partial(stack.enter_context(path.open("rb")).read, 1 << 20), b"")
        else:
            pieces = map(bytes, obstore.get(disk, path.name).stream(min_chunk_size=1 << 20))
        if "to store" in target:
            key = f"{target}/{path.name}"
            made = obstore.open_writer(out, key, buffer_size=8 << 20, max_concurrency=2)
        else:
            made = (Path(target) / path.name).open("wb")
        with made as stream:
            return sum(stream.write(piece) or len(piece) for piece in pieces)


def plan_bytes(plan: Path) -> int:
    """Return the bytes that a plan writes."""
    from streamconv.ir.planfile import Plan

    return Plan(plan).head.totals.write_bytes


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=lambda t: int(float(t)), default=500_000_000)
    parser.add_argument("--world", type=int, default=4)
    parser.add_argument("--latency", type=float, default=0.03)
    parser.add_argument("--cap", type=float, default=40e6)
    parser.add_argument("--budgets", default="64MB,128MB,256MB")
    parser.add_argument("--work", type=Path, default=None)
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="streamconv-bench-", dir=given.work))
    try:
        make_large(work / "source", given.bytes, given.world)
        source = work / "source" / "actor"
        server = [sys.executable, "-m", "scripts.object_store", str(source)]
        server += ["--latency", str(given.latency), "--cap", str(given.cap)]
        process = subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        env = environment(process.stdout.readline().strip())
        os.environ.update(env)
        local, remote = work / "local.jsonl", work / "remote.jsonl"
        make_plan(source, output=local)
        make_plan("s3://disk", output=remote)
        rows = []
        for name, plan, target in (
            ("store to disk", remote, str(work / "out")),
            ("disk to store", local, "s3://out/a"),
            ("store to store", remote, "s3://out/b"),
        ):
            budgets = given.budgets.split(",")
            rows += [[name, *run(plan, f"{target}-{b}", b, env)] for b in budgets]
            rows.append([name, *copied(source, str(work) if "to disk" in name else name)])
        print(conditions())
        print(table(["way", "budget", "MB/s", "peak", "within", "CPU s"], rows))
        process.communicate("")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
