"""An adapter as PEFT saves it: adapter_config.json beside adapter_model.safetensors or .bin.

The names are PEFT's (``base_model.model.…lora_A.weight``); what of them is the base model's own is told
by :mod:`streamconv.lora.names`. safetensors files carry no checksums, the records of a torch file do.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from streamconv.errors import BadInputError
from streamconv.formats.huggingface import weights
from streamconv.ir.source import Checkpoint, SourceFile

NAME = "peft"
FINISHED = True
SEVERAL = False

_CONFIG = "adapter_config.json"
_SAFETENSORS = "adapter_model.safetensors"
_TORCH = "adapter_model.bin"
WEIGHTS = (_SAFETENSORS, _TORCH)
"""The files that PEFT would load, the first before the second."""


def detect(path: Path) -> str | None:
    """Return why ``path`` looks like such a folder, or None."""
    file = _weights(path)
    found = file is not None and (path / _CONFIG).is_file()
    return f"{_CONFIG} beside {file.name}" if found and file is not None else None


def _weights(path: Path) -> Path | None:
    """Return the file of weights that PEFT would load."""
    return next((f for n in WEIGHTS if (f := path / n).is_file()), None)


def side_dir(_: Path) -> Path | None:
    """Return None: config and tokenizer are the base model's."""
    return None


def index_file(_: Path) -> Path | None:
    """Return None: one file holds all."""
    return None


def identify(path: Path) -> tuple[SourceFile, ...]:
    """Return the file of weights with size, time and the hash of its header or directory."""
    return weights.identify([_file(path)], path)


def _file(path: Path) -> Path:
    file = _weights(path)
    if file is None:
        raise BadInputError(
            "an adapter without its weights",
            where=str(path),
            expected=f"{_SAFETENSORS} or {_TORCH}",
        )
    return file


def read(path: Path) -> Checkpoint:
    """Read the metadata of the adapter in the folder ``path``.

    Raises :class:`BadInputError` for a damaged file and for values that are not whole tensors,
    :class:`UnsafeInputError` for a hostile one.
    """
    files, tensors, skipped = weights.read([_file(path)], path)
    return Checkpoint(
        root=path,
        format=NAME,
        files=files,
        tensors=MappingProxyType(tensors),
        skipped=skipped,
        facts=MappingProxyType({"ranks": 1}),
    )
