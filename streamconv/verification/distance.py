"""How far apart numbers are, where a tolerance says what is near enough."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def further_apart(ours: Array, theirs: Array, atol: float, rtol: float) -> tuple[int, float]:
    """Return how many numbers differ by more than ``atol + rtol * |theirs|``, and by how much at most.

    Two NaNs are alike, and so are two infinities of one sign; whatever else is not finite is infinitely
    far from anything.
    """
    alike = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        distance = np.where(alike, 0.0, np.abs(ours - theirs))
        bound = atol + rtol * np.abs(theirs)
        far = ~alike & ~(distance <= np.where(np.isfinite(bound), bound, atol))
    if not far.any():
        return 0, 0.0
    return int(far.sum()), float(np.nan_to_num(distance[far], nan=np.inf, posinf=np.inf).max())
