"""A batch deletes nothing that nobody can make again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from scripts.makers import runs
from streamconv.batch import readings, removal, retention, training
from streamconv.batch.deletions import OutputFacts, SourceFacts, why_keep_output, why_keep_source
from streamconv.batch.ready import Tracker
from streamconv.batch.state import FOLDER, Record, Store, file_name, read_records
from tests.scenes import Scene

DELETING = {"delete_sources": True, "verify": True, "shared": {"apply": True}}
OPTIM = "optim_world_size_1_rank_0.pt"

STILL = "may still be written: it has not lain still for long enough"


def sources(scene: Scene, model: str = "actor") -> list[int]:
    return sorted(
        int(p.parent.name.split("_")[2]) for p in scene.run.glob(f"global_step_*/{model}")
    )


def outputs(scene: Scene) -> list[int]:
    found = [p for p in scene.out.glob("global_step_*") if (p / "model.safetensors").is_file()]
    return sorted(int(p.name.split("_")[2]) for p in found)


def refusals(made) -> dict[str, str]:
    return {r.path.relative_to(r.path.parents[1]).as_posix(): r.refused for r in made.removals}


def flip(path: Path) -> None:
    """Change a byte, and nothing else that can be seen without reading it."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def done(scene: Scene) -> Scene:
    """Steps 10, 20 and 30, converted and verified."""
    scene.step(10, 20, 30)
    assert scene.round(verify=True).counts == {"converted": 3}
    return scene


def aged(path: Path) -> None:
    for folder in (path, *path.parents):
        runs.age(folder)
        if "global_step" in folder.name:
            return


# Sources


def test_sources_of_verified_outputs_go_but_for_the_newest(done):
    made = done.round(**DELETING)
    assert refusals(made) == {
        "global_step_10/actor": "",
        "global_step_20/actor": "",
        "global_step_30/actor": "training goes on from it",
    }
    assert (sources(done), outputs(done)) == ([30], [10, 20, 30])
    assert not list(done.run.rglob(".*"))
    assert done.round(**DELETING).counts == {"done": 1}


@pytest.mark.parametrize(
    ("link", "to"),
    [
        ("global_step_20/actor/" + OPTIM, "../../global_step_10/actor/" + runs.RANK_FILE),
        ("global_step_10/critic", "actor"),
        ("best", "global_step_10"),
    ],
)
def test_a_source_that_a_link_leads_to_stays(done, link, to):
    """A later step that shares a file with it is not whole without it."""
    (done.run / link).symlink_to(to)
    (done.run / "up").symlink_to(".")  # leads to no step
    for step in (20, 30):
        aged(done.run / f"global_step_{step}/actor")
    made = done.batch(**DELETING).round()
    assert "a link leads to what lies in it" in refusals(made)["global_step_10/actor"]
    assert sources(done)[0] == 10
    assert (done.run / link).exists()


@pytest.mark.parametrize("name", ["model.safetensors", "streamconv.json"])
def test_one_flipped_byte_in_an_output_keeps_its_source(done, name):
    """Size and time are as they were when it was verified; it is the only copy."""
    flip(done.out / "global_step_10" / name)
    made = done.batch(**DELETING).round()
    assert f"the output is damaged: {name}" in refusals(made)["global_step_10/actor"]
    assert (sources(done), made.exit_code) == ([10, 30], 3)
    assert read_records(done.out)[0].verified is False


def test_a_source_that_is_another_runs_by_now_stays(done, tmp_path, monkeypatch):
    """Its names, sizes and times are the same, and the record even says that it was looked at."""
    other = runs.rank_file(tmp_path / runs.RANK_FILE, 2.0)
    batch = done.batch(**DELETING)
    convert = batch._convert

    def swapped(*args):
        convert(*args)
        other.replace(done.run / "global_step_10/actor" / runs.RANK_FILE)
        aged(done.run / "global_step_10/actor")

    monkeypatch.setattr(batch, "_convert", swapped)
    made = batch.round()
    assert "made of something else" in refusals(made)["global_step_10/actor"]
    assert sources(done) == [10, 30]


@pytest.mark.parametrize("what", ["cut", "gone", "rewritten"])
def test_the_newest_step_is_judged_after_the_conversions(done, what, monkeypatch):
    batch = done.batch(**DELETING)
    convert = batch._convert

    def rotated(*args):
        convert(*args)
        file = done.run / "global_step_30/actor" / runs.RANK_FILE
        data = file.read_bytes()
        file.unlink()
        if what == "cut":
            file.write_bytes(b"5 byt")
        elif what == "rewritten":
            file.write_bytes(data)
        aged(file.parent)

    monkeypatch.setattr(batch, "_convert", rotated)
    made = batch.round()
    if what == "rewritten":
        # The same bytes, and the times too: there is nothing to see.
        assert sources(done) == [30]
    else:
        assert sources(done) == [10, 20, 30]
        assert not any(r.applied for r in made.removals)
    # Later, what lies still is judged by what is in it.
    made = done.batch(**DELETING).round()
    assert sources(done) == ([30] if what == "rewritten" else [20, 30])


