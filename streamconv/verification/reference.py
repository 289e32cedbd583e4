"""An output folder against another model folder: exactly, or within a tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from streamconv.errors import BadInputError
from streamconv.formats.safetensors_file import FileTensor, read_files, weight_files
from streamconv.ir.dtypes import DType
from streamconv.planning.sidefiles import read_config
from streamconv.units import counted
from streamconv.verification.distance import further_apart
from streamconv.verification.report import Report

_STEP_BYTES = 1 << 20
_STEP_ELEMENTS = 1 << 17
# What models tie are embeddings, to one another and to the head.
_EMBEDDINGS = ("embed", "wte")


def verify_reference(
    folder: Path, reference: Path, *, atol: float = 0.0, rtol: float = 0.0
) -> Report:
    """Compare with another folder of safetensors: exactly, or within ``atol + rtol * |reference|``.

    Dtypes may differ only where a tolerance is given; integers must be equal in any case. A tied
    weight may be left out of one of them.
    ``rows`` lists the tensors that differ with their largest absolute difference, worst first.
    """
    ours, theirs = weights_of(folder), weights_of(reference)
    report = Report()
    for held, other, where, lacking in (
        (theirs, ours, "missing here", folder),
        (ours, theirs, "not in the reference", reference),
    ):
        for name in sorted(held.keys() - other.keys()):
            tied = _tied_to(held[name], held, other) if _may_tie(lacking) else None
            if tied:
                report.checked.append(f"{name}: {where}, tied to {tied}, whose bytes it repeats")
            else:
                report.problems.append(f"{name}: {where}")
    both = sorted(ours.keys() & theirs.keys())
    rows = (_difference(ours[name], theirs[name], atol, rtol) for name in both)
    report.rows = sorted((r for r in rows if r is not None), key=lambda r: -r["max_abs"])
    report.problems += [f"{r['name']}: {r['what']}" for r in report.rows]
    how = f"within {atol:g} + {rtol:g} × |reference|" if atol or rtol else "bit for bit"
    report.checked.append(f"{counted(len(both), 'tensor')} against {reference}, {how}")
    return report


def weights_of(folder: Path) -> dict[str, FileTensor]:
    """Return the tensors of a model folder, as many as a loader takes.

    Raises :class:`BadInputError` where it holds no safetensors.
    """
    if not folder.is_dir():
        raise BadInputError("there is no such model folder", where=str(folder))
    # Beside the model's files some folders hold the same weights in another layout.
    found = read_files(weight_files(folder), folder)
    if not found:
        raise BadInputError(
            "no safetensors files in this folder",
            where=str(folder),
            hint="save the model with save_pretrained first" if any(folder.glob("*.bin")) else None,
        )
    return found


def _may_tie(folder: Path) -> bool:
    """Whether loading ``folder`` may fill a weight that is not there with one that it is tied to."""
    config = read_config(folder)
    parts = (config, (config or {}).get("text_config"))
    return config is not None and not any(
        isinstance(p, Mapping) and p.get("tie_word_embeddings") is False for p in parts
    )


def _tied_to(
    tensor: FileTensor, held: Mapping[str, FileTensor], other: Mapping[str, FileTensor]
) -> str | None:
    """Return the tensor in both folders whose bytes ``tensor`` repeats, which one of them lacks."""
    alike = [
        t
        for name, t in held.items()
        if name in other
        and (t.dtype, t.shape) == (tensor.dtype, tensor.shape)
        # The norms and biases of many layers are equal, too, and nobody fills them.
        and len(t.shape) > 1
        and (_is_embedding(name) or _is_embedding(tensor.name))
    ]
    digest = _digest(tensor) if alike else ""
    return next((t.name for t in alike if _digest(t) == digest), None)


def _is_embedding(name: str) -> bool:
    return name == "shared.weight" or any(word in name for word in _EMBEDDINGS)


def _digest(tensor: FileTensor) -> str:
    digest = xxhash.xxh3_128()
    for piece in tensor.pieces(_STEP_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def _difference(
    ours: FileTensor, theirs: FileTensor, atol: float, rtol: float
) -> dict[str, Any] | None:
    # Nothing rounds integers.
    exact = not (atol or rtol) or not (_rounded(ours.dtype) and _rounded(theirs.dtype))
    if ours.shape != theirs.shape:
        return _row(ours, f"shape {list(ours.shape)}, there {list(theirs.shape)}", float("inf"))
    if exact and ours.dtype != theirs.dtype:
        return _row(ours, f"{ours.dtype}, there {theirs.dtype}", float("inf"))
    worst, differing = 0.0, 0
    for x, y in zip(
        ours.pieces(_STEP_ELEMENTS * ours.dtype.itemsize),
        theirs.pieces(_STEP_ELEMENTS * theirs.dtype.itemsize),
        strict=True,
    ):
        if ours.dtype == theirs.dtype and x == y:
            continue
        left, right = _numbers(x, ours.dtype), _numbers(y, theirs.dtype)
        if exact:
            # Equal numbers with other bits: -0.0, or another NaN.
            bits = np.frombuffer(x, np.uint8) != np.frombuffer(y, np.uint8)
            differing += int((bits.reshape(-1, ours.dtype.itemsize).any(axis=1)).sum())
        far, apart = further_apart(left, right, *((0.0, 0.0) if exact else (atol, rtol)))
        worst = max(worst, apart)
        if not exact:
            differing += far
    if not differing:
        return None
    return _row(ours, f"{differing} elements differ, by {worst:.6g} at most", worst)


def _rounded(dtype: DType) -> bool:
    return dtype.name.startswith(("F", "BF", "C"))


def _row(tensor: FileTensor, what: str, worst: float) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "what": what,
        "max_abs": worst,
        "dtype": tensor.dtype.torch,
        "shape": list(tensor.shape),
    }


def _numbers(raw: bytes, dtype: DType) -> np.ndarray[Any, np.dtype[Any]]:
    array = np.frombuffer(raw, dtype.to_numpy())
    return array.astype(np.complex128 if dtype.name == "C64" else np.float64)
