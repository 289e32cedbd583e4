"""verl's own command line, models to choose from, value heads, checkpoints of old releases."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from typer.testing import CliRunner

import streamconv
from scripts.outputs import cast, differences, read_model, read_truth
from streamconv.cli import conversion
from streamconv.cli.app import app
from streamconv.errors import BadInputError, UsageError

pytestmark = pytest.mark.usefixtures("planned_here")


def command(*arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def test_merge_takes_verls_words_and_gives_bfloat16(checkpoints, tmp_path):
    made = checkpoints["fsdp1"]
    done = command(
        *("verl", "merge", "--backend", "fsdp", "--local_dir", made.source),
        *("--target_dir", tmp_path / "out", "--trust-remote-code", "--tie-word-embedding"),
        *("--is-value-model", "--use_cpu_initialization"),
    )
    assert done.exit_code == 0, done.output
    assert "this is: streamconv convert" in done.stderr
    assert "--dtype bfloat16" in done.stderr
    expected = {n: cast(t, torch.bfloat16) for n, t in read_truth(made.truth_hf).items()}
    assert differences(read_model(tmp_path / "out"), expected) == []

    test = ["verl", "test", "--backend", "fsdp", "--local_dir", made.source, "--test_hf_dir"]
    done = command(*test, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{len(expected)} tensors compared, 0 problems\n"
    assert command(*test, made.truth_hf).exit_code == 0, "the float32 truth is rounded alike"
    weights = tmp_path / "out" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 0x40
    weights.write_bytes(raw)
    other = command(*test, tmp_path / "out")
    assert other.exit_code == 5
    assert "values differ by up to" in other.stdout

    with pytest.raises(BadInputError, match="no such model folder"):
        command(*test, tmp_path / "nowhere")
    with pytest.raises(BadInputError, match="no safetensors files"):
        command(*test, made.source)
    with pytest.raises(UsageError, match="unknown backend"):
        command("verl", "merge", "--backend", "ddp", "--local_dir", made.source)


def test_infinities_and_nans_are_alike(tmp_path):
    values = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan])
    src, there = tmp_path / "actor", tmp_path / "there"
    for folder in (src, there):
        folder.mkdir()
    torch.save({"w": values}, src / "model_world_size_1_rank_0.pt")
    test = ["verl", "test", "--backend", "fsdp", "--local_dir", src, "--test_hf_dir", there]
    save_file({"w": values}, there / "model.safetensors")
    assert command(*test).exit_code == 0
    save_file({"w": values.abs()}, there / "model.safetensors")
    done = command(*test)
    assert done.exit_code == 5
    assert "w: values differ by up to inf" in done.stdout


def test_an_old_checkpoint_takes_its_config_from_elsewhere(checkpoints, tmp_path):
    """Neither fsdp_config.json nor huggingface/, as verl's legacy merger met them."""
    made = checkpoints["fsdp1"]
    src = tmp_path / "actor"
    src.mkdir()
    for path in made.source.glob("model_*.pt"):
        shutil.copy(path, src)
    config = made.source / "huggingface"
    done = command(
        *("verl", "merge", "--backend", "fsdp", "--local_dir", src),
        *("--hf_model_path", config, "--target_dir", tmp_path / "out"),
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    # Without any config it goes by names alone, and says so.
    result = streamconv.convert(src, tmp_path / "bare", sync=False)
    assert any("no config.json" in n for n in result.notices)
    assert differences(read_model(tmp_path / "bare"), read_truth(made.truth_state)) == []


@pytest.fixture
def step(checkpoints, tmp_path) -> Path:
    for name, recipe in (("actor", "fsdp2"), ("critic", "fsdp2-critic")):
        shutil.copytree(checkpoints[recipe].source, tmp_path / "global_step_7" / name)
    return tmp_path / "global_step_7"


def test_actor_and_critic_one_or_both(step, checkpoints, tmp_path):
    with pytest.raises(UsageError, match="2 models to choose from") as caught:
        command("convert", step, tmp_path / "out")
    assert caught.value.found == "actor, critic"
    assert caught.value.hint == (
        "say which: --model actor|critic, or its folder; `convert` has --model all, too"
    )
    with pytest.raises(UsageError, match="no model 'all'") as caught:
        command("plan", step, "--model", "all")
    assert caught.value.hint == "only `convert` takes all of them"

    assert command("convert", step.parent, tmp_path / "one", "--model", "critic").exit_code == 0
    done = command("convert", step, tmp_path / "out", "--model", "all")
    assert done.exit_code == 0, done.output
    for name, recipe in (("actor", "fsdp2"), ("critic", "fsdp2-critic")):
        truth = read_truth(checkpoints[recipe].truth_hf)
        assert differences(read_model(tmp_path / "out" / name), truth) == []
    assert differences(read_model(tmp_path / "one"), truth) == []
    with pytest.raises(UsageError, match="one model here"):
        streamconv.convert_all(step / "actor", tmp_path / "none")


def test_each_of_several_models_has_its_own_report(step, tmp_path):
    page = tmp_path / "pages" / "report.html"
    done = command("convert", step, tmp_path / "out", "--model", "all", "--report", page)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in page.parent.iterdir()) == [
        "report-actor.html",
        "report-critic.html",
    ]
    for name in ("actor", "critic"):
        text = (page.parent / f"report-{name}.html").read_text()
        assert str(tmp_path / "out" / name) in text


