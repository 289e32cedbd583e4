"""Which of two copies of the weights is taken: the fp32 masters, or what the run computed with."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from streamconv.errors import UsageError
from streamconv.ir.source import Checkpoint
from streamconv.options import JobOptions


def chosen_weights(checkpoint: Checkpoint, job: JobOptions) -> Checkpoint:
    """Return the checkpoint with the weights that ``--masters`` asks for.

    Raises :class:`UsageError` where it asks for 16-bit weights that are not there.
    """
    if job.masters == "yes":
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
