"""The Python API as authors of libraries use it: cancelling, asyncio, pickles, models, notebooks."""

from __future__ import annotations

import asyncio
import logging
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import streamconv
from streamconv.options import Phase, Progress


def test_a_model_runs_without_a_folder(checkpoints, tmp_path):
    """Held against from_pretrained of the folder that the same checkpoint becomes."""
    for name in ("fsdp2", "fsdp2-moe", "fsdp2-gpt_oss"):
        source = checkpoints[name].source
        folder = streamconv.convert(source, tmp_path / name, sync=False).output
        expected = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with streamconv.open(source) as checkpoint:
            model = checkpoint.load_model(dtype=expected.dtype)
        assert type(model) is type(expected)
        mine, theirs = model.state_dict(), expected.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs), name


def test_weights_come_as_vllm_and_sglang_take_them(checkpoints, tmp_path):
    """(name, tensor) pairs under Hub names: those of the folder's files, and no more."""
    source = checkpoints["fsdp2"].source
    folder = streamconv.convert(source, tmp_path / "out", sync=False).output
    truth: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        truth |= load_file(path)
    with streamconv.open(source) as checkpoint:
        mine = dict(checkpoint.weights())
    assert mine.keys() == truth.keys()
    assert all(torch.equal(mine[k], truth[k]) for k in truth)


def test_a_tensor_without_dimensions_has_none_in_torch(checkpoints):
    with streamconv.open(checkpoints["fsdp1-buffers"].source) as checkpoint:
        flat = [t for t in checkpoint.values() if t.shape == ()]
        assert all(t.torch().shape == () for t in flat)


def test_pickled_tensors_open_their_files_again(checkpoints):
    with streamconv.open(checkpoints["fsdp2"].source) as checkpoint:
        name = next(iter(checkpoint))
        expected = checkpoint[name].numpy()
        packed = pickle.dumps(checkpoint[name])
    again = pickle.loads(packed)
    assert again.name == name
    assert again.numpy().tobytes() == expected.tobytes()
    with pytest.raises(streamconv.UsageError):
        checkpoint[name].numpy()


def test_tied_tensors_can_be_asked_for(checkpoints):
    tied = next(made for name, made in checkpoints.items() if "tied" in name)
    with streamconv.open(tied.source) as checkpoint:
        assert checkpoint.tied
        for alias, name in checkpoint.tied.items():
            assert alias not in set(checkpoint)
            assert checkpoint[alias].numpy().tobytes() == checkpoint[name].numpy().tobytes()


def test_a_cancelled_conversion_ends_and_goes_on_later(checkpoints, tmp_path):
    source, out, cancel = checkpoints["fsdp2"].source, tmp_path / "out", streamconv.Cancel()

    def stop_at_once(event):
        if isinstance(event, Phase) and event.name == "write":
            threading.Thread(target=cancel.set).start()
            while not cancel.is_set():
                pass

    with pytest.raises(streamconv.CancelledError):
        streamconv.convert(source, out, cancel=cancel, on_event=stop_at_once)
    assert not out.exists()
    assert streamconv.convert(source, out).status == "done"


def test_asyncio_waits_and_cancels(checkpoints, tmp_path):
    source = checkpoints["fsdp2"].source

    async def convert_and_stop() -> None:
        result = await streamconv.convert_async(source, tmp_path / "one", sync=False)
        assert result.status == "done"
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def heard(event):
            loop.call_soon_threadsafe(begun.set)
            if isinstance(event, Phase) and event.name == "write":
                stopped.wait(5)

        stopped = threading.Event()
        task = asyncio.create_task(
            streamconv.convert_async(source, tmp_path / "two", on_event=heard)
        )
        await begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        stopped.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not (tmp_path / "two").exists()
        with pytest.raises(streamconv.UsageError, match="unknown dtype"):
            await streamconv.convert_async(source, tmp_path / "three", dtype="int3")

    asyncio.run(convert_and_stop())


def test_what_happens_is_logged_for_whoever_listens(checkpoints, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, "streamconv"):
        streamconv.convert(checkpoints["fsdp2"].source, tmp_path / "out", sync=False)
    assert "phase: plan" in caplog.messages
    assert "phase: publish" in caplog.messages


def test_a_run_of_checkpoints_is_converted_by_one_call(checkpoints, tmp_path):
    source = checkpoints["fsdp2"].source
    root = tmp_path / "run"
    actor = root / "global_step_10" / "actor"
    actor.parent.mkdir(parents=True)
    shutil.copytree(source, actor)
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    seen: list[str] = []
    dry = streamconv.convert_run(root, tmp_path / "out", dry_run=True, dtype="bf16")
    assert [task.record.source for task in dry.tasks] == [str(actor)]
    assert not (tmp_path / "out").exists()
    made = streamconv.convert_run(
        root, tmp_path / "out", dtype="bf16", on_record=lambda what, _: seen.append(what)
    )
    assert made.exit_code == 0
    assert made.counts["converted"] == 1
    assert seen[:2] == ["queued", "started"]
    assert seen[-1] == "done"
    (record,) = streamconv.status(tmp_path / "out")
    assert record.state == "done"
    assert streamconv.verify(record.output)
    assert streamconv.diff(record.output, record.output)


def test_notebooks_show_results(checkpoints, tmp_path):
    source = checkpoints["fsdp2"].source
    bar = streamconv.ProgressBar(disable=True)
    result = streamconv.convert(source, tmp_path / "out", sync=False, on_event=bar)
    assert "<table>" in result._repr_html_()
    assert "verified" in streamconv.verify(result.output)._repr_html_()
    with streamconv.open(source) as checkpoint:
        assert "<table>" in checkpoint._repr_html_()
        assert "tensors" in repr(checkpoint)


def test_a_bar_shows_all_events(capsys):
    bar = streamconv.ProgressBar(mininterval=0)
    bar(Phase("write"))
    bar(Progress(500, 1000, 0, 1.0, 10, 100, "model.safetensors"))
    bar(Phase("publish"))
    assert "500" in capsys.readouterr().err


def test_doctor_and_plans_work_from_python(checkpoints, tmp_path):
    source = checkpoints["fsdp2"].source
    assert streamconv.doctor(source)["problems"] == []
    streamconv.plan(source, output=tmp_path / "plan.jsonl")
    result = streamconv.run(tmp_path / "plan.jsonl", tmp_path / "out", sync=False)
    assert result.status == "done"
    assert isinstance(result.output, Path)
