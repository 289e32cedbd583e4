"""Every family of Megatron models, both ways: the oracle takes a model apart, we put it together.

``scripts/makers/tiny_families.py`` makes a tiny model as transformers' ``save_pretrained`` writes it,
``megatron_inverse.py`` turns it into Megatron's tensors, ``megatron.py`` writes them with torch's own
DCP writer. What comes out must be the model, tensor by tensor, byte by byte. The rules alone are
held against the oracle too, without files, and must refuse what is incomplete or of another size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import streamconv
from scripts.docs_pages import families as page_of_families
from scripts.makers import megatron
from scripts.makers.tiny_families import State, TinyModel
from scripts.outputs import differences, read_model, read_truth
from streamconv.cli.commands import run
from streamconv.errors import BadInputError, UsageError
from streamconv.families import convert as family_conversion
from streamconv.families.known import table
from tests.family_cases import CASES, Case, plan, taken_apart
from tests.replay import array, replay

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def _models_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build transformers' model of a config once: the mutations ask for the same one."""
    build, built = family_conversion.build_meta, {}

    def once(config: Mapping[str, Any], names: Collection[str] = ()) -> Any:
        key = json.dumps([config, sorted(names)])
        if key not in built:
            built[key] = build(config, names)
        return built[key]

    monkeypatch.setattr(family_conversion, "build_meta", once)


# --- the rules against the oracle ------------------------------------------------------------


@every_case
def test_the_rules_undo_the_oracle(case: Case) -> None:
    model, walk = taken_apart(case)
    arrays = {key: array(t) for key, t in walk.made.items()}
    made = {r.name: replay(r, arrays) for r in plan(model, walk.made).recipes}
    assert sorted(made.keys() ^ model.state.keys()) == []
    for name, expected in model.state.items():
        assert made[name].shape == tuple(expected.shape), name
        assert made[name].tobytes() == array(expected).tobytes(), name


@every_case
@pytest.mark.usefixtures("_models_once")
def test_no_tensor_may_be_missing(case: Case) -> None:
    """One tensor at a time; a layer's stand for the other layers of its kind."""
    model, walk = taken_apart(case)
    for key in one_of_each_kind(walk.made):
        if not model.tiny.loads and UNTOLD.match(key):
            continue
        left = {k: t for k, t in walk.made.items() if k != key}
        with pytest.raises(BadInputError) as refused:
            plan(model, left)
        # A lone bias of a head is no longer seen as a head's.
        words = "not in the checkpoint|not all there|knows no rule .*\n.*output_layer.bias"
        assert re.search(words, str(refused.value)), key


@every_case
@pytest.mark.usefixtures("_models_once")
def test_no_tensor_may_be_of_another_size(case: Case) -> None:
    model, walk = taken_apart(case)
    for key in one_of_each_kind(walk.made):
        if not model.tiny.loads and (UNTOLD.match(key) or UNSIZED.match(key)):
            continue
        for axis in range(walk.made[key].ndim):
            with pytest.raises(BadInputError) as refused:
                plan(model, walk.made | {key: resized(walk.made[key], axis)})
            assert re.search("shape|contradict|unequal", str(refused.value)), key


@every_case
@pytest.mark.usefixtures("_models_once")
def test_no_tensor_may_be_unknown(case: Case) -> None:
    model, walk = taken_apart(case)
    prefix = next(k for k in walk.made if k.endswith("linear_proj.weight")).split("decoder")[0]
    layer = 1 if "HybridModel" in str(case) else 0  # which has an MLP
    for key in (f"decoder.layers.{layer}.mlp.linear_fc3.weight", "decoder.extra.weight"):
        with pytest.raises(BadInputError, match=r"knows no rule|are none that") as refused:
            plan(model, walk.made | {prefix + key: torch.zeros(3)})
        assert key.rsplit(".", 2)[1] in str(refused.value)


