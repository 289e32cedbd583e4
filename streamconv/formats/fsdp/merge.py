"""Local tensors of many ranks become global tensors: boxes put together, replicas compared and dropped.

What a tensor is cut into depends only on the sequence of its ranks' :class:`LocalSpec`; that
sequence is resolved once and shared by all tensors that have it (a 70B model has ten of them, not
two thousand). While rank files are read, a tensor is columns of machine integers, one entry per
rank.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from streamconv.errors import BadInputError
from streamconv.formats.replicas import Local, Replicas
from streamconv.ir.boxes import Box, Shape, check_tiling, find_hole
from streamconv.ir.placements import Kind, Piece, Placement, ShardOrder, local_pieces
from streamconv.ir.source import GlobalTensor, ShardLayout, ShardTable, Undecided
from streamconv.torchfile.rankfile import LocalSpec, Stored

_OTHER_EXPERTS = (
    "the files do not say which of them is right: are they of different steps, or did each "
    "rank of expert parallelism save its own experts under this name? Those must be gathered before "
    "saving"
)


# The mesh dimension over which FSDP cuts what another parallelism has cut already: ep_fsdp, emb_fsdp.
_EXTRA_PARALLEL = re.compile(r"(?!dp_)\w+_fsdp", re.ASCII)


class Pending:
    """The local tensors of one FQN so far: column entry ``i`` is what one rank file holds."""

    __slots__ = ("specs", "table")

    def __init__(self) -> None:
        self.specs = array("I")
        self.table = ShardTable()

    def append(self, file: int, stored: Stored) -> None:
        """Add what rank file number ``file`` holds."""
        spec, *place = stored
        self.specs.append(spec.index)
        self.table.append(file, *place)

    def release(self) -> None:
        """Forget the columns: a tensor has taken them over, or copied what it needs."""
        self.specs = array("I")
        self.table = ShardTable()


@dataclass(frozen=True, slots=True)
class Replica:
    """A box that the column entries ``kept`` and ``other`` hold: where in them, and its sizes.

    ``alike`` says that they see their records in the same way.
    """

    kept: int
    other: int
    kept_at: Shape
    other_at: Shape
    sizes: Shape
    nbytes: int
    alike: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """How one sequence of specs makes a tensor.

    ``rows[j]`` is the column entry that holds box ``j``; ``replicas`` are boxes that several entries
    hold. ``layout`` is None when ``problem`` says what is missing.
    """

    rows: tuple[int, ...]
    replicas: tuple[Replica, ...]
    layout: ShardLayout | None
    placement: str
    problem: str = ""


class Merger:
    """Resolves pending tensors; ``tp_first`` says how torch ≤ 2.4 cut dims that two mesh dims shard."""

    def __init__(
        self,
        specs: Sequence[LocalSpec],
        paths: Sequence[Path],
        ranks: Sequence[int],
        tp_first: Callable[[], bool],
    ) -> None:
        self.placements: Counter[str] = Counter()
        self.replicas = Replicas(paths)
        self._specs = specs
        self._paths = paths
        self._ranks = ranks
        self._tp_first = tp_first
        self._cuts: dict[bytes, Cut] = {}
        self._pieces: dict[int, tuple[Piece, ...]] = {}

    def cut(self, fqn: str, pending: Pending) -> Cut:
        """Return how ``pending`` is cut; raises :class:`BadInputError` where its ranks disagree."""
        key = pending.specs.tobytes()
        cut = self._cuts.get(key)
        if cut is None:
            specs = [self._specs[i] for i in pending.specs]
            self._check_agreement(fqn, pending, specs)
            pieces = [self._spec_pieces(fqn, pending, i, s) for i, s in enumerate(specs)]
            cut = self._cuts[key] = _cut(specs, pieces, _describe(specs[0]))
        return cut

    def tensor(self, fqn: str, pending: Pending, cut: Cut) -> GlobalTensor:
        """Return the global tensor, its replicas compared; ``cut`` must have a layout."""
        assert cut.layout is not None  # noqa: S101 - the caller reports holes
        spec = self._specs[pending.specs[0]]
        self._compare_replicas(fqn, pending, cut)
        self.placements[cut.placement] += 1
        table = pending.table
        if cut.rows != tuple(range(len(table))):
            table = _select(table, cut.rows)
        return GlobalTensor(fqn, spec.dtype, cut.layout, table, cut.placement)

    def experts(self, fqn: str, pending: Pending) -> Undecided | None:
        """Return the two readings of a tensor that was cut by groups of ranks; None for any other.

        VeOmni cuts experts among groups along dim 0, and what a group has among its ranks. The file
        knows the group alone: its mesh is the row ``ep_fsdp`` of a larger one, its global shape that of
        the group's experts. A group's number is that of its first rank. Where all groups hold the same
        bytes, or where the model wants no more than one has, they are copies.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, index in enumerate(pending.specs):
            mesh = self._specs[index].mesh
            if mesh is None or not any(map(_EXTRA_PARALLEL.fullmatch, mesh.dim_names)):
                return None
            groups.setdefault(mesh.ranks, []).append(row)
        if len(groups) < 2:
            return None
        parts = []
        for _, rows in sorted(groups.items(), key=lambda item: min(item[0])):
            part = Pending()
            part.specs = array("I", [pending.specs[r] for r in rows])
            part.table = _select(pending.table, rows)
            cut = self.cut(fqn, part)
            if cut.layout is None:
                return None  # whoever asks reports the hole
            parts.append(self.tensor(fqn, part, cut))
        differing = self._differing_groups(pending, [*groups.values()])
        return Undecided(_stacked(fqn, parts), parts[0], differing)

    def _differing_groups(self, pending: Pending, groups: Sequence[Sequence[int]]) -> str:
        """Return in words which groups hold something else; empty where none does."""
        for rows in groups[1:]:
            for one, two in zip(groups[0], rows, strict=False):
                kept, other = self.local(pending, one), self.local(pending, two)
                if not self.replicas.same(kept, other):
                    return f"{self._rank(kept)} and {self._rank(other)}"
        return ""

    def whole(self, fqn: str, pending: Pending) -> GlobalTensor:
        """Return the first rank's local tensor as the whole tensor (the ranks are replicas)."""
        spec = self._specs[pending.specs[0]]
        layout = ShardLayout(
            spec.shape, (Box.whole(spec.shape),), (spec.strides,), (spec.storage_offset,)
        )
        return GlobalTensor(
            fqn, spec.dtype, layout, _select(pending.table, (0,)), "the same on every rank"
        )

    def stacked(self, fqn: str, pending: Pending) -> GlobalTensor | None:
        """Return the ranks' plain tensors put together along dim 0, None where shapes forbid it.

        Ranks cut as ``torch.chunk`` does: into equal pieces, but for the last ones.
        """
        specs = [self._specs[i] for i in pending.specs]
        first = specs[0]
        if any(
            not s.shape or s.shape[1:] != first.shape[1:] or s.dtype is not first.dtype
            for s in specs
        ):
            return None
        total, most = sum(s.shape[0] for s in specs), first.shape[0]
        if any(s.shape[0] != max(0, min(most, total - k * most)) for k, s in enumerate(specs)):
            return None
        rows, boxes, at = [], [], 0
        for row, spec in enumerate(specs):
            if 0 not in spec.shape:
                boxes.append(Box((at,) + (0,) * (len(spec.shape) - 1), spec.shape))
                rows.append(row)
            at += spec.shape[0]
        layout = ShardLayout(
            (at, *first.shape[1:]),
            tuple(boxes),
            tuple(specs[r].strides for r in rows),
            tuple(specs[r].storage_offset for r in rows),
        )
        return GlobalTensor(
            fqn, first.dtype, layout, _select(pending.table, rows), "rank pieces along dim 0"
        )

    def where(self, pending: Pending, row: int, fqn: str) -> str:
        """Return the file and FQN of a column entry, for messages."""
        return f"{self._paths[pending.table.files[row]]}, {fqn}"

    def local(self, pending: Pending, row: int) -> Local:
        """Return what a column entry holds."""
        table = pending.table
        stored = Stored(
            self._specs[pending.specs[row]],
            table.keys[row],
            table.starts[row],
            table.nbytes[row],
            table.crcs[row],
            table.header_nbytes[row],
        )
        return Local.of(table.files[row], stored)

    def shapes_differ(self, pending: Pending) -> bool:
        """Whether the ranks' tensors are not all of one shape."""
        return len({self._specs[i].shape for i in set(pending.specs)}) > 1

    def differing(self, pending: Pending) -> str:
        """Return in words which ranks hold something else than the first; empty where none does."""
        kept = self.local(pending, 0)
        for row in range(1, len(pending.specs)):
            other = self.local(pending, row)
            if not self.replicas.same(kept, other):
                return f"{self._rank(kept)} and {self._rank(other)}"
        return ""

    def _check_agreement(self, fqn: str, pending: Pending, specs: list[LocalSpec]) -> None:
        first = specs[0]
        for row, spec in enumerate(specs):
            for label, mine, other in (
                ("kind of tensor", first.kind, spec.kind),
                ("dtype", first.dtype.torch, spec.dtype.torch),
                ("global shape", list(first.global_shape), list(spec.global_shape)),
                ("placements", _names(first.placements), _names(spec.placements)),
                ("shard order", first.shard_order, spec.shard_order),
            ):
                if mine != other:
                    self._disagree(fqn, pending, row, label, mine, other)
            if first.mesh and spec.mesh and first.mesh is not spec.mesh:
                one, two = first.mesh, spec.mesh
                if (one.dim_names, one.shape) != (two.dim_names, two.shape):
                    self._disagree(fqn, pending, row, "device mesh", one, two)

    def _disagree(
        self, fqn: str, pending: Pending, row: int, label: str, mine: object, other: object
    ) -> None:
        files = pending.table.files
        raise BadInputError(
            f"the ranks disagree about a tensor's {label}",
            where=self.where(pending, row, fqn),
            expected=f"{mine}, as on rank {self._ranks[files[0]]}",
            found=f"{other} on rank {self._ranks[files[row]]}",
            hint="are all rank files of the same step of the same run?",
        )

    def _spec_pieces(
        self, fqn: str, pending: Pending, row: int, spec: LocalSpec
    ) -> tuple[Piece, ...]:
        pieces = self._pieces.get(spec.index)
        if pieces is None:
            try:
                pieces = _pieces(spec, self._tp_first)
            except ValueError as error:
                raise BadInputError(
                    "a local tensor does not fit its placements",
                    where=self.where(pending, row, fqn),
                    found=str(error),
                ) from None
            self._pieces[spec.index] = pieces
        return pieces

    def _compare_replicas(self, fqn: str, pending: Pending, cut: Cut) -> None:
        crcs, nbytes, count = pending.table.crcs, pending.table.nbytes, self.replicas.count
        for replica in cut.replicas:
            kept, other = replica.kept, replica.other
            # What Replicas.same begins with, told here by the specs once for all tensors: there may
            # be millions of these.
            crc = crcs[kept]
            if replica.alike and crc and crc == crcs[other] and nbytes[kept] == nbytes[other]:
                count(replica.nbytes)
                continue
            first = self.local(pending, kept).part(replica.kept_at, replica.sizes)
            second = self.local(pending, other).part(replica.other_at, replica.sizes)
            if not self.replicas.same(first, second):
                raise self._differ(fqn, first, second)
            count(replica.nbytes)

    def _differ(self, fqn: str, kept: Local, other: Local) -> BadInputError:
        def what(local: Local) -> str:
            crc = local.stored.crc32
            strides = "" if kept.strides == other.strides else f", strides {list(local.strides)}"
            return f"in a record {f'with CRC-32 {crc:08x}' if crc else 'without CRC-32'}{strides}"

        return BadInputError(
            "replicas of a tensor differ: a checkpoint mixed from different steps, or ranks "
            "that trained apart",
            where=f"{self._paths[other.file]}, {fqn}",
            expected=f"the values of {self._rank(kept)}, {what(kept)}",
            found=f"others on {self._rank(other)}, {what(other)}",
            hint=_OTHER_EXPERTS
            if "experts" in fqn
            else "the files do not say which of them is right; use a checkpoint whose "
            "rank files belong together",
        )

    def _rank(self, local: Local) -> str:
        return f"rank {self._ranks[local.file]} ({self._paths[local.file].name})"


