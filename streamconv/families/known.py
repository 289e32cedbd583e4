"""What is known of each family: who writes it, what it was tried with, and what nothing can check.

The data of ``streamconv families`` and of the documentation. A family is tried with files that the real
trainer wrote, or with a model that is laid out as such files or the source code of the trainer have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from streamconv import families

_M, _B, _S, _W, _R, _V = "Megatron-LM", "Bridge", "slime", "ms-swift", "mbridge", "verl"
_MADE = "files of Megatron-Core 0.11 to 0.19"
_BRIDGE = "files of Megatron-Bridge"
_CORE = "files of Megatron-Core 0.16"
_LAID_OUT = "laid out as the source code says"
_AS_FILES = "laid out as real files are"
_HEADS = "numbers of heads, where the run tells no arguments"
_NO_CLASS = "shapes, as transformers has no class: layers are held against each other"
_TOWER = "numbers of heads, where the run tells no arguments; a tower is copied as it is"


@dataclass(frozen=True, slots=True)
class Known:
    """One family: its name, the model types, who writes it, what it was tried with, what is open."""

    name: str
    model_types: tuple[str, ...]
    trainers: tuple[str, ...]
    tried: str
    unchecked: str


_ROWS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "llama": ((_M, _B, _S, _W, _R, _V), _MADE, _HEADS),
    "internlm3": ((_W,), _LAID_OUT, _HEADS),
    "qwen3_moe": ((_M, _B, _S, _W, _R, _V), _MADE, _HEADS),
    "olmoe": ((_B, _W), _LAID_OUT, "the order of rows that ms-swift had before mcore-bridge 1.6.5"),
    "qwen2_moe": ((_M, _S, _W, _R), _MADE, _HEADS),
    "mixtral": ((_M, _R), _MADE, _HEADS),
    "deepseek": ((_M, _B, _S, _W, _R, _V), f"{_MADE}; V3.2: {_CORE}", "repeated embeddings of MTP"),
    "deepseek_v4": ((_B, _W), _LAID_OUT, _NO_CLASS),
    "glm4": ((_S, _W, _R), _LAID_OUT, _HEADS),
    "glm4_moe": ((_B, _S, _W, _R), _AS_FILES, _HEADS),
    "deepseek_v1": ((_W,), _LAID_OUT, _HEADS),
    "hy_v3": ((_B, _W), _CORE, _HEADS),
    "exaone_moe": ((_B,), _LAID_OUT, _HEADS),
    "bailing_moe": ((_B, _W), _LAID_OUT, f"of Ling, {_NO_CLASS}"),
    "bailing_hybrid": ((_W,), _LAID_OUT, _NO_CLASS),
    "mimo": ((_B, _S, _W, _R), _LAID_OUT, _HEADS),
    "mimo_v2_flash": ((_B,), _LAID_OUT, _HEADS),
    "minimax_m2": ((_B, _S, _W), _AS_FILES, _HEADS),
    "minimax_m3": ((_B,), _LAID_OUT, _NO_CLASS),
    "ernie4_5": ((_B, _W), _LAID_OUT, _HEADS),
    "ernie4_5_moe": ((_B, _W), _AS_FILES, _HEADS),
    "nemotron": ((_B,), _AS_FILES, _HEADS),
    "nemotron_h": ((_B, _W), _LAID_OUT, _HEADS),
    "falcon_h1": ((_B,), _LAID_OUT, _HEADS),
    "exaone4": ((_B,), _LAID_OUT, _HEADS),
    "gemma": ((_B,), _LAID_OUT, _HEADS),
    "gemma2": ((_B,), _BRIDGE, _HEADS),
    "gemma3": ((_B, _R), _LAID_OUT, _TOWER),
    **dict.fromkeys(
        ("gemma4", "gemma4_text", "gemma4_moe", "gemma4_moe_text"),
        ((_B,), _LAID_OUT, "values that are their keys, which are not compared with them"),
    ),
    "gpt_oss": ((_B, _W), _BRIDGE, _HEADS),
    "qwen2_5_vl": ((_B, _W, _R, _V), _BRIDGE, _TOWER),
    "qwen3_vl": ((_B, _S, _W, _R), _AS_FILES, _TOWER),
    "qwen3_next": ((_M, _B, _S, _W), _AS_FILES, _HEADS),
    "qwen3_5_text": ((_M, _B, _S, _W, _R), "files of Megatron-Core, slime and ms-swift", _HEADS),
    "qwen3_5": ((_B, _S, _W, _R), _AS_FILES, _TOWER),
    "mistral3": ((_B,), _LAID_OUT, _TOWER),
    "glm4v": ((_W, _R), _LAID_OUT, _TOWER),
    "glm4v_moe": ((_B, _W, _R), _LAID_OUT, _TOWER),
    "qwen2_vl": ((_W,), _LAID_OUT, _TOWER),
    "internvl": ((_W,), _LAID_OUT, _TOWER),
    "internvl_chat": ((_W, _R), _LAID_OUT, _NO_CLASS),
    "kimi_vl": ((_W,), _LAID_OUT, _NO_CLASS),
    "llama4": ((_W,), _LAID_OUT, _TOWER),
    "kimi_k25": ((_B, _W), _LAID_OUT, _NO_CLASS),
    "qwen2_audio": ((_B,), _LAID_OUT, _TOWER),
    "step3p5": ((_B,), _LAID_OUT, _HEADS),
    "step3p7": ((_B,), _LAID_OUT, _TOWER),
    "qwen_omni": ((_B, _W, _R), _LAID_OUT, _TOWER),
    "qwen_omni_thinker": ((_B, _W), _LAID_OUT, _TOWER),
}


def known() -> Iterator[Known]:
    """Yield what is known of every family, in the order in which they are tried."""
    for family in families.families():
        yield Known(family.name, family.model_types, *_ROWS[family.name])


def table() -> str:
    """Return the table of all families in Markdown."""
    heads = ("family (`--family`)", "model types in config.json", "written by", "tried with")
    rows = [
        (*heads, "not checked"),
        ("---",) * 5,
        *(
            (k.name, ", ".join(k.model_types), ", ".join(k.trainers), k.tried, k.unchecked)
            for k in known()
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
