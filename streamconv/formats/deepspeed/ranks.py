"""What one model-parallel rank of a DeepSpeed run holds: masters, 16-bit weights, and all else.

* Stages 1 and 2: masters in the optimizer files; ``module`` of the model file has every tensor in the
  type that the run computed with. Frozen weights and buffers are there alone.
* Stage 3: masters in the optimizer files, frozen weights in fragments in the model files of all ranks,
  buffers in ``module``, where everything else is an empty placeholder.
* Stage 0: all in the model file.

DeepSpeed stores a parameter that is shared once, and notes its other names; stage 0 stores the others
as views of one storage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from streamconv.errors import BadInputError
from streamconv.formats.deepspeed.flat import Cutter, Part, Vector, whole
from streamconv.formats.deepspeed.folder import Files
from streamconv.formats.deepspeed.masters import Share, join_fragments, read_masters
from streamconv.formats.deepspeed.unsharded import name_masters
from streamconv.formats.identity import check_name
from streamconv.ir.boxes import Shape
from streamconv.torchfile.rankfile import RankReader, Stored
from streamconv.torchfile.zerofile import (
    FileFacts,
    ModelFile,
    Shapes,
    read_masters_file,
    read_model_file,
    read_optimizer_file,
    read_parameter_file,
    read_tensor_file,
)

_MAX_EXAMPLES = 5
_MIXED = "the files are of different saves: use a checkpoint whose files belong together"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Unnamed:
    """Groups of masters without names, whether each is one flat tensor, and their file's number."""

    groups: Sequence[Sequence[Stored]]
    flat: bool
    number: int


@dataclass(slots=True)
class Weights:
    """What a model-parallel rank holds, by name.

    ``masters`` in fp32, ``halves`` the same as the run computed with them, where they are stored, too;
    ``rest`` what has no masters. ``aliases`` are other names of what is stored, ``order`` the names as
    the model has them. ``shards`` is what the file says of tensor parallelism, ``degrees`` of the sizes
    of the run, ``experts`` how many each MoE layer has, ``shapes`` those of what was trained.
    ``unnamed`` are masters of stage 0 whose parameters lie in the layer files of a pipeline.
    """

    rank: int
    masters: dict[str, Part] = field(default_factory=dict)
    halves: dict[str, Part] = field(default_factory=dict)
    rest: dict[str, Part] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    stage: int = 0
    ranks: int = 1
    said: Mapping[str, int | str] = field(default_factory=dict)
    degrees: Mapping[str, int] = field(default_factory=dict)
    shards: Mapping[str, Any] = field(default_factory=dict)
    experts: tuple[int, ...] = ()
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    unnamed: Unnamed | None = None


