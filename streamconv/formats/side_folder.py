"""Where a checkpoint keeps config and tokenizer: in a folder of their own, or among its other files.

verl writes ``huggingface/`` (before 0.5 ``hf_config_and_tokenizer/`` for Megatron). Where there is
none, a ``config.json`` beside the weights counts if it is a model's: trainers call their own so, too.
"""

from __future__ import annotations

from pathlib import Path

from streamconv.errors import StreamconvError
from streamconv.files.filesystems import real_path
from streamconv.files.jsonfile import read_json

SIDE_FOLDERS = (
    "huggingface",
    "hf_config_and_tokenizer",
    "hf_model",  # LLaMA-Factory
    "hf_ckpt",  # VeOmni
    ".hf_metadata",  # NeMo Automodel
)
_CONFIG = "config.json"
_MAX_CONFIG_NBYTES = 4 << 20


def side_folder(*places: Path) -> Path | None:
    """Return the folder with config and tokenizer in the first of ``places`` that has one."""
    for place in places:
        own = next((place / name for name in SIDE_FOLDERS if (place / name).is_dir()), None)
        if own is not None:
            return own
        if _is_model_config(place / _CONFIG):
            return place
    return None


def above(folder: Path) -> Path:
    """Return the folder that holds ``folder``; that of ``.``, too."""
    return real_path(folder).parent if folder.name in ("", "..") else folder.parent


def _is_model_config(file: Path) -> bool:
    """Whether a file is the config of a model; one that cannot be read is reported by its reader.

    So is what has the name alone: a pipe, a folder, a link that leads nowhere.
    """
    if not file.is_file():
        return file.exists() or file.is_symlink()
    try:
        # Inner objects become flags: nobody has limited this process's memory.
        config = read_json(
            file,
            most_bytes=_MAX_CONFIG_NBYTES,
            make=lambda pairs: any(name == "model_type" for name, _ in pairs),
        )
    except (StreamconvError, OSError):
        return True
    return config is True
