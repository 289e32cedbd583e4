"""How a model has loaded, and its logits; imports what every release of transformers has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch


def logits(model: Any) -> torch.Tensor | None:
    """Return what a model makes of some input of its kind, None where this is not enough for it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 200, (1, 8), generator=generator)
    picture = torch.randn(1, 3, 28, 28, generator=generator)
    given: dict[str, Any] = {"input_ids": ids}
    if model.main_input_name == "pixel_values":
        given = {"pixel_values": picture}
    elif model.main_input_name != "input_ids":
        return None
    takes = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder and "decoder_input_ids" in takes:
        given["decoder_input_ids"] = ids[:, :4]
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            made = model(**given)
    except Exception:  # noqa: BLE001 - it wants a picture, a sound, or more layers
        return None
    found = made.get("logits") if hasattr(made, "get") else None
    return found if isinstance(found, torch.Tensor) else None


def not_as_saved(report: Mapping[str, Any]) -> str:
    """Return what transformers' ``output_loading_info`` says went wrong in loading; else nothing."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report[what]:
            return f"{len(report[what])} {what}: {sorted(map(str, report[what]))[:3]}"
    return ""
