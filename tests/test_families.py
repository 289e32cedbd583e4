"""Every family turns Megatron's tensors into the very tensors that transformers saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from streamconv.errors import BadInputError, UsageError
from streamconv.families import families
from streamconv.families.convert import Converted, convert
from streamconv.options import JobOptions
from tests.hf_models import HEAD, LATENT, MODELS, ROUTED, TINY, make
from tests.makers.megatron import State, canonical
from tests.replay import array, dtype_of, replay

Spec = tuple[str, str, dict[str, Any]]

SPECS: dict[str, Spec] = {
    name: MODELS[name]
    for name in (
        "llama",
        "qwen2",
        "tied",
        "qwen3",
        "qwen2_moe",
        "qwen3_moe",
        "mixtral",
        "olmoe",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
        "minimax_m2",
        "ernie4_5_moe",
    )
} | {
    "mistral": ("MistralForCausalLM", "MistralConfig", TINY | {"head_dim": 12}),
    "ernie4_5": ("Ernie4_5ForCausalLM", "Ernie4_5Config", TINY | HEAD),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", TINY | HEAD | {"attention_bias": True}),
    "glm4_moe_norms": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        TINY | ROUTED | HEAD | {"use_qk_norm": True, "attention_bias": True},
    ),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", TINY | HEAD),
    "no_q_lora": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        TINY | ROUTED | LATENT | {"q_lora_rank": None},
    ),
}


class Model:
    """A HuggingFace model's config and, under its names on the Hub, random tensors."""

    def __init__(self, config: dict[str, Any], tensors: State) -> None:
        self.config = config
        self.tensors = tensors

    @property
    def megatron(self) -> State:
        """The same weights as Megatron holds them."""
        heads = self.config["num_attention_heads"]
        groups = self.config.get("num_key_value_heads") or heads
        head_dim = self.config.get("head_dim") or self.config["hidden_size"] // heads
        return canonical(self.tensors, heads=heads, groups=groups, head_dim=head_dim)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            make(SPECS[name]).save_pretrained(folder)
            made[name] = _read(folder)
        return made[name]

    return get


