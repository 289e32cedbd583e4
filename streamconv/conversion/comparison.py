"""A checkpoint against a model folder, tensor by tensor, without converting: verl's own ``test``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from streamconv.conversion.lazy import LazyTensor, open_checkpoint
from streamconv.files.inputs import readable, reading
from streamconv.formats.safetensors_file import FileTensor
from streamconv.ir.dtypes import BF16, DType
from streamconv.options import JobOptions
from streamconv.verification.distance import further_apart
from streamconv.verification.reference import weights_of

_BLOCK_NBYTES = 4 << 20
# torch.testing.assert_close in verl's merger.
_TOLERANCE = 1e-6


def compare_with_model(src: Path, folder: Path, *, hf_config: Path | None = None) -> dict[str, Any]:
    """Return what differs between a checkpoint and a model folder, both taken as bfloat16.

    ``tensors`` counts what was compared, ``problems`` are lines: names that only one of them has, other
    shapes, values further apart than 1e-6 (absolute and relative, together). Raises
    :class:`BadInputError` where ``folder`` holds no safetensors.
    """
    problems = []
    compared = 0
    job = JobOptions(dtype="bfloat16", hf_config=hf_config)
    with reading(src, folder, hf_config), ExitStack() as stack:
        reference = weights_of(folder)
        checkpoint = stack.enter_context(open_checkpoint(src, job))
        problems += [f"{n}: not in the checkpoint" for n in reference if n not in checkpoint]
        for name, tensor in checkpoint.items():
            other = reference.get(name)
            if other is None:
                problems.append(f"{name}: not in {folder}")
            elif other.shape != tensor.shape:
                problems.append(f"{name}: {list(tensor.shape)}, there {list(other.shape)}")
            else:
                compared += 1
                apart = _distance(tensor, other)
                if apart > 0:
                    problems.append(f"{name}: values differ by up to {apart:g}")
    return {"tensors": compared, "problems": problems}


def _distance(tensor: LazyTensor, other: FileTensor) -> float:
    """Return the largest difference that is not tolerated, 0 where there is none."""
    worst = 0.0
    rows = tensor.shape[0] if tensor.shape else 1
    row_nbytes = max(1, (other.end - other.begin) // max(rows, 1))
    step = max(1, _BLOCK_NBYTES // row_nbytes)
    with readable(other.path), other.path.open("rb") as stream:
        for lo in range(0, rows, step):
            hi = min(lo + step, rows)
            stream.seek(other.begin + lo * row_nbytes)
            there = np.frombuffer(stream.read((hi - lo) * row_nbytes), other.dtype.to_numpy())
            here = tensor[lo:hi] if tensor.shape else tensor[...]
            a, b = _values(here, tensor.dtype), _values(there, other.dtype)
            worst = max(worst, further_apart(a, b, _TOLERANCE, _TOLERANCE)[1])
    return worst


def _values(array: np.ndarray[Any, Any], dtype: DType) -> np.ndarray[Any, np.dtype[np.float64]]:
    flat = array.reshape(-1)
    if dtype.castable:
        flat = flat.astype(BF16.to_numpy())
    return flat.astype(np.float64)
