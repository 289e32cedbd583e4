"""DeepSpeed's files as torch itself reads them: the second opinion of ``verify --source``.

Nothing here shares code with the converter's own way to the bytes. ``torch.load`` (weights only, with
stand-ins for DeepSpeed's own classes) finds the flat groups. In stages 1 and 2 each rank's file says
itself which of its elements are whose (``param_slice_mappings``): the converter goes by the order of
``param_shapes`` instead. Under ``round_robin_gradients`` those addresses are wrong, and the order has
to do. Where the checkpoint has the weights in 16 bits as well, both must agree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from streamconv.errors import BadInputError
from streamconv.ir.boxes import Shape
from streamconv.verification.torch_files import (
    MappedFile,
    UnreadableError,
    load_mapped,
    mapping_of,
)

_OPTIMIZER = re.compile(r"(?:\w+_)?zero_pp_rank_(\d+)_mp_rank_00_?optim_states\.pt", re.ASCII)
_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt", re.ASCII)
_WHOLE_MODEL = "mp_rank_00_model_states.pt"
# A box whose elements lie so much farther apart is put together of its rows.
_SPREAD = 4


class _Kept:
    """Whatever class of DeepSpeed's a file names: its state is kept and never used."""

    def __init__(self, *args: object) -> None:
        self.args = args


_CLASSES = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


_SAFE: list[Any] = [
    (set, "__builtin__.set"),
    *((type(name.rpartition(".")[2], (_Kept,), {}), name) for name in _CLASSES),
]


@dataclass(slots=True)
class FlatPieces:
    """A tensor as pieces of its elements in C order: (first element, 1-D tensor, file)."""

    name: str
    shape: Shape
    dtype: torch.dtype
    pieces: list[tuple[int, torch.Tensor, MappedFile]] = field(default_factory=list)
    half: FlatPieces | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def add(self, first: int, local: torch.Tensor, mapping: MappedFile) -> None:
        """Take in elements, of which those behind the end are padding."""
        local = local[: max(0, math.prod(self.shape) - first)]
        if local.numel():
            self.pieces.append((first, local, mapping))

    def check(self) -> None:
        """Raise ``ValueError`` unless the pieces make up the whole, each element once."""
        at = 0
        for first, local, _ in sorted(self.pieces, key=lambda p: p[0]):
            if first != at or local.dtype != self.dtype:
                raise ValueError(f"{self.name}: the pieces that torch finds do not make it up")
            at += local.numel()
        if at != math.prod(self.shape):
            raise ValueError(f"{self.name}: torch finds {at} elements of {list(self.shape)}")

    def box(self, lo: Shape, sizes: Shape) -> torch.Tensor:
        """Return the elements of a box of the whole, put together."""
        made = self._elements(lo, sizes)
        if self.half is not None:
            narrow = self.half._elements(lo, sizes)
            cast = made.to(narrow.dtype)
            if not bool(((cast == narrow) | (cast.isnan() & narrow.isnan())).all()):
                raise BadInputError(
                    "the fp32 masters and the 16-bit weights of a parameter disagree",
                    where=self.name,
                    expected="each 16-bit weight is its master, rounded",
                    found="others: the files are of different steps, or of a layout not known here",
                    hint="use a checkpoint whose files belong together",
                )
        return made

    def _elements(self, lo: Shape, sizes: Shape) -> torch.Tensor:
        if not math.prod(sizes):
            return torch.empty(sizes, dtype=self.dtype)
        strides = torch.empty(self.shape, device="meta").stride()
        first = sum(a * s for a, s in zip(lo, strides, strict=True))
        last = first + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        if last - first + 1 > _SPREAD * math.prod(sizes) and sizes[0] > 1:
            rows = [self._elements((lo[0] + k, *lo[1:]), (1, *sizes[1:])) for k in range(sizes[0])]
            return torch.cat(rows)
        flat = torch.empty(last - first + 1, dtype=self.dtype)
        for start, local, mapping in self.pieces:
            a, b = max(first, start), min(last + 1, start + local.numel())
            if a < b:
                flat[a - first : b - first].copy_(local[a - start : b - start])
                mapping.drop()
        return flat.as_strided(sizes, strides).contiguous()


