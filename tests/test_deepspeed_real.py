"""Checkpoints that DeepSpeed makes while the test runs.

``STREAMCONV_TEST_DEEPSPEED`` names the interpreters that have it, of one release or several, separated
as in PATH.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from streamconv import formats
from tests.stored import stored

MAKER = Path(__file__).resolve().parents[1] / "scripts" / "makers" / "deepspeed_run.py"
PYTHONS = list(filter(None, os.environ.get("STREAMCONV_TEST_DEEPSPEED", "").split(os.pathsep)))


@pytest.mark.slow
@pytest.mark.skipif(not PYTHONS, reason="STREAMCONV_TEST_DEEPSPEED names no interpreter")
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("kind", ["0", "1", "2", "3", "init", "mics"])
def test_every_weight_is_the_engines(python: str, kind: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [python, "-W", "ignore", MAKER, tmp_path, kind],
        capture_output=True,
        text=True,
        check=False,
    )
    if kind == "mics" and "no attribute 'MiCS_Init'" in done.stderr:
        pytest.skip("this release has no MiCS any more")
    assert done.returncode == 0, done.stderr[-2000:]
    truth = torch.load(tmp_path / "truth.pt")
    made = stored(formats.find_model(tmp_path / "checkpoint").read())
    assert made.keys() == truth.keys()
    for name, expected in truth.items():
        assert made[name].dtype == expected.dtype, name
        assert torch.equal(made[name], expected), name
