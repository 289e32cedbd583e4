"""DeepSpeed's checkpoints (``save_checkpoint``) as an input format.

Which files there are is told in :mod:`streamconv.formats.deepspeed.folder`, what they hold in
:mod:`streamconv.torchfile.zerofile`, how the weights lie in them in
:mod:`streamconv.formats.deepspeed.masters` and :mod:`streamconv.formats.deepspeed.ranks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from streamconv.errors import BadInputError
from streamconv.formats.assembly import Assembler
from streamconv.formats.deepspeed.flat import Part
from streamconv.formats.deepspeed.folder import list_files, tag_folder
from streamconv.formats.deepspeed.model import read_model
from streamconv.formats.deepspeed.ranks import Reader, Weights, in_order
from streamconv.formats.identity import identify_torch_file, source_file
from streamconv.formats.side_folder import above, side_folder
from streamconv.ir.source import Checkpoint, GlobalTensor, Skipped, SourceFile
from streamconv.torchfile.unpickle import no_garbage_collection
from streamconv.torchfile.zerofile import FileFacts

NAME = "deepspeed"
FINISHED = False
SEVERAL = True


def detect(path: Path) -> str | None:
    """Return why ``path`` looks like such a folder, or None."""
    tag = tag_folder(path)
    if tag is None:
        return None
    return "DeepSpeed's *_states.pt" + ("" if tag == path else f" in {tag.name}, as latest says")


def side_dir(path: Path) -> Path | None:
    """Return the folder with config and tokenizer beside or above the tag, where it is there."""
    tag = tag_folder(path) or path
    return side_folder(*((tag, above(tag)) if tag == path else (path,)))


def index_file(_: Path) -> Path | None:
    """Return None: no file describes the others."""
    return None


def identify(path: Path) -> tuple[SourceFile, ...]:
    """Return the files with size, time and directory hash, their pickles unread."""
    return tuple(identify_torch_file(file, path) for file in list_files(_tag(path)).all)


def _tag(path: Path) -> Path:
    tag = tag_folder(path)
    if tag is None:
        raise BadInputError(
            "no files of DeepSpeed here", where=str(path), expected="*_model_states.pt"
        )
    return tag


def read(path: Path) -> Checkpoint:
    """Read the metadata of the checkpoint in the folder ``path``.

    Raises :class:`BadInputError` for missing, mixed and damaged files, and for layouts that are not
    known; :class:`UnsafeInputError` when a file is a trap.
    """
    files = list_files(_tag(path))
    reader = Reader(files)
    with no_garbage_collection():
        weights = read_model(reader)
    assembler = Assembler()
    tensors = _tensors({**weights.masters, **weights.rest}, weights, assembler)
    if not tensors:
        raise BadInputError("the checkpoint holds no weights", where=str(files.folder))
    halves = _tensors(weights.halves, weights, assembler)
    trained = len(weights.masters)
    return Checkpoint(
        root=path,
        format=NAME,
        files=tuple(_source_file(p, reader.facts.get(k), path) for k, p in enumerate(files.all)),
        tensors=MappingProxyType(tensors),
        halves=MappingProxyType(halves),
        side_dir=side_dir(path),
        skipped=(
            *(Skipped(n, r) for n, r in sorted(reader.skipped.items())),
            *(Skipped(k, "kept by the trainer beside the weights") for k in reader.others),
            *([Skipped("the optimizer's moments", "optimizer state")] if trained else []),
        ),
        notices=tuple(reader.notices),
        facts=MappingProxyType(_facts(weights, files.folder.name)),
        modules=True,
    )


def _tensors(
    parts: Mapping[str, Part], weights: Weights, assembler: Assembler
) -> dict[str, GlobalTensor]:
    """Return the tensors in the order of the model, other names of one included."""
    made = {n: assembler.tensor(n, p.dtype, p.shape, p.pieces) for n, p in parts.items()}
    for alias, name in weights.aliases.items():
        if name in made and alias not in made:
            # A table of its own: the plan knows sources by their tables.
            table = dataclasses.replace(made[name].shards)
            made[alias] = dataclasses.replace(made[name], fqn=alias, shards=table)
    return dict(in_order(weights.order, made))


def _facts(weights: Weights, tag: str) -> dict[str, object]:
    said = weights.said
    return {
        "tag": tag,
        "zero_stage": weights.stage,
        "ranks": weights.ranks,
        "deepspeed": said.get("ds_version", "unknown"),
        "steps": said.get("global_steps", "unknown"),
        "weights": "fp32 masters" if weights.masters else "as the run computed with them",
    }


def _source_file(path: Path, facts: FileFacts | None, root: Path) -> SourceFile:
    if facts is None:
        return identify_torch_file(path, root)
    return source_file(path, facts, root)