def _stacked(fqn: str, parts: Sequence[GlobalTensor]) -> GlobalTensor:
    """Return tensors put together along dim 0."""
    boxes: list[Box] = []
    strides: list[Shape] = []
    offsets: list[int] = []
    table = ShardTable()
    at = 0
    for part in parts:
        layout = part.layout
        boxes += [Box((at + b.offsets[0], *b.offsets[1:]), b.sizes) for b in layout.boxes]
        strides += layout.strides
        offsets += layout.storage_offsets
        for record in part.shards:
            table.append(*astuple(record))
        at += part.shape[0]
    whole = ShardLayout((at, *parts[0].shape[1:]), tuple(boxes), tuple(strides), tuple(offsets))
    placement = f"{parts[0].placement}, experts in {len(parts)} groups of ranks"
    return GlobalTensor(fqn, parts[0].dtype, whole, table, placement)


def _pieces(spec: LocalSpec, tp_first: Callable[[], bool]) -> tuple[Piece, ...]:
    if spec.kind == "sharded":
        if spec.empty or spec.offsets is None or 0 in spec.shape:
            return ()
        return (Piece(Box(spec.offsets, spec.shape), (0,) * len(spec.shape)),)
    if spec.mesh is None:
        return (Piece(Box.whole(spec.shape), (0,) * len(spec.shape)),)
    if spec.mesh.coordinates is None:
        return ()
    order = spec.shard_order
    if spec.torch_2_4 and order is None and _nested(spec.mesh.shape, spec.placements):
        order = _right_to_left(spec.placements) if tp_first() else None
    return local_pieces(
        spec.global_shape,
        spec.mesh.shape,
        spec.placements,
        spec.mesh.coordinates,
        local_shape=spec.shape,
        shard_order=order,
    )


