"""Where a batch may put its outputs: not into checkpoints, nor over files of its own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from streamconv import formats
from streamconv.batch.state import holds_batch
from streamconv.errors import OutputExistsError, StreamconvError, UsageError
from streamconv.files.filesystems import real_path
from streamconv.files.names import MANIFEST
from streamconv.formats.steps import step_number
from streamconv.storage.address import Address


class MisplacedError(UsageError):
    """A file of the batch's own would lie among what is converted or published."""


def refuse_inside_checkpoint(output: Path, root: Path, what: str) -> None:
    """Refuse what lies in a checkpoint, or in a step of the run in ``root``.

    It would look like a change of the checkpoint, and go when that is rotated away. ``what`` it is
    stands in the error.
    """
    output, root = real_path(output), real_path(root)
    # Above the run as well as the output, a folder is whatever it is to others.
    for folder in [f for f in (output, *output.parents) if f not in root.parents]:
        in_step = root in folder.parents and step_number(folder.name) is not None
        if in_step or _is_checkpoint(folder):
            raise UsageError(
                f"{what} lies in a checkpoint",
                where=str(output),
                found=f"{folder}, which is {'a training step' if in_step else 'a checkpoint'}",
                hint="choose a folder beside the run",
            )


def _is_checkpoint(folder: Path) -> bool:
    try:
        return formats.detect(folder, finished=False) is not None
    except (StreamconvError, OSError):
        return False  # not to be looked into; whoever reads it says why


def refuse_own_files(output: Path, names: Iterable[str], own: Mapping[Path, str]) -> None:
    """Refuse names of outputs that take the place of a file of the batch's, or would hold it.

    ``own`` are those files, with what they are.
    """
    folder = real_path(output)
    outputs = {folder / name for name in names}
    files = {real_path(path): what for path, what in own.items()}
    over = [o for o in outputs if any(p in files for p in (o, *o.parents))]
    around = [o for f in files for o in f.parents if o in outputs]
    for path in sorted({*over, *around}):
        what = next(w for f, w in files.items() if path.is_relative_to(f) or f.is_relative_to(path))
        raise MisplacedError(
            f"an output would be where the batch keeps its {what}",
            where=str(path),
            hint="choose another --name, or another place for that file",
        )


def refuse_inside_output(path: Path, what: str) -> None:
    """Refuse a file in a published output: retention would take it for somebody else's, and stop."""
    for folder in real_path(path).parents:
        if (folder / MANIFEST).is_file():
            raise MisplacedError(
                f"{what} lies in an output",
                where=str(path),
                found=str(folder),
                hint="choose a path outside of it",
            )


def refusal_into_another(output: Path, root: Path) -> StreamconvError | None:
    """Return an error where an output of ``root`` would lie in another one, or would hold one."""
    found = _overlapping(output, root)
    if found is None:
        return None
    return OutputExistsError(
        "the output would be put into another one, or another into it",
        where=str(output),
        found=str(found),
        hint="choose another --name, or another output folder",
    )


def _overlapping(output: Path, root: Path) -> Path | None:
    for folder in output.parents:
        if folder == root:
            break
        if (folder / MANIFEST).is_symlink() or (folder / MANIFEST).exists():
            return folder
    return next((place for place in _outputs_below(output) if place != output), None)


def _outputs_below(folder: Path) -> Iterator[Path]:
    if isinstance(folder, Address):
        names = map(PurePosixPath, folder.bucket.below(folder.key))
        yield from (folder / name.parent for name in names if name.name == MANIFEST)
    else:
        yield from (Path(where) for where, _, names in os.walk(folder) if MANIFEST in names)


def output_inside(folder: Path) -> Path | None:
    """Return an output of streamconv's, or the folder of a batch, that lies in ``folder``."""
    for where, below, names in os.walk(folder):
        place = Path(where)
        if MANIFEST in names and any(n.endswith(".safetensors") for n in names):
            return place
        if holds_batch(place):
            return place
        below.sort()
    return None
