"""From recipes to the plan's sections: which file and bytes each output tensor gets, and its moves.

No byte of a weight is read here either; :mod:`streamconv.planning.checks` has decided what is made.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from streamconv.errors import UsageError
from streamconv.files.names import SINGLE
from streamconv.ir.boxes import contiguous_strides
from streamconv.ir.dtypes import F32
from streamconv.ir.lowering import Move, lower, numbered
from streamconv.ir.planned import (
    OutputFile,
    PlannedProduct,
    PlannedScale,
    PlannedSource,
    PlannedTensor,
    PlannedTerm,
)
from streamconv.ir.planwriter import PlanWriter
from streamconv.ir.recipe import AddProduct, Cast, MulScale, Op, Recipe, SourceRef, Sum, View
from streamconv.ir.source import GlobalTensor, ShardLayout
from streamconv.planning.checks import Ties
from streamconv.units import format_size

# Of each tensor the records, as (file, start), that hold more than a shard of it, and which shard.
_InPart = Mapping[str, Sequence[tuple[tuple[int, int], int]]]


@dataclass(frozen=True, slots=True)
class Placed:
    """An output tensor and where it goes: bytes ``[begin, end)`` of its file's data."""

    recipe: Recipe
    begin: int
    end: int
    same_as: str | None = None


def shard(
    recipes: Sequence[Recipe], ties: Ties, max_shard_bytes: int
) -> list[tuple[OutputFile, list[Placed]]]:
    """Distribute the tensors over output files, in their order, and lay each file out.

    Within a file wide elements come first, so that every tensor is aligned to its element; a tied
    alias stands after the tensor it is compared with.
    """
    written = [r for r in recipes if r.name not in ties.dropped and r.name not in ties.compared]
    groups: list[list[Recipe]] = [[]]
    size = 0
    for r in written:
        nbytes = r.nbytes
        if groups[-1] and size + nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(r)
        size += nbytes
    by_name = {r.name: r for r in recipes}
    aliases: dict[str, list[Recipe]] = {}
    for alias, kept in ties.compared.items():
        aliases.setdefault(kept, []).append(by_name[alias])
    result = []
    for k, group in enumerate(groups):
        name = SINGLE if len(groups) == 1 else f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors"
        placed: list[Placed] = []
        at = 0
        for r in sorted(group, key=_aligned):
            placed.append(Placed(r, at, at + r.nbytes))
            placed += [Placed(a, at, at + a.nbytes, r.name) for a in aliases.get(r.name, ())]
            at += r.nbytes
        result.append((_output_file(name, placed, at), placed))
    return result


def _aligned(r: Recipe) -> int:
    """Sort by width, but codes with their scales: multiples of four bytes, all of them."""
    if r.encode is not None:
        return -7
    return -r.dtype.itemsize


def single_file(name: str, recipes: Sequence[Recipe]) -> tuple[OutputFile, list[Placed]]:
    """Lay out all of ``recipes`` in one file, whatever its size."""
    placed: list[Placed] = []
    at = 0
    for r in sorted(recipes, key=lambda r: -r.dtype.itemsize):
        placed.append(Placed(r, at, at + r.nbytes))
        at += r.nbytes
    return _output_file(name, placed, at), placed


# The library refuses longer headers (safetensors/src/tensor.rs, MAX_HEADER_SIZE).
_MAX_HEADER_BYTES = 100_000_000


def _output_file(name: str, placed: Iterable[Placed], data_nbytes: int) -> OutputFile:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for p in placed:
        if p.same_as is None:
            header[p.recipe.name] = {
                "dtype": p.recipe.dtype.name,
                "shape": list(p.recipe.shape),
                "data_offsets": [p.begin, p.end],
            }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    text += " " * (-len(text.encode()) % 8)
    nbytes = len(text.encode())
    if nbytes > _MAX_HEADER_BYTES:
        raise UsageError(
            "too many tensors for one safetensors file",
            where=name,
            expected=f"a header of at most {format_size(_MAX_HEADER_BYTES)}",
            found=format_size(nbytes),
            hint="choose a smaller --max-shard-size",
        )
    return OutputFile(name, 8 + nbytes + data_nbytes, text, len(header) - 1)


