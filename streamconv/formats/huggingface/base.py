"""The base model that an adapter is merged into: a finished model that ``--base`` names."""

from __future__ import annotations

from pathlib import Path

from streamconv.errors import UsageError
from streamconv.files.names import INDEX, SINGLE
from streamconv.formats.huggingface import weights
from streamconv.ir.source import GlobalTensor, SourceFile


def identify(folder: Path) -> tuple[SourceFile, ...]:
    """Return the weight files with size, time and hash; their paths are absolute.

    A plan's root is the checkpoint's. Raises :class:`UsageError` where there are none,
    :class:`BadInputError` for a damaged index.
    """
    return weights.identify(_files(folder), None)


def read(folder: Path, first_file: int) -> tuple[tuple[SourceFile, ...], dict[str, GlobalTensor]]:
    """Return the weight files and the tensors; the files are numbered from ``first_file`` on."""
    files, tensors, _ = weights.read(
        _files(folder), None, first_file, placement="whole, of the base model"
    )
    return files, tensors


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UsageError("--base names no folder", where=str(folder))
    files = weights.find(folder)
    if not files:
        raise UsageError(
            "--base names no folder of a model",
            where=str(folder),
            expected=f"{INDEX}, or {SINGLE}",
            found=", ".join(f.name for f in sorted(folder.glob("*.safetensors"))[:5])
            or "no safetensors file",
        )
    return files
