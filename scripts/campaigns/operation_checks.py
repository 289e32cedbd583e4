"""What must hold after each round of ``operation``, by a model that owes streamconv nothing."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scripts.campaigns.common import Figures
from scripts.campaigns.training import OPTIMIZER, RANK_FILE, Item, Training

_CODES = {0, 1, 2, 3, 5, 7, 8, 11, 130, 143, -signal.SIGKILL, -signal.SIGTERM}
_OF_FORK = "Exception ignored in: <function _releaseLock"


@dataclass
class Batch:
    """A command, what it may remove, and its process."""

    run: Training
    out: Path
    options: list[str]
    last: int | None
    every: int | None
    pid: int = 0
    said: Path = Path()
    code: int | None = None

    @property
    def applies(self) -> bool:
        return "--apply" in self.options

    @property
    def deletes(self) -> bool:
        return {"--apply", "--delete-sources", "--verify"} <= {*self.options}


@dataclass
class Scene:
    """Two runs, their output folders, and what is known of both."""

    folder: Path
    dice: random.Random
    label: str
    figures: Figures
    runs: list[Training] = field(default_factory=list)
    outs: list[Path] = field(default_factory=list)
    bystanders: dict[Path, bytes] = field(default_factory=dict)
    items: dict[bytes, Item] = field(default_factory=dict)
    seen_in: dict[Item, int] = field(default_factory=dict)
    clock: float = 0.0
    number: int = 0
    story: list[str] = field(default_factory=list)

    def moved(self, old: Path, new: Path) -> None:
        """Look for what others keep in a folder where that is now."""
        self.bystanders = {
            (new / p.relative_to(old) if p.is_relative_to(old) else p): data
            for p, data in self.bystanders.items()
        }

    def breach(self, what: str) -> None:
        """Note a breach, and keep what led to it beside the folders of all scenes."""
        self.figures.breach(f"{self.label} round {self.number}: {what}")
        path = self.folder.parent.parent / f"{self.label.replace(' ', '-')}.txt"
        path.write_text("\n".join([*self.story, f"BREACH {what}", ""]))


@dataclass
class Look:
    """What is there at one moment: items as whole sources, and what lies at each output's path.

    ``trained`` are the items that training left in its folders, whatever became of them, ``weights``
    those whose weights are there, with or without a whole optimizer, ``trainable`` the sources in steps
    that are whole altogether.
    """

    sources: set[Item]
    weights: set[Item]
    trainable: set[Item]
    outputs: dict[Path, Item | None]
    trained: set[Item]

    @property
    def items(self) -> set[Item]:
        return self.sources | {item for item in self.outputs.values() if item is not None}

    @staticmethod
    def at(scene: Scene) -> Look:
        sources, weights = set(), set()
        for run in scene.runs:
            # One that training has broken off may have left a file of an item that is no more.
            for item in run.order:
                scene.items.setdefault(item.payload, item)
                scene.seen_in.setdefault(item, scene.number)
            for (step, model), item in [*run.whole.items(), *run.untrainable.items()]:
                folder = run.folder(step, model)
                want = {folder / RANK_FILE, folder / OPTIMIZER}
                if all(p.is_file() and p.read_bytes() == run.files.get(p) for p in want):
                    weights.add(item)
                    if item in run.whole.values():
                        sources.add(item)
        found = {
            path: scene.items.get(data)
            for out in set(scene.outs)
            for path, data in outputs_below(out)
        }
        trained = {item for run in scene.runs for item in run.whole.values()}
        broken = {run.name: run.broken for run in scene.runs}
        trainable = {i for i in sources if i.step not in broken[i.run]}
        return Look(sources, weights, trainable, found, trained)


def outputs_below(out: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield the outputs below a folder, with the bytes of their tensor."""
    for folder, below, names in os.walk(out):
        below[:] = [b for b in below if not b.startswith(".")]
        if "streamconv.json" in names:
            yield Path(folder), _tensor(Path(folder, "model.safetensors"))


