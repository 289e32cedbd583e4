"""DeepSpeed folders that are damaged, incomplete, mixed, hostile, or hold more than one checkpoint."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import enum
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streamconv
from scripts.makers import models, zero
from scripts.outputs import differences, read_model
from streamconv import formats
from streamconv.batch.discover import discover
from streamconv.batch.ready import read_tracker
from streamconv.errors import BadInputError, StreamconvError, UnsafeInputError, UsageError
from streamconv.formats.deepspeed import checkpoint
from streamconv.ir.source import Checkpoint
from streamconv.options import Event, Progress
from tests.stored import stored


def run(**changes: Any) -> zero.Run:
    generator = torch.Generator().manual_seed(5)
    shapes = {"a.weight": (33, 7), "a.bias": (33,), "b.weight": (5, 33), "norm.weight": (7,)}
    named = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    groups = [{n: t for n, t in named.items() if (t.ndim == 2) == two} for two in (True, False)]
    return zero.Run(groups, **{"ranks": 3, **changes})


FROZEN = {"frozen.weight": torch.arange(22.0).reshape(2, 11).bfloat16()}


def read(folder: Path) -> Checkpoint:
    return formats.find_model(folder).read()


def assert_right(found: Checkpoint, made: zero.Run) -> None:
    values = stored(found)
    assert values.keys() == made.truth.keys()
    assert all(torch.equal(values[n], t) for n, t in made.truth.items())


def optimizer_file(tag: Path, rank: int) -> Path:
    return tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model_file(tag: Path, rank: int | None = None) -> Path:
    name = "" if rank is None else f"zero_pp_rank_{rank}_"
    return tag / f"{name}mp_rank_00_model_states.pt"


def change(path: Path, **values: Any) -> None:
    """Write a file anew with other values in its dict, or in its optimizer state."""
    with zero.deepspeed_names():
        held = torch.load(path, weights_only=False)
        held.update(values)
        torch.save(held, path)


def change_state(path: Path, **values: Any) -> None:
    with zero.deepspeed_names():
        held = torch.load(path, weights_only=False)
        held["optimizer_state_dict"].update(values)
        torch.save(held, path)


# Which folder


def test_the_tag_that_latest_names_is_taken_and_any_by_its_folder(tmp_path: Path) -> None:
    first, second = run(), run(stage=3)
    old = zero.write(first, tmp_path)
    old = old.rename(tmp_path / "global_step1")
    zero.write(second, tmp_path)
    assert_right(read(tmp_path), second)
    assert_right(read(old), first)
    assert_right(read(old / "mp_rank_00_model_states.pt"), first)
    (tmp_path / "latest").write_text("global_step1")
    assert_right(read(tmp_path), first)


def test_without_latest_one_of_several_steps_must_be_named(tmp_path: Path) -> None:
    zero.write(run(), tmp_path).rename(tmp_path / "global_step1")
    zero.write(run(), tmp_path)
    (tmp_path / "latest").unlink()
    with pytest.raises(UsageError, match="2 training steps"):
        read(tmp_path)


@pytest.mark.parametrize("said", ["global_step9", "../elsewhere", "", ".", "global_step3/"])
def test_latest_that_leads_nowhere_is_not_followed(tmp_path: Path, said: str) -> None:
    made = run()
    zero.write(made, tmp_path)
    (tmp_path / "latest").write_text(said)
    assert_right(read(tmp_path), made)


def test_folders_of_transformers_and_accelerate_are_the_checkpoint(tmp_path: Path) -> None:
    made = run()
    there = tmp_path / "checkpoint-3"
    zero.write(made, there)
    (there / "config.json").write_text('{"model_type": "llama"}')
    location = formats.find_model(there)
    assert location.root == there
    assert location.side_dir == there
    assert formats.find_model(there / zero.TAG).side_dir == there
    assert_right(location.read(), made)
    state = tmp_path / "state"
    zero.write(made, state).rename(state / "pytorch_model")
    (state / "latest").write_text("pytorch_model")
    assert_right(read(state), made)


def test_a_universal_folder_beside_is_not_taken_for_the_checkpoint(tmp_path: Path) -> None:
    made = run()
    tag = zero.write(made, tmp_path)
    shutil.copytree(tag, tmp_path / f"{zero.TAG}_universal")
    (tmp_path / "latest_universal").write_text(f"{zero.TAG}_universal")
    assert read(tmp_path).facts["tag"] == zero.TAG


def test_models_of_openrlhf_are_found_by_their_folders(tmp_path: Path) -> None:
    actor, critic = run(), run(stage=3)
    zero.write(run(ranks=1), tmp_path / "_actor").rename(tmp_path / "_actor" / "global_step1")
    zero.write(actor, tmp_path / "_actor")
    zero.write(critic, tmp_path / "_critic")
    assert formats.model_names(tmp_path) == ("_actor", "_critic")
    found = formats.find_model(tmp_path, "_actor")
    assert found.root == tmp_path / "_actor" / zero.TAG
    assert_right(found.read(), actor)
    assert_right(formats.find_model(tmp_path, "_critic").read(), critic)


def test_batch_takes_steps_of_deepspeed_and_of_transformers(tmp_path: Path) -> None:
    raw, trained = tmp_path / "raw", tmp_path / "trained"
    raw.mkdir()
    for step in (3, 6):
        zero.write(run(stage=3), tmp_path / str(step)).rename(raw / f"global_step{step}")
        tag = zero.write(run(), trained / f"checkpoint-{step}")
        if step != 3:
            tag.rename(tag.parent / f"global_step{step}")
        (tag.parent / "latest").write_text(f"global_step{step}")
    (raw / "latest").write_text("global_step6")
    for place, names in (
        (raw, ["global_step3", "global_step6"]),
        (trained, ["checkpoint-3", "checkpoint-6"]),
    ):
        notices: list[str] = []
        found = discover(place, on_notice=notices.append)
        assert [c.relative.as_posix() for c in found] == names
        assert [(c.step, c.model, c.format) for c in found] == [
            (3, "", "deepspeed"),
            (6, "", "deepspeed"),
        ]
        assert {c.run_dir for c in found} == {place}
        assert notices == []
    tracker = read_tracker(raw)
    assert tracker is not None
    assert tracker.step == 6


def test_a_universal_folder_has_masters_of_what_was_trained_alone(tmp_path: Path) -> None:
    made = run(frozen=FROZEN, shared={"other.name": "a.weight"})
    tag = zero.write(made, tmp_path)
    for rank in range(3):
        optimizer_file(tag, rank).unlink()
    universal = tag.rename(tmp_path / f"{zero.TAG}_universal")
    (tmp_path / "latest").rename(tmp_path / "latest_universal")
    (tmp_path / "latest_universal").write_text(universal.name)
    trained = {n: t for g in made.groups for n, t in g.items()}
    upcast = {
        n: t.bfloat16().float() for n, t in {**FROZEN, "other.name": trained["a.weight"]}.items()
    }
    for name, tensor in {**trained, **upcast}.items():
        (universal / "zero" / name).mkdir(parents=True)
        zero.save({"param": tensor, "cat_dim": 0}, universal / "zero" / name / "fp32.pt")
    found = read(tmp_path)
    assert_right(found, made)
    assert found.halves.keys() == {*trained, "other.name"}


def test_identify_names_the_files_that_are_read(tmp_path: Path) -> None:
    zero.write(run(stage=3, frozen=FROZEN), tmp_path)
    location = formats.find_model(tmp_path)
    files = location.read().files
    assert [(f.path, f.nbytes, f.directory_hash) for f in location.identify()] == [
        (f.path, f.nbytes, f.directory_hash) for f in files
    ]
    assert len(files) == 6


# What is missing


def test_stages_1_and_2_do_without_optimizer_files(tmp_path: Path) -> None:
    made = run(frozen=FROZEN)
    tag = zero.write(made, tmp_path)
    for rank in range(3):
        optimizer_file(tag, rank).unlink()
    found = read(tmp_path)
    values = stored(found)
    assert torch.equal(values["a.weight"], made.truth["a.weight"].bfloat16())
    assert torch.equal(values["frozen.weight"], FROZEN["frozen.weight"])
    assert any("no optimizer files" in n for n in found.notices)


def test_stage_3_without_optimizer_files_is_refused(tmp_path: Path) -> None:
    tag = zero.write(run(stage=3), tmp_path)
    for rank in range(3):
        optimizer_file(tag, rank).unlink()
    with pytest.raises(BadInputError, match="stage 3 without its optimizer files"):
        read(tmp_path)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_optimizer_file_is_named(tmp_path: Path, stage: int, rank: int) -> None:
    tag = zero.write(run(stage=stage), tmp_path)
    optimizer_file(tag, rank).unlink()
    with pytest.raises(BadInputError, match=f"zero_pp_rank_{rank}_mp_rank_00"):
        read(tmp_path)


def test_the_model_file_is_needed(tmp_path: Path) -> None:
    tag = zero.write(run(), tmp_path)
    model_file(tag).unlink()
    with pytest.raises(BadInputError, match="model file is missing"):
        read(tmp_path)


def test_stage_3_does_with_rank_0s_model_file_unless_something_is_frozen(tmp_path: Path) -> None:
    made = run(stage=3)
    tag = zero.write(made, tmp_path / "a")
    for rank in (1, 2):
        model_file(tag, rank).unlink()
    assert_right(read(tag), made)
    tag = zero.write(run(stage=3, frozen=FROZEN), tmp_path / "b")
    model_file(tag, 1).unlink()
    with pytest.raises(BadInputError, match="of frozen parameters each rank has a piece"):
        read(tag)


def test_frozen_parameters_that_were_excluded_are_told_of(tmp_path: Path) -> None:
    tag = zero.write(run(stage=3, frozen=FROZEN), tmp_path)
    for rank in range(3):
        change(model_file(tag, rank), frozen_param_fragments=collections.OrderedDict())
    found = read(tag)
    assert "frozen.weight" not in found.tensors
    assert any("frozen.weight" in n and "saved without" in n for n in found.notices)


def test_weights_on_nvme_are_refused_with_that_word(tmp_path: Path) -> None:
    tag = zero.write(run(stage=3), tmp_path)
    for rank in range(3):
        change_state(optimizer_file(tag, rank), fp32_flat_groups=[torch.empty(0)])
    with pytest.raises(BadInputError, match="NVMe"):
        read(tag)


def test_layouts_of_old_releases_are_refused(tmp_path: Path) -> None:
    tag = zero.write(run(stage=1), tmp_path)
    path = optimizer_file(tag, 0)
    with zero.deepspeed_names():
        held = torch.load(path, weights_only=False)
        state = held["optimizer_state_dict"]
        groups = state.pop("single_partition_of_fp32_groups")
        state["local_sub_partitions_of_fp32_groups"] = groups
        torch.save(held, path)
    with pytest.raises(BadInputError, match="before 0"):
        read(tag)


# What does not belong together


def test_files_of_a_larger_world_are_left_and_told_of(tmp_path: Path) -> None:
    for stage in (2, 3):
        place = tmp_path / str(stage)
        zero.write(run(stage=stage, ranks=5), place)
        later = zero.write(run(stage=stage, ranks=2), tmp_path / f"later{stage}")
        for path in later.iterdir():
            shutil.copy(path, place / zero.TAG)
        found = read(place)
        assert_right(found, run(stage=stage))
        assert any("3 optimizer files" in n and "left over" in n for n in found.notices)


def test_optimizer_files_of_another_world_are_refused(tmp_path: Path) -> None:
    tag = zero.write(run(ranks=3), tmp_path)
    other = zero.write(run(ranks=4), tmp_path / "other")
    shutil.copy(optimizer_file(other, 1), tag)
    with pytest.raises(BadInputError, match="different runs"):
        read(tag)


@pytest.mark.parametrize("value", [{"version": "0.18.0"}, {"steps": 4}])
def test_files_of_another_save_are_refused(tmp_path: Path, value: dict[str, Any]) -> None:
    made = run(stage=3, frozen=FROZEN)
    tag = zero.write(made, tmp_path)
    other = zero.write(dataclasses.replace(made, **value), tmp_path / "other")
    shutil.copy(model_file(other, 1), tag)
    with pytest.raises(BadInputError, match="different saves"):
        read(tag)


@pytest.mark.parametrize("stage", [1, 3])
def test_optimizer_files_of_another_step_are_refused(tmp_path: Path, stage: int) -> None:
    made = run(stage=stage)
    tag = zero.write(made, tmp_path)
    other = zero.write(dataclasses.replace(made, steps=6), tmp_path / "other")
    shutil.copy(optimizer_file(other, 2), tag)
    with pytest.raises(BadInputError, match="different saves") as error:
        read(tag)
    assert error.value.found == "optimizer_step 6"


@pytest.mark.parametrize("ranks", [(0, 1), (2, 0)])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("of", [optimizer_file, model_file])
def test_a_file_under_the_name_of_another_rank_is_refused(
    of: Callable[[Path, int], Path], swapped: bool, ranks: tuple[int, int], tmp_path: Path
) -> None:
    # In stage 3 nothing else tells whose a file is, and there are no 16-bit weights to compare.
    tag = zero.write(run(stage=3, frozen=FROZEN), tmp_path)
    one, other = (of(tag, rank) for rank in ranks)
    kept = other.read_bytes()
    shutil.copy(one, other)
    if swapped:
        one.write_bytes(kept)
    with pytest.raises(BadInputError, match="written by another rank than its name says") as error:
        read(tag)
    assert error.value.found in (one.stem, other.stem)


def test_two_runs_with_two_prefixes_are_refused(tmp_path: Path) -> None:
    tag = zero.write(run(), tmp_path)
    shutil.copy(optimizer_file(tag, 0), tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(BadInputError, match="two files for one rank"):
        read(tag)


def test_shapes_that_do_not_fit_the_flat_groups_are_refused(tmp_path: Path) -> None:
    for stage in (2, 3):
        tag = zero.write(run(stage=stage), tmp_path / str(stage))
        path = model_file(tag, 0 if stage == 3 else None)
        with zero.deepspeed_names():
            groups = torch.load(path, weights_only=False)["param_shapes"]
        groups[0]["a.weight"] = torch.Size([40, 7])
        change(path, param_shapes=groups)
        with pytest.raises(BadInputError, match=r"as long as|as many"):
            read(tag)


def test_masters_and_16_bit_weights_that_disagree_are_refused(tmp_path: Path) -> None:
    made = run()
    tag = zero.write(made, tmp_path / "src")
    groups = [{n: t + 1 for n, t in g.items()} for g in made.groups]
    other = zero.write(dataclasses.replace(made, groups=groups), tmp_path / "other")
    shutil.copy(model_file(other), tag)
    with pytest.raises(BadInputError, match="4 of 4 parameters are not what the run computed with"):
        streamconv.convert(tag, tmp_path / "out", layout="memory", sync=False)
    streamconv.convert(tag, tmp_path / "half", layout="memory", masters="no", sync=False)


def test_verification_compares_every_master_with_its_16_bit_weight(tmp_path: Path) -> None:
    made = run()
    tag = zero.write(made, tmp_path / "src")
    out = tmp_path / "out"
    streamconv.convert(tag, out, layout="memory", sync=False)
    assert streamconv.verify(out, source=tag).problems == []
    # In the middle of a tensor, where planning does not look.
    with zero.deepspeed_names():
        module = torch.load(model_file(tag), weights_only=False)["module"]
    module["a.weight"][16, 3] += 1
    change(model_file(tag), module=module)
    with pytest.raises(BadInputError, match="disagree"):
        streamconv.verify(out, source=tag)


# What is damaged or hostile


def test_a_flipped_byte_in_a_flat_group_is_found(tmp_path: Path) -> None:
    tag = zero.write(run(), tmp_path / "src")
    path = optimizer_file(tag, 1)
    found = read(tag)
    number = next(k for k, f in enumerate(found.files) if f.path == path.name)
    start = next(r.start for r in found.tensors["a.weight"].shards if r.file == number)
    data = bytearray(path.read_bytes())
    data[start + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInputError, match="CRC-32"):
        streamconv.convert(tag, tmp_path / "out", layout="memory", sync=False)


@pytest.mark.parametrize("legacy", [False, True])
def test_every_truncation_is_refused(tmp_path: Path, legacy: bool) -> None:
    tag = zero.write(run(legacy=legacy), tmp_path)
    path = optimizer_file(tag, 1)
    data = path.read_bytes()
    for size in range(0, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:size])
        with pytest.raises(StreamconvError):
            read(tag)


@pytest.mark.parametrize("legacy", [False, True])
def test_random_damage_is_an_error_or_harmless(tmp_path: Path, legacy: bool) -> None:
    made = run(legacy=legacy, stage=3, frozen=FROZEN)
    tag = zero.write(made, tmp_path)
    generator = torch.Generator().manual_seed(1)
    for path in (model_file(tag, 0), optimizer_file(tag, 0)):
        good = path.read_bytes()
        for _ in range(60):
            data = bytearray(good)
            at = int(torch.randint(0, min(len(data), 6000), (1,), generator=generator))
            data[at] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
            path.write_bytes(data)
            with contextlib.suppress(StreamconvError):
                read(tag)
        path.write_bytes(good)
    assert_right(read(tag), made)


class Call:
    """Calls something when it is unpickled, as a hostile file would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class Colour(enum.Enum):
    RED = 1


