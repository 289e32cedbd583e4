"""Ours and the others on the same weights: ``python -m bench.peers [--verl PYTHON] [--sizes 0.5,1,2]``.

Each tool runs as a whole process, its tree sampled from outside, warm, in turn, several rounds; the
median counts. Draws peers.svg and writes the tables of RESULTS.md and README. verl's merger runs where
``--verl`` names a Python that has it, in an environment of its own::

    python -m venv V && echo SITE_PACKAGES_WITH_TORCH > V/lib/python3.11/site-packages/base.pth
    V/bin/pip install --no-deps verl==0.9.1 tensordict==0.10.0 ray …

torch's and Accelerate's tools read torch DCP folders, so they get the same weights as one of those,
written by one process; torch's consolidation reads what its HuggingFace writer left on eight ranks.
verl casts to bfloat16, so ours does beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bench.measure import RESULTS, conditions, measured, own_memory, ready, record, table
from scripts.measured import Ran

PLOT = Path(__file__).with_name("peers.svg")
README = RESULTS.parents[1] / "README.md"
_WORLD = 8


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool, and the command that has it read a folder and write into another.

    ``source`` is ``ranks``, ``dcp`` or ``shards``; ``ours`` marks streamconv's rows.
    """

    name: str
    source: str
    command: Callable[[Path, Path], list[str]]
    ours: bool = False


def _here(task: str) -> Callable[[Path, Path], list[str]]:
    return lambda src, dst: [
        sys.executable,
        "-m",
        "bench.peers",
        "--task",
        task,
        str(src),
        str(dst),
    ]


def _ours(*options: str) -> Callable[[Path, Path], list[str]]:
    return lambda src, dst: [
        sys.executable, "-m", "streamconv", str(src), str(dst), "--no-sync", "-q", *options
    ]  # fmt: skip


