"""Names of files in an output folder, as a manifest or a plan may have them."""

from __future__ import annotations

import os
from typing import Any

from streamconv.planned import MANIFEST

_LONGEST_PART = 255  # of one component, on all file systems that matter
_LONGEST_PATH = 4096  # that the system takes
_LONGEST_NAME = 1024


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