def _nested(mesh_shape: Shape, placements: Sequence[Placement]) -> bool:
    """Whether plain Shards of two mesh dims (longer than 1) cut the same tensor dim."""
    dims = [
        p.dim for n, p in zip(mesh_shape, placements, strict=True) if p.kind is Kind.SHARD and n > 1
    ]
    return len(set(dims)) < len(dims)


def _right_to_left(placements: Sequence[Placement]) -> ShardOrder:
    dims: dict[int, list[int]] = {}
    for m, p in enumerate(placements):
        if p.kind is Kind.SHARD:
            dims.setdefault(p.dim, []).insert(0, m)
    return tuple((dim, tuple(order)) for dim, order in sorted(dims.items()))


def _cut(specs: list[LocalSpec], pieces: list[tuple[Piece, ...]], placement: str) -> Cut:
    seen: dict[Box, tuple[int, Piece]] = {}
    rows: list[int] = []
    boxes: list[Box] = []
    strides: list[Shape] = []
    offsets: list[int] = []
    replicas: list[Replica] = []
    for row, (spec, held) in enumerate(zip(specs, pieces, strict=True)):
        first = seen.get(held[0].box) if held else None
        if first is not None and pieces[first[0]] == held:
            # All of it, at once: the usual case.
            start = (0,) * len(spec.shape)
            replicas.append(_replica(specs, first[0], row, start, start, spec.shape))
            continue
        for piece in held:
            kept, twin = seen.setdefault(piece.box, (row, piece))
            if kept != row:
                at = (twin.local_offsets, piece.local_offsets)
                replicas.append(_replica(specs, kept, row, *at, piece.box.sizes))
                continue
            rows.append(row)
            boxes.append(piece.box)
            strides.append(spec.strides)
            offsets.append(
                spec.storage_offset
                + sum(i * s for i, s in zip(piece.local_offsets, spec.strides, strict=True))
            )
    shape = specs[0].global_shape
    problem = check_tiling(shape, boxes) or ""
    if problem:
        hole = find_hole(shape, boxes)
        if hole is not None:
            problem = f"{hole} of the shape {list(shape)}"
        return Cut(tuple(rows), tuple(replicas), None, placement, problem)
    layout = ShardLayout(shape, tuple(boxes), tuple(strides), tuple(offsets))
    return Cut(tuple(rows), tuple(replicas), layout, placement)


def _replica(
    specs: Sequence[LocalSpec], kept: int, other: int, kept_at: Shape, other_at: Shape, sizes: Shape
) -> Replica:
    one, two = specs[kept], specs[other]
    alike = (one.shape, one.strides, one.storage_offset, kept_at) == (
        two.shape,
        two.strides,
        two.storage_offset,
        other_at,
    )
    nbytes = math.prod(sizes) * one.dtype.itemsize
    return Replica(kept, other, kept_at, other_at, sizes, nbytes, alike)


def _select(table: ShardTable, rows: Sequence[int]) -> ShardTable:
    return ShardTable(
        *(
            array(column.typecode, [column[r] for r in rows])
            for column in (
                table.files,
                table.keys,
                table.starts,
                table.nbytes,
                table.crcs,
                table.header_nbytes,
            )
        )
    )


def _names(placements: Sequence[Placement]) -> str:
    return ", ".join(map(str, placements))


def _describe(spec: LocalSpec) -> str:
    if spec.kind == "dtensor" and spec.mesh is not None:
        return f"{_names(spec.placements)} over {spec.mesh}"
    if spec.kind == "sharded":
        return "ShardedTensor"
    return "the same on every rank"
