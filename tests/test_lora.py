"""LoRA checkpoints: merged as PEFT merges, handed on as PEFT loads them, refused where unclear."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import streamconv
from scripts.makers import models
from scripts.makers.fsdp import LORA_ALPHA, LORA_RANK, Made
from scripts.makers.large import make_large
from scripts.measured import run
from scripts.outputs import contents, differences, read_model, read_truth
from streamconv.errors import BadInputError, OutputExistsError, UsageError
from tests.test_budget import named_smallest

MERGED = [
    "fsdp2-lora",
    "fsdp2-lora-bf16",
    "fsdp1-lora",
    "fsdp2-lora-saved",
    "fsdp2-lora-rslora",
    "fsdp2-lora-embedding",
    "fsdp2-lora-conv1d",
]
PREFIX = "base_model.model."

pytestmark = [
    pytest.mark.usefixtures("planned_here"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def convert(src: Path, dst: Path, **options) -> streamconv.Result:
    return streamconv.convert(src, dst, sync=False, **options)


def load(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def copied(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.source, tmp_path / "copy"))


def base_folder(made: Made, path: Path) -> Path:
    """Write the base model alone as a folder of the Hub."""
    state = load_file(made.truth_state)
    base = {
        n.removeprefix(PREFIX).replace(".base_layer.", "."): t
        for n, t in state.items()
        if "lora_" not in n
    }
    path.mkdir()
    save_file(base, path / "model.safetensors", {"format": "pt"})
    shutil.copy(made.truth_hf / "config.json", path)
    return path


# --- merging ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MERGED)
def test_merged_is_what_peft_merges(name, checkpoints, tmp_path):
    made = checkpoints[name]
    convert(made.source, tmp_path / "out")
    found, truth = load(tmp_path / "out"), load(made.truth_hf)
    assert found.keys() == truth.keys()
    changed = 0
    for key, expected in truth.items():
        mine = found[key]
        assert mine.dtype == expected.dtype
        # PEFT sums in another order, and rounds the update of a bf16 model before adding it.
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(mine.double(), expected.double(), rtol=eps, atol=2 * eps)
        changed += not torch.equal(mine, expected)
    # Most bits agree; what was not adapted agrees in all.
    assert changed <= 9


@pytest.mark.parametrize("name", ["fsdp2-lora", "fsdp2-lora-bf16", "fsdp2-lora-rslora"])
@pytest.mark.parametrize("dtype", ["keep", "bfloat16", "float32"])
def test_each_element_is_summed_by_rank_in_float32_and_rounded_once(
    name, dtype, checkpoints, tmp_path
):
    made = checkpoints[name]
    convert(made.source, tmp_path / "out", dtype=dtype)
    found, state = load(tmp_path / "out"), load_file(made.truth_state)
    scale = LORA_ALPHA / (LORA_RANK**0.5 if "rslora" in name else LORA_RANK)
    adapted = [n for n in state if ".lora_A." in n]
    assert len(adapted) == 8
    for name_a in adapted:
        module = name_a.removeprefix(PREFIX).removesuffix(".lora_A.default.weight")
        a, b = state[name_a].float(), state[name_a.replace("lora_A", "lora_B")].float()
        weight = state[f"{PREFIX}{module}.base_layer.weight"]
        update = torch.zeros(weight.shape)
        for k in range(LORA_RANK):
            update = update + b[:, k, None] * a[k]
        target = weight.dtype if dtype == "keep" else getattr(torch, dtype)
        expected = (weight.float() + update * scale).to(target)
        assert torch.equal(found[f"{module}.weight"], expected), module


@pytest.mark.parametrize("name", ["fsdp2-lora-bf16", "fsdp2-lora-embedding", "fsdp2-lora-conv1d"])
def test_the_bytes_depend_on_neither_budget_nor_threads(name, checkpoints, tmp_path, monkeypatch):
    from streamconv.executor import budget, products

    made = checkpoints[name]
    convert(made.source, tmp_path / "whole")
    # Tiles, blocks and windows that end in the middle of rows.
    monkeypatch.setattr(products, "_BLOCK_COLUMNS", 7)
    monkeypatch.setattr(products, "PRODUCT_BLOCK_ELEMENTS", 23)
    monkeypatch.setattr(budget, "window_bytes", lambda *_: 1000)
    monkeypatch.setattr(budget, "factor_bytes", lambda *_: 500)
    convert(made.source, tmp_path / "tiled", io_threads=3)
    assert contents(tmp_path / "whole") == contents(tmp_path / "tiled")


def test_an_adapted_embedding_leaves_the_head_that_was_tied_to_it(checkpoints, tmp_path):
    # PEFT's merge changes both, for they share memory; what was trained changed the embedding only.
    made = checkpoints["fsdp2-lora-tied"]
    convert(made.source, tmp_path / "out")
    found, state = load(tmp_path / "out"), load_file(made.truth_state)
    assert torch.equal(found["lm_head.weight"], state[f"{PREFIX}lm_head.weight"])
    assert not torch.equal(found["model.embed_tokens.weight"], found["lm_head.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_an_output_verifies_against_its_source(checkpoints, tmp_path):
    made = checkpoints["fsdp2-lora-bf16"]
    convert(made.source, tmp_path / "out", lora="both")
    report = streamconv.verify(tmp_path / "out", source=made.source)
    assert report.passed, report.problems


def test_lazy_tensors_are_merged_too(checkpoints, tmp_path):
    made = checkpoints["fsdp2-lora"]
    convert(made.source, tmp_path / "out")
    whole = load(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"].numpy()
    with streamconv.open(made.source) as checkpoint:
        tensor = checkpoint["model.layers.1.mlp.up_proj.weight"]
        assert np.array_equal(tensor[7:40, 3:9], whole[7:40, 3:9])
        assert np.array_equal(tensor[5], whole[5])
        assert np.array_equal(tensor[::3], whole[::3])


# --- adapters alone --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MERGED, "fsdp2-lora-only", "fsdp1-lora-only", "fsdp2-lora-dora"])
def test_the_adapter_is_what_peft_saves(name, checkpoints, tmp_path):
    made = checkpoints[name]
    convert(made.source, tmp_path / "out", lora="adapter")
    found, truth = read_model(tmp_path / "out"), read_truth(made.truth_adapter)
    # PEFT adds the frozen embedding to an adapter of it.
    truth = {n: t for n, t in truth.items() if "base_layer" not in n}
    assert differences(found, truth) == []
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    expected = json.loads((made.truth_adapter / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(expected["target_modules"])
    for key in ("r", "lora_alpha", "task_type", "use_dora", "fan_in_fan_out", "modules_to_save"):
        assert config[key] == expected[key], key
    assert not (tmp_path / "out" / "config.json").exists()


def test_peft_loads_what_both_gives(checkpoints, tmp_path):
    made = checkpoints["fsdp2-lora"]
    convert(made.source, tmp_path / "out", lora="both")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        base_folder(made, tmp_path / "base"), dtype="auto"
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "lora_adapter")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        a, b = adapted(tokens).logits, merged(tokens).logits
        plain = adapted.unload()(tokens).logits
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, b, rtol=1e-3, atol=1e-3)


def test_an_adapter_alone_merges_into_a_base_folder(checkpoints, tmp_path):
    made, only = checkpoints["fsdp2-lora"], checkpoints["fsdp2-lora-only"]
    base = base_folder(made, tmp_path / "base")
    convert(only.source, tmp_path / "out", base=base)
    convert(made.source, tmp_path / "expected")
    assert differences(read_model(tmp_path / "out"), read_model(tmp_path / "expected")) == []
    assert streamconv.verify(tmp_path / "out", source=only.source).passed
    again = convert(only.source, tmp_path / "out", base=base)
    assert again.status == "nothing-to-do"
    with pytest.raises(UsageError, match="this one has them"):
        convert(made.source, tmp_path / "other", base=base)
    with pytest.raises(UsageError, match="overlaps"):
        convert(only.source, base, base=base, overwrite=True)


def trained(path: Path, arch: str = "dense", **settings) -> tuple[Path, Path, torch.nn.Module]:
    """Return a checkpoint of one rank, its base model as a folder, and PEFT's model."""
    model = models.build(arch)
    model.save_pretrained(path / "base")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, **settings)
    )
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                tensor.copy_(models.values(name, tensor.shape, tensor.dtype) * 0.05)
    src = path / "src"
    src.mkdir()
    torch.save(adapted.state_dict(), src / "model_world_size_1_rank_0.pt")
    (src / "lora_train_meta.json").write_text(
        json.dumps({"r": LORA_RANK, "lora_alpha": LORA_ALPHA})
    )
    shutil.copytree(
        path / "base", src / "huggingface", ignore=shutil.ignore_patterns("*.safetensors")
    )
    return src, path / "base", adapted.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        found = model(torch.arange(20)[None]).logits
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize(
    ("targets", "saved", "written_targets", "written_saved"),
    [
        (["q_proj"], ["layers.0.mlp"], ["q_proj"], ["model.layers.0.mlp"]),
        (["q_proj"], ["mlp"], ["q_proj"], ["mlp"]),
        # To PEFT "norm" is the end of "input_layernorm" as well.
        (["q_proj"], ["norm"], ["q_proj"], ["input_layernorm", "norm", "post_attention_layernorm"]),
        (["q_proj"], ["model.norm"], ["q_proj"], ["model.norm"]),
        (["layers.1.self_attn.q_proj"], None, ["model.layers.1.self_attn.q_proj"], None),
        (["down_proj"], ["layers.0.mlp"], ["model.layers.1.mlp.down_proj"], ["model.layers.0.mlp"]),
    ],
)
def test_peft_makes_of_an_adapter_what_was_trained(
    targets, saved, written_targets, written_saved, tmp_path
):
    src, base, model = trained(tmp_path, target_modules=targets, modules_to_save=saved)
    convert(src, tmp_path / "out", lora="both")
    folder = tmp_path / "out" / "lora_adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == written_targets
    assert config["modules_to_save"] == written_saved
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    expected = logits(model)
    assert not torch.equal(expected, logits(plain))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(plain, folder).eval()), expected)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def test_the_adapter_of_a_convolution_is_handed_on(tmp_path):
    src, _, model = trained(tmp_path, "qwen2_5_vl", target_modules=["q_proj", "proj"])
    with pytest.raises(BadInputError, match="convolution cannot be merged") as caught:
        convert(src, tmp_path / "out")
    assert "--lora adapter" in caught.value.hint
    convert(src, tmp_path / "out", lora="adapter")
    model.save_pretrained(tmp_path / "peft")
    truth = read_truth(tmp_path / "peft" / "adapter_model.safetensors")
    assert any(len(t.shape) == 5 for t in truth.values())
    assert differences(read_model(tmp_path / "out"), truth) == []


