"""Finds the one model that a path means: a folder of weights, a step, a run, or a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from streamconv.errors import BadInputError, UsageError, listed
from streamconv.files.names import INDEX, check_file_name
from streamconv.formats import meta_ranks, peft_folder, torch_file
from streamconv.formats.dcp import plain_dcp
from streamconv.formats.deepspeed import checkpoint as deepspeed
from streamconv.formats.deepspeed.folder import latest_tag
from streamconv.formats.format import Format, Location
from streamconv.formats.fsdp import rank_files
from streamconv.formats.huggingface import folder, pieces
from streamconv.formats.megatron import adapter_files, rank_folders, torch_dist
from streamconv.formats.steps import (
    TRACKERS,
    is_step,
    named_step,
    read_tracker_file,
    step_files,
    step_number,
)

FORMATS: tuple[Format, ...] = (
    rank_files,
    adapter_files,  # beside a torch_dist folder of the optimizer
    torch_dist,  # a DCP folder, too: the more special format comes first
    pieces,
    plain_dcp,
    rank_folders,
    deepspeed,  # before what lies beside it with the same weights in 16 bits
    peft_folder,
    folder,  # a finished model may lie beside what it was made of
    meta_ranks,  # releases on the Hub have Meta's files beside the model
    torch_file,
)

# How deep below the folder of a model its weights may lie: policy/weights/iter_0000000 of NeMo-RL.
_DEPTH = 3
# What trainers keep beside a model to go on from.
_STATE = re.compile(
    r"(optim(izer)?s?|extra|rng|(lr_?)?sched(uler)?s?|data_?loader)([-_]?states?)?([-_]?\d+)?",
    re.ASCII | re.IGNORECASE,
)

# Beside weights: config.json, index files, run_config.yaml.
_OF_CHECKPOINTS = {*torch_file.SUFFIXES, ".safetensors", ".distcp", ".json", ".yaml"}


def is_state(name: str) -> bool:
    """Whether a folder is called as a state of training is.

    >>> is_state("extra"), is_state("optim_states"), is_state("actor"), is_state("optimus")
    (True, True, False, False)
    """
    return _STATE.fullmatch(name) is not None


def detect(path: Path, *, finished: bool = True) -> Location | None:
    """Return the model that lies in this very place, by the names of its files; None for none.

    Without ``finished`` models that nobody trains any more do not count.
    """
    found = next((f for f in FORMATS if (finished or not f.FINISHED) and f.detect(path)), None)
    if found is torch_dist and (model := torch_dist.written_beside(path)) is not None:
        return detect(model, finished=finished)
    return Location(path, found) if found is not None else None


def settings(root: Path, format_name: str, model: str | None) -> list[tuple[str | int, ...]]:
    """Return what decides beside the files of the checkpoint ``root`` what its model is.

    (name, hash) of files that say how pieces go together, and which ``model`` is meant of those that
    may be in it: none where its folder is called so.
    """
    found: list[tuple[str | int, ...]] = [*rank_files.settings(root)]
    several = any(format_name == kind.NAME and kind.SEVERAL for kind in FORMATS)
    if several and model not in (None, root.absolute().name):
        found.append(("--model", str(model)))
    return found


def find_model(path: Path, model: str | None = None) -> Location:
    """Return where the model lies that ``path`` means.

    ``path`` is a folder of weights (or a file in it), a folder of one training step
    (``global_step_N``, ``iter_N``), or a run with a single step. ``model`` picks one of several
    (``actor``).
    Raises :class:`UsageError` where there are several to choose from, :class:`BadInputError` where
    there is none.
    """
    if not path.exists():
        raise BadInputError("there is no such checkpoint", where=str(path))
    check_file_name(str(path.absolute()))
    if path.is_file() and not rank_folders.is_rank_folder(path.parent):
        alone = _file(path)
        if alone is not None:
            return alone
    if not path.is_dir():
        _refuse_stranger(path)
        path = path.parent
    if rank_folders.is_rank_folder(path):
        path = path.parent
    here = detect(path)
    if here and here.kind.FINISHED and (tag := latest_tag(path)) is not None:
        here = Location(tag, deepspeed)  # its masters are finer than what was saved in 16 bits
    if here and model is None:
        return _beside_steps(here)
    tag = latest_tag(path)
    if tag is not None and model is None:
        return find_model(tag)  # as DeepSpeed itself loads it
    found = _in_folders(path)
    if model in found:
        return found[model]
    trained = any(not loc.kind.FINISHED for loc in found.values())
    if here and not trained and here.kind.SEVERAL:
        return here  # is it one of several in one checkpoint? Its names tell (planning.strays)
    if not trained and _steps(path):
        found = {}  # a base model or an export beside the steps of a run is not what was trained
    if model is not None and (found or not _steps(path)):
        raise UsageError(
            f"there is no model {model!r} in this checkpoint",
            where=str(path),
            found=", ".join(found) or "no model in a folder of its own",
            hint="only `convert` takes all of them" if model == "all" and found else None,
        )
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise UsageError(
            f"{len(found)} models to choose from",
            where=str(path),
            found=", ".join(found),
            hint=f"say which: --model {'|'.join(found)}, or its folder; `convert` has --model all, too",
        )
    return _in_run(path, model)


def _refuse_stranger(path: Path) -> None:
    """Raise :class:`BadInputError` for a file that does not stand for the folder that it lies in.

    One of a checkpoint does, whatever is in it: names can be completed to any of them.
    """
    if path.suffix not in _OF_CHECKPOINTS and path.name not in (*TRACKERS, ".metadata"):
        raise BadInputError(
            "this is not a file of a checkpoint",
            where=str(path),
            hint=f"name the folder of the checkpoint, which may be {path.parent}",
        )


def _beside_steps(here: Location) -> Location:
    """Return a finished model, and that it was taken, where the steps of a run lie beside it."""
    steps = [p.name for p in _steps(here.path)] if here.kind.FINISHED and here.path.is_dir() else []
    if not steps:
        return here
    notice = (
        f"the finished model in {here.path} is taken, and not a step of the run beside it "
        f"({listed(steps, 4)}): name the folder of a step to convert that"
    )
    return replace(here, notices=(notice,))


def _file(path: Path) -> Location | None:
    """Return the model that one file is, unless it is a part of the checkpoint in its folder."""
    around = detect(path.parent)
    if around is not None and around.kind is torch_file:
        return Location(path, torch_file)
    if around is not None and any(around.root / f.path == path for f in around.identify()):
        return None
    return Location(path, torch_file) if torch_file.detect(path) else None


def model_names(path: Path) -> tuple[str, ...]:
    """Return the names of the models to choose from (actor, critic); none where ``path`` is a model."""
    if not path.is_dir() or detect(path):
        return ()
    steps = _steps(path)
    found = _in_folders(path)
    if steps and all(loc.kind.FINISHED for loc in found.values()):
        found = _in_folders(steps[0]) if len(steps) == 1 and steps[0].is_dir() else {}
    return tuple(found)


def _in_folders(path: Path) -> dict[str, Location]:
    """Return the models in the folders of ``path``, each by the name of its folder."""
    models = {p.name: loc for p in _folders(path) if (loc := _within(p)) is not None}
    trained = {name: loc for name, loc in models.items() if not loc.kind.FINISHED}
    return trained or models


def _within(folder: Path) -> Location | None:
    """Return the model of a folder named for it, which may lie deeper.

    NeMo-RL has ``step_10/policy/weights/`` and, with Megatron, ``weights/iter_0000000/``, verl with
    Megatron ``actor/model/huggingface/``.
    """
    level = [folder]
    for _ in range(_DEPTH):
        found = next((loc for p in level if (loc := _detect_latest(p)) is not None), None)
        if found is not None:
            return found
        below = [p for f in level for p in _folders(f)]
        level = below or [
            p
            for f in level
            if f.name == "weights"
            for p in _steps(f)
            if step_number(p.name) == 0 and p.is_dir()
        ]
    return next((loc for p in level if (loc := detect(p)) is not None), None)


def _detect_latest(folder: Path) -> Location | None:
    """Return the model in ``folder``, or in the newest step there, as DeepSpeed's tracker tells it.

    OpenRLHF has ``ckpt/_actor/global_step20``, beside ``ckpt/_actor/latest``.
    """
    found = detect(folder)
    tag = latest_tag(folder) if found is None else None
    return found if tag is None else detect(tag)


def _folders(path: Path) -> Iterator[Path]:
    """Yield the folders that a model may lie in: not those of steps and of states of training."""
    for p in sorted(path.iterdir()):
        if not p.name.startswith(".") and p.is_dir() and not (is_step(p.name) or is_state(p.name)):
            yield p


def _in_run(path: Path, model: str | None) -> Location:
    steps = _steps(path)
    if len(steps) == 1:
        return find_model(steps[0], model)
    if steps:
        names = [p.name for p in steps]
        latest, said = _latest(path, steps)
        raise UsageError(
            f"this is a run with {len(steps)} training steps, not one checkpoint",
            where=str(path),
            found=", ".join(names[:8]) + (f", … {names[-1]}" if len(names) > 8 else ""),
            hint=f"name one of them: {latest or steps[-1]}"
            + (f" (the latest, says {said})" if latest else ""),
        )
    raise BadInputError(
        "no checkpoint of a known format",
        where=str(path),
        expected="model_world_size_N_rank_R.pt files (verl FSDP) or Accelerate's, .metadata beside "
        ".distcp files (torch DCP, Megatron torch_dist), "
        "mp_rank_* folders (Megatron), *_states.pt (DeepSpeed), a finished model, its pieces, an "
        "adapter or one torch file, here or in a folder such as actor/",
        found=_what_is_here(path),
        hint=_where_weights_are(path),
    )


def _where_weights_are(path: Path) -> str | None:
    """Return what to do where ``path`` has the config and tokenizer of a checkpoint around it."""
    if not (path / "config.json").is_file():
        return None
    around = detect(path.absolute().parent)
    if around is None or around.side_dir != path.absolute():
        return None
    return f"the weights lie around this folder: name {around.root}"


def _steps(path: Path) -> list[Path]:
    steps = [p for p in path.iterdir() if p.is_dir() and is_step(p.name)]
    steps += step_files(path)
    return sorted(steps, key=lambda p: (step_number(p.name) or 0, p.name))


def _latest(path: Path, steps: list[Path]) -> tuple[Path | None, str]:
    """Return the step that a tracker of the run names, and that tracker."""
    for name in TRACKERS:
        text, _ = read_tracker_file(path / name) or ("", 0)
        number = named_step(text)
        for step in steps if text else ():
            if step.name == text or (number is not None and step_number(step.name) == number):
                return step, name
    return None, ""


def _what_is_here(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    if not names:
        return "an empty folder"
    if torch_dist.is_zarr(path):
        return (
            "Megatron-Core's zarr layout (a folder a tensor), which is not read: load it in a release "
            "before 0.16 and save it as torch_dist"
        )
    signs = (
        ("metadata.json", "a metadata.json, but no index (.metadata) of a checkpoint beside it"),
        (
            "zero_to_fp32.py",
            "what DeepSpeed keeps beside a checkpoint, without the folder that `latest` names",
        ),
    )
    for sign, meaning in signs:
        if sign in names:
            return meaning
    if any(n.startswith("mp_rank_") for n in names):
        return "rank folders of Megatron (or files of DeepSpeed) without model.pt or model_optim_rng.pt"
    if any(n.endswith(".distcp") for n in names):
        return ".distcp files without .metadata: files that begin with a dot were not copied"
    if any(n in names for n in ("adapter_model.safetensors", "adapter_model.bin")):
        return (
            "an adapter as PEFT saves it without adapter_config.json, which says how it was trained"
        )
    if any(n.endswith(".safetensors") for n in names):
        return f"several safetensors files, and no {INDEX} that says which are the model"
    if any(n.startswith("optim_world_size_") for n in names):
        return "optimizer state without the model's rank files"
    torch_files = [n for n in names if Path(n).suffix in torch_file.SUFFIXES]
    if torch_files:
        return f"torch files, of which one must be named: {', '.join(torch_files[:8])}"
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