@every_case
@pytest.mark.usefixtures("_models_once")
def test_no_layer_may_be_missing_or_too_many(case: Case) -> None:
    model, walk = taken_apart(case)
    thinker = model.config.get("thinker_config", model.config)
    text = thinker.get("text_config", thinker.get("llm_config", thinker))
    last = text.get("num_hidden_layers", len(text.get("layers_block_type", ()))) - 1
    layer = re.compile(rf"^(?:thinker\.)?(?:language_model\.)?decoder\.layers\.{last}\.")
    missing = {k: t for k, t in walk.made.items() if not layer.match(k)}
    more = {
        k.replace(f"layers.{last}.", f"layers.{last + 1}."): t
        for k, t in walk.made.items()
        if layer.match(k)
    }
    for tensors in (missing, walk.made | more):
        with pytest.raises(BadInputError, match="layers"):
            plan(model, tensors)


# Of models that transformers has no class for, nothing tells what is there but once.
UNTOLD = re.compile(
    r"(visual\.)?(mm_projector|multi_modal_projector|mlp1|vision_(tower|model)\.(patch_embed|embeddings))"
    r"\.|(decoder|mtp\.layers\.0)\.hc_head|.*\.router\.(tid2eid|expert_bias)"
)

UNSIZED = re.compile(r"vision_model\.(class_token|position_embedding|conv1)|vision_projection\.")


def one_of_each_kind(tensors: State) -> Iterator[str]:
    """Yield the keys, of those that differ in a number only the last."""
    kinds = {re.sub(r"\d+", "#", key): key for key in tensors}
    yield from kinds.values()


