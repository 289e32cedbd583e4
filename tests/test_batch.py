"""A batch at work on runs that grow, rotate and break, mostly with a worker that only pretends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest

from scripts.makers import runs
from streamconv.batch.cycle import watch
from streamconv.batch.pins import pin, unpin
from streamconv.batch.round import Round
from streamconv.batch.schedule import Every
from streamconv.batch.settings import settings
from streamconv.batch.state import FOLDER, STATUS, Store, read_records
from streamconv.cli.batch_report import render_round
from streamconv.errors import StreamconvError, UsageError
from tests.scenes import cli, start, wait_for


def test_what_is_whole_is_converted_once_and_never_again(scene):
    scene.step(10, 20)
    assert scene.round().counts == {"converted": 2}
    assert sorted(p.name for p in scene.out.iterdir() if p.name[0] != ".") == [
        "global_step_10",
        "global_step_20",
        STATUS,
    ]
    made = scene.round()
    assert (made.counts, made.exit_code) == ({"done": 2}, 0)
    assert len(scene.starts()) == 2


def test_an_output_that_was_touched_or_whose_source_or_options_changed_is_looked_at_again(scene):
    scene.step(10)
    scene.round()
    shutil.rmtree(scene.out / "global_step_10")
    assert scene.round().counts == {"converted": 1}
    shutil.rmtree(scene.out / "global_step_10")
    os.utime(scene.run / "global_step_10/actor" / runs.RANK_FILE, (1, 1))
    assert scene.round().counts == {"converted": 1}
    shutil.rmtree(scene.out / "global_step_10")
    assert scene.round(dtype="bfloat16").counts == {"converted": 1}


def test_a_run_that_grows_rotates_and_breaks(scene):
    scene.step(10)
    scene.tracker(10)
    (young,) = [runs.add_step(scene.run, 20, scene.file, old=False)]
    cut = scene.run / "global_step_5/actor" / runs.RANK_FILE
    cut.parent.mkdir(parents=True)
    cut.write_bytes(scene.file.read_bytes()[:-30])
    made = scene.round()
    assert made.counts == {"converted": 1, "waiting": 2}
    assert scene.states() == {5: "waiting", 10: "done", 20: "waiting"}

    # The trainer finishes step 20 and says so; its rotation takes 10 and, half written, 5.
    shutil.rmtree(scene.run / "global_step_10/actor")
    shutil.rmtree(cut.parent)
    scene.tracker(20)
    os.utime(scene.run / runs.TRACKER)
    made = scene.round()
    assert (made.counts, made.exit_code) == ({"converted": 1, "gone": 1}, 3)
    assert scene.states() == {5: "gone", 10: "done", 20: "done"}
    assert scene.round().exit_code == 0  # told once
    assert young.is_dir()


def test_a_step_that_is_written_again_is_not_touched_before_it_is_whole(scene):
    """Training went back: the tracker still names a later step."""
    scene.step(10, old=False)
    os.utime(scene.run / "global_step_10/actor", (time.time() + 50,) * 2)
    scene.tracker(99)
    waiting = scene.round()
    assert waiting.counts == {"waiting": 1}
    assert (
        "global_step_10: it changed a moment ago; ready when unchanged for 300 s\n1 not whole"
        in (render_round(waiting, applied=False))
    )
    assert scene.round(settle="0s").counts == {"converted": 1}


def test_a_source_that_goes_while_it_is_converted_is_gone_not_failed(scene):
    scene.step(10, 20)
    scene.says(s10=["bad-input"])
    batch = scene.batch()
    # The listener runs between the start of the worker and its end.
    listener = batch._listener

    def rotating(what, task, text):
        if what == "started" and task.record.step == 10:
            shutil.rmtree(scene.run / "global_step_10")
        listener(what, task, text)

    batch._listener = rotating
    made = batch.round()
    assert (made.counts, made.exit_code) == ({"converted": 1, "gone": 1}, 3)
    assert scene.states() == {10: "gone", 20: "done"}


def test_pinned_sources_outlive_rotation(scene):
    """Both those that are read and those whose turn comes later."""
    scene.step(10, 20)
    dead = scene.out / FOLDER / f"pins/{socket.gethostname()}-99999999/global_step_5/actor"
    dead.mkdir(parents=True)
    os.utime(dead.parents[1], (1, 1))
    batch = scene.batch(pin=True)
    listener = batch._listener

    def rotating(what, task, text):
        if what == "started":
            shutil.rmtree(scene.run, ignore_errors=True)
        listener(what, task, text)

    batch._listener = rotating
    assert batch.round().counts == {"converted": 2}
    log = (scene.script.parent / "starts.jsonl").read_text()
    assert f"-{os.getpid()}/global_step_10/actor" in json.loads(log.splitlines()[0])["source"]
    assert list((scene.out / FOLDER / "pins").iterdir()) == []


def test_pins_hold_what_is_read_and_not_the_optimizer(tmp_path, monkeypatch):
    monkeypatch.setattr("streamconv.batch.pins._SMALL_BYTES", 100)
    source = tmp_path / "actor"
    (source / "huggingface").mkdir(parents=True)
    for name, size in (("model.pt", 500), ("optim.pt", 500), ("huggingface/config.json", 9)):
        (source / name).write_bytes(b"x" * size)
    pinned = pin(source, ["model.pt"], [tmp_path / "pins/a"])
    names = sorted(p.relative_to(pinned).as_posix() for p in pinned.rglob("*") if p.is_file())
    assert names == ["huggingface/config.json", "model.pt"]
    assert (pinned / "model.pt").samefile(source / "model.pt")
    assert pinned.name == "actor"
    unpin(pinned)
    assert not pinned.exists()
    assert (source / "model.pt").stat().st_nlink == 1


@pytest.mark.parametrize("beside", ["huggingface", "."])
@pytest.mark.usefixtures("planned_here")
def test_what_lies_beside_a_dcp_folder_is_pinned_with_it(beside, tmp_path, checkpoints, scene):
    """Rotation takes all of the step away, the model's config too."""
    made = checkpoints["fsdp2-w2"]
    step = scene.run / "checkpoint-10"
    shutil.copytree(made.dcp, step / "pytorch_model_fsdp_0")
    shutil.copytree(made.source / "huggingface", step / beside, dirs_exist_ok=True)
    (step / "trainer_state.json").write_text("{}")
    for path in [*step.rglob("*"), step]:
        os.utime(path, (1_700_000_000, 1_700_000_000))
    batch = scene.batch(fake=False, pin=True, model=None)

    def rotating(what, task, text):
        scene.told.append((what, text))
        if what == "started":
            shutil.rmtree(step)

    batch._listener = rotating
    assert batch.round().counts == {"converted": 1}, scene.told
    assert [what for what, _ in scene.told if what == "notice"] == []
    assert (scene.out / "checkpoint-10/pytorch_model_fsdp_0/config.json").is_file()
    assert not [*scene.out.glob(f"{FOLDER}/pins/*")]