@pytest.mark.parametrize(
    ("answers", "chosen"), [("nonsense\nall\n", "all"), ("\n", None), ("", None)]
)
def test_a_terminal_is_asked(answers, chosen, step, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal(answers))
    monkeypatch.setattr("sys.stderr", Terminal())
    assert conversion._choose(step, ask=True) == chosen
    assert conversion._choose(step, ask=False) is None
    assert conversion._choose(step / "actor", ask=True) is None


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_value_head_is_kept_or_dropped(checkpoints, tmp_path):
    made = checkpoints["fsdp2-value-head"]
    truth = read_truth(made.truth_hf)
    heads = {n for n in truth if n.startswith("v_head.")}
    assert heads == {"v_head.summary.weight", "v_head.summary.bias"}
    kept = streamconv.convert(made.source, tmp_path / "kept", sync=False)
    assert len([n for n in kept.notices if "v_head" in n]) == 1
    assert differences(read_model(tmp_path / "kept"), truth) == []
    plan = streamconv.plan(made.source, value_head="drop")
    assert {s.name for s in plan.head.skipped} == heads
    assert not any("v_head" in n for n in plan.head.notices)
    streamconv.convert(made.source, tmp_path / "dropped", value_head="drop", sync=False)
    without = {n: t for n, t in truth.items() if n not in heads}
    assert differences(read_model(tmp_path / "dropped"), without) == []
    _, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dropped", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with pytest.raises(UsageError, match="no v_head") as caught:
        streamconv.convert(
            checkpoints["fsdp2-critic"].source, tmp_path / "no", value_head="drop", sync=False
        )
    assert "score head" in caught.value.found


def test_quantised_weights_and_their_scales_pass_through(checkpoints, tmp_path):
    """fp8 in blocks, as DeepSeek-V3 is published: --dtype leaves weights and scales alone."""
    src = tmp_path / "actor"
    src.mkdir()
    state = {
        "model.layers.0.mlp.down_proj.weight": torch.randn(8, 8).to(torch.float8_e4m3fn),
        "model.layers.0.mlp.down_proj.weight_scale_inv": torch.randn(1, 1),
        "model.layers.0.mlp.scale": torch.randn(4),
    }
    torch.save(state, src / "model_world_size_1_rank_0.pt")
    streamconv.convert(src, tmp_path / "out", dtype="bfloat16", sync=False)
    found = read_model(tmp_path / "out")
    assert {n: t.dtype for n, t in found.items()} == {
        "model.layers.0.mlp.down_proj.weight": "F8_E4M3",
        "model.layers.0.mlp.down_proj.weight_scale_inv": "F32",
        "model.layers.0.mlp.scale": "BF16",
    }
    for name in list(state)[:2]:
        raw = state[name].view(torch.uint8).numpy().tobytes()
        assert found[name].data == raw


def test_advice_can_be_followed_and_an_older_output_is_replaced(tmp_path):
    """verl's words have no --keep-dtype and no --hf-config: the advice names the command that has."""
    src, out = tmp_path / "actor", tmp_path / "out"
    src.mkdir()
    merge = ["verl", "merge", "--backend", "fsdp", "--local_dir", src, "--target_dir", out]

    def save(value: float) -> None:
        weights = {"a.weight": torch.tensor([value], dtype=torch.float64)}
        torch.save(weights, src / "model_world_size_1_rank_0.pt")

    save(1e300)
    with pytest.raises(BadInputError, match="does not fit") as caught:
        command(*merge)
    assert f"streamconv convert {src} {out} --dtype bfloat16" in caught.value.hint
    save(1.0)
    assert command(*merge).exit_code == 0
    save(2.0)
    assert command(*merge).exit_code == 0, "as verl does, it writes over what it wrote before"
    assert (
        read_model(out)["a.weight"].data
        == torch.tensor([2.0]).bfloat16().view(torch.uint8).numpy().tobytes()
    )
