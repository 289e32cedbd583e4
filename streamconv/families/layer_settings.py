"""Settings that hold for some layers only: windows of attention, layers without rotary positions.

Megatron tells each layer by a list with one number a layer, or by a whole number N: every N-th is the
other way. HuggingFace has lists, and names of kinds of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamconv.families.rules import Dims

_NO_WINDOW = "none"


def model_type(dims: Dims) -> str | None:
    """Return the model type of the language model, without what says that it is one."""
    found = dims.get("model_type")
    return found.removesuffix("_text") if isinstance(found, str) else None


def _kinds(dims: Dims) -> list[Any]:
    found = dims.get("layer_types")
    return found if isinstance(found, list) else []


def _has_window(dims: Dims) -> bool:
    kinds = _kinds(dims)
    return (
        bool(dims.get("sliding_window"))
        and dims.get("use_sliding_window") is not False
        and (not kinds or "sliding_attention" in kinds)
    )


def window(dims: Dims) -> Mapping[str, object]:
    """Return the width of the window; models with chunks instead are not compared."""
    if "chunked_attention" in _kinds(dims):
        return {}
    return {"sliding_window": dims.get("sliding_window") if _has_window(dims) else _NO_WINDOW}


def same_window(run: Any, ours: Any) -> bool:
    """Megatron counts the tokens to the left, HuggingFace the token itself, too.

    Trainers' defaults for Mistral have HuggingFace's number unchanged.
    """
    left = run[0] if isinstance(run, list) and run else run
    if left is None or left == -1:
        return bool(ours == _NO_WINDOW)
    return type(left) is int and ours in (left, left + 1)


def windowed(dims: Dims) -> Mapping[str, object]:
    """Return 1 for each layer with a window, 0 for the others; nothing where the run has none.

    Gemma's layers alternate by themselves in Megatron-Bridge.
    """
    run = dims.megatron
    alternates = dims.get("query_pre_attn_scalar") is not None
    if not run.get("window_size") or (alternates and run.get("window_attn_skip_freq") is None):
        return {}
    kinds = _kinds(dims)
    if not kinds or not _has_window(dims):  # a window where there is none shows by itself
        return {}
    return {"windows by layer": [int(k == "sliding_attention") for k in kinds]}


def same_windowed(run: Any, ours: Any) -> bool:
    """A whole number N leaves every N-th layer without a window."""
    if run is None:
        return all(ours)
    return bool(_flags(run, len(ours), 0) == ours)


def without_positions(dims: Dims) -> Mapping[str, object]:
    """Return 1 for each layer without rotary positions, 0 for the others."""
    if model_type(dims) in ("cohere2", "exaone4"):  # their layers without windows have none
        kinds = _kinds(dims)
        flags = [int(_has_window(dims) and k != "sliding_attention") for k in kinds]
        return {"layers without rotary positions": flags} if kinds else {}
    with_positions = dims.get("no_rope_layers")  # 1 means positions, whatever the name says
    if isinstance(with_positions, list):
        return {"layers without rotary positions": [int(not f) for f in with_positions]}
    return {"layers without rotary positions": [0] * dims.layers}


def same_without_positions(run: Any, ours: Any) -> bool:
    """A whole number N leaves every N-th layer without positions."""
    return bool((_flags(run, len(ours), 1) if run else [0] * len(ours)) == ours)


def _flags(run: Any, layers: int, at_each: int) -> list[int] | None:
    """Return the run's number for each layer; layers for multi-token prediction may follow."""
    if isinstance(run, list):
        return [int(bool(f)) for f in run[:layers]]
    if type(run) is not int or run < 1:
        return None
    return [at_each if k % run == 0 else 1 - at_each for k in range(1, layers + 1)]