def test_a_place_on_another_file_system_is_no_place_for_pins(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    (tmp_path / "actor").mkdir()
    (tmp_path / "actor/model.pt").touch()
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StreamconvError, match="could not be pinned") as told:
        pin(tmp_path / "actor", [], [tmp_path / "a", tmp_path / "b"])
    assert str(told.value).count("cross-device") == 2
    assert not (tmp_path / "a").exists()


# Failures


def test_what_passes_is_tried_again_and_what_will_not_is_not(scene):
    scene.step(10, 20, 30, 50)
    scene.says(
        s10=["EIO", "ESTALE", "ETIMEDOUT", "ok"], s20=["EIO"], s30=["bad-input"], s50=["crash"]
    )
    made = scene.round()
    assert (made.counts, made.exit_code) == ({"converted": 1, "failed": 3}, 3)
    tries = {name: scene.starts().count(name) for name in set(scene.starts())}
    assert tries == {f"global_step_{n}": t for n, t in ((10, 4), (20, 4), (30, 1), (50, 1))}
    crash = next(r for r in read_records(scene.out) if r.step == 50)
    assert "SIGABRT" in crash.error["found"]


def test_a_failed_one_is_tried_again_by_the_next_batch_and_counted(scene):
    scene.step(10)
    scene.says(s10=["no-space", "no-space", "ok"])
    for attempts in (1, 2):
        assert scene.round().counts == {"failed": 1}
        assert read_records(scene.out)[0].attempts == attempts
    assert scene.round().counts == {"converted": 1}
    assert read_records(scene.out)[0].attempts == 0


