"""Local tensors of many ranks become global tensors: boxes put together, replicas compared and dropped.

What a tensor is cut into depends only on the sequence of its ranks' :class:`LocalSpec`; that
sequence is resolved once and shared by all tensors that have it (a 70B model has ten of them, not
two thousand). While rank files are read, a tensor is columns of machine integers, one entry per
rank.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from streamconv.boxes import Box, Shape, check_tiling, find_hole
from streamconv.errors import BadInputError
from streamconv.formats.replicas import same_span
from streamconv.placements import Kind, Piece, Placement, ShardOrder, local_pieces
from streamconv.source import GlobalTensor, ShardLayout, ShardTable
from streamconv.torchfile.rankfile import LocalSpec, Stored


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
class Cut:
    """How one sequence of specs makes a tensor.

    ``rows[j]`` is the column entry that holds box ``j``; ``replicas`` are pairs of entries that
    hold the same box, the kept one first. ``layout`` is None when ``problem`` says what is missing.
    """

    rows: tuple[int, ...]
    replicas: tuple[tuple[int, int], ...]
    layout: ShardLayout | None
    placement: str
    problem: str = ""


@dataclass(slots=True)
class Counts:
    """What merging saw, for ``inspect``."""

    replicas: int = 0
    replica_nbytes: int = 0
    unverifiable_replicas: int = 0
    placements: Counter[str] = field(default_factory=Counter)


class Merger:
    """Resolves pending tensors; ``tp_first`` says how torch ≤ 2.4 cut dims that two mesh dims shard."""

    def __init__(
        self,
        specs: Sequence[LocalSpec],
        paths: Sequence[Path],
        ranks: Sequence[int],
        tp_first: Callable[[], bool],
    ) -> None:
        self.counts = Counts()
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
        self.counts.placements[cut.placement] += 1
        table = pending.table
        if cut.rows != tuple(range(len(table))):
            table = _select(table, cut.rows)
        return GlobalTensor(fqn, spec.dtype, cut.layout, table, cut.placement)

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
        """Return the ranks' plain tensors put together along dim 0, None where shapes forbid it."""
        specs = [self._specs[i] for i in pending.specs]
        first = specs[0]
        if any(
            not s.shape or s.shape[1:] != first.shape[1:] or s.dtype is not first.dtype
            for s in specs
        ):
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

    def same_bytes(self, pending: Pending, a: int, b: int) -> bool | None:
        """Whether two entries hold equal bytes by their CRC-32; None where a CRC is missing."""
        crcs, specs = pending.table.crcs, self._specs
        if crcs[a] == crcs[b] and crcs[a]:
            return True
        if not crcs[a] or not crcs[b]:
            return None
        first, second = specs[pending.specs[a]], specs[pending.specs[b]]
        if not (first.padded or second.padded):
            return False
        # The CRC covers FSDP2's padding, which no one promises to be equal: look at the bytes.
        return self._compare_bytes(pending, a, b, first, second)

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
        counts, nbytes = self.counts, pending.table.nbytes
        for kept, other in cut.replicas:
            same = self.same_bytes(pending, kept, other)
            if same is False:
                files = pending.table.files
                raise BadInputError(
                    "replicas of a tensor differ: a checkpoint mixed from different steps, or ranks "
                    "that trained apart",
                    where=self.where(pending, other, fqn),
                    expected=f"the bytes of rank {self._ranks[files[kept]]} "
                    f"(CRC-32 {pending.table.crcs[kept]:08x})",
                    found=f"{pending.table.crcs[other]:08x} on rank {self._ranks[files[other]]}",
                    hint="which of them is right cannot be told from the files; use a checkpoint whose "
                    "rank files belong together",
                )
            counts.replicas += 1
            counts.replica_nbytes += nbytes[other]
            counts.unverifiable_replicas += same is None

    def _compare_bytes(
        self, pending: Pending, a: int, b: int, first: LocalSpec, second: LocalSpec
    ) -> bool:
        """Compare what two padded storages show."""
        table = pending.table
        spans = []
        for row, spec in ((a, first), (b, second)):
            last = sum((n - 1) * s for n, s in zip(spec.shape, spec.strides, strict=True))
            start = table.starts[row] + spec.storage_offset * spec.dtype.itemsize
            spans.append((self._paths[table.files[row]], start, (last + 1) * spec.dtype.itemsize))
        return first.strides == second.strides and same_span(*spans)


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
    seen: dict[Box, int] = {}
    rows: list[int] = []
    boxes: list[Box] = []
    strides: list[Shape] = []
    offsets: list[int] = []
    replicas: dict[tuple[int, int], None] = {}
    for row, (spec, held) in enumerate(zip(specs, pieces, strict=True)):
        for piece in held:
            kept = seen.setdefault(piece.box, row)
            if kept != row:
                replicas[kept, row] = None
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