class Own(dict):  # type: ignore[type-arg]
    """A dict of the trainer's own."""


@pytest.mark.parametrize("legacy", [False, True])
def test_a_client_state_of_anything_is_passed_over(tmp_path: Path, legacy: bool) -> None:
    marker = tmp_path / "marker"
    client = {
        "args": argparse.Namespace(lr=1.0),
        "call": Call(marker),
        "default": collections.defaultdict(list, {"a": [1]}),
        "keys": {Colour.RED: 1, (1, 2): 2, frozenset({3}): 3},
        "own": Own(a=1),
        "set": {1, Colour.RED},
        "deque": collections.deque([1, 2]),
        "counter": collections.Counter("aab"),
        "rng": torch.get_rng_state(),
        "path": Path("x"),
    }
    made = run(client=client, legacy=legacy)
    zero.write(made, tmp_path)
    found = read(tmp_path)
    assert_right(found, made)
    assert set(client) <= {s.name for s in found.skipped}
    assert not marker.exists()


def test_a_weight_that_is_a_call_is_refused_and_not_made(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    tag = zero.write(run(), tmp_path)
    change_state(
        optimizer_file(tag, 0),
        single_partition_of_fp32_groups=[Call(marker), torch.zeros(3)],
    )
    with pytest.raises(BadInputError, match="other than a plain tensor"):
        read(tag)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("param_shapes", [{"a.weight": (1 << 70, 2)}]),
        ("param_shapes", [{"a.weight": (True, 2)}]),
        ("param_shapes", [{"a.weight": (-1, 2)}]),
        ("param_shapes", [{"a.weight": [1.5]}]),
        ("param_shapes", [{"a.weight": (1,) * 1000}]),
        ("param_shapes", [{"a.weight": "ab"}]),
        ("param_shapes", ["a"]),
        ("param_shapes", [{1: (2,)}]),
        ("shared_params", {"x": 3}),
        ("buffer_names", {"x": 3}),
        ("module", [1, 2]),
        ("mp_world_size", 0),
        ("mp_world_size", 5),
        ("mp_world_size", 1 << 19),
    ],
)
def test_values_that_no_release_writes_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    tag = zero.write(run(), tmp_path)
    change(model_file(tag), **{key: value})
    with pytest.raises((BadInputError, UnsafeInputError)):
        read(tag)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partition_count", [0, 0]),
        ("partition_count", ["3", "3"]),
        ("partition_count", [1 << 40, 3]),
        ("partition_count", None),
        ("partition_count", [(1 << 31) - 1, 3]),
        ("partition_count", [2, 3]),
        ("single_partition_of_fp32_groups", {"a": 1}),
        ("single_partition_of_fp32_groups", [torch.zeros(2, 2), torch.zeros(2)]),
        ("single_partition_of_fp32_groups", [torch.zeros(200)[::2], torch.zeros(2)]),
        ("single_partition_of_fp32_groups", []),
        ("param_alignment_paddings", [[1], [2]]),
        ("param_alignment_paddings", [["x"], [2]]),
        ("param_alignment_paddings", [[-5, 0], [0, 0]]),
    ],
)
def test_optimizer_values_that_no_release_writes_are_refused(
    tmp_path: Path, key: str, value: Any
) -> None:
    tag = zero.write(run(), tmp_path)
    change_state(optimizer_file(tag, 0), **{key: value})
    with pytest.raises((BadInputError, UnsafeInputError)):
        read(tag)


