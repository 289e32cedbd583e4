"""A flat group costs no more memory than any other source, however large: whole processes, measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from scripts.makers import zero
from scripts.measured import run


@pytest.mark.slow
@pytest.mark.memory
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16"]])
def test_flat_groups_nine_times_the_budget(stage: int, options: list[str], tmp_path: Path) -> None:
    limit = 64 * 10**6
    generator = torch.Generator().manual_seed(stage)
    # Rows that no rank's share is a multiple of: most pieces begin and end within one.
    group = {f"w{k}": torch.randn(2050 + k, 3001, generator=generator) for k in range(24)}
    made = zero.Run([group], stage=stage, ranks=3)
    tag = zero.write(made, tmp_path / "src")
    assert sum(4 * t.numel() for t in group.values()) > 9 * limit

    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    planned = run("plan", tag, "-o", plan, "--layout", "memory", *options)
    assert planned.code == 0, planned.err
    done = run("run", plan, out, "--max-mem", "64MB", "--no-sync")
    assert done.code == 0, done.err
    assert done.peak_bytes <= limit
    with safe_open(out / "model.safetensors", "pt") as held:
        assert set(held.keys()) == group.keys()
        for name, tensor in group.items():
            expected = tensor.bfloat16() if options else tensor
            assert torch.equal(held.get_tensor(name), expected), name
