"""A batch among odd names, odd disks and odd neighbours: what a user's cron job meets one day."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import streamconv
from scripts.makers import runs
from streamconv.batch import tasks
from streamconv.batch.state import STATUS, Store, read_records
from streamconv.conversion import execution
from tests.scenes import Scene, cli

STILL = "may still be written: it has not lain still for long enough"


def verified(scene: Scene, *steps: int) -> None:
    store = Store(scene.out)
    store.begin()
    for record in store:
        record.verified = record.step in steps
        store.save(record)


def sources(scene: Scene) -> list[str]:
    return sorted(p.parent.name for p in scene.run.glob("global_step_*/actor"))


# Deleting sources


def test_the_newest_whole_step_is_kept_though_a_later_one_broke_off(scene):
    """Without a tracker, nothing but the files says from where training can go on."""
    scene.step(10, 20)
    scene.round()
    verified(scene, 10, 20)
    cut = scene.run / "global_step_30/actor" / runs.RANK_FILE
    cut.parent.mkdir(parents=True)
    cut.write_bytes(b"half")
    # As long as it may be that it is still being written, nothing goes.
    made = scene.round(delete_sources=True, shared={"apply": True})
    assert {r.refused for r in made.removals} == {f"global_step_30 {STILL}"}
    runs.age(cut.parents[1])
    made = scene.round(delete_sources=True, shared={"apply": True})
    refused = {r.path.parent.name: r.refused for r in made.removals}
    assert refused["global_step_10"] == ""
    assert refused["global_step_20"].startswith("training goes on from it; global_step_30 will not")
    assert sources(scene) == ["global_step_20", "global_step_30"]


def test_a_later_step_whose_bytes_are_damaged_is_none_to_train_on(scene, tmp_path):
    """Its ends are as they should be: only the conversion reads all of it."""
    scene.step(10)
    weights = scene.run / "global_step_20/actor" / runs.RANK_FILE
    runs.rank_file(weights)
    whole = weights.read_bytes()
    payload = bytes.fromhex("0000803f") * 16
    assert payload in whole
    weights.write_bytes(whole.replace(payload, payload[:-1] + b"@"))
    runs.age(scene.run / "global_step_20")
    made = scene.round(fake=False, verify=True, delete_sources=True, shared={"apply": True})
    assert made.counts == {"converted": 1, "failed": 1}
    (kept,) = made.removals
    assert "global_step_20 will not do: actor could not be converted" in kept.refused
    assert sources(scene) == ["global_step_10", "global_step_20"]


def test_a_source_is_kept_while_another_batch_makes_its_output_again(scene):
    scene.step(10, 20)
    scene.round()
    verified(scene, 10, 20)
    shutil.rmtree(scene.out / "global_step_10")
    with Store(scene.out).holding("global_step_10"):
        made = scene.round(delete_sources=True, shared={"apply": True})
    assert made.counts == {"done": 1, "elsewhere": 1}
    assert sources(scene) == ["global_step_10", "global_step_20"]


def test_a_source_whose_output_was_touched_in_the_round_is_kept(scene):
    scene.step(10, 20, 30)
    scene.round()
    verified(scene, 10, 20, 30)
    scene.step(40)
    batch = scene.batch(delete_sources=True, shared={"apply": True})
    listener = batch._listener

    def spoil(what, task, text):
        if what == "started":
            (scene.out / "global_step_10/model.safetensors").unlink()
            (scene.run / "global_step_20/actor/new.txt").touch()
        listener(what, task, text)

    batch._listener = spoil
    refused = {r.path.parent.name: r.refused for r in batch.round().removals}
    assert refused["global_step_10"] == "its output is not as it was when it was verified"
    assert refused["global_step_20"] == "it changed since it was converted"
    assert refused["global_step_30"] == ""
    assert sources(scene) == ["global_step_10", "global_step_20", "global_step_40"]


def test_an_output_with_a_link_to_a_folder_in_it_is_not_only_ours(scene, tmp_path):
    scene.step(10, 20)
    scene.round()
    (scene.out / "global_step_10/mine").symlink_to(tmp_path)
    (removal,) = scene.round(keep_last=1, shared={"apply": True}).removals
    assert removal.refused == "it holds what its manifest does not list: mine"


# What is in the way


def test_another_jobs_output_is_told_once_and_costs_no_worker(scene, tmp_path):
    scene.step(10, 20)
    scene.round()
    told = tmp_path / "told"
    hook = {"on-error": f'echo "$STREAMCONV_STEP $STREAMCONV_ERROR_KIND" >> {told}'}
    batch = scene.batch(dtype="bfloat16", shared=hook)
    scene.step(30)
    scene.told.clear()
    assert batch.round().counts == {"failed": 2, "converted": 1}
    assert batch.round().counts == {"failed": 2, "done": 1}
    assert scene.starts().count("global_step_10") == 1
    assert [n for what, n in scene.told if what == "failed"] == ["global_step_10", "global_step_20"]
    assert sorted(told.read_text().splitlines()) == ["10 output-exists", "20 output-exists"]
    record = read_records(scene.out)[0]
    assert (record.state, record.attempts) == ("failed", 1)
    assert "another job's" in record.reason
    # Out of the way, it is converted, also by a batch that watches.
    shutil.rmtree(scene.out / "global_step_10")
    assert batch.round().counts == {"failed": 1, "done": 1, "converted": 1}
    before = len(scene.starts())
    scene.round(dtype="bfloat16", overwrite=True)
    assert scene.starts()[before:] == ["global_step_20"]


def test_what_streamconv_did_not_make_is_in_the_way_as_well(scene):
    scene.step(10)
    (scene.out / "global_step_10").mkdir(parents=True)
    (scene.out / "global_step_10/thesis.tex").touch()
    assert scene.round().counts == {"failed": 1}
    assert scene.starts() == []


# Odd names


ODD = [
    os.fsdecode(b"not-utf8-\xff"),
    "a\nline",
    "escape\x1b[31m",
    "sp ace",
    "\u00e9" * 100 + "/" + "\u00e9" * 100,
]


def test_names_may_be_long_and_odd(scene, tmp_path, lone_rank_file):
    for name in ODD:
        folder = scene.run / name / "global_step_1/actor"
        folder.mkdir(parents=True)
        os.link(lone_rank_file, folder / runs.RANK_FILE)
        runs.age(folder)
    prom = tmp_path / "m.prom"
    shared = {"prometheus": str(prom), "on-done": "true", "report": str(tmp_path / "r.html")}
    assert scene.round(shared=shared).counts == {"converted": len(ODD)}
    assert scene.round(keep_last=1, verify=False).counts == {"done": len(ODD)}
    assert {c["run"] for c in json.loads((scene.out / STATUS).read_text())["checkpoints"]} == {*ODD}
    prom.read_text(encoding="utf-8")
    shown = cli("status", str(scene.out))
    assert shown.returncode == 0, shown.stderr
    assert "\x1b" not in shown.stdout
    assert shown.stdout.count("done") == len(ODD) + 1
    assert cli("status", str(scene.out), "--json").returncode == 0
    shutil.rmtree(scene.out)
    assert scene.round(pin=True).counts == {"converted": len(ODD)}


def test_a_terminal_is_told_nothing_but_text(scene, lone_rank_file):
    for name in ODD:
        folder = scene.run / name / "global_step_1/actor"
        folder.mkdir(parents=True)
        os.link(lone_rank_file, folder / runs.RANK_FILE)
    scene.says(**{"s*": ["bad-input"]})
    done = cli("batch", str(scene.run), str(scene.out), "--settle", "0s", "--max-mem", "4GB")
    assert "internal" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr.count("escape\\x1b[31m/global_step_1") > 0
    assert done.stderr.count("a\\nline/global_step_1") > 0


# Odd disks


def test_what_watches_a_batch_does_not_stop_it(scene, tmp_path):
    scene.step(10)
    (tmp_path / "file").touch()
    shared = {"prometheus": str(tmp_path / "file/m"), "report": str(tmp_path / "file/r.html")}
    made = scene.batch(shared=shared).round()
    assert (made.counts, made.exit_code) == ({"converted": 1}, 3)
    assert "the system refused" in str(made.problems[0])


def test_an_output_whose_page_cannot_be_written_is_done(scene, tmp_path):
    scene.step(10)
    (tmp_path / "r").touch()  # where the folder of pages would be
    shared = {"report": str(tmp_path / "r.html")}
    made = scene.batch(fake=False, shared=shared).round()
    assert made.counts == {"converted": 1}
    (record,) = read_records(scene.out)
    assert (record.state, record.error) == ("done", None)
    assert any("its report could not be written" in notice for notice in record.notices)
    assert (tmp_path / "r.html").is_file()


def test_what_the_disk_did_not_take_is_newer_than_what_it_has(tmp_path, monkeypatch):
    """Else a step that was written anew would be taken for what it was before."""

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    store, other = Store(tmp_path), Store(tmp_path)
    store.begin()
    record = store.get("step")
    record.snapshot = "old"
    store.save(record)
    record.snapshot = "new"
    with monkeypatch.context() as patch:
        patch.setattr("streamconv.batch.state.write_whole", full)
        store.save(record)
    assert store.reload("step").snapshot == "new"
    store.save(record)
    other.begin()
    record = other.get("step")
    record.snapshot = "another batch's"
    other.save(record)
    assert store.reload("step").snapshot == "another batch's"


def test_a_full_disk_costs_what_is_remembered_and_no_conversion(scene, monkeypatch):
    scene.step(10, 20)

    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("streamconv.batch.state.write_whole", full)
    made = scene.batch().round()
    assert (made.counts, made.exit_code) == ({"converted": 2}, 3)
    assert [(p.exit_code, p.where) for p in made.problems] == [(7, str(scene.out / STATUS))]
    assert (scene.out / "global_step_20/model.safetensors").is_file()


def test_a_disk_without_room_for_another_like_the_last_is_found_before_planning(scene, monkeypatch):
    scene.step(10)
    scene.round()
    nbytes = (scene.out / "global_step_10/model.safetensors").stat().st_size
    scene.step(20, 30, 40)
    started = len(scene.starts())

    def free(count: int) -> None:
        found = SimpleNamespace(total=1 << 40, used=1 << 39, free=count + (64 << 10))
        monkeypatch.setattr("shutil.disk_usage", lambda _: found)

    free(nbytes // 2 - 1)
    made = scene.round()
    assert made.counts["failed"] == 1
    assert made.counts["left"] == 2
    assert scene.states() == {10: "done", 20: "failed", 30: "queued", 40: "queued"}
    assert len(scene.starts()) == started  # no conversion was begun
    free(nbytes * 20)
    scene.round()
    assert {*scene.states().values()} == {"done"}


def test_a_process_that_cannot_be_started_is_a_failure_of_its_output(scene, monkeypatch):
    scene.step(10, 20)
    real, tries = subprocess.Popen, []

    def scarce(*args, **kwargs):
        tries.append(1)
        if len(tries) == 1:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return real(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", scarce)
    assert scene.round().counts == {"failed": 1, "converted": 1}
    assert scene.round().counts == {"done": 1, "converted": 1}


def test_a_read_only_output_folder_is_an_error_and_no_traceback(scene):
    scene.step(10)
    done = cli("batch", str(scene.run), "/proc/streamconv-out")
    assert done.returncode == 1
    assert "internal" not in done.stderr
    assert done.stderr.startswith("error: the system refused")


# Odd hooks


def hooked(scene: Scene, command: str, **shared: str) -> list[str]:
    made = scene.batch(shared={"on-done": command, **shared}).round()
    assert made.counts == {"converted": 1}
    assert scene.states() == {10: "done"}
    return [str(p) for p in made.problems]


def test_a_hook_that_hangs_is_ended_with_all_that_it_started(scene, tmp_path):
    scene.step(10)
    pid = tmp_path / "pid"
    stubborn = f"trap '' TERM; echo $$ > {pid}; sleep 300 & wait; sleep 300"
    (problem,) = hooked(scene, f"( {stubborn} )", **{"hook-limit": "1s"})
    assert "--on-done was ended after 1 s" in problem
    with pytest.raises(ProcessLookupError):
        os.killpg(os.getpgid(int(pid.read_text())), 0)


def test_a_hook_may_talk_much_and_strangely(scene):
    scene.step(10)
    talk = "head -c 3000000 /dev/zero >&2; printf '\\n\\377\\033[31mred' >&2; exit 3"
    (problem,) = hooked(scene, talk)
    assert problem.endswith("--on-done ended with exit code 3: \ufffd\\x1b[31mred")


def test_a_hook_that_cannot_be_started_is_told(scene, monkeypatch):
    scene.step(10)
    real = subprocess.Popen

    def scarce(*args, **kwargs):
        if kwargs.get("shell"):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", scarce)
    assert hooked(scene, "true") == [
        "global_step_10: --on-done could not be started: Cannot allocate memory"
    ]


def test_a_job_file_that_is_not_there_is_called_that(tmp_path):
    done = cli("batch", str(tmp_path / "jobs.toml"))
    assert (done.returncode, "no such job file" in done.stderr) == (5, True)


@pytest.mark.usefixtures("planned_here")
def test_a_source_that_is_written_anew_while_its_output_is_staged(scene, monkeypatch):
    """A batch that was killed, a trainer that went back a few steps: the next batch begins afresh."""
    scene.step(10)
    source, out = scene.run / "global_step_10/actor", scene.out / "global_step_10"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(execution, "write_output", killed)
        with pytest.raises(KeyboardInterrupt):
            streamconv.convert(source, out)
    assert (scene.out / ".global_step_10.streamconv/plan.jsonl").is_file()
    (source / runs.RANK_FILE).unlink()
    runs.rank_file(source / runs.RANK_FILE, 2.0)
    runs.age(source)
    assert scene.round(fake=False, verify=True).counts == {"converted": 1}


def interrupted(scene: Scene) -> None:
    """Leave the records as a batch does that was killed while it compared."""
    store = Store(scene.out)
    store.begin()
    for record in store:
        record.state, record.verified, record.pid = "running", None, 0
        record.host = socket.gethostname()
        store.save(record)


def test_what_was_interrupted_and_has_lost_its_source_is_gone(scene):
    scene.step(10)
    scene.round()
    interrupted(scene)
    shutil.rmtree(scene.out / "global_step_10")
    shutil.rmtree(scene.run / "global_step_10")
    scene.step(20)
    scene.round()
    assert scene.states() == {10: "gone", 20: "done"}


@pytest.mark.parametrize("source", ["the same", "another since"])
@pytest.mark.usefixtures("planned_here")
def test_a_whole_output_that_has_lost_its_source_is_done_but_not_verified(scene, source):
    """Unless what went away was another one, which came after it."""
    scene.step(10, 20)
    scene.round(fake=False)
    interrupted(scene)
    if source == "another since":
        again = runs.rank_file(scene.run / "global_step_10/actor/new.pt", 2.0)
        again.replace(again.with_name(runs.RANK_FILE))
        assert scene.batch(settle="1h").round().counts["waiting"] == 1
    shutil.rmtree(scene.run / "global_step_10")
    gone = {} if source == "the same" else {"gone": 1}
    assert scene.round(fake=False, verify=True).counts == {"converted": 1, **gone}
    first, second = read_records(scene.out)
    assert (second.state, second.verified) == ("done", True)
    assert (first.state, first.verified) == ("done" if source == "the same" else "gone", None)
    assert "went away before it was co" in first.reason
    assert "went away" in cli("status", str(scene.out)).stdout


def test_a_source_that_goes_while_its_output_is_compared(scene, monkeypatch):
    """The conversion has ended by then, and the output is whole."""
    scene.step(10)
    scene.says(s10=["bad-input"])
    made = {"files": [{"name": "model.safetensors", "nbytes": 3}], "tensors": {"a": {}}}

    def listen(what, task, text):
        scene.told.append((what, text))
        if what == "started":
            task.output.mkdir()
            (task.output / "model.safetensors").write_bytes(b"abc")
            (task.output / "streamconv.json").write_text(json.dumps(made))
            shutil.rmtree(scene.run / "global_step_10")

    batch = scene.batch(verify=True)
    monkeypatch.setattr(batch, "_listener", listen)
    monkeypatch.setattr(tasks, "finished_output", lambda path, digest: made if digest else None)
    assert batch.round().counts == {"converted": 1}
    (record,) = read_records(scene.out)
    assert (record.state, record.verified, record.write_bytes) == ("done", None, 3)
    assert "went away" in record.reason


# A model beside others in each checkpoint


def test_a_model_inside_each_checkpoint(tmp_path, shared_checkpoints):
    """And its source stays, for the others that it holds."""
    from scripts.outputs import differences, read_model

    case, run, out = shared_checkpoints / "layouts/dcp_with_ema", tmp_path / "run", tmp_path / "out"
    for step in (1, 2):
        shutil.copytree(case / "src", run / f"step_{step}")
    options = ["--settle", "0s", "--model", "main", "--verify", "--delete-sources", "--apply"]
    for counts in ({"converted": 2}, {"done": 2}):
        done = cli("batch", str(run), str(out), *options, "--json", seconds=540)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["counts"] == counts
        assert sorted(p.name for p in run.iterdir()) == ["step_1", "step_2"]
    for step in (1, 2):
        assert differences(read_model(out / f"step_{step}"), read_model(case / "truth")) == []
    # The other one is another output, and not written over this one.
    refused = cli("batch", str(run), str(out), "--settle", "0s", "--model", "ema", "--json")
    assert (refused.returncode, "made with --model main" in refused.stdout) == (3, True)


# Many, and of many kinds


@pytest.mark.slow
def test_a_dozen_real_checkpoints_of_three_kinds(tmp_path, checkpoints):
    """Each is converted, and to the bits of its model; the next batch starts no process."""
    from scripts.outputs import differences, read_model, read_truth

    run, out = tmp_path / "run", tmp_path / "out"
    fsdp, lora = checkpoints["fsdp2-w2"], checkpoints["fsdp1-lora"]
    for step in range(1, 9):
        shutil.copytree(fsdp.source, run / f"fsdp/global_step_{step}/actor")
    for step in (1, 2):
        shutil.copytree(lora.source, run / f"lora/global_step_{step}/actor")
        shutil.copytree(fsdp.dcp, run / f"dcp/step-{step}/pytorch_model_fsdp_0")
        shutil.copytree(fsdp.source / "huggingface", run / f"dcp/step-{step}/huggingface")
    command = ["batch", str(run), str(out), "--jobs", "2", "--max-mem", "2GB", "--settle", "0s"]
    first = cli(*command, "--json", seconds=540)
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout.splitlines()[-1])
    assert told["counts"] == {"converted": 12}
    assert told["peak_bytes"] <= told["budget_bytes"]
    whole = read_truth(fsdp.truth_hf)
    names = [f"fsdp/global_step_{n}/actor" for n in range(1, 9)]
    names += [f"dcp/step-{n}/pytorch_model_fsdp_0" for n in (1, 2)]
    for name in names:
        assert differences(read_model(out / name), whole) == [], name
    merged = [read_model(out / f"lora/global_step_{n}/actor") for n in (1, 2)]
    assert differences(*merged) == []
    again = cli(*command, "--json")
    assert [json.loads(line)["event"] for line in again.stdout.splitlines()] == ["round"]
    assert json.loads(again.stdout)["counts"] == {"done": 12}


def test_a_source_stays_whose_output_no_loader_takes(scene):
    """Without its config.json a model is tensors of unknown meaning: status says so, too."""
    scene.step(10, 20)
    options = {"delete_sources": True, "verify": True, "shared": {"apply": True}}
    scene.round(fake=False, **options)
    runs.age(scene.run / "global_step_20")
    made = scene.round(fake=False, **options)
    kept = [r.refused for r in made.removals if r.path.parent.name == "global_step_10"]
    assert kept == ["its output has no config.json, without which no loader knows what it is"]
    assert (scene.run / "global_step_10/actor" / runs.RANK_FILE).exists()
    shown = cli("status", str(scene.out)).stdout
    assert "no config.json: names and shapes could not be checked" in " ".join(shown.split())