def index_json(outputs: Sequence[tuple[OutputFile, Sequence[Placed]]]) -> str:
    """Return model.safetensors.index.json; sizes as transformers counts them, in bytes."""
    weight_map = {
        p.recipe.name: out.name for out, placed in outputs for p in placed if p.same_as is None
    }
    written = [p for _, placed in outputs for p in placed if p.same_as is None]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(p.recipe.shape) for p in written),
            "total_size": sum(p.end - p.begin for p in written),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"


def _check_sum(view: View, recipe: Recipe) -> None:
    """Raise ``TypeError`` unless the view takes all of a sum in order, and rounds it once."""
    made = recipe.dtype if recipe.encode is None else F32
    plain = not view.offset and view.strides == contiguous_strides(view.base.shape)
    # Nothing is rounded where nothing is added.
    once = view.ops == (Cast(made),) or not (view.ops or made.castable)
    if not plain or view.shape != view.base.shape or not once:
        raise TypeError(f"{recipe.name}: a sum that something else is made of")


class Lowerer:
    """Lowers recipes; tensors that are cut and viewed alike share their moves."""

    def __init__(self, tensors: Mapping[str, GlobalTensor]) -> None:
        self._tensors = tensors
        self._cache: dict[object, tuple[Move, ...]] = {}

    def planned(
        self, placed: Placed, last: Container[str], ended: Sequence[tuple[str, int]] | None
    ) -> PlannedTensor:
        """Return the tensor as the plan holds it.

        ``last`` are the FQNs that nothing later uses, ``ended`` the records, as (FQN, shard), where
        that is not all of theirs.
        """
        view = placed.recipe.view
        fqns = view.sources()
        numbers = {fqn: k for k, fqn in enumerate(fqns)}
        summed = view.base if isinstance(view.base, Sum) else None
        if summed is not None:
            _check_sum(view, placed.recipe)
        return PlannedTensor(
            name=placed.recipe.name,
            dtype=placed.recipe.dtype,
            shape=placed.recipe.shape,
            begin=placed.begin,
            end=placed.end,
            sources=tuple(
                PlannedSource(f, self._tensors[f].dtype, self._tensors[f].shards) for f in fqns
            ),
            moves=self._lowered(view, numbers) if summed is None else (),
            last=tuple(k for k, f in enumerate(fqns) if f in last),
            same_as=placed.same_as,
            products=tuple(
                PlannedProduct(
                    (product.left.shape[0], product.right.shape[1]),
                    product.rank,
                    product.scale,
                    self._lowered(product.left, numbers),
                    self._lowered(product.right, numbers),
                )
                for product in view.products()
            ),
            ended=None if ended is None else tuple((numbers[f], j) for f, j in ended),
            scales=tuple(
                PlannedScale(
                    (scaled.scale.shape[0], scaled.scale.shape[1]),
                    scaled.block,
                    self._lowered(scaled.scale, numbers),
                    self._lowered(scaled.outer, numbers) if scaled.outer else (),
                    scaled.divide,
                )
                for scaled in view.scales()
            ),
            encode=placed.recipe.encode,
            terms=self._terms(view, summed, numbers) if summed is not None else (),
            divisor=summed.divisor if summed is not None else 1.0,
        )

    def _terms(
        self, view: View, summed: Sum, numbers: Mapping[str, int]
    ) -> tuple[PlannedTerm, ...]:
        # Updates and scales are numbered among those of all terms.
        placed = numbered(view)
        if placed:
            moves = [lower(t.view, self._layout, numbers, placed) for t in summed.terms]
        else:
            moves = [[*self._lowered(t.view, numbers)] for t in summed.terms]
        return tuple(
            PlannedTerm(t.weight, t.dtype, tuple(m))
            for t, m in zip(summed.terms, moves, strict=True)
        )

    def _lowered(self, view: View, numbers: Mapping[str, int]) -> tuple[Move, ...]:
        key = self._key(view, numbers)
        moves = self._cache.get(key)
        if moves is None:
            moves = self._cache[key] = tuple(lower(view, self._layout, numbers))
        return moves

    def _layout(self, fqn: str) -> ShardLayout:
        return self._tensors[fqn].layout

    def _key(self, view: View, numbers: Mapping[str, int]) -> object:
        base: object
        if isinstance(view.base, Sum):
            raise TypeError("a sum is lowered a term at a time")
        if isinstance(view.base, SourceRef):
            base = (numbers[view.base.fqn], id(self._layout(view.base.fqn)))
        else:
            base = (
                view.base.shape,
                tuple((p.box, self._key(p.view, numbers)) for p in view.base.parts),
            )
        ops = tuple(self._op_key(op, numbers) for op in view.ops)
        return view.shape, view.strides, view.offset, ops, base

    def _op_key(self, op: Op, numbers: Mapping[str, int]) -> object:
        if isinstance(op, MulScale):
            outer = self._key(op.outer, numbers) if op.outer else None
            return self._key(op.scale, numbers), op.block, outer, op.divide
        if not isinstance(op, AddProduct):
            return op
        return self._key(op.left, numbers), self._key(op.right, numbers), op.scale


