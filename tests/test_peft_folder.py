"""A folder that PEFT saved is a source: merged into its base model, or written again, checked."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import streamconv
from scripts.makers.dcp import save_alone
from streamconv.errors import BadInputError, UsageError
from streamconv.formats import find_model
from tests.test_lora import convert, load, logits, trained

PREFIX = "base_model.model."

pytestmark = [
    pytest.mark.usefixtures("planned_here"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return PEFT's folder with safetensors, one with a torch file, the base model, PEFT's model."""
    path = tmp_path_factory.mktemp("peft")
    _, base, model = trained(path, target_modules=["q_proj", "down_proj"])
    model.save_pretrained(path / "safetensors")
    model.save_pretrained(path / "bin", safe_serialization=False)
    return path / "safetensors", path / "bin", base, model


@pytest.mark.parametrize("kind", [0, 1], ids=["safetensors", "torch file"])
@pytest.mark.parametrize("mode", ["auto", "merge"])
def test_it_is_merged_as_peft_merges(kind, mode, made, tmp_path):
    src, base = made[kind], made[2]
    convert(src, tmp_path / "out", lora=mode, base=base)
    found, plain, factors = (
        load(tmp_path / "out"),
        load(base),
        load_file(made[0] / "adapter_model.safetensors"),
    )
    settings = json.loads((made[0] / "adapter_config.json").read_text())
    for name, weight in plain.items():
        module = PREFIX + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in factors:
            a, b = (factors[f"{module}.lora_{x}.weight"] for x in "AB")
            weight = weight + settings["lora_alpha"] / settings["r"] * (b @ a)
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7)
    assert found.keys() == plain.keys()
    assert (tmp_path / "out/config.json").is_file()
    assert streamconv.verify(tmp_path / "out", source=src).passed