class ZeroFiles:
    """The files of one checkpoint, in the folder of its tag; ``masters`` says which weights count.

    Raises :class:`UnreadableError` for what torch alone cannot put together.
    """

    def __init__(self, folder: Path, *, masters: bool) -> None:
        names = sorted(p.name for p in folder.iterdir())
        if (folder / "zero").is_dir() or any(
            n.startswith("layer_") or "mp_rank_01_" in n for n in names
        ):
            raise UnreadableError("torch alone cannot join layers, experts or model-parallel ranks")
        found = {int(m[1]): folder / n for n in names if (m := _OPTIMIZER.fullmatch(n))}
        models = {int(m[1]): folder / n for n in names if (m := _MODEL.fullmatch(n))}
        self._models = models or {0: folder / _WHOLE_MODEL}
        self._sharded = bool(models)
        self._optimizers: list[Path] = []
        if found and (masters or models):
            count = _load(found[0])["optimizer_state_dict"]["partition_count"]
            ranks = count if isinstance(count, int) else max(count)
            self._optimizers = [found[d] for d in range(ranks)]
        self._masters = masters

    def headers(self, names: Iterable[str]) -> dict[str, tuple[Shape, torch.dtype]]:
        """Return the shape and dtype of the whole of each tensor."""
        return {n: (t.shape, t.dtype) for n, t in self.read(list(names)).items()}

    def read(self, names: Sequence[str]) -> dict[str, FlatPieces]:
        """Return the pieces of these tensors; no byte of them is read yet."""
        model = _load(self._models[0])
        mapping = mapping_of(self._models[0])
        shared: Mapping[str, str] = model.get("shared_params") or {}
        wanted = {shared.get(n, n) for n in names}
        held = {n: _whole(n, t, mapping) for n, t in model["module"].items() if n in wanted}
        found: dict[str, FlatPieces] = {}
        if self._optimizers:
            found = self._masters_of(model, wanted)
        elif self._masters and (model.get("optimizer") or {}).get("fp32_groups"):
            raise UnreadableError("masters without names, of a run without ZeRO")
        if self._sharded:
            frozen = {n for n in wanted - found.keys() if n in model["frozen_param_shapes"]}
            found |= self._fragments(model, frozen)
        for name, whole in held.items():
            if name not in found:
                found[name] = whole
            elif not self._sharded:
                found[name].half = whole
        for pieces in found.values():
            pieces.check()
        missing = [n for n in names if shared.get(n, n) not in found]
        if missing:
            raise UnreadableError("torch finds other tensors in the model file")
        return {n: found[shared.get(n, n)] for n in names}

    def _masters_of(self, model: Mapping[str, Any], wanted: set[str]) -> dict[str, FlatPieces]:
        groups = [dict(g) for g in model["param_shapes"]]
        found: dict[str, FlatPieces] = {}
        at = [0] * len(groups)
        carried: dict[str, int] = {}
        for rank, path in enumerate(self._optimizers):
            loaded = _load(path)
            state = loaded["optimizer_state_dict"]
            mapping = mapping_of(path)
            if "fp32_flat_groups" in state:
                vector = state["fp32_flat_groups"]
                places = _each_by_itself(groups, vector, rank, len(self._optimizers))
            else:
                vector = state["single_partition_of_fp32_groups"]
                zero = (loaded.get("ds_config") or {}).get("zero_optimization") or {}
                if "param_slice_mappings" in state and not zero.get("round_robin_gradients"):
                    places = _by_address(state["param_slice_mappings"], vector, carried)
                else:
                    places = _by_order(groups, vector, at, state)
            shapes = {n: tuple(s) for g in groups for n, s in g.items()}
            for name, first, piece in places:
                if name in wanted:
                    whole = found.setdefault(name, FlatPieces(name, shapes[name], piece.dtype))
                    whole.add(first, piece, mapping)
        for group in groups:
            for name, shape in group.items():
                if name in wanted and name not in found and not math.prod(shape):
                    found[name] = FlatPieces(name, tuple(shape), torch.float32)
        return found

    def _fragments(self, model: Mapping[str, Any], names: set[str]) -> dict[str, FlatPieces]:
        if not names:
            return {}
        shapes = model["frozen_param_shapes"]
        found: dict[str, FlatPieces] = {}
        for rank, path in sorted(self._models.items()):
            if rank < len(self._optimizers):
                held = _load(path)["frozen_param_fragments"]
                mapping = mapping_of(path)
                for name in names:
                    piece = held[name]
                    whole = found.setdefault(
                        name, FlatPieces(name, tuple(shapes[name]), piece.dtype)
                    )
                    whole.add(rank * piece.numel(), piece, mapping)
        return found


