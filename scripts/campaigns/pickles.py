"""Malicious pickles in otherwise valid rank files: nothing is executed, nothing is imported.

COUNT generated files are read and planned in process, under an audit hook that sees every import,
every call of the system and every file that is opened, and one in fifty through the command. Each
must be refused, in bounded time and memory, and the file that the attacks would touch never be there.
"""

from __future__ import annotations

import io
import random
import shutil
import sys
import time
from functools import partial
from pathlib import Path

from scripts.campaigns.common import Figures, each, main, run, scratch
from scripts.campaigns.gadgets import Generator, tensor, text
from scripts.campaigns.inproc import each_number
from scripts.makers.zips import E, Zip
from streamconv import formats
from streamconv.errors import StreamconvError
from streamconv.options import JobOptions
from streamconv.planning.build import build_plan

_SECONDS = 10
# What reading a folder of rank files does, besides opening files below it.
_QUIET = {"os.listdir", "os.scandir", "object.__getattr__", "pathlib.Path.glob", "glob.glob"}
# Our own arrays and meshes; CPython 3.11's grumble about a bytearray that it could not allocate.
_QUIET |= {"array.__new__", "builtins.id", "sys.excepthook"}


class Watch:
    """An audit hook that can be told to look: hooks cannot be taken away again."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.root is None or event in _QUIET:
            return
        if (
            event == "open"
            and str(arguments[0]).startswith(self.root)
            and arguments[1] in ("r", None)
        ):
            return
        self.seen.append(f"{event} {arguments!r}"[:200])


def campaign(work: Path, count: int, seed: int) -> Figures:
    canary = work / "canary"
    check = work / "check"
    _rank_file(check, b"\x80\x04}" + text("good") + tensor() + b"s.")
    _plan(check)  # imports what reading a file ever needs, and shows that the frame is valid
    watch = Watch()
    figures = each_number(
        work,
        count,
        partial(_trial, watch, canary, seed),
        on_crash=partial(_crashed, work, canary, seed),
    )
    sample = random.Random(seed).sample(range(count), max(1, count // 50))
    figures.merge(each(sample, partial(_through_the_command, work, canary, seed)))
    if canary.exists():
        figures.breach("the canary file is there: something was executed")
    return figures


def _rank_file(folder: Path, pickle: bytes) -> None:
    folder.mkdir(parents=True)
    records = [
        E("data.pkl", pickle),
        E("byteorder", b"little"),
        E("data/0", bytes(16)),
        E("version", b"3\n"),
    ]
    (folder / "model_world_size_1_rank_0.pt").write_bytes(Zip(records).bytes())


def _plan(folder: Path) -> None:
    build_plan(formats.find_model(folder, None).read(), JobOptions(), io.StringIO())


def _generated(canary: Path, seed: int, number: int) -> bytes:
    return Generator(random.Random(f"{seed}/{number}"), canary).pickle()


def _trial(watch: Watch, canary: Path, seed: int, folder: Path, number: int) -> Figures:
    figures = Figures()
    figures.add("malicious pickles")
    shutil.rmtree(folder)
    _rank_file(folder, _generated(canary, seed, number))
    where = f"pickle {number}"
    started = time.monotonic()
    watch.seen.clear()
    watch.root = str(folder)
    try:
        _plan(folder)
    except StreamconvError as error:
        watch.root = None
        figures.add(f"refused with {error.exit_code}")
        if error.exit_code not in (5, 6) or not error.where:
            figures.breach(f"{where}: {error.exit_code}, {error}")
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        watch.root = None
        figures.breach(f"{where}: {type(error).__name__}: {error}")
    else:
        watch.root = None
        figures.add("taken as inert data")
    if watch.seen:
        figures.breach(f"{where}: {watch.seen[:3]}")
    if time.monotonic() - started > _SECONDS:
        figures.breach(f"{where}: took {time.monotonic() - started:.1f} s")
    return figures


def _crashed(work: Path, canary: Path, seed: int, number: int, signal: str) -> Figures:
    figures = _through_the_command(work, canary, seed, number)
    figures.add(f"ended by {signal} in process")
    return figures


def _through_the_command(work: Path, canary: Path, seed: int, number: int) -> Figures:
    figures = Figures()
    with scratch(work) as folder:
        _rank_file(folder / "source", _generated(canary, seed, number))
        outcome = run("convert", folder / "source", folder / "out")
        figures.add("through the command")
        if outcome.code == 0:
            figures.add("taken as inert data by the command")
        elif outcome.code not in (5, 6) or "Traceback" in outcome.stderr:
            figures.breach(f"command, pickle {number}: {outcome.code}, {outcome.last_words}")
    return figures


if __name__ == "__main__":
    main(campaign, count=1000)
