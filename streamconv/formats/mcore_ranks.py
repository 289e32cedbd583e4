"""Megatron's older checkpoints, one folder a rank: those of verl 0.3 and 0.4 and of Megatron-LM.

Layout on disk::

    actor/model/mp_rank_TT[_PPP][_EEE]/model.pt            verl, beside actor/huggingface/ (0.3) or
                                                           actor/hf_config_and_tokenizer/ (0.4)
    iter_NNNNNNN/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt Megatron-LM

TT is the tensor-parallel rank. PPP, the pipeline rank, is there with pipeline parallelism, EEE with
expert parallelism: a single number may be either. ``args`` in the file says which (Megatron-LM),
otherwise the content: expert-parallel ranks all hold the same parameters beside the experts. What a
file holds is told by :mod:`streamconv.torchfile.stagefile`, how the parts go together by
:mod:`streamconv.formats.mcore_stages`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from streamconv.errors import BadInputError
from streamconv.formats import mcore_facts
from streamconv.formats.identity import identify_file
from streamconv.formats.mcore_names import unwrapped, why_no_weight
from streamconv.formats.mcore_stages import (
    Member,
    Model,
    Rank,
    expert_tensor_ranks,
    number_layers,
)
from streamconv.formats.replicas import Comparer
from streamconv.formats.torch_dist import side_of
from streamconv.source import Checkpoint, Skipped, SourceFile
from streamconv.torchfile.rankfile import RankReader, Stored
from streamconv.torchfile.stagefile import StageFile, read_stage_file
from streamconv.torchfile.unpickle import no_garbage_collection

NAME = "megatron_ranks"

_FOLDER = re.compile(r"mp_rank_(\d{2,})((?:_\d{3,}){0,2})", re.ASCII)
_FILES = ("model.pt", "model_optim_rng.pt")
_SUBFOLDERS = (".", "model")
_OTHER_FOLDERS = ("optim", "rng_states", "extra")
_MAX_CONFIG_NBYTES = 16 << 20
_SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def detect(path: Path) -> str | None:
    """Return why ``path`` looks like such a folder, or None."""
    folder = _data_folder(path)
    return None if folder is None else f"{len(_rank_files(folder))} folders mp_rank_*"


def side_dir(path: Path) -> Path | None:
    """Return the folder with config and tokenizer, where it is there."""
    return side_of(_data_folder(path) or path)


def identify(path: Path) -> tuple[SourceFile, ...]:
    """Return the rank files with size, time and directory hash, their pickles unread."""
    return tuple(identify_file(file, path) for _, file in _open_folder(path))


def is_rank_folder(path: Path) -> bool:
    """Whether ``path`` is one rank's folder: its checkpoint lies above it."""
    return _FOLDER.fullmatch(path.name) is not None


def _data_folder(path: Path) -> Path | None:
    return next((f for f in (path / s for s in _SUBFOLDERS) if _rank_files(f)), None)


