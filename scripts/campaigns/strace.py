"""strace as the hand of fate: which system calls a command makes, and what happens at one of them."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scripts.campaigns.common import Outcome, run

_ENTRY = re.compile(r"^(\d+) +(\w+)\(")

WRITING = ("write", "pwrite64", "fsync", "fdatasync", "rename", "renameat", "renameat2")
PLACING = ("mkdir", "unlink", "unlinkat", "rmdir", "ftruncate")
READING = ("read", "pread64", "preadv", "preadv2")


@dataclass(frozen=True)
class Call:
    """A system call: the ``ordinal``-th of its name in its thread, which is how strace counts."""

    name: str
    ordinal: int
    line: str
    main: bool

    def __str__(self) -> str:
        return f"{self.name} #{self.ordinal}: {self.line[:160]}"


def why_not() -> str | None:
    """Return why system calls cannot be tampered with here, None where they can."""
    if shutil.which("strace") is None:
        return "no strace here (Debian: apt-get install strace)"
    outcome = run("--version", wrap=_strace("-o", "/dev/null", "-e", "trace=exit_group"))
    if outcome.code != 0:
        return f"strace may not trace here: {outcome.last_words}"
    return None


def calls(
    *command: object, names: Iterable[str] = (), about: str = "", also: Iterable[str] = ()
) -> list[Call]:
    """Run a command and return its calls of ``names`` (all by default) that mention ``about``.

    Descriptors are shown with the files that they stand for, so that a write mentions its file. What
    ``also`` happens meanwhile is said in strace's words: ``inject=…``.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        traced = ",".join((*names, *_struck_too(also))) if names else "all"
        more = [word for what in also for word in ("-e", what)]
        options = ("-y", "-s", "0", "-o", str(log), "-e", f"trace={traced}", *more)
        outcome = run(*command, wrap=_strace(*options))
        if outcome.code != 0:
            raise RuntimeError(f"the command alone fails: {outcome.last_words}")
        lines = log.read_text(errors="replace").splitlines()
    counts: Counter[tuple[str, str]] = Counter()
    found = []
    for line in lines:
        entry = _ENTRY.match(line)
        if entry is None:  # a signal, an exit, the second half of a call
            continue
        thread, name = entry.groups()
        counts[thread, name] += 1
        if about in line:
            main = thread == lines[0].split()[0]
            found.append(Call(name, counts[thread, name], line[entry.start(2) :], main))
    return found


def struck(
    call: Call, what: str, *command: object, also: Iterable[str] = ()
) -> tuple[Outcome, str]:
    """Run a command with ``what`` (``signal=SIGKILL``, ``error=EIO``) at one of its calls.

    Returns also the line of the call that failed: every thread and child counts for itself, so it may
    be another than ``call``.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        traced = ",".join((call.name, *_struck_too(also)))
        inject = f"inject={call.name}:{what}:when={call.ordinal}"
        options = ("-y", "-s", "0", "-o", str(log), "-e", f"trace={traced}", "-e", inject)
        options += tuple(word for more in also for word in ("-e", more))
        outcome = run(*command, wrap=_strace(*options))
        lines = log.read_text(errors="replace").splitlines()
    return outcome, next((line for line in lines if "(INJECTED)" in line and call.name in line), "")


def _struck_too(also: Iterable[str]) -> list[str]:
    """Return the calls that ``also`` tampers with: strace tampers with none that it does not trace."""
    return [what.removeprefix("inject=").partition(":")[0] for what in also]


def _strace(*options: str) -> list[str]:
    # Not with --seccomp-bpf, which is faster: there an injected signal gets lost.
    return ["strace", "-f", "-q", *options]
