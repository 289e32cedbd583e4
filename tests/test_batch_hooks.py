"""Hooks happen: at least once for each output, whatever ends, and bounded in what they take."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from streamconv.batch import hooks
from streamconv.batch.ledger import Ledger
from streamconv.batch.runner import Runner
from streamconv.batch.settings import settings
from streamconv.batch.state import FOLDER, Record, Store, read_records
from streamconv.batch.survey import Survey
from streamconv.errors import StreamconvError
from streamconv.files.lockfile import locked_file
from tests.scenes import Scene, start, wait_for


@pytest.fixture
def told(tmp_path: Path) -> Path:
    return tmp_path / "told"


def says(told: Path, *names: str, then: str = "true") -> str:
    """A hook that writes down some of its facts."""
    return f'echo {" ".join(f"$STREAMCONV_{n}" for n in names)} >> "{told}"; {then}'


def note(scene: Scene, step: int = 10) -> Path:
    """Where it is noted that the hook of an output is due, as its record says."""
    name = f"global_step_{step}"
    known = [r for r in read_records(scene.out) if r.name == name] if scene.out.exists() else []
    return hooks.note_path(known[0] if known else Record(name, str(scene.out / name)))


def lock(scene: Scene) -> Path:
    return scene.out / FOLDER / "hooks" / "global_step_10.lock"


def surveyed(scene: Scene, **run) -> Survey:
    """What a batch has seen that another one is ahead of."""
    data = {"root": scene.run, "output": scene.out, "model": "actor", **run}
    made = settings({"max-mem": "4GB", "run": [data]}).run[0]
    store = Store(made.output)
    store.begin()
    survey = Survey(made, store, {}, {})
    survey.look()
    return survey


def test_one_that_fails_is_repeated_with_the_count_until_it_succeeds(scene, told):
    scene.step(10, 20)
    hook = says(
        told, "STEP", "HOOK_ATTEMPT", then="test $STREAMCONV_HOOK_ATTEMPT$STREAMCONV_STEP != 110"
    )
    codes = [scene.batch(shared={"on-done": hook}).round().exit_code for _ in range(3)]
    assert codes == [3, 0, 0]
    assert told.read_text().splitlines() == ["10 1", "20 1", "10 2"]
    assert not note(scene).exists()


def test_one_of_a_failure_is_repeated_too(scene, told):
    scene.step(10)
    scene.says(s10=["bad-input"])
    batch = scene.batch(shared={"on-error": says(told, "STATE", "HOOK_ATTEMPT", then="test -e go")})
    problems = [len(batch.round().problems) for _ in range(2)]
    assert problems == [1, 1]
    assert told.read_text().splitlines() == ["failed 1", "failed 2"]
    assert len(scene.starts()) == 1, "the conversion itself is not"


def test_a_lost_checkpoint_is_told(scene, told):
    scene.step(10)
    scene.says(s10=["bad-input"])
    batch = scene.batch(shared={"on-error": says(told, "STATE", "STEP", "ERROR")})
    listener = batch._listener

    def rotating(what, task, text):
        if what == "started":
            shutil.rmtree(scene.run / "global_step_10")
        listener(what, task, text)

    batch._listener = rotating
    assert batch.round().counts == {"gone": 1}
    assert told.read_text() == "gone 10 the source went away while it was converted\n"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_batch_that_ends_while_one_runs(scene, told, how):
    scene.step(10)
    pids = Path(f"{scene.run.parent}/pids")
    hook = f'echo $STREAMCONV_HOOK_ATTEMPT >> "{told}"; echo $$ > "{pids}"; exec sleep 60'
    process = start(scene, "--on-done", hook)
    wait_for(pids.exists)
    process.send_signal(how)
    process.communicate(timeout=60)
    quick = {"on-done": says(told, "HOOK_ATTEMPT")}
    if how == signal.SIGKILL:
        assert scene.round(shared=quick).counts == {"done": 1}
        assert told.read_text() == "1\n", "the one that was left behind is at it still"
        os.kill(int(pids.read_text()), signal.SIGKILL)
        with locked_file(lock(scene), scene.out, wait_seconds=10):  # until it is dead
            pass
    assert scene.round(shared=quick).counts == {"done": 1}
    assert told.read_text() == "1\n2\n"


def test_a_batch_that_ends_between_the_output_and_its_record(scene, told, monkeypatch):
    scene.step(10)
    real = Runner._succeed

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "_succeed", killed)
    shared = {"on-done": says(told, "STATE", "STEP")}
    with pytest.raises(KeyboardInterrupt):
        scene.batch(fake=False, shared=shared).round()
    assert (scene.out / "global_step_10/model.safetensors").is_file()
    monkeypatch.setattr(Runner, "_succeed", real)
    assert scene.round(fake=False, shared=shared).counts == {"done": 1}
    assert told.read_text() == "done 10\n"


@pytest.mark.parametrize(("number", "name"), [("KILL", "SIGKILL"), ("40", "signal 40")])
def test_one_that_is_killed(scene, number, name):
    """Most signals for real time have no name."""
    scene.step(10)
    made = scene.batch(shared={"on-done": f"kill -{number} $$"}).round()
    assert [str(p) for p in made.problems] == [f"global_step_10: --on-done ended with {name}"]
    assert scene.states() == {10: "done"}


def test_what_it_leaves_running_holds_nobody_up(scene, told):
    scene.step(10)
    hook = says(told, "STEP", then=f'(sleep 60; true) & echo $! > "{told}.pid"')
    assert scene.round(shared={"on-done": hook}).counts == {"converted": 1}
    record = read_records(scene.out)[0]
    assert hooks.awaits_hook(record) == ""
    with locked_file(lock(scene), scene.out, wait_seconds=0):
        pass
    os.kill(int(Path(f"{told}.pid").read_text()), signal.SIGKILL)


def test_one_that_another_batch_runs_is_left_to_it(scene, told):
    scene.step(10)
    note(scene).parent.mkdir(parents=True)
    with locked_file(lock(scene), scene.out):
        assert scene.round(shared={"on-done": says(told, "STEP")}).exit_code == 0
    assert not told.exists()
    assert hooks.awaits_hook(read_records(scene.out)[0]) != ""
    scene.round(shared={"on-done": says(told, "STEP")})
    assert told.read_text() == "10\n"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"attempts": -1}', '{"attempts": 1, "not_before": 1e300}']
)
def test_a_damaged_note_means_that_one_is_due(scene, told, content):
    scene.step(10)
    scene.round()
    note(scene).parent.mkdir(exist_ok=True)
    note(scene).write_text(content)
    scene.round(shared={"on-done": says(told, "STEP")})
    assert (told.read_text(), note(scene).exists()) == ("10\n", False)


def test_pauses_grow_and_end(scene, told, monkeypatch):
    scene.step(10)
    now = 1e9
    monkeypatch.setattr("streamconv.batch.hooks.time.time", lambda: now)
    batch = scene.batch(shared={"on-done": says(told, "HOOK_ATTEMPT", then="false")})
    pauses = []
    batch.round()
    while note(scene).exists():
        due = json.loads(note(scene).read_text())["not_before"]
        pauses.append(max(0, due - now))
        now = max(now, due)
        batch.round()
    assert told.read_text().split() == [str(n + 1) for n in range(hooks.MOST_ATTEMPTS)]
    assert pauses[:5] == [0, 0, 0, 60, 120]
    assert max(pauses) == 6 * 3600


def test_a_message_may_hold_what_no_environment_does():
    record = Record("x", "/out/x", state="failed", reason="a\0b\ud800")
    assert hooks.environment(record)["STREAMCONV_ERROR"] == r"a\0b\ud800"
    os.fsencode(hooks.environment(record)["STREAMCONV_ERROR"])


def test_a_batch_that_looked_earlier_forgets_nothing_that_another_expects(scene, told):
    """Its record says that retention left the output out; another batch has begun to make it."""
    output = scene.out / "global_step_10"
    record = Record("global_step_10", str(output), step=10, state="running")
    hooks.Hooks("true", None, 60).expect(record, lambda _: True)
    hooks.Hooks("true", None, 60).resume([replace(record, state="pruned")])
    assert hooks.awaits_hook(record)


def test_what_retention_leaves_out_awaits_nothing(scene, told):
    """A conversion that died left its note; the output is not to be made any more."""
    scene.step(10, 20)
    scene.says(s10=["crash"] * 9)
    shared = {"on-done": says(told, "STEP"), "apply": True}
    scene.round(steps="10", shared=shared)
    assert note(scene).exists()
    scene.round(keep_last=1, shared=shared)
    assert scene.states()[10] == "pruned"
    assert not note(scene).exists()


def test_one_of_the_output_before_leaves_that_of_the_next_due(scene, told):
    """It still runs while another batch begins to replace the output that it was for."""
    record = Record("global_step_10", str(scene.out / "global_step_10"), step=10, state="done")
    one = hooks.Hooks(
        says(told, "STEP", then=f"while [ ! -e {told}.go ]; do sleep 0.01; done"), "", 60
    )
    one.expect(record, lambda _: True)
    one.add(record)
    wait_for(told.exists)
    hooks.Hooks("true", None, 60).expect(record, lambda _: True)
    Path(f"{told}.go").touch()
    one.finish()
    assert hooks.awaits_hook(record)


def test_one_that_waits_for_its_turn_is_dropped_when_its_output_is_replaced(scene, told):
    record = Record("global_step_10", str(scene.out / "global_step_10"), step=10, state="done")
    one = hooks.Hooks(says(told, "STEP"), None, 60)
    one.expect(record, lambda _: True)
    replaced = replace(record)
    hooks.Hooks("true", None, 60).expect(replaced, lambda _: True)
    one.resume([record])
    one.finish()
    assert not told.exists()
    assert hooks.awaits_hook(replaced)


def test_a_lost_record_keeps_its_hook_due(scene, told):
    scene.step(10)
    scene.batch(fake=False, shared={"on-done": says(told, "HOOK_ATTEMPT", then="false")}).round()
    (scene.out / FOLDER / "jobs" / "global_step_10.json").unlink()
    made = scene.round(fake=False, shared={"on-done": says(told, "HOOK_ATTEMPT")})
    assert (made.counts, told.read_text()) == ({"done": 1}, "1\n2\n")


def test_what_another_batch_has_done_meanwhile_is_not_noted_as_left_out(scene, told):
    """One batch surveys, the other converts, and then the first says what retention leaves out."""
    scene.step(10, 20)
    survey = surveyed(scene, keep_last=1)
    scene.round(steps="10")
    while survey.next_tasks():
        pass
    assert scene.states()[10] == "done"


def test_what_another_batch_has_done_meanwhile_is_not_noted_as_failed(scene, told):
    scene.step(10)
    survey = surveyed(scene)
    scene.round(shared={"on-done": says(told, "STEP")})
    survey.tasks[0].refused = StreamconvError("in the way")
    runner = Runner(Ledger(4 << 30, 0, 1 << 20, 1), hooks.Hooks(None, None, 60), lambda *_: None)
    runner.run(survey.next_tasks())
    assert scene.states() == {10: "done"}
    assert runner.outcomes == {"elsewhere": 1}


@pytest.mark.parametrize("refused", ["the note", "the record"])
def test_what_a_full_disk_does_not_take_leaves_the_hook_due(scene, told, monkeypatch, refused):
    """As the record on the disk has it, which the next batch reads."""
    record = Record("global_step_10", str(scene.out / "global_step_10"), step=10, state="done")
    hooks.Hooks("true", None, 60).expect(record, lambda _: True)
    on_disk = replace(record)
    one = hooks.Hooks("true", None, 60)
    if refused == "the note":
        monkeypatch.setattr(one, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    one.expect(record, lambda _: refused == "the note")
    assert hooks.awaits_hook(record)
    assert hooks.awaits_hook(on_disk)