def _rank_files(folder: Path) -> list[tuple[tuple[int, ...], Path]]:
    """Return (numbers of the folder's name, file) of the rank files below ``folder``, in order."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            numbers = (int(match[1]), *(int(n) for n in match[2].split("_")[1:]))
            found += [(numbers, path / name) for name in _FILES if (path / name).exists()]
    return sorted(found)


def _open_folder(path: Path) -> list[tuple[tuple[int, ...], Path]]:
    folder = _data_folder(path)
    if folder is None:
        raise BadInputError(
            "no rank folders here", where=str(path), expected=f"mp_rank_*/{_FILES[0]}"
        )
    files = _rank_files(folder)
    for _, file in files:
        # Opening a FIFO would wait for a writer for ever.
        if not file.is_file():
            raise BadInputError("a rank file that is no regular file", where=str(file))
    kinds = Counter((len(numbers), file.name) for numbers, file in files)
    if len(kinds) > 1 or len({numbers for numbers, _ in files}) != len(files):
        raise BadInputError(
            "rank folders of several runs in one folder: which belong together?",
            where=str(folder),
            expected="names with as many numbers, and files of one name",
            found=", ".join(sorted({str(f.relative_to(folder)) for _, f in files})[:8]),
            hint="move the files of the other run away",
        )
    empty = [
        p for p in folder.glob("mp_rank_*") if p.is_dir() and not (p / files[0][1].name).exists()
    ]
    if empty:
        raise BadInputError(
            "a rank folder without its weights",
            where=str(min(empty)),
            expected=files[0][1].name,
            hint="copy the whole folder; the checkpoint cannot be converted without it",
        )
    return files


def read(path: Path) -> Checkpoint:
    """Read the metadata of the checkpoint in the folder ``path``.

    Raises :class:`BadInputError` when files, layers or experts are missing, when ranks or the arguments
    of the run disagree, or a file is damaged; :class:`UnsafeInputError` when a file is a trap.
    """
    listed = _open_folder(path)
    reader = RankReader()
    with no_garbage_collection():
        files = [read_stage_file(reader, file, why_no_weight) for _, file in listed]
        args = _common_args(files)
        run = _Run.of([numbers for numbers, _ in listed], files, args)
        run.check_places(files)
        compare = Comparer([file.path for file in files])
        stages, layers = number_layers(run.stages(files))
        etp = run.etp(stages, compare)
        model = Model(run.tp, run.ep, etp, compare)
        for stage in stages:
            model.add_stage(stage)
    side = side_dir(path)
    config = _config(side)
    _check_ends(run, model, len(files))
    _check_vocabulary(run, model, _told(config, "vocab_size"))
    _check_claim("num_layers", args, layers, files)
    _drop_tied(model, run, _is_tied(args, config))
    megatron = mcore_facts.of_state(args) | run.sizes(etp)
    skipped = sum((f.skipped for f in files), Counter())
    return Checkpoint(
        root=path,
        format=NAME,
        files=tuple(_source_file(f, path) for f in files),
        tensors=MappingProxyType(model.tensors),
        side_dir=side,
        skipped=(
            *model.skipped,
            *(Skipped(f"{n} entries", reason) for reason, n in sorted(skipped.items())),
            *(
                Skipped(name, "optimizer or trainer state")
                for name in _OTHER_FOLDERS
                if (path / name).is_dir()
            ),
        ),
        facts=MappingProxyType(
            {
                "ranks": len(files),
                "parallelism": mcore_facts.parallelism(megatron),
                "layers": layers,
                "replicas_dropped": compare.replicas,
                "replica_nbytes_dropped": compare.replica_nbytes,
                "megatron": megatron,
            }
        ),
        naming="mcore",
    )


def _source_file(file: StageFile, root: Path) -> SourceFile:
    return SourceFile(
        file.path.relative_to(root).as_posix(),
        file.nbytes,
        file.mtime_ns,
        file.directory_hash,
        file.prefix,
    )


def _common_args(files: Sequence[StageFile]) -> dict[str, object]:
    """Return the arguments of the run, on which all files must agree where it matters."""
    first = files[0]
    for file in files[1:]:
        for name in (*_SIZES.values(), "num_layers", "hidden_size", "num_experts", "iteration"):
            if file.args.get(name) != first.args.get(name):
                raise BadInputError(
                    "rank files of different runs or steps: their arguments disagree",
                    where=str(file.path),
                    expected=f"{name} = {first.args.get(name)}, as in {first.path}",
                    found=f"{name} = {file.args.get(name)}",
                )
    return dict(first.args)


def _check_claim(
    name: str, args: Mapping[str, object], found: int, files: Sequence[StageFile]
) -> None:
    claimed = args.get(name)
    if type(claimed) is int and claimed != found:
        raise BadInputError(
            "the rank files contradict the arguments that are saved in them",
            where=str(files[0].path.parent.parent),
            expected=f"{name} = {claimed}",
            found=str(found),
            hint="rank files are missing, or belong to another run",
        )


@dataclass(frozen=True)
class _Run:
    """The parallel sizes of a run, and the rank of each of its files."""

    ranks: tuple[Rank, ...]
    tp: int
    pp: int
    vpp: int
    ep: int
    args: Mapping[str, object]
    folder: Path

    @staticmethod
    def of(
        names: Sequence[tuple[int, ...]], files: Sequence[StageFile], args: Mapping[str, object]
    ) -> _Run:
        """Return the run whose rank folders have the numbers ``names``."""
        folder = files[0].path.parent.parent
        has_pp = len(names[0]) > 1
        if len(names[0]) == 2 and _means_experts(names, files, args, folder):
            names, has_pp = [(tp, 0, ep) for tp, ep in names], False
        ranks = tuple(Rank(*(*n, 0, 0)[:3]) for n in names)
        virtual = {len(f.stages) for f in files}
        if len(virtual) > 1:
            raise BadInputError(
                "the rank files have different numbers of virtual pipeline stages",
                where=str(folder),
                found=", ".join(map(str, sorted(virtual))),
            )
        sizes = [max(r.tp for r in ranks), max(r.pp for r in ranks), max(r.ep for r in ranks)]
        tp, pp, ep = (n + 1 for n in sizes)
        run = _Run(ranks, tp, pp, virtual.pop(), ep, args, folder)
        run._check(files, has_pp)
        return run

    def _check(self, files: Sequence[StageFile], has_pp: bool) -> None:
        for size, found in (("tp", self.tp), ("pp", self.pp), ("ep", self.ep)):
            _check_claim(_SIZES[size], self.args, found, files)
        if self.vpp > 1:
            _check_claim(_SIZES["vpp"], self.args, self.vpp, files)
        there = {(r.tp, r.pp) for r in self.ranks}
        missing = [
            f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if has_pp else "")
            for pp in range(self.pp)
            for tp in range(self.tp)
            if (tp, pp) not in there
        ]
        if missing:
            raise BadInputError(
                f"the files of {len(missing)} of {self.tp * self.pp} ranks are missing",
                where=str(self.folder),
                expected=", ".join(missing[:8]),
                hint="copy the missing folders; the checkpoint cannot be converted without them",
            )

    def check_places(self, files: Sequence[StageFile]) -> None:
        """Refuse files that lie in each other's folders, where Megatron-LM's arguments show it.

        They tell each process's own number, of which tensor parallelism is the last digit, and which
        grows with the pipeline stage. Tools that write all files from one process give all the same.
        """
        numbers = [n for f in files if type(n := f.args.get("rank")) is int]
        if len(set(numbers)) < len(files):
            return
        before: dict[tuple[int, int], int] = {}
        for rank, number, file in sorted(
            zip(self.ranks, numbers, files, strict=True), key=lambda placed: placed[0]
        ):
            least = before.get((rank.tp, rank.ep), -1)
            before[rank.tp, rank.ep] = number
            if number % self.tp != rank.tp or number < least:
                raise BadInputError(
                    "a rank file lies in the folder of another rank",
                    where=str(file.path),
                    expected=f"a process of tensor-parallel rank {rank.tp} and pipeline rank {rank.pp}",
                    found=f"process {number} of the run",
                    hint="files were swapped or renamed: copy the checkpoint again",
                )

    def sizes(self, etp: int) -> dict[str, object]:
        """Return the parallel sizes under the names that the arguments have."""
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "ep": self.ep, "etp": etp}
        return {_SIZES[k]: n for k, n in sizes.items() if k != "vpp" or n > 1}

    def stages(
        self, files: Sequence[StageFile]
    ) -> list[list[tuple[int, Rank, Mapping[str, Stored]]]]:
        """Return what each stage holds, in the order of the model's layers."""
        return [
            [
                (number, rank, _unwrapped(file, v))
                for number, (rank, file) in enumerate(zip(self.ranks, files, strict=True))
                if rank.pp == p
            ]
            for v in range(self.vpp)
            for p in range(self.pp)
        ]

    def etp(self, stages: Sequence[Sequence[Member]], compare: Comparer) -> int:
        """Return the size of expert tensor parallelism, from the arguments or the experts' bytes."""
        if not any(m.experts for stage in stages for m in stage):
            return 1
        claimed = self.args.get(_SIZES["etp"])
        if type(claimed) is not int or claimed < 1:
            return expert_tensor_ranks(stages, self.tp, compare)
        if self.tp % claimed:
            raise BadInputError(
                "the experts' tensor-parallel rank of a file cannot be told: no folder name says it",
                where=str(self.folder),
                expected="an expert tensor parallel size that divides the tensor parallel size",
                found=f"{claimed} and {self.tp}",
                hint="files of several ranks overwrote each other when this was saved",
            )
        return claimed


