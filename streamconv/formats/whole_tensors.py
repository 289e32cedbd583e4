"""Tensors that lie whole in one file, as safetensors and torch.save write them."""

from __future__ import annotations

from pathlib import Path

from streamconv.errors import BadInputError
from streamconv.formats.safetensors_file import FileTensor
from streamconv.ir.boxes import Box, contiguous_strides
from streamconv.ir.source import GlobalTensor, ShardLayout, ShardTable
from streamconv.torchfile.rankfile import Stored


def whole_tensor(tensor: FileTensor, file: int, placement: str = "whole") -> GlobalTensor:
    """Return the tensor of a safetensors file, which is number ``file`` of the checkpoint's."""
    table = ShardTable()
    table.append(file, 0, tensor.begin, tensor.end - tensor.begin, 0, 0)
    shape = tensor.shape
    layout = ShardLayout(shape, (Box.whole(shape),), (contiguous_strides(shape),), (0,))
    return GlobalTensor(tensor.name, tensor.dtype, layout, table, placement)


def stored_tensor(
    name: str, stored: Stored, file: int, path: Path, placement: str = "whole"
) -> GlobalTensor:
    """Return the tensor ``name`` of a torch file; raises :class:`BadInputError` for a rank's piece."""
    spec = stored.spec
    if spec.kind != "plain":
        raise BadInputError(
            "a file that holds pieces of tensors: it is one rank's of several",
            where=f"{path}, {name}",
            found="a DTensor" if spec.kind == "dtensor" else "a ShardedTensor",
            hint="give the folder with the files of all ranks, named as their trainer named them",
        )
    table = ShardTable()
    table.append(file, stored.key, stored.start, stored.nbytes, stored.crc32, stored.header_nbytes)
    layout = ShardLayout(
        spec.shape, (Box.whole(spec.shape),), (spec.strides,), (spec.storage_offset,)
    )
    return GlobalTensor(name, spec.dtype, layout, table, placement)