def test_a_pipe_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    tag = zero.write(run(), tmp_path)
    optimizer_file(tag, 1).unlink()
    os.mkfifo(optimizer_file(tag, 1))
    with pytest.raises(BadInputError, match="not a regular file"):
        checkpoint.read(tag)


# How much is read


def test_each_byte_of_a_flat_group_is_read_once(tmp_path: Path) -> None:
    made = run(ranks=4, stage=2)
    made.groups = [{f"w{k}": torch.randn(700, 301) for k in range(6)}]
    tag = zero.write(made, tmp_path / "src")
    result = streamconv.convert(tag, tmp_path / "out", layout="memory", sync=False)
    weights = sum(4 * t.numel() for t in made.truth.values())
    assert weights <= result.read_bytes < weights * 1.05


@pytest.mark.parametrize("stage", [2, 3])
def test_a_stopped_conversion_goes_on_within_a_flat_group(tmp_path: Path, stage: int) -> None:
    made = run(ranks=3, stage=stage)
    made.groups = [{f"w{k}": torch.randn(700, 301) for k in range(6)}]
    tag = zero.write(made, tmp_path / "src")
    options: dict[str, Any] = {"layout": "memory", "sync": False, "max_shard_size": "900KB"}

    class StopError(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done_bytes > event.total_bytes // 2:
            raise StopError

    with pytest.raises(StopError):
        streamconv.convert(tag, tmp_path / "out", on_event=stop, **options)
    result = streamconv.convert(tag, tmp_path / "out", **options)
    weights = sum(4 * t.numel() for t in made.truth.values())
    assert 0 < result.reused_bytes < weights
    # The checksums of what was read before are remembered: nothing is read for them again.
    assert result.read_bytes <= weights - result.reused_bytes + weights // 10
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    values = {n: t for f in files for n, t in load_file(f).items()}
    assert values.keys() == made.truth.keys()
    assert all(torch.equal(values[n], t) for n, t in made.truth.items())


def test_masters_no_is_refused_where_there_are_masters_alone(tmp_path: Path) -> None:
    tag = zero.write(run(stage=3), tmp_path / "src")
    with pytest.raises(UsageError, match="this checkpoint has none"):
        streamconv.convert(tag, tmp_path / "out", layout="memory", masters="no", sync=False)


@pytest.mark.parametrize("flat", [False, True])
def test_masters_of_a_pipeline_without_zero(flat: bool, tmp_path: Path) -> None:
    """Stage 0: the model files have masters without names, the layer files the weights in 16 bits."""
    generator = torch.Generator().manual_seed(7)
    layers = [
        {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        for shapes in (
            {"weight": (33, 8)},
            {"up.weight": (9, 8), "up.bias": (9,), "norm.weight": (8,)},
            {"up.weight": (9, 8), "up.bias": (9,), "norm.weight": (8,)},
            {"out.weight": (33, 8)},
        )
    ]
    named = [{f"{k}.{n}": t for n, t in layer.items()} for k, layer in enumerate(layers)]
    for k, layer in enumerate(layers):
        path = tmp_path / f"layer_{k:02}-model_states.pt"
        zero.save(OrderedDict((n, t.bfloat16()) for n, t in layer.items()), path)
    # The last stage has the first layer's weight, too: it is tied.
    for stage, held in enumerate((named[:2], [*named[2:], named[0]])):
        own = {n: t for layer in held for n, t in layer.items()}
        groups = [[t for t in own.values() if (t.ndim == 2) == two] for two in (True, False)]
        masters: dict[str, Any] = {"fp32_groups": groups}
        if flat:
            vectors = [torch.cat([t.flatten() for t in group]) for group in groups]
            masters = {"fp32_groups_flat": vectors}
        zero.save(
            {"module": None, "optimizer": masters, "mp_world_size": 2, "ds_version": "0.19.8"},
            tmp_path / f"mp_rank_{stage:02}_model_states.pt",
        )
    found = checkpoint.read(tmp_path)
    truth = {n: t for layer in named for n, t in layer.items()}
    values = stored(found)
    assert values.keys() == truth.keys()
    assert all(torch.equal(values[n], t) for n, t in truth.items())
    assert found.facts["weights"] == "fp32 masters"


def test_mics_writes_the_files_of_its_first_group_alone(tmp_path: Path) -> None:
    """partition_count is the size of a group then, and dp_world_size counts all ranks."""
    made = run(stage=3, ranks=2)
    tag = zero.write(made, tmp_path)
    for rank in range(2):
        change(model_file(tag, rank), dp_world_size=6)
    assert_right(read(tmp_path), made)


def test_experts_of_autoep_under_stage_3_are_refused_by_name(tmp_path: Path) -> None:
    tag = zero.write(run(stage=3, ranks=2), tmp_path)
    for rank in range(2):
        layers = [{"checkpoint_format": "zero3_partitioned"}]
        change(model_file(tag, rank), ds_autoep_layers=layers)
    with pytest.raises(BadInputError, match="AutoEP"):
        read(tmp_path)


@pytest.mark.parametrize(("arch", "stage"), [("critic", 1), ("qwen2_5_vl", 3), ("gpt_oss", 2)])
def test_masters_become_the_model_on_the_hub(arch: str, stage: int, tmp_path: Path) -> None:
    model = models.build(arch)
    named = dict(model.named_parameters())
    frozen = {n: t.detach() for n, t in named.items() if "visual" in n}
    trained = {n: t.detach() for n, t in named.items() if n not in frozen}
    both = model.state_dict().keys() - named.keys()
    shared = dict.fromkeys(both, "model.embed_tokens.weight")
    made = zero.Run([trained], stage=stage, frozen=frozen, shared=shared)
    src = tmp_path / "checkpoint-3"
    zero.write(made, src)
    model.config.save_pretrained(src)
    model.save_pretrained(tmp_path / "truth")
    streamconv.convert(src, tmp_path / "out", sync=False)
    assert not differences(read_model(tmp_path / "out"), read_model(tmp_path / "truth"))
    assert bool(frozen) == (arch == "qwen2_5_vl")


@pytest.mark.parametrize("stage", [1, 3])
def test_an_adapter_and_a_module_saved_whole(stage: int, tmp_path: Path) -> None:
    model = models.build("llama")
    whole = {f"base_model.model.{n}": t.detach() for n, t in model.state_dict().items()}
    head = "base_model.model.lm_head"
    base = {n: t for n, t in whole.items() if not n.startswith(head)}
    base[f"{head}.original_module.weight"] = whole[f"{head}.weight"]
    target = "base_model.model.model.layers.0.self_attn.q_proj"
    base[f"{target}.base_layer.weight"] = base.pop(f"{target}.weight")
    rows, columns = base[f"{target}.base_layer.weight"].shape
    # Of halves and quarters, so that every sum is exact.
    adapter = {
        f"{target}.lora_A.default.weight": torch.randint(-3, 4, (2, columns)) / 2,
        f"{target}.lora_B.default.weight": torch.randint(-3, 4, (rows, 2)) / 4,
        f"{head}.modules_to_save.default.weight": whole[f"{head}.weight"] + 1,
    }
    base[f"{target}.base_layer.weight"] = torch.randint(-9, 9, (rows, columns)).float()
    src = tmp_path / "checkpoint-3"
    zero.write(zero.Run([adapter], stage=stage, frozen=base, dtype=torch.float32), src)
    model.config.save_pretrained(src)
    streamconv.convert(src, tmp_path / "merged", lora_alpha=4, sync=False)
    made = load_file(tmp_path / "merged" / "model.safetensors")
    a, b, saved = adapter.values()
    assert torch.equal(made["lm_head.weight"], saved)
    expected = base[f"{target}.base_layer.weight"] + 2 * b @ a
    assert torch.equal(made["model.layers.0.self_attn.q_proj.weight"], expected)
    others = {n.removeprefix("base_model.model."): t for n, t in base.items()}
    assert all(torch.equal(made[n], others[n]) for n in made.keys() & others.keys())
    assert len(made.keys() & others.keys()) == len(made) - 2
    streamconv.convert(src, tmp_path / "adapter", lora_alpha=4, lora="adapter", sync=False)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(written) == 3