@pytest.mark.parametrize("parameters", [["down_proj"], ["gate_up_proj", "down_proj"]])
@pytest.mark.parametrize("mode", ["merge", "adapter"])
def test_adapted_parameters_are_not_taken_for_a_module(mode, parameters, tmp_path):
    src, _, _ = trained(
        tmp_path,
        "moe",
        target_modules=["q_proj"],
        target_parameters=[f"experts.{p}" for p in parameters],
    )
    (src / "lora_train_meta.json").unlink()  # which would tell by the rank
    with pytest.raises(BadInputError, match="changes parameters"):
        convert(src, tmp_path / "out", lora=mode, lora_alpha=10)


def test_a_critics_head_is_missed_beside_its_adapter(tmp_path):
    src, _, _ = trained(tmp_path, "critic", target_modules=["q_proj"])
    for mode, told in (("adapter", 1), ("both", 0)):
        result = convert(src, tmp_path / mode, lora=mode)
        assert sum("does not hold the value head (score" in n for n in result.notices) == told


def test_names_that_end_in_each_other():
    from streamconv.lora.settings import _saved, _targets

    modules = {"a", "a.up", "v", "v.a", "v.a.up"}
    assert _targets({"a.up"}, modules) == r"a\.up"
    assert _targets({"v.a.up"}, modules) == ["v.a.up"]
    assert _targets({"a.up", "v.a.up"}, modules) == ["up"]
    assert _saved({"a"}, modules) == ["base_model.model.a"]
    assert _saved({"v"}, modules) == ["v"]
    assert _saved(set(), modules) == []


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_an_adapted_head_that_was_tied_is_merged_from_the_embedding(tmp_path):
    src, base, model = trained(tmp_path, "tied", target_modules=["lm_head", "q_proj"])
    state = torch.load(src / "model_world_size_1_rank_0.pt")
    adapter = {n: t for n, t in state.items() if "lora_" in n}
    torch.save(adapter, src / "model_world_size_1_rank_0.pt")
    assert "lm_head.weight" not in load(base)
    convert(src, tmp_path / "out", base=base)
    found = load(tmp_path / "out")
    assert torch.equal(found["model.embed_tokens.weight"], load(base)["model.embed_tokens.weight"])
    assert not torch.equal(found["model.embed_tokens.weight"], found["lm_head.weight"])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-3, atol=1e-3)
    assert streamconv.verify(tmp_path / "out", source=src).passed


