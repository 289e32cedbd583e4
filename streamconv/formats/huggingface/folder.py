"""A finished model in a folder: ``config.json`` and weights in safetensors files, or in torch's.

To convert one is to cut it into other files, to cast it, and to check it against its config. The bytes
of safetensors carry no checksums.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from streamconv.errors import BadInputError
from streamconv.formats.huggingface import pieces, weights
from streamconv.formats.side_folder import above, side_folder
from streamconv.ir.source import Checkpoint, GlobalTensor, SourceFile

NAME = "huggingface"
FINISHED = True
SEVERAL = True


def detect(path: Path) -> str | None:
    """Return why ``path`` looks like such a folder, or None."""
    found = weights.main_file(path)
    return found.name if found is not None else None


def side_dir(path: Path) -> Path | None:
    """Return the folder with config and tokenizer, where it is there."""
    return side_folder(*((path, above(path)) if _of_pieces(path) else (path,)))


def _of_pieces(path: Path) -> bool:
    """Whether this is what the pieces in the folder above were joined to."""
    return path.name == pieces.JOINED and pieces.holds(above(path))


def index_file(path: Path) -> Path | None:
    """Return the index of the files; None for a single one."""
    found = weights.main_file(path)
    return found if found is not None and found.suffix == ".json" else None


def identify(path: Path) -> tuple[SourceFile, ...]:
    """Return the weight files with size, time and the hash of their headers."""
    return weights.identify(_files(path), path)


def read(path: Path) -> Checkpoint:
    """Read the headers of the weight files in the folder ``path``."""
    files, tensors, skipped = weights.read(_files(path), path)
    notices: tuple[str, ...] = ()
    if _of_pieces(path):
        _check_pieces(path, tensors)
        notices = (f"{path.name}/ is taken, which the pieces beside it were joined to",)
    return Checkpoint(
        root=path,
        format=NAME,
        files=files,
        tensors=MappingProxyType(tensors),
        side_dir=side_dir(path),
        skipped=skipped,
        notices=notices,
        facts=MappingProxyType({"weight_files": len(files)}),
    )


def _check_pieces(path: Path, tensors: Mapping[str, GlobalTensor]) -> None:
    """Raise :class:`BadInputError` where what was joined is not of the shapes of its pieces."""
    for name, tensor in pieces.read(above(path)).tensors.items():
        joined = tensors.get(name)
        if joined is not None and (joined.shape, joined.dtype) != (tensor.shape, tensor.dtype):
            raise BadInputError(
                f"{path.name}/ is not what the pieces beside it make",
                where=f"{path}, {name}",
                expected=f"{tensor.dtype} {list(tensor.shape)}",
                found=f"{joined.dtype} {list(joined.shape)}",
                hint="move away what is not wanted",
            )


def _files(path: Path) -> list[Path]:
    files = weights.find(path)
    if not files:
        raise BadInputError("no weights of a model here", where=str(path))
    return files