def test_what_a_library_prints_ends_nothing(scene):
    scene.step(10)
    scene.says(s10=["noise"])
    assert scene.round().counts == {"converted": 1}


def test_while_watching_what_was_killed_is_tried_again(scene):
    """The system that is out of memory kills what reads a file; the file is good."""
    scene.step(10)
    scene.says(s10=["killed", "ok"])
    batch = scene.batch()
    assert [batch.round().counts for _ in range(2)] == [{"failed": 1}, {"converted": 1}]


@pytest.mark.parametrize("pinning", [False, True])
def test_while_watching_bad_input_is_not_tried_again_before_it_changes(scene, pinning):
    scene.step(10)
    scene.says(s10=["bad-input", "ok"])
    batch = scene.batch(pin=pinning)
    assert batch.round().counts == {"failed": 1}
    assert batch.round().counts == {"failed": 1}
    assert len(scene.starts()) == 1
    os.utime(scene.run / "global_step_10/actor" / runs.RANK_FILE, (1, 1))
    assert batch.round().counts == {"converted": 1}


def test_one_that_needs_more_than_its_share_gets_everything(scene):
    scene.step(10, 20)
    scene.says(s10=["budget", "ok"])
    assert scene.round(shared={"jobs": 2}).counts == {"converted": 2}
    lines = (scene.script.parent / "starts.jsonl").read_text().splitlines()
    shares = [d["share"] for d in map(json.loads, lines) if d["output"] == "global_step_10"]
    assert shares[1] > 1.9 * shares[0]


def test_a_budget_that_cannot_work_is_said_at_once(scene):
    scene.step(10)
    made = scene.batch(shared={"max-mem": "100MB"}).round()
    assert [p.exit_code for p in made.problems] == [4]
    assert scene.starts() == []


# Two batches, and one that is killed


def test_two_batches_at_once_do_no_work_twice(scene):
    scene.step(*range(10, 170, 10))
    scene.says(**{"s*": ["short-sleep"]})
    both = [start(scene, "--jobs", "2", "--json") for _ in range(2)]
    outputs = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert sorted(scene.starts()) == sorted(f"global_step_{n}" for n in range(10, 170, 10))
    rounds = [json.loads(out.splitlines()[-1])["counts"] for out, _ in outputs]
    assert sum(r.get("converted", 0) for r in rounds) == 16
    assert set(scene.states().values()) == {"done"}


def test_a_batch_that_is_killed_takes_its_workers_along_and_the_next_goes_on(scene):
    scene.step(10, 20)
    scene.says(s20=["sleep", "ok"])
    first = start(scene)
    wait_for(lambda: scene.starts().count("global_step_20") == 1)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    first.kill()
    first.communicate()
    assert next(r.state for r in read_records(scene.out) if r.step == 20) == "queued"
    for child in children:  # the pretended worker has no tether of its own
        os.kill(int(child), signal.SIGKILL)
    assert scene.round().counts == {"converted": 1, "done": 1}


