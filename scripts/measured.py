"""Commands whose memory is watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_INTERVAL_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Ran:
    """A finished command: what it printed, how long it took, and the memory that was seen."""

    code: int
    out: str
    err: str
    seconds: float
    tree_bytes: int
    """The largest sum of resident sizes over the process and its descendants."""
    high_water_bytes: int
    """VmHWM of the process itself, which no sample can miss."""
    cpu_seconds: float
    """User and system time of the process and of the children that it waited for."""

    @property
    def peak_bytes(self) -> int:
        return max(self.tree_bytes, self.high_water_bytes)

    @property
    def last(self) -> dict[str, Any]:
        """The last line of ``--json`` output."""
        return dict(json.loads(self.out.splitlines()[-1]))


def watched(command: Sequence[str], env: Mapping[str, str] | None = None) -> Ran:
    """Run a command, ``env`` added to its environment, and sample its process tree."""
    start, used = time.perf_counter(), _cpu_of_children()
    # Files and not pipes: nobody reads while the process is at work, and a full pipe would stop it.
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        subprocess.Popen(
            command, stdout=out, stderr=err, env=None if env is None else {**os.environ, **env}
        ) as process,
    ):
        root = psutil.Process(process.pid)
        tree = high_water = 0
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                members = [root, *root.children(recursive=True)]
                tree = max(tree, sum(map(_resident, members)))
            high_water = max(high_water, _high_water(process.pid))
            time.sleep(_INTERVAL_SECONDS)
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        cpu = _cpu_of_children() - used
        return Ran(process.returncode, out.read(), err.read(), seconds, tree, high_water, cpu)


def run(*arguments: object) -> Ran:
    """Run a command of streamconv."""
    return watched([sys.executable, "-m", "streamconv", *map(str, arguments)])


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def _high_water(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", text)  # gone once the process is a zombie
    return int(found[1]) * 1024 if found else 0
