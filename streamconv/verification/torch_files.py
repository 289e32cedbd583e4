"""Rank files as torch itself reads them: the second opinion of ``verify --source``.

Nothing here shares code with the converter's own way to the bytes. ``torch.load(mmap=True,
weights_only=True)`` finds each tensor in its file, and torch's placements say which part of the whole
it is: the indices of a dimension are split as torch splits a tensor that it distributes. No process
group is needed, because a pickled DeviceMesh knows the coordinates of the rank that wrote it.

Mapped pages count as memory. Every file's mapping is known here, and its pages are let go as soon as
they were looked at.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
import mmap
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from streamconv.files.memory_limit import PARSE_BYTES
from streamconv.ir.boxes import Shape
from streamconv.system.children import limited_memory

# It warns of every mesh that there is no process group; we want none.
logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)

_libc = ctypes.CDLL(None, use_errno=True)
_MADV_DONTNEED = 4
# Index vectors are made per dimension; no weight has one of this length.
_LONGEST_DIM = 1 << 26


class UnreadableError(Exception):
    """The installed torch cannot read a file or say where a piece belongs; the message says why."""


@dataclass(frozen=True, slots=True)
class Span:
    """Indices ``[start, start + size)`` of the whole, which lie at ``local`` of the piece."""

    start: int
    local: int
    size: int


Cut = tuple[tuple[Span, ...], ...]  # for each dimension the spans that a piece holds


@dataclass(slots=True)
class MappedFile:
    """Where a file lies in memory, and how to let go of its pages."""

    regions: tuple[tuple[int, int], ...]

    def drop(self) -> None:
        """Let go of all resident pages; they are read again when they are touched."""
        for start, size in self.regions:
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_DONTNEED)


def mapping_of(path: Path) -> MappedFile:
    """Return where ``path`` is mapped now.

    Only private mappings of the file itself: letting go of anything else would lose data.
    """
    regions = []
    wanted = str(path.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == wanted:
            start, end = (int(n, 16) for n in fields[0].split("-"))
            regions.append((start, end - start))
    return MappedFile(tuple(regions))


def map_bytes(path: Path) -> tuple[torch.Tensor, MappedFile]:
    """Return a file as a tensor of bytes that is read as it is touched."""
    size = path.stat().st_size
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return data, mapping_of(path)


@dataclass(slots=True)
class GlobalPieces:
    """A tensor of the checkpoint: the pieces of all ranks, as torch says they belong together."""

    shape: Shape
    dtype: torch.dtype
    pieces: list[tuple[torch.Tensor, Cut, MappedFile]] = field(default_factory=list)
    cuts: set[Cut] = field(default_factory=set)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def add(self, local: torch.Tensor, cut: Cut, mapping: MappedFile) -> None:
        """Take in a piece; a replica of one that is there already is left out."""
        if local.numel() and cut not in self.cuts:
            self.cuts.add(cut)
            self.pieces.append((local, cut, mapping))

    def box(self, lo: Shape, sizes: Shape) -> torch.Tensor:
        """Return the elements of a box of the whole, put together."""
        made = torch.empty(sizes, dtype=self.dtype)
        for local, cut, mapping in self.pieces:
            for spans in itertools.product(*cut):
                to, of = [], []
                for span, first, size in zip(spans, lo, sizes, strict=True):
                    a = max(first, span.start)
                    b = min(first + size, span.start + span.size)
                    if a >= b:
                        break
                    to.append(slice(a - first, b - first))
                    of.append(slice(span.local + a - span.start, span.local + b - span.start))
                else:
                    made[tuple(to)].copy_(local[tuple(of)])
                    mapping.drop()
        return made


class RankFiles:
    """The rank files of one checkpoint."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._cuts: dict[object, Cut] = {}
        self._tiled: set[object] = set()

    def headers(self, names: Iterable[str]) -> dict[str, tuple[Shape, torch.dtype]]:
        """Return the shape and dtype of the whole of each tensor, as the first file has it."""
        state = _load(self._paths[0], names)
        # Of a DTensor these are the global ones.
        return {name: (tuple(state[name].shape), state[name].dtype) for name in names}

    def read(self, names: Sequence[str]) -> dict[str, GlobalPieces]:
        """Return the pieces of these tensors on all ranks; no byte of them is read yet.

        Raises :class:`UnreadableError` where torch cannot say how they belong together, and
        ``ValueError`` where they do not make up the whole.
        """
        found: dict[str, GlobalPieces] = {}
        for path in self._paths:
            state = _load(path, names)
            mapping = mapping_of(path)
            for name in names:
                value = state[name]
                shape = tuple(value.shape)
                whole = found.setdefault(name, GlobalPieces(shape, value.dtype))
                if (whole.shape, whole.dtype) != (shape, value.dtype):
                    raise ValueError(f"{name}: {path.name} disagrees about its shape or dtype")
                if isinstance(value, DTensor):
                    local = value._local_tensor.detach()
                    cut = self._cut(name, value, tuple(local.shape))
                    if cut is not None:
                        whole.add(local, cut, mapping)
                else:
                    whole.add(value.detach(), tuple((Span(0, 0, n),) for n in shape), mapping)
        for name, whole in found.items():
            key = whole.shape, frozenset(whole.cuts)
            if key not in self._tiled:
                _check_tiling(name, whole)
                self._tiled.add(key)
        return found

    def _cut(self, name: str, value: DTensor, local_shape: Shape) -> Cut | None:
        spec = value._spec
        mesh = spec.mesh
        coordinate = mesh.__dict__.get("_coordinate_on_dim")
        if coordinate is None:
            if "_coordinate_on_dim" in mesh.__dict__:
                return None  # a rank outside the mesh holds nothing
            raise UnreadableError("a device mesh without coordinates")
        sizes = _mesh_shape(mesh)
        placements = tuple(spec.placements)
        key = (tuple(value.shape), repr(placements), sizes, tuple(coordinate))
        cut = self._cuts.get(key)
        if cut is None:
            _check_order(spec)
            cut = _split(tuple(value.shape), placements, sizes, tuple(coordinate))
            self._cuts[key] = cut
        if tuple(sum(s.size for s in spans) for spans in cut) != local_shape:
            raise UnreadableError(f"{name}: torch places another shape here than the file holds")
        return cut


