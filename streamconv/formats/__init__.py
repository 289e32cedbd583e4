"""Input formats: one file each, with ``detect``, ``identify`` and ``read``.

:func:`find_model` finds the one model that a path means, :func:`read` reads its metadata.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from streamconv.errors import BadInputError, UsageError
from streamconv.files.names import check_file_name
from streamconv.formats.dcp import plain_dcp
from streamconv.formats.fsdp import rank_files
from streamconv.formats.megatron import rank_folders, torch_dist
from streamconv.ir.source import Checkpoint, SourceFile

# A torch_dist folder is a DCP folder too: the more special format comes first.
_FORMATS: tuple[ModuleType, ...] = (rank_files, torch_dist, plain_dcp, rank_folders)

_STEP = re.compile(r"global_step_\d+|iter_\d+|release|checkpoint-\d+", re.ASCII)
_TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True, slots=True)
class Location:
    """A folder that holds one model of a known format."""

    root: Path
    module: ModuleType

    @property
    def format(self) -> str:
        """Return the name of the format."""
        return str(self.module.NAME)

    @property
    def side_dir(self) -> Path | None:
        """Return the folder with config and tokenizer, where the checkpoint has one."""
        folder: Path | None = self.module.side_dir(self.root)
        return folder

    @property
    def index_nbytes(self) -> int:
        """Return the size of the one file that describes all others, 0 in a format without one."""
        index = getattr(self.module, "index_file", None)
        path: Path | None = index(self.root) if index else None
        return path.stat().st_size if path is not None and path.is_file() else 0

    def read(self) -> Checkpoint:
        """Return the metadata of the checkpoint; no weight is read."""
        checkpoint: Checkpoint = self.module.read(self.root)
        return checkpoint

    def settings(self) -> list[tuple[str, str]]:
        """Return what beside the rank files decides how they go together."""
        return settings(self.root)

    def identify(self) -> tuple[SourceFile, ...]:
        """Return the source files with their hashes, without reading what they hold."""
        files: tuple[SourceFile, ...] = self.module.identify(self.root)
        return files


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
    if not path.is_dir():  # a file, a pipe, a device
        path = path.parent
    if rank_folders.is_rank_folder(path):
        path = path.parent
    here = detect(path)
    if here and model is None:
        return here
    found = _in_folders(path)
    if model in found:
        return found[model]
    if here and not found and here.module in (rank_files, plain_dcp):
        return here  # is it one of several in one checkpoint? Its names tell (planning.strays)
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


def model_names(path: Path) -> tuple[str, ...]:
    """Return the names of the models to choose from (actor, critic); none where ``path`` is a model."""
    if not path.is_dir() or detect(path):
        return ()
    steps = _steps(path)
    return tuple(_in_folders(path) or (_in_folders(steps[0]) if len(steps) == 1 else ()))


def _in_folders(path: Path) -> dict[str, Location]:
    return {
        p.name: loc
        for p in sorted(path.iterdir())
        if p.is_dir() and not _STEP.fullmatch(p.name) and (loc := _within(p))
    }


def _within(folder: Path) -> Location | None:
    """Return the model of a folder named for it, which NeMo-RL keeps deeper.

    Its layouts are ``step_10/policy/weights/`` and, with Megatron, ``weights/iter_0000000/``.
    """
    weights = folder if folder.name == "weights" else folder / "weights"
    places = (p for p in (folder, weights, weights / "iter_0000000") if p.is_dir())
    return next((found for p in places if (found := detect(p))), None)


def _in_run(path: Path, model: str | None) -> Location:
    steps = _steps(path)
    if len(steps) == 1:
        return find_model(steps[0], model)
    if steps:
        names = [p.name for p in steps]
        latest = _latest(path, steps)
        raise UsageError(
            f"this is a run with {len(steps)} training steps, not one checkpoint",
            where=str(path),
            found=", ".join(names[:8]) + (f", … {names[-1]}" if len(names) > 8 else ""),
            hint=f"name one of them: {latest or steps[-1]}"
            + (f" (the latest, says {_TRACKER})" if latest else ""),
        )
    raise BadInputError(
        "no checkpoint of a known format",
        where=str(path),
        expected="model_world_size_N_rank_R.pt files (verl FSDP), .metadata beside .distcp files "
        "(torch DCP, Megatron torch_dist) or mp_rank_* folders (Megatron), here or in a folder such as "
        "actor/",
        found=_what_is_here(path),
    )


def _steps(path: Path) -> list[Path]:
    steps = [p for p in path.iterdir() if p.is_dir() and _STEP.fullmatch(p.name)]
    return sorted(steps, key=lambda p: (len(p.name), p.name))


def _latest(path: Path, steps: list[Path]) -> Path | None:
    """Return the step that the run's tracker file names (a number, or ``release``)."""
    tracker = path / _TRACKER
    try:
        text = tracker.read_text("ascii")[:32].strip() if tracker.is_file() else ""
    except (OSError, ValueError):
        return None
    for step in steps:
        number = step.name.rpartition("_")[2]
        if text and (step.name == text or (number.isdigit() and number.lstrip("0") == text)):
            return step
    return None


def detect(path: Path) -> Location | None:
    """Return the model that lies in this very folder, by the names of its files; None for none."""
    for module in _FORMATS:
        if module.detect(path):
            return Location(path, module)
    return None


def _what_is_here(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    if not names:
        return "an empty folder"
    signs = (
        ("metadata.json", "a metadata.json, but no index (.metadata) of a checkpoint beside it"),
        ("zero_to_fp32.py", "a DeepSpeed ZeRO checkpoint, which is not supported yet"),
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
            "an adapter as PEFT saves it, which is not merged here: PeftModel.from_pretrained loads it "
            "onto its base model, merge_and_unload merges it"
        )
    if any(n.endswith(".safetensors") for n in names):
        return "safetensors files: this is a HuggingFace model already"
    if any(n.startswith("optim_world_size_") for n in names):
        return "optimizer state without the model's rank files"
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")


def settings(root: Path) -> list[tuple[str, str]]:
    """Return (name, hash) of files in the checkpoint ``root`` that decide how pieces go together."""
    return rank_files.settings(root)


def read(path: Path, model: str | None = None) -> Checkpoint:
    """Return the metadata of the checkpoint that ``path`` means; no weight is read."""
    return find_model(path, model).read()
