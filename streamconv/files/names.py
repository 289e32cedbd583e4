"""Names of files and tensors: those of an output folder, and those that strangers chose.

A name may hold line breaks, what drives a terminal or turns the direction of a text, and bytes that are
no text (Python keeps them as lone surrogates). Whatever is shown to people goes through
:func:`streamconv.errors.shown`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from streamconv.errors import BadInputError, shown

# Names that an output folder gives to what is neither a tensor nor a side file.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "streamconv.json"
# Those of older models.
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
# In it ModelOpt says what ``quantization_config`` does.
HF_QUANT_CONFIG = "hf_quant_config.json"

_LONGEST_PART = 255  # of one component, on all file systems that matter
_LONGEST_PATH = 4096  # that the system takes
_LONGEST_NAME = 1024
# The key of a safetensors header under which its own metadata stands.
_METADATA = "__metadata__"


def is_path(value: Any) -> bool:
    """Whether the system can be asked about a path, whatever it answers."""
    if not isinstance(value, str):
        return False
    try:
        raw = os.fsencode(value)
    except UnicodeEncodeError:
        return False
    fits = len(raw) < _LONGEST_PATH and all(len(p) <= _LONGEST_PART for p in raw.split(b"/"))
    return fits and b"\0" not in raw


def is_output_name(value: Any) -> bool:
    """Whether a name is that of a file in the folder, written in the one way that we write it."""
    return (
        is_path(value)
        and len(os.fsencode(value)) <= _LONGEST_NAME
        and all(part not in ("", ".", "..") for part in value.split("/"))
        and value != MANIFEST
    )


def shown_all(data: Any) -> Any:
    """Return plain data with every text in it as :func:`shown` has it."""
    if isinstance(data, str):
        return shown(data)
    if isinstance(data, Mapping):
        return {shown_all(k): shown_all(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [shown_all(v) for v in data]
    return data


def in_words(value: Any) -> str:
    """Return a fact about a checkpoint as people read it.

    >>> in_words({"tp": 2, "pp": [1, 2]}), in_words(False), in_words(None)
    ('tp 2, pp 1, 2', 'no', 'unknown')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {in_words(v)}" for key, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value)) or "none"
    return "unknown" if value is None else str(value)


def check_tensor_name(name: str) -> None:
    """Raise :class:`BadInputError` for a name that no safetensors file can hold."""
    if name == _METADATA:
        raise BadInputError(
            f"a tensor is called {_METADATA}, the one name that a safetensors file cannot hold",
            where=name,
            hint="rename it where the checkpoint was made",
        )
    if not _is_text(name):
        raise BadInputError(
            "a tensor's name is not text: a safetensors file cannot hold it",
            where=name,
            found="half of a surrogate pair in it",
            hint="rename it where the checkpoint was made",
        )


def check_file_name(path: str) -> None:
    """Raise :class:`BadInputError` for a file or folder whose name is not text."""
    if not _is_text(path):
        raise BadInputError(
            "the name of a file or folder is not UTF-8",
            where=path,
            hint="rename it: a model folder with such a name cannot be read everywhere",
        )


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
