"""Adapters on Megatron's modules as verl up to 0.7 keeps them: a file a rank, without the base weights.

Layout on disk::

    actor/adapter_checkpoint/mp_rank_TT[_PPP][_EEE]_adapter.pt
    actor/huggingface/, actor/transformer_config.json

A file holds ``{"adapter_state_dict": {name: tensor}}`` of Megatron-Bridge's names
(``decoder.layers.0.mlp.linear_fc1.adapter.linear_in.weight``). Layers are numbered within their stage.
Tensor parallelism cuts ``linear_in`` by its rows, or by its columns where the module itself is cut by
columns, and ``linear_out`` by its rows: in ``linear_fc1`` those of gate and up, each. Adapters of a
module that is whole on every rank are whole, too. An adapter of grouped experts is one for all those of
an expert-parallel rank, or has an axis for them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from streamconv.errors import BadInputError
from streamconv.files.jsonfile import object_or_empty
from streamconv.formats.assembly import Assembler, Stored
from streamconv.formats.identity import check_name, identify_file, source_file
from streamconv.formats.megatron import facts
from streamconv.formats.megatron.experts import lift
from streamconv.formats.megatron.joins import Cut, Part, join
from streamconv.formats.megatron.names import unwrapped
from streamconv.formats.megatron.stages import Rank
from streamconv.formats.megatron.torch_dist import side_of
from streamconv.formats.replicas import Local, Replicas
from streamconv.formats.side_folder import above
from streamconv.ir.boxes import Shape
from streamconv.ir.source import Checkpoint, GlobalTensor, SourceFile
from streamconv.torchfile.rankfile import RankFile, RankReader
from streamconv.torchfile.unpickle import no_garbage_collection

NAME = "megatron_adapter"
FINISHED = False
SEVERAL = False

_FOLDER = "adapter_checkpoint"
_FILE = re.compile(r"mp_rank_(\d{2,})((?:_\d{3,}){0,2})_adapter\.pt", re.ASCII)
_LAYER = re.compile(r"((?:^|.*\.)decoder\.layers\.)(\d+)\.", re.ASCII)
_FACTOR = re.compile(r"(.+)\.adapter\.(?:(adapter_[a-z]+)\.)?linear_(in|out)\.weight", re.ASCII)
_EXPERT = re.compile(
    r"(.*\.mlp\.experts\.)(?:local_experts\.(\d+)\.)?(linear_fc[12]\..+)", re.ASCII
)
_BY_COLUMNS = ("linear_proj", "linear_fc2", "out_proj")
_MAX_CONFIG_NBYTES = 4 << 20


def detect(path: Path) -> str | None:
    """Return why ``path`` looks like such a folder, or None."""
    folder = _data_folder(path)
    return f"{len(_rank_files(folder))} files mp_rank_*_adapter.pt" if folder is not None else None


def side_dir(path: Path) -> Path | None:
    """Return the folder with config and tokenizer, where it is there."""
    return side_of(_data_folder(path) or path)


def index_file(path: Path) -> Path | None:  # noqa: ARG001 - a format
    """Return None: no file describes the others."""
    return None


def identify(path: Path) -> tuple[SourceFile, ...]:
    """Return the rank files with size, time and directory hash, their pickles unread."""
    return tuple(identify_file(file, path) for _, file in _open_folder(path))


def _data_folder(path: Path) -> Path | None:
    return next((f for f in (path, path / _FOLDER) if _rank_files(f)), None)


def _rank_files(folder: Path) -> list[tuple[tuple[int, ...], Path]]:
    """Return (numbers of the name, file) of the rank files in ``folder``, in order."""
    if not folder.is_dir():
        return []
    found = ((m, p) for p in folder.iterdir() if (m := _FILE.fullmatch(p.name)))
    return sorted(((int(m[1]), *(int(n) for n in m[2].split("_")[1:])), p) for m, p in found)


def _open_folder(path: Path) -> list[tuple[tuple[int, ...], Path]]:
    folder = _data_folder(path)
    if folder is None:
        raise BadInputError("no adapter here", where=str(path), expected="mp_rank_*_adapter.pt")
    files = _rank_files(folder)
    for _, file in files:
        if not file.is_file():
            raise BadInputError("a rank file that is not a regular file", where=str(file))
    if len({len(numbers) for numbers, _ in files}) > 1:
        raise BadInputError(
            "rank files of several runs in one folder: which belong together?",
            where=str(folder),
            expected="names with as many numbers",
            found=", ".join(f.name for _, f in files[:8]),
            hint="move the files of the other run away",
        )
    return files


def read(path: Path) -> Checkpoint:
    """Read the metadata of the adapter in the folder ``path``.

    Raises :class:`BadInputError` where ranks are missing or disagree, or a stage cannot be placed.
    """
    listed = _open_folder(path)
    folder = listed[0][1].parent
    reader = RankReader()
    with no_garbage_collection():
        files = [reader.read(file, k) for k, (_, file) in enumerate(listed)]
    for file in files:
        check_name(file.path, file.prefix)
    compare = Replicas([file.path for file in files])
    told = facts.of_run(folder, {})
    run = _Run(folder, [n for n, _ in listed], files, told, compare)
    tensors = run.tensors()
    megatron = {**told, **run.sizes()}
    return Checkpoint(
        root=path,
        format=NAME,
        files=tuple(source_file(f.path, f, path) for f in files),
        tensors=MappingProxyType(tensors),
        side_dir=side_of(folder),
        notices=_beside(folder),
        facts=MappingProxyType(
            {
                "ranks": len(files),
                "parallelism": facts.parallelism(megatron),
                "replicas_dropped": compare.dropped,
                "replica_nbytes_dropped": compare.dropped_nbytes,
                "megatron": megatron,
            }
        ),
        naming="mcore",
    )


def _beside(folder: Path) -> tuple[str, ...]:
    weights = above(folder) / "dist_ckpt"
    if not any(weights.glob("*.distcp")):
        return ()
    notice = (
        f"the adapter alone is read, from {folder.name}/: where dist_ckpt/ beside it holds the base "
        f"weights as well (use_dist_checkpointing), name that folder to merge into them"
    )
    return (notice,)


class _Run:
    """The ranks of a run, and what their files hold of each parameter."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[tuple[int, ...]],
        files: Sequence[RankFile],
        told: Mapping[str, object],
        compare: Replicas,
    ) -> None:
        self._folder = folder
        self._told = told
        self._compare = compare
        self._held = [self._locals(k, file) for k, file in enumerate(files)]
        self._ranks = self._placed(names)
        self._tp, self._pp, self._ep = (
            max(getattr(r, n) for r in self._ranks) + 1 for n in ("tp", "pp", "ep")
        )
        self._check_ranks()

    def sizes(self) -> dict[str, object]:
        """Return the parallel sizes under the names that Megatron's arguments have."""
        return {
            "tensor_model_parallel_size": self._tp,
            "pipeline_model_parallel_size": self._pp,
            "expert_model_parallel_size": self._ep,
        }

    def _locals(self, number: int, file: RankFile) -> dict[str, Local]:
        found = {}
        for name, stored in file.tensors.items():
            if stored.spec.kind != "plain" or not _FACTOR.fullmatch(name):
                raise BadInputError(
                    "a tensor of another kind than an adapter's file holds",
                    where=f"{file.path}, {name[:200]}",
                    expected="adapter.linear_in.weight and adapter.linear_out.weight of modules",
                )
            found[unwrapped(name)] = Local.of(number, stored)
        return found

    def _size(self, name: str) -> int | None:
        value = self._told.get(name)
        return value if type(value) is int and value > 0 else None

    def _placed(self, names: Sequence[tuple[int, ...]]) -> list[Rank]:
        if len(names[0]) != 2:
            return [Rank(*(*n, 0, 0)[:3]) for n in names]
        pp, ep = (self._size(f"{kind}_model_parallel_size") for kind in ("pipeline", "expert"))
        if pp is not None and ep is not None:
            by_experts = ep > 1
        else:
            # Ranks of expert parallelism hold the same but for experts, stages of a pipeline never do.
            first, *others = (h for n, h in zip(names, self._held, strict=True) if n[0] == 0)
            by_experts = all(self._alike(first, o) for o in others)
            if any(_EXPERT.fullmatch(n) for n in first):
                raise BadInputError(
                    "cannot determine whether the second number of these names is a stage of the "
                    "pipeline or a rank of expert parallelism",
                    where=str(self._folder),
                    expected="transformer_config.json beside the folder",
                )
        return [Rank(n[0], 0, n[1]) if by_experts else Rank(n[0], n[1], 0) for n in names]

    def _alike(self, one: Mapping[str, Local], other: Mapping[str, Local]) -> bool:
        return one.keys() == other.keys() and all(self._compare.same(one[n], other[n]) for n in one)

    def _check_ranks(self) -> None:
        # Which ranks of tensor parallelism are which of expert parallelism depends on the run.
        there = {(kind, getattr(r, kind), r.pp) for r in self._ranks for kind in ("tp", "ep")}
        missing = [
            f"{kind} {n}, pp {p}"
            for kind, size in (("tp", self._tp), ("ep", self._ep))
            for n in range(size)
            for p in range(self._pp)
            if (kind, n, p) not in there
        ]
        for size, found in (("tensor", self._tp), ("pipeline", self._pp), ("expert", self._ep)):
            told = self._size(f"{size}_model_parallel_size")
            if told not in (None, found):
                missing.append(f"{told} {size}-parallel ranks (found {found})")
        if missing:
            raise BadInputError(
                "files of ranks are missing",
                where=str(self._folder),
                expected=", ".join(missing[:8]),
                hint="copy the whole folder, of every node that wrote to it",
            )
        if (self._size("virtual_pipeline_model_parallel_size") or 1) > 1:
            raise BadInputError(
                "with virtual pipeline stages this release of verl saved the first stage of each rank "
                "alone: the rest of the adapter was not saved",
                where=str(self._folder),
            )

    def _first_layers(self) -> list[int]:
        """Return the number in the model of each stage's first layer."""
        counts = [
            max(
                (
                    int(m[2]) + 1
                    for r, held in self._of_stage(p)
                    for n in held
                    if (m := _LAYER.match(n))
                ),
                default=0,
            )
            for p in range(self._pp)
        ]
        side = side_of(self._folder)
        config = (
            object_or_empty(side / "config.json", most_bytes=_MAX_CONFIG_NBYTES) if side else {}
        )
        text = config.get("text_config")
        config = {**config, **(text if isinstance(text, dict) else {})}
        layers = self._size("num_layers") or config.get("num_hidden_layers")
        if self._pp > 1 and sum(counts) != layers:
            raise BadInputError(
                "cannot determine where in the model the layers of a pipeline stage belong",
                where=str(self._folder),
                expected=f"adapters up to the last of {layers} layers in all stages together",
                found=f"layers up to {', '.join(map(str, counts))} in the stages",
                hint="let the trainer export the adapter",
            )
        return [sum(counts[:p]) for p in range(self._pp)]

    def _of_stage(self, stage: int) -> Iterator[tuple[Rank, Mapping[str, Local]]]:
        for rank, held in sorted(zip(self._ranks, self._held, strict=True), key=lambda x: x[0]):
            if rank.pp == stage:
                yield rank, held

    def tensors(self) -> dict[str, GlobalTensor]:
        """Return the whole factors under canonical names."""
        made: dict[str, GlobalTensor] = {}
        assembler = Assembler()
        for stage, first in enumerate(self._first_layers()):
            ranks = list(self._of_stage(stage))
            self._check_names(ranks)
            for name in ranks[0][1]:
                if not _EXPERT.fullmatch(name):
                    dtype = ranks[0][1][name].dtype
                    shape, pieces = self._dense(name, ranks)
                    target = _numbered(name, first)
                    made[target] = assembler.tensor(target, dtype, shape, pieces)
            for name, (local, shape, pieces) in self._experts(ranks).items():
                target = _numbered(name, first)
                made[target] = assembler.tensor(target, local.dtype, shape, pieces)
        return made

    def _check_names(self, ranks: Sequence[tuple[Rank, Mapping[str, Local]]]) -> None:
        for rank, held in ranks:
            odd = held.keys() ^ ranks[0][1].keys()
            if odd:
                raise BadInputError(
                    "ranks of one pipeline stage hold adapters of different modules",
                    where=str(self._folder),
                    found=f"{min(odd)} is not on every rank (tp {rank.tp}, ep {rank.ep})",
                    hint="are all files of the same step of the same run?",
                )

    def _dense(
        self, name: str, ranks: Sequence[tuple[Rank, Mapping[str, Local]]]
    ) -> tuple[Shape, list[Stored]]:
        first: dict[int, Local] = {}
        for rank, held in ranks:
            kept = first.setdefault(rank.tp, held[name])
            if kept is not held[name]:
                if not self._compare.same(kept, held[name]):
                    raise self._differ(name, kept, held[name])
                self._compare.drop(held[name])
        whole = self._is_whole(name, list({rank.tp: held for rank, held in ranks}.values()))
        return self._joined(name, [first[t] for t in sorted(first)], ranks[0][1], whole=whole)

    def _is_whole(self, name: str, ranks: Sequence[Mapping[str, Local]]) -> bool:
        """Whether both factors are the same on all ranks: then they are those of a whole module."""
        match = _FACTOR.fullmatch(name)
        if match is None or len(ranks) < 2:
            return False
        stem = name.removesuffix(f"linear_{match[3]}.weight")
        both = [n for n in (f"{stem}linear_in.weight", f"{stem}linear_out.weight") if n in ranks[0]]
        return all(self._compare.same(ranks[0][n], r[n]) for r in ranks[1:] for n in both)

    def _joined(
        self, name: str, ranks: Sequence[Local], around: Mapping[str, Local], *, whole: bool = False
    ) -> tuple[Shape, list[Stored]]:
        for local in ranks[1:]:
            if (local.dtype, local.shape) != (ranks[0].dtype, ranks[0].shape):
                raise self._differ(name, ranks[0], local)
        if whole:
            for local in ranks[1:]:
                self._compare.drop(local)
        cut = self._cut(name, ranks[0].shape, around, len(ranks))
        ((shape, pieces),) = join(dataclasses.replace(cut, replicated=whole), ranks).values()
        return shape, pieces

    def _cut(self, name: str, shape: Shape, around: Mapping[str, Local], ranks: int) -> Cut:
        match = _FACTOR.fullmatch(name)
        if match is None or len(shape) != 2:
            raise BadInputError(
                "a factor of an adapter that is not a matrix",
                where=name,
                expected="[rank, in] or [out, rank]",
                found=str(list(shape)),
            )
        module, part, which = match.groups()
        if which == "in" and module.endswith(_BY_COLUMNS):
            return Cut((Part(name, shape[1]),), dim=1)
        halved = which == "out" and part is None and ranks > 1 and module.endswith("linear_fc1")
        if halved and self._is_gated(module, shape[0], around):
            return Cut((Part(name, shape[0] // 2), Part(name, shape[0] // 2)))
        return Cut((Part(name, shape[0]),))

    def _is_gated(self, module: str, rows: int, around: Mapping[str, Local]) -> bool:
        second = around.get(f"{module.removesuffix('1')}2.adapter.linear_in.weight")
        if second is not None and second.shape[-1] in (rows, rows // 2):
            return second.shape[-1] != rows
        config = object_or_empty(
            above(self._folder) / "transformer_config.json", most_bytes=_MAX_CONFIG_NBYTES
        )
        gated = config.get("gated_linear_unit")
        if not isinstance(gated, bool):
            raise BadInputError(
                "cannot determine whether the rows of this adapter belong to a gate and to what it "
                "gates",
                where=f"{module}.adapter.linear_out.weight",
                expected="gated_linear_unit in transformer_config.json beside the folder, or an "
                "adapter of linear_fc2",
            )
        return gated

    def _experts(
        self, ranks: Sequence[tuple[Rank, Mapping[str, Local]]]
    ) -> dict[str, tuple[Local, Shape, list[Stored]]]:
        """Return the factors of experts, one after the other: each for one expert, or for several."""
        found: dict[str, dict[tuple[int, int], dict[int, Local]]] = {}
        etp = self._expert_tensor_ranks(ranks)
        for rank, held in ranks:
            for name, local in held.items():
                if match := _EXPERT.fullmatch(name):
                    canonical = f"{match[1]}experts.{match[3]}"
                    for number, one in enumerate(_matrices(local), int(match[2] or 0)):
                        parts = found.setdefault(canonical, {}).setdefault((rank.ep, number), {})
                        kept = parts.setdefault(rank.tp % etp, one)
                        if kept is not one:
                            if not self._compare.same(kept, one):
                                raise self._differ(canonical, kept, one)
                            self._compare.drop(one)
        made = {}
        for name, slices in found.items():
            around = {n: next(iter(next(iter(s.values())).values())) for n, s in found.items()}
            pieces: list[Stored] = []
            for index, key in enumerate(sorted(slices)):
                parts = slices[key]
                if len(parts) != etp:
                    raise BadInputError(
                        "parts of an expert's adapter are missing",
                        where=name,
                        expected=f"those of {etp} ranks of expert tensor parallelism",
                        found=f"{len(parts)}",
                    )
                shape, cuts = self._joined(name, [parts[k] for k in range(etp)], around)
                pieces += [lift(piece, index) for piece in cuts]
            first = next(iter(next(iter(slices.values())).values()))
            made[name] = first, (len(slices), *shape), pieces
        return made

    def _expert_tensor_ranks(self, ranks: Sequence[tuple[Rank, Mapping[str, Local]]]) -> int:
        told = self._size("expert_tensor_parallel_size")
        if self._tp == 1 or not any(_EXPERT.fullmatch(n) for n in ranks[0][1]):
            return 1
        if told is None or self._tp % told:
            raise BadInputError(
                "cannot determine how many ranks share the adapter of an expert",
                where=str(self._folder),
                expected="an expert_tensor_parallel_size in transformer_config.json that divides "
                f"{self._tp}",
                found=str(told),
            )
        return told

    def _differ(self, name: str, kept: Local, other: Local) -> BadInputError:
        return BadInputError(
            "ranks that should hold the same of an adapter differ: files of different steps?",
            where=f"{self._compare.path(other)}, {name}",
            expected=f"{kept.dtype} {list(kept.shape)}, as in {self._compare.path(kept)}",
            found=f"{other.dtype} {list(other.shape)} with other bytes",
        )


def _matrices(local: Local) -> list[Local]:
    """Return the factor of each of a rank's experts, where it has an axis for them."""
    if len(local.shape) != 3:
        return [local]
    return [
        dataclasses.replace(
            local,
            shape=local.shape[1:],
            strides=local.strides[1:],
            storage_offset=local.storage_offset + e * local.strides[0],
        )
        for e in range(local.shape[0])
    ]


def _numbered(name: str, first: int) -> str:
    """Return ``name`` with its layer's number in the model."""
    match = _LAYER.match(name)
    if match is None:
        return name
    return f"{match[1]}{int(match[2]) + first}{name[match.end(2) :]}"