@pytest.mark.parametrize("kind", [0, 1], ids=["safetensors", "torch file"])
def test_it_is_written_again(kind, made, tmp_path):
    convert(made[kind], tmp_path / "out", lora="adapter", base=made[2])
    truth = load_file(made[0] / "adapter_model.safetensors")
    found = load(tmp_path / "out")
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[n], truth[n]) for n in truth)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    expected = json.loads((made[0] / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["r"]) == (expected["lora_alpha"], expected["r"])


def test_what_was_trained_whole_is_no_base_weight(tmp_path):
    """In its own file PEFT calls it as the base model does."""
    _, base, model = trained(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    truth = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert f"{PREFIX}lm_head.weight" in truth
    for options in ({"hf_config": base}, {"base": base}):
        convert(tmp_path / "peft", tmp_path / "out", lora="adapter", overwrite=True, **options)
        found = load(tmp_path / "out")
        assert found.keys() == truth.keys()
        assert all(torch.equal(found[n], truth[n]) for n in truth)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head"]
    convert(tmp_path / "peft", tmp_path / "merged", base=base)
    assert torch.equal(
        load(tmp_path / "merged")["lm_head.weight"], truth[f"{PREFIX}lm_head.weight"]
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    assert torch.equal(logits(adapted), logits(model))


def test_an_embedding_that_peft_saved_with_its_adapter(tmp_path):
    _, base, model = trained(tmp_path, target_modules=["q_proj", "embed_tokens"])
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    held = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert any("embed_tokens.base_layer" in n for n in held)
    convert(tmp_path / "peft", tmp_path / "out", base=base)
    expected = model.merge_and_unload().state_dict()
    for name, tensor in load(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_an_embedding_that_peft_saved_is_handed_on(tmp_path):
    """It need not be that of the base model on disk, and PEFT takes it where the adapter has it."""
    _, base, model = trained(tmp_path, target_modules=["q_proj", "embed_tokens"])
    with torch.no_grad():
        model.get_input_embeddings().base_layer.weight.add_(0.5)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    held = load_file(tmp_path / "peft/adapter_model.safetensors")
    convert(tmp_path / "peft", tmp_path / "out", lora="adapter", base=base)
    found = load(tmp_path / "out")
    assert found.keys() == held.keys()
    assert all(torch.equal(found[n], t) for n, t in held.items())
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "out")
    assert torch.equal(logits(adapted), logits(model))
    assert streamconv.verify(tmp_path / "out", base=base, forward=True).passed


def test_an_embedding_beside_an_adapter_is_no_base_model(tmp_path):
    """Accelerate saves what PEFT does: the embedding may be there, and no other weight."""
    _, base, model = trained(tmp_path, target_modules=["q_proj", "embed_tokens"])
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    held = load_file(tmp_path / "peft/adapter_model.safetensors")
    src = save_alone(tmp_path / "dcp", {f"model.{n}": t for n, t in held.items()})
    convert(src, tmp_path / "adapter", hf_config=base, lora_alpha=8)
    assert load(tmp_path / "adapter").keys() == held.keys()
    convert(src, tmp_path / "merged", base=base, lora_alpha=8)
    assert load(tmp_path / "merged").keys() == load(base).keys()


def test_biases_that_were_trained_have_no_place(made, tmp_path):
    src = _changed(made[0], tmp_path / "src")
    factors = load_file(src / "adapter_model.safetensors")
    bias = {f"{PREFIX}model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    save_file(factors | bias, src / "adapter_model.safetensors")
    with pytest.raises(BadInputError, match="biases were trained too"):
        convert(src, tmp_path / "out", lora="adapter", base=made[2])


def test_without_its_base_model_the_way_is_named(made, tmp_path):
    with pytest.raises(UsageError, match="with its base model only") as caught:
        convert(made[0], tmp_path / "out")
    assert "--base DIR" in str(caught.value.hint)
    with pytest.raises(BadInputError, match="does not hold the weight") as caught:
        convert(made[0], tmp_path / "out", lora="merge")
    assert "--base DIR" in str(caught.value.hint)


def test_without_its_config_alpha_is_asked_for(made, tmp_path):
    src = _changed(made[0], tmp_path / "src")
    settings = json.loads((src / "adapter_config.json").read_text())
    (src / "adapter_config.json").unlink()
    with pytest.raises(BadInputError, match="lora_alpha is not known"):
        convert(src, tmp_path / "out", base=made[2])
    convert(src, tmp_path / "out", base=made[2], lora_alpha=settings["lora_alpha"])
    convert(made[0], tmp_path / "expected", base=made[2])
    found, expected = load(tmp_path / "out"), load(tmp_path / "expected")
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_names_that_the_base_lacks(made, tmp_path):
    for mode in ("adapter", "merge"):
        src = _changed(made[0], tmp_path / mode, names=lambda n: n.replace("q_proj", "z_proj"))
        with pytest.raises(BadInputError, match=r"are not in Qwen2ForCausalLM"):
            convert(src, tmp_path / "out", lora=mode, base=made[2])


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_replication": [[0, 2]]},
        {"use_qalora": True},
        {"target_parameters": ["experts.down_proj"]},
    ],
)
def test_settings_that_no_tensor_shows_are_not_passed_over(settings, made, tmp_path):
    src = _changed(made[0], tmp_path / "src", settings=settings)
    with pytest.raises(BadInputError, match="settings that are not known"):
        convert(src, tmp_path / "out", base=made[2])


def test_every_setting_of_pefts_own_is_known(made, tmp_path):
    """What LoraConfig writes when nothing is said must not stop anybody."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    src = _changed(
        made[0], tmp_path / "src", settings={k: v for k, v in config.to_dict().items() if v}
    )
    settings = json.loads((made[0] / "adapter_config.json").read_text())
    convert(
        src,
        tmp_path / "out",
        base=made[2],
        lora_alpha=settings["lora_alpha"],
        lora_rank=settings["r"],
    )


def test_beside_a_checkpoint_it_is_no_model_to_choose(made, tmp_path):
    """verl keeps one in the folder of the rank files."""
    src, _, model = trained(tmp_path / "run", target_modules=["q_proj"])
    model.save_pretrained(src / "lora_adapter")
    assert find_model(src).format == find_model(src, "actor").format == "fsdp"


def _changed(src: Path, path: Path, *, names=lambda n: n, settings=None) -> Path:
    path.mkdir()
    tensors = load_file(src / "adapter_model.safetensors")
    save_file({names(n): t for n, t in tensors.items()}, path / "adapter_model.safetensors")
    config = json.loads((src / "adapter_config.json").read_text())

    def plain(value):
        return sorted(value) if isinstance(value, set) else value

    config |= {k: plain(v) for k, v in (settings or {}).items()}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