def extras(scene: Scene, step: int, *names: str, data: bytes | None = None) -> None:
    for name in names:
        path = scene.run / f"global_step_{step}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(scene.file.read_bytes() if data is None else data)
        aged(path.parent)


@pytest.mark.parametrize(
    ("names", "broken"),
    [
        (["actor/" + OPTIM], "cut"),
        (["actor/" + OPTIM], "empty"),
        (["actor/" + OPTIM], "missing"),
        (["actor/extra_state_world_size_1_rank_0.pt"], "zeros"),
        (["critic/" + runs.RANK_FILE, "critic/" + OPTIM], "missing"),
        (["critic/" + runs.RANK_FILE, "critic/" + OPTIM], "cut"),
        (["actor/states/rng_state_0.pth"], "cut"),
        (["actor/mp_rank_00/distrib_optim.pt", "actor/mp_rank_01/distrib_optim.pt"], "missing"),
        (["actor/optimizer/dist_ckpt/__0_0.distcp"], "cut"),
        (["trainer_state.json"], "cut"),
        (["data.pt"], "missing"),
    ],
)
def test_the_step_that_remains_has_all_that_training_needs(scene, names, broken):
    scene.step(10, 20)
    for step in (10, 20):
        extras(scene, step, *names, data=b"{}" if names[0].endswith("json") else None)
    scene.round(verify=True)
    last = scene.run / "global_step_20" / names[-1]
    data = {"cut": last.read_bytes()[:-1], "empty": b"", "zeros": bytes(2000)}.get(broken)
    last.unlink()
    if data is not None:
        last.write_bytes(data)
    aged(last.parent)
    made = scene.round(**DELETING)
    assert "global_step_20 will not do" in refusals(made)["global_step_10/actor"], made.removals
    assert sources(scene) == [10, 20]
    extras(scene, 20, *names, data=b"{}" if names[0].endswith("json") else None)
    scene.round(**DELETING)
    assert sources(scene) == [20]


def test_a_step_that_could_not_be_converted_is_none_to_go_on_from(scene):
    """Its files look whole at their ends, and are damaged between them."""
    scene.step(10, 20, 30)
    scene.says(s30=["bad-input"])
    made = scene.round(**DELETING)
    assert "global_step_30 will not do" in refusals(made)["global_step_20/actor"]
    assert sources(scene) == [20, 30]


def with_optimizers(scene: Scene, *steps: int, names=("actor/" + OPTIM,)) -> None:
    scene.step(*steps)
    for step in steps:
        extras(scene, step, *names)
    folders = [scene.run / f"global_step_{step}" for step in steps]
    # No links: a deletion would change the time of the rest.
    for path in [path for folder in folders for path in folder.rglob("*.pt*")]:
        copy = path.with_suffix(".copy")
        shutil.copy2(path, copy)
        copy.replace(path)
        aged(path.parent)


@pytest.mark.parametrize(
    "name",
    [
        "actor/" + runs.RANK_FILE,
        "actor/" + OPTIM,
        "actor/extra_state_world_size_1_rank_0.pt",
        "critic/" + OPTIM,
        "actor/mp_rank_00/model_optim_rng.pt",
        "actor/optimizer.pth.tar",
        "data.pt",
    ],
)
def test_a_flipped_byte_in_the_step_that_remains_keeps_the_source(scene, name):
    """Neither name, size, time nor directory tells, and no conversion reads it any more."""
    critic = ["critic/" + runs.RANK_FILE] if name.startswith("critic") else []
    with_optimizers(scene, 10, 20, names=[name, *critic] if runs.RANK_FILE not in name else ())
    scene.round(verify=True)
    path = scene.run / "global_step_20" / name
    data, status = path.read_bytes(), path.stat()
    at = data.index(b"\x00\x00\x80?" * 16)  # the tensor
    path.write_bytes(data[:at] + b"\x01" + data[at + 1 :])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):  # the second time from memory
        made = scene.batch(**DELETING).round()
        assert "CRC-32" in refusals(made)["global_step_10/actor"]
        (problem,) = made.problems
        assert str(path) in str(problem)
        assert "CRC-32" in str(problem)
        assert (made.exit_code, sources(scene)) == (3, [10, 20])
    path.write_bytes(data)
    aged(path.parent)
    scene.round(**DELETING)
    assert sources(scene) == [20]


def test_where_the_newest_is_damaged_the_one_before_it_will_do(scene):
    with_optimizers(scene, 10, 20, 30)
    scene.round(verify=True)
    path = scene.run / "global_step_30/actor" / OPTIM
    data = bytearray(path.read_bytes())
    data[data.index(b"\x00\x00\x80?" * 16)] ^= 1
    path.write_bytes(data)
    aged(path.parent)
    made = scene.batch(**DELETING).round()
    assert sources(scene) == [20, 30]
    assert "global_step_30 will not do" in refusals(made)["global_step_20/actor"]
    assert [p.where for p in made.problems] == [str(scene.run / "global_step_30")]