# --- refusals --------------------------------------------------------------------------------


def test_an_unknown_alpha_is_refused_and_not_guessed(checkpoints, tmp_path):
    made = checkpoints["fsdp2-lora"]
    src = copied(made, tmp_path)
    (src / "lora_train_meta.json").unlink()
    for mode in ("merge", "adapter"):
        with pytest.raises(BadInputError, match="not known") as caught:
            convert(src, tmp_path / "out", lora=mode)
        assert "--lora-alpha" in caught.value.hint
    convert(src, tmp_path / "out", lora_alpha=LORA_ALPHA)
    convert(made.source, tmp_path / "expected")
    assert differences(read_model(tmp_path / "out"), read_model(tmp_path / "expected")) == []
    # What verl's own merger writes where it does not know: 0.
    (src / "lora_adapter").mkdir()
    (src / "lora_adapter" / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 0}')
    with pytest.raises(BadInputError, match="not known"):
        convert(src, tmp_path / "other")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ('{"r": 8, "lora_alpha": 10}', "rank is not what"),
        ('{"r": 4, "lora_alpha": -1}', "makes no sense"),
        ('{"r": "4", "lora_alpha": 1}', "makes no sense"),
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 3}}', "makes no sense"),
    ],
)
def test_settings_that_cannot_be(meta, message, checkpoints, tmp_path):
    src = copied(checkpoints["fsdp2-lora"], tmp_path)
    (src / "lora_train_meta.json").write_text(meta)
    with pytest.raises(BadInputError, match=message):
        convert(src, tmp_path / "out")


