"""Names and shapes from transformers, held against transformers: what it saves, we describe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamconv.errors import BadInputError
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import BF16, F16, F32, DType
from streamconv.ir.recipe import Recipe, SourceRef
from streamconv.tracing.copies import COPIES
from streamconv.tracing.hf import build_meta
from tests.hf_models import (
    DEEP,
    GEMMA3_VL,
    HEAD,
    LATENT,
    MODELS,
    MOE,
    QWEN3_VL_MOE,
    ROUTED,
    TINY,
    dense,
    make,
    meta_of,
    sparse,
)
from tests.replay import array, dtype_of, replay

State = dict[str, torch.Tensor]


def stored(folder: Path) -> State:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def headers(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[Shape, DType]]:
    return {k: (tuple(v.shape), dtype_of(v)) for k, v in state.items()}


def bare(shapes: Mapping[str, Shape], dtype: DType = BF16) -> dict[str, tuple[Shape, DType]]:
    return {name: (shape, dtype) for name, shape in shapes.items()}


def outputs(recipes: tuple[Recipe, ...], state: State) -> State:
    sources = {name: array(tensor) for name, tensor in state.items()}
    made: State = {}
    for recipe in recipes:
        bits = torch.from_numpy(replay(recipe, sources).copy().view("uint8"))
        dtype = getattr(torch, recipe.dtype.torch)
        made[recipe.name] = bits.view(-1).view(dtype).reshape(recipe.view.shape)
    return made


def assert_same(made: State, expected: State) -> None:
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype, name
        assert torch.equal(made[name], tensor), name


def reload(model: Any, made: State, config: dict[str, Any], folder: Path) -> State:
    """Return the state of ``made`` as transformers loads it, which must not complain."""
    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in made.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    again, complaints = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(complaints.values()), complaints
    state: State = again.state_dict()
    return state


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_what_transformers_saves(name: str, tmp_path: Path) -> None:
    model = make(MODELS[name])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved")
    saved, config = stored(tmp_path / "saved"), config_of(tmp_path / "saved")
    meta = meta_of(config, state)
    assert meta.certain
    assert meta.architecture == type(model).__name__
    assert meta.state_shapes == {k: tuple(v.shape) for k, v in state.items()}

    recipes, notices = meta.recipes(headers(state))
    assert notices == ()
    made = outputs(recipes, state)
    aliases = {alias for alias, _ in meta.tied}
    assert_same({k: v for k, v in made.items() if k not in aliases}, saved)
    assert meta.hub_shapes == {k: tuple(v.shape) for k, v in made.items()}
    assert set(meta.hub_shapes) - meta.optional <= saved.keys()

    # What is named as on the Hub is handed on: the conversion is not idempotent.
    again, notices = meta.recipes(headers(made))
    assert notices == ()
    assert again == tuple(Recipe.identity(k, k, *header) for k, header in headers(made).items())

    loaded = reload(model, saved, config, tmp_path / "made")
    assert_same({k: v.clone() for k, v in loaded.items()}, state)


def test_bfloat16_and_mixed_dtypes_keep_their_dtype(tmp_path: Path) -> None:
    model = make(MODELS["qwen3_moe"]).bfloat16()
    for layer in model.model.layers:
        layer.mlp.gate.float()
        layer.mlp.experts.down_proj.data = layer.mlp.experts.down_proj.data.float()
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    recipes, _ = meta_of(config_of(tmp_path)).recipes(headers(state))
    assert_same(outputs(recipes, state), stored(tmp_path))


# --- deviations from save_pretrained ------------------------------------------------------------


def test_prefixes_that_a_fresh_model_drops_come_back(tmp_path: Path) -> None:
    """The Hub's Gemma3 says vision_tower.vision_model; so does a model that was loaded from it."""
    model = make(GEMMA3_VL)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "fresh")
    config = config_of(tmp_path / "fresh")
    fresh = stored(tmp_path / "fresh")
    hub = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in fresh.items()}
    if any("vision_model" in k for k in fresh):
        pytest.skip("this release of transformers has the prefix in memory too")
    assert_same(reload(model, hub, config, tmp_path / "hub"), state)
    type(model).from_pretrained(tmp_path / "hub").save_pretrained(tmp_path / "saved")

    meta = meta_of(config)
    made = outputs(meta.recipes(headers(state))[0], state)
    assert meta.tied == (
        ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
    )
    made.pop("language_model.lm_head.weight")
    assert_same(made, stored(tmp_path / "saved"))
    # Files without the prefix, and names of transformers 4 (neither memory nor Hub), end up alike.
    older = {
        k.replace("language_model.model.", "model.language_model.")
        .replace("vision_tower.", "model.vision_tower.")
        .replace("multi_modal_projector.", "model.multi_modal_projector."): v
        for k, v in hub.items()
    }
    for source in (fresh, older):
        recipes, notices = meta.recipes(headers(source))
        assert_same(outputs(recipes, source), made)
        assert "named as another release" in notices[0]