def tools(verl: str | None) -> list[Tool]:
    """Return the tools that can be run here."""
    found = [
        Tool("streamconv, 500 MB", "ranks", _ours("--max-mem", "500MB"), ours=True),
        Tool("load all, cat, save_file", "ranks", _here("naive")),
        Tool("torch dcp_to_torch_save", "dcp", _here("dcp")),
        Tool("torch consolidate_safetensors_files", "shards", _here("consolidate")),
        Tool("accelerate merge_fsdp_weights", "dcp", _here("accelerate")),
        Tool(
            "streamconv to bfloat16, 500 MB",
            "ranks",
            _ours("--max-mem", "500MB", "--dtype", "bfloat16"),
            ours=True,
        ),
    ]
    if verl:
        merge = [verl, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
        found.append(
            Tool(
                "verl model_merger (bfloat16)",
                "ranks",
                lambda src, dst: [*merge, "--local_dir", str(src), "--target_dir", str(dst)],
            )
        )
    return found


def naive(src: Path, dst: Path) -> None:
    """What most scripts do: load every rank file, put the pieces together, save."""
    import torch
    from safetensors.torch import save_file

    ranks = [
        torch.load(path, weights_only=False, mmap=True)
        for path in sorted(
            src.glob("model_world_size_*.pt"), key=lambda p: int(p.stem.split("_")[-1])
        )
    ]
    dst.mkdir(parents=True)
    whole = {name: torch.cat([r[name]._local_tensor for r in ranks]) for name in ranks[0]}
    save_file(whole, dst / "model.safetensors")


def dcp(src: Path, dst: Path) -> None:
    """Run torch's own converter."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dst.mkdir(parents=True)
    dcp_to_torch_save(src, dst / "model.pt")


def consolidate(src: Path, dst: Path) -> None:
    """Run torch's consolidation, with as many threads as this machine has cores."""
    from safetensors import safe_open
    from torch.distributed.checkpoint import _consolidate_hf_safetensors as hf

    dst.mkdir(parents=True)
    with safe_open(next(src.glob("*.safetensors")), "pt") as shard:
        names = dict.fromkeys(shard.keys(), 1)
    hf.consolidate_safetensors_files(str(src), str(dst), names, num_threads=os.cpu_count() or 1)


def accelerate(src: Path, dst: Path) -> None:
    """Run Accelerate's merge."""
    from accelerate.utils import merge_fsdp_weights

    merge_fsdp_weights(str(src), str(dst), safe_serialization=True)


TASKS = {"naive": naive, "dcp": dcp, "consolidate": consolidate, "accelerate": accelerate}


def make(folder: Path, nbytes: int) -> dict[str, Path]:
    """Write the same weights as rank files and as a DCP folder."""
    import torch
    import torch.distributed.checkpoint as checkpoint

    from scripts.makers.large import make_large

    made = make_large(folder / "run", nbytes, _WORLD)
    state = {name: made.expected(name) for name in made.shapes}
    checkpoint.save({"model": state}, checkpoint_id=folder / "dcp", no_dist=True)
    del state
    shards, store = folder / "shards", folder / "store"
    torch.multiprocessing.spawn(_save_shards, (made.source, shards, store), nprocs=_WORLD)
    return {"ranks": made.source, "dcp": folder / "dcp", "shards": shards}


def _save_shards(rank: int, source: Path, out: Path, store: Path) -> None:
    """On each rank: save what its rank file holds with torch's HuggingFace writer."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=_WORLD)
    mesh = init_device_mesh("cpu", (_WORLD,))
    path = source / f"model_world_size_{_WORLD}_rank_{rank}.pt"
    state = {
        # Meshes of a rank file are those of the process that wrote it.
        name: DTensor.from_local(
            t._local_tensor, mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
        )
        for name, t in torch.load(path, weights_only=False, mmap=True).items()
    }
    writer = checkpoint.HuggingFaceStorageWriter(str(out), save_distributed=True)
    checkpoint.save(state, storage_writer=writer)
    dist.destroy_process_group()


def draw(found: dict[str, dict[float, Ran]]) -> None:
    """Draw speed and peak against the model's size."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "streamconv"
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(10, 4))
    for name, by_size in found.items():
        sizes = sorted(by_size)
        style = {"linewidth": 2.5} if name.startswith("streamconv") else {"linestyle": "--"}
        speed.plot(sizes, [s / by_size[s].seconds for s in sizes], marker="o", label=name, **style)
        memory.plot(sizes, [by_size[s].peak_bytes / 1e6 for s in sizes], marker="o", **style)
    speed.set_ylabel("GB/s, whole process")
    memory.set_ylabel("peak of the process tree, MB")
    for axes in (speed, memory):
        axes.set_xlabel("GB of weights")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(loc="lower center", ncols=3, fontsize="small", frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verl", default=os.environ.get("VERL_PYTHON"))
    parser.add_argument("--sizes", default="0.5,1,2,4", help="GB, with commas between")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--task", choices=TASKS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("paths", type=Path, nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        TASKS[options.task](*options.paths)
        return
    runs = tools(options.verl)
    found: dict[str, dict[float, Ran]] = {t.name: {} for t in runs}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    rows = []
    with (
        own_memory(),
        tempfile.TemporaryDirectory(prefix="streamconv-peers-", dir=options.work) as name,
    ):
        work = Path(name)
        for size in map(float, options.sizes.split(",")):
            sources = make(work / "in", int(size * 1e9))
            rounds: dict[str, list[Ran]] = {t.name: [] for t in runs}
            for _ in range(options.rounds):
                for tool in runs:
                    source = sources[tool.source]
                    ready((p for p in source.rglob("*") if p.is_file()), cold=False)
                    one = measured(tool.command(source, work / "out"), env=quiet)
                    rounds[tool.name].append(one)
                    shutil.rmtree(work / "out")
            for name, several in rounds.items():
                middle = sorted(several, key=lambda m: m.seconds)[len(several) // 2]
                peak = int(statistics.median(m.peak_bytes for m in several))
                found[name][size] = replace(middle, tree_bytes=peak, high_water_bytes=0)
                times = [m.seconds for m in several]
                rows.append(
                    (
                        f"{size:g} GB",
                        name,
                        f"{middle.seconds:.1f} s ({min(times):.1f} to {max(times):.1f})",
                        f"{size / middle.seconds:.2f}",
                        f"{peak / 1e6:.0f} MB",
                    )
                )
                print(*rows[-1], sep=" | ", flush=True)
            shutil.rmtree(work / "in")
    draw(found)
    head = ("weights", "tool", "time of the whole process", "GB/s", "peak of the tree")
    text = (
        f"{conditions()}. Float32 Qwen2 in 8 rank files, warm, medians (and ranges) of "
        f"{options.rounds} rounds.\n\n"
    )
    picture = "\n![speed and memory against the size of the model]({})\n"
    record("peers", text + table(head, rows) + picture.format("peers.svg"))
    largest = f"{max(next(iter(found.values()))):g} GB"
    of_largest = table(head, [r for r in rows if r[0] == largest])
    record("peers", text + of_largest + picture.format("bench/peers.svg"), README)


if __name__ == "__main__":
    main()