def test_a_real_worker_ends_with_its_batch(tmp_path):
    """The tether: a worker whose parent is gone before it looked converts nothing."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "streamconv.batch.worker"],
        input=json.dumps({"parent": 1 << 30}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.slow
def test_real_workers_end_with_a_batch_that_is_killed(scene):
    scene.step(10)
    args = ["batch", str(scene.run), str(scene.out), "--model", "actor", "--max-mem", "2GB"]
    batch = subprocess.Popen([sys.executable, "-m", "streamconv", *args], stderr=subprocess.PIPE)
    process = psutil.Process(batch.pid)
    wait_for(lambda: len(process.children(recursive=True)) == 2)  # a worker and what it plans with
    family = process.children(recursive=True)
    batch.kill()
    batch.communicate()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    assert scene.round(fake=False).counts == {"converted": 1}


def test_sigterm_ends_it_cleanly(scene):
    scene.step(10)
    scene.says(s10=["sleep"])
    process = start(scene, "--watch", "1h")
    wait_for(lambda: len(scene.starts()) == 1)
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in err) == (143, False), (out, err)
    (record,) = read_records(scene.out)
    assert (record.state, record.reason[:11]) == ("queued", "interrupted")
    store = Store(scene.out)
    with store.holding(record.name):
        pass  # nobody holds it any more


# Hooks, metrics, what is shown


def test_hooks_get_the_facts_in_their_environment(scene, tmp_path):
    scene.step(10, 20)
    scene.says(s20=["bad-input"])
    told = tmp_path / "told"
    line = (
        'printf "%s\\n" "$STREAMCONV_STATE $STREAMCONV_STEP $STREAMCONV_OUTPUT $STREAMCONV_ERROR"'
    )
    scene.round(shared={"on-done": f"{line} >> {told}", "on-error": f"{line} >> {told}"})
    assert sorted(told.read_text().splitlines()) == [
        f"done 10 {scene.out}/global_step_10 ",
        f"failed 20 {scene.out}/global_step_20 told to: bad-input",
    ]


def test_a_hook_that_fails_is_no_secret(scene):
    scene.step(10)
    made = scene.batch(shared={"on-done": "echo no bucket >&2; exit 9"}).round()
    assert made.exit_code == 3
    assert "exit code 9: no bucket" in str(made.problems[0])
    assert scene.states() == {10: "done"}


def test_a_zero_is_said(scene):
    """0 is equal to False in Python: no retry is not the same as nothing said."""
    scene.step(10)
    scene.says(s10=["EIO", "ok"])
    process = start(scene, "--retries", "0")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, len(scene.starts())) == (3, 1), err
    done = cli("batch", str(scene.run), str(scene.out), "--jobs", "0")
    assert (done.returncode, "jobs: " in done.stderr) == (2, True)


def test_what_is_remembered_and_told_has_whole_paths(scene, monkeypatch):
    scene.step(10)
    monkeypatch.chdir(scene.run.parent)
    scene.run, scene.out = Path(scene.run.name), Path(scene.out.name)
    scene.round()
    (record,) = read_records(scene.out)
    assert record.source == str(Path.cwd() / "run/global_step_10/actor")
    assert Path(record.output).is_absolute()


def test_status_and_metrics_are_whole_files_that_say_the_same(scene, tmp_path):
    scene.step(10, 20)
    scene.says(s20=["bad-input"])
    prom = tmp_path / "metrics/streamconv.prom"
    scene.round(shared={"prometheus": str(prom)})
    status = json.loads((scene.out / STATUS).read_text())
    assert status["counts"] == {"done": 1, "failed": 1}
    assert status["batch"]["host"] == socket.gethostname()
    assert [c["step"] for c in status["checkpoints"]] == [10, 20]
    assert 'streamconv_checkpoints{run="run",state="failed"} 1' in prom.read_text()
    assert [p.name for p in prom.parent.iterdir()] == [prom.name]


def test_the_status_command(scene):
    scene.step(10, 20)
    scene.says(s20=["bad-input"])
    scene.round()
    shown = cli("status", str(scene.out))
    assert shown.returncode == 0, shown.stderr
    assert "global_step_10    10  done" in shown.stdout
    assert "global_step_20: told to: bad-input" in shown.stdout
    data = json.loads(cli("status", str(scene.out), "--json").stdout)
    assert data["counts"] == {"done": 1, "failed": 1}
    assert cli("status", str(scene.run)).returncode == 5


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["{run}"], "where to?"),
        (["{run}", "{out}", "--every", "10m"], "--watch '10m'"),
        (["{jobs}", "{out}"], "names its outputs itself"),
        (["{jobs}", "--dtype", "bfloat16"], "say them in a [[run]]"),
        (["{run}", "{out}", "--name", "{step"], "not a template"),
    ],
)
def test_wrong_usage_is_exit_code_2_with_a_word_of_help(scene, tmp_path, args, words):
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(f'[[run]]\nroot = "{scene.run}"\noutput = "{scene.out}"\n')
    places = {"{run}": str(scene.run), "{out}": str(scene.out), "{jobs}": str(jobs)}
    done = cli("batch", *(places.get(a, a) for a in args))
    assert done.returncode == 2
    assert words in done.stderr


# Retention


def test_retention_says_what_it_would_do_and_does_it_when_told(scene):
    scene.step(10, 20, 30, 40, 100)
    scene.round()
    made = scene.round(keep_last=2, keep_every=20)
    assert [r.path.name for r in made.removals] == ["global_step_10", "global_step_30"]
    assert not any(r.applied for r in made.removals)
    assert (scene.out / "global_step_10").is_dir()
    made = scene.round(keep_last=2, keep_every=20, shared={"apply": True})
    assert all(r.applied for r in made.removals)
    assert not (scene.out / "global_step_10").exists()
    assert scene.states() == {10: "pruned", 20: "done", 30: "pruned", 40: "done", 100: "done"}
    # What retention took away is not made again, and new steps push out old ones.
    scene.step(110)
    made = scene.round(keep_last=2, keep_every=20, shared={"apply": True})
    assert made.counts == {"done": 3, "pruned": 2, "converted": 1}
    assert scene.round(keep_last=4).counts["converted"] == 1


def test_retention_does_not_convert_what_it_would_remove_at_once(scene):
    scene.step(*range(10, 110, 10))
    assert scene.round(keep_last=3).counts == {"converted": 3, "pruned": 7}
    assert len(scene.starts()) == 3


@pytest.mark.parametrize("what", ["no manifest", "strange file", "a link"])
def test_a_folder_that_is_not_only_ours_is_kept(scene, tmp_path, what):
    scene.step(10, 20)
    scene.round()
    output = scene.out / "global_step_10"
    if what == "no manifest":
        (output / "streamconv.json").unlink()
    elif what == "strange file":
        (output / "my-notes.txt").touch()
    else:
        output.rename(tmp_path / "elsewhere")
        output.symlink_to(tmp_path / "elsewhere")
    (record,) = [r for r in read_records(scene.out) if r.step == 10]
    from streamconv.batch.retention import remove_output

    store = Store(scene.out)
    store.begin()
    removal = remove_output(record, store, apply=True)
    assert removal.refused
    assert not removal.applied
    assert output.exists()


def test_sources_are_deleted_only_when_verified_and_never_the_newest(scene):
    scene.step(10, 20, 30)
    scene.round()
    store = Store(scene.out)
    store.begin()
    for record in store:
        record.verified = record.step != 10
        store.save(record)
    made = scene.round(delete_sources=True)
    refused = {r.path.parent.name: r.refused for r in made.removals}
    assert refused == {
        "global_step_10": "its output has not been verified against it (--verify)",
        "global_step_20": "",
        "global_step_30": "training goes on from it",
    }
    assert (scene.run / "global_step_20/actor").is_dir()
    scene.round(delete_sources=True, shared={"apply": True})
    assert [s for s in (10, 20, 30) if (scene.run / f"global_step_{s}/actor").is_dir()] == [10, 30]
    assert scene.states()[20] == "done"


# Watching


def test_watching_survives_errors_and_keeps_its_times(scene):
    scene.step(10)
    batch = scene.batch()
    real, rounds = batch.round, []

    def sometimes() -> Round:
        if not rounds:
            raise RuntimeError("the file system went away")
        return real()

    batch.round = sometimes  # type: ignore[method-assign]
    at = datetime.fromisoformat("2026-01-01 12:00")
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(
            batch,
            Every(600),
            lambda made, following: rounds.append((made, following)),
            sleep=sleep,
            now=lambda: at,
        )
    assert slept == [600.0] * 3
    assert "the file system went away" in str(rounds[0][0].problems[0])
    assert [r.counts for r, _ in rounds[1:]] == [{"converted": 1}, {"done": 1}]
    assert rounds[0][1] == at + timedelta(minutes=10)


# Many


def test_three_hundred_finished_checkpoints_cost_neither_a_process_nor_torch(scene, monkeypatch):
    scene.step(*range(1, 301))
    store = Store(scene.out)
    store.begin()
    scene.says()
    made = scene.round(shared={"jobs": 8}, steps="1:3")
    assert made.counts == {"converted": 3}
    # The others are made by hand: this is about recognising them.
    template = (scene.out / "global_step_1/streamconv.json").read_text()
    from streamconv.batch.evidence import output_evidence
    from streamconv.batch.survey import Survey

    survey = Survey(
        settings({"run": [{"root": scene.run, "output": scene.out, "model": "actor"}]}).run[0],
        store,
        {},
        {},
    )
    store.begin()
    survey.look()
    for task in survey.tasks:
        task.output.mkdir()
        (task.output / "streamconv.json").write_text(template)
        (task.output / "model.safetensors").write_bytes(b"x")
        task.record.state = "done"
        task.record.evidence = output_evidence(
            task.output, ["streamconv.json", "model.safetensors"]
        )
        store.save(task.record)
    code = (
        "import subprocess, sys\n"
        "def never(*a, **k): raise AssertionError('a child process')\n"
        "subprocess.Popen = never\n"
        "from streamconv.__main__ import _run\n"
        f"code = _run(['batch', {str(scene.run)!r}, {str(scene.out)!r}, '--model', 'actor'])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "300 done before\n"), done.stderr


# With real conversions


def test_real_conversions_and_a_lost_state(scene):
    scene.step(10, 20)
    made = scene.round(fake=False, shared={"jobs": 2}, verify=True)
    assert made.counts == {"converted": 2}, scene.told
    assert 0 < made.peak_bytes <= made.budget_bytes
    for record in read_records(scene.out):
        assert (record.state, record.verified, record.tensors) == ("done", True, 1)
    # An output that was put in its place and not compared yet is not in its own way.
    for record in read_records(scene.out):
        record.verified, record.state = None, "queued" if record.step == 10 else "done"
        Store(scene.out).save(record)
    made = scene.round(fake=False, verify=True)
    assert made.counts == {"converted": 2}, scene.told
    assert [r.verified for r in read_records(scene.out)] == [True, True]
    # Without its records it reads the manifests, and starts nothing.
    shutil.rmtree(scene.out / FOLDER)
    made = scene.round(fake=False)
    assert made.counts == {"done": 2}
    assert made.tasks == []


def test_the_job_file_of_the_guide_is_taken_by_the_command(scene):
    scene.step(100, 150)
    text = (Path(__file__).parents[1] / "docs/guides/batch.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    places = {"/runs/qwen-grpo": str(scene.run), "/models/qwen-grpo": str(scene.out)}
    for place, here in places.items():
        assert place in example
        example = example.replace(place, here)
    jobs = scene.run / "jobs.toml"
    jobs.write_text(example.replace('watch = "10m"\n', "").replace("64GB", "4GB"))
    done = cli("batch", str(jobs), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["counts"] == {"converted": 1}
    refused = cli("batch", str(jobs), "--lora", "adapter")
    assert (refused.returncode, "--lora" in refused.stderr) == (2, True)


def test_parts_of_a_batch_leave_nothing_out_and_do_nothing_twice(scene):
    scene.step(*range(10, 130, 10))
    made = [scene.round(shared={"part": f"{k}/3"}) for k in (2, 3, 1)]
    converted = [m.counts["converted"] for m in made]
    assert sum(converted) == 12
    assert min(converted) > 0
    assert [m.counts["elsewhere"] for m in made] == [12 - converted[0], converted[2], 0]
    assert set(scene.states().values()) == {"done"}
    assert len(scene.starts()) == 12


def test_parts_of_a_batch_make_what_retention_keeps(scene):
    scene.step(*range(10, 130, 10))
    for k in (1, 2, 3):
        scene.round(shared={"part": f"{k}/3", "apply": True}, keep_last=3)
    done = [step for step, state in scene.states().items() if state == "done"]
    assert done == [100, 110, 120]
    with pytest.raises(UsageError, match="no such part"):
        scene.batch(shared={"part": "4/3"})