def test_a_later_step_is_read_once(scene, monkeypatch):
    """By none that only says what it would do, and by one of several rounds and sources."""
    read = []

    def counted(directory, check=readings.check_records):
        read.append(Path(directory.window.name).relative_to(scene.run).parts[0])
        return check(directory)

    monkeypatch.setattr(readings, "check_records", counted)
    with_optimizers(scene, 10, 20, 30)
    scene.round(verify=True, delete_sources=True)
    assert read == []
    scene.round(**DELETING)
    assert (sources(scene), read) == ([30], ["global_step_30"] * 2)
    with_optimizers(scene, 25)
    scene.round(**DELETING)
    assert (sources(scene), read) == ([30], ["global_step_30"] * 2)


def test_a_reading_that_was_stopped_goes_on_where_it_was(scene, monkeypatch):
    read = []

    def stopped(directory, check=readings.check_records):
        read.append(Path(directory.window.name).name)
        if len(read) == 2:
            raise SystemExit(143)
        return check(directory)

    monkeypatch.setattr(readings, "check_records", stopped)
    with_optimizers(scene, 10, 20)
    with pytest.raises(SystemExit):
        scene.round(**DELETING)
    assert sources(scene) == [10, 20]
    scene.round(**DELETING)
    assert (sources(scene), read) == ([20], [runs.RANK_FILE, OPTIM, OPTIM])


@pytest.mark.parametrize("memory", ["[]", "{", '{"steps": {"global_step_20": {"a": [1]}}}'])
def test_what_was_read_may_be_forgotten(scene, memory):
    with_optimizers(scene, 10, 20)
    scene.round(verify=True)
    folder = scene.out / FOLDER / "readings"
    folder.mkdir()
    (folder / f"{file_name(str(scene.run))}.json").write_text(memory)
    scene.round(**DELETING)
    assert sources(scene) == [20]


def test_files_without_checksums_are_judged_by_their_ends_and_named(scene):
    import torch

    with_optimizers(scene, 10, 20)
    for step in (10, 20):
        path = scene.run / f"global_step_{step}/data.pt"
        torch.save({"at": 1}, path, _use_new_zipfile_serialization=False)
        aged(path)
    batch = scene.batch(**DELETING)
    made = batch.round()
    assert sources(scene) == [20]
    (notice,) = made.notices
    assert "1 files without checksums" in notice
    assert "data.pt" in notice


def test_what_is_not_a_file_of_weights_is_not_in_the_way(scene, tmp_path):
    with_optimizers(scene, 10, 20)
    (tmp_path / "base").mkdir()
    for step in (10, 20):
        folder = scene.run / f"global_step_{step}"
        (folder / "base").symlink_to(tmp_path / "base")
        os.mkfifo(folder / "pipe")
        (folder / "samples.zip").write_bytes(b"PK\x03\x04" + bytes(100))
        (folder / "log.txt").write_text("PK")
        os.utime(folder / "base", (1_700_000_000,) * 2, follow_symlinks=False)
        aged(folder)
    made = scene.round(**DELETING)
    assert sources(scene) == [20], made.removals
    assert "samples.zip" in made.notices[0]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("damaged", [False, True])
def test_records_of_a_distributed_checkpoint_are_read_where_the_index_says(scene, damaged):
    import torch
    import torch.distributed.checkpoint as dcp

    scene.step(10, 20)
    for step in (10, 20):
        folder = scene.run / f"global_step_{step}/actor/optimizer/dist_ckpt"
        dcp.save({"exp_avg": torch.ones(4, 4), "step": 3}, checkpoint_id=folder, no_dist=True)
        aged(folder)
    scene.round(verify=True)
    (path,) = (scene.run / "global_step_20").rglob("*.distcp")
    if damaged:
        data = bytearray(path.read_bytes())
        data[data.index(b"\x00\x00\x80?" * 16)] ^= 1
        path.write_bytes(data)
        aged(path)
    made = scene.batch(**DELETING).round()
    assert sources(scene) == ([10, 20] if damaged else [20]), made.removals
    assert made.notices == []
    assert [str(path) in str(p) for p in made.problems] == ([True] if damaged else [])


def test_a_set_of_ranks_is_whole_by_what_its_names_say(scene):
    """Though the earlier step has lost its own optimizer, or never had one."""
    scene.step(10, 20)
    extras(scene, 20, "actor/optim_world_size_4_rank_0.pt", "actor/optim_world_size_4_rank_3.pt")
    made = scene.round(**DELETING)
    assert (
        "2 of 4 files actor/optim_world_size_4_rank_*.pt" in refusals(made)["global_step_10/actor"]
    )


def test_a_step_without_its_critic_is_not_one_to_train_on(scene):
    """Though the earlier step's own critic is gone by now, too."""
    scene.step(10, 20, 30)
    extras(scene, 20, f"critic/{runs.RANK_FILE}", data=b"cut")
    made = scene.round(**DELETING)
    assert "it has no critic, as global_step_20 has" in refusals(made)["global_step_10/actor"]
    assert sources(scene) == [10, 20, 30]
    extras(scene, 20, f"critic/{runs.RANK_FILE}")
    scene.round(**DELETING)
    assert sources(scene) == [20, 30]


