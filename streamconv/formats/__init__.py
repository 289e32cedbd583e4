"""Input formats: a module each, which answers what :class:`~streamconv.formats.format.Format` asks.

:mod:`streamconv.formats.finding` lists them, and finds the one model that a path means. It is loaded
when it is first asked for: whoever executes a plan needs none of the formats.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamconv.formats.finding import FORMATS, detect, find_model, model_names, settings
    from streamconv.formats.format import Format, Location

__all__ = ["FORMATS", "Format", "Location", "detect", "find_model", "model_names", "settings"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "format" if name in ("Format", "Location") else "finding"
    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