def resized(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the tensor one shorter along ``axis``; a vocabulary may be longer than it should."""
    if tensor.shape[axis] == 1:
        return torch.cat([tensor, tensor], axis)
    keep = tensor.shape[axis] - 1
    # The rows that fill up the vocabulary may well be left out.
    if axis == 0 and tensor.ndim == 2 and bool((tensor[-1] == 7).all()):
        keep = 60
    return tensor.narrow(axis, 0, keep)


# --- what is said of them -----------------------------------------------------------------------


def test_the_documentation_has_the_table_of_all_families() -> None:
    assert table() in page_of_families()


def test_the_command_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["families"]) == 0
    assert "deepseek_v32" in capsys.readouterr().out
    assert run(["families", "glm_moe_dsa"]) == 0
    assert "family: deepseek" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no family has the name"):
        run(["families", "klingon"])


# --- real folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", megatron.FLAVOURS)
@every_case
@pytest.mark.usefixtures("planned_here")
def test_a_checkpoint_becomes_what_save_pretrained_writes(
    case: Case, flavour: megatron.Flavour, tmp_path: Path
) -> None:
    model, walk = taken_apart(case)
    try:
        tensors = megatron.flavoured(walk, flavour)
    except megatron.NotStackable:
        pytest.skip("Megatron itself writes the layers of this model one by one")
    options = megatron.Options(flavour, common="file" if flavour == "stacked" else "record")
    megatron.save(tmp_path / "run", model.config, walk, options, tensors)
    result = streamconv.convert(tmp_path / "run", tmp_path / "out", sync=False)
    assert result.status == "done"
    out = load_model(tmp_path / "out")
    assert sorted(out.keys() ^ model.state.keys()) == []
    for name, expected in model.state.items():
        assert out[name].dtype == expected.dtype, name
        assert torch.equal(bits(out[name]), bits(expected)), name
    if flavour == "per layer" and model.tiny.loads:
        assert_loads(tmp_path / "out", model)


def load_model(folder: Path) -> State:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_loads(folder: Path, model: TinyModel) -> None:
    """Transformers loads the folder and misses nothing; what it does not know is by hand."""
    config = json.loads((folder / "config.json").read_text())
    loaded, told = getattr(transformers, config["architectures"][0]).from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert loaded.dtype == torch.bfloat16
    assert not told["missing_keys"], told
    assert not told["mismatched_keys"], told
    for name in told["unexpected_keys"]:
        assert any(re.match(p, name) for p in model.tiny.extra), name


@pytest.mark.parametrize("expert", [0, 2, 4])
@pytest.mark.usefixtures("planned_here")
def test_no_expert_may_be_missing(expert: int, tmp_path: Path) -> None:
    """In the flavour that keeps experts singly; verl 0.4 lost those of other ranks."""
    model, walk = taken_apart(Case("qwen3_vl_moe"))
    tensors = {
        key: t
        for key, t in megatron.flavoured(walk, "singleton").items()
        if f"layers.1.mlp.experts.experts.{expert}." not in key
    }
    options = megatron.Options("singleton")
    megatron.save(tmp_path / "run", model.config, walk, options, tensors)
    with pytest.raises(BadInputError, match=r"layers\.1\.mlp\.experts"):
        streamconv.convert(tmp_path / "run", tmp_path / "out", sync=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("planned_here")
def test_parts_that_were_not_trained_are_those_of_the_released_model(tmp_path: Path) -> None:
    """A tower of which the checkpoint has nothing; one of which it has something is incomplete."""
    model, walk = taken_apart(Case("qwen3_omni"))
    whole = {k: t for k, t in walk.made.items() if not k.startswith("thinker.audio_model.")}
    options = megatron.Options("per layer")
    megatron.save(tmp_path / "run", model.config, walk, options, whole)
    with pytest.raises(BadInputError, match="that Megatron did not train") as refused:
        streamconv.convert(tmp_path / "run", tmp_path / "out", sync=False)
    assert "base" in str(refused.value)
    (tmp_path / "released").mkdir()
    save_file(
        {n: t + 1 if "audio_tower" not in n else t for n, t in model.state.items()},
        tmp_path / "released/model.safetensors",
    )
    streamconv.convert(tmp_path / "run", tmp_path / "out", base=tmp_path / "released", sync=False)
    out = load_model(tmp_path / "out")
    assert out.keys() == model.state.keys()
    assert all(torch.equal(out[n], t) for n, t in model.state.items())
    some = whole | {k: walk.made[k] for k in walk.made if k.endswith("audio_model.ln_post.bias")}
    megatron.save(tmp_path / "half", model.config, walk, options, some)
    with pytest.raises(BadInputError, match="needs are not in the checkpoint"):
        streamconv.convert(tmp_path / "half", tmp_path / "out2", base=tmp_path / "released")
    megatron.save(tmp_path / "all", model.config, walk, options, walk.made)
    with pytest.raises(UsageError, match="nothing of the model is left out"):
        streamconv.convert(tmp_path / "all", tmp_path / "out3", base=tmp_path / "released")


# --- checkpoints that Megatron-Bridge wrote ----------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "qwen2_5_vl"])
@pytest.mark.usefixtures("planned_here")
def test_what_megatron_bridge_wrote_becomes_the_model_it_came_from(
    name: str, shared_checkpoints: Path, tmp_path: Path
) -> None:
    root = shared_checkpoints / "families" / name
    streamconv.convert(
        root / "mg",
        tmp_path / "out",
        hf_config=root / "hf",
        sync=False,
        dtype="auto",  # Bridge wrote float32 of a bfloat16 model where it has a vision tower
    )
    assert differences(read_model(tmp_path / "out"), read_truth(root / "hf")) == []


# --- and others, with the model they came from -----------------------------------------------------


REAL = {  # folder of the checkpoint: the answer beside it
    "family_deepseek_v32": "hf",
    "family_hy_v3": "hf",
    "hybrid_model_019": "hf_answer",
    "qwen35_trainers/core": "../hf",
    "qwen35_trainers/slime_hf": "../hf",
    "qwen35_trainers/slime_mg": "../hf",
    "qwen35_trainers/swift": "../hf",
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.usefixtures("planned_here")
def test_real_checkpoints_become_the_model_they_came_from(
    name: str, shared_checkpoints: Path, tmp_path: Path
) -> None:
    root = shared_checkpoints / "megatron_cases" / name
    answer = (root / REAL[name]).resolve()
    streamconv.convert(root / "iter_0000001", tmp_path / "out", hf_config=answer, sync=False)
    assert differences(read_model(tmp_path / "out"), read_truth(answer)) == []
