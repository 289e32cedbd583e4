"""``verify`` of an adapter's folder: its names against the model, and PEFT's loading of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from streamconv.batch import worker
from streamconv.errors import StreamconvError, UsageError
from streamconv.options import JobOptions, LoraOptions
from streamconv.verification import adapter_child, folder, forward, forward_child
from streamconv.verification.forward import verify_forward
from tests.test_lora import convert, trained

WEIGHTS = "adapter_model.safetensors"

pytestmark = [
    pytest.mark.usefixtures("planned_here"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(forward, "ask", lambda module, request, doing: forward_child._run(request))
    monkeypatch.setattr(
        folder, "ask", lambda module, request, doing: adapter_child._check_names(request)
    )
    monkeypatch.setattr(forward.memory.PeakMeter, "peak_bytes", 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a base model, an adapter's output, the merged one, and PEFT's own adapter."""
    path = tmp_path_factory.mktemp("adapter")
    src, base, model = trained(path, target_modules=["q_proj", "down_proj"])
    model.save_pretrained(path / "peft")
    convert(src, path / "both", lora="both")
    convert(src, path / "adapter", lora="adapter")
    return base, path / "adapter", path / "both", path / "peft"


def changed(source: Path, path: Path, rename) -> Path:
    """Copy an adapter under other names, by hand: no manifest goes along."""
    path.mkdir()
    shutil.copy(source / "adapter_config.json", path)
    save_file({rename(n): t for n, t in load_file(source / WEIGHTS).items()}, path / WEIGHTS)
    return path


def test_an_adapters_names_are_checked_where_the_model_is_at_hand(made):
    base, adapter, both, _ = made
    alone = streamconv.verify(adapter)
    assert alone.passed
    assert any("by form alone" in c for c in alone.checked)
    for report in (streamconv.verify(adapter, base=base), streamconv.verify(both)):
        assert report.problems == []
        assert any("modules against Qwen2ForCausalLM" in c for c in report.checked)


def test_a_batch_checks_an_adapter_against_its_base(made, tmp_path, monkeypatch):
    base, adapter, *_ = made
    reports, verify = [], streamconv.api.verify
    monkeypatch.setattr(
        streamconv.api, "verify", lambda *a, **k: reports.append(verify(*a, **k)) or reports[0]
    )
    alone = tmp_path / "alone"
    shutil.copytree(adapter.parent / "src", alone)
    (rank_file,) = alone.glob("*.pt")
    torch.save({n: t for n, t in torch.load(rank_file).items() if "lora_" in n}, rank_file)
    job = JobOptions(lora=LoraOptions(mode="adapter", base=base))
    done = worker._convert(
        {
            "source": str(alone),
            "output": str(tmp_path / "out"),
            "job": job.to_json(),
            "run": {"sync": False},
            "verify": True,
            "report": None,
        }
    )
    assert done["verified"]
    assert any("modules against Qwen2ForCausalLM" in c for c in reports[0].checked)


@pytest.mark.parametrize("key", ["num_hidden_layers", "intermediate_size"])
def test_a_base_that_lacks_what_is_adapted(key, made, tmp_path):
    base, adapter, *_ = made
    config = json.loads((base / "config.json").read_text())
    config |= {key: 1 if key == "num_hidden_layers" else config[key] * 2, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = streamconv.verify(adapter, base=tmp_path)
    assert len(report.problems) == 1
    expected = ".layers.1." if key == "num_hidden_layers" else "does not fit the model"
    assert expected in report.problems[0]


def test_an_adapter_is_run_on_its_base(made, tmp_path):
    base, adapter, both, peft = made
    for reference in (both, peft, both / "lora_adapter"):
        report = streamconv.verify(adapter, forward=True, reference=reference, base=base)
        assert report.problems == []
    # It is the adapter that is run, not the base.
    assert not verify_forward(adapter, reference=base, base=base).passed
    with pytest.raises(UsageError, match="needs its base model"):
        verify_forward(adapter)
    named = changed(adapter, tmp_path / "named", str)
    config = json.loads((named / "adapter_config.json").read_text())
    (named / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(base)})
    )
    assert verify_forward(named, reference=both, base=None).passed


@pytest.mark.parametrize("marker", ["_orig_mod", "module"])
def test_what_peft_passes_over_is_a_problem(marker, made, tmp_path):
    base, adapter, both, _ = made
    wrong = changed(adapter, tmp_path / "a", lambda n: n.replace("layers.0", f"layers.0.{marker}"))
    problems = verify_forward(wrong, base=base).problems
    assert sum("PEFT passes over it" in p for p in problems) == 4
    assert sum("would start with a random one" in p for p in problems) == 4
    assert not verify_forward(both, reference=wrong, base=base).passed


def test_settings_that_are_not_given_to_peft(made, tmp_path):
    base, adapter, *_ = made
    wrong = changed(adapter, tmp_path / "a", str)
    path = wrong / "adapter_config.json"
    config = json.loads(path.read_text())
    for more, message in (
        ({"target_modules": "(a+)+$"}, "is a pattern"),
        ({"target_parameters": ["experts"]}, "settings that are not known"),
        ({"init_lora_weights": "pissa"}, "altered base weights"),
        ({"peft_type": "LOHA"}, "another kind than LoRA"),
    ):
        path.write_text(json.dumps({**config, **more}))
        with pytest.raises(StreamconvError, match=message):
            verify_forward(wrong, base=base)


def test_peft_is_named_where_it_is_not_installed(made, monkeypatch):
    base, adapter, *_ = made
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(StreamconvError, match="needs PEFT") as caught:
        verify_forward(adapter, base=base)
    assert caught.value.hint == "pip install peft"
