"""DeepSpeed's zero_to_fp32 beside streamconv: time and peak memory of both on one checkpoint.

``python -m bench.deepspeed --with PYTHON [--sizes 1,4] [--work DIR]``. PYTHON is an interpreter with
deepspeed. What is converted is synthetic: fp32 masters of so many gigabytes on two ranks with both
moments of Adam, and 16-bit weights beside them. Writes the table of RESULTS.md.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from bench.measure import conditions, measured, ready, record, table
from streamconv.formats.safetensors_file import read_folder

RANKS, SIDE = 2, 2048
TAG = "global_step1"


def write(folder: Path, stage: int, tensors: int) -> Path:
    """Write a checkpoint of ``tensors`` matrices, with the keys that DeepSpeed 0.19 has."""
    tag = folder / TAG
    tag.mkdir(parents=True)
    (folder / "latest").write_text(TAG)
    names = [f"model.layers.{k}.weight" for k in range(tensors)]
    shapes = [OrderedDict.fromkeys(names, torch.Size([SIDE, SIDE]))]
    share = SIDE * SIDE * tensors // RANKS
    masters = []
    for rank in range(RANKS):
        generator = torch.Generator().manual_seed(rank)
        flat, *moments = (torch.rand(share, generator=generator) for _ in range(3))
        adam = {"step": torch.tensor(1.0), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
        state: dict[str, Any] = {"zero_stage": stage, "base_optimizer_state": {"state": {0: adam}}}
        if stage == 3:
            state |= {"partition_count": RANKS, "fp32_flat_groups": [flat]}
        else:
            state |= {"partition_count": [RANKS], "single_partition_of_fp32_groups": [flat]}
        torch.save(
            {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"},
            tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        masters.append(flat.bfloat16())
    halves = torch.cat(masters).view(tensors, SIDE, SIDE)
    for rank in range(RANKS if stage == 3 else 1):
        module = OrderedDict(
            (n, torch.empty(0, dtype=torch.bfloat16) if stage == 3 else halves[k].clone())
            for k, n in enumerate(names)
        )
        torch.save(
            {
                "module": module,
                "buffer_names": [],
                "optimizer": None,
                "param_shapes": shapes,
                "frozen_param_shapes": OrderedDict(),
                "frozen_param_fragments": OrderedDict(),
                "shared_params": {},
                "dp_world_size": RANKS,
                "mp_world_size": 1,
                "ds_config": {},
                "ds_version": "0.19.8",
            },
            tag / (f"zero_pp_rank_{rank}_" * (stage == 3) + "mp_rank_00_model_states.pt"),
        )
    return folder


def _same(one: Path, other: Path) -> bool:
    """Whether two model folders hold the same tensors, byte for byte."""
    ours, theirs = read_folder(one), read_folder(other)
    return ours.keys() == theirs.keys() and all(
        (t.dtype, t.shape) == (theirs[n].dtype, theirs[n].shape)
        and all(a == b for a, b in zip(t.pieces(), theirs[n].pieces(), strict=True))
        for n, t in ours.items()
    )


def main() -> None:
    """Measure, compare, and write the table of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1,4", help="gigabytes of fp32 masters")
    parser.add_argument("--work", default=tempfile.gettempdir())
    parser.add_argument("--max-mem", default="500MB")
    parser.add_argument("--with", dest="python", required=True, help="a Python with deepspeed")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        for gigabytes, stage in itertools.product(map(float, given.sizes.split(",")), (2, 3)):
            work = Path(name) / f"{gigabytes:g}-{stage}"
            tensors = max(1, round(gigabytes * 1e9 / (4 * SIDE * SIDE)))
            src = write(work / "src", stage, tensors)
            files = [p for p in src.rglob("*") if p.is_file()]
            commands = {
                "streamconv": [
                    *(sys.executable, "-m", "streamconv", str(src), str(work / "ours")),
                    *("--max-mem", given.max_mem, "--max-shard-size", "1GB", "--no-sync", "-q"),
                ],
                "zero_to_fp32": [
                    *(given.python, "-m", "deepspeed.utils.zero_to_fp32", str(src)),
                    *(str(work / "theirs"), "--safe_serialization", "--max_shard_size", "1GB"),
                ],
            }
            for side, command in commands.items():
                ready(files, cold=False)
                ran = measured(command, env={"DS_ACCELERATOR": "cpu"})
                peak = f"{ran.peak_bytes / 1e6:.0f} MB"
                rows.append((f"{tensors * 4 * SIDE * SIDE / 1e9:.2f} GB", stage, side))
                rows[-1] += (f"{ran.seconds:.1f} s", f"{ran.cpu_seconds:.1f} s", peak)
                print(*rows[-1], flush=True)
            if not _same(work / "ours", work / "theirs"):
                sys.exit(f"{work}: the two outputs differ")
            shutil.rmtree(work)
    text = (
        f"{conditions()}. One warm run each, `--max-mem {given.max_mem}`, safetensors in 1 GB shards; "
        "all bytes of the two outputs are the same. Peaks are those of all processes together.\n\n"
    )
    head = ("fp32 masters", "stage", "tool", "time", "of it CPU", "peak memory")
    record("deepspeed", text + table(head, rows))


if __name__ == "__main__":
    main()
