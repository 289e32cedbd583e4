"""Which job a batch's record speaks of, and that a batch knows the living from the dead."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.makers import runs
from streamconv.batch import leases, pins, survey
from streamconv.batch.state import FOLDER, Store, read_records
from tests.scenes import Scene

OTHER_BOOT = "another machine's kernel"


def outputs(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")


# Records


@pytest.mark.parametrize("how", ["moved", "copied", "moved with the run"])
def test_an_output_folder_that_was_moved_or_copied_is_known_again(scene, how):
    scene.step(10, 20)
    scene.round()
    if how == "moved with the run":
        scene.run.parent.rename(place := scene.run.parent.with_name("elsewhere"))
        scene.run, scene.out, scene.script = place / "run", place / "out", place / "script.json"
    else:
        here = scene.out.with_name("here")
        subprocess.run(["cp", "-a", scene.out, here], check=True)
        if how == "moved":
            shutil.rmtree(scene.out)
        scene.out = here
    before = len(scene.starts())
    assert scene.round().counts == {"done": 2}
    assert len(scene.starts()) == before
    assert {Path(r.output).parent for r in read_records(scene.out)} == {scene.out}


def test_a_copy_is_no_business_of_the_original(scene):
    """With --overwrite, the copy's outputs are made anew in the copy."""
    scene.step(10)
    scene.round()
    before = {p: p.lstat().st_mtime_ns for p in scene.out.rglob("*") if p.parent.name[0] == "g"}
    first, scene.out = scene.out, scene.out.with_name("copy")
    subprocess.run(["cp", "-a", first, scene.out], check=True)
    (scene.out / "global_step_10/model.safetensors").write_bytes(b"spoilt")
    scene.round(overwrite=True, fake=False)
    assert {p: p.lstat().st_mtime_ns for p in before} == before


def test_another_run_of_the_same_names_sizes_and_times_is_another(scene, tmp_path):
    """What was made of the first is not taken for what is to be made of the second."""
    scene.step(10)
    assert scene.round().counts == {"converted": 1}
    source = scene.run / "global_step_10/actor" / runs.RANK_FILE
    other = runs.rank_file(tmp_path / "other" / runs.RANK_FILE, 2.0)
    assert other.stat().st_size == source.stat().st_size
    other.replace(source)
    runs.age(source.parent)
    made = scene.round()
    assert (made.counts, made.exit_code) == ({"failed": 1}, 3)
    assert "rewritten" in read_records(scene.out)[0].reason


def test_another_model_of_the_same_name_is_another(scene, tmp_path):
    scene.step(10)
    scene.round()
    other = runs.rank_file(tmp_path / "other" / runs.RANK_FILE, 2.0)
    runs.add_step(scene.run, 10, other, model="critic")
    assert scene.round(model="critic").counts == {"failed": 1}
    assert read_records(scene.out)[0].model == "critic"


@pytest.mark.parametrize("what", ["base", "hf_config"])
def test_another_base_or_config_makes_other_outputs(scene, tmp_path, what):
    import numpy as np
    from safetensors.numpy import save_file

    folders = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"w": np.zeros(len(folders) + 2, np.float32)}, folder / "model.safetensors")
        (folder / "config.json").write_text(f'{{"vocab_size": {len(folders)}}}')
        runs.age(folder)
        folders.append(folder)
    scene.step(10)
    assert scene.round(**{what: folders[0]}).counts == {"converted": 1}
    assert scene.round(**{what: folders[0]}).counts == {"done": 1}
    assert scene.round(**{what: folders[1]}).counts == {"failed": 1}


# What went away


def test_what_went_away_is_told_to_the_hook(scene, tmp_path):
    scene.step(10, old=False)
    scene.step(20)
    assert scene.round().counts == {"waiting": 1, "converted": 1}
    shutil.rmtree(scene.run / "global_step_10")
    told = tmp_path / "told"
    hook = {"on-error": f'echo "$STREAMCONV_STATE $STREAMCONV_STEP" >> {told}'}
    made = scene.round(shared=hook)
    assert (made.counts, made.exit_code) == ({"done": 1, "gone": 1}, 3)
    assert told.read_text() == "gone 10\n"


# Clocks


def test_a_clock_that_is_ahead_makes_nothing_old(scene, monkeypatch):
    scene.step(10, old=False)
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 15 * 60 * 10**9)
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 15 * 60)
    batch = scene.batch()
    assert batch.round().counts == {"waiting": 1}
    boot, at = leases.boot_clock()
    clock = {"is": at + 299}
    monkeypatch.setattr("streamconv.batch.survey.boot_clock", lambda: (boot, clock["is"]))
    assert batch.round().counts == {"waiting": 1}
    clock["is"] += 100
    monkeypatch.setattr("streamconv.batch.survey.boot_clock", lambda: ("other", clock["is"]))
    assert scene.round().counts == {"waiting": 1}  # a machine that sees it for the first time
    monkeypatch.setattr("streamconv.batch.survey.boot_clock", lambda: (boot, clock["is"]))
    assert scene.round().counts == {"converted": 1}


