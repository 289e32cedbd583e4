"""Which of two copies of the weights is taken: the fp32 masters, or what the run computed with.

Both in one checkpoint check each other: a 16-bit weight is its master, rounded. Files of different
steps, or a layout that is not what it is taken for, show at the first look. A few elements of each
tensor are looked at here; ``verify --source`` compares them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

from streamconv.errors import BadInputError, UsageError
from streamconv.formats.tensor_bytes import ElementReader, rounds_to
from streamconv.ir.boxes import Shape
from streamconv.ir.source import Checkpoint, GlobalTensor
from streamconv.options import JobOptions

_SAMPLE_NUMEL = 32
_LISTED = 5

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    _Values: TypeAlias = npt.NDArray[np.generic]


def chosen_weights(checkpoint: Checkpoint, job: JobOptions) -> Checkpoint:
    """Return the checkpoint with the weights that ``--masters`` asks for.

    Raises :class:`UsageError` where it asks for 16-bit weights that are not there, and
    :class:`BadInputError` where masters are taken which the 16-bit weights contradict.
    """
    if job.masters == "yes":
        _check_agreement(checkpoint)
        return checkpoint
    wide = next(
        (
            name
            for name, tensor in checkpoint.tensors.items()
            if tensor.dtype.castable and tensor.dtype.itemsize > 2
        ),
        None,
    )
    if not checkpoint.halves:
        if wide is None:
            return checkpoint
        raise UsageError(
            "--masters no asks for 16-bit weights beside fp32 masters, and this checkpoint has none",
            where=str(checkpoint.root),
            found=f"{wide}, in {checkpoint.tensors[wide].dtype} alone",
            hint="without it the weights are converted as they are; --dtype bfloat16 casts them",
        )
    tensors = {**checkpoint.tensors, **checkpoint.halves}
    return dataclasses.replace(checkpoint, tensors=MappingProxyType(tensors))


def _check_agreement(checkpoint: Checkpoint) -> None:
    paths = [checkpoint.root / f.path for f in checkpoint.files]
    with ElementReader(paths) as files:
        wrong = [
            name
            for name, half in checkpoint.halves.items()
            if not all(rounds_to(*pair) for pair in _samples(checkpoint.tensors[name], half, files))
        ]
    if wrong:
        raise BadInputError(
            f"the fp32 masters of {len(wrong)} of {len(checkpoint.halves)} parameters are not what the "
            "run computed with",
            where=str(checkpoint.root),
            expected="each 16-bit weight is its master, rounded",
            found="others in " + ", ".join(wrong[:_LISTED]),
            hint="the files are of different steps, or laid out otherwise than they say "
            "(ds_to_universal mixes up runs with round_robin_gradients); --masters no takes the 16-bit "
            "weights",
        )


def _samples(
    tensor: GlobalTensor, half: GlobalTensor, files: ElementReader
) -> Iterator[tuple[_Values, _Values]]:
    """Yield the same elements of both, from the first piece of a tensor and from its last."""
    boxes = tensor.layout.boxes
    for j in {0, len(boxes) - 1} if boxes else ():
        box = boxes[j]
        if not box.numel:
            continue
        last = tuple(e - 1 for e in box.ends[:-1])
        for index in {box.offsets, (*last, *box.offsets[-1:])}:
            run = (_row(tensor, j, index), _row(half, _box_of(half, index), index))
            numel = min(_SAMPLE_NUMEL, *(r[1] for r in run))
            yield (
                _elements(files, tensor, j, run[0][0], numel),
                _elements(files, half, _box_of(half, index), run[1][0], numel),
            )


def _elements(files: ElementReader, tensor: GlobalTensor, j: int, at: int, numel: int) -> _Values:
    record = tensor.shards[j]
    return files.read(record.file, record.start, tensor.dtype, at, numel)


def _box_of(tensor: GlobalTensor, index: Shape) -> int:
    return next(
        j
        for j, box in enumerate(tensor.layout.boxes)
        if all(o <= i < e for o, i, e in zip(box.offsets, index, box.ends, strict=True))
    )


def _row(tensor: GlobalTensor, j: int, index: Shape) -> tuple[int, int]:
    """Return the storage element at ``index``, and how many of the same row follow it from there on."""
    layout = tensor.layout
    box, strides = layout.boxes[j], layout.strides[j]
    at = layout.storage_offsets[j] + sum(
        (i - o) * s for i, o, s in zip(index, box.offsets, strides, strict=True)
    )
    follow = box.ends[-1] - index[-1] if index and strides[-1] == 1 else 1
    return at, follow
