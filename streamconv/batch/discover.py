"""Finds the checkpoints of a training run, whatever their format, by the names of files alone.

A run is a tree such as::

    ROOT/latest_checkpointed_iteration.txt
    ROOT/global_step_100/actor/model_world_size_8_rank_0.pt …     verl
    ROOT/global_step_100/critic/…
    ROOT/iter_0000100/…                                           Megatron
    ROOT/step-1000/.metadata                                      torch DCP
    ROOT/checkpoints/epoch=0-step=100.ckpt                        Lightning: a file for each step

Whatever :func:`streamconv.formats.detect` recognises is a checkpoint; the nearest folder whose name
ends in a number says its step. Links are not followed: ``latest`` must not be converted twice. What is
left out for that or another reason, though it is a checkpoint, is named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from streamconv import formats
from streamconv.batch.removal import is_aside, put_aside
from streamconv.batch.state import holds_batch
from streamconv.errors import BadInputError, StreamconvError
from streamconv.files.filesystems import real_path
from streamconv.files.inputs import cannot_read, reading
from streamconv.files.names import MANIFEST
from streamconv.formats import finding, torch_file
from streamconv.formats.megatron import rank_folders
from streamconv.formats.steps import MARKERS, step_files, step_number
from streamconv.storage.address import Address

# Deep enough for every run; links being left out, it ends anyway.
_MAX_DEPTH = 24
_MOST_FOLDERS = 20_000
# What trainers keep in folders like a model's, and what they call the folder of a model's own weights.
_STATE = re.compile(r"optim|extra|rng|sched|dataload", re.IGNORECASE)
_OWN = frozenset({"dist_ckpt", "model", "model/dist_ckpt"})
_OF_A_MODEL = frozenset({"model", "huggingface", "consolidated"})
_FINISHED = frozenset(f.NAME for f in formats.FORMATS if f.FINISHED)
_COMMON = _FINISHED | {torch_file.NAME}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint that was found.

    ``path`` is its folder or file, ``relative`` the same below the root (``.`` where it is the root).
    ``run`` is what stands before the step's folder (the root's name where nothing does),
    ``step_dir`` the step's folder and ``step`` its number, ``model`` what stands behind it
    (``actor``; empty where the step's folder is the checkpoint itself). ``beside`` is the folder with
    config and tokenizer where that is not in ``path``. ``finished`` says that it is a model that nobody
    trains any more, in the format of the outputs.
    """

    path: Path
    relative: Path
    run: str
    step: int | None
    step_dir: Path
    model: str
    format: str
    beside: Path | None = None
    finished: bool = False

    @property
    def run_dir(self) -> Path:
        """Return the folder that holds the steps, where a trainer's tracker lies."""
        return self.step_dir.parent

    @property
    def place(self) -> Path:
        """Return what to call it below the root: for a finished model, as its training's is called."""
        place = self.relative
        if self.step_dir == self.path and place.suffix == ".ckpt":
            place = place.with_suffix("")
        while self.finished and place.name in _OF_A_MODEL and place.parent != Path():
            place = place.parent
        return place

    def is_called(self, model: str | None) -> bool:
        """Whether ``model`` names it, with all that stands behind the step or the first of that."""
        return model in (self.model, self.model.split("/")[0])


def discover(
    root: Path,
    *,
    avoid: Collection[Path] = (),
    on_problem: Callable[[StreamconvError], None] = lambda _: None,
    on_notice: Callable[[str], None] = lambda _: None,
) -> list[Candidate]:
    """Return the checkpoints below ``root``, by run, step and model.

    ``avoid`` are folders not to look into: the outputs. Those of other batches are known by what a
    batch keeps there. ``on_problem`` is told of folders that cannot
    be looked into; one that goes while it is looked at is none. ``on_notice`` is told of checkpoints
    that are left out.
    """
    with reading(root):
        there = root.is_dir()
    if not there:
        raise BadInputError("there is no such folder", where=str(root))
    walk = _Walk(root, {real_path(path) for path in avoid}, on_problem, on_notice)
    found = list(walk.below(root, 0))
    trained = {c.step_dir for c in found if not (c.finished or is_state(c.model))}
    beside = [c for c in found if c.finished and c.step_dir in trained]
    for c in beside:
        on_notice(f"{c.path}: not converted, for it is a finished model beside what was trained")
    found = [c for c in found if c not in beside]
    walk.name_links({real_path(c.path) for c in found})
    return sorted(found, key=lambda c: (c.run, -1 if c.step is None else c.step, c.model))