def load_mapped(path: Path) -> Any:
    """Load a file that our own strict reader has accepted before; its tensors are mapped."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    try:
        with limited_memory(used + path.stat().st_size + PARSE_BYTES):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        # Whatever torch's own reader stumbles over: classes of another release, most of all.
        raise UnreadableError(f"torch {torch.__version__} cannot load it") from error


def _load(path: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    state = load_mapped(path)
    held = [state, *(v for v in state.values() if isinstance(v, dict))]
    for found in held:
        if all(isinstance(found.get(name), torch.Tensor) for name in names):
            return dict(found)
    raise UnreadableError(f"torch finds other tensors in {path.name}")


def _mesh_shape(mesh: Any) -> Shape:
    ranks = mesh.__dict__.get("mesh")
    if isinstance(ranks, torch.Tensor):  # up to torch 2.9
        return tuple(ranks.shape)
    layout = mesh.__dict__.get("_layout")
    try:
        # 2.10 to 2.12 kept the shape in the layout; today's DeviceMesh cannot read that one.
        older = getattr(layout, "__dict__", {}).get("shape")
        return tuple(operator.index(n) for n in (mesh.shape if older is None else older))
    except (AttributeError, TypeError) as error:
        raise UnreadableError(f"torch {torch.__version__} cannot read its device mesh") from error


def _check_order(spec: Any) -> None:
    """Placements speak for themselves only where the mesh dimensions cut from left to right."""
    for entry in getattr(spec, "shard_order", None) or ():
        dims = tuple(entry.mesh_dims)
        if dims != tuple(sorted(dims)):
            raise UnreadableError("a shard order other than from left to right")


def _split(shape: Shape, placements: Sequence[Any], mesh: Shape, coordinate: Shape) -> Cut:
    """Return which indices of each dimension are here: what torch's own splitting leaves of them."""
    if any(n > _LONGEST_DIM for n in shape):
        raise UnreadableError("a dimension too long to split index by index")
    indices = [torch.arange(n) for n in shape]
    for placement, size, mine in zip(placements, mesh, coordinate, strict=True):
        if isinstance(placement, Replicate):
            continue
        if isinstance(placement, _StridedShard):
            along: Any = _StridedShard(0, split_factor=placement.split_factor)
        elif isinstance(placement, Shard):
            along = Shard(0)
        else:
            raise UnreadableError(f"a placement {placement}")
        pieces, _ = along._split_tensor(indices[placement.dim], size, with_padding=False)
        indices[placement.dim] = pieces[mine]
    return tuple(tuple(_spans(i.numpy())) for i in indices)


def _spans(index: np.ndarray[Any, Any]) -> Iterator[Span]:
    ends: Iterable[int] = np.flatnonzero(np.diff(index) != 1) + 1
    bounds = [0, *map(int, ends), len(index)]
    for a, b in itertools.pairwise(bounds):
        if b > a:
            yield Span(int(index[a]), a, b - a)


def _check_tiling(name: str, whole: GlobalPieces) -> None:
    """Every element must be in exactly one piece; counted on the grid that the cuts make."""
    if not whole.shape:
        if len(whole.pieces) != 1:
            raise ValueError(f"{name}: a scalar in {len(whole.pieces)} pieces")
        return
    grids = []
    for d, size in enumerate(whole.shape):
        edges = {0, size} | {s.start for cut in whole.cuts for s in cut[d]}
        edges |= {s.start + s.size for cut in whole.cuts for s in cut[d]}
        grids.append({edge: k for k, edge in enumerate(sorted(edges))})
    count = np.zeros([len(g) - 1 for g in grids], np.int32)
    for cut in whole.cuts:
        for spans in itertools.product(*cut):
            ends = [(g[s.start], g[s.start + s.size]) for g, s in zip(grids, spans, strict=True)]
            count[tuple(slice(a, b) for a, b in ends)] += 1
    if not (count == 1).all():
        raise ValueError(f"{name}: the pieces that torch finds do not make up the whole")