_Places = list[tuple[str, int, torch.Tensor]]


def _each_by_itself(
    groups: Sequence[Mapping[str, Any]], vectors: Sequence[torch.Tensor], rank: int, ranks: int
) -> _Places:
    """Stage 3: equal parts of every parameter, a sub-group's parameters in one vector."""
    made: _Places = []
    for group, vector in zip(groups, vectors, strict=True):
        sizes = [-(-math.prod(s) // ranks) for s in group.values()]
        if sum(sizes) != vector.numel():
            raise UnreadableError("torch finds flat groups of other lengths")
        pieces = torch.split(vector.detach(), sizes)
        made += [(n, rank * p.numel(), p) for n, p in zip(group, pieces, strict=True)]
    return made


def _by_address(
    mappings: Sequence[Mapping[str, Any]],
    vectors: Sequence[torch.Tensor],
    carried: dict[str, int],
) -> _Places:
    """Stages 1 and 2: the elements that the rank's own addresses name, after those of ranks before."""
    made: _Places = []
    for addresses, vector in zip(mappings, vectors, strict=True):
        for name, address in addresses.items():
            start, numel = address.start, address.numel
            first = carried.get(name, 0)
            made.append((name, first, vector.detach()[start : start + numel]))
            carried[name] = first + numel
    return made


def _by_order(
    groups: Sequence[Mapping[str, Any]],
    vectors: Sequence[torch.Tensor],
    at: list[int],
    state: Mapping[str, Any],
) -> _Places:
    """Stages 1 and 2 where addresses are missing or wrong: the order of the shapes."""
    made: _Places = []
    gaps = state.get("param_alignment_paddings") or [[0] * len(g) for g in groups]
    for k, (group, vector) in enumerate(zip(groups, vectors, strict=True)):
        begin, end = at[k], at[k] + vector.numel()
        offset = 0
        for (name, shape), gap in zip(group.items(), gaps[k], strict=True):
            numel = math.prod(shape)
            a, b = max(offset, begin), min(offset + numel, end)
            if a < b:
                made.append((name, a - offset, vector.detach()[a - begin : b - begin]))
            offset += numel + gap
        at[k] = end
    return made


def _whole(name: str, tensor: torch.Tensor, mapping: MappedFile) -> FlatPieces:
    if not tensor.is_contiguous():
        raise UnreadableError("a tensor that is not contiguous")
    whole = FlatPieces(name, tuple(tensor.shape), tensor.dtype)
    whole.add(0, tensor.detach().reshape(-1), mapping)
    return whole


def _load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals(_SAFE):
        loaded = load_mapped(path)
    if not isinstance(loaded, dict):
        raise UnreadableError(f"torch finds no dict in {path.name}")
    return loaded
