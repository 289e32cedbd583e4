"""``verify --forward``: transformers loads the output and runs it, in budget, and no code of it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from scripts.makers.fsdp import Made
from scripts.measured import run
from streamconv.errors import BadInputError, BudgetError, StreamconvError, UsageError
from streamconv.formats.safetensors_file import read_header
from streamconv.formats.tensor_bytes import is_finite
from streamconv.verification import forward, forward_child
from streamconv.verification.forward import verify_forward
from tests.hf_models import GEMMA3_VL, MODELS, QWEN3_VL_MOE, make
from tests.test_budget import named_smallest


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "ask", lambda module, request, doing: forward_child._run(request))
    # This process holds more than the child would.
    monkeypatch.setattr(forward.memory.PeakMeter, "peak_bytes", 0)


@pytest.fixture
def model(checkpoints: dict[str, Made], tmp_path: Path) -> Path:
    """A model folder to spoil."""
    truth = checkpoints["fsdp2"].truth_hf
    assert truth is not None
    return Path(shutil.copytree(truth, tmp_path / "model"))


def change(folder: Path, what: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    what(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("fsdp2", "Qwen2ForCausalLM"),
        ("fsdp2-tied", "Qwen2ForCausalLM"),
        ("fsdp2-moe", "Qwen3MoeForCausalLM"),
        ("fsdp2-critic", "Qwen2ForTokenClassification"),
        ("fsdp2-gemma3", "Gemma3ForCausalLM"),
    ],
)
def test_an_output_gives_the_logits_of_the_trained_model(
    name: str, architecture: str, checkpoints: dict[str, Made], tmp_path: Path
) -> None:
    made = checkpoints[name]
    out = tmp_path / "out"
    streamconv.convert(made.source, out, sync=False)
    report = streamconv.verify(out, forward=True, reference=made.truth_hf)
    assert report.problems == []
    found = report.forward
    assert found is not None
    assert found["architecture"] == architecture
    assert found["finite"]
    assert found["reference"]["max_abs"] <= found["reference"]["tolerance"]
    if "critic" not in name:
        assert len(found["top"]) == 5
        assert found["reference"]["top1"] == 1.0
        assert found["reference"]["kl"] == pytest.approx(0, abs=1e-9)
        # The prompt went through the tokenizer of the folder.
        assert isinstance(found["top"][0]["token"], str)
        assert len(found["token_ids"]) > 8


@pytest.mark.parametrize(
    "spec",
    [MODELS["qwen3_vl"], MODELS["qwen2_5_vl"], GEMMA3_VL, QWEN3_VL_MOE],
    ids=lambda spec: spec[0],
)
def test_models_that_also_see_are_run_on_text_alone(spec: Any, tmp_path: Path) -> None:
    make(spec).save_pretrained(tmp_path / "model")
    report = verify_forward(tmp_path / "model", token_ids=[3, 1, 4])
    assert report.problems == []
    assert report.forward is not None
    assert report.forward["architecture"] == spec[0]
    assert report.forward["unexpected"] == []


def test_other_dtypes_may_differ_a_little_and_not_at_all_where_that_is_asked(
    checkpoints: dict[str, Made], tmp_path: Path
) -> None:
    made = checkpoints["fsdp2"]
    out = tmp_path / "out"
    streamconv.convert(made.source, out, sync=False, dtype="float16")
    assert made.truth_hf is not None
    report = verify_forward(out, reference=made.truth_hf, token_ids=[3, 1, 4, 1, 5])
    assert report.problems == []
    assert report.forward is not None
    assert report.forward["reference"]["max_abs"] > 0
    strict = verify_forward(out, reference=made.truth_hf, token_ids=[3, 1, 4], logits_atol=0.0)
    assert len(strict.problems) == 1
    assert strict.problems[0].startswith("the logits differ by")


def test_weights_of_another_type_than_the_config_says_may_differ_a_little(
    model: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    change(other, lambda t: t.update({n: x.bfloat16() for n, x in t.items()}))
    report = verify_forward(model, reference=other, token_ids=[3, 1, 4])
    assert report.forward is not None
    found = report.forward["reference"]
    assert found["tolerance"] == pytest.approx(0.05 * found["largest_logit"])


def test_wrong_weights_of_the_right_shape_give_other_logits(model: Path, tmp_path: Path) -> None:
    good = Path(shutil.copytree(model, tmp_path / "good"))
    name = "model.layers.0.self_attn.q_proj.weight"
    change(model, lambda t: t.update({name: t[name].flip(0).contiguous()}))
    assert not verify_forward(model, reference=good).passed
    assert verify_forward(good, reference=good).passed


def test_weights_that_would_be_random_fail_and_superfluous_ones_are_told(model: Path) -> None:
    change(model, lambda t: t.pop("lm_head.weight"))
    change(model, lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    change(model, lambda t: t.update({"model.left_over": torch.ones(3)}))
    report = streamconv.verify(model, forward=True, token_ids=[1, 2])
    problems = "\n".join(report.problems)
    assert "lm_head.weight: not in the files" in problems
    assert "model.norm.weight [3] for [56]: of another shape" in problems
    assert any("does not use 1 tensors, such as model.left_over" in c for c in report.checked)


def test_logits_that_are_no_numbers_fail(model: Path) -> None:
    change(model, lambda t: t["model.norm.weight"].fill_(torch.nan))
    report = verify_forward(model, token_ids=[1, 2])
    assert report.problems == [
        "model.norm.weight: holds NaN or infinity",
        "the logits hold NaN or infinity",
    ]


def test_weights_that_are_no_numbers_fail_where_these_tokens_do_not_meet_them(model: Path) -> None:
    change(model, lambda t: t["model.embed_tokens.weight"][77, 3].fill_(torch.inf))
    change(model, lambda t: t.update({"left_over": torch.full((3,), torch.nan)}))
    report = verify_forward(model, token_ids=[1, 2])
    assert report.problems == ["model.embed_tokens.weight: holds NaN or infinity"]
    assert report.forward is not None
    assert report.forward["finite"]


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e8m0fnu),
    ],
    ids=str,
)
def test_what_is_not_finite_is_found_in_every_type(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    largest = torch.finfo(dtype).max
    fine = torch.tensor([1.0, 0.5, largest, 0.25], dtype=torch.float64).repeat(5).to(dtype)
    bad = {"nan": torch.tensor([1.0] * 7 + [torch.nan]).to(dtype)}
    if dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2):
        bad["inf"] = torch.tensor([-torch.inf] + [1.0] * 9).to(dtype)
    save_file({"fine": fine, "count": torch.full((9,), -1), **bad}, path)
    tensors = read_header(path).values()
    found = [t.name for t in tensors if not is_finite(t.dtype, t.pieces())]
    assert sorted(found) == sorted(bad)


def test_a_reference_of_infinite_logits_agrees_with_nothing(model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    change(other, lambda t: t["lm_head.weight"][7].fill_(torch.inf))
    report = verify_forward(model, reference=other, token_ids=[1, 2])
    assert "the logits of the reference hold NaN or infinity" in report.problems
    logits = np.zeros((1, 4), np.float32)
    infinite = np.array([[np.inf, 0, 0, 0]], np.float32)
    with np.errstate(invalid="ignore"):
        found = forward._compare(logits, infinite, same_dtype=True, atol=None)
    assert not found["passed"]


def test_a_classifier_of_other_tokens_is_not_compared(
    checkpoints: dict[str, Made], model: Path
) -> None:
    critic = checkpoints["fsdp2-critic"].truth_hf
    assert critic is not None
    report = verify_forward(model, reference=critic, token_ids=[1, 2])
    assert "the logits have the shape [2, 509]" in report.problems[0]


def test_no_code_of_the_folder_is_run(model: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\n"
    for name in ("evil", "modeling_evil", "tokenization_evil", "generate"):
        (model / f"{name}.py").write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "modeling_evil.Model",
        "AutoTokenizer": ["tokenization_evil.Tokenizer", None],
    }
    config["_attn_implementation"] = "evil/kernel"
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": config["auto_map"]}))
    (model / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "elsewhere"), "peft_type": "LORA"})
    )
    (model / "generation_config.json").write_text("{broken")
    assert verify_forward(model).passed
    assert not ran.exists()


def test_custom_architectures_are_not_run(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["EvilForCausalLM"], "auto_map": {"AutoModel": "evil.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="transformers has no class for this model"):
        verify_forward(model)


def test_prompts_and_ids_that_make_no_sense(model: Path) -> None:
    with pytest.raises(UsageError, match="these tokens cannot be run") as caught:
        verify_forward(model, token_ids=[1, 509])
    assert caught.value.expected == "1 to 4096 token ids from 0 to 508"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink(missing_ok=True)
    with pytest.raises(UsageError, match="a prompt needs a tokenizer"):
        verify_forward(model, prompt="hello")
    found = verify_forward(model).forward
    assert found is not None
    assert found["token_ids"] == [1, 8, 15, 22, 29, 36, 43, 50]
    with pytest.raises(UsageError, match="need --forward"):
        streamconv.verify(model, prompt="hello")


def test_a_tokenizer_of_more_tokens_than_the_model_has(
    checkpoints: dict[str, Made], model: Path
) -> None:
    from tokenizers import Tokenizer

    path = str(model / "tokenizer.json")
    source = checkpoints["fsdp2"].source
    tokenizer = Tokenizer.from_file(str(source / "huggingface" / "tokenizer.json"))
    tokenizer.add_tokens([f"<more-{k}>" for k in range(600)])
    tokenizer.save(path)
    report = verify_forward(model, prompt="hello")
    assert report.problems == []
    assert any("the model has 509 embeddings" in c for c in report.checked)
    with pytest.raises(
        BadInputError, match="tokens that the model has no embeddings for"
    ) as caught:
        verify_forward(model, prompt="hello <more-599>")
    assert "'<more-599>'" in (caught.value.found or "")


def test_options_that_would_be_left_unheeded_are_refused(model: Path) -> None:
    for options in (
        {"atol": 0.1},
        {"rtol": 0.1, "forward": True, "reference": model},
        {"logits_atol": 0.1, "forward": True},
        {"hf_config": model},
    ):
        with pytest.raises(UsageError, match="need"):
            streamconv.verify(model, **options)
    for value in (float("nan"), float("inf"), -1.0):
        for option in ("atol", "rtol", "logits_atol"):
            options = {option: value, "reference": model, "forward": option == "logits_atol"}
            with pytest.raises(UsageError, match="a number from 0 on"):
                streamconv.verify(model, **options)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(BadInputError, match="no safetensors files"):
        verify_forward(tmp_path)
    with pytest.raises(BadInputError, match="no such model folder"):
        verify_forward(tmp_path / "nowhere")


def test_an_adapter_alone_is_no_model_to_run(checkpoints: dict[str, Made], tmp_path: Path) -> None:
    streamconv.convert(
        checkpoints["fsdp2-lora"].source, tmp_path / "out", lora="adapter", sync=False
    )
    with pytest.raises(UsageError, match="needs its base model") as caught:
        verify_forward(tmp_path / "out")
    assert "--base" in caught.value.hint


class Sizes:
    def __init__(self, **sizes: int) -> None:
        self.__dict__ |= {"whole": 0, "converted": 0, "step": 0, "activations": 0} | sizes


def test_what_fits_is_loaded_and_what_does_not_stays_on_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward_child, "resident_bytes", lambda *_: 200)
    sizes: Any = Sizes(whole=1000, step=100, activations=50)
    assert forward_child._must_offload(sizes, 1550) is False
    assert forward_child._must_offload(sizes, 1549) is True
    assert forward_child._must_offload(sizes, 600) is True
    with pytest.raises(BudgetError, match="even a module at a time"):
        forward_child._must_offload(sizes, 599)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StreamconvError, match="needs accelerate") as caught:
        forward_child._must_offload(sizes, 600)
    assert "pip install" in (caught.value.hint or "")


def test_logits_are_compared_by_their_distributions() -> None:
    ours = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], np.float32)
    theirs = ours + np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 2.5]], np.float32)
    found = forward._compare(ours, theirs, same_dtype=True, atol=None)
    assert found["max_abs"] == pytest.approx(2.5)
    assert found["top1"] == 0.5
    p = np.exp(theirs[1]) / np.exp(theirs[1]).sum()
    q = np.exp(ours[1]) / np.exp(ours[1]).sum()
    assert found["kl"] == pytest.approx(float((p * np.log(p / q)).sum()) / 2, rel=1e-5)
    assert not found["passed"]
    same = forward._compare(ours, ours, same_dtype=True, atol=None)
    assert (same["max_abs"], same["kl"], same["top1"], same["passed"]) == (0, 0, 1, True)
    nan = forward._compare(ours * np.nan, ours, same_dtype=True, atol=None)
    assert not nan["passed"]
    one = forward._compare(ours[:, :1], ours[:, :1], same_dtype=False, atol=0.0)
    assert (one["kl"], one["top1"], one["passed"]) == (None, None, True)


# --- seen from outside --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.memory
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_model_larger_than_the_budget_runs_within_it(kind: str, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common: dict[str, Any] = {"vocab_size": 8000, "num_attention_heads": 8, "head_dim": 64}
    common |= {"num_key_value_heads": 2, "hidden_size": 512, "tie_word_embeddings": False}
    if kind == "dense":
        config: Any = Qwen2Config(**common, intermediate_size=2048, num_hidden_layers=48)
        made: Any = Qwen2ForCausalLM(config)
    else:
        config = Qwen3MoeConfig(
            **common,
            intermediate_size=512,
            moe_intermediate_size=512,
            num_hidden_layers=18,
            num_experts=16,
            num_experts_per_tok=2,
        )
        made = Qwen3MoeForCausalLM(config)
    made.save_pretrained(tmp_path / "model", max_shard_size="100MB")
    weights = sum(p.numel() * 4 for p in made.parameters())
    del made
    refused = run("verify", tmp_path / "model", "--forward", "--max-mem", "490MB")
    if refused.code == 4:
        smallest = named_smallest(refused.err)
    else:
        assert refused.code == 0, refused.err
        smallest = "490MB"
    limit = int(smallest.removesuffix("MB")) * 10**6
    assert weights > limit - 60 * 10**6
    done = run("verify", tmp_path / "model", "--forward", "--max-mem", smallest, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)["forward"]
    assert told["offloaded"]
    assert told["finite"]
    assert done.peak_bytes <= limit


def test_a_budget_for_nothing_names_one_to_try(model: Path) -> None:
    refused = run("verify", model, "--forward", "--max-mem", "100MB")
    assert refused.code == 4
    assert "too small to run a model" in refused.err
    done = run("verify", model, "--forward", "--max-mem", named_smallest(refused.err))
    assert done.code == 0, done.err
    assert "after the last token" in done.out
