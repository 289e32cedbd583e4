"""The state dicts of many Megatron ranks become whole tensors under canonical names.

Byte layout of the whole: every rank file holds one state dict a virtual stage. A rank is known by its
tensor (tp), pipeline (pp) and expert (ep) number. Layers are numbered within their stage; counted
through the stages (all pp of virtual stage 0, then all of 1, …) they get their place in the model.

* What does not belong to an expert is cut over tp; ranks of other ep hold replicas.
* Experts are cut over ep by their number, and each over expert tensor parallelism (etp), whose rank
  no folder name says: where etp divides tp it is ``tp modulo etp``.

Canonical names are those of Megatron's torch_dist checkpoints
(:mod:`streamconv.formats.megatron.names`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from streamconv.errors import BadInputError
from streamconv.formats.assembly import Assembler
from streamconv.formats.assembly import Stored as Piece
from streamconv.formats.megatron.experts import ExpertKey, expert_key, lift, split_experts
from streamconv.formats.megatron.joins import Around, Cut, cut_of, is_known, join
from streamconv.formats.replicas import Local, Replicas
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import DType
from streamconv.ir.source import GlobalTensor, Skipped
from streamconv.torchfile.rankfile import Stored

_LAYER = re.compile(r"((?:^|.*\.)decoder\.layers\.)(\d+)\.", re.ASCII)
_BLOCK = re.compile(
    r"((?:^|.*\.)(?:decoder\.layers\.\d+|mtp\.layers\.\d+\.transformer_layer)\.)(.+)", re.ASCII
)

# What Megatron's own modules (the "local" spec) call otherwise than Transformer Engine's: a prefix
# within a layer, what it becomes, and the parameter that must be there for it.
_LOCAL_NAMES = (
    (
        "input_layernorm.",
        "self_attention.linear_qkv.layer_norm_",
        "self_attention.linear_qkv.weight",
    ),
    ("input_layernorm.", "self_attention.in_proj.layer_norm_", "self_attention.in_proj.weight"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_", "mlp.linear_fc1.weight"),
    # 0.19's fused MLA down projection holds the norm before it; Mamba's convolution lost its module.
    (
        "self_attention.linear_qkv_down_proj.layer_norm_",
        "input_layernorm.",
        "self_attention.linear_qkv_down_proj.weight",
    ),
    ("mixer.conv1d_", "mixer.conv1d.", "mixer.in_proj.weight"),
    ("mamba_mixer.conv1d_", "mamba_mixer.conv1d.", "mamba_mixer.in_proj.weight"),
)


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """Where a rank file stands in the run."""

    tp: int
    pp: int
    ep: int


@dataclass(frozen=True, slots=True)
class Member:
    """One rank's state dict of one stage, under names that hold for the whole model."""

    file: int
    rank: Rank
    dense: Mapping[str, Local]
    experts: Mapping[ExpertKey, Local]


def number_layers(
    stages: Sequence[Sequence[tuple[int, Rank, Mapping[str, Stored]]]],
) -> tuple[list[list[Member]], int]:
    """Return the stages under global names, and how many layers the decoder has.

    ``stages`` are in the order of the model's layers; each is (file number, rank, tensors) of the ranks
    that share it.
    """
    result: list[list[Member]] = []
    before: dict[str, int] = {}
    for members in stages:
        counts: dict[str, int] = {}
        stage = []
        for file, rank, tensors in members:
            for name in tensors:
                if match := _LAYER.match(name):
                    counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
            stage.append(_member(file, rank, tensors, before))
        for prefix, count in counts.items():
            before[prefix] = before.get(prefix, 0) + count
        result.append(stage)
    decoders = [n for prefix, n in before.items() if "vision" not in prefix]
    return result, max(decoders, default=0)


def _member(
    file: int, rank: Rank, tensors: Mapping[str, Stored], before: Mapping[str, int]
) -> Member:
    names = {name: _global(name, before) for name in tensors}
    present = set(names.values())
    dense: dict[str, Local] = {}
    experts: dict[ExpertKey, Local] = {}
    for local_name, name in names.items():
        local = Local.of(file, tensors[local_name])
        key = expert_key(name)
        if key is not None:
            kept = experts.setdefault(key, local)
        else:
            kept = dense.setdefault(_canonical(name, present), local)
        if kept is not local:
            raise BadInputError(
                "two parameters of one rank mean the same: two kinds of modules in one layer",
                where=name,
            )
    return Member(file, rank, dense, experts)


def _global(name: str, before: Mapping[str, int]) -> str:
    """Return ``name`` with its layer's number in the model."""
    match = _LAYER.match(name)
    if match is None:
        return name
    return f"{match[1]}{int(match[2]) + before.get(match[1], 0)}{name[match.end(2) :]}"


