"""Adapters on the modules of trainers with models of their own: torchtune's, torchtitan's, litgpt's.

What must come out is what the trainer's own model is once it has added the product of the factors to
its weights, converted as any model of its is. The factors are small whole numbers: sums are exact.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import streamconv
from scripts.makers.dcp import save_alone
from scripts.makers.native_inverse import TRAINERS, make
from scripts.makers.tiny_families import State, TinyModel
from scripts.outputs import differences, read_model
from streamconv.errors import BadInputError

pytestmark = [
    pytest.mark.usefixtures("planned_here"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's own
]

RANK = 4
CASES = {
    ("torchtune", "llama"): ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.w2", "output"),
    ("torchtune", "qwen2"): ("attn.q_proj", "attn.output_proj", "mlp.w1", "mlp.w3"),
    ("torchtitan", "llama"): (
        "attention.qkv_linear.wq",
        "attention.qkv_linear.wk",
        "attention.wo",
        "feed_forward.w2",
    ),
    ("torchtitan", "qwen3_moe"): ("attention.qkv_linear.wq", "moe.router.gate"),
}


def whole_numbers(*shape: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def taken_apart(trainer: str, name: str) -> tuple[TinyModel, State]:
    """Return a model whose weights are sixteenths, and it under the trainer's names."""
    model = make(name)
    for key, tensor in model.state.items():
        model.state[key] = (tensor.float() * 64).round() / 16
    return model, TRAINERS[trainer].names(model)


def factors(tensors: State, modules: tuple[str, ...]) -> State:
    """Return what the trainer saves of an adapter on these modules."""
    found: State = {}
    for key, tensor in tensors.items():
        module = key.removesuffix(".weight")
        if module.endswith(modules) and tensor.ndim == 2:
            found[f"{module}.lora_a.weight"] = whole_numbers(RANK, tensor.shape[1])
            found[f"{module}.lora_b.weight"] = whole_numbers(tensor.shape[0], RANK)
    return found


def added(tensors: State, adapter: State, scale: float) -> State:
    """Return the weights as the trainer computes with them."""
    result = dict(tensors)
    for key in adapter:
        if key.endswith(".lora_a.weight"):
            module = key.removesuffix(".lora_a.weight")
            product = adapter[f"{module}.lora_b.weight"] @ adapter[key]
            result[f"{module}.weight"] = tensors[f"{module}.weight"] + scale * product
    return result


def saved(folder: Path, model: TinyModel, tensors: State) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config))
    return save_alone(folder / "step-10", tensors)


def converted(src: Path, dst: Path, **options: object) -> State:
    streamconv.convert(src, dst, sync=False, **options)
    return read_model(dst)


@pytest.mark.parametrize(("trainer", "name"), CASES)
def test_a_merge_is_the_trainers_own_model(trainer: str, name: str, tmp_path: Path) -> None:
    model, tensors = taken_apart(trainer, name)
    adapter = factors(tensors, CASES[trainer, name])
    assert adapter
    truth = converted(saved(tmp_path / "whole", model, added(tensors, adapter, 2)), tmp_path / "t")
    step = saved(tmp_path / "run", model, tensors | adapter)
    made = converted(step, tmp_path / "out", lora_alpha=2 * RANK)
    assert not differences(made, truth)


@pytest.mark.parametrize("trainer", ["torchtune", "torchtitan"])
def test_an_adapter_alone_is_peft_s(trainer: str, tmp_path: Path) -> None:
    """Written for PEFT, which merges it to the truth, and merged into the base model's folder."""
    model, tensors = taken_apart(trainer, "llama")
    adapter = factors(tensors, CASES[trainer, "llama"])
    truth = converted(saved(tmp_path / "whole", model, added(tensors, adapter, 2)), tmp_path / "t")
    base = tmp_path / "base"
    converted(saved(tmp_path / "plain", model, tensors), base)
    run = tmp_path / "run"
    run.mkdir()
    torch.save(adapter, run / "adapter_0.pt")
    (tmp_path / "torchtune_config.yaml").write_text(
        f"lora_alpha: 1\nmodel:\n  lora_rank: {RANK}\n  lora_alpha: {2 * RANK}\n"
    )
    made = converted(run / "adapter_0.pt", tmp_path / "out", base=base)
    assert not differences(made, truth)
    converted(run / "adapter_0.pt", tmp_path / "peft", hf_config=base, lora="adapter")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(loaded, tmp_path / "peft").merge_and_unload()
    expected = {
        n: t for f in (tmp_path / "t").glob("*.safetensors") for n, t in load_file(f).items()
    }
    state = merged.state_dict()
    assert [n for n, t in expected.items() if not torch.equal(state[n], t)] == []