def test_settings_that_disagree(checkpoints, tmp_path):
    src = copied(checkpoints["fsdp2-lora"], tmp_path)
    (src / "lora_adapter").mkdir()
    (src / "lora_adapter" / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16}')
    with pytest.raises(BadInputError, match="disagree") as caught:
        convert(src, tmp_path / "out")
    assert caught.value.found == (
        "10 in lora_train_meta.json, 16 in lora_adapter/adapter_config.json"
    )
    convert(src, tmp_path / "out", lora_alpha=16)


def test_a_rank_that_a_pattern_says_is_named_as_such(checkpoints, tmp_path):
    src = on_one_rank(checkpoints["fsdp2-lora"], tmp_path / "src", r=4, rank_pattern={"q_proj": 8})
    for options in ({}, {"lora_rank": 4}):
        with pytest.raises(BadInputError, match="rank is not what") as caught:
            convert(src, tmp_path / "out", **options)
        assert "not rank_pattern in adapter_config.json" in caught.value.hint


def test_an_adapter_that_diverged_is_not_merged_and_not_handed_on_in_silence(checkpoints, tmp_path):
    made = checkpoints["fsdp2-lora"]
    name = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.default.weight"

    def diverge(state: dict[str, torch.Tensor]) -> None:
        state[name][3, 2] = torch.nan

    src = on_one_rank(made, tmp_path / "src", diverge)
    with pytest.raises(BadInputError, match="not finite"):
        convert(src, tmp_path / "out", max_shard_size="100kB")
    # The refused run could never go on, so nothing of it is in the way.
    result = convert(src, tmp_path / "out", lora="adapter")
    told = [n for n in result.notices if "training diverged" in n]
    assert len(told) == 1
    assert told[0].startswith(f"1 tensors of the adapter hold NaN or infinities, {name}")
    assert not any(
        "diverged" in n for n in convert(made.source, tmp_path / "b", lora="adapter").notices
    )


