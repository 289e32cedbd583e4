"""Quantized weights as floats: which tensors make one, and the recipe that does.

To the planner a quantized weight is a tensor of floats under the name that the model has for it
(:func:`decode`), so that families, experts that are fused, and adapters need not know. In the end each
of these is resolved into what is stored: codes, and the scales of their blocks
(:meth:`Decoded.resolved`).

A value is ``code * scale`` in float32. Names do not tell how scales are meant: ``weight_scale_inv``
and ModelOpt's ``weight_scale_2`` multiply, compressed-tensors' ``weight_global_scale`` divides; types
tell most of the rest. The size of a block is what config.json says, never the shape over the grid: 192
rows and 2 scales are blocks of 128 and of 64 rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streamconv.errors import BadInputError
from streamconv.ir.boxes import Box, Shape, contiguous_strides
from streamconv.ir.dtypes import BF16, BY_TORCH, F32, DType
from streamconv.ir.pieces import stored_view
from streamconv.ir.recipe import (
    AddProduct,
    Cast,
    Code,
    Decode,
    Gather,
    MulScale,
    Op,
    Part,
    Recipe,
    SourceRef,
    View,
)
from streamconv.ir.source import Checkpoint, GlobalTensor, ShardLayout, ShardTable, Skipped
from streamconv.quantization.scales import OF_ACTIVATIONS, OF_CACHE, declared

_CODES: Mapping[str, Code] = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
# Sizes of groups along a row, in elements: all that formats with such groups have.
_MX_GROUP, _NV_GROUP = 32, 16
_HALVES: tuple[Code, Code] = ("low4", "high4")
# What scales of fp8 are: numbers, or the exponents of powers of two. Other integers may be anything,
# four exponents in one (DeepGEMM) among them.
_SCALE_TYPES = frozenset({"F64", "F32", "F16", "BF16", "U8", "F8_E8M0"})


@dataclass(frozen=True, slots=True)
class _Stored:
    """A quantized weight as it is stored: ``outer`` multiplies its scales, or divides them."""

    kind: str
    codes: GlobalTensor
    scale: GlobalTensor
    outer: GlobalTensor | None = None
    divide: bool = False
    turned: bool = False  # the float has its last two axes the other way around

    @property
    def packed(self) -> bool:
        """Whether a byte holds two elements."""
        return self.kind not in ("fp8", "mxfp8")

    @property
    def parts(self) -> list[str]:
        return [t.fqn for t in (self.codes, self.scale, self.outer) if t is not None]

    @property
    def matrix(self) -> Shape:
        """Return the shape of the codes as matrices of bytes."""
        shape = self.codes.shape
        return (*shape[:-2], shape[-2] * shape[-1]) if self.turned else shape

    @property
    def shape(self) -> Shape:
        """Return the shape of the float."""
        *lead, rows, columns = self.matrix
        columns *= 2 if self.packed else 1
        return (*lead, columns, rows) if self.turned else (*lead, rows, columns)


@dataclass(frozen=True)
class Decoded:
    """A checkpoint with floats of ``dtype`` in the place of quantized weights.

    ``stored`` tells of each, by name, what it is made of.
    """

    checkpoint: Checkpoint
    dtype: DType
    stored: Mapping[str, _Stored]
    configs: Sequence[Mapping[str, Any]]

    def notice(self, dtype: DType) -> str:
        """Return what a user should know, where they become ``dtype`` in the end."""
        kinds = Counter(s.kind for s in self.stored.values())
        what = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        return f"{len(self.stored)} quantized weights ({what}) become {dtype}"

    def takes_part(self, recipe: Recipe) -> bool:
        """Whether a quantized weight is among what a tensor is made of."""
        return not self.stored.keys().isdisjoint(recipe.view.sources())

    def resolved(
        self, recipes: Iterable[Recipe], tensors: Mapping[str, GlobalTensor]
    ) -> tuple[list[Recipe], dict[str, GlobalTensor]]:
        """Return recipes that draw from what is stored, and those tensors."""
        own = {n: t for n, t in tensors.items() if n not in self.stored}
        views: dict[str, View] = {}

        def resolved(source: SourceRef, view: View) -> View:
            name = source.fqn
            if name not in self.stored:
                if name in own and own[name].placement == _PROMISED:
                    raise not_decoded(name)
                return view
            if name not in views:
                views[name] = self._view(name, own)
            return _composed(view, views[name], self.dtype)

        made = [dataclasses.replace(r, view=r.view.with_leaves(resolved)) for r in recipes]
        return made, own

    def _view(self, name: str, own: dict[str, GlobalTensor]) -> View:
        """Return the float in terms of what is stored, and add that to ``own``."""
        stored = self.stored[name]
        own |= {t.fqn: t for t in (stored.scale, stored.outer) if t is not None}
        *lead, rows, columns = stored.matrix
        count = math.prod(lead)
        grid, block = _grid(name, stored, self.configs)
        outer = None
        if stored.outer is not None:
            outer = View(SourceRef(stored.outer.fqn, stored.outer.shape), (1, 1), (1, 1), 0)
            outer = dataclasses.replace(outer, ops=_as_float(stored.outer.dtype))
        # Matrices lie one below the other where blocks do not reach from one into the next.
        single = count == 1 or not lead or rows % block[0] == 0 or grid[:-2] == (1,) * len(lead)
        if grid == (1, 1):
            block = (rows * count, block[1])
        pieces = []
        for k in range(1 if single else count):
            height = rows * count if single else rows
            flat = View(
                SourceRef(stored.codes.fqn, stored.codes.shape),
                (height, columns),
                (columns, 1),
                k * rows * columns,
            )
            if stored.codes.shape == (height, columns):
                base = stored.codes
            else:
                label = name if single else f"{name}[{k}]"
                base = stored_view(f"{label} (codes)", flat, {stored.codes.fqn: stored.codes})
            own[base.fqn] = base
            high = -(-height // block[0])
            scale = View(
                SourceRef(stored.scale.fqn, stored.scale.shape),
                (high, grid[-1]),
                (grid[-1], 1),
                0 if single else k * grid[-2] * grid[-1],
                _as_float(stored.scale.dtype),
            )
            times = MulScale(scale, block, outer, stored.divide)
            pieces.append((height, SourceRef(base.fqn, base.shape), times))
        shape = (*lead, rows, columns * (2 if stored.packed else 1))
        made = _joined(shape, pieces, stored, columns)
        if stored.turned:
            *steps, down, across = made.strides
            made = dataclasses.replace(made, shape=stored.shape, strides=(*steps, across, down))
        return made


_PROMISED = "of a quantized weight"


def _joined(
    shape: Shape,
    pieces: Sequence[tuple[int, SourceRef, MulScale]],
    stored: _Stored,
    columns: int,
) -> View:
    strides = contiguous_strides(shape)
    if len(pieces) == 1 and not stored.packed and len(shape) == 2:
        _, base, times = pieces[0]
        return View(base, shape, strides, 0, (Decode(_CODES[stored.codes.dtype.name]), times))
    parts = []
    halves = _HALVES if stored.packed else (_CODES[stored.codes.dtype.name],)
    at = 0
    for height, base, times in pieces:
        for k, code in enumerate(halves):
            view = View(base, (height, columns, 1), (columns, 1, 1), 0, (Decode(code), times))
            parts.append(Part(Box((at, 0, k), (height, columns, 1)), view))
        at += height
    return View(Gather((at, columns, len(halves)), tuple(parts)), shape, strides)


def _composed(view: View, float_: View, dtype: DType) -> View:
    """Return ``view``, which is one of a float, as one of what the float is made of."""
    updates = tuple(op for op in view.ops if isinstance(op, AddProduct))
    rest = tuple(op for op in view.ops if not isinstance(op, AddProduct))
    ops: tuple[Op, ...] = (Cast(dtype), *rest)
    if not isinstance(float_.base, Gather):
        return dataclasses.replace(view, base=float_.base, ops=(*float_.ops, *updates, *ops))
    if updates:
        float_ = dataclasses.replace(float_, base=_updated(float_.base, updates))
    whole = Gather(float_.shape, (Part(Box.whole(float_.shape), float_),))
    return dataclasses.replace(view, base=whole, ops=ops)


def _updated(base: Gather, updates: Sequence[AddProduct]) -> Gather:
    """Return halves of bytes with the updates of their columns, which are every other one's."""
    halves = base.shape[-1]
    parts = []
    for part in base.parts:
        k = part.box.offsets[-1]
        own = tuple(dataclasses.replace(u, right=_every(u.right, halves, k)) for u in updates)
        parts.append(Part(part.box, dataclasses.replace(part.view, ops=(*part.view.ops, *own))))
    return Gather(base.shape, tuple(parts))


