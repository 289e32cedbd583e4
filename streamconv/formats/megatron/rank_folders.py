"""Megatron's older checkpoints, one folder a rank: those of verl 0.3 and 0.4 and of Megatron-LM.

Layout on disk::

    actor/model/mp_rank_TT[_PPP][_EEE]/model.pt            verl, beside actor/huggingface/ (0.3) or
                                                           actor/hf_config_and_tokenizer/ (0.4)
    iter_NNNNNNN/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt Megatron-LM

TT is the tensor-parallel rank. PPP, the pipeline rank, is there with pipeline parallelism, EEE with
expert parallelism: a single number may be either. ``args`` in the file says which (Megatron-LM),
otherwise the content: expert-parallel ranks all hold the same parameters beside the experts
(:mod:`streamconv.formats.megatron.run`). What a file holds is told by
:mod:`streamconv.torchfile.stagefile`, how the parts go together by
:mod:`streamconv.formats.megatron.stages`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from streamconv.errors import BadInputError
from streamconv.files.jsonfile import object_or_empty
from streamconv.formats.identity import identify_file, source_file
from streamconv.formats.megatron import facts
from streamconv.formats.megatron.joins import is_factor
from streamconv.formats.megatron.names import why_no_weight
from streamconv.formats.megatron.run import EMBEDDING, SIZES, Run, check_claim, is_final_norm
from streamconv.formats.megatron.stages import Model, number_layers
from streamconv.formats.megatron.torch_dist import side_of
from streamconv.formats.replicas import Replicas
from streamconv.ir.source import Checkpoint, Skipped, SourceFile
from streamconv.torchfile.rankfile import RankReader
from streamconv.torchfile.stagefile import StageFile, read_stage_file
from streamconv.torchfile.unpickle import no_garbage_collection

NAME = "megatron_ranks"
FINISHED = False
SEVERAL = False

_FOLDER = re.compile(r"mp_rank_(\d{2,})((?:_\d{3,}){0,2})", re.ASCII)
_FILES = ("model.pt", "model_optim_rng.pt")
_SUBFOLDERS = (".", "model")
_OTHER_FOLDERS = ("optim", "rng_states", "extra")
_MAX_CONFIG_NBYTES = 4 << 20
_OUTPUT = "output_layer.weight"


def detect(path: Path) -> str | None:
    """Return why ``path`` looks like such a folder, or None."""
    folder = _data_folder(path)
    return None if folder is None else f"{len(_rank_files(folder))} folders mp_rank_*"


def side_dir(path: Path) -> Path | None:
    """Return the folder with config and tokenizer, where it is there."""
    return side_of(_data_folder(path) or path)


def index_file(_: Path) -> Path | None:
    """Return None: each rank file describes itself."""
    return None


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
            raise BadInputError("a rank file that is not a regular file", where=str(file))
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
        run = Run.of([numbers for numbers, _ in listed], files, args)
        run.check_places(files)
        compare = Replicas([file.path for file in files])
        stages, layers = number_layers(run.stages(files))
        etp = run.etp(stages, compare)
        model = Model(run.tp, run.ep, etp, compare)
        for stage in stages:
            model.add_stage(stage)
    side = side_dir(path)
    config = _config(side)
    alone = all(map(is_factor, model.tensors))
    if not alone:
        _check_ends(run, model, len(files))
    elif run.pp > 1 and type(args.get("num_layers")) is not int:
        raise BadInputError(
            "cannot determine where in the model the layers of a pipeline stage belong",
            where=str(run.folder),
            expected="num_layers among the arguments of the run",
            found="an adapter alone, which need not be on every layer",
            hint="let the trainer export the adapter",
        )
    _check_vocabulary(run, model, _told(config, "vocab_size"))
    if not alone or run.pp > 1:  # an adapter may be on the first layers only
        check_claim("num_layers", args, layers, files)
    _drop_tied(model, run, _is_tied(args, config))
    arguments = facts.of_state(args)
    megatron = facts.of_run(run.folder, arguments) | run.sizes(etp)
    skipped = sum((f.skipped for f in files), Counter())
    return Checkpoint(
        root=path,
        format=NAME,
        files=tuple(source_file(f.path, f, path) for f in files),
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
                "parallelism": facts.parallelism(megatron),
                "layers": layers,
                "replicas_dropped": compare.dropped,
                "replica_nbytes_dropped": compare.dropped_nbytes,
                "megatron": megatron,
            }
        ),
        naming="mcore",
    )


def _common_args(files: Sequence[StageFile]) -> dict[str, object]:
    """Return the arguments of the run, on which all files must agree where it matters."""
    first = files[0]
    for file in files[1:]:
        for name in (*SIZES.values(), "num_layers", "hidden_size", "num_experts", "iteration"):
            if file.args.get(name) != first.args.get(name):
                raise BadInputError(
                    "rank files of different runs or steps: their arguments disagree",
                    where=str(file.path),
                    expected=f"{name} = {first.args.get(name)}, as in {first.path}",
                    found=f"{name} = {file.args.get(name)}",
                )
    return dict(first.args)


def _check_ends(run: Run, model: Model, files: int) -> None:
    """The first stage has the embedding, the last the final norm: neither may be missing."""
    for what, there in (
        ("first", any(n.endswith(EMBEDDING) for n in model.tensors)),
        ("last", any(map(is_final_norm, model.tensors))),
    ):
        if not there:
            raise BadInputError(
                f"the {what} pipeline stage is missing",
                where=str(run.folder),
                expected=EMBEDDING if what == "first" else "decoder.final_layernorm.weight",
                found=f"{files} rank files, none of which has it",
                hint="copy the missing folders; the checkpoint cannot be converted without them",
            )


def _check_vocabulary(run: Run, model: Model, vocab_size: object) -> None:
    """Only the rows of the vocabulary tell whether the last tensor-parallel ranks are there."""
    for name, tensor in model.tensors.items():
        if name.endswith(EMBEDDING) and type(vocab_size) is int and tensor.shape[0] < vocab_size:
            raise BadInputError(
                "the files of tensor-parallel ranks are missing",
                where=str(run.folder),
                expected=f"{vocab_size} rows of {name}, as config.json says",
                found=f"{tensor.shape[0]} rows in {run.tp} ranks",
                hint="copy the missing folders; the checkpoint cannot be converted without them",
            )


def _config(side: Path | None) -> dict[str, object]:
    """Return config.json where there is one, else nothing."""
    if side is None:
        return {}
    return object_or_empty(side / "config.json", most_bytes=_MAX_CONFIG_NBYTES)


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


def _drop_tied(model: Model, run: Run, tied: bool | None) -> None:
    """Leave out the copies of a tied embedding that the last pipeline stage computes with."""
    for name in [n for n in model.tensors if n.endswith(_OUTPUT)]:
        embedding = name.removesuffix(_OUTPUT) + EMBEDDING
        if embedding not in model.tensors:
            continue
        if tied or (tied is None and run.pp > 1 and model.equal(name, embedding)):
            model.drop(name, embedding, "a copy of the embedding, with equal bytes")