def _canonical(name: str, present: set[str]) -> str:
    match = _BLOCK.fullmatch(name)
    if match:
        block, rest = match[1], match[2]
        for old, new, needs in _LOCAL_NAMES:
            if rest.startswith(old) and block + needs in present:
                return f"{block}{new}{rest[len(old) :]}"
    return name


@dataclass
class Model:
    """Collects the tensors of a model, stage by stage."""

    tp: int
    ep: int
    etp: int
    compare: Replicas
    tensors: dict[str, GlobalTensor] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    _kept: dict[str, list[Local]] = field(default_factory=dict)
    _assembler: Assembler = field(default_factory=Assembler)

    def add_stage(self, stage: Sequence[Member]) -> None:
        """Take in one stage: its dense parameters and its experts."""
        ranks = self._dense_ranks(stage)
        shapes = {name: kept[0].shape for name, kept in self._kept.items()}
        shapes |= {name: local.shape for name, local in ranks[0].items()}
        around = Around.of(shapes, self.tp)
        for name in ranks[0]:
            locals_ = [held[name] for held in ranks]
            if not _BLOCK.fullmatch(name) and self._is_repeated(name, locals_):
                continue
            self._check_alike(name, locals_)
            cut = cut_of(name, locals_[0].shape, around)
            if cut.or_same and all(self.compare.same(locals_[0], o) for o in locals_[1:]):
                cut = dataclasses.replace(cut, replicated=True)
            self._join(name, cut, locals_)
        self._add_experts(stage, shapes)

    def drop(self, name: str, like: str, reason: str) -> None:
        """Leave out ``name``, whose local tensors must equal those of ``like``."""
        self._compare_copies(name, self._kept[name], self._kept[like], like)
        del self.tensors[name]
        self.skipped.append(Skipped(name, reason))

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors outside the layers hold the same."""
        return all(map(self.compare.same, self._kept[name], self._kept[other]))

    def _is_repeated(self, name: str, locals_: list[Local]) -> bool:
        """Whether an earlier stage had ``name``: MTP repeats the embedding on the last stage."""
        kept = self._kept.setdefault(name, locals_)
        if kept is locals_:
            return False
        self._compare_copies(name, locals_, kept, name)
        self.skipped.append(Skipped(name, "a copy on a later pipeline stage, with equal bytes"))
        return True

    def _compare_copies(self, name: str, copies: list[Local], kept: list[Local], like: str) -> None:
        for copy, original in zip(copies, kept, strict=True):
            if not self.compare.same(copy, original):
                raise BadInputError(
                    "two copies of one tensor differ: rank files of different steps?",
                    where=f"{self.compare.path(copy)}, {name}",
                    expected=f"the bytes of {like} in {self.compare.path(original)}",
                    found="other bytes",
                )
            self.compare.drop(copy)

    def _dense_ranks(self, stage: Sequence[Member]) -> list[Mapping[str, Local]]:
        """Return the dense parameters of tensor-parallel ranks 0, 1, …; replicas are compared."""
        first: dict[int, Member] = {}
        for member in stage:
            kept = first.setdefault(member.rank.tp, member)
            self._check_names(first[stage[0].rank.tp], member)
            if kept is not member:
                for name, local in member.dense.items():
                    self._compare_replicas(name, kept.dense[name], local)
        return [first[tp].dense for tp in range(self.tp)]

    def _check_names(self, kept: Member, member: Member) -> None:
        odd = kept.dense.keys() ^ member.dense.keys()
        if not odd:
            return
        name = min(odd)
        has, lacks = (kept, member) if name in kept.dense else (member, kept)
        raise BadInputError(
            "ranks of one pipeline stage hold different parameters",
            where=str(self.compare.paths[lacks.file]),
            expected=f"{name}, as in {self.compare.paths[has.file]}",
            found=f"{len(odd)} parameters in one of the two only",
            hint="are all rank files of the same step of the same run?",
        )

    def _compare_replicas(self, name: str, kept: Local, other: Local, what: str = "") -> None:
        if not self.compare.same(kept, other):
            raise BadInputError(
                what or "replicas of a parameter differ: rank files of different steps?",
                where=f"{self.compare.path(other)}, {name}",
                expected=f"the bytes of {self.compare.path(kept)}",
                found="other bytes",
                hint="the files do not say which of them is right",
            )
        self.compare.drop(other)

    def _check_alike(self, name: str, locals_: Iterable[Local]) -> None:
        first, *others = locals_
        for local in others:
            if (local.dtype, local.shape) != (first.dtype, first.shape):
                raise BadInputError(
                    "ranks hold parts of one parameter that differ in type or shape",
                    where=f"{self.compare.path(local)}, {name}",
                    expected=f"{first.dtype} {list(first.shape)}, as in {self.compare.path(first)}",
                    found=f"{local.dtype} {list(local.shape)}",
                )

    def _join(self, name: str, cut: Cut, locals_: list[Local]) -> None:
        if cut.replicated:
            what = "" if is_known(name) else _UNKNOWN
            for local in locals_[1:]:
                self._compare_replicas(name, locals_[0], local, what)
        for made, (shape, pieces) in join(cut, locals_).items():
            self._keep(made, locals_[0].dtype, shape, pieces)

    def _keep(self, name: str, dtype: DType, shape: Shape, pieces: list[Piece]) -> None:
        if name in self.tensors:
            raise BadInputError(
                "two parameters of the checkpoint are the same one",
                where=name,
                hint="are all rank files of the same step of the same run?",
            )
        self.tensors[name] = self._assembler.tensor(name, dtype, shape, pieces)

    def _add_experts(self, stage: Sequence[Member], shapes: Mapping[str, Shape]) -> None:
        found: dict[str, dict[int, dict[int, Local]]] = {}
        for member in stage:
            residue = member.rank.tp % self.etp
            for name, experts in split_experts(member.experts, shapes, self.ep):
                held = found.setdefault(name, {})
                for index, local in enumerate(experts):
                    number = member.rank.ep * len(experts) + index
                    kept = held.setdefault(number, {}).setdefault(residue, local)
                    if kept is not local:
                        self._compare_replicas(f"{name}, expert {number}", kept, local)
        widths = {
            name: next(iter(next(iter(held.values())).values())).shape
            for name, held in found.items()
        }
        for name, held in found.items():
            self._check_experts(name, held, shapes)
            locals_ = [held[e][r] for e in range(len(held)) for r in range(self.etp)]
            self._check_alike(name, locals_)
            cut = cut_of(name, locals_[0].shape, Around(widths, self.etp))
            pieces = []
            for expert in range(len(held)):
                ranks = locals_[expert * self.etp : (expert + 1) * self.etp]
                if cut.replicated:
                    for local in ranks[1:]:
                        self._compare_replicas(f"{name}, expert {expert}", ranks[0], local)
                ((shape, cuts),) = join(cut, ranks).values()
                pieces += [lift(piece, expert) for piece in cuts]
            self._keep(name, locals_[0].dtype, (len(held), *shape), pieces)

    def _check_experts(
        self, name: str, held: Mapping[int, Mapping[int, Local]], shapes: Mapping[str, Shape]
    ) -> None:
        router = shapes.get(name.partition(".experts.")[0] + ".router.weight")
        total = router[0] if router else max(held) + 1
        missing = [e for e in range(total) if len(held.get(e, ())) < self.etp]
        if missing or len(held) != total:
            parts = f", in {self.etp} parts each" if self.etp > 1 else ""
            raise BadInputError(
                f"{len(missing)} of {total} experts are not in the checkpoint"
                if missing
                else "there are more experts than the router knows",
                where=name,
                expected=f"{total} experts, as the router has{parts}",
                found=f"{len(held) - sum(e in held for e in missing)} of them",
                hint="files of expert-parallel ranks are missing; verl 0.3 and 0.4 never wrote those "
                "of ranks whose data-parallel number is above 0",
            )


_UNKNOWN = (
    "a parameter that streamconv does not know differs between tensor-parallel ranks: how its parts "
    "go together cannot be determined"
)


def expert_tensor_ranks(stages: Iterable[Sequence[Member]], tp: int, compare: Replicas) -> int:
    """Return the smallest etp by which experts of equal (ep, tp modulo etp) are replicas."""
    groups = [
        [m for m in stage if m.rank.ep == ep and m.experts]
        for stage in stages
        for ep in {m.rank.ep for m in stage}
    ]
    for etp in (d for d in range(1, tp + 1) if tp % d == 0):
        if all(_are_replicas(pair, compare) for group in groups for pair in _pairs(group, etp)):
            return etp
    return tp


def _pairs(group: Iterable[Member], etp: int) -> Iterator[tuple[Member, Member]]:
    first: dict[int, Member] = {}
    for member in group:
        kept = first.setdefault(member.rank.tp % etp, member)
        if kept is not member:
            yield kept, member


def _are_replicas(pair: tuple[Member, Member], compare: Replicas) -> bool:
    one, two = pair[0].experts, pair[1].experts
    return one.keys() == two.keys() and all(compare.same(one[k], two[k]) for k in one)
