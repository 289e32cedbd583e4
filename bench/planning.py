"""Planning 1024 rank files of 2000 tensors: ``python -m bench.planning [--world N] [--tensors N]``.

The rank files are torch's own (five minutes of making them for two of planning them).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.measure import conditions, record, streamconv, table


def make(out: Path, world: int, tensors: int) -> None:
    """Write ``world`` rank files of ``tensors`` small float32 DTensors, cut along dim 0."""
    out.mkdir()
    shapes = {f"layers.{i // 10}.part_{i % 10}.weight": (world, i % 4 + 1) for i in range(tensors)}
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
        state = OrderedDict(
            (
                name,
                DTensor.from_local(
                    torch.full((1, shape[1]), float(rank)),
                    mesh,
                    [Shard(0)],
                    run_check=False,
                    shape=torch.Size(shape),
                    stride=(shape[1], 1),
                ),
            )
            for name, shape in shapes.items()
        )
        torch.save(state, out / f"model_world_size_{world}_rank_{rank}.pt")
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=int, default=1024)
    parser.add_argument("--tensors", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="streamconv-planning-", dir=options.work))
    try:
        make(work / "run", options.world, options.tensors)
        rows = []
        for n in range(options.rounds):
            found = streamconv("plan", work / "run", "-o", work / "plan.jsonl")
            size = (work / "plan.jsonl").stat().st_size
            rows.append(
                (
                    n + 1,
                    f"{found.seconds:.1f} s",
                    f"{found.peak_bytes / 1e6:.0f} MB",
                    f"{size / 1e6:.1f} MB",
                )
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    head = ("round", "time of the whole command", "peak of the tree", "plan's size")
    text = f"{conditions()}. {options.world} rank files of {options.tensors} tensors.\n\n"
    record("planning", text + table(head, rows))


if __name__ == "__main__":
    main()
