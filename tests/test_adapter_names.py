"""Adapters under the names that wrappers and trainers give them, and adapters that are not LoRA's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file

import streamconv
from scripts.makers import models
from scripts.makers.fsdp import LORA_ALPHA
from streamconv.errors import BadInputError
from streamconv.lora.names import other_tuner
from tests.test_lora import convert, load, trained

RANKS = "model_world_size_1_rank_0.pt"
PREFIX = "base_model.model."

pytestmark = [
    pytest.mark.usefixtures("planned_here"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a checkpoint, its base model, its state, and the adapter as PEFT saves it."""
    path = tmp_path_factory.mktemp("adapter")
    src, base, model = trained(
        path,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        modules_to_save=["lm_head"],
    )
    model.save_pretrained(path / "peft")
    # PEFT saves an embedding of a head that was trained as well; it is the base's own.
    state = torch.load(src / RANKS)
    truth = load_file(path / "peft" / "adapter_model.safetensors")
    return src, base, state, {n: t for n, t in truth.items() if "embed_tokens" not in n}


def of_layer(marker: str):
    return lambda name: name.replace(".layers.0.", f".layers.0.{marker}.")


WRAPPED = {
    "compiled": lambda n: f"_orig_mod.{n}",
    "compiled within": lambda n: n.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "one layer compiled": of_layer("_orig_mod"),
    "one layer checkpointed": of_layer("_checkpoint_wrapped_module"),
    "fsdp1": lambda n: "_fsdp_wrapped_module." + of_layer("_fsdp_wrapped_module")(n),
    "factors wrapped": lambda n: n.replace(".lora_A.", ".lora_A._fsdp_wrapped_module."),
    "ddp": lambda n: f"module.{n}",
    "ddp within": lambda n: n.replace(PREFIX, f"{PREFIX}module."),
    "one layer in ddp": of_layer("module"),
    "a trainer": lambda n: f"model.{n}",
    "twice adapted": lambda n: f"{PREFIX}{n}",
    "all": lambda n: f"module._orig_mod.{n}".replace(PREFIX, f"{PREFIX}module._orig_mod."),
}


def is_adapters(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def written(src: Path, path: Path, state: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(src, path, ignore=shutil.ignore_patterns("*.pt"))
    torch.save(state, path / RANKS)
    return path


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_are_removed_from_an_adapters_names(wrapper, made, tmp_path):
    src, base, state, truth = made
    wrap = WRAPPED[wrapper]
    alone = {wrap(n): t for n, t in state.items() if is_adapters(n)}
    wrapped = written(src, tmp_path / "src", alone)
    convert(wrapped, tmp_path / "out")
    found = load(tmp_path / "out")
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[n], t) for n, t in truth.items())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj", "up_proj", "v_proj"]
    assert config["modules_to_save"] == ["lm_head"]
    convert(wrapped, tmp_path / "merged", base=base)
    convert(src, tmp_path / "expected")
    merged, expected = load(tmp_path / "merged"), load(tmp_path / "expected")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[n], t) for n, t in expected.items())


@pytest.mark.parametrize("wrapper", ["one layer compiled", "ddp within", "a trainer", "all"])
def test_an_adapter_beside_its_base_weights_is_both_merged_and_handed_on(wrapper, made, tmp_path):
    src, _, state, truth = made
    wrapped = written(src, tmp_path / "src", {WRAPPED[wrapper](n): t for n, t in state.items()})
    convert(wrapped, tmp_path / "out", lora="both")
    convert(src, tmp_path / "expected")
    merged, expected = load(tmp_path / "out"), load(tmp_path / "expected")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[n], t) for n, t in expected.items())
    found = load(tmp_path / "out" / "lora_adapter")
    assert found.keys() == truth.keys()


@pytest.mark.parametrize("prefix", ["model.", "app.model.", "model.module.", ""])
def test_an_adapter_alone_in_a_dcp(prefix, made, tmp_path):
    _, base, state, truth = made
    alone = {
        prefix + n.replace(".default", ""): t
        for n, t in state.items()
        if is_adapters(n) and "original" not in n and "modules_to_save" not in n
    }
    dcp.save(alone, checkpoint_id=tmp_path / "dcp", no_dist=True)
    options = {"lora_alpha": LORA_ALPHA}
    convert(tmp_path / "dcp", tmp_path / "out", hf_config=base, **options)
    factors = {n: t for n, t in truth.items() if "lora_" in n}
    assert load(tmp_path / "out").keys() == factors.keys()
    # PEFT's own prefix says where its names begin, with no model at hand.
    convert(tmp_path / "dcp", tmp_path / "bare", **options)
    assert load(tmp_path / "bare").keys() == factors.keys()
    model = models.build("dense")
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "bare"))
    mine = peft.get_peft_model_state_dict(loaded)
    assert mine.keys() == factors.keys()
    assert all(torch.equal(mine[n], t) for n, t in factors.items())