@pytest.mark.parametrize("tracker", [None, "", "nonsense", "10", "30"])
def test_the_tracker_may_be_lost_empty_or_behind(done, tracker):
    if tracker is not None:
        path = done.run / runs.TRACKER
        path.write_text(tracker)
        os.utime(path, (time.time() - 86400,) * 2)
    done.round(**DELETING)
    assert sources(done) == ([10, 30] if tracker == "10" else [30])


def test_names_of_two_kinds_are_ordered_by_time(scene):
    for name, at in (("step_1100", 1), ("step_1200", 2), ("epoch_3", 3)):
        folder = scene.run / name / "actor"
        folder.mkdir(parents=True)
        shutil.copy(scene.file, folder / runs.RANK_FILE)
        for path in [folder / runs.RANK_FILE, folder, folder.parent]:
            os.utime(path, (1_700_000_000 + at,) * 2)
    scene.round(**DELETING)
    assert [p.parent.name for p in scene.run.glob("*/actor")] == ["epoch_3"]


def test_after_a_restart_neither_the_new_step_nor_the_abandoned_goes(scene):
    scene.step(20, 40, 60)
    scene.round(verify=True)
    again = scene.run / "global_step_40/actor"
    shutil.rmtree(again)
    again.mkdir()
    shutil.copy(scene.file, again / runs.RANK_FILE)
    for path in (again / runs.RANK_FILE, again, again.parent):
        os.utime(path, (1_750_000_000,) * 2)
    scene.round(**DELETING)
    assert sources(scene) == [40, 60]


def test_nothing_goes_while_a_later_step_is_written(done):
    done.step(40, old=False)
    made = done.round(**DELETING)
    assert set(refusals(made).values()) == {f"global_step_40 {STILL}"}
    # The tracker says that it is not.
    done.tracker(40)
    os.utime(done.run / runs.TRACKER, (time.time() + 5,) * 2)
    done.round(**DELETING)
    assert sources(done) == [40]


@pytest.mark.parametrize("inside", ["checkpoint", "output"])
def test_what_lies_in_a_source_and_is_not_its_own_stays(done, inside):
    folder = done.run / "global_step_10/actor/below"
    if inside == "checkpoint":
        for step in (10, 20, 30):
            extras(done, step, f"actor/below/{runs.RANK_FILE}")
    else:
        shutil.copytree(done.out / "global_step_10", folder)
    runs.age(folder.parent)
    shutil.rmtree(done.out)
    made = done.round(**DELETING)
    assert "lies in it" in refusals(made)["global_step_10/actor"], made.problems
    assert folder.is_dir()


def test_a_config_or_base_that_conversions_read_stays(tmp_path):
    config = tmp_path / "actor/huggingface"
    config.mkdir(parents=True)
    assert "conversions read" in retention._inside(tmp_path / "actor", [tmp_path, config])
    assert retention._inside(tmp_path / "actor", [tmp_path]) == ""


def test_a_file_that_no_later_step_has_is_not_the_trainers(done):
    (done.run / "global_step_10/actor/thesis.tex").touch()
    shutil.rmtree(done.out)
    aged(done.run / "global_step_10/actor")
    made = done.round(**DELETING)
    assert refusals(made)["global_step_10/actor"].endswith("it has no actor/thesis.tex")
    assert sources(done) == [10, 30]


@pytest.mark.parametrize("state", ["failed", "waiting", "moved", "done"])
def test_a_source_stays_until_every_output_of_it_is_done(done, state):
    """Two runs of one batch, with other options, in other folders."""
    other = done.out.with_name("other")
    run = {"root": done.run, "model": "actor", "verify": True}
    shared = {"apply": True}
    shared["run"] = [
        {**run, "output": done.out, "delete-sources": True},
        {**run, "output": other, "settle": "0s"},
    ]
    done.says(**({"s10": ["bad-input"]} if state == "failed" else {}))
    if state in ("failed", "done"):
        done.batch(shared=shared).round()
        assert sources(done) == ([10, 30] if state == "failed" else [30])
        return
    store = Store(other)
    done.batch(shared={**shared, "apply": False}).round()
    store.begin()
    record = store.get("global_step_20")
    if state == "moved":
        (other / "global_step_20").rename(other.with_name("away"))
    record.state, record.snapshot = state if state == "waiting" else "done", record.snapshot
    store.save(record)
    if state == "waiting":
        shared["run"][1]["steps"] = "30"
    done.says(s20=["bad-input"])
    made = done.batch(shared=shared).round()
    assert "not done" in refusals(made)["global_step_20/actor"]
    assert sources(done) == [20, 30]