def litgpts(tensors: State, kinds: str, heads: dict[str, int]) -> tuple[State, State]:
    """Return litgpt's factors of ``attn.qkv`` and ``attn.proj``, and the weights with them added."""
    adapter: State = {}
    result = dict(tensors)
    for key, tensor in tensors.items():
        module = key.removesuffix(".weight")
        if key.endswith(".attn.qkv.weight"):
            parts = dict(zip("qkv", tensor.split([heads[k] for k in "qkv"]), strict=True))
            pairs = {
                k: (whole_numbers(RANK, tensor.shape[1]) + i, whole_numbers(heads[k], RANK))
                for i, k in enumerate(kinds)
            }
            adapter[f"{module}.lora_A"] = torch.cat([a for a, _ in pairs.values()])
            adapter[f"{module}.lora_B"] = torch.cat([b for _, b in pairs.values()])
            sums = [
                p + 2 * (pairs[k][1] @ pairs[k][0]) if k in pairs else p for k, p in parts.items()
            ]
            result[key] = torch.cat(sums)
        elif key.endswith(".attn.proj.weight"):
            a, b = whole_numbers(RANK, tensor.shape[1]), whole_numbers(tensor.shape[0], RANK)
            adapter |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
            result[key] = tensor + 2 * (b @ a)
    return adapter, result


def litgpt_run(tmp_path: Path, kinds: str, *, told: bool = True) -> tuple[Path, Path, State]:
    """Return litgpt's folder of an adapter, the base model's, and the truth."""
    model, tensors = taken_apart("litgpt", "llama")
    config = model.config
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    groups = config["num_key_value_heads"] * width
    heads = {"q": config["num_attention_heads"] * width, "k": groups, "v": groups}
    adapter, whole = litgpts(tensors, kinds, heads)
    truth = converted(saved(tmp_path / "whole", model, whole), tmp_path / "t")
    base = tmp_path / "base"
    converted(saved(tmp_path / "plain", model, tensors), base)
    run = tmp_path / "final"
    run.mkdir()
    torch.save({"model": adapter}, run / "lit_model.pth.lora")
    switches = {"query": "q", "key": "k", "value": "v"}
    lines = [f"lora_{n}: {str(k in kinds).lower()}\n" for n, k in switches.items() if told]
    text = f"lora_r: {RANK}\nlora_alpha: {2 * RANK}\n" + "".join(lines)
    (run / "hyperparameters.yaml").write_text(text)
    return run, base, truth


@pytest.mark.parametrize("kinds", ["qkv", "qv", "k"])
def test_litgpts_pairs_of_queries_keys_and_values(kinds: str, tmp_path: Path) -> None:
    run, base, truth = litgpt_run(tmp_path, kinds)
    assert not differences(converted(run, tmp_path / "out", base=base), truth)


def test_which_of_litgpts_pairs_are_there_is_not_guessed(tmp_path: Path) -> None:
    """Keys and values are of one size: two pairs may be queries' and either's."""
    run, base, _ = litgpt_run(tmp_path, "qv", told=False)
    with pytest.raises(BadInputError, match="which of queries, keys and values") as refused:
        converted(run, tmp_path / "out", base=base)
    assert "hyperparameters.yaml" in str(refused.value.expected)


def test_dora_of_torchtune_is_refused_by_its_name(tmp_path: Path) -> None:
    model, tensors = taken_apart("torchtune", "llama")
    adapter = factors(tensors, ("attn.q_proj",))
    sizes = {
        k.replace("lora_b.weight", "magnitude"): torch.ones(len(t)) for k, t in adapter.items()
    }
    sizes = {k: t for k, t in sizes.items() if k.endswith("magnitude")}
    step = saved(tmp_path / "run", model, tensors | adapter | sizes)
    with pytest.raises(BadInputError, match="DoRA") as refused:
        converted(step, tmp_path / "out", lora_alpha=8)
    assert str(refused.value.where).endswith(".magnitude")
    assert "merge" in str(refused.value.hint)


def test_an_adapter_of_what_becomes_one_module_with_others_is_refused(tmp_path: Path) -> None:
    model, tensors = taken_apart("torchtune", "phi3")
    for modules in (("attn.q_proj",), ("attn.q_proj", "attn.k_proj", "attn.v_proj")):
        step = saved(tmp_path / str(len(modules)), model, tensors | factors(tensors, modules))
        with pytest.raises(BadInputError, match="is not rows of HuggingFace's"):
            converted(step, tmp_path / "out", lora_alpha=8)


def test_weights_beside_an_adapter_that_are_no_model_are_refused(tmp_path: Path) -> None:
    model, tensors = taken_apart("torchtune", "llama")
    adapter = factors(tensors, ("attn.q_proj",))
    norm = {"layers.0.sa_norm.scale": tensors["layers.0.sa_norm.scale"]}
    step = saved(tmp_path / "run", model, adapter | norm)
    with pytest.raises(BadInputError, match="beside the adapter, and no whole model"):
        converted(step, tmp_path / "out", lora="adapter", lora_alpha=8)