def test_experts_that_are_only_transposed_are_told_by_their_shapes(tmp_path: Path) -> None:
    """transformers transposes Qwen3-VL-MoE's experts while loading, and not back while saving.

    vLLM and SGLang transpose them too, so only the Hub's own layout works everywhere.
    """
    model = make(QWEN3_VL_MOE)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved")
    config = config_of(tmp_path / "saved")
    saved = stored(tmp_path / "saved")
    experts = {k for k in saved if ".mlp.experts." in k}
    hub = {k: v.transpose(1, 2).contiguous() if k in experts else v for k, v in saved.items()}

    meta = meta_of(config)
    made = outputs(meta.recipes(headers(state))[0], state)
    assert_same(made, hub)
    recipes, notices = meta.recipes(headers(hub))
    assert notices == ()
    assert all(r.is_identity for r in recipes)
    assert_same(reload(model, made, config, tmp_path / "made"), state)


@pytest.mark.parametrize(("version", "same"), [("4.57.1", True), ("5.3.0", False), (None, False)])
def test_when_shapes_cannot_tell_the_release_does(version: str | None, same: bool) -> None:
    text = TINY | MOE | HEAD | {"moe_intermediate_size": 16}
    config = {
        "model_type": "qwen3_vl_moe",
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "text_config": text,
        "vision_config": DEEP,
        "transformers_version": version,
    }
    meta = meta_of(config)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert meta.state_shapes[name] == (4, 32, 32)
    recipes, notices = meta.recipes({name: ((4, 32, 32), BF16)})
    assert recipes[0].is_identity == same
    assert "neither names nor shapes tell" in notices[0]
    # A tensor of the other kind, whose shape tells, decides for it.
    down = name.replace("gate_up_proj", "down_proj")
    for shape, handed_on in (((4, 16, 32), True), ((4, 32, 16), False)):
        recipes, notices = meta.recipes({name: ((4, 32, 32), BF16), down: (shape, BF16)})
        assert not any("neither names nor shapes tell" in n for n in notices)
        assert [r.is_identity for r in recipes] == [handed_on, handed_on]


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "_fsdp_wrapped_module.",
        "module._orig_mod.model.",
        "module.module.",
    ],
)
@pytest.mark.parametrize("config", [dense(), sparse()])
def test_wrapper_prefixes_are_removed(prefix: str, config: dict[str, Any]) -> None:
    meta = meta_of(config)
    plain, _ = meta.recipes(bare(meta.state_shapes))
    wrapped, notices = meta.recipes(bare({prefix + k: s for k, s in meta.state_shapes.items()}))
    assert [r.name for r in wrapped] == [r.name for r in plain]
    assert {s.base.fqn for r in wrapped if isinstance((s := r.view).base, SourceRef)} == {
        prefix + k for k in meta.state_shapes
    }
    assert all("removed from" in n or "named as another" in n for n in notices)
    assert notices