def test_a_state_of_training_beside_a_model_is_no_model(scene):
    """It is named, is not converted, and keeps no source; one that is asked for is a model."""
    scene.step(10, 20)
    scene.step(10, 20, model="extra")
    scene.step(10, 20, model="critic")
    scene.step(10, 20, model="optimus")
    extra = Record("global_step_20/extra", "", model="extra", run="run", root=str(scene.run))
    extra.source, extra.state = str(scene.run / "global_step_20/extra"), "failed"
    extra.error = {"kind": "bad-input", "exit_code": 5}  # by an earlier release
    store = Store(scene.out)
    store.begin()
    store.save(extra)
    made = scene.round(model=None, **DELETING)
    assert (made.exit_code, made.counts) == (0, {"converted": 6})
    assert sum("by its name it is a state of training" in n for n in made.notices) == 2
    assert [sources(scene, m) for m in ("actor", "critic", "optimus")] == [[20]] * 3
    assert sources(scene, "extra") == [10, 20]
    assert scene.round(model=None, **DELETING).counts == {"done": 3}
    assert scene.round(model="extra", name="{step}-extra").counts == {"converted": 2}


# How it is done


def test_what_comes_while_a_folder_is_removed_stays_and_is_named(tmp_path, monkeypatch):
    folder, note = tmp_path / "actor", tmp_path / "notes/n.json"
    (folder / "below").mkdir(parents=True)
    for name in ("a", "below/b", "changed"):
        (folder / name).write_text(name)
    listed = removal.listing(folder)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        moved = real(self, target)
        if target.name.startswith("."):
            monkeypatch.setattr(removal, "listing", lambda path: listed)
            (target / "below/new").write_text("new")
            (target / "changed").write_text("another")
        return moved

    monkeypatch.setattr(Path, "rename", rename)
    looked = removal.listing
    outcome = removal.remove(folder, listed, note)
    monkeypatch.setattr(removal, "listing", looked)
    assert outcome.refused == ""
    assert sorted(removal.listing(folder)) == ["below/new", "changed"]
    assert not note.exists()


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_changed_since_it_was_listed_is_not_removed(tmp_path, monkeypatch, when):
    folder, note = tmp_path / "actor", tmp_path / "n.json"
    folder.mkdir()
    (folder / "a").write_text("a")
    listed = removal.listing(folder)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        moved = real(self, target)
        if target.name.startswith("."):
            (target / "new").touch()
        return moved

    if when == "before":
        (folder / "new").touch()
    else:
        monkeypatch.setattr(Path, "rename", rename)
    assert removal.remove(folder, listed, note).refused.startswith("it changed meanwhile")
    assert sorted(p.name for p in folder.iterdir()) == ["a", "new"]
    assert removal.remove(folder, listed, note, recheck=lambda: "no").refused == "no"


def test_a_kill_at_any_moment_leaves_all_or_nothing(tmp_path, monkeypatch):
    """Under its name a folder is whole or not there, and the next batch comes to an end with it."""

    def dying(name: str, after: list[int]):
        real = getattr(Path, name)

        def call(self: Path, *args, **kwargs):
            after[0] -= 1
            if after[0] == 0:
                raise KeyboardInterrupt
            made = real(self, *args, **kwargs)
            if after[0] == 1:
                after[0] = 0
                raise KeyboardInterrupt
            return made

        return call

    moments = 0
    for moment in range(1, 100):
        folder, note = tmp_path / f"{moment}/actor", tmp_path / f"{moment}/n.json"
        (folder / "below").mkdir(parents=True)
        for name in ("a", "below/b", "c"):
            (folder / name).write_text(name)
        listed = removal.listing(folder)
        left = [moment]
        try:
            with monkeypatch.context() as patch:
                for name in ("rename", "unlink", "rmdir", "replace", "mkdir"):
                    patch.setattr(Path, name, dying(name, left))
                removal.remove(folder, listed, note)
        except KeyboardInterrupt:
            moments += 1
        else:
            break
        assert not folder.exists() or removal.listing(folder) == listed
        removal.resume(note, folder, "")
        removal.resume(note, folder, "")
        assert not note.exists()
        assert not removal.aside_of(folder).exists()
        assert not folder.exists() or removal.listing(folder) == listed
    assert moments > 8


@pytest.mark.parametrize("kind", ["source", "output"])
@pytest.mark.parametrize("all_there", [True, False])
def test_a_removal_that_was_killed_is_undone_or_finished(done, kind, all_there):
    path = done.run / "global_step_10/actor" if kind == "source" else done.out / "global_step_10"
    record = read_records(done.out)[0]
    listed = removal.listing(path)
    note = done.out / FOLDER / "removals" / f"{kind}-{record.name}.json"
    removal._write_note(note, path, listed)
    aside = removal.aside_of(path)
    path.rename(aside)
    if not all_there:
        (aside / min(listed)).unlink()
    (done.run / "global_step_20/.actor.streamconv-deleted").mkdir()  # nobody's we know of
    made = done.round(verify=True)
    if all_there:
        assert path.is_dir()
        assert made.counts == {"done": 3}
    else:
        # The output is made anew meanwhile; what is left of the old one waits for --apply.
        assert (path.exists(), aside.is_dir()) == (kind == "output", True)
        assert "--apply" in str(made.removals[0])
        made = done.round(verify=True, keep_last=9, shared={"apply": True})
        assert (path.exists(), aside.exists()) == (kind == "output", False)
        assert made.removals[0].applied
        assert done.states()[10] == "done"
    assert not note.exists()
    assert any(".actor.streamconv-deleted: put aside" in notice for notice in made.notices)
    assert (done.run / "global_step_20/.actor.streamconv-deleted").is_dir()


