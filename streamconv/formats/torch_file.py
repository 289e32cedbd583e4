"""A whole model in one torch file, or in the files of Meta's tensor-parallel ranks.

``pytorch_model_fsdp.bin`` (Accelerate's FULL_STATE_DICT), ``model.pt``, ``lit_model.pth``, Lightning's
``X.ckpt``, ``{"model": {…}, "optimizer": {…}}``. Byte layout: :mod:`streamconv.torchfile.single`. A
trainer's keys lead to the tensors: which of them do not belong to the model's names, the model decides.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from streamconv.errors import BadInputError
from streamconv.formats import trainer_state
from streamconv.formats.identity import identify_torch_file
from streamconv.formats.side_folder import above, side_folder
from streamconv.formats.whole_tensors import stored_tensor
from streamconv.ir.source import Checkpoint, Skipped, SourceFile
from streamconv.torchfile.legacy import is_legacy
from streamconv.torchfile.single import read_torch_file

NAME = "torch_file"
FINISHED = False
SEVERAL = True

# Names that stand for a whole model in a folder. Any other file must be named itself.
_MODEL = re.compile(
    r"pytorch_model_fsdp\.bin|lit_model\.pth|torchtune_model_\d+\.pt|(model|checkpoint|state_dict)"
    r"\.(pt|pth|bin|ckpt)|.+\.ckpt",
    re.ASCII,
)
_ADAPTER = "lit_model.pth.lora"  # litgpt's; the model that it was merged into may lie beside it
SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".lora"})


def detect(path: Path) -> str | None:
    """Return why ``path`` looks like such a file, or a folder with one of them, or None."""
    found = _file(path)
    return found.name if found is not None else None


def side_dir(path: Path) -> Path | None:
    """Return the folder with config and tokenizer, where it is there."""
    folder = path if path.is_dir() else path.parent
    return side_folder(folder, above(folder))


def index_file(_: Path) -> Path | None:
    """Return None: the file describes itself."""
    return None


def identify(path: Path) -> tuple[SourceFile, ...]:
    """Return the file with size, time and the hash of its directory."""
    file = _one(path)
    return (identify_torch_file(file, file.parent),)


def read(path: Path) -> Checkpoint:
    """Read the metadata of the file ``path``, or of the one in that folder."""
    file = _one(path)
    contents = read_torch_file(file)
    names = contents.tensors
    states = trainer_state.states(names)
    others = Counter(reason for _, reason in contents.skipped)
    if states:
        others[trainer_state.STATE] += len(states)
    tensors = {n: stored_tensor(n, s, 0, file) for n, s in names.items() if n not in states}
    if not tensors:
        raise BadInputError("the file holds no weights", where=str(file))
    return Checkpoint(
        root=file.parent,
        format=NAME,
        files=(replace(identify_torch_file(file, file.parent), entry_prefix=contents.prefix),),
        tensors=MappingProxyType(tensors),
        side_dir=side_dir(path),
        skipped=tuple(Skipped(f"{n} values", reason) for reason, n in others.items()),
        facts=MappingProxyType({"file": file.name, "zip": not is_legacy(file)}),
        naming="trainer" if contents.nested else "hf",
    )


def _file(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix in SUFFIXES else None
    found = _files(path)
    return found[0] if len(found) == 1 else None


def _files(path: Path) -> list[Path]:
    if not path.is_dir() or path.name.startswith("mp_rank_"):  # a rank of Megatron's
        return []
    found = sorted(p for p in path.iterdir() if _MODEL.fullmatch(p.name) and p.is_file())
    return found or [p for p in (path / _ADAPTER,) if p.is_file()]


def _one(path: Path) -> Path:
    file = _file(path)
    if file is None:
        raise BadInputError(
            "no torch file with a model here",
            where=str(path),
            found=", ".join(p.name for p in _files(path)[:5]) or "none",
        )
    return file
