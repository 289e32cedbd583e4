"""What transformers would load of planned names: held against what it does load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamconv.errors import BadInputError
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import BF16
from streamconv.ir.recipe import Recipe
from streamconv.planning.checks import check_loads
from streamconv.tracing.hf import MetaModel
from streamconv.tracing.model import Loaded
from tests.hf_models import (
    GEMMA3_VL,
    HEAD,
    MODELS,
    QWEN3_VL_MOE,
    TINY,
    dense,
    make,
    meta_of,
    sparse,
)

SPECS = {**MODELS, "gemma3_vl": GEMMA3_VL, "qwen3_vl_moe": QWEN3_VL_MOE}


def loaded(meta: MetaModel, shapes: dict[str, Shape]) -> Loaded:
    return meta.load({name: (shape, BF16) for name, shape in shapes.items()})


@pytest.mark.parametrize("name", SPECS)
def test_what_a_model_saves_it_loads(name: str) -> None:
    model = make(SPECS[name])
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    meta = meta_of(config, model.state_dict())
    assert loaded(meta, meta.hub_shapes) == Loaded()
    # A tied alias is left out where its bytes are equal, whichever of the two it is.
    for alias, kept in meta.tied:
        for gone in (alias, kept):
            assert loaded(meta, {n: s for n, s in meta.hub_shapes.items() if n != gone}) == Loaded()


def test_it_says_what_from_pretrained_says(tmp_path: Path) -> None:
    """Right names, and one of each kind of wrong ones: the library's own report is the judge."""
    model = make(MODELS["qwen3_moe"])
    model.save_pretrained(tmp_path)
    meta = meta_of({**model.config.to_dict(), "architectures": ["Qwen3MoeForCausalLM"]})
    shapes = dict(meta.hub_shapes)
    shapes["model.thinker.norm.weight"] = shapes.pop("model.norm.weight")
    shapes["model.layers.1.mlp.others.0.gate.weight"] = (1,)
    shapes["model.layers.0.input_layernorm.weight"] = (31,)
    shapes["layers.1.input_layernorm.weight"] = shapes["model.layers.1.input_layernorm.weight"]
    for expert in range(4):
        shapes[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] = (32, 23)
    save_file({n: torch.zeros(s) for n, s in shapes.items()}, tmp_path / "model.safetensors")
    _, said = type(model).from_pretrained(
        tmp_path, output_loading_info=True, ignore_mismatched_sizes=True
    )
    ours = loaded(meta, shapes)
    assert set(ours.missing) == said["missing_keys"]
    assert set(ours.unexpected) == said["unexpected_keys"]
    found = {(name, tuple(b), tuple(a)) for name, b, a in said["mismatched_keys"]}
    assert {(name, b, a) for name, a, b in ours.misshapen} == found
    assert set(ours.clashing) == {
        ("layers.1.input_layernorm.weight", "model.layers.1.input_layernorm.weight")
    }


def test_experts_that_cannot_be_joined_are_told() -> None:
    meta = meta_of(sparse())
    shapes = dict(meta.hub_shapes)
    shapes["model.layers.0.mlp.experts.3.up_proj.weight"] = (25, 31)
    ((name, said),) = loaded(meta, shapes).failed
    assert name == "model.layers.0.mlp.experts.gate_up_proj"
    assert said.startswith("RuntimeError")


def check(meta: MetaModel, shapes: dict[str, Shape], *, sure: bool = True) -> None:
    check_loads([Recipe.identity(n, n, s, BF16) for n, s in shapes.items()], meta, sure=sure)


def test_names_that_would_not_load_are_an_error_that_names_them() -> None:
    meta = meta_of(dense())
    check(meta, meta.hub_shapes)
    # Told of elsewhere: what the model does not know.
    check(meta, {**meta.hub_shapes, "v_head.summary.weight": (1, 32)})
    without = {n: s for n, s in meta.hub_shapes.items() if n != "model.norm.weight"}
    check(meta, without, sure=False)
    with pytest.raises(BadInputError, match="would not load") as caught:
        check(meta, {**without, "lm_head.weight": (63, 32)})
    assert caught.value.found == (
        "1 filled by nothing: model.norm.weight; "
        "1 of another shape: lm_head.weight (expected [64, 32], found [63, 32])"
    )
    with pytest.raises(BadInputError, match="would not load") as caught:
        check(meta, {**meta.hub_shapes, "norm.weight": (32,)})
    assert caught.value.found == "1 lost, as another fills the same place: norm.weight"


def test_a_name_that_we_believe_in_and_the_library_does_not_is_an_error() -> None:
    """As Qwen2.5-Omni's thinker came out: every name known to us, and not one to transformers."""
    meta = meta_of(dense(**HEAD, **TINY))
    meta.hub_shapes = {f"model.thinker.{n}": s for n, s in meta.hub_shapes.items()}
    with pytest.raises(BadInputError, match="would not load") as caught:
        check(meta, meta.hub_shapes)
    assert "passed over: model.thinker." in str(caught.value.found)
