"""Any process of a conversion killed or stopped at any moment, then the next command at once.

COUNT conversions of tiny checkpoints, each a process of its own with its planning child (and, of many
rank files, that one's helper). At a random moment the process or one of its children is killed, or
stopped and its parent killed, and a command follows that moment: the same, with other options, or of
another source. It ends with the right output or a clear refusal (11 where a process of the first still
lives, 8 where the other job was begun); never with what belongs to the other one. Where it was refused
it is done again with --overwrite once everything has ended, and no process or file is left over.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from scripts.campaigns.common import Figures, hidden, is_complete, main
from scripts.campaigns.inproc import each_number
from scripts.makers import tiny
from scripts.outputs import contents
from streamconv import api
from streamconv.errors import StreamconvError

_HANG_SECONDS = 100.0
_MANY = "many"
_OPTIONS: dict[str, Any] = {"sync": False, "layout": "memory", "max_shard_size": 200}
Job = tuple[str, str]  # a source and a dtype
_ACTS = (
    "the parent killed",
    "a child killed",
    "a child stopped, its parent killed",
    "a child stopped",
    "the parent stopped",
    "everything killed, children first",
)


def campaign(work: Path, count: int, seed: int) -> Figures:
    tiny.LAYOUTS[_MANY] = (64, (64,), ("fsdp",), tiny.LAYOUTS["fsdp"][3])
    sources = {
        "few": tiny.make_tiny(work / "few", "fsdp"),
        "few again": tiny.make_tiny(work / "few again", "fsdp", salt="again"),
        "many": tiny.make_tiny(work / "many", _MANY),
        "many again": tiny.make_tiny(work / "many again", _MANY, salt="again"),
    }
    expected = {}
    seconds = {}
    for name, source in sources.items():
        for dtype in ("keep", "float32"):
            out = work / "expected" / name / dtype
            out.parent.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            api.convert(source, out, dtype=dtype, **_OPTIONS)
            seconds[name] = time.monotonic() - began
            expected[name, dtype] = contents(out)
    trial = partial(_trial, sources, expected, seconds, seed)
    return each_number(work, count, trial, on_crash=_crashed, memory_bytes=8 << 30)


def _crashed(number: int, signum: str) -> Figures:
    return Figures(breaches=[f"trial {number} ended by {signum}"])


def _start(convert: Callable[[], object]) -> int:
    """Begin a conversion in a process that leads a session of its own."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    signal.alarm(0)
    quiet = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(quiet, fd)
    code = 1
    try:
        convert()
        code = 0
    except StreamconvError as error:
        code = error.exit_code
    except BaseException:  # noqa: BLE001 - what would be a traceback
        code = 99
    finally:
        os._exit(code)


def _members(session: int) -> list[int]:
    """Return the living processes of a session, the oldest first."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] not in "ZX":
                    found.append(int(folder.name))
    return sorted(found)


def _send(pid: int, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def _end_of(pid: int) -> int | None:
    """Wait for a process; return its exit code, negative after a signal, None where it hangs."""
    deadline = time.monotonic() + _HANG_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def _act(what: str, pid: int, rng: random.Random) -> None:
    children = [p for p in _members(pid) if p != pid]
    child = rng.choice(children) if children else pid
    if what == "the parent killed":
        _send(pid, signal.SIGKILL)
    elif what == "a child killed":
        _send(child, signal.SIGKILL)
    elif what == "a child stopped, its parent killed":
        for p in children:
            _send(p, signal.SIGSTOP)
        _send(pid, signal.SIGKILL)
    elif what == "a child stopped":
        if child != pid:
            _send(child, signal.SIGSTOP)
    elif what == "the parent stopped":
        _send(pid, signal.SIGSTOP)
    else:
        for p in (*children, pid):
            _send(p, signal.SIGKILL)


def _trial(
    sources: dict[str, Path],
    expected: dict[Job, dict[str, bytes]],
    seconds: dict[str, float],
    seed: int,
    place: Path,
    number: int,
) -> Figures:
    signal.alarm(0)  # each process is waited for with a limit of its own
    rng = random.Random(f"{seed}/{number}")
    figures = Figures()
    folder = place / str(number)
    folder.mkdir()
    name = "many" if rng.random() < 0.1 else "few"
    first: Job = (name, "keep")
    kind = rng.choice(("the same command", "other options", "another source"))
    second: Job = {
        "the same command": first,
        "other options": (name, "float32"),
        "another source": (f"{name} again", "keep"),
    }[kind]
    what = rng.choice(_ACTS)
    where = f"trial {number}: {what}, then {kind}"
    figures.add("orphans")
    out = folder / "out"
    if rng.random() < 0.2:
        out.mkdir()

    def run(job: Job, *, overwrite: bool = False) -> int:
        source, dtype = job
        return _start(
            lambda: api.convert(sources[source], out, dtype=dtype, overwrite=overwrite, **_OPTIONS)
        )

    pid = run(first)
    if rng.random() < 0.6:  # in the first moments of the planning child
        deadline = time.monotonic() + 5
        while len(_members(pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.3) * seconds[name])
    else:
        time.sleep(rng.uniform(0, 1.2) * seconds[name])
    _act(what, pid, rng)
    code = _end_of(run(second))
    _judge(figures, where, code, out, first, second, expected)
    for p in (pid, *_members(pid)):  # itself, too: stopped before it had a session of its own
        _send(p, signal.SIGCONT)
    if _end_of(pid) is None:
        figures.breach(f"{where}: the first one hangs")
        _send(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if code != 0:
        again = _end_of(run(second, overwrite=True))
        if again != 0 or not is_complete(out, expected[second]):
            figures.breach(f"{where}: {code}, then with --overwrite {again}, or no whole output")
    deadline = time.monotonic() + 5
    while (left := _members(pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    if left:
        figures.breach(f"{where}: {len(left)} processes left")
        for p in left:
            _send(p, signal.SIGKILL)
    if rest := hidden(folder) + (hidden(out) if out.is_dir() else []):
        figures.breach(f"{where}: {rest} left")
    shutil.rmtree(folder)
    return figures


def _judge(
    figures: Figures,
    where: str,
    code: int | None,
    out: Path,
    first: Job,
    second: Job,
    expected: dict[Job, dict[str, bytes]],
) -> None:
    if code == 0:
        figures.add("right outputs at once")
        if not is_complete(out, expected[second]):
            figures.breach(f"{where}: exit code 0 and another output")
        return
    if code == 11:
        figures.add("told that a process lives")
    elif code == 8 and first != second:
        figures.add("told of the other job")
    else:
        figures.breach(f"{where}: exit code {code}")
    whole = any(is_complete(out, expected[job]) for job in (first, second))
    if code != 11 and (out / "streamconv.json").is_file() and not whole:
        figures.breach(f"{where}: refused, and neither's output")


if __name__ == "__main__":
    main(campaign, count=1000)
