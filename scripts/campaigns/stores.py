"""A conversion into a store, struck at every request: whole or absent, and the same command goes on.

``run PLAN s3://…`` against a store of our own: into a new place, over an older output, and with files
that are uploaded in parts. At each request, before it has its effect and after, the process is
killed (kill -9); its answer is lost or breaks off; it and the next three are answered 503; or it is
held back until another process has taken over a lock that went silent. Beside that: races for the
lock, sources that are written anew between two requests, and stores that ignore conditions.
COUNT bounds how many requests of each kind are struck, chosen at random.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scripts.campaigns.common import (
    SMALL_FILES,
    Figures,
    Outcome,
    contents,
    each,
    finish,
    main,
    prepare,
    run,
    start,
)
from scripts.object_store import Request, Store, environment, serving
from scripts.outputs import INDEX, MANIFEST

_BUCKET, _PREFIX = "out", "models/m/"
_TARGET = f"s3://{_BUCKET}/models/m"
_BAD_SOURCE, _BAD_USAGE, _LOCKED = 5, 2, 11


@dataclass(frozen=True)
class Scene:
    """What is run, what lies there before, and what must lie there afterwards."""

    name: str
    plan: Path
    expected: dict[str, bytes]
    older: dict[str, bytes] | None = None

    @property
    def command(self) -> tuple[object, ...]:
        over = ("--overwrite",) if self.older is not None else ()
        return ("run", self.plan, _TARGET, "--quiet", "--no-sync", *over)

    @contextmanager
    def store(self) -> Iterator[tuple[Store, tuple[str, ...]]]:
        """Yield a store as it is before, and what a command begins with to work on it."""
        made = Store()
        for name, data in (self.older or {}).items():
            made.put(_BUCKET, _PREFIX + name, data)
        with serving(made) as address:
            yield made, ("env", *(f"{k}={v}" for k, v in environment(address).items()))


def written(store: Store) -> dict[str, bytes]:
    """Return the output as it lies in the store, without the manifest's timings and what is staged."""
    return {
        name.removeprefix(_PREFIX): store.bytes_of(_BUCKET, name)
        for name in store.names(_BUCKET, _PREFIX)
        if "/.streamconv/" not in name and not name.endswith(MANIFEST)
    }


def halfway(store: Store, scene: Scene) -> str | None:
    """Return what is wrong with what a struck command left; None where nothing is."""
    there = written(store)
    whole = [known for known in (scene.expected, scene.older) if known is not None]
    bare = [{n: d for n, d in known.items() if n != MANIFEST} for known in whole]
    has_manifest = _PREFIX + MANIFEST in store.names(_BUCKET)
    if (INDEX in there or has_manifest) and there not in bare:
        return f"half an output: {sorted(there)}"
    return None


def at_the_end(store: Store, scene: Scene, outcome: Outcome) -> str | None:
    """Return what is wrong after the command that must make it whole."""
    if outcome.code != 0:
        return f"exit {outcome.code}: {outcome.last_words}"
    if written(store) != {n: d for n, d in scene.expected.items() if n != MANIFEST}:
        return "other bytes"
    staged = store.names(_BUCKET, f"{_PREFIX}.streamconv/")
    return f"left behind: {staged}" if staged else None


Strike = Callable[[Request, int], int | str | None]


def _kill_before(_: Request, pid: int) -> int:
    os.kill(pid, signal.SIGKILL)
    return 500


def _kill_after(_: Request, pid: int) -> str:
    os.kill(pid, signal.SIGKILL)
    return "lost"


_KILLS: dict[str, Strike] = {"kills before a request": _kill_before, "kills after": _kill_after}
_FAULTS: dict[str, Callable[[], Strike]] = {
    "answers lost": lambda: _once("lost"),
    "connections reset": lambda: _once("reset"),
    "bursts of 503": lambda: _times(503, 4),
}


def _once(what: int | str) -> Strike:
    return _times(what, 1)


def _times(what: int | str, count: int) -> Strike:
    left = [count]

    def strike(_: Request, __: int) -> int | str | None:
        left[0] -= 1
        return what if left[0] >= 0 else None

    return strike


