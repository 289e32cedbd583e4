"""Finds the checkpoints of a training run, whatever their format, by the names of files alone.

A run is a tree such as::

    ROOT/latest_checkpointed_iteration.txt
    ROOT/global_step_100/actor/model_world_size_8_rank_0.pt …     verl
    ROOT/global_step_100/critic/…
    ROOT/iter_0000100/…                                           Megatron
    ROOT/step-1000/.metadata                                      torch DCP

Whatever :func:`streamconv.formats.detect` recognises is a checkpoint; the nearest folder whose name
ends in a number says its step. Links are not followed: ``latest`` must not be converted twice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from streamconv import formats
from streamconv.batch.state import holds_batch
from streamconv.errors import BadInputError, StreamconvError

# Deep enough for ROOT/project/experiment/global_step_N/actor.
_MAX_DEPTH = 5
_STEP = re.compile(
    r"(?:global_?step|iter|iteration|step|checkpoint|ckpt|epoch)[-_]?(\d{1,18})",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint that was found.

    ``path`` is its folder, ``relative`` the same below the root (``.`` where it is the root).
    ``run`` is what stands before the step's folder (the root's name where nothing does),
    ``step_dir`` the step's folder and ``step`` its number, ``model`` what stands behind it
    (``actor``; empty where the step's folder is the checkpoint itself). ``beside`` is the folder with
    config and tokenizer where that is not in ``path``.
    """

    path: Path
    relative: Path
    run: str
    step: int | None
    step_dir: Path
    model: str
    format: str
    beside: Path | None = None

    @property
    def run_dir(self) -> Path:
        """Return the folder that holds the steps, where a trainer's tracker lies."""
        return self.step_dir.parent


def discover(
    root: Path,
    *,
    avoid: Collection[Path] = (),
    on_problem: Callable[[StreamconvError], None] = lambda _: None,
) -> list[Candidate]:
    """Return the checkpoints below ``root``, by run, step and model.

    ``avoid`` are folders not to look into: the outputs. Those of other batches are known by what a
    batch keeps there. ``on_problem`` is told of folders that cannot
    be looked into; one that goes while it is looked at is none.
    """
    if not root.is_dir():
        raise BadInputError("there is no such folder", where=str(root))
    hidden = {path.resolve() for path in avoid}
    found = list(_walk(root, root, hidden, 0, on_problem))
    return sorted(found, key=lambda c: (c.run, -1 if c.step is None else c.step, c.model))


def step_number(name: str) -> int | None:
    """Return the training step that a folder's name tells, or None.

    >>> step_number("global_step_100"), step_number("iter_0000200"), step_number("actor")
    (100, 200, None)
    """
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def _walk(
    root: Path,
    folder: Path,
    avoid: Collection[Path],
    depth: int,
    on_problem: Callable[[StreamconvError], None],
) -> Iterator[Candidate]:
    try:
        location = formats.detect(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        on_problem(_unreadable(folder, error))
        return
    except StreamconvError as error:
        on_problem(error)
        return
    if location is not None:
        yield _candidate(root, location)
        return
    if depth == _MAX_DEPTH:
        return
    try:
        with os.scandir(folder) as entries:
            below = sorted(
                e.name
                for e in entries
                if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)
            )
    except FileNotFoundError:
        return
    except OSError as error:
        on_problem(_unreadable(folder, error))
        return
    for name in below:
        path = folder / name
        if path.resolve() in avoid or holds_batch(path):
            continue
        yield from _walk(root, path, avoid, depth + 1, on_problem)


def _unreadable(folder: Path, error: OSError) -> StreamconvError:
    return StreamconvError(f"a folder cannot be read: {error.strerror}", where=str(folder))


def _candidate(root: Path, location: formats.Location) -> Candidate:
    path, side = location.root, location.side_dir
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
    return Candidate(
        path,
        relative,
        "/".join(run_parts) or root.resolve().name,
        step_number(step_dir.name),
        step_dir,
        "/".join(model_parts),
        location.format,
        None if side is None or side.is_relative_to(path) else side,
    )