@pytest.mark.parametrize("kind", ["source", "output"])
@pytest.mark.parametrize("all_there", [True, False])
def test_a_removal_that_was_killed_is_settled_also_where_things_were_moved(done, kind, all_there):
    path = done.run / "global_step_10/actor" if kind == "source" else done.out / "global_step_10"
    (path / "more").write_text("more")
    note = done.out / FOLDER / "removals" / f"{kind}-global_step_10.json"
    removal._write_note(note, path, removal.listing(path))
    path.rename(removal.aside_of(path))
    if not all_there:
        (removal.aside_of(path) / "more").unlink()
    moved = done.run.with_name("moved run"), done.out.with_name("moved out")
    done.run.rename(moved[0])
    done.out.rename(moved[1])
    source, output = moved[0] / "global_step_10/actor", moved[1] / "global_step_10"
    place = source if kind == "source" else output
    note = moved[1] / note.relative_to(done.out)
    done.run, done.out = moved
    # A batch of another run first: what it does not see may still be settled.
    other = Scene(done.run.parent / "other", done.file)
    other.out = done.out
    other.round()
    assert kind == "output" or note.exists()
    made = done.round(keep_last=9, shared={"apply": True})
    assert not note.exists()
    assert not removal.aside_of(place).exists()
    if all_there:
        assert (place / "more").read_text() == "more"
    else:
        assert made.removals[0].applied or kind == "output"
        assert (place.exists(), (place / "more").exists()) == (kind == "output", False)


def test_a_copy_of_what_a_killed_removal_left_is_named_and_stays(done):
    """No inode says that it is what was to be deleted."""
    path = done.run / "global_step_10/actor"
    (path / "more").write_text("more")
    note = done.out / FOLDER / "removals/source-global_step_10.json"
    removal._write_note(note, path, removal.listing(path))
    aside = removal.aside_of(path)
    shutil.copytree(path, aside)
    shutil.rmtree(path)
    (aside / "more").unlink()
    for _ in range(2):
        made = done.round(shared={"apply": True})
        assert "copied" in made.removals[0].refused
        assert str(aside) in made.removals[0].refused
        assert [p.name for p in aside.iterdir()] == [runs.RANK_FILE]


def test_what_nobody_settles_is_named_beside_outputs_too(done):
    aside = removal.aside_of(done.out / "global_step_7")
    aside.mkdir()
    made = done.round(**DELETING)
    assert [n for n in made.notices if n.startswith(f"{aside}: put aside by a removal")]


@pytest.mark.parametrize("refused", ["below", "first", "second"])
def test_a_removal_that_the_system_refuses_takes_nothing_or_says_so(scene, monkeypatch, refused):
    """What is kept is kept under its name, and whole."""
    done, path = scene, scene.run / "global_step_10/actor"
    scene.step(10, 20)
    for folder in (path, scene.run / "global_step_20/actor"):
        (folder / "below").mkdir()
        (folder / "below/z").touch()
        (folder / "a").touch()
        runs.age(folder)
    done.round(verify=True)
    listed = removal.listing(path)
    unlink, access = Path.unlink, os.access
    deleted = []

    def refusing(self: Path, missing_ok: bool = False) -> None:
        if ".actor.streamconv-deleted" in str(self) and "global_step_10" in str(self):
            in_the_way = {"below": self.parent.name == "below", "first": True, "second": deleted}
            if in_the_way[refused]:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            deleted.append(self)
        unlink(self, missing_ok=missing_ok)

    def told(path, mode, **kwargs):
        closed = refused == "below" and str(path).endswith("/below")
        return access(path, mode, **kwargs) and not closed

    monkeypatch.setattr(Path, "unlink", refusing)
    monkeypatch.setattr(os, "access", told)
    monkeypatch.setattr(os, "supports_effective_ids", {*os.supports_effective_ids, told})
    made = done.batch(**DELETING).round()
    answer = next(r for r in made.removals if r.path == path)
    assert not answer.applied
    aside = removal.aside_of(path)
    if refused == "second":
        assert (path.exists(), len(removal.listing(aside))) == (False, 2)
        assert "removed in part: Permission denied" in answer.refused
        assert str(aside) in answer.refused
        assert made.exit_code == 3
    else:
        assert removal.listing(path) == listed
        assert not aside.exists()
        assert made.exit_code == 0
        assert ("below" if refused == "below" else "Permission denied") in answer.refused
    monkeypatch.undo()
    done.batch(**DELETING).round()
    assert not path.exists()
    assert not aside.exists()


