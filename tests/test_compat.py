"""The output in transformers 4, which holds experts one by one and wrote torch_dtype.

Weights and config only: a tokenizer that transformers 5 saved names a class that 4 lacks, and side
files are copied as they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import streamconv
from tests.makers.fsdp import Made
from tests.outputs import Stored, differences, read_truth

pytestmark = [pytest.mark.slow, pytest.mark.compat]

# All that transformers 4.57 wants at other releases than transformers 5, or beside them.
PACKAGES = [
    "transformers==4.57.1",
    "tokenizers>=0.22,<0.23",
    "huggingface_hub>=0.34,<1.0",
    "requests",
    "urllib3",
    "idna",
    "certifi",
    "charset-normalizer",
]

# Loads each folder and writes the state dict with the names and values that the library holds.
LOAD = """
import json, sys
import torch, transformers
from safetensors.torch import save_file
assert transformers.__version__.startswith("4.57."), transformers.__version__
for folder, out in json.loads(sys.argv[1]):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v}
    assert not wrong, (folder, wrong)
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    state = {n: t.contiguous() for n, t in model.state_dict().items() if n not in tied}
    save_file(state, out)
"""


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with transformers 4.57, installed once a session."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, complete = base / "transformers-4", base / "transformers-4.complete"
    with FileLock(base / "transformers-4.lock"):
        if not complete.exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check", "--target", str(folder), *PACKAGES]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1:]
                pytest.skip(f"pip cannot install transformers 4: {reason}")
            complete.touch()
    return folder


def test_transformers_4_loads_the_same_weights(
    transformers_4: Path,
    checkpoints: dict[str, Made],
    tmp_path: Path,
    planned_here: None,  # where torch and transformers 5 are loaded already
) -> None:
    names = ["fsdp2", "fsdp2-bf16", "fsdp2-tied", "fsdp1-tied-differs"]
    names += ["fsdp2-moe", "fsdp2-mixtral", "fsdp2-qwen2_moe"]
    jobs = []
    for name in names:
        streamconv.convert(
            checkpoints[name].source, tmp_path / name, sync=False, max_shard_size="64KB"
        )
        jobs.append((str(tmp_path / name), str(tmp_path / f"{name}.safetensors")))
    path = os.pathsep.join([str(transformers_4), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(jobs)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, (_, state) in zip(names, jobs, strict=True):
        found: dict[str, Stored] = read_truth(Path(state))
        assert differences(found, read_truth(checkpoints[name].truth_hf)) == [], name