def test_changed_settings_make_another_job(checkpoints, tmp_path):
    src = copied(checkpoints["fsdp2-lora"], tmp_path)
    convert(src, tmp_path / "out")
    (src / "lora_train_meta.json").write_text('{"r": 4, "lora_alpha": 20}')
    with pytest.raises(OutputExistsError, match="before its files were rewritten"):
        convert(src, tmp_path / "out")


def test_an_adapter_that_changes_nothing_is_an_error(checkpoints, tmp_path):
    src = copied(checkpoints["fsdp2-lora"], tmp_path)
    for path in src.glob("model_*.pt"):
        state = torch.load(path, weights_only=False)
        for name, value in state.items():
            if "lora_B" in name:
                value._local_tensor.zero_()
        torch.save(state, path)
    with pytest.raises(BadInputError, match="every lora_B is zero"):
        convert(src, tmp_path / "out")
    convert(src, tmp_path / "out", allow_zero_delta=True)
    made = checkpoints["fsdp2-lora"]
    base = read_truth(base_folder(made, tmp_path / "base") / "model.safetensors")
    weights = read_model(tmp_path / "out")
    adapted = [n for n in weights if n.endswith(("q_proj.weight", "up_proj.weight"))]
    for name in adapted:  # −0.0 + 0.0 is 0.0, so values and not bytes
        one, two = (np.frombuffer(t[name].data, np.float32) for t in (weights, base))
        assert np.array_equal(one, two)


def test_what_cannot_be_merged(checkpoints, tmp_path):
    with pytest.raises(BadInputError, match="magnitudes") as caught:
        convert(checkpoints["fsdp2-lora-dora"].source, tmp_path / "out")
    assert "--lora adapter" in caught.value.hint
    with pytest.raises(BadInputError, match="does not hold the weight") as caught:
        convert(checkpoints["fsdp2-lora-only"].source, tmp_path / "out", lora="merge")
    assert "--base" in caught.value.hint
    with pytest.raises(UsageError, match="has no adapter") as caught:
        convert(checkpoints["fsdp2"].source, tmp_path / "out", lora="merge")
    assert "tensors of a model, such as model." in caught.value.found
    assert "leave out --lora" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    # Of several models that are converted alike, one may have an adapter: no error.
    plan = streamconv.plan(checkpoints["fsdp2"].source, lora_alpha=3, allow_zero_delta=True)
    assert [n for n in plan.head.notices if "without effect" in n] == [
        "--lora-alpha is without effect: no adapter in this checkpoint",
        "--allow-zero-delta is without effect: no adapter in this checkpoint",
    ]


