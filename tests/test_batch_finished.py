"""Batches over models that training leaves finished in its steps, and markers of whole steps."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scripts.makers import runs
from streamconv.batch.cycle import Batch
from streamconv.batch.discover import discover
from streamconv.batch.settings import settings

HOUR = 3600


def finished(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    save_file({"w": torch.full((4,), value)}, folder / "model.safetensors")
    return folder


def aged(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (then, then))


def batch(run: Path, out: Path, **options: object) -> Batch:
    return Batch(
        settings({"run": [{"root": run, "output": out, "layout": "memory", **options}]}),
        lambda *_: None,
    )


@pytest.fixture
def megatron(tmp_path: Path) -> Path:
    """Return a run of verl's with Megatron: a finished model beside states of training."""
    actor = tmp_path / "run" / "global_step_5" / "actor"
    finished(actor / "model" / "huggingface")
    for state in ("optimizer", "extra"):
        (actor / state / "dist_ckpt").mkdir(parents=True)
        (actor / state / "dist_ckpt" / "metadata.json").write_text(
            '{"sharded_backend": "torch_dist"}'
        )
        (actor / state / "dist_ckpt" / ".metadata").write_bytes(b"x")
    return tmp_path / "run"


def test_a_finished_model_in_a_step_is_converted_and_its_states_are_not(
    megatron: Path, tmp_path: Path
) -> None:
    aged(megatron, 2 * HOUR)
    actor = megatron / "global_step_5" / "actor"
    (actor / "ckpt_contents.json").write_text("{}")
    told: list[str] = []
    (found,) = discover(megatron, on_notice=told.append)
    assert (found.model, found.step, found.finished, told) == ("actor", 5, True, [])
    made = batch(megatron, tmp_path / "out", verify=True, delete_sources=True).round()
    assert (made.exit_code, made.counts) == (0, {"converted": 1})
    assert (tmp_path / "out" / "global_step_5" / "actor" / "model.safetensors").is_file()
    assert ["finished model" in r.refused for r in made.removals] == [True]
    assert batch(megatron, tmp_path / "out").round().counts == {"done": 1}


@pytest.mark.parametrize("marker", ["ckpt_contents.json", "CHECKPOINT_COMPLETE"])
def test_what_its_trainer_marks_as_whole_is_not_waited_for(
    marker: str, megatron: Path, tmp_path: Path
) -> None:
    """Unless it was written to since."""
    assert batch(megatron, tmp_path / "out").round().counts == {"waiting": 1}
    actor = megatron / "global_step_5" / "actor"
    (actor / marker).write_text("{}")
    aged(actor / "model", 5)
    made = batch(megatron, tmp_path / "out").round()
    assert made.counts == {"converted": 1}
    shutil.rmtree(actor / "model" / "huggingface")
    finished(actor / "model" / "huggingface", 2.0)
    later = time.time() + 5
    os.utime(actor / "model" / "huggingface" / "model.safetensors", (later, later))
    assert batch(megatron, tmp_path / "out").round().counts == {"waiting": 1}


def test_a_finished_model_beside_a_checkpoint_or_outside_a_step_is_passed_over(
    lone_rank_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    runs.add_step(run, 10, lone_rank_file)
    finished(run / "global_step_10" / "merged")
    finished(run / "base")
    (run / "wandb").mkdir()
    torch.save({"w": torch.ones(2)}, run / "wandb" / "model.pt")
    own = finished(run / "global_step_20" / "made")
    (own / "streamconv.json").write_text(json.dumps({}))
    told: list[str] = []
    found = discover(run, on_notice=told.append)
    assert [c.relative.as_posix() for c in found] == ["global_step_10/actor"]
    (run / "wandb").rename(run / "global_step_30")
    assert [c.step for c in discover(run)] == [10, 30]
    assert ["beside what was trained" in t for t in told] == [True]
