"""kill -9 anywhere, then the same command: the same bytes, and before that all or nothing.

Kills at every write, fsync and rename of ``run PLAN`` into a new folder, into an empty one and over an
older output, also where two folders cannot be swapped; at COUNT random system calls of ``run PLAN``,
and at COUNT/20 random ones of ``convert``.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from scripts.campaigns import strace
from scripts.campaigns.common import (
    SMALL_FILES,
    Figures,
    contents,
    each,
    hidden,
    is_complete,
    main,
    prepare,
    run,
    scratch,
)
from scripts.campaigns.strace import Call
from scripts.outputs import INDEX, MANIFEST

_SWAP = "renameat2"


@dataclass(frozen=True)
class Scene:
    """A command and what was there before it: ``before`` is "", "empty", "older" or "no swap".

    The last is an older output on a file system that cannot swap two folders, as NFS cannot.
    """

    command: tuple[object, ...]
    before: str
    expected: dict[str, bytes]
    older: Path

    @property
    def also(self) -> tuple[str, ...]:
        return (f"inject={_SWAP}:error=EINVAL",) if self.before == "no swap" else ()

    def arguments(self, out: Path) -> tuple[object, ...]:
        overwrite = ("--overwrite",) if self.before in ("older", "no swap") else ()
        return (*self.command, out, "--quiet", *overwrite)

    def set_up(self, out: Path) -> None:
        if self.before == "empty":
            out.mkdir()
        if self.before in ("older", "no swap"):
            shutil.copytree(self.older, out)

    def halfway(self, out: Path) -> str | None:
        """Return what is wrong with what a killed command left, None where nothing is."""
        if self.before == "no swap":
            return None if self._is_at_hand(out) else "neither the old output nor the new one"
        if not out.exists():
            return "the older output is gone" if self.before == "older" else None
        if is_complete(out, self.expected):
            return None
        names = {p.name for p in out.iterdir()} - {".streamconv", ".streamconv.lock"}
        if self.before == "empty" and INDEX not in names:
            return None  # no loader starts without it
        if self.before == "older" and is_complete(out, contents(self.older)):
            return None
        return f"half an output: {sorted(names)}"

    def _is_at_hand(self, out: Path) -> bool:
        """Whether the older output is there, or the new one in its place and what is staged."""
        if is_complete(out, contents(self.older)):
            return True
        staged = out.parent / f".{out.name}.streamconv" / "files"
        places = [place for place in (out, staged) if place.is_dir()]
        there = {
            str(path.relative_to(place)): path.read_bytes()
            for place in places
            for path in place.rglob("*")
            if path.is_file()
        }
        weights = {n: d for n, d in self.expected.items() if n != MANIFEST}
        return weights.items() <= there.items()


def campaign(work: Path, count: int, seed: int) -> Figures:
    every = strace.WRITING + strace.PLACING
    rng = random.Random(seed)
    job = prepare(work)
    older = prepare(work, dtype="bfloat16").folder
    execute = Scene(("run", job.plan), "", job.expected, older)
    figures = Figures()
    for before in ("", "empty", "older", "no swap"):
        scene = replace(execute, before=before)
        points = _points(work, scene, every)
        if count < len(points):
            points = rng.sample(points, count)
        what = f"writes, fsyncs, renames of run ({before or 'new'})"
        figures.merge(_kill_at(work, scene, points, what))
    points = rng.choices(_points(work, execute, ()), k=count)
    figures.merge(_kill_at(work, execute, points, "random points of run"))
    whole = replace(execute, command=("convert", job.source, *SMALL_FILES))
    if count >= 20:
        # Most calls are the planning child's; every second kill is to hit what waits for it, or writes.
        anywhere = _points(work, whole, ())
        writing = [c for c in anywhere if c.main and c.name in every]
        points = rng.choices(anywhere, k=count // 40) + rng.choices(writing, k=count // 40)
        figures.merge(_kill_at(work, whole, points, "random points of convert"))
    return figures


def _points(work: Path, scene: Scene, names: tuple[str, ...]) -> list[Call]:
    """Return the calls to strike at: those about the output, or all once it is begun."""
    with scratch(work) as folder:
        out = folder / "out"
        scene.set_up(out)
        about = folder.name if names else ""
        calls = strace.calls(*scene.arguments(out), names=names, about=about, also=scene.also)
        if names:
            return [c for c in calls if not (scene.also and c.name == _SWAP)]
        first = next(k for k, c in enumerate(calls) if f"{folder.name}/.out" in c.line)
        return calls[first:]


def _kill_at(work: Path, scene: Scene, points: list[Call], what: str) -> Figures:
    figures = Figures()
    figures.add(what, len(points))
    figures.merge(each(points, partial(_kill_once, work, scene)))
    return figures


def _kill_once(work: Path, scene: Scene, call: Call) -> Figures:
    figures = Figures()
    with scratch(work) as folder:
        out = folder / "out"
        scene.set_up(out)
        command = scene.arguments(out)
        outcome, _ = strace.struck(call, "signal=SIGKILL", *command, also=scene.also)
        where = f"{scene.before or 'new'} {command[0]}, {call}"
        if outcome.code == -9:
            figures.add("killed")
        elif outcome.code == 0:
            figures.add("ended before the point")
        elif outcome.code == 5 and command[0] == "convert":
            figures.add("planning child killed")  # told as an error, and not the end of us
        else:
            figures.breach(f"{where}: code {outcome.code}, {outcome.last_words}")
        if outcome.orphans:
            figures.breach(f"{where}: {len(outcome.orphans)} processes outlived it")
        if wrong := scene.halfway(out):
            figures.breach(f"{where}: {wrong}")
        again = run(*command)
        if again.code != 0 or not is_complete(out, scene.expected):
            figures.breach(f"{where}: then code {again.code}, {again.last_words}")
        if left := hidden(folder) + hidden(out):
            figures.breach(f"{where}: then {left} left")
    return figures


if __name__ == "__main__":
    main(campaign, count=1000)
