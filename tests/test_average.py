"""Averages of checkpoints: what torch adds up in float64, divides once and rounds once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from scripts.makers.dcp import save_alone
from scripts.makers.ranks import write_ranks
from streamconv.errors import (
    BadInputError,
    OutputExistsError,
    SourceChangedError,
    UnfitValuesError,
    UsageError,
)
from streamconv.ir.boxes import contiguous_strides
from streamconv.ir.dtypes import BF16, BY_NAME, F32, DType
from streamconv.ir.recipe import Cast, Encode, Recipe, SourceRef, Sum, Term, View
from streamconv.options import AverageOptions, JobOptions
from tests.scenes import cli
from tests.test_dequantize import spread
from tests.test_executor import Source, execute, make_plan
from tests.test_quantization import CONFIG, FP8, SHAPES, State, checkpoint, fp8, released
from tests.test_quantize import by_torch

pytestmark = pytest.mark.usefixtures("planned_here")

F64, I64 = BY_NAME["F64"], BY_NAME["I64"]


def step(seed: int, dtype: torch.dtype = torch.bfloat16) -> State:
    torch.manual_seed(seed)
    return {n: torch.randn(s).to(dtype) for n, s in SHAPES.items()}


def summed(states: list[State], weights: list[float], divisor: float = 1.0) -> State:
    """Return what is said to come out, as float32."""
    made = {}
    for name in states[0]:
        total = weights[0] * states[0][name].double()
        for weight, state in zip(weights[1:], states[1:], strict=True):
            total = total + weight * state[name].double()
        made[name] = (total / divisor).float()
    return made


def folders(root: Path, states: list[State], **config: Any) -> list[Path]:
    return [checkpoint(root / f"step_{k}", s, **config) for k, s in enumerate(states)]


def assert_made(out: Path, expected: State) -> None:
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


# --- one tensor at a time ---------------------------------------------------------------------------


def whole(fqn: str, array: np.ndarray, dtype: DType) -> tuple[DType, View]:
    shape = array.shape
    return dtype, View(SourceRef(fqn, shape), shape, contiguous_strides(shape))


def of(terms: list[tuple[DType, View]], weights: list[float], divisor: float, dtype: DType) -> View:
    shape = terms[0][1].shape
    parts = tuple(Term(w, d, v) for w, (d, v) in zip(weights, terms, strict=True))
    ops = (Cast(dtype),) if dtype.castable else ()
    return View(Sum(shape, parts, divisor), shape, contiguous_strides(shape), 0, ops)


@pytest.mark.parametrize(("weights", "divisor"), [([1.0, 1.0, 1.0], 3.0), ([0.2, -0.3, 0.5], 1.0)])
def test_the_bytes_depend_on_neither_cuts_windows_nor_readers(
    weights: list[float], divisor: float, tmp_path: Path
) -> None:
    rng = np.random.default_rng(7)
    arrays = [
        (rng.standard_normal((43, 50)) * 10.0 ** rng.integers(-9, 9, (43, 50))) for _ in "abc"
    ]
    one = torch.from_numpy(arrays[0]).bfloat16()
    terms = [
        one.double(),
        torch.from_numpy(arrays[1]).float().double(),
        torch.from_numpy(arrays[2]),
    ]
    total = weights[0] * terms[0] + weights[1] * terms[1] + weights[2] * terms[2]
    expected = (total / divisor).float()
    codes, scale = by_torch(expected, 16, 16, "fp8-block")
    found = set()
    for k, cuts in enumerate(([[], []], [[3, 17, 30], []], [[6], [11, 20]])):
        folder = tmp_path / str(k)
        folder.mkdir()
        source = Source(folder, 2)
        source.add("a", one.view(torch.int16).numpy(), BF16, cuts)
        source.add("b", arrays[1].astype(np.float32), F32, [[], [5]])
        source.add("c", arrays[2], F64, cuts)
        source.add("n", np.arange(7), I64, [[2]])
        parts = [whole(n, a, d) for n, a, d in zip("abc", arrays, (BF16, F32, F64), strict=True)]
        plain = of(parts, weights, divisor, F32)
        encode = Encode("fp8-block", (16, 16), (43, 50), "codes")
        recipes = [
            Recipe("wide", F32, plain),
            Recipe("narrow", BF16, of(parts, weights, divisor, BF16)),
            Recipe("count", I64, of([whole("n", np.arange(7), I64)] * 3, weights, divisor, I64)),
            Recipe("q", BY_NAME["F8_E4M3"], plain, encode),
            Recipe("s", F32, plain, Encode("fp8-block", (16, 16), (43, 50), "scales")),
        ]
        plan = make_plan(source, recipes)
        for window, threads in ((64, 1), (700, 3), (1 << 16, 1)):
            out = folder / str(window)
            out.mkdir()
            execute(plan, out, window, threads)
            made = load_file(out / "model.safetensors")
            assert torch.equal(made["wide"], expected)
            assert torch.equal(made["narrow"], expected.bfloat16())
            assert torch.equal(made["count"], torch.arange(7))
            assert torch.equal(made["q"].view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(made["s"], scale)
            found.add((out / "model.safetensors").read_bytes())
    assert len(found) == 1


def test_the_first_term_sets_the_sum(tmp_path: Path) -> None:
    """-0 is -0, which 0 + -0 is not."""
    source = Source(tmp_path, 1)
    zeros = np.array([-0.0, 0.0, 1.5], np.float32)
    source.add("z", zeros, F32, [[]])
    term = whole("z", zeros, F32)
    plan = make_plan(source, [Recipe("z", F32, of([term, term], [1.0, 1.0], 2.0, F32))])
    out = tmp_path / "out"
    out.mkdir()
    execute(plan, out, 4096)
    assert load_file(out / "model.safetensors")["z"].numpy().tobytes() == zeros.tobytes()


# --- whole checkpoints ------------------------------------------------------------------------------


def test_mean_weights_moving_average_and_difference(tmp_path: Path) -> None:
    states = [step(k) for k in range(3)]
    made = folders(tmp_path, states)
    streamconv.average(made, tmp_path / "mean", sync=False)
    assert_made(tmp_path / "mean", bf16(summed(states, [1, 1, 1], 3)))
    streamconv.average(made, tmp_path / "weighted", weights=[0.2, 0.3, 0.5], sync=False)
    assert_made(tmp_path / "weighted", bf16(summed(states, [0.2, 0.3, 0.5])))
    streamconv.average(made, tmp_path / "moving", ema=0.75, sync=False)
    assert_made(tmp_path / "moving", bf16(summed(states, [0.5625, 0.1875, 0.25])))
    streamconv.average(made, tmp_path / "wide", dtype="float32", sync=False)
    assert_made(tmp_path / "wide", summed(states, [1, 1, 1], 3))
    streamconv.difference(made[2], made[0], tmp_path / "difference", sync=False)
    exact = {n: states[2][n].float() - states[0][n].float() for n in SHAPES}
    assert_made(tmp_path / "difference", exact)
    assert json.loads((tmp_path / "difference/config.json").read_text())["dtype"] == "float32"
    for name in ("mean", "weighted", "moving", "wide", "difference"):
        assert streamconv.verify(tmp_path / name).passed


def bf16(state: State) -> State:
    return {n: t.bfloat16() for n, t in state.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_mean_of_equal_checkpoints_is_that_checkpoint(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    state = step(5, dtype)
    made = folders(tmp_path, [state] * 3)
    streamconv.convert(made[0], tmp_path / "one", sync=False)
    for sources in (made[:1], made, [made[0], made[0]]):
        out = tmp_path / f"of_{len(sources)}"
        streamconv.average(sources, out, sync=False)
        same = [(f / "model.safetensors").read_bytes() for f in (out, tmp_path / "one")]
        assert same[0] == same[1]


def test_formats_and_meshes_may_differ(tmp_path: Path) -> None:
    states = [step(k) for k in range(4)]
    four = tmp_path / "four_ranks"
    (four / "huggingface").mkdir(parents=True)
    (four / "huggingface/config.json").write_text(json.dumps(CONFIG))
    write_ranks(four, states[1], world=4)
    save_alone(tmp_path / "dcp", states[2])
    sources = [
        checkpoint(tmp_path / "one_rank", states[0]),
        four,
        tmp_path / "dcp",
        released(tmp_path / "finished", states[3], use_cache=False, transformers_version="5.0"),
    ]
    streamconv.average(sources, tmp_path / "out", max_shard_size="8KB", sync=False)
    expected = bf16(summed(states, [1] * 4, 4))
    found: State = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    report = streamconv.verify(tmp_path / "out", source=sources)
    assert report.passed, report.problems
    assert streamconv.verify(tmp_path / "out", source=sources[0]).passed
    # In the first place stands another, of another format.
    again = streamconv.average(sources[::-1], tmp_path / "again", sync=False)
    assert again.tensors == len(SHAPES)


def test_types_that_differ_are_for_the_user_to_decide(tmp_path: Path) -> None:
    states = [step(1), step(2, torch.float32)]
    made = folders(tmp_path, states)
    with pytest.raises(BadInputError, match="several types") as caught:
        streamconv.average(made, tmp_path / "out", sync=False)
    assert "dtype" in str(caught.value.hint)
    streamconv.average(made, tmp_path / "out", dtype="bfloat16", sync=False)
    assert_made(tmp_path / "out", bf16(summed(states, [1, 1], 2)))


def test_quantized_weights_are_decoded_and_the_average_may_be_quantized(tmp_path: Path) -> None:
    torch.manual_seed(2)
    states = [fp8(), fp8()]
    for name in states[1]:
        if name.endswith("_scale_inv"):
            states[1][name] = torch.rand(states[1][name].shape) + 0.5
    made = folders(tmp_path, states, quantization_config=FP8)
    with pytest.raises(BadInputError, match="codes are not averaged"):
        streamconv.average(made, tmp_path / "out", sync=False)
    floats = [
        {
            n: s[n].float() * spread(s[f"{n}_scale_inv"], 16, 16, s[n].shape)
            if f"{n}_scale_inv" in s
            else s[n]
            for n in SHAPES
        }
        for s in states
    ]
    mean = summed(floats, [1, 1], 2)
    streamconv.average(made, tmp_path / "out", dequantize=True, sync=False)
    assert_made(tmp_path / "out", bf16(mean))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    again = tmp_path / "again"
    streamconv.average(made, again, dequantize=True, quantize="fp8-block", sync=False)
    found = load_file(again / "model.safetensors")
    for name in (n for n in SHAPES if f"{n}_scale_inv" in states[0]):
        codes, scale = by_torch(mean[name], 128, 128, "fp8-block")
        assert torch.equal(found[name].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(found[f"{name}_scale_inv"], scale)
    assert torch.equal(found["lm_head.weight"], mean["lm_head.weight"].bfloat16())
    assert streamconv.verify(again, source=made).passed


def lora(state: State, seed: int) -> State:
    """The checkpoint of a run that adapts q_proj, as PEFT names what is in it."""
    torch.manual_seed(seed)
    name = "model.layers.0.self_attn.q_proj"
    made = {}
    for key, tensor in state.items():
        weight = key.replace(f"{name}.weight", f"{name}.base_layer.weight")
        made[f"base_model.model.{weight}"] = tensor
    made[f"base_model.model.{name}.lora_A.default.weight"] = torch.randn(2, 32)
    made[f"base_model.model.{name}.lora_B.default.weight"] = torch.randn(32, 2)
    return made


def test_adapters_are_merged_before(tmp_path: Path) -> None:
    made = folders(tmp_path, [lora(step(k), 10 + k) for k in range(2)])
    models: list[State] = []
    for k, folder in enumerate(made):
        streamconv.convert(folder, tmp_path / f"merged_{k}", lora_alpha=4, sync=False)
        models.append(load_file(tmp_path / f"merged_{k}/model.safetensors"))
    streamconv.average(made, tmp_path / "out", lora_alpha=4, sync=False)
    assert_made(tmp_path / "out", bf16(summed(models, [1, 1], 2)))
    with pytest.raises(UsageError, match="sum of adapters"):
        streamconv.average(made, tmp_path / "adapter", lora="adapter")
    alone = [
        checkpoint(
            tmp_path / f"alone_{k}", {n: t for n, t in lora(step(k), k).items() if "lora" in n}
        )
        for k in range(2)
    ]
    with pytest.raises(BadInputError, match="without its base model"):
        streamconv.average(alone, tmp_path / "adapter", lora_alpha=4)


@pytest.mark.parametrize("last", ["tied", "apart", "left out"])
def test_a_tied_head_is_left_out_where_all_tie_it(last: str, tmp_path: Path) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    states = [step(k) for k in range(2)]
    states[0][head] = states[0][embedding]
    if last == "tied":
        states[1][head] = states[1][embedding]
    elif last == "left out":
        del states[1][head]
    made = folders(tmp_path, states, tie_word_embeddings=True)
    streamconv.average(made, tmp_path / "out", sync=False)
    states[1].setdefault(head, states[1][embedding])
    expected = bf16(summed(states, [1, 1], 2))
    if last != "apart":
        del expected[head]
    assert_made(tmp_path / "out", expected)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] == (last != "apart")


# --- what is not averaged ---------------------------------------------------------------------------


def test_nan_and_infinities_are_refused_with_the_name_of_the_checkpoint(tmp_path: Path) -> None:
    states = [step(k) for k in range(3)]
    states[1]["model.norm.weight"][3] = torch.nan
    states[2]["lm_head.weight"][3] = torch.inf
    made = folders(tmp_path, states)
    for k, name in ((1, "model.norm.weight"), (2, "lm_head.weight")):
        with pytest.raises(UnfitValuesError) as caught:
            streamconv.average([made[0], made[k]], tmp_path / "out", sync=False)
        assert str(made[k]) in str(caught.value.where)
        assert name in str(caught.value.where)
        assert not (tmp_path / "out").exists()


def test_counters_must_be_equal(tmp_path: Path) -> None:
    states = [step(k) for k in range(2)]
    for k, state in enumerate(states):
        state["steps"] = torch.tensor([7, 7 + k])
    made = folders(tmp_path, states)
    with pytest.raises(BadInputError, match="these differ") as caught:
        streamconv.average(made, tmp_path / "out", sync=False)
    assert str(made[1]) in str(caught.value.found)
    same = checkpoint(tmp_path / "same", {**states[1], "steps": states[0]["steps"]})
    streamconv.average([made[0], same], tmp_path / "out", sync=False)
    assert load_file(tmp_path / "out/model.safetensors")["steps"].tolist() == [7, 7]


def test_other_models_are_refused(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first", step(0))
    other = checkpoint(tmp_path / "other", step(1), rope_theta=1e6)
    with pytest.raises(BadInputError, match="another model") as caught:
        streamconv.average([first, other], tmp_path / "out")
    assert "rope_theta" in str(caught.value.found)
    streamconv.average(
        [first, other], tmp_path / "out", hf_config=first / "huggingface", sync=False
    )
    short = step(1)
    extra = short.pop("lm_head.weight")
    bare = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for k, state in enumerate((short, {**short, "lm_head.weight": extra})):
        folder = tmp_path / f"bare_{k}"
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        bare[k] = folder
    with pytest.raises(BadInputError, match="not in another"):
        streamconv.average(bare, tmp_path / "bare")
    wide = released(tmp_path / "wide", {**short, "lm_head.weight": torch.zeros(64, 16)})
    (wide / "config.json").unlink()
    with pytest.raises(BadInputError, match="another shape"):
        streamconv.average([bare[1], wide], tmp_path / "bare")


def test_weights_must_make_sense(tmp_path: Path) -> None:
    made = folders(tmp_path, [step(0), step(1)])
    for how in (
        {"weights": [1.0]},
        {"weights": [0.0, 0.0]},
        {"weights": [float("nan"), 1.0]},
        {"ema": 1.0},
        {"ema": 0.5, "weights": [1.0, 1.0]},
    ):
        with pytest.raises(UsageError):
            streamconv.average(made, tmp_path / "out", **how)
    with pytest.raises(UsageError):
        streamconv.average([], tmp_path / "out")
    with pytest.raises(BadInputError, match="no such checkpoint"):
        streamconv.average([made[0], tmp_path / "gone"], tmp_path / "out")
    with pytest.raises(UsageError):
        streamconv.average(made, made[1])  # its own source


# --- the job ----------------------------------------------------------------------------------------


def test_the_job_names_every_source_and_weight(tmp_path: Path) -> None:
    made = folders(tmp_path, [step(k) for k in range(3)])
    out = tmp_path / "out"
    assert streamconv.average(made, out, weights=[1, 2, 3], sync=False).status == "done"
    assert streamconv.average(made, out, weights=[1, 2, 3], sync=False).status == "nothing-to-do"
    job = json.loads((out / "streamconv.json").read_text())["job"]
    assert job["options"]["average"]["weights"] == [1, 2, 3]
    assert job["others"] == [str(p) for p in made[1:]]
    assert [name for name, *_ in job["inputs"]] == [
        *("2/", "2/model_world_size_1_rank_0.pt", "3/", "3/model_world_size_1_rank_0.pt")
    ]
    for sources, weights in (
        (made, [1, 2, 4]),
        (made[:2], [1, 2]),
        ([made[0], made[2], made[1]], [1, 2, 3]),
    ):
        with pytest.raises(OutputExistsError):
            streamconv.average(sources, out, weights=weights, sync=False)
    with pytest.raises(OutputExistsError, match="weights"):
        streamconv.convert(made[0], out, sync=False)
    notices = json.loads((out / "streamconv.json").read_text())["notices"]
    assert any("add up to 6" in n for n in notices)
    # Where they lie is no part of it.
    moved = [p.rename(tmp_path / f"moved_{k}") for k, p in enumerate(made)]
    assert streamconv.average(moved, out, weights=[1, 2, 3], sync=False).status == "nothing-to-do"
    with pytest.raises(UsageError, match="is gone"):
        streamconv.verify(out, source=moved[0])
    assert streamconv.verify(out, source=moved).passed
    assert not streamconv.verify(out, source=[moved[0], moved[2], moved[1]]).passed


def test_another_source_that_changes_is_seen(tmp_path: Path) -> None:
    made = folders(tmp_path, [step(0), step(1)])
    plan = streamconv.plan(
        made[0], average=AverageOptions.mean(made[1:]), output=tmp_path / "plan.jsonl"
    )
    assert plan.head.totals.summed == len(SHAPES)
    torch.save(step(2), made[1] / "model_world_size_1_rank_0.pt")
    with pytest.raises((SourceChangedError, BadInputError)):
        streamconv.run(tmp_path / "plan.jsonl", tmp_path / "out", sync=False)
    torch.save(step(1), made[1] / "model_world_size_1_rank_0.pt")
    streamconv.plan(made[0], average=AverageOptions.mean(made[1:]), output=tmp_path / "other.jsonl")
    streamconv.run(tmp_path / "other.jsonl", tmp_path / "out", sync=False)
    assert_made(tmp_path / "out", bf16(summed([step(0), step(1)], [1, 1], 2)))


def test_parts_are_written_and_published_as_of_any_conversion(tmp_path: Path) -> None:
    states = [step(0), step(1)]
    made = folders(tmp_path, states)
    average = AverageOptions.mean(made[1:])
    out = tmp_path / "out"
    streamconv.begin(made[0], out, average=average, max_shard_size="4KB", sync=False)
    streamconv.part(out, "1/2")
    begun = streamconv.begin(made[0], out, average=average, max_shard_size="4KB", sync=False)
    assert begun.finished
    streamconv.part(out, "2/2")
    streamconv.finish(out)
    assert streamconv.verify(out, source=made).passed


def test_options_survive_the_way_through_json() -> None:
    job = JobOptions(average=AverageOptions.moving([Path("/b"), Path("/c")], 0.9))
    assert JobOptions.from_json(json.loads(json.dumps(job.to_json()))) == job
    assert JobOptions.from_json(JobOptions().to_json()) == JobOptions()


def test_the_commands(tmp_path: Path) -> None:
    states = [step(0), step(1)]
    made = [str(p) for p in folders(tmp_path, states)]
    out = tmp_path / "out"
    done = cli("average", *made, str(out), "--weights", "0.25,0.75", "--no-sync")
    assert done.returncode == 0, done.stderr
    assert_made(out, bf16(summed(states, [0.25, 0.75])))
    sources = [word for path in made for word in ("--source", path)]
    assert cli("verify", str(out), *sources).returncode == 0
    changed = tmp_path / "changed"
    assert cli("difference", *made, str(changed), "--no-sync").returncode == 0
    assert_made(changed, {n: states[0][n].float() - states[1][n].float() for n in SHAPES})
    wrong = cli("average", *made, str(tmp_path / "x"), "--weights", "a,b")
    assert wrong.returncode == 2
    assert "weights" in wrong.stderr


def test_an_output_is_averaged_with_what_training_wrote(tmp_path: Path) -> None:
    """Its config.json says the same under other names, for older readers, and is quantized."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    states = [step(k) for k in range(2)]
    made = folders(tmp_path, states, **rope)
    streamconv.convert(made[1], tmp_path / "finished", quantize="fp8-block", sync=False)
    assert "rope_theta" in json.loads((tmp_path / "finished/config.json").read_text())
    sources = [made[0], tmp_path / "finished"]
    streamconv.average(sources, tmp_path / "out", dequantize=True, sync=False)
    assert streamconv.verify(tmp_path / "out", source=sources).passed