def test_markers_inside_names_are_removed() -> None:
    meta = meta_of(dense())
    names = {k.replace("layers.", "_fsdp_wrapped_module.layers."): k for k in meta.state_shapes}
    names = {k.replace(".mlp.", "._checkpoint_wrapped_module.mlp."): v for k, v in names.items()}
    recipes, _ = meta.recipes(bare({k: meta.state_shapes[v] for k, v in names.items()}))
    assert {r.name for r in recipes} == set(meta.hub_shapes)


def test_a_prefix_whose_removal_would_merge_two_names_stays() -> None:
    meta = meta_of(dense())
    both = {f"module.{k}": s for k, s in meta.state_shapes.items()}
    both["v_head.weight"] = both["module.v_head.weight"] = (1, 32)
    recipes, notices = meta.recipes(bare(both))
    assert {r.name for r in recipes} == set(both)
    assert "two tensors have one name" in notices[0]


def test_the_names_of_a_body_gain_the_prefix_of_the_head() -> None:
    meta, body = meta_of(sparse()), meta_of(sparse(architectures=["Qwen3MoeModel"]))
    assert "layers.0.mlp.experts.gate_up_proj" in body.state_shapes
    for shapes in (body.state_shapes, body.hub_shapes):
        recipes, notices = meta.recipes(bare(shapes))
        assert {r.name for r in recipes} == set(meta.hub_shapes) - {"lm_head.weight"}
        assert "named as another release" in notices[0]


def test_unknown_names_are_handed_on() -> None:
    meta = meta_of(dense())
    heads = {"v_head.summary.weight": (1, 32), "v_head.summary.bias": (1,)}
    recipes, notices = meta.recipes(bare({**meta.state_shapes, **heads}))
    assert {r.name for r in recipes} == set(meta.hub_shapes) | set(heads)
    assert all(r.is_identity for r in recipes)
    assert not notices, "the planner tells of them"


@pytest.mark.parametrize(
    ("head", "architecture"),
    [
        (("score.weight", "score.bias"), "Qwen2ForTokenClassification"),
        (("score.weight",), "Qwen2ForSequenceClassification"),
        (("lm_head.weight", "v_head.summary.weight"), "Qwen2ForCausalLM"),
        (("lm_head.weight", "score.weight"), "Qwen2ForCausalLM"),
    ],
)
def test_a_score_head_betrays_a_critic(head: tuple[str, ...], architecture: str) -> None:
    body = [name for name in meta_of(dense()).state_shapes if name != "lm_head.weight"]
    for prefix in ("", "module."):
        meta = meta_of(dense(num_labels=1), dict.fromkeys(prefix + n for n in (*body, *head)))
        assert meta.architecture == architecture
    if "lm_head.weight" not in head:
        assert set(meta.hub_shapes) == {*body, *head}
        assert meta.hub_shapes["score.weight"] == (1, 32)


def test_outputs_stand_where_their_sources_stand_in_expert_order() -> None:
    meta = meta_of(sparse())
    recipes, _ = meta.recipes(bare(dict(reversed(meta.state_shapes.items()))))
    names = [r.name for r in recipes]
    assert names[0] == "lm_head.weight"
    start = names.index("model.layers.0.mlp.experts.0.gate_proj.weight")
    assert [n.removeprefix("model.layers.0.mlp.experts.") for n in names[start : start + 4]] == [
        "0.gate_proj.weight",
        "0.up_proj.weight",
        "1.gate_proj.weight",
        "1.up_proj.weight",
    ]
    assert names.index("model.layers.1.input_layernorm.weight") < start


def test_memory_layout_keeps_the_tensors() -> None:
    meta = meta_of(sparse())
    recipes, _ = meta.recipes(
        bare({f"module.{k}": s for k, s in meta.state_shapes.items()}), "memory"
    )
    assert [r.name for r in recipes] == list(meta.state_shapes)
    assert all(r.is_identity for r in recipes)


# --- incomplete and contradictory checkpoints ---------------------------------------------------


