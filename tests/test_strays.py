"""Several models in one checkpoint, and what is not a weight: asked about, chosen, skipped."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streamconv
from scripts.makers.ranks import write_ranks
from streamconv import formats
from streamconv.errors import OutputExistsError, UsageError
from streamconv.ir.planfile import Plan
from streamconv.options import JobOptions
from streamconv.planning.build import build_plan
from streamconv.planning.strays import models_in, trainer_state
from tests.hf_models import MOE, TINY, dense, meta_of, sparse

LAYERS = [f"layers.{k}.{part}.weight" for k in range(3) for part in ("up", "down", "norm")]


def below(prefix: str, names: Iterable[str]) -> list[str]:
    return [prefix + name for name in names]


# --- where no model is known ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [("", "ema."), ("model.", "ema."), ("model.", "model_ema."), ("", "ref_model."),
     ("policy.", "reference."), ("student.", "teacher."), ("online.", "target."),
     ("online_model.", "ema_model."), ("state.model.", "state.ema."), ("net.", "target_net."),
     ("", "module.ema."), ("actor.", "critic."), ("model.", "old_policy.")],
)  # fmt: skip
def test_words_of_trainers_tell_a_copy(first: str, second: str) -> None:
    names = below(first, [*LAYERS, "head.weight"]) + below(second, LAYERS)
    found = models_in(names, None)
    assert len(found) == 2
    assert set(found[second]) == set(below(second, LAYERS))
    (other,) = found.keys() - {second}
    assert other == first


@pytest.mark.parametrize(
    "names",
    [
        LAYERS,
        below("ema.", LAYERS),
        below("encoder.", LAYERS) + below("decoder.", LAYERS),
        below("text_model.", LAYERS) + below("vision_model.", LAYERS),
        [*LAYERS, "reference_points.weight", "reference.weight", "target_embedding.weight"],
        ["ema.weight", "weight"],
        [],
    ],
)
def test_towers_of_one_model_are_not_copies(names: list[str]) -> None:
    assert models_in(names, None) == {}


# --- where it is ----------------------------------------------------------------------------------


def test_the_model_knows_its_names_below_any_prefix() -> None:
    meta = meta_of(sparse())
    hub, memory = list(meta.hub_shapes), list(meta.state_shapes)
    for names in (hub, memory):
        assert models_in(names, meta.has) == {}
        assert models_in([*names, "v_head.summary.weight"], meta.has) == {}
        assert models_in(below("anything.", names), meta.has) == {}
        # One layer for multi-token prediction is not a model; nor is a part of one.
        parts = [n.replace("model.layers.1.", "layers.0.") for n in names if ".layers.1." in n]
        assert models_in(names + below("mtp.", parts), meta.has) == {}
        for first, second in (("", "b."), ("a.", "b."), ("wrapped.a.", "wrapped.b.")):
            both = below(first, names) + below(second, names)
            assert {p: sorted(n) for p, n in models_in(both, meta.has).items()} == {
                first: sorted(below(first, names)),
                second: sorted(below(second, names)),
            }
        # A smaller one is told by its name.
        assert models_in(names + below("b.", parts), meta.has) == {}
        assert set(models_in(names + below("draft_model.model.", parts), meta.has)) == {
            "",
            "draft_model.",
        }


def test_markers_of_wrappers_hide_nothing() -> None:
    meta = meta_of(dense())
    names = [f"_fsdp_wrapped_module.{n}" for n in meta.state_shapes]
    assert models_in(names, meta.has) == {}
    assert len(models_in(names + below("ema.", names), meta.has)) == 2


# --- what is no weight ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "state"),
    [
        ("model.layers.0.mlp._extra_state", (7,), "U8", True),
        ("model.layers.0.mlp.up_proj.weight_quantizer._amax", (), "F32", True),
        ("model.layers.0.mlp.up_proj.input_quantizers.0._global_amax", (1,), "BF16", True),
        ("model.layers.0.mlp.up_proj.weight_quantizer._scale", (), "F32", False),
        ("rng_state", (5056,), "U8", True),
        ("cuda_rng_state_all", (16,), "U8", True),
        ("step", (), "I64", True),
        ("ema.num_updates", (1,), "I64", True),
        ("n_averaged", (), "I64", True),
        ("global_step", (), "F32", True),
        ("steps", (3, 2), "I64", False),
        ("model.step.weight", (), "F32", False),
        ("model.decay", (64,), "F32", False),
        ("norm.num_batches_tracked", (), "I64", False),
        ("rng_state", (8, 8), "F32", False),
    ],
)
def test_trainers_state(name: str, shape: tuple[int, ...], dtype: str, state: bool) -> None:
    assert (trainer_state(name, shape, dtype) is not None) == state


# --- a conversion ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model and its average, as a trainer saves both, with its counters."""
    config = sparse(**TINY, **MOE)
    generator = torch.Generator().manual_seed(0)
    state = {
        n: torch.randn(s, generator=generator) for n, s in meta_of(config).state_shapes.items()
    }
    counters = {"ema.num_updates": torch.tensor(7), "rng_state": torch.zeros(16, dtype=torch.uint8)}
    folder = tmp_path_factory.mktemp("averaged") / "actor"
    (folder / "huggingface").mkdir(parents=True)
    (folder / "huggingface" / "config.json").write_text(json.dumps(config))
    copy = {f"ema.module.{n}": t + 1 for n, t in state.items()}
    write_ranks(folder, state | copy | counters, world=2)
    return folder, state