def test_a_clock_of_another_year_makes_nothing_old_either(scene, monkeypatch):
    """What the file system takes for now tells."""
    scene.step(10, old=False)
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 400 * 86400 * 10**9)
    assert scene.round().counts == {"waiting": 1}


def test_what_changes_while_it_is_looked_at_is_not_whole(scene, monkeypatch):
    scene.step(10)
    identify = survey.identify

    def slow(path, job):
        (path / "new.pt").touch()
        return identify(path, job)

    with monkeypatch.context() as patch:
        patch.setattr(survey, "identify", slow)
        assert scene.round().counts == {"waiting": 1}
    (scene.run / "global_step_10/actor/new.pt").unlink()
    runs.age(scene.run / "global_step_10/actor")
    assert scene.round().counts == {"converted": 1}


# Pins


def pins_of(scene: Scene, name: str, boot: str | None = None, *, idle: float = 0) -> Path:
    """Lay pins there as a batch does, with a lease that nobody holds."""
    folder = scene.out / FOLDER / "pins" / name
    (folder / "global_step_5/actor").mkdir(parents=True)
    lease = folder.with_name(f"{name}.lease")
    lease.write_text(boot or leases.boot_clock()[0])
    os.utime(lease, (time.time() - idle,) * 2)
    return folder


@pytest.mark.parametrize("boot", [None, OTHER_BOOT])
def test_pins_of_a_live_batch_stay_whatever_its_number(scene, boot):
    """In another PID namespace nobody knows its process, though the host's name is the same."""
    folder = pins_of(scene, "host-99999999", boot, idle=10 * 86400)
    code = (
        f"import fcntl, sys; file = open({str(folder) + '.lease'!r}, 'r+');"
        "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        pins.remove_left_behind(scene.out / FOLDER)
        assert folder.is_dir()
        holder.kill()
    pins.remove_left_behind(scene.out / FOLDER)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("boot", "idle", "stays"),
    [(None, 0, False), (OTHER_BOOT, 600, True), (OTHER_BOOT, 7200, False)],
)
def test_pins_of_a_dead_batch_go_once_it_is_certain(scene, boot, idle, stays):
    """Locks of another machine need not be seen here: there it takes a while without a sign of life."""
    folder = pins_of(scene, "host-1", boot, idle=idle)
    pins.remove_left_behind(scene.out / FOLDER)
    assert folder.exists() == stays
    assert folder.with_name("host-1.lease").exists() == stays


def test_where_there_are_no_locks_only_time_tells(scene, monkeypatch):
    def unsupported(fd: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    young, old = pins_of(scene, "a", idle=7200), pins_of(scene, "b", idle=2 * 86400)
    pins.remove_left_behind(scene.out / FOLDER)
    assert (young.exists(), old.exists()) == (True, False)
    holder = pins.Holder()
    (source := scene.run / "global_step_5/actor").mkdir(parents=True)
    pinned = holder.pin(source, [], [holder.folder(scene.out / FOLDER) / "job"])
    holder.beat()
    pins.remove_left_behind(scene.out / FOLDER)
    assert pinned.is_dir()
    holder.unpin(pinned)
    assert [p.name for p in young.parent.iterdir() if p != young] == ["a.lease"]


def test_a_worker_holds_the_pins_that_it_reads(scene):
    """Also when its batch is killed, as long as it takes to end."""
    holder = pins.Holder()
    (source := scene.run / "global_step_5/actor").mkdir(parents=True)
    place = holder.folder(scene.out / FOLDER) / "job"
    pinned = holder.pin(source, [], [place])
    worker = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=holder.fds
    )
    for lease in holder._leases.values():
        lease._close()
    pins.remove_left_behind(scene.out / FOLDER)
    assert pinned.is_dir()
    worker.communicate(b"\n")
    pins.remove_left_behind(scene.out / FOLDER)
    assert not pinned.exists()


def test_records_of_outputs_that_lie_elsewhere_are_none(scene):
    scene.step(10)
    scene.round()
    (path,) = (scene.out / FOLDER / "jobs").iterdir()
    text = path.read_text()
    assert str(scene.out) not in text
    path.write_text(text.replace('"name": "global_step_10"', '"name": "../global_step_10"'))
    assert read_records(scene.out) == []
    store = Store(scene.out)
    store.begin()
    assert list(store) == []
