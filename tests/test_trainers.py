"""What libraries write, each by its own saving function, becomes the model that was saved.

Those of the environment of the tests are made here; STREAMCONV_TEST_TRAINERS names further interpreters
(as PATH does), which have Lightning.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

import streamconv
from scripts.makers import trainers
from scripts.outputs import differences, read_model
from tests.test_lora import load

pytestmark = [
    pytest.mark.usefixtures("planned_here"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

SOURCES = {
    "accelerate_dcp": "pytorch_model_fsdp_0",
    "accelerate_peft": "pytorch_model_fsdp_0",
    "lightning": "epoch=0-step=2.ckpt",
    "lightning_fabric": "step-2.ckpt",
}
ADAPTERS = ("accelerate_peft", "peft")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what could be made, and the models that were saved."""
    out = tmp_path_factory.mktemp("trainers")
    here = [n for n in trainers.MAKERS if trainers.can(n)]
    _run(sys.executable, out, here)
    others = os.environ.get("STREAMCONV_TEST_TRAINERS", "").split(os.pathsep)
    for python in filter(None, others):
        _run(python, out, [n for n in trainers.ALONE if n not in here])
    return out


def _run(python: str, out: Path, names: list[str]) -> None:
    command = [python, "-m", "scripts.makers.trainers", str(out), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", [n for n in trainers.MAKERS if n not in ADAPTERS])
def test_what_a_library_writes_becomes_its_model(name: str, made: Path, tmp_path: Path) -> None:
    src = made / name / SOURCES.get(name, "")
    if not src.exists():
        pytest.skip(f"{trainers.MAKERS[name][0]} is in none of the interpreters")
    truth = made / ("truth_moe" if name == "transformers_distributed" else "truth")
    streamconv.convert(src, tmp_path / "out", hf_config=truth, sync=False)
    assert not differences(read_model(tmp_path / "out"), read_model(truth))


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_a_library_writes_of_an_adapter_is_merged(
    name: str, made: Path, tmp_path: Path
) -> None:
    src = made / name / SOURCES.get(name, "")
    alpha = {} if name == "peft" else {"lora_alpha": trainers.LORA["lora_alpha"]}
    options = {"dtype": "float32", "sync": False, **alpha}
    streamconv.convert(src, tmp_path / "out", base=made / "truth", **options)
    base = transformers.AutoModelForCausalLM.from_pretrained(made / "truth", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, made / "peft").merge_and_unload().state_dict()
    found = load(tmp_path / "out")
    assert found.keys() == merged.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, merged[key].float(), rtol=1e-5, atol=1e-6)


def test_ten_layouts_are_made_here() -> None:
    assert sum(map(trainers.can, trainers.MAKERS)) >= 10