def on_one_rank(made: Made, path: Path, change=lambda _state: None, **settings) -> Path:
    """Write the same checkpoint as plain tensors of one rank, changed, and PEFT's settings."""
    shutil.copytree(made.source, path, ignore=shutil.ignore_patterns("*.pt"))
    state = load_file(made.truth_state)
    change(state)
    torch.save(state, path / "model_world_size_1_rank_0.pt")
    config = path / "fsdp_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"world_size": 1}))
    if settings:
        (path / "lora_adapter").mkdir(exist_ok=True)
        (path / "lora_adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return path


def beside_each_b(state: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in [n for n in state if ".lora_B." in n]:
        state[name.replace(old, new)] = torch.ones(state[name].shape[0])


def one_magnitude(state: dict[str, torch.Tensor]) -> None:
    name = next(n for n in state if ".lora_magnitude_vector." in n)
    del state[name]


@pytest.mark.parametrize(
    ("name", "change", "settings", "message"),
    [
        ("fsdp2-lora", None, {"use_dora": True}, "lacks magnitudes"),
        ("fsdp2-lora-dora", one_magnitude, {}, "lacks magnitudes"),
        ("fsdp2-lora", None, {"peft_type": "ADALORA"}, "another kind than LoRA"),
        (
            "fsdp2-lora",
            ("lora_B.default.weight", "lora_E.default"),
            {},
            "of AdaLoRA, which is not LoRA",
        ),
        (
            "fsdp2-lora",
            ("lora_B.default.weight", "token_adapter.trainable_tokens_delta.default"),
            {},
            "of trained tokens, which is not LoRA",
        ),
        ("fsdp2-lora", ("lora_B.default.weight", "lora_B.other.weight"), {}, "2 adapters in one"),
    ],
)
@pytest.mark.parametrize("mode", ["merge", "adapter"])
def test_what_is_more_than_lora_is_never_taken_for_it(
    name, change, settings, message, mode, checkpoints, tmp_path
):
    if isinstance(change, tuple):
        old, new = change
        src = on_one_rank(
            checkpoints[name], tmp_path / "src", lambda s: beside_each_b(s, old, new), **settings
        )
    else:
        src = on_one_rank(
            checkpoints[name], tmp_path / "src", change or (lambda _: None), **settings
        )
    with pytest.raises(BadInputError, match=message):
        convert(src, tmp_path / "out", lora=mode)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("how", "taken"), [("pissa", False), ("olora", False), ("gaussian", True)])
def test_an_adapter_of_altered_base_weights_is_not_merged_into_the_base(
    how, taken, checkpoints, tmp_path
):
    base = base_folder(checkpoints["fsdp2-lora"], tmp_path / "base")
    src = on_one_rank(
        checkpoints["fsdp2-lora-only"], tmp_path / "src", init_lora_weights=how, lora_alpha=10
    )
    if taken:
        convert(src, tmp_path / "out", base=base)
    else:
        with pytest.raises(BadInputError, match="altered base weights"):
            convert(src, tmp_path / "out", base=base)
    # With the weights it was trained on, it may be of any kind.
    whole = on_one_rank(checkpoints["fsdp2-lora"], tmp_path / "whole", init_lora_weights=how)
    convert(whole, tmp_path / "merged")


def test_trained_biases_are_not_lost_beside_an_adapter(checkpoints, tmp_path):
    src = on_one_rank(checkpoints["fsdp2-lora"], tmp_path / "src", bias="all")
    convert(src, tmp_path / "out")
    for mode in ("adapter", "both"):
        with pytest.raises(BadInputError, match="biases were trained"):
            convert(src, tmp_path / mode, lora=mode)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
def test_peft_loads_the_biases_of_an_adapter(checkpoints, tmp_path):
    made = checkpoints["fsdp2-lora"]
    src = on_one_rank(made, tmp_path / "src", lambda s: beside_each_b(s, ".weight", ".bias"))
    convert(src, tmp_path / "out", lora="adapter")
    base = base_folder(made, tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    biases = [t for n, t in adapted.named_parameters() if n.endswith("lora_B.default.bias")]
    assert len(biases) == 8
    assert all(bool((t == 1).all()) for t in biases)


def test_a_square_weight_of_an_unknown_model_that_transposes_is_refused(checkpoints, tmp_path):
    made = checkpoints["fsdp2-lora-conv1d"]
    src = copied(made, tmp_path)
    shutil.rmtree(src / "huggingface")
    with pytest.raises(BadInputError, match="does not show") as caught:
        convert(src, tmp_path / "out")
    assert "--hf-config" in caught.value.hint
    (src / "lora_adapter").mkdir()
    (src / "lora_adapter" / "adapter_config.json").write_text('{"fan_in_fan_out": true}')
    convert(src, tmp_path / "out")
    found, truth = load(tmp_path / "out"), load(made.truth_hf)
    for name, expected in truth.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.memory
@pytest.mark.parametrize("options", [[], ["--io-threads", "4"]])
def test_merging_keeps_to_the_budget(options, tmp_path):
    made = make_large(tmp_path / "made", 500_000_000, 4, lora_rank=16, dtype=torch.bfloat16)
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    assert run("plan", made.source, "-o", plan).code == 0
    refused = run("run", plan, out, "--max-mem", "20MB", *options)
    assert refused.code == 4
    smallest = named_smallest(refused.err)
    done = run("run", plan, out, "--max-mem", smallest, "--no-sync", *options)
    assert done.code == 0, done.err
    assert done.peak_bytes <= int(smallest.removesuffix("MB")) * 10**6
    assert run("run", plan, tmp_path / "more", "--max-mem", "512MB", "--no-sync").code == 0
    assert contents(out) == contents(tmp_path / "more")