def test_a_note_of_something_else_removes_nothing(done, tmp_path):
    victim = tmp_path / ".victim.streamconv-deleted"
    victim.mkdir()
    (victim / "file").write_text("precious")
    note = done.out / FOLDER / "removals/source-global_step_10.json"
    note.parent.mkdir()
    files = {"file": [8, (victim / "file").stat().st_mtime_ns, (victim / "file").stat().st_ino]}
    note.write_text(json.dumps({"path": str(tmp_path / "victim"), "files": files}))
    done.round(**DELETING)
    assert (victim / "file").read_text() == "precious"


# Outputs


def keeping(scene: Scene, last: int = 1, **more):
    return scene.round(keep_last=last, shared={"apply": True}, **more)


def test_outputs_that_are_not_there_do_not_count(done):
    (done.out / "global_step_30").rename(done.out.with_name("published"))
    shutil.rmtree(done.run)
    done.run.mkdir()
    keeping(done)
    assert outputs(done) == [20]


def test_outputs_that_were_not_compared_go_like_others(scene):
    """--verify came later than they: comparing what is to go is of no use, and it goes nevertheless."""
    scene.step(10, 20, 30)
    scene.round()
    keeping(scene, verify=True)
    assert outputs(scene) == [30]
    assert scene.states() == {10: "pruned", 20: "pruned", 30: "done"}


def test_damaged_outputs_do_not_count(done):
    """Their sizes and times are as they were."""
    path = done.out / "global_step_30/model.safetensors"
    flip(path)
    made = done.batch(keep_last=1, shared={"apply": True}).round()
    assert (outputs(done), made.exit_code) == ([20, 30], 3)
    assert "global_step_30: the output is damaged" in str(made.removals[0])


def test_outputs_of_another_run_are_not_touched(done, tmp_path):
    """Two commands, one output folder."""
    other = Scene(tmp_path / "other", done.file, done.script.with_name(runs.MADE))
    other.step(1, 2)
    other.out = done.out
    other.round(name="other-{step}", keep_last=1, shared={"apply": True})
    assert (outputs(done), (done.out / "other-2").is_dir()) == ([10, 20, 30], True)
    keeping(done)
    assert (outputs(done), (done.out / "other-2").is_dir()) == ([30], True)
    other.round(name="other-{step}", keep_last=1, shared={"apply": True})
    assert (outputs(done), (done.out / "other-2").is_dir()) == ([30], True)


@pytest.mark.parametrize("how", ["edited", "added", "awaited", "nested"])
def test_an_output_that_somebody_has_a_hand_in_stays(done, how):
    output = done.out / "global_step_10"
    if how == "edited":
        flip(output / "model.safetensors")
    elif how == "added":
        (output / "README.md").touch()
    elif how == "nested":
        shutil.copytree(done.out / "global_step_20", output / "lora")
    else:
        note = done.out / FOLDER / "hooks/global_step_10.json"
        note.parent.mkdir(exist_ok=True)
        note.write_text('{"attempts": 1, "not_before": 0.0}')
    made = keeping(done)
    words = {"edited": "edited", "awaited": "--on-done"}.get(how, "does not list")
    assert words in refusals(made)["out/global_step_10"]
    assert outputs(done) == [10, 30]


def test_where_the_newest_fails_the_one_before_is_converted(scene):
    scene.step(10, 20, 30)
    scene.says(s30=["bad-input"])
    made = scene.round(keep_last=1, shared={"apply": True})
    assert made.counts == {"failed": 1, "converted": 1, "pruned": 1}
    assert scene.states() == {10: "pruned", 20: "done", 30: "failed"}
    # And it stays, as long as there is none after it.
    scene.round(keep_last=1, shared={"apply": True})
    assert outputs(scene) == [20]


def rewritten(scene: Scene, step: int, tmp_path: Path, at: int) -> None:
    folder = scene.run / f"global_step_{step}/actor"
    shutil.rmtree(folder)
    runs.rank_file(folder / runs.RANK_FILE, 7.0)
    for path in (folder / runs.RANK_FILE, folder, folder.parent):
        os.utime(path, (at,) * 2)


def test_after_a_restart_the_new_step_counts_and_not_the_abandoned(scene, tmp_path):
    scene.step(20, 40, 60)
    scene.round()
    rewritten(scene, 40, tmp_path, 1_750_000_000)
    shutil.rmtree(scene.out / "global_step_40")
    assert keeping(scene).counts == {"converted": 1, "done": 2}
    assert outputs(scene) == [40]


def copied_step(scene, step: int, written: float):
    """Add a step with a file of its own, so that it has times of its own."""
    weights = scene.run / f"global_step_{step}/actor"
    weights.mkdir(parents=True)
    shutil.copyfile(scene.file, weights / scene.file.name)
    for path in (weights / scene.file.name, weights):
        os.utime(path, (written, written))
    return weights


def test_a_copy_made_in_any_order_abandons_nothing(scene):
    """Times alone do not tell a restart from ``cp -r``."""
    for step, written in ((20, 1_750_000_000), (100, 1_700_000_000)):
        copied_step(scene, step, written)
    scene.round()
    keeping(scene)
    assert outputs(scene) == [20, 100]


