"""Several conversions at once stay within one budget, measured from outside."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import psutil
import pytest

from scripts.makers import runs


def tree(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident(processes: list[psutil.Process]) -> tuple[int, int]:
    """Return the sum of resident bytes, and how many workers are among them."""
    total = workers = 0
    for p in processes:
        try:
            total += p.memory_info().rss
            # A worker's child looks like the worker until it is another program: count by parent, too.
            own = p.ppid() == processes[0].pid
            workers += own and "streamconv.batch.worker" in p.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return total, workers


@pytest.mark.slow
@pytest.mark.memory
def test_four_conversions_at_once_stay_within_one_budget(tmp_path):
    file = runs.rank_file(tmp_path / runs.RANK_FILE)
    for step in range(10, 70, 10):
        runs.add_step(tmp_path / "run", step, file)
    budget = 2_100_000_000
    command = [sys.executable, "-m", "streamconv", "batch", str(tmp_path / "run")]
    command += [str(tmp_path / "out"), "--jobs", "4", "--max-mem", str(budget), "--json"]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log)
        watched = psutil.Process(process.pid)
        peak = most = 0
        while process.poll() is None:
            total, workers = resident(tree(watched))
            peak, most = max(peak, total), max(most, workers)
            time.sleep(0.01)
        log.seek(0)
        summary = json.loads(log.read().splitlines()[-1])
    assert process.returncode == 0
    assert summary["counts"] == {"converted": 6}
    assert most == 4
    assert peak <= budget
    # What it says of itself is what was seen from outside, but for the moments between two looks.
    assert summary["peak_bytes"] <= budget
    assert summary["peak_bytes"] > 0.8 * peak
