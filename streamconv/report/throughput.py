"""Bytes per second, from how many bytes were done when."""

from __future__ import annotations

from collections.abc import Sequence

from streamconv.report.timeline import Sample

# A curve of at most so many steps: single samples are too jumpy to read.
_STEPS = 120
_LEAST_SECONDS = 0.5


def rates(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Return (seconds, bytes per second), each the mean over a step of equal length."""
    if len(samples) < 2:
        return []
    end = samples[-1].seconds
    step = max(end / _STEPS, _LEAST_SECONDS)
    curve: list[tuple[float, float]] = []
    before = samples[0]
    for sample in samples[1:]:
        length = sample.seconds - before.seconds
        if length >= step or (sample is samples[-1] and length > 0):
            rate = max(0, sample.done_bytes - before.done_bytes) / length
            # A step, not a slope: it was this fast for that long.
            curve += [(before.seconds, rate), (sample.seconds, rate)]
            before = sample
    return curve