def test_the_tracker_tells_a_restart(scene):
    scene.step(40, 60)
    scene.round()
    scene.tracker(40)
    keeping(scene)
    assert outputs(scene) == [40]


def test_unlike_rules_of_two_live_batches_are_refused(done):
    watching = done.batch(keep_last=2)
    watching.round()
    made = done.batch(keep_last=1, shared={"apply": True}).round()
    assert (made.exit_code, "keeps other outputs" in made.problems[0].what) == (2, True)
    assert outputs(done) == [10, 20, 30]
    del watching
    keeping(done, 1)
    assert outputs(done) == [30]


def test_an_output_is_never_put_into_another(scene):
    """--model and --name changed: the folder that was an output is to hold outputs now."""
    scene.step(10)
    scene.round()
    made = scene.round(model=None)
    assert (made.counts, made.exit_code) == ({"failed": 1}, 3)
    assert "into another" in str(read_records(scene.out))
    assert sorted(p.name for p in (scene.out / "global_step_10").iterdir()) == sorted(
        p.name for p in scene.script.with_name(runs.MADE).iterdir()
    )
    shutil.rmtree(scene.out)
    scene.round(model=None)
    assert scene.round(overwrite=True).counts == {"failed": 1}
    assert (scene.out / "global_step_10/actor/model.safetensors").is_file()


# Decisions


GOOD = SourceFacts(True, False, True, True, True, True, "", "", "", "")


def test_a_source_goes_only_where_every_fact_allows_it():
    assert why_keep_source(GOOD) == ""
    for name in GOOD.__slots__:
        good = getattr(GOOD, name)
        bad = not good if isinstance(good, bool) else "why"
        facts = {n: getattr(GOOD, n) for n in GOOD.__slots__} | {name: bad}
        assert why_keep_source(SourceFacts(**facts)), name


def test_an_output_goes_only_where_every_fact_allows_it():
    good = {"ours": True, "place": "", "edited": "", "intact": True, "awaited": ""}
    assert why_keep_output(OutputFacts(**good)) == ""
    for name, value in good.items():
        bad = False if isinstance(value, bool) else "why"
        assert why_keep_output(OutputFacts(**(good | {name: bad}))), name


def test_retention_and_training_agree_on_kinds(tmp_path):
    """Steps and epochs are never counted together."""
    records = [
        retention.Record(n, "", run="r", relative=n, step=int(n.split("_")[1]))
        for n in ("step_1100", "step_1200", "epoch_2", "epoch_3")
    ]
    assert [r.name for r in retention.Rule(last=1).surplus(records)] == ["step_1100", "epoch_2"]
    a, b = (training.Step(tmp_path, "step", n, {"f": (1, n)}, n) for n in (1, 2))
    assert (training.is_later(b, a), training.is_later(a, b)) == (True, False)


def test_a_record_that_the_disk_did_not_take_abandons_nothing():
    """A full disk keeps an older record: without the look in which the content appeared."""
    known = Record("20", "/out/20", run="r", step=20, state="done", generation=3, written_ns=5)
    lost = Record("60", "/out/60", run="r", step=60, state="done")
    assert retention.Rule(last=1).surplus([known, lost]) == []


def test_of_steps_that_are_all_abandoned_the_one_written_last_is_kept():
    """Step 30 was written over a day later, and the tracker says so: 40 and 60 are both behind it."""
    day = 86_400 * 10**9

    def record(step: int, generation: int) -> Record:
        name = str(step)
        return Record(
            name, f"/out/{name}", run="r", step=step, generation=generation, written_ns=generation
        )

    tracker = Tracker(30, day)
    sixty, forty, fifty = record(60, 1), record(40, 3), record(50, 2)  # training went back to 40
    surplus = retention.Rule(last=1).surplus([forty, fifty, sixty], lambda _: tracker)
    assert [r.step for r in surplus] == [50]


def test_a_step_written_last_is_kept_though_others_were_seen_whole_after_it():
    def record(step: int, generation: int, written_ns: int) -> Record:
        name = str(step)
        return Record(
            name, f"/out/{name}", run="r", step=step, generation=generation, written_ns=written_ns
        )

    again = record(140, 1, 900)  # after 150 to 170, which a later look was the first to see whole
    others = [record(step, 2, step) for step in (130, 150, 160, 170)]
    assert [r.step for r in retention.Rule(last=3).surplus([again, *others])] == []


def test_when_a_step_was_written_its_files_say_and_not_its_folders(scene):
    """A folder's time changes when something in it is deleted, or comes from another clock."""
    hour = 3600
    for step, written, folder in ((50, 3 * hour, 5 * hour), (120, 4 * hour, 2 * hour)):
        weights = copied_step(scene, step, time.time() - written)
        os.utime(weights, (time.time() - folder,) * 2)
    scene.round(keep_last=1)
    assert scene.states()[50] == "done"