def _means_experts(
    names: Sequence[tuple[int, ...]],
    files: Sequence[StageFile],
    args: Mapping[str, object],
    folder: Path,
) -> bool:
    """Whether the one number after the tensor-parallel rank is the expert-parallel one."""
    pp, ep = args.get(_SIZES["pp"]), args.get(_SIZES["ep"])
    if type(pp) is int and type(ep) is int:
        if (pp > 1) == (ep > 1):
            raise BadInputError(
                "the folder names contradict the arguments that are saved in the files",
                where=str(folder),
                expected=f"folders of {pp} pipeline and {ep} expert-parallel ranks",
                found=f"mp_rank_{names[0][0]:02d}_{names[0][1]:03d}",
            )
        return ep > 1
    # Pipeline stages differ in their names: the first has the embedding, the last the final norm.
    held = {
        frozenset(n for stage in f.stages for n in stage if ".experts." not in n) for f in files
    }
    whole = any(n.endswith(_EMBEDDING) for n in next(iter(held))) and any(
        _is_final_norm(n) for n in next(iter(held))
    )
    return len(held) == 1 and whole


def _is_final_norm(name: str) -> bool:
    return name.endswith(("decoder.final_layernorm.weight", "decoder.final_norm.weight"))


def _unwrapped(file: StageFile, virtual: int) -> dict[str, Stored]:
    """Return the tensors of a stage by their names in the model, without wrappers."""
    stage = file.stages[virtual]
    result = {unwrapped(name): stored for name, stored in stage.items()}
    if len(result) != len(stage):
        raise BadInputError(
            "parameters of one name, apart from what wrappers put before it",
            where=str(file.path),
            found=f"{len(stage)} parameters of {len(result)} names",
        )
    return result