def write_sections(
    writer: PlanWriter,
    placed: Sequence[tuple[OutputFile, Sequence[Placed]]],
    tensors: Mapping[str, GlobalTensor],
) -> None:
    """Lower every output tensor and write the plan's sections."""
    in_order = [p for _, group in placed for p in group]
    last_user = {fqn: id(p) for p in in_order for fqn in p.recipe.view.sources()}
    lowerer = Lowerer(tensors)
    in_part = {fqn: list(_records_in_part(tensors[fqn])) for fqn in last_user}
    shared = SharedRecords(in_order, tensors, in_part)
    between = _between_files([group for _, group in placed], tensors, in_part)
    for (output, group), records in zip(placed, between, strict=True):
        writer.output(replace(output, shared=records))
        for p in group:
            last = {fqn for fqn in p.recipe.view.sources() if last_user[fqn] == id(p)}
            writer.tensor(lowerer.planned(p, last, shared.ended(p, last)))


def _between_files(
    groups: Sequence[Sequence[Placed]], tensors: Mapping[str, GlobalTensor], in_part: _InPart
) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield of each output file the records, as (file, start), that others draw from, too."""
    drawn = [{f for p in group for f in p.recipe.view.sources()} for group in groups]
    files = Counter(f for fqns in drawn for f in fqns)
    records = Counter(key for fqns in drawn for key in {k for f in fqns for k, _ in in_part[f]})
    for fqns in drawn:
        shared = {key for f in fqns for key, _ in in_part[f] if records[key] > 1}
        for shards in (tensors[f].shards for f in fqns if files[f] > 1):
            shared.update(zip(shards.files, shards.starts, strict=True))
        yield tuple(sorted(shared))


class SharedRecords:
    """Which records hold several tensors, and with which output tensor each of these ends.

    A flat group of ZeRO is one record of a rank's part of all parameters: as its checksum is that of
    all of it, whoever would complete it with the first of them read it twice.
    """

    def __init__(
        self, in_order: Sequence[Placed], tensors: Mapping[str, GlobalTensor], in_part: _InPart
    ) -> None:
        self._tensors = tensors
        self._last: dict[tuple[int, int], tuple[int, str, int]] = {}
        owners: dict[tuple[int, int], str] = {}
        self._shared: set[tuple[int, int]] = set()
        for p in in_order:
            for fqn in p.recipe.view.sources():
                for key, j in in_part[fqn]:
                    self._last[key] = (id(p), fqn, j)
                    if owners.setdefault(key, fqn) != fqn:
                        self._shared.add(key)
        self._ended: dict[int, list[tuple[str, int]]] = {}
        for key in self._shared:
            user, fqn, j = self._last[key]
            self._ended.setdefault(user, []).append((fqn, j))

    def ended(self, placed: Placed, last: Collection[str]) -> list[tuple[str, int]] | None:
        """Return the records that end with ``placed``; None where they are all those of ``last``."""
        if not self._shared:
            return None
        found = set(self._ended.get(id(placed), []))
        own: list[tuple[str, int]] = []
        total = len(found)
        for fqn in last:
            shards = self._tensors[fqn].shards
            places = enumerate(zip(shards.files, shards.starts, strict=True))
            own += [(fqn, j) for j, place in places if place not in self._shared]
            total += len(shards)
        return sorted(found.union(own)) if found or len(own) < total else None


def _records_in_part(tensor: GlobalTensor) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield (file, start) and shard of the records that hold more than that shard of the tensor."""
    shards, itemsize = tensor.shards, tensor.dtype.itemsize
    for j, box in enumerate(tensor.layout.boxes):
        if box.numel * itemsize < shards.nbytes[j]:
            yield (shards.files[j], shards.starts[j]), j