def _every(right: View, step: int, first: int) -> View:
    (rows, columns), (down, across) = right.shape, right.strides
    return dataclasses.replace(
        right,
        shape=(rows, columns // step),
        strides=(down, across * step),
        offset=right.offset + first * across,
    )


def _as_float(dtype: DType) -> tuple[Op, ...]:
    if dtype.name == "F32":
        return ()
    if dtype.name in ("U8", "F8_E8M0"):
        return (Decode("exp2"),)
    return (Decode(_CODES[dtype.name]),) if dtype.name in _CODES else (Cast(F32),)


def float_type(chosen: str, named: DType | None) -> DType:
    """Return what quantized weights become, from ``--dtype`` and what config.json declares."""
    if chosen == "auto" and named is not None and named.castable:
        return named
    return BY_TORCH[chosen] if chosen not in ("keep", "auto") else BF16


def not_decoded(name: str) -> BadInputError:
    """Return the error for a quantized weight that stays one."""
    return BadInputError(
        "a quantized weight cannot be dequantized",
        where=name,
        expected="fp8, mxfp8, mxfp4 or nvfp4 with scales under one of their known names",
        hint="leave out --dequantize to keep the weights as they are",
    )


# --- which tensors belong together ----------------------------------------------------------------


def decode(
    checkpoint: Checkpoint, configs: Sequence[Mapping[str, Any]], dtype: DType
) -> Decoded | None:
    """Return the checkpoint with floats of ``dtype`` in the place of quantized weights; None without.

    ``configs`` are those that may say of these weights how large their blocks are. Raises
    :class:`BadInputError` for a quantized weight without a scale, for one whose blocks are not known,
    and for what is packed in a way that is not known here.
    """
    if checkpoint.naming == "mcore":
        return None
    tensors = checkpoint.tensors
    unclear = next(
        (n for n, u in checkpoint.undecided.items() if u.copies.dtype.name in _CODES), None
    )
    if unclear is not None:
        raise not_decoded(unclear)
    stored = {name: s for n in tensors for name, s in _stored(n, tensors)}
    if not stored:
        return None
    used = {fqn: name for name, s in stored.items() for fqn in s.parts}
    made: dict[str, GlobalTensor] = {}
    skipped: list[Skipped] = []
    for n, tensor in tensors.items():
        name = used.get(n)
        if name is None:
            leaf = n.rpartition(".")[2]
            if leaf in OF_ACTIVATIONS or leaf in OF_CACHE or leaf == "weight_shape":
                skipped.append(Skipped(n, "of quantization, and the weights are floats now"))
            else:
                made[n] = tensor
        elif n == stored[name].codes.fqn:
            if name in tensors and name != n:
                raise BadInputError(
                    "a weight is there twice, quantized and not", where=name, found=n
                )
            _grid(name, stored[name], configs)
            made[name] = _promised(name, stored[name], dtype)
    found = dataclasses.replace(
        checkpoint,
        tensors=MappingProxyType(made),
        skipped=(*checkpoint.skipped, *skipped),
    )
    return Decoded(found, dtype, stored, configs)


def _stored(name: str, tensors: Mapping[str, GlobalTensor]) -> Iterator[tuple[str, _Stored]]:
    """Yield what a tensor is the codes of, under the name of the float."""
    codes = tensors[name]
    module, _, leaf = name.rpartition(".")
    stem = f"{module}." if module else ""

    def one(*names: str) -> GlobalTensor | None:
        return next((tensors[n] for n in names if n in tensors), None)

    if leaf == "weight_packed":
        scale, outer = one(f"{stem}weight_scale"), one(f"{stem}weight_global_scale")
        if codes.dtype.name != "U8" or scale is None:
            raise not_decoded(name)
        kind = _packed_kind(name, scale)
        if (kind == "nvfp4") != (outer is not None):
            raise not_decoded(name)
        yield f"{stem}weight", _Stored(kind, codes, scale, outer, divide=True)
    elif name.endswith("_blocks") and codes.dtype.name == "U8":
        float_ = name.removesuffix("_blocks")
        scale = one(f"{float_}_scales")
        if scale is None or len(codes.shape) < 3:
            raise not_decoded(name)
        yield float_, _Stored("mxfp4", codes, scale, turned=True)
    elif leaf == "qweight":
        raise not_decoded(name)
    elif codes.dtype.name in ("I8", "U8") and leaf == "weight" and len(codes.shape) > 1:
        outer = one(f"{name}_scale_2")
        scale = one(f"{stem}scale", f"{name}_scale")
        if scale is None:
            raise not_decoded(name)
        kind = _packed_kind(name, scale)
        if (kind == "nvfp4") != (outer is not None):
            raise not_decoded(name)
        yield name, _Stored("fp4" if kind == "mxfp4" else kind, codes, scale, outer)
    elif codes.dtype.name in _CODES:
        scale = one(f"{name}_scale_inv", f"{stem}scale", f"{stem}qscale_weight", f"{name}_scale")
        if scale is None:
            if _is_scale(name, tensors):
                return
            raise BadInputError(
                "a quantized weight has no scale, without which it means nothing",
                where=name,
                expected=f"{name}_scale_inv, {name}_scale or the like",
                found=f"{codes.dtype}, and none",
            )
        if len(codes.shape) < 2 or scale.dtype.name not in _SCALE_TYPES:
            raise not_decoded(name)
        mx = scale.dtype.name in ("U8", "F8_E8M0") and scale.shape[-2:-1] == codes.shape[-2:-1]
        yield name, _Stored("mxfp8" if mx else "fp8", codes, scale)


def _is_scale(name: str, tensors: Mapping[str, GlobalTensor]) -> bool:
    weight = name.removesuffix("_scale")
    return weight != name and (weight in tensors or f"{weight}_packed" in tensors)


def _packed_kind(name: str, scale: GlobalTensor) -> str:
    if scale.dtype.name in ("U8", "F8_E8M0"):
        return "mxfp4"
    if scale.dtype.name == "F8_E4M3":
        return "nvfp4"
    raise not_decoded(name)


def _grid(
    name: str, stored: _Stored, configs: Sequence[Mapping[str, Any]]
) -> tuple[Shape, tuple[int, int]]:
    """Return the shape of the scales, with a leading axis for each of the weight's, and a block.

    Blocks count bytes where these hold two elements. Raises :class:`BadInputError` where scales and
    weight do not fit, or nothing says how large a block is.
    """
    *lead, rows, columns = stored.matrix
    shape = stored.scale.shape
    blocks = _declared_blocks(configs)
    # Where config.json says how large blocks are, scales of these names are for nothing else.
    of_blocks = bool(blocks) and stored.scale.fqn.endswith(("_scale_inv", ".scale"))
    one_block = math.prod(lead) == 1 and any(rows <= h and columns <= w for h, w in blocks)
    if math.prod(shape) == 1 and (one_block or not of_blocks or stored.packed):
        return (1, 1), (max(rows, 1), max(columns, 1))
    if stored.packed or stored.kind == "mxfp8":
        size = _NV_GROUP if stored.kind == "nvfp4" else _MX_GROUP
        size //= 2 if stored.packed else 1
        if shape == (*lead, rows, -(-columns // size)):
            return shape, (1, size)
    if not stored.packed:
        for high, wide in blocks:
            if shape == (*lead, -(-rows // high), -(-columns // wide)):
                return shape, (high, wide)
    if not stored.packed and not of_blocks:
        if shape in ((rows,), (*lead, rows)) and len(shape) < len(lead) + 2:
            return (*lead, rows, 1), (1, columns)
        if len(shape) == len(lead) + 2 and shape[:-2] == tuple(lead):
            block = [
                n if many == 1 else 1 if many == n else 0
                for n, many in zip((rows, columns), shape[-2:], strict=True)
            ]
            if all(block):
                return shape, (block[0], block[1])
    sizes = [list(b) for b in blocks]
    raise BadInputError(
        "the scales of a quantized weight do not fit it",
        where=name,
        expected=f"scales for {list(stored.matrix)} bytes in blocks of "
        + (" or ".join(map(str, sizes)) if sizes else "a size that config.json says"),
        found=f"{stored.scale.fqn}: {stored.scale.dtype} {list(shape)}",
        hint="--hf-config DIR names the folder of the quantized model, whose config.json has its "
        "quantization_config (weight_block_size)",
    )


def _declared_blocks(configs: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Return the sizes of blocks that configs declare, those of compressed-tensors among them."""
    found: list[tuple[int, int]] = []

    def look(value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if key in ("weight_block_size", "block_structure"):
                    sizes = inner.split("x") if isinstance(inner, str) else inner
                    try:
                        high, wide = (int(n) for n in sizes)
                    except (TypeError, ValueError):
                        continue
                    if high > 0 and wide > 0:
                        found.append((high, wide))
                else:
                    look(inner)

    for config in configs:
        for part in declared(config):
            look(part)
    return list(dict.fromkeys(found))


def _promised(name: str, stored: _Stored, dtype: DType) -> GlobalTensor:
    """Return the float as a tensor to plan with; where its bytes lie is not true."""
    shape = stored.shape
    table = ShardTable()
    first = stored.codes.shards[0]
    table.append(first.file, 0, 0, math.prod(shape) * dtype.itemsize, 0, 0)
    layout = ShardLayout(shape, (Box.whole(shape),), (contiguous_strides(shape),), (0,))
    return GlobalTensor(name, dtype, layout, table, _PROMISED)
