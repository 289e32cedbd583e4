"""What docs say is supported is what the sweep over all architectures saw, and its sample holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.campaigns.architectures import PAGE, RESULT, page_with

REPOSITORY = Path(__file__).resolve().parents[1]


def test_readme_says_what_the_sweep_saw() -> None:
    kept = json.loads(RESULT.read_text())
    assert "wrong" not in {c["is"] for c in kept["classes"].values()}
    text = PAGE.read_text()
    assert text == page_with(text, kept), "python -m scripts.campaigns.architectures --readme"


@pytest.mark.slow
def test_a_sample_comes_out_right(tmp_path: Path) -> None:
    """A base model inside with the scope "", a config that says Infinity, zeros, fused experts."""
    types = ("qwen2_5_omni_thinker", "falcon_h1", "inkling2_text", "Qwen3MoeForCausalLM", "gemma3")
    done = subprocess.run(
        [sys.executable, "-m", "scripts.campaigns.architectures", "--work", str(tmp_path),
         *(word for t in types for word in ("--only", t))],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    line = "6 classes, 4 right, 2 equal when loaded, 0 refused, 0 wrong, 0 not built"
    assert line in done.stdout
