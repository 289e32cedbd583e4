"""What the campaigns share: figures, checkpoints to work on, commands, and what they left behind."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from scripts.makers import fsdp
from scripts.outputs import MANIFEST, contents

REPOSITORY = Path(__file__).resolve().parents[2]
WORKERS = 2
# Far more than any command here takes: what is still running then hangs.
_HANG_SECONDS = 240.0
SMALL_FILES = ("--max-shard-size", "64KB")
_MARK = "STREAMCONV_CAMPAIGN"

T = TypeVar("T")


@dataclass
class Figures:
    """What a campaign counted, and every breach of the promise in a few words."""

    counts: Counter[str] = field(default_factory=Counter)
    breaches: list[str] = field(default_factory=list)

    def add(self, what: str, number: int = 1) -> None:
        self.counts[what] += number

    def breach(self, what: str) -> None:
        self.breaches.append(what)

    def merge(self, other: Figures) -> None:
        self.counts.update(other.counts)
        self.breaches += other.breaches

    def line(self) -> str:
        return ", ".join(f"{n:,} {what}" for what, n in self.counts.items())


Campaign = Callable[[Path, int, int], Figures]


def main(campaign: Campaign, *, count: int) -> None:
    """The command line of a campaign that takes ``count`` of its units by default."""
    name = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(prog=f"python -m scripts.campaigns.{name}")
    parser.add_argument("--count", type=int, default=count, help=f"default: {count}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work",
        type=Path,
        help="a folder for temporary files, and to share checkpoints between runs",
    )
    options = parser.parse_args()
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        root = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(parents=True, exist_ok=True)
        work = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{name}-", dir=root))
        figures = campaign(Path(work), options.count, options.seed)
    for breach in figures.breaches:
        print(f"BREACH {breach}", file=sys.stderr)
    seconds = time.monotonic() - started
    print(f"{name}: {figures.line()}, {len(figures.breaches)} breaches ({seconds:.0f} s)")
    sys.exit(bool(figures.breaches))


def each(items: Iterable[T], task: Callable[[T], Figures]) -> Figures:
    """Do ``task`` for every item, two at a time: for tasks that wait for processes of their own."""
    figures = Figures()
    with ThreadPoolExecutor(WORKERS) as pool:
        for found in pool.map(task, items):
            figures.merge(found)
    return figures


@contextlib.contextmanager
def scratch(work: Path) -> Iterator[Path]:
    """A folder that is removed at once: a thousand outputs need not lie about together."""
    folder = Path(tempfile.mkdtemp(dir=work))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Job:
    """A checkpoint, its plan (of several output files), and the output that it must become."""

    source: Path
    plan: Path
    folder: Path
    expected: dict[str, bytes]


def prepare(work: Path, *, recipe: str = "fsdp2-w2", dtype: str = "keep") -> Job:
    """Make a checkpoint, plan it and run the plan undisturbed, once for all that share ``--work``."""
    root = work.parent / "jobs"
    root.mkdir(exist_ok=True)
    source = root / recipe / "actor"
    plan, out = root / f"{recipe}-{dtype}.jsonl", root / f"{recipe}-{dtype}"
    with FileLock(root / "lock"):
        if not source.exists():
            fsdp.make_all(root, [recipe])
        if not out.exists():
            for command in (
                ("plan", source, "-o", plan, "--dtype", dtype, *SMALL_FILES),
                ("run", plan, out),
            ):
                outcome = run(*command)
                if outcome.code != 0:
                    raise RuntimeError(f"{command[0]} fails undisturbed: {outcome.last_words}")
    return Job(source, plan, out, contents(out))


@dataclass(frozen=True)
class Outcome:
    """How a command ended. ``code`` is negative after a signal, None where it had to be killed."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float
    orphans: tuple[int, ...]

    @property
    def last_words(self) -> str:
        return " / ".join(self.stderr.strip().splitlines())[-300:]


def environment() -> dict[str, str]:
    """The environment of a command: marked, so that its descendants can be found, and quiet."""
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        # Else the first run writes byte code where the later ones do not: other system calls.
        "PYTHONDONTWRITEBYTECODE": "1",
        _MARK: uuid.uuid4().hex,
    }


def run(*command: object, wrap: Iterable[str] = (), module: str = "streamconv") -> Outcome:
    """Run ``streamconv COMMAND``, inside the command ``wrap`` where one is given."""
    return finish(*start(*command, wrap=wrap, module=module))


def start(
    *command: object, wrap: Iterable[str] = (), module: str = "streamconv"
) -> tuple[subprocess.Popen[str], str]:
    """Start ``streamconv COMMAND`` in a session of its own; return it and its mark."""
    env = environment()
    process = subprocess.Popen(
        [*wrap, sys.executable, "-m", module, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    return process, env[_MARK]


def finish(process: subprocess.Popen[str], mark: str) -> Outcome:
    """Wait for the end of what :func:`start` started, and look for what outlived it."""
    started = time.monotonic()
    code: int | None
    try:
        out, err = process.communicate(timeout=_HANG_SECONDS)
        code = process.returncode
    except subprocess.TimeoutExpired:
        _kill(marked(mark))
        process.kill()
        out, err = process.communicate()
        code = None
    seconds = time.monotonic() - started
    orphans = marked(mark)
    deadline = (
        time.monotonic() + 2
    )  # a child that its parent's death signal has reached needs a moment
    while orphans and time.monotonic() < deadline:
        time.sleep(0.02)
        orphans = marked(mark)
    _kill(orphans)
    return Outcome(code, out, err, seconds, tuple(orphans))


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def marked(mark: str) -> list[int]:
    """Return the living processes that carry a mark."""
    found = []
    needle = f"{_MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if needle in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def hidden(folder: Path) -> list[str]:
    """Return what a command left beside or in its output: names that begin with a dot."""
    return sorted(p.name for p in folder.glob(".*"))


def is_complete(out: Path, expected: dict[str, bytes]) -> bool:
    """Whether a folder is the output, byte for byte, but for the manifest's ``run`` block.

    Working files that a killed command left inside it do not make it less of one.
    """
    if not (out / MANIFEST).is_file():
        return False
    found = contents(out)
    return {n: d for n, d in found.items() if not n.startswith(".streamconv")} == expected
