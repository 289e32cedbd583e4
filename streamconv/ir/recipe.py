"""Recipes: how an output tensor is made of global tensors, as plain data without torch.

A :class:`View` is what a view of a torch meta tensor is: a shape, element strides and an element
offset into a C-contiguous base. The base is a global tensor of the checkpoint or a :class:`Gather`,
the result of an op that copies (cat, stack, clone, a reshape that cannot be a view): a tensor whose
parts are again views. Elementwise ops commute with both, so they ride along on the view. A low-rank
update (LoRA) is elementwise, too, once it is known where in its matrix an element lies. What several
checkpoints are averaged to is the base of a view of its own, a :class:`Sum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from streamconv.ir.boxes import Box, Shape, contiguous_strides
from streamconv.ir.dtypes import DType


@dataclass(frozen=True, slots=True)
class Cast:
    """Convert every element to ``dtype``."""

    dtype: DType


@dataclass(frozen=True, slots=True)
class AddScalar:
    """Add ``value`` to every element, in the element's own dtype (norms stored as ``w - 1``)."""

    value: float


@dataclass(frozen=True, slots=True)
class AddProduct:
    """Add to each element of a matrix the element of ``scale * (left @ right)`` at its place.

    The first op of a view whose base is the matrix, a global tensor of rank 2. ``left`` has the
    matrix's rows and ``rank`` columns, ``right`` has ``rank`` rows and the matrix's columns; both
    come as float32. Everything is computed in float32, the product as ``((l0*r0 + l1*r1) + …)``, each
    step rounded: the bits depend on neither tiles, threads nor CPU. The next op rounds the sum once.
    """

    left: View
    right: View
    scale: float

    @property
    def rank(self) -> int:
        """Return the number of terms of each element of the product."""
        return self.left.shape[1]


@dataclass(frozen=True, slots=True)
class Zero:
    """Put 0, in the element's own dtype, in the place of every element.

    So padding needs no base of its own: it is a view that walks over one element with stride 0.
    """


@dataclass(frozen=True, slots=True)
class Decode:
    """Take each byte for a code, and put the float32 that it stands for in its place.

    ``e4m3`` and ``e5m2`` are floats of 8 bits; ``low4`` and ``high4`` take the e2m1 of the lower or
    upper half of a byte; ``exp2`` is the power of two with this biased exponent (e8m0: byte 127 is 1).
    """

    code: Code


Code = Literal["e4m3", "e5m2", "low4", "high4", "exp2"]


@dataclass(frozen=True, slots=True)
class MulScale:
    """Multiply each element of a matrix by the scale of the block that it lies in.

    Among the first ops of a view whose base is the matrix, a global tensor of rank 2, right behind the
    :class:`Decode`. The scale of an element is ``scale[row // block[0], column // block[1]]``, which
    comes as float32; edge blocks are short. ``outer``, of one element, multiplies the scales, or is
    what they are divided by, before they multiply anything. All of it is computed in float32, each
    step rounded.
    """

    scale: View
    block: tuple[int, int]
    outer: View | None = None
    divide: bool = False


Placed = AddProduct | MulScale
Op = Cast | AddScalar | AddProduct | Zero | Decode | MulScale