def test_what_veomni_saves(made, tmp_path):
    """Its adapters keep PEFT's name of theirs; alpha is in a folder of PEFT's above the weights."""
    src, base, state, _ = made
    alone = {f"model.{n}": t for n, t in state.items() if is_adapters(n) and "original" not in n}
    dcp.save(alone, checkpoint_id=tmp_path / "run/global_step_1", no_dist=True)
    settings = {"peft_type": "LORA", "lora_alpha": LORA_ALPHA}
    (tmp_path / "run/adapter_config.json").write_text(json.dumps(settings))
    convert(tmp_path / "run/global_step_1", tmp_path / "out", base=base)
    convert(src, tmp_path / "expected")
    found, expected = load(tmp_path / "out"), load(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_what_accelerate_saves_of_what_was_trained_whole(made, tmp_path):
    """It saves what PEFT would: the head under the name that the base model has for it."""
    _, base, _, truth = made
    state = {f"model.{n}": t for n, t in truth.items()}
    assert f"model.{PREFIX}lm_head.weight" in state
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    convert(tmp_path / "dcp", tmp_path / "out", hf_config=base, lora_alpha=LORA_ALPHA)
    found = load(tmp_path / "out")
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[n], t) for n, t in truth.items())


def test_what_accelerate_saves(shared_checkpoints, tmp_path):
    root = shared_checkpoints / "layouts/accelerate_peft_fsdp"
    convert(root / "src", tmp_path / "out", base=root / "base", lora_alpha=16)
    found, truth = load(tmp_path / "out"), load(root / "truth")
    assert found.keys() == truth.keys()
    for name, tensor in truth.items():
        # Its sums are in BLAS's order.
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    convert(root / "src", tmp_path / "adapter", lora_alpha=16)
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
    state = (
        peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    )
    assert all(torch.equal(state[n], t) for n, t in truth.items())


@pytest.mark.parametrize("with_base", [False, True])
def test_a_module_that_the_model_lacks(with_base, made, tmp_path):
    src, base, state, _ = made
    alone = {n.replace(".layers.1.", ".layers.9."): t for n, t in state.items() if is_adapters(n)}
    wrong = written(src, tmp_path / "src", alone)
    with pytest.raises(BadInputError, match="modules of the adapter are not in") as caught:
        convert(wrong, tmp_path / "out", base=base if with_base else None)
    assert "layers.9." in caught.value.where
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_base", [False, True])
def test_factors_that_do_not_fit_the_model(with_base, made, tmp_path):
    src, base, state, _ = made
    alone = {n: t for n, t in state.items() if is_adapters(n)}
    name = next(n for n in alone if "up_proj.lora_B" in n)
    alone[name] = torch.cat([alone[name], alone[name]])
    wrong = written(src, tmp_path / "src", alone)
    with pytest.raises(BadInputError, match="does not fit the model") as caught:
        convert(wrong, tmp_path / "out", base=base if with_base else None)
    assert caught.value.where == name


def test_names_that_may_be_a_trainers_are_not_written(made, tmp_path):
    _, _, state, _ = made
    alone = {
        n.removeprefix(PREFIX).replace(".default", ""): t for n, t in state.items() if "lora_" in n
    }
    dcp.save(
        {f"model.{n}": t for n, t in alone.items()}, checkpoint_id=tmp_path / "d", no_dist=True
    )
    with pytest.raises(BadInputError, match="may be the trainer's") as caught:
        convert(tmp_path / "d", tmp_path / "out", lora_alpha=LORA_ALPHA)
    assert "--hf-config" in caught.value.hint


TUNERS = {
    "LoHa": peft.LoHaConfig(target_modules=["q_proj"]),
    "LoKr": peft.LoKrConfig(target_modules=["q_proj"]),
    "(IA)³": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "OFT": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, use_cayley_neumann=False),
    "VeRA": peft.VeraConfig(target_modules=["q_proj"]),
    "HRA": peft.HRAConfig(target_modules=["q_proj"]),
    "FourierFT": peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=4),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", TUNERS)
def test_adapters_of_other_kinds_are_named(kind, made, tmp_path):
    src, *_ = made
    adapted = peft.get_peft_model(models.build("dense"), TUNERS[kind])
    other = written(src, tmp_path / "src", adapted.state_dict())
    with pytest.raises(BadInputError, match="which is not LoRA") as caught:
        streamconv.plan(other)
    assert f"an adapter of {kind}," in caught.value.what
    # As PEFT saves them, too.
    assert other_tuner(peft.get_peft_model_state_dict(adapted))[0] == kind


def test_parts_of_models_are_not_taken_for_adapters():
    names = [
        "prompt_encoder.mask_embed.conv1.weight",  # SAM
        "prompt_encoder.point_embed.0.weight",
        "model.layers.0.attn.w_lora.lora.0.weight",  # RWKV 7
        "model.layers.0.self_attn.q_a_proj.weight",
    ]
    assert other_tuner(names) is None


def test_verify_finds_names_that_peft_does_not_load():
    from streamconv.formats.safetensors_file import FileTensor
    from streamconv.verification.folder import _check_adapter
    from streamconv.verification.report import Report

    def problems(*names: str) -> list[str]:
        report = Report()
        path = Path("out/adapter_model.safetensors")
        _check_adapter({n: FileTensor(n, path, None, (), 0, 0) for n in names}, report)
        return report.problems

    pair = [f"{PREFIX}model.layers.0.q_proj.lora_{k}.weight" for k in "AB"]
    assert problems(*pair) == []
    assert "other factor" in problems(pair[0])[0]
    assert len(problems(*(n.replace("layers.0", "layers.0._orig_mod") for n in pair))) == 2
    assert len(problems(*(f"model.{n}" for n in pair))) == 2
