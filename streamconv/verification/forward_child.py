"""The child of ``verify --forward``: loads a model folder with transformers, and runs it once.

The folder is data. The class comes out of transformers' own registry, the config object is made of
parsed JSON without what could name code, and the library is shown a folder of links to the weight
files and nothing else: no adapter, generation or custom code file is ever seen by it. The tokenizer
is read by ``tokenizers``, which runs nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from streamconv.errors import BadInputError, BudgetError, NoSpaceError, StreamconvError, UsageError
from streamconv.files.names import INDEX
from streamconv.formats.safetensors_file import FileTensor
from streamconv.formats.tensor_bytes import is_finite
from streamconv.lora.settings import CONFIG as ADAPTER_CONFIG
from streamconv.lora.settings import base_of, is_adapter
from streamconv.planning.sidefiles import declared_dtype, read_config
from streamconv.system.children import serve
from streamconv.system.memory import resident_bytes
from streamconv.units import format_size
from streamconv.verification.adapter_child import put_on
from streamconv.verification.reference import weights_of

DEFAULT_PROMPT = "The quick brown fox jumps over the lazy dog"
_DEFAULT_LENGTH = 8
_TOP = 5
_MOST_TOKENS = 4096
# Activations and allocator slack of a forward of a few tokens.
_RESERVE_BYTES = 48 << 20
_MADV_DONTNEED = 4
_DROP_SECONDS = 0.02


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """Load and run; logits go to ``request["logits_path"]`` as float32 of shape (tokens, classes)."""
    given = folder = Path(request["src"])
    adapter = is_adapter(given)
    if adapter:
        base = base_of(given, Path(request["base"]) if request.get("base") else None)
        if base is None:
            raise UsageError(
                "running an adapter needs its base model",
                where=str(given),
                found=f"no folder of a model in {ADAPTER_CONFIG}'s base_model_name_or_path",
                hint="--base DIR names it",
            )
        folder = base
    weights = weights_of(folder)
    config = read_config(folder)
    if config is None:
        raise BadInputError("no config.json: nothing says which model this is", where=str(folder))
    model_class, settings, meta = _model(config, weights, folder)
    ids, tokenizer = _token_ids(
        request, given if (given / "tokenizer.json").is_file() else folder, meta.module
    )
    dtype = declared_dtype(config) or next(
        (t.dtype for t in weights.values() if t.dtype.castable), None
    )
    name = dtype.torch if dtype is not None else "float32"
    sizes = _Sizes(meta, name, len(ids))
    offload = _must_offload(sizes, request["budget_bytes"])
    if adapter and offload:
        raise BudgetError(
            "the memory budget is too small to run an adapter: its base is not run from disk",
            expected=f"more than {format_size(sizes.whole)}, the base model's size",
            found=format_size(request["budget_bytes"]),
            hint="merge it and run the merged model, or give a larger --max-mem",
        )
    with (
        tempfile.TemporaryDirectory(prefix="streamconv-") as scratch,
        _pages_dropped() if offload else nullcontext(),
    ):
        model, info = _load(
            model_class, settings, weights, folder, Path(scratch), name, sizes, offload=offload
        )
        missing: list[str] = []
        passed_over: list[str] = []
        parts: dict[str, FileTensor] = {}
        if adapter:
            model, missing, passed_over, parts = put_on(model, given)
        logits = _logits(model, ids)
    np.save(request["logits_path"], logits)
    unexpected = set(info["unexpected_keys"])
    used = [t for name, t in weights.items() if name not in unexpected]
    used += parts.values()
    mismatched = sorted(
        f"{name} {list(here)} for {list(there)}" for name, here, there in info["mismatched_keys"]
    )
    return {
        "architecture": model_class.__name__,
        "dtype": name,
        "stored": _mostly(weights.values()),
        "offloaded": offload,
        "token_ids": ids,
        "rows": meta.module.get_input_embeddings().weight.shape[0],
        "tokens": tokenizer.get_vocab_size() if tokenizer is not None else None,
        "adapter": adapter,
        "missing": sorted([*info["missing_keys"], *missing]),
        "passed_over": passed_over,
        "unexpected": sorted(unexpected),
        "not_finite": sorted(t.name for t in used if not is_finite(t.dtype, t.pieces())),
        "mismatched": mismatched,
        "finite": bool(np.isfinite(logits).all()),
        "top": _top(logits[-1], tokenizer),
    }


def _model(
    config: Mapping[str, Any], weights: Mapping[str, FileTensor], folder: Path
) -> tuple[Any, Any, Any]:
    from streamconv.tracing import hf_build
    from streamconv.tracing.hf import build_meta

    names = list(weights)
    resolved = hf_build.resolve(config, names)
    if resolved is None or not resolved[0]:
        raise UsageError(
            "transformers has no class for this model, so it cannot be run",
            where=str(folder / "config.json"),
            found=f"model_type {config.get('model_type')!r}, "
            f"architectures {config.get('architectures')!r}",
            hint="custom code of a folder is never run",
        )
    meta = build_meta(config, names)
    with hf_build.refusing(resolved[0]):
        model_class, settings = hf_build.class_and_settings(config, resolved[0])
    return model_class, settings, meta


# --- what it is asked ---------------------------------------------------------------------------


def _token_ids(request: Mapping[str, Any], folder: Path, module: Any) -> tuple[list[int], Any]:
    """Return the tokens to run, and the tokenizer where the folder has one that loads."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    tokenizer, problem = None, "there is no tokenizer.json"
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            problem = str(error)[:200]
    vocabulary = module.get_input_embeddings().weight.shape[0]
    given, prompt = request["token_ids"], request["prompt"]
    if given is not None:
        ids = [int(i) for i in given]
    elif tokenizer is not None:
        ids = list(tokenizer.encode(DEFAULT_PROMPT if prompt is None else prompt).ids)
        if beyond := [i for i in ids if i >= vocabulary]:
            raise BadInputError(
                "the tokenizer gives tokens that the model has no embeddings for",
                where=str(path),
                expected=f"ids from 0 to {vocabulary - 1}",
                found=f"{beyond[0]} ({tokenizer.id_to_token(beyond[0])!r})",
                hint="it is another model's, or the weights are; --token-ids runs them without it",
            )
    elif prompt is not None:
        raise UsageError(
            "a prompt needs a tokenizer",
            where=str(path),
            found=problem,
            hint="name token ids instead: --token-ids 1,2,3",
        )
    else:
        ids = [(7 * k + 1) % vocabulary for k in range(_DEFAULT_LENGTH)]
    if not ids or len(ids) > _MOST_TOKENS or not all(0 <= i < vocabulary for i in ids):
        raise UsageError(
            "these tokens cannot be run",
            expected=f"1 to {_MOST_TOKENS} token ids from 0 to {vocabulary - 1}",
            found=f"{len(ids)} ids" + (f" up to {max(ids)}" if ids else ""),
        )
    return ids, tokenizer