@dataclass(frozen=True, slots=True)
class SourceRef:
    """A global tensor of the checkpoint, by FQN; its elements are taken in C order."""

    fqn: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class View:
    """``shape`` elements of ``base``: index ``i`` is base element ``offset + sum(i*strides)``.

    ``ops`` are applied to each element after it is taken, in order.
    """

    base: SourceRef | Gather | Sum
    shape: Shape
    strides: Shape
    offset: int = 0
    ops: tuple[Op, ...] = ()

    def walk(self) -> Iterator[View]:
        """Yield this view and the views of all parts below it, each before its own parts."""
        yield self
        if isinstance(self.base, Gather):
            for part in self.base.parts:
                yield from part.view.walk()
        elif isinstance(self.base, Sum):
            for term in self.base.terms:
                yield from term.view.walk()

    def leaves(self) -> Iterator[tuple[SourceRef, View]]:
        """Yield the views of global tensors, each with the tensor that it takes elements of."""
        for view in self.walk():
            if isinstance(view.base, SourceRef):
                yield view.base, view

    def sources(self) -> list[str]:
        """Return the FQNs of the global tensors, each once, in first-use order.

        Scales and the factors of low-rank updates come last.
        """
        seen = dict.fromkeys(source.fqn for source, _ in self.leaves())
        for scaled in self.scales():
            for view in filter(None, (scaled.scale, scaled.outer)):
                seen |= dict.fromkeys(view.sources())
        for update in self.products():
            seen |= dict.fromkeys((*update.left.sources(), *update.right.sources()))
        return list(seen)

    def products(self) -> list[AddProduct]:
        """Return the low-rank updates, each once, in first-use order."""
        ops = (op for _, view in self.leaves() for op in view.ops)
        return list(dict.fromkeys(op for op in ops if isinstance(op, AddProduct)))

    def scales(self) -> list[MulScale]:
        """Return the scales that elements are multiplied by, each once, in first-use order."""
        ops = (op for _, view in self.leaves() for op in view.ops)
        return list(dict.fromkeys(op for op in ops if isinstance(op, MulScale)))

    def with_leaves(self, make: Callable[[SourceRef, View], View]) -> View:
        """Return this view with what ``make`` returns in the place of each view of a global tensor."""
        base = self.base
        if isinstance(base, SourceRef):
            return make(base, self)
        if isinstance(base, Gather):
            parts = tuple(replace(p, view=p.view.with_leaves(make)) for p in base.parts)
            return replace(self, base=replace(base, parts=parts))
        terms = tuple(replace(t, view=t.view.with_leaves(make)) for t in base.terms)
        return replace(self, base=replace(base, terms=terms))

    def map_sources(self, names: Mapping[str, str]) -> View:
        """Return the same view of the global tensors that ``names`` gives for the FQNs of these.

        Those of scales and of low-rank updates are among them.
        """

        def renamed(source: SourceRef, view: View) -> View:
            ops = tuple(_op_of_others(op, names) for op in view.ops)
            return replace(view, base=replace(source, fqn=names[source.fqn]), ops=ops)

        return self.with_leaves(renamed)

    @property
    def whole(self) -> SourceRef | None:
        """Return the global tensor whose elements these are, all of them and in order, if one's.

        Whatever ``ops`` make of the elements.
        """
        base = self.base
        same = isinstance(base, SourceRef) and not self.offset and self.shape == base.shape
        contiguous = same and self.strides == contiguous_strides(self.shape)
        return base if contiguous and isinstance(base, SourceRef) else None


def _op_of_others(op: Op, names: Mapping[str, str]) -> Op:
    match op:
        case AddProduct(left, right):
            return replace(op, left=left.map_sources(names), right=right.map_sources(names))
        case MulScale(scale, _, outer):
            outer = outer and outer.map_sources(names)
            return replace(op, scale=scale.map_sources(names), outer=outer)
    return op


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a gather that lies in ``box``; ``view.shape`` equals ``box.sizes``."""

    box: Box
    view: View


@dataclass(frozen=True, slots=True)
class Gather:
    """A C-contiguous tensor of ``shape`` put together of ``parts``, which tile it."""

    shape: Shape
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Term:
    """One of the tensors that are summed up, and what it is multiplied by; ``dtype`` is the view's."""

    weight: float
    dtype: DType
    view: View


@dataclass(frozen=True, slots=True)
class Sum:
    """The weighted sum of tensors of one ``shape``, divided by ``divisor``.

    The base of the outermost view, which takes all of it in order. Terms are added as they stand, each
    weighted, in float64, each step rounded; the first sets the sum. It is divided once, and the view's
    only op, a cast, rounds it. Terms that are not plain floats are not added up: they must all be
    equal, bit by bit, and are handed on.
    """

    shape: Shape
    terms: tuple[Term, ...]
    divisor: float = 1.0


@dataclass(frozen=True, slots=True)
class Encode:
    """What becomes of a matrix of float32 of ``shape``: its codes in blocks, or their scales.

    ``rule`` says how: ``fp8-block``, ``fp8-block:ue8m0`` (whose scales are powers of two) or
    ``fp8-channel``; see :mod:`streamconv.executor.encoding`.
    """

    rule: str
    block: tuple[int, int]
    shape: tuple[int, int]
    part: Literal["codes", "scales"]

    @property
    def grid(self) -> tuple[int, int]:
        """Return how many blocks there are along each axis."""
        return -(-self.shape[0] // self.block[0]), -(-self.shape[1] // self.block[1])


@dataclass(frozen=True, slots=True)
class Recipe:
    """One output tensor: its name, its element type after all ops, and how to make it.

    With ``encode`` the view is that of the floats which are quantized.
    """

    name: str
    dtype: DType
    view: View
    encode: Encode | None = None

    @property
    def shape(self) -> Shape:
        """Return the shape of the output tensor."""
        scales = self.encode is not None and self.encode.part == "scales"
        return self.encode.grid if scales and self.encode else self.view.shape

    @property
    def nbytes(self) -> int:
        """Return the bytes of the output tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_identity(self) -> bool:
        """Whether a global tensor is handed on unchanged (its name may differ)."""
        return self.view.whole is not None and not self.view.ops

    @staticmethod
    def identity(name: str, source: str, shape: Shape, dtype: DType) -> Recipe:
        """Return the recipe that hands the global tensor ``source`` on under ``name``."""
        return Recipe(name, dtype, View(SourceRef(source, shape), shape, contiguous_strides(shape)))
