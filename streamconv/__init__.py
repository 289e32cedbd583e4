"""Distributed training checkpoints to HuggingFace models: streamed, bounded in memory, bit for bit.

The public API is lazy, so that ``import streamconv`` costs nothing: neither numpy nor torch is
loaded before a function needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from streamconv._version import __version__

if TYPE_CHECKING:
    from streamconv.api import (
        convert,
        convert_all,
        inspect,
        open,  # noqa: A004 - meant to be qualified
        plan,
        upload,
        verify,
    )
    from streamconv.errors import (
        BadInputError,
        BudgetError,
        LockedError,
        NoSpaceError,
        OutputExistsError,
        SourceChangedError,
        StreamconvError,
        UnfitValuesError,
        UnsafeInputError,
        UsageError,
        VerificationError,
    )
    from streamconv.options import Event, JobOptions, Notice, Phase, Progress, Result, RunOptions

_HOME = {
    **dict.fromkeys(
        ("convert", "convert_all", "inspect", "open", "plan", "upload", "verify"), "streamconv.api"
    ),
    **dict.fromkeys(
        ("Event", "JobOptions", "Notice", "Phase", "Progress", "Result", "RunOptions"),
        "streamconv.options",
    ),
    **dict.fromkeys(
        (
            "BadInputError",
            "BudgetError",
            "LockedError",
            "NoSpaceError",
            "OutputExistsError",
            "SourceChangedError",
            "StreamconvError",
            "UnfitValuesError",
            "UnsafeInputError",
            "UsageError",
            "VerificationError",
        ),
        "streamconv.errors",
    ),
}

__all__ = [
    "BadInputError",
    "BudgetError",
    "Event",
    "JobOptions",
    "LockedError",
    "NoSpaceError",
    "Notice",
    "OutputExistsError",
    "Phase",
    "Progress",
    "Result",
    "RunOptions",
    "SourceChangedError",
    "StreamconvError",
    "UnfitValuesError",
    "UnsafeInputError",
    "UsageError",
    "VerificationError",
    "__version__",
    "convert",
    "convert_all",
    "inspect",
    "open",
    "plan",
    "upload",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
