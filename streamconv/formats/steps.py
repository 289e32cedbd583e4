"""The names that trainers give to the folder of a training step, and the files that tell the newest.

``global_step_100`` (verl, SkyRL), ``iter_0000100`` and ``release`` (Megatron), ``checkpoint-100``
(transformers, Axolotl, LLaMA-Factory), ``step-100`` (torchtitan), ``step_100`` (NeMo-RL, prime-rl),
``epoch_1_step_100`` (NeMo Automodel), ``ep1-ba100`` (Composer), ``epoch0epochstep4globalstep100``
(AReaL), ``epoch=1-step=100.ckpt`` (Lightning).
"""

from __future__ import annotations

import re
from pathlib import Path

from streamconv.errors import StreamconvError
from streamconv.files.inputs import opened

TRACKERS = (
    "latest_checkpointed_iteration.txt",  # verl, Megatron
    "latest_ckpt_global_step.txt",  # SkyRL
    "latest",  # DeepSpeed
)
"""Files of a run that name its newest whole step, by its number or its folder."""

MARKERS = (
    "ckpt_contents.json",  # verl 0.9 with Megatron
    "CHECKPOINT_COMPLETE",  # LLaMA-Factory
)
"""Files that a trainer writes into a step, or a model of it, when all else is whole."""

_STEP = re.compile(
    r"(?:epoch[_=]?\d+[-_]?(?:epochstep\d+)?|ep\d+-)?"
    r"(global_?step|iter|iteration|step|checkpoint|ckpt|epoch|ba)[-_=]?(\d{1,18})"
    r"(?:(?:-\w+=[-+.\w]+?)*(?:-v\d+)?\.ckpt)?",
    re.ASCII | re.IGNORECASE,
)
_RELEASE = "release"  # Megatron's folder of a model that no training made
_MAX_TRACKER_BYTES = 4096


def step_number(name: str) -> int | None:
    """Return the training step that a folder's name tells, or None.

    >>> step_number("global_step_100"), step_number("iter_0000200"), step_number("actor")
    (100, 200, None)
    >>> step_number("ep1-ba30"), step_number("epoch_2_step_40"), step_number("epoch=1-step=50.ckpt")
    (30, 40, 50)
    >>> step_number("epoch=02-val_loss=0.32.ckpt"), step_number("epoch=0-step=7-v1.ckpt")
    (2, 7)
    """
    match = _STEP.fullmatch(name)
    return int(match[2]) if match else None


def step_kind(name: str) -> str:
    """Return what the number in a step's name counts: those of one kind can be compared.

    >>> step_kind("global_step_100"), step_kind("epoch-3"), step_kind("ep1-ba30"), step_kind("actor")
    ('globalstep', 'epoch', 'ba', '')
    """
    match = _STEP.fullmatch(name)
    return match[1].lower().replace("_", "") if match else ""


def is_step(name: str) -> bool:
    """Whether a folder of this name is one step of a run, and no model's."""
    return name == _RELEASE or step_number(name) is not None


def step_files(folder: Path) -> list[Path]:
    """Return the files in a run's folder that are one training step each, as Lightning writes them."""
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix == ".ckpt" and step_number(p.name) is not None and p.is_file()
    )


def read_tracker_file(file: Path) -> tuple[str, int] | None:
    """Return what a tracker file says and when it was written (ns); None where it cannot be read."""
    try:
        with opened(file) as tracker:
            text = tracker.pread(_MAX_TRACKER_BYTES, 0).decode(errors="replace").strip()
            return text, tracker.status.st_mtime_ns
    except (StreamconvError, OSError):
        return None


def named_step(text: str) -> int | None:
    """Return the step that a tracker's text names: a number, or a folder's name."""
    return int(text) if text.isdecimal() and text.isascii() else step_number(text)
