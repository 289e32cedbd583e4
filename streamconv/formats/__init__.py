"""Input formats: a module each, which answers what :class:`~streamconv.formats.format.Format` asks.

:mod:`streamconv.formats.finding` lists them, and finds the one model that a path means.
"""

from __future__ import annotations

from pathlib import Path

from streamconv.formats.finding import FORMATS, detect, find_model, model_names
from streamconv.formats.format import Format, Location
from streamconv.formats.fsdp import rank_files

__all__ = ["FORMATS", "Format", "Location", "detect", "find_model", "model_names", "settings"]


def settings(root: Path) -> list[tuple[str, str]]:
    """Return (name, hash) of files in the checkpoint ``root`` that decide how pieces go together."""
    return rank_files.settings(root)