def planned(folder: Path, model: str | None, path: Path) -> Plan:
    stream = io.StringIO()
    build_plan(formats.find_model(folder, model).read(), JobOptions(model=model), stream)
    path.write_text(stream.getvalue())
    return Plan(path)


def test_of_two_models_one_must_be_named(averaged, tmp_path: Path) -> None:
    folder, state = averaged
    with pytest.raises(UsageError, match="2 models to choose from") as caught:
        planned(folder, None, tmp_path / "plan")
    n = len(state)
    assert caught.value.found == f"main ({n} tensors), ema.module ({n} tensors)"
    assert caught.value.hint == "say which: --model main|ema.module"
    with pytest.raises(UsageError, match="no model 'critic'"):
        planned(folder, "critic", tmp_path / "plan")


def test_the_named_one_comes_out_alone_and_the_rest_is_accounted_for(averaged, tmp_path) -> None:
    folder, state = averaged
    names = {}
    for model, others in (("main", "ema.module."), ("ema.module", "")):
        plan = planned(folder, model, tmp_path / "plan")
        names[model] = {t.name for _, section in plan.sections() for t in section}
        skipped = {s.name: s.reason for s in plan.head.skipped}
        assert skipped.pop("rng_state") == "state of a random number generator"
        assert skipped.pop("ema.num_updates") == "a counter of the trainer"
        assert skipped.keys() == {others + n for n in state}
        assert set(skipped.values()) == {"another model's, not the one that --model names"}
    assert names["main"] == names["ema.module"] == set(meta_of(sparse(**TINY, **MOE)).hub_shapes)


def test_converted_and_verified(averaged, tmp_path: Path) -> None:
    folder, state = averaged
    out = tmp_path / "out"
    streamconv.convert(folder, out, model="ema.module")
    made = load_file(out / "model.safetensors")
    assert torch.equal(made["model.norm.weight"], state["model.norm.weight"] + 1)
    down = state["model.layers.1.mlp.experts.down_proj"][2] + 1
    assert torch.equal(made["model.layers.1.mlp.experts.2.down_proj.weight"], down)
    assert streamconv.verify(out, source=folder).passed


@pytest.mark.usefixtures("planned_here")
def test_another_model_of_a_checkpoint_is_another_output(tmp_path: Path) -> None:
    folder, out, state = tmp_path / "src", tmp_path / "out", {n: torch.randn(4, 4) for n in LAYERS}
    folder.mkdir()
    write_ranks(folder, state | {f"ema.{n}": t + 1 for n, t in state.items()}, world=1)
    options: dict[str, Any] = {"layout": "memory", "sync": False}
    assert streamconv.convert(folder, out, model="main", **options).status == "done"
    assert streamconv.convert(folder, out, model="main", **options).status == "nothing-to-do"
    with pytest.raises(OutputExistsError, match="made with --model main"):
        streamconv.convert(folder, out, model="ema", **options)
    streamconv.convert(folder, out, model="ema", overwrite=True, **options)
    (made,) = out.glob("*.safetensors")
    name = next(iter(state))
    assert torch.equal(load_file(made)[name], state[name] + 1)
    assert streamconv.verify(out, source=folder).passed


def test_without_a_config_the_prefix_of_the_named_one_goes(tmp_path: Path) -> None:
    state = {n: torch.randn(4, 3) for n in LAYERS}
    write_ranks(tmp_path, state | {f"ema.{n}": t + 1 for n, t in state.items()}, world=2)
    with pytest.raises(UsageError, match="2 models to choose from"):
        planned(tmp_path, None, tmp_path / "plan")
    plan = planned(tmp_path, "ema", tmp_path / "plan")
    sources = {
        t.name: [s.fqn for s in t.sources] for _, section in plan.sections() for t in section
    }
    assert sources == {n: [f"ema.{n}"] for n in LAYERS}
