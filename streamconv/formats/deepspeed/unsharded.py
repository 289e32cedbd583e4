"""Stage 0: fp32 masters without names, told by their order, shapes and a few values.

FP16_UnfusedOptimizer keeps ``fp32_groups``, a list of tensors for each parameter group of the
optimizer; FP16_Optimizer (with FusedAdam) ``fp32_groups_flat``, one vector each. Neither has names.
Groups list their parameters in the order of the model, and each master, cast, is the weight that the
run computed with: so walking through the model's parameters, the next master of some group must be
each one's. Frozen parameters have none.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from streamconv.errors import BadInputError
from streamconv.formats.deepspeed.flat import Cutter, Part, Vector, whole
from streamconv.formats.tensor_bytes import ElementReader, rounds_to
from streamconv.ir.boxes import Shape, contiguous_strides
from streamconv.torchfile.rankfile import Stored

_SAMPLE_NUMEL = 32


def name_masters(
    groups: Sequence[Sequence[Stored]],
    flat: bool,
    parameters: Mapping[str, Part],
    number: int,
    paths: Sequence[Path],
    cutter: Cutter,
    *,
    rounds: int = 1,
) -> dict[str, Part]:
    """Return the masters by the names of the ``parameters`` that they belong to.

    ``parameters`` are the model's in their order, each once and whole; with two ``rounds`` it may begin
    at any of them. The masters lie in file ``number``, and ``paths`` are all files. Raises
    :class:`BadInputError` where masters are left that are nobody's.
    """
    heads: list[_Group] = [
        _Flat(g[0], number, cutter) if flat else _Shaped(g, number) for g in groups if g
    ]
    found: dict[str, Part] = {}
    with ElementReader(paths) as files:
        for name, part in [*parameters.items()] * rounds:
            group = next(
                (h for h in heads if h.fits(part) and h.is_like(files, number, part)), None
            )
            if group is not None and name not in found:
                found[name] = group.take(part.shape)
    left = sum(h.left for h in heads)
    if left:
        raise BadInputError(
            "fp32 weights that belong to no parameter: this file does not name them, and their order "
            "is not the model's",
            where=str(paths[number]),
            expected=f"those of {len(parameters)} parameters, in the order of the model",
            found=f"{left} {'elements' if flat else 'tensors'} that equal no 16-bit weight in turn",
            hint="load the checkpoint in DeepSpeed and save it with ZeRO stage 1, which names them",
        )
    return found


class _Group(ABC):
    """The masters of one parameter group, of which one after the other is taken."""

    left: int

    @abstractmethod
    def fits(self, part: Part) -> bool:
        """Whether the next master may be that of ``part``."""

    @abstractmethod
    def place(self) -> tuple[Stored, int]:
        """Return the tensor that holds the next master, and its first storage element."""

    @abstractmethod
    def take(self, shape: Shape) -> Part:
        """Return the next master, which has ``shape``, and go on to the one behind it."""

    def is_like(self, files: ElementReader, number: int, part: Part) -> bool:
        """Whether the next master begins and ends as ``part`` does, cast to its type."""
        numel = math.prod(part.shape)
        master, at = self.place()
        held = part.pieces[0]
        size = min(_SAMPLE_NUMEL, numel)
        return all(
            rounds_to(
                files.read(number, master.start, master.spec.dtype, at + k, size),
                files.read(
                    held.record.file, held.record.start, part.dtype, held.storage_offset + k, size
                ),
            )
            for k in (0, numel - size)
        )


class _Shaped(_Group):
    def __init__(self, tensors: Sequence[Stored], number: int) -> None:
        self._tensors = tensors
        self._number = number
        self._next = 0
        self.left = len(tensors)

    def fits(self, part: Part) -> bool:
        if not self.left:
            return False
        spec = self._tensors[self._next].spec
        return spec.shape == part.shape and spec.strides == part.pieces[0].strides

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

    def fits(self, part: Part) -> bool:
        dense = part.pieces[0].strides == contiguous_strides(part.shape)
        return dense and 0 < math.prod(part.shape) <= self.left

    def place(self) -> tuple[Stored, int]:
        return self._stored, self._stored.spec.storage_offset + self._at

    def take(self, shape: Shape) -> Part:
        numel = math.prod(shape)
        runs = self._vector.cut(self._at, self._at + numel)
        self._at += numel
        self.left -= numel
        return self._cutter.part(self._stored.spec.dtype, shape, runs)
