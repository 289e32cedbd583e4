"""What the benchmarks share: processes measured from outside, ``cat`` to compare with, results."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil

from scripts.measured import Ran, watched

_PAGE_ORDER = Path("/sys/module/page_reporting/parameters/page_reporting_order")
# More than any page order there is: nothing is large enough to be reported.
_NO_PAGE_ORDER = 11

RESULTS = Path(__file__).with_name("RESULTS.md")


def measured(command: Sequence[str], *, env: dict[str, str] | None = None) -> Ran:
    """Run a command, its process tree sampled from outside; end where it fails."""
    done = watched(command, env)
    if done.code:
        sys.exit(f"{' '.join(command)}: exit {done.code}\n{done.err}")
    return done


def streamconv(*arguments: str | Path) -> Ran:
    """Run a command of streamconv with ``--json``."""
    return measured([sys.executable, "-m", "streamconv", *map(str, arguments), "--json"])


def drop(files: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def warm(files: Iterable[Path]) -> None:
    """Read files into the page cache."""
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while stream.read(1 << 20):
                pass


def ready(files: Iterable[Path], *, cold: bool) -> None:
    """Bring the files into the page cache or, ``cold``, out of it; leave nothing to be written back.

    What an earlier run left dirty, or deleted, the kernel would write or discard during the next one,
    and let that one wait once its own dirty pages are too many.
    """
    (drop if cold else warm)(files)
    os.sync()


def cat(files: Sequence[Path], target: Path, *, cold: bool) -> float:
    """Concatenate files as ``cat`` does, durably when ``cold``; return the seconds."""
    ready(files, cold=cold)
    start = time.perf_counter()
    with target.open("wb") as out:
        subprocess.run(["cat", *map(str, files)], stdout=out, check=True)
        if cold:
            os.fdatasync(out.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


@contextlib.contextmanager
def own_memory() -> Iterator[None]:
    """Keep the memory of a virtual machine from its host, as root, for as long as this lasts.

    A balloon with free page reporting hands every 2 MiB that come free back to the host, and each
    page that is used anew waits for the host: the same warm ``cat`` took 0.7 to 3 s.
    """
    if not os.access(_PAGE_ORDER, os.W_OK):
        yield
        return
    before = _PAGE_ORDER.read_text()
    # What ends a benchmark from outside must not leave the machine like that.
    handler = signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    try:
        _PAGE_ORDER.write_text(f"{_NO_PAGE_ORDER}")
        free = psutil.virtual_memory().available * 4 // 5
        subprocess.run(
            [sys.executable, "-c", f"import numpy; numpy.ones({free}, numpy.uint8)"], check=True
        )
        yield
    finally:
        _PAGE_ORDER.write_text(before)
        signal.signal(signal.SIGTERM, handler)


def conditions() -> str:
    """Return what a reader must know about the machine and the moment."""
    memory = psutil.virtual_memory().total / 2**30
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, {memory:.0f} GiB, Linux "
        f"{platform.release()}, Python {platform.python_version()}; load averages at the end: {load}"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def record(section: str, text: str, path: Path = RESULTS) -> None:
    """Put ``text`` between the markers of ``section`` in ``path``, in place of what is there."""
    block = f"<!-- {section} -->\n{text.strip()}\n<!-- end of {section} -->"
    old = path.read_text(encoding="utf-8")
    pattern = re.compile(f"<!-- {section} -->.*?<!-- end of {section} -->", re.DOTALL)
    if not pattern.search(old):
        sys.exit(f"{path} has no section {section}")
    path.write_text(pattern.sub(lambda _: block, old), encoding="utf-8")
    print(text, flush=True)
