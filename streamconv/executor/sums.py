"""Weighted sums of tensors of several checkpoints: in float64, divided once, rounded once.

Every element is a sum in the order of the terms, so that tiles, threads and budgets do not show, and
``n`` equal checkpoints of up to float32 have that checkpoint for a mean.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from streamconv.errors import BadInputError, UnfitValuesError
from streamconv.executor.kernels import apply
from streamconv.executor.windows import PRODUCT_BLOCK_ELEMENTS, SUM_ELEMENTS, Segment, Window
from streamconv.ir.planned import PlannedTensor
from streamconv.ir.recipe import Cast

Array = np.ndarray[Any, np.dtype[Any]]


class Summer:
    """Makes the elements of sums; ``fill`` brings those of the terms, ``where`` tells a term's file.

    Safe to use from several threads, each of which holds ``SUM_ELEMENTS`` of a sum and of a term.
    """

    def __init__(
        self, fill: Callable[[Window, memoryview], None], where: Callable[[PlannedTensor], str]
    ) -> None:
        self._fill = fill
        self._where = where
        self._held = threading.local()

    def fill(self, segment: Segment, out: memoryview) -> None:
        """Bring the bytes of a segment of a sum into ``out``.

        Raises :class:`UnfitValuesError` where a term is not finite or the sum does not fit its type,
        and :class:`BadInputError` where terms differ that cannot be added up.
        """
        tensor = segment.tensor
        make = self._added if tensor.dtype.castable else self._equal
        itemsize = tensor.dtype.itemsize
        for lo in range(segment.lo, segment.hi, SUM_ELEMENTS):
            hi = min(lo + SUM_ELEMENTS, segment.hi)
            make(tensor, lo, hi, out[(lo - segment.lo) * itemsize : (hi - segment.lo) * itemsize])

    def _added(self, tensor: PlannedTensor, lo: int, hi: int, out: memoryview) -> None:
        total = np.frombuffer(self._buffer("total"), np.float64, hi - lo)
        blocks = [
            slice(at, at + PRODUCT_BLOCK_ELEMENTS)
            for at in range(0, hi - lo, PRODUCT_BLOCK_ELEMENTS)
        ]
        with np.errstate(all="ignore"):
            for k, term in enumerate(tensor.terms):
                values = self._values(tensor.term(k), lo, hi)
                for block in blocks:
                    wide = values[block].astype(np.float64)
                    wide *= term.weight
                    if k:
                        total[block] += wide
                    else:
                        total[block] = wide
            if tensor.divisor != 1:
                for block in blocks:
                    total[block] /= tensor.divisor
        made = np.frombuffer(out, tensor.dtype.to_numpy())
        for block in blocks:
            if not np.isfinite(total[block]).all():
                self._refuse_infinite(tensor, lo, hi)
            apply((Cast(tensor.dtype),), total[block], made[block], tensor.name)

    def _refuse_infinite(self, tensor: PlannedTensor, lo: int, hi: int) -> None:
        for k in range(len(tensor.terms)):
            term = tensor.term(k)
            if not np.isfinite(self._values(term, lo, hi)).all():
                raise UnfitValuesError(
                    "a weight that is to be averaged is NaN or infinite",
                    where=f"{self._where(term)}, {tensor.name}",
                    hint="training diverged: leave this checkpoint out",
                )
        raise UnfitValuesError("a sum does not fit into float64", where=tensor.name)

    def _equal(self, tensor: PlannedTensor, lo: int, hi: int, out: memoryview) -> None:
        first = tensor.term(0)
        out[:] = self._bytes(first, lo, hi)
        for k in range(1, len(tensor.terms)):
            term = tensor.term(k)
            if self._bytes(term, lo, hi) != out:
                raise BadInputError(
                    f"tensors of {tensor.dtype} are not averaged, and these differ",
                    where=tensor.name,
                    expected=f"that of {self._where(first)}",
                    found=f"another in {self._where(term)}",
                )

    def _values(self, term: PlannedTensor, lo: int, hi: int) -> Array:
        return np.frombuffer(self._bytes(term, lo, hi), term.dtype.to_numpy())

    def _bytes(self, term: PlannedTensor, lo: int, hi: int) -> memoryview:
        nbytes = (hi - lo) * term.dtype.itemsize
        buffer = self._buffer("term")[:nbytes]
        self._fill(Window(nbytes, (Segment(term, lo, hi, 0),)), buffer)
        return buffer

    def _buffer(self, name: str) -> memoryview:
        """Return this thread's buffer of that name, with room for the widest elements."""
        buffer: memoryview | None = getattr(self._held, name, None)
        if buffer is None:
            buffer = memoryview(mmap.mmap(-1, SUM_ELEMENTS * 8))
            setattr(self._held, name, buffer)
        return buffer
