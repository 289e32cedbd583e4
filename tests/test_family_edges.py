"""Single traits of families and of their conversion, and what is said when something does not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from scripts.makers.tiny_families import State, TinyModel
from streamconv.errors import BadInputError, UsageError
from streamconv.families import families
from streamconv.families.convert import convert
from streamconv.formats.megatron.facts import OF_MODEL
from streamconv.options import JobOptions
from tests.family_cases import Case, plan, taken_apart
from tests.replay import array, replay


def tiny(name: str, **changes: Any) -> tuple[TinyModel, State]:
    """Return a tiny model, with another config, and its Megatron tensors; both may be changed."""
    model, walk = taken_apart(Case(name))
    changed = TinyModel(name, model.config | changes, dict(model.state), model.tiny)
    return changed, dict(walk.made)


def value(model: TinyModel, tensors: State, name: str, **facts: Any) -> bytes:
    recipe = next(r for r in plan(model, tensors, facts).recipes if r.name == name)
    return replay(recipe, {k: array(t) for k, t in tensors.items()}).tobytes()


def bits(tensor: torch.Tensor) -> bytes:
    return array(tensor).tobytes()


# --- forms that single trainers write --------------------------------------------------------


def test_norms_that_are_modules_of_their_own() -> None:
    """Megatron-Core's local layers, which per-rank checkpoints may have."""
    model, tensors = tiny("llama")
    swaps = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    for old, new in swaps.items():
        for key in [k for k in tensors if k.endswith(old)]:
            tensors[key.replace(old, new)] = tensors.pop(key)
    for name in ("input_layernorm", "post_attention_layernorm"):
        name = f"model.layers.1.{name}.weight"
        assert value(model, tensors, name) == bits(model.state[name])


def test_gemmas_outer_norms_on_the_layer() -> None:
    """Where mbridge has them; Megatron-Bridge hangs them on the projections."""
    model, tensors = tiny("gemma2")
    swaps = {
        "self_attention.linear_proj.post_layernorm": "post_attention_layernorm",
        "mlp.linear_fc2.post_layernorm": "post_feedforward_layernorm",
    }
    for old, new in swaps.items():
        for key in [k for k in tensors if old in k]:
            tensors[key.replace(old, new)] = tensors.pop(key)
    for name in swaps.values():
        name = f"model.layers.2.{name}.weight"
        assert value(model, tensors, name) == bits(model.state[name])


def test_gates_of_query_heads_in_one_tensor_with_what_they_gate() -> None:
    """Ranks of a run without tensor parallelism, or Megatron-FSDP's files."""
    model, tensors = tiny("step3p7")
    for key in [k for k in tensors if k.endswith("._qkv")]:
        whole = key.removesuffix("._qkv")
        tensors[whole] = torch.cat([tensors.pop(key), tensors.pop(whole + "._gate")])
    for x in "qkvg":
        name = f"model.layers.1.self_attn.{x}_proj.weight"
        assert value(model, tensors, name) == bits(model.state[name])


def test_a_gate_for_each_element_is_not_taken_for_one_a_head() -> None:
    """What Megatron-Core's releases train; Megatron-Bridge would export the first of each head's."""
    model, tensors = tiny("step3p7")
    for key in [k for k in tensors if k.endswith("._qkv")]:
        heads = len(tensors.pop(key.removesuffix("_qkv") + "_gate"))
        rows = tensors.pop(key)
        tensors[key.removesuffix("._qkv")] = torch.cat([rows[: heads * 12], rows])
    with pytest.raises(BadInputError, match="trained a gate for each element of a head"):
        plan(model, tensors)


YARN: dict[str, Any] = {
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    }
}
BASE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}}
SIGMOID = {"moe_router_score_function": "sigmoid"}
LLAMA3: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
}
NORM = "model.layers.0.linear_attn.norm.weight"
MEGATRON_NORM = "decoder.layers.0.self_attention.out_norm.weight"


@pytest.mark.parametrize("fact", ["layernorm_zero_centered_gamma", "apply_layernorm_1p"])
def test_a_run_without_zero_centred_norms_has_the_norm_as_it_is(fact: str) -> None:
    model, tensors = tiny("qwen3_next")
    tensors[MEGATRON_NORM] = model.state[NORM]
    assert value(model, tensors, NORM, **{fact: False}) == bits(model.state[NORM])