def _tensor(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        begin, end = json.loads(raw[8 : 8 + size])["layer.weight"]["data_offsets"]
        return raw[8 + size + begin : 8 + size + end]
    except (OSError, ValueError, KeyError):
        return b""


def check_end(scene: Scene, batch: Batch) -> str:
    """Check how a batch ended, and return what it said."""
    # One that was killed the moment it was forked has no file yet.
    said = batch.said.read_text(errors="replace") if batch.said.exists() else ""
    batch.said.unlink(missing_ok=True)
    scene.story.append(f"{batch.run.name} to {batch.out} {batch.options}: {batch.code}\n{said}")
    # A signal between two instructions of fork's own: only a process that forks as ours can tell it.
    tracebacks = said.count("Traceback") - said.count(_OF_FORK)
    if batch.code not in _CODES or tracebacks > 0 or "internal:" in said:
        scene.breach(f"ended with {batch.code}: {said[-800:]}")
    return said


def check_hooks(scene: Scene) -> None:
    log = scene.folder / "hooks.log"
    told = set(log.read_text().splitlines()) if log.exists() else set()
    for out in set(scene.outs):
        for path in (out / ".streamconv-batch" / "jobs").glob("*.json"):
            record = json.loads(path.read_text())
            notes = out / ".streamconv-batch" / "hooks"
            due = record["due"] and f".{record['due']}"
            noted = any(notes.glob(f"{path.stem}{due}.json")) or (
                not due and any(notes.glob(f"{path.stem}.????????.json"))
            )
            there = record["state"] == "done" and (out / record["name"]).exists()
            if there and f"done {record['name']}" not in told and not noted:
                scene.breach(f"no hook ran, and none is due: {record['name']}")


def check(scene: Scene, before: Look, batches: list[Batch]) -> None:
    after = Look.at(scene)
    for run in scene.runs:
        for breach in run.breaches:
            scene.breach(breach)
        run.breaches.clear()
    for path, content in scene.bystanders.items():
        if not path.is_file() or path.read_bytes() != content:
            scene.breach(f"a file of others is gone or changed: {path}")
    flipped = {p for p, item in before.outputs.items() if item is None}
    for path, item in after.outputs.items():
        if item is None and path not in flipped:
            scene.breach(f"an output is no model that was trained: {path}")
        if item is not None and str(item.step) not in str(path):
            scene.breach(f"an output lies under another's name: {path} is {item}")
    taken = {item for run in scene.runs for item in run.taken}
    finished = {item for run in scene.runs for item in run.whole.values()} - before.trained
    for path, item in before.outputs.items():
        now = after.outputs.get(path)
        if item is None or now == item:
            continue
        if path in after.outputs and now is not None:
            same = (now.run, now.step, now.model) == (item.run, item.step, item.model)
            if not same:
                scene.breach(f"an output of {item} was replaced by one of {now}")
            continue
        why = _why_not(scene, path, item, after, batches)
        if why:
            scene.breach(f"an output was removed although {why}: {path} ({item})")
    for item in (before.items | finished) - after.items:
        if item in before.outputs.values():
            continue  # judged above
        if item in taken:
            continue  # training took it before anybody could convert it
        deleting = [b for b in batches if b.run.name == item.run and b.deletes]
        if any(_why_not(scene, b.out, item, after, batches) == "" for b in deleting):
            continue  # it was converted, and its output removed, in one round
        scene.breach(f"{item} is neither a source nor an output any more")
    for run in scene.runs:
        gone = {i for i in before.sources if i.run == run.name} - after.sources - run.taken
        if gone:
            scene.figures.add("sources deleted", len(gone))
            # What training itself wrote over meanwhile was there when it counted.
            there = {*after.trainable, *(before.trainable & run.taken)}
            if not any(
                i.run == run.name and all(_is_later(run, i, g) for g in gone) for i in there
            ):
                scene.breach(f"no step to train on is left beside {sorted(gone, key=repr)}")
    scene.figures.add("outputs made", len(after.outputs.keys() - before.outputs.keys()))
    scene.figures.add("outputs removed", len(before.outputs.keys() - after.outputs.keys()))


def _is_later(run: Training, one: Item, other: Item) -> bool:
    """Whether training can go on from ``one`` in place of ``other``.

    A single step that was written over, with its old times at that, is still the step that it was.
    """
    again = other in run.rewritten and one.step > other.step
    return again or run.order[one] > run.order[other]


def _why_not(scene: Scene, path: Path, item: Item, after: Look, batches: list[Batch]) -> str:
    """Return why retention must not have removed an output, by the rule as README tells it."""
    rules = [
        b
        for b in batches
        if b.applies
        and path.is_relative_to(b.out)
        and (b.last or b.every)
        and b.run.name == item.run
    ]
    if not rules:
        return "no rule of its run was to be applied"
    run = next(r for r in scene.runs if r.name == item.run)
    unclear = item in run.rewritten  # is it an old step anew, or did training go back to it?
    newer = [
        other
        for other in after.outputs.values()
        if other is not None
        and (other.run, other.model) == (item.run, item.model)
        and (
            run.order[other] > run.order[item]
            or ((unclear or scene.seen_in[other] == scene.seen_in[item]) and other.step > item.step)
        )
    ]
    reasons = []
    for rule in rules:
        if rule.every and item.step % rule.every == 0:
            reasons.append(f"{rule.every} divides its step")
        elif rule.last and len(newer) < rule.last:
            reasons.append(f"only {len(newer)} newer ones are there of {rule.last}")
        else:
            return ""
    return "; ".join(reasons)