def models_of(
    found: Collection[Candidate], wanted: str | None, on_notice: Callable[[str], None]
) -> list[Candidate]:
    """Return the candidates that are models: what a trainer keeps beside one to go on is not.

    Nor is it in a step whose model was deleted. What is ``wanted`` by its name is a model, whatever it
    is called; ``on_notice`` gets a line for each of the others.
    """
    with_models = {c.run_dir for c in found if not is_state(c.model)}
    models = []
    for c in found:
        if is_state(c.model) and c.run_dir in with_models and not c.is_called(wanted):
            on_notice(
                f"{c.path}: not converted, for by its name it is a state of training beside a model; "
                f"--model {c.model.split('/')[0]} says that it is one"
            )
        else:
            models.append(c)
    return models


def is_state(model: str) -> bool:
    """Whether what stands behind a step is called as a state of training is."""
    return any(map(finding.is_state, model.split("/")))


def checkpoints_in(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints in ``folder``, itself included, one in another too.

    It gives up in a tree so large that nobody meant it to be a run.
    """
    pending = [folder]
    for _ in range(_MOST_FOLDERS):
        if not pending:
            return
        here = pending.pop()
        try:
            if formats.detect(here, finished=False) is not None:
                yield here
            # Thousands of these may be in a checkpoint of Megatron's, and they are not checkpoints.
            below = [here / name for name in _folders(here)]
            pending += [path for path in reversed(below) if not rank_folders.is_rank_folder(path)]
        except (StreamconvError, OSError):
            continue  # whoever reads it says why


def checkpoint_inside(folder: Path) -> Path | None:
    """Return another checkpoint that lies in the checkpoint ``folder``; None where there is none.

    Optimizer states are none, nor is a folder in which its own weights lie.
    """
    inside = _named_inside(folder)
    own = _weight_files(folder) if inside else set()
    return next((p for p in inside if not _weight_files(p) or _weight_files(p) - own), None)


def _named_inside(folder: Path) -> list[Path]:
    below = [path for path in checkpoints_in(folder) if path != folder]
    return [p for p in below if not any(map(_STATE.match, p.relative_to(folder).parts))]


def _weight_files(folder: Path) -> set[Path]:
    try:
        location = formats.detect(folder)
        found = () if location is None else location.identify()
    except (StreamconvError, OSError):
        return set()  # whoever reads it says why
    return {folder / f.path for f in found}


def _is_output(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _folders(folder: Path) -> list[str]:
    if isinstance(folder, Address):
        return [p.name for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir()]
    with os.scandir(folder) as entries:
        return sorted(
            e.name
            for e in entries
            if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)
        )


def _links(folder: Path) -> list[str]:
    """Return the links in ``folder`` that lead to folders."""
    if isinstance(folder, Address):
        return []
    with os.scandir(folder) as entries:
        # Not is_dir() of the entry: that raises for a link to itself.
        return sorted(e.name for e in entries if e.is_symlink() and Path(e.path).is_dir())


class _Walk:
    """One walk through a run. Folders that could be looked into are told of, and so are checkpoints."""

    def __init__(
        self,
        root: Path,
        avoid: Collection[Path],
        on_problem: Callable[[StreamconvError], None],
        on_notice: Callable[[str], None],
    ) -> None:
        self._root = root
        self._avoid = avoid
        self._problem = on_problem
        self._notice = on_notice
        self._links: list[Path] = []

    def below(self, folder: Path, depth: int) -> Iterator[Candidate]:
        """Yield the checkpoints in ``folder``."""
        try:
            location = formats.detect(folder)
            if location is not None:
                found = candidate_at(self._root, folder, location.format, location.side_dir)
                if not found.finished:
                    self._name_inside(folder)
                # What others make and keep is called so as well: only what training left in a step.
                common = found.format in _COMMON
                if not common or (found.step is not None and not _is_output(folder)):
                    yield found
                    return
            for file in [] if _is_output(folder) else step_files(folder):
                side = torch_file.side_dir(file)
                yield candidate_at(self._root, file, torch_file.NAME, side)
            below = _folders(folder)
            if any((folder / name).is_file() for name in MARKERS):
                below = [name for name in below if not finding.is_state(name)]
            self._links += [folder / name for name in _links(folder)]
            for path in folder.glob(".*"):
                if is_aside(path.name):
                    self._notice(put_aside(path))
        except FileNotFoundError:
            return
        except OSError as error:
            self._problem(_unreadable(folder, error))
            return
        except StreamconvError as error:
            self._problem(error)
            return
        if depth == _MAX_DEPTH and below:
            self._notice(f"{folder}: folders so deep are not looked into")
            return
        for name in below:
            path = folder / name
            if real_path(path) in self._avoid or holds_batch(path):
                self._name_among_outputs(path)
            else:
                yield from self.below(path, depth + 1)

    def _name_inside(self, folder: Path) -> None:
        inside = [p for p in _named_inside(folder) if p.relative_to(folder).as_posix() not in _OWN]
        own = _weight_files(folder) if inside else set()
        for path in inside:
            files = _weight_files(path)
            if not files or files - own:
                self._notice(f"{path}: not converted, for it lies in another checkpoint")

    def _name_among_outputs(self, folder: Path) -> None:
        for inside in checkpoints_in(folder):
            self._notice(f"{inside}: not converted, for it lies in an output folder, {folder}")

    def name_links(self, found: Collection[Path]) -> None:
        """Name the checkpoints that only a link leads to."""
        for link in self._links:
            target = Path(os.path.realpath(link))
            if real_path(self._root).is_relative_to(target):
                continue
            if any(target.is_relative_to(p) for p in self._avoid):
                continue
            for path in checkpoints_in(target):
                if not any(path.is_relative_to(f) for f in found):
                    self._notice(
                        f"{link}: not converted, for it is a link; to convert it, give the folder that "
                        f"it leads to, {path}"
                    )


def _unreadable(folder: Path, error: OSError) -> StreamconvError:
    return cannot_read(error, folder)


def candidate_at(root: Path, path: Path, format_name: str, side: Path | None = None) -> Candidate:
    """Return the candidate that a checkpoint in ``path`` is, there or not; ``side`` has its config."""
    relative = path.relative_to(root)
    parts = relative.parts
    step_at = next(
        (i for i in reversed(range(len(parts))) if step_number(parts[i]) is not None), None
    )
    if step_at is None:
        # No step in sight: each folder is a model of its own; ROOT itself may be a step's folder.
        own = [
            p for p in (path, *path.parents)[: len(parts) + 1] if step_number(p.name) is not None
        ]
        step_dir = own[0] if own else path
        run_parts, model_parts = parts[:-1], parts if own else ()
    else:
        step_dir = root.joinpath(*parts[: step_at + 1])
        run_parts, model_parts = parts[:step_at], parts[step_at + 1 :]
    finished = format_name in _FINISHED
    if finished:
        # verl has actor/model/huggingface, NeMo Automodel model/consolidated: the model is the actor.
        while model_parts and model_parts[-1] in _OF_A_MODEL:
            model_parts = model_parts[:-1]
    return Candidate(
        path,
        relative,
        "/".join(run_parts) or real_path(root).name,
        step_number(step_dir.name),
        step_dir,
        "/".join(model_parts),
        format_name,
        None if side is None or side.is_relative_to(path) else side,
        finished,
    )
