"""Stage 0: fp32 masters without names, told by their order, shapes and a few values.

FP16_UnfusedOptimizer keeps ``fp32_groups``, a list of tensors for each parameter group of the
optimizer; FP16_Optimizer (with FusedAdam) ``fp32_groups_flat``, one vector each. Neither has names.
Groups list their parameters in the order of the model, and each master, cast, is the weight that the
run computed with: so walking through the model's parameters, the next master of some group must be
each one's. Frozen parameters have none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from streamconv.errors import BadInputError
from streamconv.files.inputs import readable
from streamconv.formats.deepspeed.flat import Cutter, Part, Vector, whole
from streamconv.ir.boxes import Shape, contiguous_strides
from streamconv.torchfile.rankfile import Stored

_SAMPLE_NUMEL = 32


def name_masters(
    groups: Sequence[Sequence[Stored]],
    flat: bool,
    parameters: Mapping[str, Stored],
    number: int,
    path: Path,
    cutter: Cutter,
) -> dict[str, Part]:
    """Return the masters by the names of the ``parameters`` that they belong to.

    ``parameters`` are the model's in their order, each once; all lie in file ``number``, ``path``.
    Raises :class:`BadInputError` where masters are left that are nobody's.
    """
    heads: list[_Group] = [
        _Flat(g[0], number, cutter) if flat else _Shaped(g, number) for g in groups if g
    ]
    found: dict[str, Part] = {}
    with readable(path), path.open("rb") as stream:
        fd = stream.fileno()
        for name, stored in parameters.items():
            group = next((h for h in heads if h.fits(stored) and h.is_like(fd, stored)), None)
            if group is not None:
                found[name] = group.take(stored.spec.shape)
    left = sum(h.left for h in heads)
    if left:
        raise BadInputError(
            "fp32 weights that belong to no parameter: this file does not name them, and their order "
            "is not the model's",
            where=str(path),
            expected=f"those of {len(parameters)} parameters, in the order of the model",
            found=f"{left} {'elements' if flat else 'tensors'} that equal no 16-bit weight in turn",
            hint="load the checkpoint in DeepSpeed and save it with ZeRO stage 1, which names them",
        )
    return found


class _Group:
    """The masters of one parameter group, of which one after the other is taken."""

    left: int

    def fits(self, stored: Stored) -> bool:
        """Whether the next master may be that of ``stored``."""
        raise NotImplementedError

    def place(self) -> tuple[Stored, int]:
        """Return the tensor that holds the next master, and its first storage element."""
        raise NotImplementedError

    def take(self, shape: Shape) -> Part:
        """Return the next master, which has ``shape``, and go on to the one behind it."""
        raise NotImplementedError

    def is_like(self, fd: int, stored: Stored) -> bool:
        """Whether the next master begins and ends as ``stored`` does, cast to its type."""
        numel = math.prod(stored.spec.shape)
        master, at = self.place()
        return all(
            _alike(
                _elements(fd, master, at + k, min(_SAMPLE_NUMEL, numel)),
                _elements(fd, stored, stored.spec.storage_offset + k, min(_SAMPLE_NUMEL, numel)),
            )
            for k in (0, max(0, numel - _SAMPLE_NUMEL))
        )


class _Shaped(_Group):
    def __init__(self, tensors: Sequence[Stored], number: int) -> None:
        self._tensors = tensors
        self._number = number
        self._next = 0
        self.left = len(tensors)

    def fits(self, stored: Stored) -> bool:
        if not self.left:
            return False
        spec = self._tensors[self._next].spec
        return spec.shape == stored.spec.shape and spec.strides == stored.spec.strides

    def place(self) -> tuple[Stored, int]:
        master = self._tensors[self._next]
        return master, master.spec.storage_offset

    def take(self, _: Shape) -> Part:
        master = self._tensors[self._next]
        self._next += 1
        self.left -= 1
        return whole(self._number, master)


class _Flat(_Group):
    def __init__(self, vector: Stored, number: int, cutter: Cutter) -> None:
        self._stored = vector
        self._cutter = cutter
        self._vector = Vector([(number, vector)])
        self._at = 0
        self.left = self._vector.numel

    def fits(self, stored: Stored) -> bool:
        spec = stored.spec
        dense = spec.strides == contiguous_strides(spec.shape)
        return dense and math.prod(spec.shape) <= self.left

    def place(self) -> tuple[Stored, int]:
        return self._stored, self._stored.spec.storage_offset + self._at

    def take(self, shape: Shape) -> Part:
        numel = math.prod(shape)
        runs = self._vector.cut(self._at, self._at + numel)
        self._at += numel
        self.left -= numel
        return self._cutter.part(self._stored.spec.dtype, shape, runs)


def _elements(fd: int, stored: Stored, at: int, numel: int) -> npt.NDArray[np.generic]:
    dtype = stored.spec.dtype.to_numpy()
    data = os.pread(fd, numel * dtype.itemsize, stored.start + at * dtype.itemsize)
    return np.frombuffer(data, dtype)


def _alike(master: npt.NDArray[np.generic], weight: npt.NDArray[np.generic]) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        cast = master.astype(weight.dtype)
    return bool(np.all((cast == weight) | ((cast != cast) & (weight != weight))))