def test_a_norm_that_is_not_exact_is_rounded_as_torch_rounds() -> None:
    model, tensors = tiny("qwen3_next")
    off = torch.tensor([0.001, -0.7311, 3.14159, 1e-9, 0.0039, 0.0117, -1, 100, 0, -0.0])
    tensors[MEGATRON_NORM] = off.bfloat16()
    assert value(model, tensors, NORM) == bits(off.bfloat16() + 1)


def test_a_value_model_becomes_a_classifier() -> None:
    """verl keeps the actor's config beside its critic, whose head may have no bias."""
    model, tensors = tiny("qwen3_critic")
    assert model.config["architectures"] == ["Qwen3ForCausalLM"]
    made = plan(model, tensors)
    assert made.architecture == "Qwen3ForSequenceClassification"
    assert made.config["num_labels"] == 1


@pytest.mark.parametrize("name", ["mimo", "kimi_k2"])
def test_a_model_that_transformers_lacks_keeps_its_config(name: str) -> None:
    """Its shapes are checked against the class it is made from, which config.json must not name."""
    model, tensors = tiny(name, auto_map={"AutoConfig": "configuration.Config"})
    made = plan(model, tensors)
    assert made.model is not None
    assert made.architecture is None
    assert made.config["auto_map"]


# --- what does not fit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected", "found"),
    [
        ({"num_attention_heads": 2, "head_dim": 32, "num_key_value_heads": 1}, "128", "80"),
        ({"num_hidden_layers": 4}, "4", "3"),
        ({"num_hidden_layers": 1}, "1", "3"),
        ({"vocab_size": 65}, "65", "64"),
    ],
)
def test_a_contradiction_shows_both_numbers(
    change: dict[str, Any], expected: str, found: str
) -> None:
    model, tensors = tiny("llama", **change)
    with pytest.raises(BadInputError, match="contradict each other") as caught:
        plan(model, tensors)
    assert expected in str(caught.value.expected)
    assert found in str(caught.value.found)