def _check_ends(run: _Run, model: Model, files: int) -> None:
    """The first stage has the embedding, the last the final norm: neither may be missing."""
    for what, there in (
        ("first", any(n.endswith(_EMBEDDING) for n in model.tensors)),
        ("last", any(map(_is_final_norm, model.tensors))),
    ):
        if not there:
            raise BadInputError(
                f"the {what} pipeline stage is missing",
                where=str(run.folder),
                expected=_EMBEDDING if what == "first" else "decoder.final_layernorm.weight",
                found=f"{files} rank files, none of which has it",
                hint="copy the missing folders; the checkpoint cannot be converted without them",
            )


def _check_vocabulary(run: _Run, model: Model, vocab_size: object) -> None:
    """Only the rows of the vocabulary tell whether the last tensor-parallel ranks are there."""
    for name, tensor in model.tensors.items():
        if name.endswith(_EMBEDDING) and type(vocab_size) is int and tensor.shape[0] < vocab_size:
            raise BadInputError(
                "the files of tensor-parallel ranks are missing",
                where=str(run.folder),
                expected=f"{vocab_size} rows of {name}, as config.json says",
                found=f"{tensor.shape[0]} rows in {run.tp} ranks",
                hint="copy the missing folders; the checkpoint cannot be converted without them",
            )


def _config(side: Path | None) -> dict[str, object]:
    """Return config.json where there is one, else nothing."""
    file = side / "config.json" if side is not None else None
    try:
        if file is None or file.stat().st_size > _MAX_CONFIG_NBYTES:
            return {}
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _told(config: Mapping[str, object], name: str) -> object:
    """Return a setting of the language model; None where it is absent or told in two ways."""
    text = config.get("text_config")
    places = (config, text) if isinstance(text, dict) else (config,)
    values = [p[name] for p in places if name in p]
    return values[0] if values and all(v == values[0] for v in values) else None


def _is_tied(args: Mapping[str, object], config: Mapping[str, object]) -> bool | None:
    """Whether the output layer is the embedding; None where neither arguments nor config say so."""
    untied = args.get("untie_embeddings_and_output_weights")
    tied = _told(config, "tie_word_embeddings")
    if isinstance(untied, bool):
        return not untied
    return tied if isinstance(tied, bool) else None


def _drop_tied(model: Model, run: _Run, tied: bool | None) -> None:
    """Leave out the copies of a tied embedding that the last pipeline stage computes with."""
    for name in [n for n in model.tensors if n.endswith(_OUTPUT)]:
        embedding = name.removesuffix(_OUTPUT) + _EMBEDDING
        if embedding not in model.tensors:
            continue
        if tied or (tied is None and run.pp > 1 and model.equal(name, embedding)):
            model.drop(name, embedding, "a copy of the embedding, with equal bytes")
