"""A source that is cut off, deleted, overwritten or replaced while it is read: never published.

COUNT conversions of tiny checkpoints in process; at a random one of the system calls that look at
the source a random file of it changes. Then the conversion ends with exit code 5, or, where the
change came before anything of the file was looked at, or after the last look, with the output of
what was read.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from scripts.campaigns.common import Figures, main
from scripts.campaigns.inproc import each_number
from scripts.makers.tiny import LAYOUTS, make_tiny
from streamconv import api
from streamconv.errors import StreamconvError
from streamconv.executor.budget import smallest_run_bytes
from streamconv.planning import child

_LOOKS = ("open", "pread", "preadv", "stat", "fstat")


def campaign(work: Path, count: int, seed: int) -> Figures:
    # As the child does it, but here, where the calls can be counted.
    child._ask = lambda request, **_: child._TASKS[request["task"]](request)
    sources = {}
    for layout in LAYOUTS:
        for crc in (True, False):
            folder = make_tiny(work / "sources" / f"{layout}-{crc}", layout, crc=crc)
            other = make_tiny(work / "others" / f"{layout}-{crc}", layout, crc=crc, salt="other")
            sources[folder.name] = (folder, other)
    trial = partial(_trial, sources, seed)
    # Windows of a budget that is large enough to plan are large too, though never filled here.
    return each_number(work, count, trial, on_crash=_crashed, memory_bytes=8 << 30)


def _cut(path: Path, _: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _delete(path: Path, _: Path, __: random.Random) -> None:
    path.unlink()


def _append(path: Path, _: Path, __: random.Random) -> None:
    with path.open("ab") as stream:
        stream.write(b"x")


def _overwrite(path: Path, _: Path, rng: random.Random) -> None:
    """Bytes of the file change in place, as by a writer that has not finished."""
    with path.open("r+b") as stream:
        stream.seek(rng.randrange(path.stat().st_size))
        stream.write(rng.randbytes(rng.randint(1, 200)))


def _replace(path: Path, other: Path, _: random.Random) -> None:
    """Another step's file of the same name and size takes its place."""
    shutil.copyfile(other, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _rewrite(path: Path, other: Path, _: random.Random) -> None:
    """Another step's bytes are written into the same file."""
    with path.open("r+b") as stream:
        stream.write(other.read_bytes())


CHANGES = (_cut, _delete, _append, _overwrite, _replace, _rewrite)


def _trial(sources: dict[str, tuple[Path, Path]], seed: int, folder: Path, number: int) -> Figures:
    rng, figures = random.Random(f"{seed}/{number}"), Figures()
    name = sorted(sources)[number % len(sources)]
    original, other = sources[name]
    figures.add("changes")
    change = rng.choice(CHANGES)
    shutil.rmtree(folder)
    source = folder / "source"
    shutil.copytree(original, source)
    looks = _count_looks(source, folder / "counted")
    at = rng.randrange(looks)
    victim = rng.choice(sorted(source.iterdir()))
    where = f"change {number}: {name}, {change.__name__} {victim.name} at look {at} of {looks}"
    log: list[str] = []
    try:
        with _at_look(source, at, partial(change, victim, other / victim.name, rng), log):
            _convert(source, folder / "out")
    except StreamconvError as error:
        figures.add("never published")
        if error.exit_code not in (5, 6):
            figures.breach(f"{where}: {error.exit_code}, {error}")
        if (folder / "out").exists():
            figures.breach(f"{where}: refused but published")
        return figures
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        figures.breach(f"{where}: {type(error).__name__}: {error}")
        return figures
    found = _weights(folder / "out")
    if found == _weights(folder / "counted"):
        last = max((k for k, path in enumerate(log) if path == victim.name), default=-1)
        figures.add("after the last look at the file" if at > last else "harmless")
        return figures
    _convert(source, folder / "again")  # must then be all of the changed source
    if found != _weights(folder / "again"):
        figures.breach(f"{where}: a mixture was published")
    figures.add("before the first look: the changed source was converted")
    return figures


def _convert(source: Path, out: Path) -> None:
    budget = f"{(smallest_run_bytes() + (500 << 20)) // 1000}kB"
    api.convert(source, out, sync=False, max_mem=budget)


def _weights(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.glob("*.safetensors")}


def _count_looks(source: Path, out: Path) -> int:
    log: list[str] = []
    with _at_look(source, -1, lambda: None, log):
        _convert(source, out)
    return len(log)


@contextmanager
def _at_look(source: Path, at: int, change: Callable[[], None], log: list[str]) -> Iterator[None]:
    """Call ``change`` before the ``at``-th look at a file of ``source``; log the files looked at."""
    before = {name: getattr(os, name) for name in _LOOKS}
    busy = False

    def looking(name: str, target: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal busy
        path = looked_at(target)
        if path.parent == source and not busy:
            log.append(path.name)
            if len(log) - 1 == at:
                busy = True
                change()
                busy = False
        return before[name](target, *arguments, **options)

    def looked_at(target: Any) -> Path:
        if isinstance(target, int):
            return Path(f"/proc/self/fd/{target}").readlink()
        return Path(target)

    for name in _LOOKS:
        setattr(os, name, partial(looking, name))
    try:
        yield
    finally:
        for name, call in before.items():
            setattr(os, name, call)


def _crashed(number: int, signal: str) -> Figures:
    return Figures(breaches=[f"change {number}: ended by {signal}"])


if __name__ == "__main__":
    main(campaign, count=5_000)
