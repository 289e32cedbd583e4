"""Many conversions in few processes: what each may take, and what its end means.

A worker goes through its share of the numbers, one ``trial`` each. A trial that hangs or breaks the
interpreter ends its worker; the next one goes on behind it, and the trial is counted.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.campaigns.common import WORKERS, Figures

_HANG_SECONDS = 10

Trial = Callable[[Path, int], Figures]


def each_number(
    work: Path,
    count: int,
    trial: Trial,
    *,
    on_crash: Callable[[int, str], Figures],
    memory_bytes: int = 1 << 30,
) -> Figures:
    """Do ``trial(folder, number)`` for every number below ``count`` in processes of their own.

    ``on_crash(number, signal)`` says what a crash counts as: in earnest, such files are read in a
    child. ``memory_bytes`` is what a worker may take beside what is loaded here; by default as much as
    that child.
    """
    fork = multiprocessing.get_context("fork")
    total = Figures()
    shares = [range(k, count, WORKERS) for k in range(WORKERS)]
    positions = [fork.Value("q", 0) for _ in shares]
    results: Any = fork.SimpleQueue()

    def begin(k: int) -> Any:
        folder = work / f"worker-{k}"
        folder.mkdir(exist_ok=True)
        process = fork.Process(
            target=_work, args=(folder, shares[k], positions[k], trial, results, memory_bytes)
        )
        process.start()
        return process

    running = {k: begin(k) for k in range(WORKERS)}
    while running:
        multiprocessing.connection.wait([p.sentinel for p in running.values()], timeout=0.05)
        while not results.empty():
            total.merge(_from_json(results.get()))
        for k, process in list(running.items()):
            if process.is_alive():
                continue
            process.join()
            del running[k]
            if process.exitcode:
                at = positions[k].value
                name = signal.Signals(-process.exitcode).name if process.exitcode < 0 else "exit"
                total.merge(on_crash(shares[k][at], name))
                positions[k].value = at + 1
                running[k] = begin(k)
    while not results.empty():
        total.merge(_from_json(results.get()))
    return total


def _work(
    folder: Path, share: range, position: Any, trial: Trial, results: Any, memory_bytes: int
) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes,) * 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a hang ends the worker by SIGALRM
    while position.value < len(share):
        signal.alarm(_HANG_SECONDS)
        found = trial(folder, share[position.value])
        signal.alarm(0)
        results.put(json.dumps([dict(found.counts), found.breaches]))
        position.value += 1
    os._exit(0)


def _from_json(text: str) -> Figures:
    counts, breaches = json.loads(text)
    figures = Figures(breaches=breaches)
    figures.counts.update(counts)
    return figures
