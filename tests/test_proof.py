"""An output is taken for finished where a run of this user proves to have written it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from scripts.makers.tiny import make_tiny
from scripts.outputs import MANIFEST, contents
from streamconv.conversion import execution, job
from streamconv.errors import OutputExistsError, StreamconvError
from streamconv.files.durable import hash_file
from streamconv.options import Event, Notice, Result, RunOptions
from streamconv.planning import child

OPTIONS: dict[str, Any] = {"layout": "memory"}
SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "actor", "fsdp")


def convert(src: Path, out: Path, **options) -> tuple[Result, list[str]]:
    told: list[Event] = []
    options = {"sync": False, **OPTIONS, **options}
    result = streamconv.convert(src, out, **options, on_event=told.append)
    return result, [e.text for e in told if isinstance(e, Notice)]


def execute(plan: Path, out: Path, **options) -> tuple[Result, list[str]]:
    told: list[Event] = []
    result = job.run_plan(plan, out, RunOptions(sync=False, on_event=told.append, **options))
    return result, [e.text for e in told if isinstance(e, Notice)]


@pytest.fixture(params=["convert", "run"])
def command(request, tiny, tmp_path, planned_here) -> Callable[..., tuple[Result, list[str]]]:
    """Either of the two commands that make an output, called with the output and options."""
    if request.param == "convert":
        return lambda out, **options: convert(tiny, out, **options)
    plan = tmp_path / "plan.jsonl"
    streamconv.plan(tiny, output=plan, **OPTIONS)
    return lambda out, **options: execute(plan, out, **options)


def plant(out: Path) -> None:
    """Put foreign weights there, of the right names and shapes, and make the manifest fit."""
    weights = {n: torch.zeros_like(t) for n, t in load_file(out / SINGLE).items()}
    save_file(weights, out / SINGLE, metadata={"format": "pt"})
    text = json.loads((out / MANIFEST).read_text())
    text["files"][0]["nbytes"] = (out / SINGLE).stat().st_size
    text["files"][0]["xxh3_128"] = hash_file(out / SINGLE)
    (out / MANIFEST).write_text(json.dumps(text))


@pytest.mark.parametrize("seal", ["kept", "missing", "wrong"])
def test_a_planted_output_is_not_taken_for_done(seal, command, tiny, tmp_path):
    out, clean = tmp_path / "out", tmp_path / "clean"
    convert(tiny, clean)
    shutil.copytree(clean, out)
    plant(out)
    text = json.loads((out / MANIFEST).read_text())
    if seal == "missing":
        del text["run"]["seal"]
    elif seal == "wrong":
        text["run"]["seal"] = "0" * 40
    (out / MANIFEST).write_text(json.dumps(text))
    planted = contents(out)
    with pytest.raises(OutputExistsError, match="not what the source gives") as caught:
        command(out)
    assert "differs from the source" in (caught.value.found or "")
    assert "--overwrite" in (caught.value.hint or "")
    assert contents(out) == planted
    assert command(out, overwrite=True)[0].status == "done"
    assert contents(out) == contents(clean)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("added", ["modeling_evil.py", "adapter_model.safetensors"])
def test_nor_one_with_files_that_the_source_does_not_give(added, command, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command(out)
    (out / added).write_bytes(b"evil")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    with pytest.raises(OutputExistsError, match="not what the source gives") as caught:
        command(out)
    assert added in (caught.value.found or "")


def test_ones_own_is_recognized_at_once_wherever_it_was_moved(command, tmp_path, monkeypatch):
    out, moved = tmp_path / "out", tmp_path / "moved"
    command(out)
    shutil.copytree(out, moved)

    def started(*_: object, **__: object) -> dict[str, Any]:
        raise AssertionError("a child was started")

    monkeypatch.setattr(child, "_ask", started)
    monkeypatch.setattr(job, "_copied", started)
    for place in (out, moved):
        result, notices = command(place)
        assert (result.status, notices) == ("nothing-to-do", [])


@pytest.mark.parametrize("state", ["another", "/proc/none"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_that_of_another_user_is_compared_and_said_to_be(
    state, overwrite, command, tmp_path, monkeypatch
):
    """Or of another machine, or from before the key was lost."""
    out = tmp_path / "out"
    command(out)
    before = contents(out)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / state))
    result, notices = command(out, overwrite=overwrite)
    assert result.status == "nothing-to-do"
    assert len(notices) == 1
    assert "every byte was compared" in notices[0]
    assert contents(out) == before


def test_a_damaged_output_is_named_and_repaired(command, tmp_path):
    out = tmp_path / "out"
    command(out)
    before = contents(out)
    for size in (0, 5, 100, (out / SINGLE).stat().st_size - 1):
        with (out / SINGLE).open("r+b") as stream:
            stream.truncate(size)
        with pytest.raises(OutputExistsError, match="incomplete") as caught:
            command(out)
        assert f"{SINGLE} has {size} bytes" in (caught.value.found or "")
        assert command(out, overwrite=True)[0].status == "done"
        assert contents(out) == before


def test_other_weights_under_its_name_are_not_taken_for_damage(command, tmp_path):
    out = tmp_path / "out"
    command(out)
    save_file({"mine": torch.ones(3)}, out / SINGLE)
    with pytest.raises(OutputExistsError, match="were changed"):
        command(out, overwrite=True)
    assert set(load_file(out / SINGLE)) == {"mine"}


def test_a_batch_without_its_record_has_a_planted_output_compared(tiny, tmp_path):
    from streamconv.batch.tasks import take_over_finished

    out = tmp_path / "out"
    convert(tiny, out)
    digest = json.loads((out / MANIFEST).read_text())["job"]["digest"]
    assert take_over_finished(_record(out), digest, sealed=True)
    plant(out)
    assert not take_over_finished(_record(out), digest, sealed=True)


def _record(out: Path) -> Any:
    from streamconv.batch.state import Record

    return Record(name="out", output=str(out))


def test_in_a_folder_that_cannot_be_written_to_there_may_be_nothing_to_do(
    command, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    command(out)
    before = contents(out)
    monkeypatch.setattr(job.os, "access", lambda path, mode: not mode & os.W_OK)
    assert command(out)[0].status == "nothing-to-do"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    assert command(out)[0].status == "nothing-to-do"
    (out / SINGLE).unlink()
    with pytest.raises(OutputExistsError, match="incomplete"):
        command(out)

    def writes(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(execution, "write_output", writes)
    with pytest.raises((PermissionError, StreamconvError), match="cannot be written to"):
        command(out, overwrite=True)
    assert contents(out) == {n: data for n, data in before.items() if n != SINGLE}


def test_ones_own_that_was_changed_since_is_not_taken_for_done(command, tmp_path):
    """It has its size and its seal; one that was merely touched, or copied without times, is read."""
    out = tmp_path / "out"
    command(out)
    later = (out / MANIFEST).stat().st_mtime_ns + 10**9
    os.utime(out / SINGLE, ns=(later, later))
    assert command(out)[0].status == "nothing-to-do"
    with (out / SINGLE).open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    os.utime(out / SINGLE, ns=(later, later))
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="changed since") as caught:
            command(out, overwrite=overwrite)
        assert caught.value.found == SINGLE