def test_memory_layout_needs_no_way_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(COPIES, torch.ops.aten.new_zeros.default)
    model = make(MODELS["inkling2_text"])
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    with pytest.raises(BadInputError, match="new_zeros") as caught:
        build_meta(config)
    assert caught.value.where == "lm_head.weight"
    assert "--layout memory" in str(caught.value.hint)
    meta = build_meta(config, layout="memory")
    assert meta is not None
    state = headers(model.state_dict())
    recipes, notices = meta.recipes(state, layout="memory")
    assert recipes == tuple(Recipe.identity(k, k, *header) for k, header in state.items())
    assert notices == ()


def test_a_hole_leaves_out_only_what_is_made_of_it() -> None:
    meta = meta_of(sparse())
    shapes = dict(meta.state_shapes)
    del shapes["model.layers.1.mlp.experts.gate_up_proj"], shapes["model.norm.weight"]
    recipes, notices = meta.recipes(bare(shapes))
    missing = set(meta.hub_shapes) - {r.name for r in recipes}
    assert notices == ()
    assert missing == {"model.norm.weight"} | {
        f"model.layers.1.mlp.experts.{e}.{p}_proj.weight" for e in range(4) for p in ("gate", "up")
    }


def test_a_layer_in_memory_and_a_layer_of_the_hub_both_convert() -> None:
    meta = meta_of(sparse())
    mixed = {k: s for k, s in meta.state_shapes.items() if "layers.1.mlp.experts" not in k}
    mixed |= {k: s for k, s in meta.hub_shapes.items() if "layers.1.mlp.experts" in k}
    recipes, _ = meta.recipes(bare(mixed))
    assert {r.name for r in recipes} == set(meta.hub_shapes)


def test_fused_and_unfused_at_once_is_refused() -> None:
    meta = meta_of(sparse())
    extra = "model.layers.0.mlp.experts.1.up_proj.weight"
    with pytest.raises(BadInputError, match="same weights twice") as caught:
        meta.recipes(bare({**meta.state_shapes, extra: meta.hub_shapes[extra]}))
    assert extra in str(caught.value)


def test_other_shapes_than_the_config_says_are_converted_for_the_caller_to_judge() -> None:
    meta = meta_of(sparse())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    shapes = meta.state_shapes | {name: (3, 48, 32), "lm_head.weight": (70, 32)}
    recipes, _ = meta.recipes(bare(shapes))
    made = {r.name: r.view.shape for r in recipes}
    assert made["lm_head.weight"] == (70, 32)
    assert "model.layers.0.mlp.experts.2.up_proj.weight" in made
    assert "model.layers.0.mlp.experts.3.up_proj.weight" not in made


def test_shapes_that_the_conversion_refuses_are_an_error() -> None:
    meta = meta_of(sparse())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(BadInputError, match="cannot turn these tensors into Hub tensors"):
        meta.recipes(bare(meta.state_shapes | {name: (48,)}))


# --- what may be missing, superfluous or must not be cast ---------------------------------------


def test_only_a_config_that_ties_makes_ties() -> None:
    assert meta_of(dense(tie_word_embeddings=False)).tied == ()
    meta = meta_of(dense(tie_word_embeddings=True))
    assert meta.tied == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert meta.optional == {"lm_head.weight"}
    assert "lm_head.weight" in meta.hub_shapes


def test_router_biases_stay_in_float32() -> None:
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    meta = meta_of({**config, **TINY, **ROUTED, **LATENT})
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert bias in meta.hub_shapes
    other = "model.layers.1.mlp.experts.0.up_proj.weight"
    assert meta.kept_fp32([bias, other], BF16) == {bias}
    assert meta.kept_fp32([bias, other], F16) == {bias}
    assert not meta.kept_fp32([bias, other], F32)


def test_multi_token_prediction_layers_are_not_unexpected() -> None:
    config = {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"]}
    meta = meta_of({**config, **TINY, **ROUTED, **HEAD, "num_hidden_layers": 46})
    assert meta.is_optional_unexpected("model.layers.46.embed_tokens.weight")
    assert meta.is_optional_unexpected("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not meta.is_optional_unexpected("model.layers.45.embed_tokens.weight")