# --- memory -------------------------------------------------------------------------------------


class _Sizes:
    """What a model takes as ``dtype``, in bytes."""

    def __init__(self, meta: Any, dtype: str, tokens: int) -> None:
        import torch

        width = getattr(torch, dtype).itemsize
        module = meta.module
        fused = meta.fused
        own = {
            name: sum(p.numel() for p in part.parameters(recurse=False)) * width
            for name, part in module.named_modules()
        }
        converted = {n: math.prod(meta.state_shapes[n]) * width for n in fused}
        self.whole = sum(p.numel() for p in module.parameters()) * width
        self.converted = sum(converted.values())
        # A fused tensor is there in parts, put together, and cast while it is made.
        self.step = max([*own.values(), *(3 * n for n in converted.values())], default=0)
        classes = max((p.shape[0] for p in module.parameters() if p.dim() > 1), default=1)
        self.activations = tokens * classes * 4 * 4 + _RESERVE_BYTES


def _must_offload(sizes: _Sizes, budget: int) -> bool:
    """Whether the weights must stay on disk.

    Raises :class:`BudgetError` where even a module at a time is too much.
    """
    used = resident_bytes() + resident_bytes(str(os.getppid()))
    # Loaded whole, what is converted is there twice for a while.
    if used + sizes.whole + max(sizes.step, sizes.converted) + sizes.activations <= budget:
        return False
    need = used + sizes.step + sizes.step // 2 + sizes.activations
    if need > budget:
        raise BudgetError(
            "the memory budget is too small to run the model, even a module at a time",
            expected=f"at least {format_size(need)}",
            found=format_size(budget),
            hint=f"--max-mem {-(-need // 10**7) * 10}MB is the smallest that works",
        )
    if importlib.util.find_spec("accelerate") is None:
        whole = used + sizes.whole + max(sizes.step, sizes.converted) + sizes.activations
        raise StreamconvError(
            "the model is larger than the memory budget, and running it from disk needs accelerate",
            expected=f"accelerate, or a budget of {format_size(whole)}",
            found=f"no accelerate, a budget of {format_size(budget)}",
            hint="pip install 'accelerate>=1.0'",
        )
    return True