def campaign(work: Path, count: int, seed: int) -> Figures:
    rng = random.Random(seed)
    job, older = prepare(work), prepare(work, dtype="bfloat16")
    small = Scene("new", job.plan, job.expected)
    over = Scene("over an older output", job.plan, job.expected, _with_manifest(older.folder))
    scenes = [small, over, _in_parts(work)]
    figures = Figures()
    for scene in scenes:
        total = _requests(scene)
        for what, strike in _KILLS.items():
            points = _some(rng, total, count)
            figures.merge(each(points, partial(_killed, scene, what, strike)))
        for what, fault in _FAULTS.items():
            points = _some(rng, total, count)
            figures.merge(each(points, partial(_faulty, scene, what, fault)))
    points = _some(rng, _requests(small), count)
    figures.merge(each(points, partial(_zombie, small)))
    figures.merge(each(range(max(1, count // 10)), partial(_race, small)))
    figures.merge(each(_some(rng, 60, count), partial(_changing, job.source, job.expected)))
    figures.merge(_without_conditions(small))
    return figures


def _with_manifest(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def _in_parts(work: Path) -> Scene:
    """A model of a few files that are uploaded in parts."""
    import torch

    folder = work.parent / "jobs" / "in-parts"
    plan, out = folder / "plan.jsonl", folder / "out"
    if not out.exists():
        (folder / "step").mkdir(parents=True, exist_ok=True)
        tensors = {f"layers.{k}.weight": torch.randn(1 << 10, 2300) for k in range(3)}
        torch.save(tensors, folder / "step" / "model_world_size_1_rank_0.pt")
        for command in (
            ("plan", folder / "step", "-o", plan, "--max-shard-size", "10MB"),
            ("run", plan, out),
        ):
            done = run(*command)
            if done.code != 0:
                raise RuntimeError(done.last_words)
    return Scene("in parts", plan, contents(out))


def _requests(scene: Scene) -> int:
    """Return how many requests a command makes that nothing strikes."""
    with scene.store() as (store, environ):
        outcome = run(*scene.command, wrap=environ)
        wrong = at_the_end(store, scene, outcome)
        if wrong:
            raise RuntimeError(f"{scene.name} fails undisturbed: {wrong}")
        return len(store.requests)


def _some(rng: random.Random, total: int, count: int) -> list[int]:
    return list(range(total)) if count >= total else sorted(rng.sample(range(total), count))


def _struck(
    store: Store, scene: Scene, environ: tuple[str, ...], number: int, strike: Strike
) -> tuple[Outcome, bool]:
    """Run a command, strike from request ``number`` on; return its end, and whether it was struck."""
    known, pid = threading.Event(), [0]
    hit = [False]

    def fault(request: Request) -> int | str | None:
        known.wait()
        if request.number < number:
            return None
        hit[0] = True
        return strike(request, pid[0])

    store.fault = fault
    process, mark = start(*scene.command, wrap=environ)
    pid[0] = process.pid
    known.set()
    outcome = finish(process, mark)
    store.fault = lambda _: None
    return outcome, hit[0]


def _again(
    store: Store, scene: Scene, environ: tuple[str, ...], figures: Figures, what: str
) -> None:
    wrong = at_the_end(store, scene, run(*scene.command, wrap=environ))
    if wrong:
        figures.breach(f"{what}: the same command again: {wrong}")


def _killed(scene: Scene, what: str, strike: Strike, number: int) -> Figures:
    figures, where = Figures(), f"{scene.name}, {what} {number}"
    with scene.store() as (store, environ):
        _, hit = _struck(store, scene, environ, number, strike)
        figures.add(what, hit)
        wrong = halfway(store, scene)
        if wrong:
            figures.breach(f"{where}: {wrong}")
        figures.add("uploads left to the bucket's rules", len(store.uploads))
        _again(store, scene, environ, figures, where)
    return figures


def _faulty(scene: Scene, what: str, fault: Callable[[], Strike], number: int) -> Figures:
    """What passes by itself is no error, or one after which the same command goes on."""
    figures, where = Figures(), f"{scene.name}, {what} at {number}"
    with scene.store() as (store, environ):
        outcome, hit = _struck(store, scene, environ, number, fault())
        figures.add(what, hit)
        if outcome.code == 0:
            wrong = at_the_end(store, scene, outcome)
            if wrong:
                figures.breach(f"{where}: {wrong}")
            return figures
        figures.add("of these ended with an error")
        if not outcome.stderr.startswith("error:") or outcome.code is None or outcome.code < 0:
            figures.breach(f"{where}: exit {outcome.code}: {outcome.last_words}")
        wrong = halfway(store, scene)
        if wrong:
            figures.breach(f"{where}: {wrong}")
        _again(store, scene, environ, figures, where)
    return figures


def _zombie(scene: Scene, number: int) -> Figures:
    """A process goes silent with a request on its way; another one finishes; then it wakes up."""
    figures, where = Figures(), f"zombie at {number}"
    with scene.store() as (store, environ):
        heirs: list[Outcome] = []
        pids: list[int] = []

        def wake_late(_: Request, pid: int) -> int | str | None:
            if pids:
                return None
            pids.append(pid)
            os.kill(pid, signal.SIGSTOP)
            store.fault = lambda _: None  # for whoever comes now
            heir, mark = start(*scene.command, wrap=environ, module="scripts.campaigns.heir")
            heirs.append(finish(heir, mark))
            os.kill(pid, signal.SIGCONT)
            return None

        outcome, hit = _struck(store, scene, environ, number, wake_late)
        figures.add("zombies", hit)
        if not hit:
            return figures
        expected = {n: d for n, d in scene.expected.items() if n != MANIFEST}
        if heirs[0].code != 0:
            figures.breach(f"{where}: the heir: exit {heirs[0].code}: {heirs[0].last_words}")
        if written(store) != expected:
            figures.breach(f"{where}: other bytes")
        if outcome.code not in (0, _LOCKED, 1, 8):
            figures.breach(f"{where}: exit {outcome.code}: {outcome.last_words}")
        if store.names(_BUCKET, f"{_PREFIX}.streamconv/"):
            figures.add("of their requests came after the end: tidied by the next command")
        _again(store, scene, environ, figures, where)
    return figures


def _race(scene: Scene, _: int) -> Figures:
    """Four processes want one output at the same moment: one makes it, none disturbs it."""
    figures = Figures()
    with scene.store() as (store, environ):
        begun = [start(*scene.command, wrap=environ) for _ in range(4)]
        ends = [finish(process, mark) for process, mark in begun]
        figures.add("races of four")
        wrong = [o for o in ends if o.code not in (0, _LOCKED)]
        if wrong:
            figures.breach(f"race: exit {wrong[0].code}: {wrong[0].last_words}")
        if not any(o.code == 0 for o in ends):
            figures.breach("race: nobody made it")
        last = at_the_end(store, scene, next(o for o in ends if o.code == 0))
        if last:
            figures.breach(f"race: {last}")
    return figures


def _changing(source: Path, expected: dict[str, bytes], number: int) -> Figures:
    """A rank file is written anew between two requests: other bytes, the same size."""
    figures = Figures()
    store = Store()
    store.add_folder("in", source, "run/actor/")
    with serving(store) as address:
        environ = ("env", *(f"{k}={v}" for k, v in environment(address).items()))
        command = ("convert", "s3://in/run/actor", _TARGET, "--quiet", "--no-sync", *SMALL_FILES)

        def change(request: Request) -> None:
            if request.number != number:
                return
            name = next(n for n in store.names("in") if n.endswith("rank_1.pt"))
            data = bytearray(store.bytes_of("in", name))
            data[len(data) // 2] ^= 1
            store.put("in", name, bytes(data))
            figures.add("sources written anew")

        store.fault = lambda r: change(r)
        outcome = run(*command, wrap=environ)
        same = written(store) == {n: d for n, d in expected.items() if n != MANIFEST}
        whole = _PREFIX + MANIFEST in store.names(_BUCKET)
        if outcome.code == 0 and not same:
            figures.breach(f"changed at request {number}: exit 0 with other bytes")
        if outcome.code not in (0, _BAD_SOURCE) or (outcome.code != 0 and whole):
            figures.breach(f"changed at {number}: exit {outcome.code}: {outcome.last_words}")
    return figures


def _without_conditions(scene: Scene) -> Figures:
    figures = Figures()
    for ignored in ("if-match", "if-none-match"):
        with scene.store() as (store, environ):
            store.ignores = {ignored}
            outcome = run(*scene.command, wrap=environ)
            figures.add("stores that ignore conditions")
            if outcome.code != _BAD_USAGE or store.names(_BUCKET):
                figures.breach(f"{ignored} ignored: exit {outcome.code}, {store.names(_BUCKET)}")
    return figures


if __name__ == "__main__":
    main(campaign, count=1000)