def _read(folder: Path) -> Model:
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    with safe_open(folder / "model.safetensors", "pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            shape = stored.get_slice(name).get_shape()
            dtype = torch.float32 if "correction_bias" in name else torch.bfloat16
            tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    return Model(json.loads((folder / "config.json").read_text()), tensors)


def converted(
    megatron: State, config: Mapping[str, Any], facts: Mapping[str, Any] | None = None
) -> Converted:
    headers = {n: (tuple(t.shape), dtype_of(t)) for n, t in megatron.items()}
    return convert(headers, config, facts or {}, JobOptions())


def check(made: Converted, megatron: State, expected: State) -> None:
    assert {r.name for r in made.recipes} == set(expected)
    sources = {n: array(t) for n, t in megatron.items()}
    for recipe in made.recipes:
        found, truth = replay(recipe, sources), array(expected[recipe.name])
        assert (found.shape, found.dtype) == (truth.shape, truth.dtype), recipe.name
        assert found.tobytes() == truth.tobytes(), recipe.name


@pytest.mark.parametrize("name", SPECS)
def test_round_trip(name: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(name)
    made = converted(model.megatron, model.config)
    assert made.model is not None
    assert set(made.model.hub_shapes) - made.model.optional <= {r.name for r in made.recipes}
    check(made, model.megatron, model.tensors)


def test_rows_that_fill_up_the_vocabulary_are_left_out(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    megatron = model.megatron
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        filler = torch.full((8, megatron[name].shape[1]), 7, dtype=torch.bfloat16)
        megatron[name] = torch.cat((megatron[name], filler))
    check(converted(megatron, model.config), megatron, model.tensors)


def _with_mtp(
    model: Model, inner: Mapping[str, str], prefix: str, layer: int
) -> tuple[State, State]:
    """Return Megatron's and HuggingFace's tensors with one layer for multi-token prediction.

    Its inner layer is a copy of layer ``layer``; ``inner`` names the four tensors around it.
    """
    megatron, expected = model.megatron, dict(model.tensors)
    hidden = model.config["hidden_size"]
    for k, (name, hf) in enumerate(inner.items()):
        shape = (hidden, 2 * hidden) if name == "eh_proj" else (hidden,)
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(torch.bfloat16)
        megatron[f"mtp.layers.0.{name}.weight"] = tensor
        expected[f"{prefix}{hf}.weight"] = tensor
    for name, tensor in model.megatron.items():
        if name.startswith(f"decoder.layers.{layer}."):
            rest = name.removeprefix(f"decoder.layers.{layer}.")
            megatron[f"mtp.layers.0.transformer_layer.{rest}"] = tensor
    for name, tensor in model.tensors.items():
        if name.startswith(f"model.layers.{layer}."):
            expected[prefix + name.removeprefix(f"model.layers.{layer}.")] = tensor
    return megatron, expected


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_multi_token_prediction(name: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(name)
    inner = {
        "enorm": "enorm",
        "hnorm": "hnorm",
        "eh_proj": "eh_proj",
        "final_layernorm": "shared_head.norm",
    }
    megatron, expected = _with_mtp(model, inner, "model.layers.2.", 1)
    expected["model.layers.2.embed_tokens.weight"] = expected["model.embed_tokens.weight"]
    expected["model.layers.2.shared_head.head.weight"] = expected["lm_head.weight"]
    check(converted(megatron, model.config), megatron, expected)


def test_mimo(model_of: Callable[[str], Model]) -> None:
    model = model_of("qwen2")
    config = model.config | {
        "model_type": "mimo",
        "architectures": ["MiMoForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"},
    }
    inner = {
        "enorm": "token_layernorm",
        "hnorm": "hidden_layernorm",
        "eh_proj": "input_proj",
        "final_layernorm": "final_layernorm",
    }
    prefix = "model.mtp_layers.0."
    megatron, expected = _with_mtp(model, inner, prefix, 0)
    first, second = expected[f"{prefix}input_proj.weight"].chunk(2, dim=1)
    expected[f"{prefix}input_proj.weight"] = torch.cat((second, first), dim=1)
    made = converted(megatron, config)
    check(made, megatron, expected)
    assert made.architecture is None  # the stand-in's class must not get into config.json


def test_kimi_k2_is_deepseek(model_of: Callable[[str], Model]) -> None:
    model = model_of("deepseek_v3")
    config = model.config | {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "x.Y"}}
    made = converted(model.megatron, config)
    assert made.model is not None
    check(made, model.megatron, model.tensors)


def test_norms_that_are_modules_of_their_own(model_of: Callable[[str], Model]) -> None:
    """Megatron-Core's local layers, which per-rank checkpoints may have."""
    model = model_of("llama")
    swaps = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    megatron = {}
    for name, tensor in model.megatron.items():
        for old, new in swaps.items():
            name = name.replace(old, new)
        megatron[name] = tensor
    check(converted(megatron, model.config), megatron, model.tensors)


def test_a_value_model_becomes_a_classifier(model_of: Callable[[str], Model]) -> None:
    model = model_of("qwen3")
    megatron, expected = model.megatron, dict(model.tensors)
    head = torch.randn((1, 32)).to(torch.bfloat16)
    megatron["output_layer.weight"] = expected["score.weight"] = head
    del expected["lm_head.weight"]
    made = converted(megatron, model.config)
    check(made, megatron, expected)
    assert made.architecture == "Qwen3ForSequenceClassification"
    assert made.config["num_labels"] == 1


def test_quantization_of_the_release_is_not_that_of_the_run(
    model_of: Callable[[str], Model],
) -> None:
    model = model_of("llama")
    made = converted(model.megatron, model.config | {"quantization_config": {"fmt": "e4m3"}})
    assert "quantization_config" not in made.config
    assert any("quantization_config" in c for c in made.changes)


# --- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected", "found"),
    [
        ({"num_attention_heads": 2}, "128", "64"),
        ({"num_hidden_layers": 3}, "3", "2"),
        ({"num_hidden_layers": 1}, "1", "2"),
        ({"vocab_size": 65}, "65", "64"),
    ],
)
def test_a_contradiction_shows_both_numbers(
    change: dict[str, Any], expected: str, found: str, model_of: Callable[[str], Model]
) -> None:
    model = model_of("llama")
    if "num_attention_heads" in change:
        change = change | {"head_dim": 32, "num_key_value_heads": 1}
    with pytest.raises(BadInputError, match="contradict each other") as caught:
        converted(model.megatron, model.config | change)
    assert expected in str(caught.value.expected)
    assert found in str(caught.value.found)


def test_a_missing_expert_is_an_error(model_of: Callable[[str], Model]) -> None:
    model = model_of("qwen3_moe")
    megatron = model.megatron
    for fc in ("linear_fc1", "linear_fc2"):
        name = f"decoder.layers.1.mlp.experts.experts.{fc}.weight"
        megatron[name] = megatron[name][:3]
    with pytest.raises(BadInputError, match="number of experts") as caught:
        converted(megatron, model.config)
    assert "decoder.layers.1" in str(caught.value.where)


def test_a_missing_stage_is_named(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    megatron = {n: t for n, t in model.megatron.items() if not n.startswith("decoder.layers.0.")}
    with pytest.raises(BadInputError, match="1 of 2 layers are not in the checkpoint"):
        converted(megatron, model.config)


def test_an_unknown_tensor_is_named_with_the_way_out(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    megatron = model.megatron
    for k in range(2):
        megatron[f"decoder.layers.{k}.mlp.router.weight"] = torch.zeros(4, 32)
    with pytest.raises(BadInputError, match="family llama knows no rule for 2 tensors") as caught:
        converted(megatron, model.config)
    assert "decoder.layers.{n}.mlp.router.weight (2 tensors)" in str(caught.value.where)
    assert "CONTRIBUTING" in str(caught.value.hint)


def test_an_unknown_model_type(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    with pytest.raises(BadInputError, match="no family is known"):
        converted(model.megatron, model.config | {"model_type": "klingon"})


def test_two_tensors_of_one_name(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    megatron = model.megatron
    megatron["decoder.layers.0.input_layernorm.weight"] = torch.zeros(32)
    with pytest.raises(BadInputError, match="would both be written as") as caught:
        converted(megatron, model.config)
    assert "decoder.layers.0.input_layernorm.weight" in str(caught.value.found)


def test_memory_layout_is_refused(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    with pytest.raises(UsageError, match="--layout memory"):
        convert({}, model.config, {}, JobOptions(layout="memory"))


def test_names_and_model_types_are_unique() -> None:
    known = list(families())
    names = [f.name for f in known]
    types = [t for f in known for t in f.model_types]
    assert len(set(names)) == len(names)
    assert len(set(types)) == len(types)
