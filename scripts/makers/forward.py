"""The logits of a model, whatever it is of; imports what every release of transformers has."""

from __future__ import annotations

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
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :4]
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            made = model(**given)
    except Exception:  # noqa: BLE001 - it wants a picture, a sound, or more layers
        return None
    found = made.get("logits") if hasattr(made, "get") else None
    return found if isinstance(found, torch.Tensor) else None
