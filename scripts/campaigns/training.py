"""A training run that only pretends: it writes, rotates, goes back, rewrites and moves.

Its checkpoints are genuine files of torch, made out of one by changing the payload and its checksum, so
that each version of each step is a model that nothing else is.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

RANK_FILE = "model_world_size_1_rank_0.pt"
OPTIMIZER = "optim_world_size_1_rank_0.pt"
TRACKER = "latest_checkpointed_iteration.txt"
_FLOATS = 64
_MAKE = f"""
import sys, torch
torch.save({{"layer.weight": torch.ones(8, {_FLOATS // 8})}}, sys.argv[1])
"""


@dataclass(frozen=True)
class Item:
    """What was trained once: one version of one model of one step of one run."""

    run: str
    step: int
    model: str
    version: int

    @property
    def payload(self) -> bytes:
        """The bytes of its only tensor: floats between one and two."""
        dice = random.Random(repr(self))
        return b"".join(
            (0x3F800000 | dice.getrandbits(23)).to_bytes(4, "little") for _ in range(_FLOATS)
        )


@cache
def template(work: Path) -> bytes:
    """A rank file as torch writes it. Made by a process of its own: torch is not for those who fork."""
    path = work.parent / "rank-file.pt"
    if not path.exists():
        part = work / "rank-file.pt"
        subprocess.run([sys.executable, "-c", _MAKE, str(part)], check=True)
        part.replace(path)
    return path.read_bytes()


def rank_file(base: bytes, payload: bytes) -> bytes:
    """The same file with another payload, whole to its last checksum."""
    import io

    with zipfile.ZipFile(io.BytesIO(base)) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/data/0"))
        old = archive.read(name)
        crc = archive.getinfo(name).CRC
    assert len(old) == len(payload)
    data = bytearray(base)
    at = base.index(old)
    data[at : at + len(old)] = payload
    before, now = crc.to_bytes(4, "little"), zlib.crc32(payload).to_bytes(4, "little")
    at = -1
    while (at := base.find(before, at + 1)) >= 0:
        data[at : at + 4] = now
    return bytes(data)


@dataclass
class Training:
    """A run in the folder ``root``. ``skew`` is by how many seconds its machine's clock is ahead.

    ``whole`` is what lies in each step's folder now, ``untrainable`` what is whole there but for its
    optimizer, ``order`` when each item was finished, ``taken`` are items that training itself removed
    or wrote over, ``rewritten`` those of single steps written anew, or with the times of what lay there
    before: nobody can tell how old they are. ``broken`` are steps with a damaged file, ``files`` all
    that a whole folder must hold.
    """

    name: str
    root: Path
    base: bytes
    dice: random.Random
    critic: bool
    skew: float
    whole: dict[tuple[int, str], Item] = field(default_factory=dict)
    untrainable: dict[tuple[int, str], Item] = field(default_factory=dict)
    order: dict[Item, int] = field(default_factory=dict)
    taken: set[Item] = field(default_factory=set)
    rewritten: set[Item] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    files: dict[Path, bytes] = field(default_factory=dict)
    step: int = 0
    versions: int = 0
    breaches: list[str] = field(default_factory=list)
    writing: int | None = None

    def folder(self, step: int, model: str) -> Path:
        return self.root / f"global_step_{step}" / model

    @property
    def models(self) -> list[str]:
        return ["actor", "critic"] if self.critic else ["actor"]

    def written(self, item: Item) -> int:
        """When an item that is there was written, as its file says."""
        return (self.folder(item.step, item.model) / RANK_FILE).stat().st_mtime_ns

    def acts(self) -> Iterator[None]:
        """One thing that training does, bit by bit."""
        act: Callable[[], Iterator[None]] = self.dice.choices(
            [
                self._next,
                self._rotate,
                self._back,
                self._rewrite,
                self._tracker_lost,
                self._abandon,
            ],
            [60, 12, 8, 8, 6, 6],
        )[0]
        yield from act()

    def move(self) -> None:
        """Lie somewhere else from now on."""
        new = self.root.with_name(f"{self.root.name.partition('~')[0]}~{self.versions}-{self.step}")
        if new.exists():
            return
        self.root.rename(new)
        moved = {new / path.relative_to(self.root): data for path, data in self.files.items()}
        self.files, self.root = moved, new

    def _next(self) -> Iterator[None]:
        self.step += 10
        yield from self._write(self.step, tracked=self.dice.random() < 0.8)

    def _rewrite(self) -> Iterator[None]:
        steps = sorted({step for step, _ in self.whole})
        if steps:
            step = self.dice.choice(steps)
            yield from self._write(step, tracked=self.dice.random() < 0.5)
            there = (*self.whole.values(), *self.untrainable.values())
            self.rewritten |= {i for i in there if i.step == step}

    def _back(self) -> Iterator[None]:
        steps = sorted({step for step, _ in self.whole})[:-1]
        if steps:
            self.step = self.dice.choice(steps)
            yield from self._write(self.step + 10, tracked=True)
            self.step += 10

    def _rotate(self) -> Iterator[None]:
        steps = sorted({step for step, _ in self.whole})
        for step in steps[: -self.dice.randint(1, 4)]:
            for model in self.models:
                self._lose(step, model)
            shutil.rmtree(self.root / f"global_step_{step}", ignore_errors=True)
            yield

    def _abandon(self) -> Iterator[None]:
        """Break off in the middle of a step."""
        self.step += 10
        folder = self.folder(self.step, "actor")
        for model in self.models:
            self._lose(self.step, model)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RANK_FILE).write_bytes(self.base[: len(self.base) // 2])
        self.broken.add(self.step)
        yield

    def _tracker_lost(self) -> Iterator[None]:
        path = self.root / TRACKER
        path.unlink(missing_ok=True)
        how = self.dice.randrange(3)
        if how:
            path.write_text("" if how == 1 else "garbage\n")
        yield

    def _lose(self, step: int, model: str) -> None:
        for items in (self.whole, self.untrainable):
            item = items.pop((step, model), None)
            if item is not None:
                self.taken.add(item)
        folder = self.folder(step, model)
        self.files = {p: data for p, data in self.files.items() if folder not in p.parents}

    def _write(self, step: int, *, tracked: bool) -> Iterator[None]:
        """Write a step as trainers do: in place, file by file, the tracker last or never."""
        dice = self.dice
        self.writing = step
        same_times = dice.random() < 0.2
        damaged = dice.choice(("weights", "optimizer")) if dice.random() < 0.12 else ""
        made: dict[Path, bytes] = {}
        for model in self.models:
            self.versions += 1
            self._lose(step, model)
            folder = self.folder(step, model)
            folder.mkdir(parents=True, exist_ok=True)
            item = Item(self.name, step, model, self.versions)
            if same_times and (folder / RANK_FILE).exists():
                self.rewritten.add(item)
            data = rank_file(self.base, item.payload)
            optimizer = rank_file(self.base, item.payload[::-1])
            if damaged == "weights" and model == "actor":
                data = data.replace(item.payload[:8], bytes(8))
            elif damaged and model == "actor":  # no conversion reads it
                optimizer = optimizer.replace(item.payload[::-1][:8], bytes(8))
            for name, content in ((RANK_FILE, data), (OPTIMIZER, optimizer)):
                path = folder / name
                old = path.stat().st_mtime_ns if path.exists() else None
                try:
                    with path.open("wb") as stream:
                        half = len(content) // 2
                        stream.write(content[:half])
                        stream.flush()
                        yield
                        stream.write(content[half:])
                except FileNotFoundError:
                    self.breaches.append(f"step {step} was deleted while it was written")
                    self.writing = None
                    return
                if not path.exists():
                    self.breaches.append(f"step {step} was deleted while it was written")
                    self.writing = None
                    return
                when = int((time.time() + self.skew) * 1e9)
                os.utime(path, ns=(when, old if old is not None and same_times else when))
                made[path] = content
                yield
            if model != "actor" or damaged != "weights":
                items = self.untrainable if damaged and model == "actor" else self.whole
                items[step, model] = item
                self.order[item] = len(self.order)
        self.files |= made
        self.writing = None
        (self.broken.add if damaged else self.broken.discard)(step)
        if tracked:
            path = self.root / TRACKER
            path.write_text(str(step))
            when = time.time() + self.skew
            os.utime(path, (when, when))
        yield
