"""Writes torch's distributed checkpoints from one process, cut as many ranks would cut them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


def save_alone(folder: Path, state: Mapping[str, Any]) -> Path:
    """Write ``state`` to ``folder``, its names as they are, and return the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group is the point
        dcp.save(
            dict(state),
            storage_writer=dcp.FileSystemWriter(folder),
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
    return folder


Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]


class Pieces(torch.Tensor):
    """A tensor that torch's writer stores as several boxes: (offsets, sizes), one record each."""

    boxes: Boxes

    @staticmethod
    def __new__(cls, whole: torch.Tensor, boxes: Boxes) -> Pieces:
        made = torch.Tensor._make_subclass(cls, whole)
        made.boxes = boxes
        return made

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(chunk.offsets), k),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self),
                    size=self.size(),
                ),
            )
            for k, chunk in enumerate(self.__create_chunk_list__())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for offsets, sizes in self.boxes:
            if tuple(index.offset or ()) == offsets:
                box = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
                return self.as_subclass(torch.Tensor)[box].clone()
        raise KeyError(index)