class Reader:
    """Reads the files of one checkpoint; what it says of each is in ``facts``, by number."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.numbers = {path: k for k, path in enumerate(files.all)}
        self.facts: dict[int, FileFacts] = {}
        self.cutter = Cutter()
        self.notices: list[str] = []
        self.skipped: dict[str, str] = {}
        self.others: dict[str, None] = {}
        self._reader = RankReader()
        self._said: dict[str, tuple[int | str, Path]] = {}

    def weights(self, rank: int) -> Weights:
        """Return what the model-parallel rank ``rank`` holds.

        Raises :class:`BadInputError` for missing and mixed files.
        """
        shares = self._shares(rank)
        models = self.files.models_of(rank)
        if models and rank in self.files.models:
            raise BadInputError(
                "model files of stage 3 and of another stage: two runs wrote into this folder",
                where=str(self.files.folder),
                found=f"{self.files.models[rank].name} and {next(iter(models.values())).name}",
                hint="move the files of the other run away",
            )
        if models or (shares and shares[0].file.stage == 3):
            return self._stage_3(rank, shares, models)
        return self._whole_model(rank, shares)

    # Optimizer files

    def _shares(self, rank: int) -> list[Share]:
        paths = self.files.optimizers_of(rank)
        if not paths:
            return []
        if 0 not in paths:
            raise self._missing(1, [0], rank, len(paths))
        first = self._share(paths[0])
        ranks = max(first.file.partition_count)
        stale = [d for d in paths if d >= ranks]
        if stale:
            self.notices.append(
                f"{len(stale)} optimizer files ({paths[stale[0]].name} among them) are of ranks that "
                f"this save did not have: it was written on {ranks}. They are left over from another, "
                "and not used"
            )
        present = sum(d < ranks for d in paths)
        if present < ranks:
            # As many as a file may say: only some are looked for.
            missing = [*islice((d for d in range(ranks) if d not in paths), _MAX_EXAMPLES)]
            raise self._missing(ranks - present, missing, rank, len(paths), ranks)
        shares = [first, *(self._share(paths[d]) for d in range(1, ranks))]
        for share in shares[1:]:
            _check_same(first, share)
        return shares

    def _share(self, path: Path) -> Share:
        file = read_optimizer_file(self._reader, path)
        self._note(file.facts, file.said, ("ds_version", "optimizer_step"))
        return Share(self.numbers[path], file)

    def _missing(
        self,
        count: int,
        missing: Sequence[int],
        rank: int,
        found: int,
        ranks: int | None = None,
    ) -> BadInputError:
        names = ", ".join(f"zero_pp_rank_{d}_mp_rank_{rank:02}_optim_states.pt" for d in missing)
        more = f" and {count - len(missing)} more" if count > len(missing) else ""
        return BadInputError(
            f"{count} optimizer files are missing: {names}{more}",
            where=str(self.files.folder),
            expected="the files of all ranks" if ranks is None else f"those of {ranks} ranks",
            found=f"{found}",
            hint="copy the missing files, of every node that wrote some: they hold the weights in fp32",
        )

    # Stages 0, 1 and 2

    def _whole_model(self, rank: int, shares: list[Share]) -> Weights:
        path = self.files.models.get(rank)
        if path is None:
            raise BadInputError(
                "the model file is missing",
                where=str(self.files.folder),
                expected=f"mp_rank_{rank:02}_model_states.pt",
                found=f"{len(shares)} optimizer files, which do not say what is in them",
                hint="copy it; the checkpoint cannot be converted without it",
            )
        model = self._model(path)
        number = self.numbers[path]
        shapes = self._shapes(model, shares)
        weights = Weights(
            rank,
            aliases=dict(model.shared),
            order=tuple(model.module) or tuple(n for g in shapes for n in g),
            said=dict(model.said),
            degrees=model.degrees,
            shards=model.shards,
            experts=model.experts,
            shapes={n: s for g in shapes for n, s in g.items()},
        )
        trained = {name for group in shapes for name in group}
        weights.aliases |= _views_of_one(model.module, weights.aliases, trained)
        stored = {n: s for n, s in model.module.items() if n not in weights.aliases}
        if shares:
            weights.masters = read_masters(shares, shapes, self.cutter)
            weights.stage = int(shares[0].file.said.get("zero_stage", 1))
            weights.ranks = len(shares)
        elif model.masters and not self.files.expert_optimizers:
            unnamed = Unnamed(model.masters, model.flat_masters, number)
            if self.files.layers and not stored:
                weights.unnamed = unnamed
            else:
                kept = {n: whole(number, s) for n, s in stored.items() if n not in model.buffers}
                weights.masters = self.named(unnamed, kept)
        elif shapes and not self.files.universal and _is_narrow(stored, trained):
            self.notices.append(
                "there are no optimizer files: the weights are taken as the run computed with them, "
                "and not in fp32"
            )
        for name, tensor in stored.items():
            target = weights.halves if name in weights.masters else weights.rest
            target[name] = whole(number, tensor)
        lost = [n for n in model.frozen_shapes if n not in model.module]
        if lost:
            self._frozen_left_out(lost)
        return weights

    def _shapes(self, model: ModelFile, shares: Sequence[Share]) -> Sequence[Shapes]:
        shapes = model.shapes
        if not shapes and shares:
            shapes = shares[0].file.shapes
        if shares and not shapes:
            raise BadInputError(
                "the files do not say which parameters are in the flat groups: a DeepSpeed older than "
                "those supported wrote them",
                where=str(model.facts.path),
                expected="param_shapes",
                found=f"DeepSpeed {model.said.get('ds_version', 'without a version')}",
                hint="load the checkpoint with that release and save it with a newer one",
            )
        return shapes or ()

    # Stage 3

    def _stage_3(self, rank: int, shares: list[Share], paths: dict[int, Path]) -> Weights:
        if not shares and not self.files.universal:
            raise BadInputError(
                "a checkpoint of ZeRO stage 3 without its optimizer files, where all weights are",
                where=str(self.files.folder),
                expected=f"zero_pp_rank_*_mp_rank_{rank:02}_optim_states.pt",
                found="model files, which hold buffers and shapes",
                hint="copy them, too; or use model.safetensors or pytorch_model.bin beside it, where "
                "the run gathered the 16-bit weights (stage3_gather_16bit_weights_on_model_save)",
            )
        if 0 not in paths:
            raise BadInputError(
                "the model file of rank 0 is missing",
                where=str(self.files.folder),
                expected=f"zero_pp_rank_0_mp_rank_{rank:02}_model_states.pt",
                found=f"{len(paths)} model files",
                hint="copy it; the checkpoint cannot be converted without it",
            )
        if shares and shares[0].file.stage != 3:
            raise BadInputError(
                "model files of stage 3 beside optimizer files of another stage",
                where=str(shares[0].path),
                hint=_MIXED,
            )
        model = self._model(paths[0])
        self._refuse_expert_parallel(model)
        shapes = self._shapes(model, shares)
        weights = Weights(
            rank,
            masters=read_masters(shares, shapes, self.cutter) if shares else {},
            aliases=dict(model.shared),
            order=tuple(model.module),
            stage=3,
            ranks=len(shares) or len(paths),
            said=dict(model.said),
            degrees=model.degrees,
            shards=model.shards,
            shapes={n: s for g in shapes for n, s in g.items()},
        )
        for name in model.buffers:
            if name in model.module and name not in weights.masters:
                weights.rest[name] = whole(self.numbers[paths[0]], model.module[name])
        if model.frozen_shapes:
            weights.rest |= self._frozen(model, rank, paths, weights.ranks)
        return weights

    def _frozen(
        self, model: ModelFile, rank: int, paths: Mapping[int, Path], ranks: int
    ) -> dict[str, Part]:
        """Return the frozen parameters, which are nowhere where the run excluded them."""
        lost = [n for n in model.frozen_shapes if n not in model.frozen]
        if lost:
            self._frozen_left_out(lost)
        kept = {n: s for n, s in model.frozen_shapes.items() if n in model.frozen}
        if not kept:
            return {}
        missing = [d for d in range(ranks) if d not in paths]
        if missing:
            raise BadInputError(
                f"{len(missing)} model files are missing: of frozen parameters each rank has a piece",
                where=str(self.files.folder),
                expected=f"zero_pp_rank_{missing[0]}_mp_rank_{rank:02}_model_states.pt",
                found=f"{len(kept)} frozen parameters, {next(iter(kept))} among them",
                hint="copy the missing files, of every node that wrote some",
            )
        fragments = [(self.numbers[paths[0]], model.frozen)]
        for d in range(1, ranks):
            other = self._model(paths[d], module=False)
            fragments.append((self.numbers[paths[d]], other.frozen))
        made = {}
        for name, shape in kept.items():
            absent = next((k for k, held in fragments if name not in held), None)
            where = f"{self.files.all[fragments[0][0] if absent is None else absent]}, {name}"
            if absent is not None:
                raise BadInputError("a rank lacks its piece of a frozen parameter", where=where)
            pieces = [(k, held[name]) for k, held in fragments]
            made[name] = join_fragments(pieces, shape, where, self.cutter)
        return made

    def _frozen_left_out(self, lost: Sequence[str]) -> None:
        self.notices.append(
            f"{len(lost)} frozen parameters ({lost[0]} among them) are not in the checkpoint: it was "
            "saved without them (exclude_frozen_parameters)"
        )

    def _refuse_expert_parallel(self, model: ModelFile) -> None:
        if model.expert_parallel:
            raise BadInputError(
                "experts that AutoEP cut under ZeRO stage 3 are not supported yet",
                where=str(model.facts.path),
                hint="please report it, with the DeepSpeed version",
            )

    # All

    def parameter(self, name: str, shape: Shape | None) -> Part:
        """Return a parameter of a universal checkpoint, of ``shape`` where its file does not say it."""
        path = self.files.universal[name]
        facts, stored = read_parameter_file(self._reader, path)
        self._note(facts, {}, ())
        part = whole(self.numbers[path], stored)
        if shape is None or part.shape == shape:
            return part
        numel = math.prod(part.shape)
        if len(part.shape) != 1 or numel != math.prod(shape):
            raise BadInputError(
                "a parameter of a universal checkpoint has another shape than the model file says",
                where=str(path),
                expected=str(list(shape)),
                found=str(list(part.shape)),
                hint="convert the checkpoint that it was made of",
            )
        return self.cutter.part(
            part.dtype, shape, Vector([(self.numbers[path], stored)]).cut(0, numel)
        )

    def named(
        self, masters: Unnamed, parameters: Mapping[str, Part], *, rounds: int = 1
    ) -> dict[str, Part]:
        """Return masters without names by the names of the parameters that they are of."""
        return name_masters(
            masters.groups,
            masters.flat,
            parameters,
            masters.number,
            self.files.all,
            self.cutter,
            rounds=rounds,
        )

    def expert_masters(self, path: Path, parameters: Mapping[str, Part]) -> dict[str, Part]:
        """Return the masters of an expert-parallel rank of stage 0, whose parameters these are."""
        facts, groups, flat = read_masters_file(self._reader, path)
        self._note(facts, {}, ())
        return self.named(Unnamed(groups, flat, self.numbers[path]), parameters)

    def tensors(self, path: Path) -> Iterator[tuple[str, Part]]:
        """Yield the tensors of a layer's or an expert's file."""
        facts, held, skipped = read_tensor_file(self._reader, path)
        self._note(facts, {}, ())
        self.skipped.update(skipped)
        for name, stored in held.items():
            yield name, whole(self.numbers[path], stored)

    def _model(self, path: Path, *, module: bool = True) -> ModelFile:
        model = read_model_file(self._reader, path, module=module)
        self._note(model.facts, model.said, ("ds_version", "global_steps"))
        self.skipped.update(model.skipped)
        self.others.update(dict.fromkeys(model.others))
        return model

    def _note(self, facts: FileFacts, said: Mapping[str, int | str], keys: Sequence[str]) -> None:
        """Take note of a file, and hold what it says of its run against what others say."""
        check_name(facts.path, facts.prefix)
        self.facts[self.numbers[facts.path]] = facts
        for key in keys:
            if key not in said:
                continue
            known, path = self._said.setdefault(key, (said[key], facts.path))
            if known != said[key]:
                raise BadInputError(
                    "files of different saves in one folder",
                    where=str(facts.path),
                    expected=f"{key} {known}, as in {path.name}",
                    found=f"{key} {said[key]}",
                    hint=_MIXED,
                )


def _check_same(first: Share, share: Share) -> None:
    for what, one, other in (
        ("number of ranks", first.file.partition_count, share.file.partition_count),
        ("stage", first.file.stage, share.file.stage),
    ):
        if one != other:
            raise BadInputError(
                "optimizer files of different runs in one folder",
                where=str(share.path),
                expected=f"{what} {_listed(one)}, as in {first.path.name}",
                found=_listed(other),
                hint=_MIXED,
            )


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _views_of_one(
    module: Mapping[str, Stored], known: Mapping[str, str], trained: set[str]
) -> dict[str, str]:
    """Return names of tensors that are another one's: a trained one's, or the first in the file."""
    places: dict[object, str] = {}
    for name in sorted(module, key=lambda n: n not in trained):
        places.setdefault(_place(module[name]), name)
    return {
        name: first
        for name, stored in module.items()
        if name not in known
        and name not in trained
        and 0 not in stored.spec.shape
        and (first := places[_place(stored)]) != name
    }


def _place(stored: Stored) -> object:
    spec = stored.spec
    return stored.start, spec.storage_offset, spec.dtype.name, spec.shape, spec.strides


def _is_narrow(stored: Mapping[str, Stored], trained: set[str]) -> bool:
    return any(n in trained and s.spec.dtype.itemsize < 4 for n, s in stored.items())


def in_order(order: Sequence[str], found: Mapping[str, T]) -> Iterator[tuple[str, T]]:
    """Yield what was found, first by ``order``, then the others."""
    for name in order:
        if name in found:
            yield name, found[name]
    known = set(order)
    for name, item in found.items():
        if name not in known:
            yield name, item