@pytest.mark.parametrize(
    ("name", "change", "facts"),
    [
        ("llama", {"rms_norm_eps": 1e-6}, {"norm_epsilon": 1e-3}),
        ("llama", BASE, {"rotary_base": 1_000_000}),
        ("llama", {}, {"use_rope_scaling": True}),
        ("llama", {}, {"layernorm_zero_centered_gamma": True}),
        ("nemotron", {}, {"rotary_percent": 0.25}),
        ("qwen3_moe", {}, {"moe_router_topk": 4}),
        ("deepseek_v3", {}, {"moe_router_topk_scaling_factor": 1.5}),
        ("deepseek_v3", {"scoring_func": "softmax"}, {"moe_router_score_function": "sigmoid"}),
        ("deepseek_v3", YARN, {"rope_type": "rope"}),
        ("deepseek_v3", YARN, {"rope_type": "yarn", "rotary_scaling_factor": 8}),
        ("deepseek_v3", YARN, {"mscale_all_dim": 0.5}),
        ("qwen3_next", {}, {"linear_num_key_heads": 4}),
        ("llama", {}, {"rope_scaling": True}),
        ("gemma3", {}, {"rotary_base": [10_000, 500_000]}),
        ("llama", LLAMA3, {"rope_scaling": True, "rope_scaling_factor": 32}),
        ("llama", {}, {"rotary_seq_len_interpolation_factor": 8}),
        ("llama", LINEAR, {"seq_len_interpolation_factor": 4}),
        ("llama", {}, {"rotary_interleaved": True}),
        ("llama", {}, {"position_embedding_type": "none"}),
        ("llama", {}, {"position_embedding_type": "yarn"}),
        ("llama", {}, {"window_size": [127, 0]}),
        ("gpt_oss", {}, {"window_size": [63, 0]}),
        ("gpt_oss", {}, {"window_size": [127, 0], "window_attn_skip_freq": 3}),
        ("gpt_oss", {}, {"window_size": [127, 0], "window_attn_skip_freq": [1, 1, 0]}),
        ("gpt_oss", {}, {"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 8.0}),
        ("llama", {}, {"no_rope_freq": 3}),
        ("llama", {}, {"no_rope_freq": [0, 1, 0]}),
        ("llama", {}, {"softmax_type": "off-by-one"}),
        ("gpt_oss", {}, {"softmax_type": "off-by-one"}),
        ("llama", {}, {"qk_l2_norm": True}),
        ("qwen3_moe", {"norm_topk_prob": True}, {"moe_router_pre_softmax": True}),
        ("llama", {}, {"window_size": "127,0"}),
        ("gemma2", {}, {"attn_logit_softcapping": 7.0}),
    ],
)
def test_a_setting_that_no_tensor_shows(
    name: str, change: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Such a model would load and compute something else than what was trained."""
    model, tensors = tiny(name, **change)
    with pytest.raises(BadInputError, match="contradict each other") as caught:
        plan(model, tensors, facts)
    assert str([*facts.values()][-1]) in str(caught.value.found)
    plan(model, tensors)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("llama", {"norm_epsilon": 1e-5}),
        ("gemma2", {"apply_layernorm_1p": False}),
        ("qwen3_next", {"linear_num_key_heads": 16}),
        ("qwen2_moe", {"moe_router_pre_softmax": False}),
    ],
)
def test_a_default_of_megatron_that_differs_is_told(name: str, facts: dict[str, Any]) -> None:
    """It may be nobody's word: bridges build the model from HuggingFace's config."""
    model, tensors = tiny(name)
    told = [n for n in plan(model, tensors, facts).notices if "Megatron's default" in n]
    assert len(told) == 1
    assert next(iter(facts)) in told[0]
    with pytest.raises(BadInputError, match="contradict each other"):
        plan(model, tensors, facts | {OF_MODEL: True})


@pytest.mark.parametrize(
    ("name", "change", "facts"),
    [
        ("llama", "linear", {"rotary_seq_len_interpolation_factor": None}),
        ("glm4", "", {"rotary_interleaved": False}),
        ("llama", "", {"position_embedding_type": "learned_absolute"}),
        ("gpt_oss", "", {"window_size": None}),
        ("gpt_oss", "", {"window_size": [127, 0], "window_attn_skip_freq": None}),
        ("gpt_oss", "", {"softmax_type": "vanilla"}),
    ],
)
def test_a_default_that_modules_of_their_own_may_not_heed(
    name: str, change: str, facts: dict[str, Any]
) -> None:
    model, tensors = tiny(name, **(LINEAR if change else {}))
    told = [n for n in plan(model, tensors, facts | {OF_MODEL: True}).notices if "default" in n]
    assert len(told) == 1
    assert [*facts][-1] in told[0]


def test_what_no_config_can_say_otherwise_is_told() -> None:
    """Trainers set it for Mixtral, whose class in transformers always normalises."""
    for facts, told in (
        ({"moe_router_pre_softmax": True}, 1),
        ({"moe_router_pre_softmax": False}, 0),
    ):
        notices = plan(*tiny("mixtral"), facts | {OF_MODEL: True}).notices
        assert sum("something else than was trained" in n for n in notices) == told


def test_heads_that_nothing_could_contradict_are_told() -> None:
    """Latent attention needs no telling: its shapes leave one number of heads only."""
    for name, facts, told in (
        ("llama", {}, "(attention)"),
        ("llama", {"num_attention_heads": 6}, ""),
        ("qwen3_next", {"num_attention_heads": 6}, "(linear attention)"),
        ("qwen3_next", {}, "(attention, linear attention)"),
        ("qwen3_vl", {"num_attention_heads": 6}, "(vision tower)"),
        ("deepseek_v3", {}, ""),
    ):
        found = [n for n in plan(*tiny(name), facts).notices if "cannot be checked" in n]
        assert len(found) == bool(told)
        assert all(told in n for n in found)


def test_settings_that_agree_are_silent() -> None:
    """Numbers are compared as such; gemma3 has a base for each kind of layer."""
    for name, change, facts in (
        ("llama", BASE, {"rotary_base": 500_000, "rotary_percent": 1.0}),
        ("llama", LLAMA3, {"use_rope_scaling": True, "rope_scaling_factor": 8.0}),
        ("gemma3", {}, {"rotary_base": 1_000_000, "layernorm_zero_centered_gamma": True}),
        ("gemma3", {}, {"rotary_base": [10_000, 1_000_000], "seq_len_interpolation_factor": None}),
        ("deepseek_v3", YARN, {"rope_type": "yarn", "rotary_scaling_factor": 4, "mscale": 1}),
        ("deepseek_v3", {}, {"rope_type": "rope", "rotary_scaling_factor": 40, "mscale": 0.707}),
        ("qwen3_moe", {}, {"moe_router_topk": 2, "moe_router_score_function": "softmax"}),
        ("llama", LINEAR, {"seq_len_interpolation_factor": 8, "position_embedding_type": "rope"}),
        ("llama", {}, {"seq_len_interpolation_factor": None, "no_rope_freq": None}),
        ("llama", {}, {"window_size": None, "window_attn_skip_freq": None}),
        ("glm4", {}, {"rotary_interleaved": True}),
        ("gpt_oss", {}, {"window_size": [127, 0], "window_attn_skip_freq": 2}),
        ("gpt_oss", {}, {"window_size": 128, "window_attn_skip_freq": [1, 0, 1]}),
        ("gpt_oss", {}, {"softmax_type": "learnable", "moe_router_pre_softmax": False}),
        ("gemma2", {}, {"window_size": [4095, 0], "window_attn_skip_freq": None}),
        ("qwen3_moe", {"norm_topk_prob": True}, {"moe_router_pre_softmax": False}),
        ("qwen3_moe", {"norm_topk_prob": False}, {"moe_router_pre_softmax": True}),
        ("deepseek_v3", {}, SIGMOID | {"moe_router_pre_softmax": True}),
        ("deepseek_v3", YARN, {"position_embedding_type": "rope", "rope_type": "yarn"}),
    ):
        model, tensors = tiny(name, **change)
        assert not any("default" in n for n in plan(model, tensors, facts).notices)


def test_a_model_that_lacks_what_was_trained() -> None:
    """What loads it would leave the norms of queries and keys out in silence."""
    model, tensors = tiny("qwen3", model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(BadInputError, match="6 tensors of the checkpoint are none that Llama"):
        plan(model, tensors)


def test_only_prediction_layers_are_beyond_the_model() -> None:
    """The bias of DeepSeek-V3's router in a V2 model: no layer may have what its class has not."""
    model, tensors = tiny("deepseek_v3_mtp", model_type="deepseek_v2")
    changed = {"architectures": ["DeepseekV2ForCausalLM"], "num_nextn_predict_layers": 1}
    v2 = TinyModel("deepseek_v2", model.config | changed, model.state, model.tiny)
    with pytest.raises(BadInputError, match="2 tensors of the checkpoint are none") as caught:
        plan(v2, tensors)
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in str(caught.value.where)


def test_a_class_that_transformers_lacks_is_no_excuse() -> None:
    model, tensors = tiny("qwen3", architectures=["OurOwnForCausalLM"])
    assert plan(model, tensors).model is not None
    for name in [k for k in tensors if "q_layernorm" in k]:
        del tensors[name]
    with pytest.raises(BadInputError, match="3 tensors that Qwen3ForCausalLM needs"):
        plan(model, tensors)


def test_fewer_experts_than_the_config_says() -> None:
    model, tensors = tiny("qwen3_moe")
    for fc in ("linear_fc1", "linear_fc2"):
        key = f"decoder.layers.1.mlp.experts.experts.{fc}.weight"
        tensors[key] = tensors[key][:3]
    with pytest.raises(BadInputError, match="number of experts") as caught:
        plan(model, tensors)
    assert "decoder.layers.1" in str(caught.value.where)


def test_a_missing_stage_is_named() -> None:
    model, tensors = tiny("llama")
    tensors = {n: t for n, t in tensors.items() if not n.startswith("decoder.layers.0.")}
    with pytest.raises(BadInputError, match="1 of 3 layers are not in the checkpoint"):
        plan(model, tensors)


def test_a_lost_output_layer_is_not_the_embedding() -> None:
    """Nor where the config ties the two: the run's arguments say that it had one."""
    model, tensors = tiny("llama", tie_word_embeddings=True)
    untied = {"untie_embeddings_and_output_weights": True}
    assert any(r.name == "lm_head.weight" for r in plan(model, tensors, untied).recipes)
    del tensors["output_layer.weight"]
    with pytest.raises(BadInputError, match="output layer is not in the checkpoint"):
        plan(model, tensors, untied)
    plan(model, tensors)


def test_half_a_prediction_layer_is_named() -> None:
    """No class of transformers knows the layer, so that no other check could miss a part of it."""
    model, tensors = tiny("deepseek_v3_mtp")
    inner = [k for k in tensors if k.startswith("mtp.layers.0.transformer_layer.mlp.")]
    for key in inner:
        del tensors[key]
    with pytest.raises(BadInputError, match="multi-token prediction are not in") as caught:
        plan(model, tensors)
    assert str(caught.value).startswith(f"{len(inner)} tensors")


def test_rows_that_are_taken_for_padding_are_told() -> None:
    model, tensors = tiny("llama")
    size = model.config["vocab_size"]
    for rows, facts, told in (
        (size, {}, 0),
        (size + 3, {}, 1),
        (size + 3, {"vocab_size": size}, 0),
    ):
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            tensors[name] = torch.zeros(rows, tensors[name].shape[1], dtype=tensors[name].dtype)
        notices = plan(model, tensors, facts).notices
        assert sum(n.startswith("the last 3 of ") for n in notices) == told
        assert sum("rows of the vocabulary" in n for n in notices) == told


def test_no_prediction_layer_where_the_config_counts_one() -> None:
    """Reinforcement learning mostly leaves it out; a run that trained it must have it."""
    model, tensors = tiny("deepseek_v3_mtp")
    assert not any("multi-token" in n for n in plan(model, tensors).notices)
    for key in [k for k in tensors if k.startswith("mtp.")]:
        del tensors[key]
    notices = plan(model, tensors).notices
    assert [n for n in notices if "counts 1 layers for multi-token prediction" in n]
    with pytest.raises(BadInputError, match="multi-token prediction are not in"):
        plan(model, tensors, {"mtp_num_layers": 1})


def test_parts_of_linear_attention_that_only_add_up() -> None:
    """Two parts whose rows make up for each other would be written, each row in a wrong place."""
    for name in ("qwen3_next", "qwen3_5"):
        model, tensors = tiny(name)
        part = "decoder.layers.0.self_attention.in_proj.weight."
        both = torch.cat([tensors[part + "query"], tensors[part + "key"]])
        tensors[part + "query"], tensors[part + "key"] = both[:12], both[12:]
        with pytest.raises(BadInputError, match="rows of the linear attention"):
            plan(model, tensors)


def test_an_unknown_tensor_is_named_with_the_way_out() -> None:
    model, tensors = tiny("llama")
    for k in range(2):
        tensors[f"decoder.layers.{k}.mlp.router.weight"] = torch.zeros(4, 48)
    with pytest.raises(BadInputError, match="family llama knows no rule for 2 tensors") as caught:
        plan(model, tensors)
    assert "decoder.layers.{n}.mlp.router.weight (2 tensors)" in str(caught.value.where)
    assert "CONTRIBUTING" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("self_attention.linear_qkv.adapter.linear_in.weight", "adapter .* is not merged"),
        ("mlp.linear_fc1.lora_A.default.weight", "adapter .* is not merged"),
        ("mlp.linear_fc2.input_quantizer._pre_quant_scale", "by ModelOpt"),
        ("mlp.linear_fc2.weight_quantizer._scale", "by ModelOpt"),
        ("mlp.linear_fc2.weight_scale_inv", "checkpoint are quantized"),
        ("mlp.linear_fc2.weight._scale_inv", "checkpoint are quantized"),
        ("mlp.experts.linear_fc2.weight3_scale", "checkpoint are quantized"),
    ],
)
def test_unknown_tensors_whose_names_tell_what_they_are(name: str, what: str) -> None:
    model, tensors = tiny("llama")
    tensors["decoder.layers.1." + name] = torch.zeros(2)
    with pytest.raises(BadInputError, match=what) as caught:
        plan(model, tensors)
    assert name in str(caught.value.where)
    alone = {n: t for n, t in tensors.items() if n.endswith(name)}
    with pytest.raises(
        BadInputError, match=r"and no model|are not in the checkpoint|ModelOpt|quantized"
    ):
        plan(model, alone)


def test_layers_that_do_nothing_are_named() -> None:
    model, tensors = tiny("llama")
    moved = {n.replace("layers.2.", "layers.4."): t for n, t in tensors.items()}
    with pytest.raises(BadInputError, match="noop layers") as caught:
        plan(model, moved, {"noop_layers": "2,3"})
    assert "2, 3" in str(caught.value.found)
    assert "noop_layers 2,3" in str(caught.value.found)


def test_layers_that_are_numbered_within_their_stage() -> None:
    model, tensors = tiny("llama", num_hidden_layers=6)
    run = {"pipeline_model_parallel_size": 2}
    with pytest.raises(BadInputError, match="within each pipeline stage"):
        plan(model, tensors, run | {"num_layers": 6})
    for facts, told in ((run | {"num_layers": 3}, False), ({}, True)):
        with pytest.raises(BadInputError, match="contradict each other") as caught:
            plan(model, tensors, facts)
        assert ("Megatron-FSDP" in str(caught.value.hint)) is told


def test_no_layers_at_all() -> None:
    model, tensors = tiny("llama")
    others = {n.replace("decoder", "encoder"): t for n, t in tensors.items()}
    with pytest.raises(BadInputError, match="no layer of a language model"):
        plan(model, others)


def test_olmoe_is_told_of_its_other_rows() -> None:
    for name in ("qwen3_moe", "olmoe"):
        told = any("ms-swift" in n for n in plan(*tiny(name)).notices)
        assert told is (name == "olmoe")


def test_the_order_of_gates_that_nothing_tells() -> None:
    """ms-swift's and Megatron-Core's are of one name and shape: linear attention beside them tells."""
    model, tensors = tiny("qwen3_5")
    alone = {k: t for k, t in tensors.items() if ".in_proj." not in k}
    with pytest.raises(BadInputError, match="nothing in the checkpoint tells"):
        plan(model, alone)
    both = tensors | {"decoder.layers.0.self_attention.in_proj.weight": torch.zeros(3, 48)}
    with pytest.raises(BadInputError, match="of several trainers") as refused:
        plan(model, both)
    assert "Megatron-Core and ms-swift" in str(refused.value)


def test_gated_attention_of_forks_is_refused_by_name() -> None:
    model, tensors = tiny("qwen3_5")
    at = "decoder.layers.3.self_attention."
    tensors[at + "linear_qgkv.weight"] = tensors.pop(at + "linear_qkv.weight")
    with pytest.raises(BadInputError, match="that no release tells"):
        plan(model, tensors)


def test_an_unknown_model_type() -> None:
    model, tensors = tiny("llama", model_type="klingon")
    with pytest.raises(BadInputError, match="no family is known") as refused:
        plan(model, tensors)
    told = r"found: (\d+) of \1 kinds of names are those of the family llama"
    assert re.search(told, str(refused.value))


def test_two_tensors_of_one_name() -> None:
    model, tensors = tiny("llama")
    tensors["decoder.layers.0.input_layernorm.weight"] = torch.zeros(48)
    with pytest.raises(BadInputError, match="would both be written as") as caught:
        plan(model, tensors)
    assert "decoder.layers.0.input_layernorm.weight" in str(caught.value.found)


def test_memory_layout_is_refused() -> None:
    model, _ = tiny("llama")
    with pytest.raises(UsageError, match="--layout memory"):
        convert({}, model.config, {}, JobOptions(layout="memory"))


def test_names_and_model_types_are_unique() -> None:
    known = list(families())
    names = [f.name for f in known]
    # Of gemma4 with experts and without: the config tells which.
    types = [t for f in known if not f.name.startswith("gemma4_moe") for t in f.model_types]
    assert len(set(names)) == len(names)
    assert len(set(types)) == len(types)
