"""The files of a DeepSpeed checkpoint, by their names.

The user points at the folder that DeepSpeed was given, or at the folder of a tag in it::

    CHECKPOINT/latest                                              text, the tag
    CHECKPOINT/TAG/mp_rank_MM_model_states.pt                      stages 0 to 2
    CHECKPOINT/TAG/zero_pp_rank_D_mp_rank_MM_model_states.pt       stage 3
    CHECKPOINT/TAG/[bf16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt
    CHECKPOINT/TAG/layer_LL[-model_TT]-model_states.pt             pipeline
    CHECKPOINT/TAG/layer_L_expert_E_mp_rank_MM_model_states.pt     deepspeed.moe
    CHECKPOINT/latest_universal                                    the same of a universal checkpoint
    CHECKPOINT/TAG_universal/zero/NAME/fp32.pt                     beside copies of the model files

**Trap: ``pp_rank`` is the data-parallel rank**, never the pipeline's; ``mp_rank`` counts tensor and
pipeline parallel ranks. Numbers are not always padded. ``bf16_`` says only that the config enabled it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamconv.errors import BadInputError
from streamconv.files.filesystems import real_path
from streamconv.formats.steps import is_step, read_tracker_file

LATEST = "latest"
_LATEST_UNIVERSAL = "latest_universal"
_UNIVERSAL = "zero"
_UNIVERSAL_FILE = "fp32.pt"

_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt", re.ASCII)
_ZERO_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt", re.ASCII)
_OPTIMIZER = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt", re.ASCII
)
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt", re.ASCII)
_EXPERT = re.compile(r"(?:layer_(\d+)_)?expert_(\d+)_mp_rank_(\d+)_model_states\.pt", re.ASCII)
_EXPERT_OPTIMIZER = re.compile(r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt", re.ASCII)


@dataclass(slots=True)
class Files:
    """The files of one tag, by their numbers.

    ``models`` by model-parallel rank, ``zero_models`` and ``optimizers`` by (model-parallel,
    data-parallel rank), ``layers`` by (layer, tensor-parallel rank), ``experts`` by (layer, expert,
    model-parallel rank), ``expert_optimizers`` (of stage 0) by (model-parallel, expert-parallel rank),
    ``universal`` the files of a universal checkpoint by parameter.
    """

    folder: Path
    models: dict[int, Path] = field(default_factory=dict)
    zero_models: dict[tuple[int, int], Path] = field(default_factory=dict)
    optimizers: dict[tuple[int, int], Path] = field(default_factory=dict)
    layers: dict[tuple[int, int], Path] = field(default_factory=dict)
    experts: dict[tuple[int, int, int], Path] = field(default_factory=dict)
    expert_optimizers: dict[tuple[int, int], Path] = field(default_factory=dict)
    universal: dict[str, Path] = field(default_factory=dict)

    @property
    def all(self) -> list[Path]:
        """Return every file that may hold weights, in one order."""
        tables: tuple[Mapping[Any, Path], ...] = (
            *(self.models, self.zero_models, self.optimizers),
            *(self.layers, self.experts, self.expert_optimizers, self.universal),
        )
        return [table[key] for table in tables for key in sorted(table)]

    def ranks(self) -> list[int]:
        """Return the model-parallel ranks that any file belongs to."""
        found = {*self.models, *(m for m, _ in self.zero_models), *(m for m, _ in self.optimizers)}
        return sorted(found)

    def optimizers_of(self, rank: int) -> dict[int, Path]:
        """Return the optimizer files of a model-parallel rank by data-parallel rank."""
        return {d: p for (m, d), p in sorted(self.optimizers.items()) if m == rank}

    def models_of(self, rank: int) -> dict[int, Path]:
        """Return stage 3's model files of a model-parallel rank by data-parallel rank."""
        return {d: p for (m, d), p in sorted(self.zero_models.items()) if m == rank}


def is_tag(path: Path) -> bool:
    """Whether DeepSpeed's files lie in ``path`` itself."""
    return path.is_dir() and any(_is_ours(p.name) for p in path.iterdir())


def _is_ours(name: str) -> bool:
    return any(p.fullmatch(name) for p in (_MODEL, _ZERO_MODEL, _OPTIMIZER, _LAYER))


def tag_folder(path: Path) -> Path | None:
    """Return the folder of the checkpoint that ``path`` is; None where it is none.

    A folder with ``latest`` is one where the tag is not a step of a run, or the folder itself is the
    step: transformers writes ``checkpoint-30/global_step30``, Accelerate ``OUT/pytorch_model``.
    """
    if is_tag(path):
        return path
    tag = latest_tag(path)
    if tag is None or (is_step(tag.name) and not is_step(real_path(path).name)):
        return None
    return tag


def latest_tag(path: Path) -> Path | None:
    """Return the folder in ``path`` that ``latest`` names, where DeepSpeed's files lie in it.

    Where there is none, that of a universal checkpoint.
    """
    return _named(path, LATEST) or _named(path, _LATEST_UNIVERSAL)


def _named(path: Path, tracker: str) -> Path | None:
    text, _ = (read_tracker_file(path / tracker) if path.is_dir() else None) or ("", 0)
    if not text or text in (".", "..") or re.search(r"[/\\\0\n]", text):
        return None
    try:
        return path / text if is_tag(path / text) else None
    except OSError:
        return None


def list_files(folder: Path) -> Files:
    """Return the files in the folder of a tag; raises for what has such a name and is not a file."""
    files = Files(folder)
    for path in sorted(folder.iterdir()):
        for table, key in _keys(files, path.name):
            # Opening a FIFO would wait for a writer for ever.
            if not path.is_file():
                raise BadInputError("a file of a rank that is not a regular file", where=str(path))
            if key in table:
                raise BadInputError(
                    "two files for one rank: two runs wrote into this folder",
                    where=str(folder),
                    found=f"{table[key].name} and {path.name}",
                    hint="move the files of the other run away",
                )
            table[key] = path
    parameters = folder / _UNIVERSAL
    for path in sorted(parameters.iterdir()) if parameters.is_dir() else ():
        file = path / _UNIVERSAL_FILE
        if path.is_dir() and file.exists():
            if not file.is_file():
                raise BadInputError("a file of weights that is not a regular file", where=str(file))
            files.universal[path.name] = file
    return files


def _keys(files: Files, name: str) -> Iterator[tuple[dict[Any, Path], Any]]:
    tables: tuple[tuple[re.Pattern[str], dict[Any, Path], tuple[int, ...]], ...] = (
        (_MODEL, files.models, (1,)),
        (_ZERO_MODEL, files.zero_models, (2, 1)),
        (_OPTIMIZER, files.optimizers, (2, 1)),
        (_LAYER, files.layers, (1, 2)),
        (_EXPERT, files.experts, (1, 2, 3)),
        (_EXPERT_OPTIMIZER, files.expert_optimizers, (2, 1)),
    )
    for pattern, table, order in tables:
        match = pattern.fullmatch(name)
        if match:
            numbers = tuple(int(match[k] or 0) for k in order)
            yield table, numbers[0] if len(numbers) == 1 else numbers
