"""A Megatron checkpoint beside ``cat``: ``python -m bench.megatron TOOL CORE [--rounds N]``.

TOOL is the folder of ``make_megatron.py``, CORE one with megatron-core as bench/megatron_matrix.py
installs it. Makes a mixture of experts of 1.3 GB in bfloat16 on 4 real ranks, converts it within
512 MB, compares it with the model that it was made of, and measures the executing part as
:mod:`bench.speed` does.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from bench.measure import conditions, own_memory, record, streamconv, table
from bench.megatron_matrix import Case, make
from bench.speed import ratio, told
from scripts.check_answers import difference, tensors

_SIZES = (
    "hidden_size=1024 num_attention_heads=8 num_key_value_heads=4 head_dim=128 vocab_size=64000 "
    "num_hidden_layers=10 num_experts=16 moe_intermediate_size=1024"
)
_CASE = Case(
    "1.3 GB",
    f"--case qwen3_moe --tp 2 --pp 2 --ep 2 --formats dist,mlm_ranks --set {_SIZES}",
)
_LAYOUTS = {"verl dist_ckpt": "global_step_1/actor", "iter_N mp_rank_*": "mlm_ranks"}
_BUDGET, _AIM = "512MB", 0.8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", type=Path)
    parser.add_argument("core", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    rows = []
    with (
        own_memory(),
        tempfile.TemporaryDirectory(prefix="streamconv-bench-", dir=options.work) as name,
    ):
        folder = Path(name)
        failed = make(options.tool.absolute(), options.core.absolute(), _CASE, folder / "made")
        if failed:
            sys.exit(failed)
        answer = folder / "made/hf_answer"
        for layout, where in _LAYOUTS.items():
            src, out = folder / "made" / where, folder / "model"
            whole = streamconv(src, out, "--hf-config", answer, "--max-mem", _BUDGET)
            wrong = difference(tensors(out), tensors(answer))
            shutil.rmtree(out)
            plan = folder / "plan.jsonl"
            streamconv("plan", src, "-o", plan, "--hf-config", answer, "--max-mem", _BUDGET)
            files = sorted(
                p for p in src.rglob("*") if p.name.endswith((".distcp", "optim_rng.pt"))
            )
            cells = []
            for cold in (False, True):
                rounds = [
                    ratio(files, plan, folder, ("--max-mem", _BUDGET), cold=cold)
                    for _ in range(options.rounds)
                ]
                cells.append(told(rounds, _AIM))
            size = sum(f.stat().st_size for f in files)
            rows.append(
                (
                    layout,
                    f"{size / 1e9:.2f} GB in {len(files)} files",
                    wrong or "every tensor equal",
                    f"{whole.peak_bytes / 1e6:.0f} MB",
                    *cells,
                )
            )
            print(*rows[-1], sep=" | ", flush=True)
    head = (
        "layout",
        "source",
        "converted",
        f"peak of the whole command, `--max-mem {_BUDGET}`",
        "executing part, warm, `--no-sync`",
        "executing part, cold, durable",
    )
    record(
        "megatron-speed",
        f"{conditions()}. megatron-core {options.core.name}, medians (and ranges) of {options.rounds} "
        f"rounds, in units of `cat`'s speed.\n\n{table(head, rows)}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
