"""An adapter's folder against its base model, in a child: its names there, and PEFT's loading of it.

The folder is data: of its config only the settings below reach PEFT, checked, for others could alter
the base model, name code or be patterns that run for ever.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamconv.errors import BadInputError, StreamconvError, UsageError
from streamconv.formats.safetensors_file import FileTensor, read_header
from streamconv.lora import fit
from streamconv.lora.adapters import BELOW, Adapter, Target
from streamconv.lora.names import PART, canonical
from streamconv.lora.settings import CONFIG, IDLE, WEIGHTS, checked_settings, read_object
from streamconv.planning.sidefiles import read_config
from streamconv.system.children import serve

# Beyond what is checked with the settings of a conversion, where an alpha of 0 means an unknown one.
_TAKEN = ("bias", "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save")
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")
# Names and alternatives of them: what _targets in adapter_config writes, and nothing that repeats.
_NAMES = re.compile(r"(?:[\w|-]|\\?\.|\\-)+", re.ASCII)


def _check_names(request: dict[str, Any]) -> dict[str, Any]:
    """Hold the adapter ``request["src"]`` against the model that ``request["model"]`` describes."""
    from streamconv.tracing.hf import build_meta

    tensors = read_header(Path(request["src"]) / WEIGHTS)
    config = read_config(Path(request["model"]))
    model = build_meta(config) if config is not None else None
    if model is None or not model.certain:
        return {"architecture": None, "problem": None}
    try:
        fit.check(_adapter(tensors), {}, model)
    except BadInputError as error:
        parts = (error.where, error.what, error.found)
        return {"architecture": model.architecture, "problem": ": ".join(filter(None, parts))}
    return {"architecture": model.architecture, "problem": None}


def _adapter(tensors: Mapping[str, Any]) -> Adapter:
    targets: dict[str, Target] = {}
    saved: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if match := PART.fullmatch(canonical(name)):
            key = f"{match[2]}.bias" if match[4] == "bias" else match[2]
            targets.setdefault(match[1], Target(match[1])).parts[key] = name
        else:
            saved[canonical(name).replace(f".{BELOW}.", ".")] = tensor
    whole = {
        m: t
        for m, t in targets.items()
        if {"lora_A", "lora_B"} <= t.parts.keys()
        or {"lora_embedding_A", "lora_embedding_B"} <= t.parts.keys()
    }
    return Adapter(whole, saved, frozenset(), tensors)


def put_on(model: Any, folder: Path) -> tuple[Any, list[str], list[str], dict[str, FileTensor]]:
    """Return PEFT's model, what it misses of the adapter, what it passes over, and the tensors."""
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise StreamconvError(
            "running an adapter needs PEFT", where=str(folder), hint="pip install peft"
        ) from error
    from safetensors.torch import load_file

    held = read_header(folder / WEIGHTS)
    tensors = load_file(folder / WEIGHTS)
    settings = _settings(folder)
    try:
        adapted = peft.PeftModel(model, peft.LoraConfig(**settings))
        found = peft.set_peft_model_state_dict(adapted, dict(tensors))
        expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except (MemoryError, StreamconvError):
        raise
    except Exception as error:
        raise BadInputError(
            "PEFT cannot load this adapter onto the base model",
            where=str(folder),
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        ) from error
    # What is missing here PEFT does not report: those layers begin at zero.
    missing = sorted(expected.keys() - tensors.keys())
    return adapted.eval(), missing, sorted(found.unexpected_keys), held


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    data = read_object(path)
    if data.get("peft_type") != "LORA":
        raise UsageError(
            "this adapter is of another kind than LoRA",
            where=str(path),
            found=f"peft_type {data.get('peft_type')!r}"[:80],
        )
    # Raises where training began by altering the base weights.
    settings: dict[str, Any] = checked_settings(data, path)
    settings |= {k: data[k] for k in _TAKEN if data.get(k) is not None}
    for key in _PATTERNS:
        value = data.get(key)
        names = value if isinstance(value, list) else [value]
        if not all(_NAMES.fullmatch(n) for n in names if isinstance(n, str)):
            raise UsageError(
                f"the adapter's {key} is a pattern, and those are not evaluated",
                where=str(path),
                found=str(value)[:80],
                hint="merge it and compare the merged model",
            )
        if value is not None:
            settings[key] = value
    others = sorted(k for k in data if data[k] and k not in {*settings, *IDLE})
    if others:
        raise UsageError(
            "the adapter has settings that are not known",
            where=str(path),
            found=", ".join(f"{k} {json.dumps(data[k])}"[:60] for k in others[:3]),
            hint="merge it with PEFT and run the merged model",
        )
    return settings


if __name__ == "__main__":
    sys.exit(serve({"names": _check_names}))
