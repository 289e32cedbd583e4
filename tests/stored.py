"""Put a checkpoint's tensors together as the source IR says, in the slow and obvious way."""

from __future__ import annotations

import torch

from streamconv.ir.source import Checkpoint


def stored(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Put every tensor together from its records, as the IR says."""
    found = {}
    for name, tensor in checkpoint.tensors.items():
        dtype = getattr(torch, tensor.dtype.torch)
        whole = torch.empty(tensor.shape, dtype=dtype)
        layout = tensor.layout
        for j, box in enumerate(layout.boxes):
            if not box.numel:
                continue
            record = tensor.shards[j]
            path = checkpoint.root / checkpoint.files[record.file].path
            with path.open("rb") as stream:
                stream.seek(record.start)
                data = torch.frombuffer(bytearray(stream.read(record.nbytes)), dtype=dtype)
            piece = data.as_strided(box.sizes, layout.strides[j], layout.storage_offsets[j])
            whole[tuple(slice(a, b) for a, b in zip(box.offsets, box.ends, strict=True))] = piece
        found[name] = whole
    return found
