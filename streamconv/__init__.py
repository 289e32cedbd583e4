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
        average,
        begin,
        convert,
        convert_all,
        convert_async,
        diff,
        difference,
        doctor,
        finish,
        inspect,
        open,  # noqa: A004 - meant to be qualified
        part,
        plan,
        run,
        upload,
        verify,
    )
    from streamconv.batch.calls import convert_run, status
    from streamconv.conversion.display import ProgressBar
    from streamconv.conversion.lazy import LazyCheckpoint, LazyTensor
    from streamconv.errors import (
        BadInputError,
        BudgetError,
        CancelledError,
        ClosedError,
        DamagedPlanError,
        LockedError,
        NoSpaceError,
        OutputExistsError,
        SourceChangedError,
        StreamconvError,
        UnfinishedError,
        UnfitValuesError,
        UnsafeInputError,
        UsageError,
        VerificationError,
    )
    from streamconv.ir.planfile import Plan
    from streamconv.options import (
        AverageOptions,
        Cancel,
        Event,
        JobOptions,
        Notice,
        Phase,
        Progress,
        Result,
        RunOptions,
    )
    from streamconv.verification.report import Report

_HOME = {
    **dict.fromkeys(
        (
            *("average", "begin", "convert", "convert_all", "convert_async", "diff", "difference"),
            *("doctor", "finish", "inspect", "open", "part", "plan", "run", "upload", "verify"),
        ),
        "streamconv.api",
    ),
    **dict.fromkeys(("convert_run", "status"), "streamconv.batch.calls"),
    **dict.fromkeys(("LazyCheckpoint", "LazyTensor"), "streamconv.conversion.lazy"),
    "ProgressBar": "streamconv.conversion.display",
    "Plan": "streamconv.ir.planfile",
    "Report": "streamconv.verification.report",
    **dict.fromkeys(
        (
            *("AverageOptions", "Cancel", "Event", "JobOptions", "Notice", "Phase", "Progress"),
            *("Result", "RunOptions"),
        ),
        "streamconv.options",
    ),
    **dict.fromkeys(
        (
            "BadInputError",
            "BudgetError",
            "CancelledError",
            "ClosedError",
            "DamagedPlanError",
            "LockedError",
            "NoSpaceError",
            "OutputExistsError",
            "SourceChangedError",
            "StreamconvError",
            "UnfinishedError",
            "UnfitValuesError",
            "UnsafeInputError",
            "UsageError",
            "VerificationError",
        ),
        "streamconv.errors",
    ),
}

_CALLS = ("streamconv.api", "streamconv.batch.calls")

__all__ = [
    "AverageOptions",
    "BadInputError",
    "BudgetError",
    "Cancel",
    "CancelledError",
    "ClosedError",
    "DamagedPlanError",
    "Event",
    "JobOptions",
    "LazyCheckpoint",
    "LazyTensor",
    "LockedError",
    "NoSpaceError",
    "Notice",
    "OutputExistsError",
    "Phase",
    "Plan",
    "Progress",
    "ProgressBar",
    "Report",
    "Result",
    "RunOptions",
    "SourceChangedError",
    "StreamconvError",
    "UnfinishedError",
    "UnfitValuesError",
    "UnsafeInputError",
    "UsageError",
    "VerificationError",
    "__version__",
    "average",
    "begin",
    "convert",
    "convert_all",
    "convert_async",
    "convert_run",
    "diff",
    "difference",
    "doctor",
    "finish",
    "inspect",
    "open",
    "part",
    "plan",
    "run",
    "status",
    "upload",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    if _HOME[name] in _CALLS:
        from streamconv.errors import speaking_python

        value = speaking_python(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
