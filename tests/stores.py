"""What tests of object stores share: where one is, and a small conversion with several output files."""

from __future__ import annotations

from pathlib import Path

import streamconv
from streamconv.conversion.job import run_plan
from streamconv.options import RunOptions
from streamconv.storage.address import Address


def files(folder: Path) -> dict[str, bytes]:
    """Return what lies in an output by name, without the manifest: it has timings."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != "streamconv.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def planned(folder: Path) -> tuple[Path, Path]:
    """Return a plan with several output files, and what a disk gets of it."""
    import torch

    plan, source = folder / "plan.jsonl", folder / "step"
    source.mkdir()
    tensors = {f"layers.{k}.weight": torch.randn(64, 96) for k in range(8)}
    torch.save(tensors, source / "model_world_size_1_rank_0.pt")
    streamconv.plan(source, output=plan, max_shard_size="60kB")
    run_plan(plan, folder / "out", RunOptions(sync=False))
    return plan, folder / "out"


def put_folder(address: Address, folder: Path) -> None:
    """Write the files of a folder to a store."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        key = f"{address.key}/{path.relative_to(folder).as_posix()}"
        upload = address.bucket.upload(key, 5 << 20, 1)
        upload.write(path.read_bytes())
        upload.finish()