@contextmanager
def _pages_dropped() -> Iterator[None]:
    """Let go of mapped pages of safetensors files, again and again.

    The library maps whole files and keeps them mapped; what it has read of them counts as memory
    until somebody lets go of it. Nobody writes to these pages, so they can be read again.
    """
    libc = ctypes.CDLL(None)
    stop = threading.Event()

    def drop() -> None:
        while not stop.wait(_DROP_SECONDS):
            for line in Path("/proc/self/maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].endswith(".safetensors"):
                    start, end = (int(n, 16) for n in fields[0].split("-"))
                    libc.madvise(
                        ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED
                    )

    thread = threading.Thread(target=drop, daemon=True, name="page-dropper")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# --- the model ----------------------------------------------------------------------------------


def _load(
    model_class: Any,
    settings: Any,
    weights: Mapping[str, FileTensor],
    folder: Path,
    scratch: Path,
    dtype: str,
    sizes: _Sizes,
    *,
    offload: bool,
) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    # Reading ahead in threads would hold several tensors at once.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    shown = scratch / "model"
    shown.mkdir()
    # The library looks for it, and trips where it finds none.
    (shown / "generation_config.json").write_text("{}", encoding="utf-8")
    for path in {t.path for t in weights.values()}:
        (shown / path.name).symlink_to(path.resolve())
    if (folder / INDEX).is_file():
        (shown / INDEX).symlink_to((folder / INDEX).resolve())
    elif len(weights) and not (shown / "model.safetensors").exists():
        _write_index(shown, weights)
    options: dict[str, Any] = {}
    if offload:
        free = shutil.disk_usage(scratch).free
        if free < sizes.converted:
            raise NoSpaceError(
                "not enough disk space to run the model from disk",
                where=str(scratch.parent),
                expected=format_size(sizes.converted),
                found=f"{format_size(free)} free",
                hint="TMPDIR names another place for it",
            )
        options = {"device_map": {"": "disk"}, "offload_folder": str(scratch / "offload")}
    try:
        model, info = model_class.from_pretrained(
            str(shown),
            config=settings,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            # Plain code: the fast kernels ask for aligned sizes, or for libraries.
            attn_implementation="eager",
            experts_implementation="eager",
            **options,
        )
    except (MemoryError, StreamconvError):
        raise
    except Exception as error:
        raise BadInputError(
            f"transformers cannot load these weights as {model_class.__name__}",
            where=str(folder),
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        ) from error
    return model.eval(), info


def _write_index(shown: Path, weights: Mapping[str, FileTensor]) -> None:
    """Files of other names than the library looks for, without an index."""
    index = {
        "metadata": {"total_size": sum(t.end - t.begin for t in weights.values())},
        "weight_map": {n: t.path.name for n, t in weights.items()},
    }
    (shown / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _logits(model: Any, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    import torch

    tokens = torch.tensor([list(ids)])
    try:
        with torch.inference_mode():
            output = model(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
            )
    except (MemoryError, StreamconvError):
        raise
    except Exception as error:
        raise BadInputError(
            f"{type(model).__name__} cannot run these tokens",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        ) from error
    logits = output.logits if hasattr(output, "logits") else output[0]
    made: np.ndarray[Any, Any] = logits.float().reshape(-1, logits.shape[-1]).numpy()
    return made


def _mostly(weights: Iterable[FileTensor]) -> str | None:
    """Return the floating type that most bytes of the files have."""
    nbytes: Counter[str] = Counter()
    for t in weights:
        if t.dtype.castable:
            nbytes[t.dtype.torch] += t.end - t.begin
    return max(nbytes, key=nbytes.__getitem__, default=None)


def _top(last: np.ndarray[Any, Any], tokenizer: Any) -> list[dict[str, Any]]:
    """Return the likeliest classes of the last position: tokens, or labels of a classifier."""
    wide = last.astype(np.float64)
    odds = np.exp(wide - wide.max())
    odds /= odds.sum()
    order = np.argsort(-wide, kind="stable")[:_TOP]
    # A head of fewer classes than there are tokens has labels.
    known = tokenizer is not None and len(last) >= tokenizer.get_vocab_size()
    return [
        {
            "id": int(k),
            "token": tokenizer.decode([int(k)], skip_special_tokens=False) if known else None,
            "logit": float(wide[k]),
            "probability": float(odds[k]),
        }
        for k in order
    ]


if __name__ == "__main__":
    sys.exit(serve({"run": _run}))
