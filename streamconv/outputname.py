"""Names of files in an output folder, as a manifest or a plan may have them."""

from __future__ import annotations

import os
from typing import Any

from streamconv.planned import MANIFEST

_LONGEST_NAME = 255  # of one component, on all file systems that matter
_LONGEST_PATH = 1024


def is_output_name(value: Any) -> bool:
    """Whether a name is that of a file in the folder, written in the one way that we write it."""
    if not isinstance(value, str):
        return False
    try:
        raw = os.fsencode(value)
    except UnicodeEncodeError:
        return False
    parts = value.split("/")
    return (
        len(raw) <= _LONGEST_PATH
        and b"\0" not in raw
        and all(part not in ("", ".", "..") for part in parts)
        and all(len(os.fsencode(part)) <= _LONGEST_NAME for part in parts)
        and value != MANIFEST
    )
