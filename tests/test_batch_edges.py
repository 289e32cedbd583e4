"""A batch among odd names, odd disks and odd neighbours: what a user's cron job meets one day."""

from __future__ import annotations

import shutil

from streamconv.batch.state import FOLDER, Store, read_records
from tests.makers import runs
from tests.scenes import Scene


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
    made = scene.round(delete_sources=True, shared={"apply": True})
    assert {r.path.parent.name: r.refused for r in made.removals} == {
        "global_step_10": "",
        "global_step_20": "training goes on from it",
    }
    assert sources(scene) == ["global_step_20", "global_step_30"]


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


def test_a_removal_that_was_killed_half_way_is_finished(scene):
    scene.step(10, 20)
    scene.round()
    verified(scene, 10)
    source = scene.run / "global_step_10/actor"
    aside = source.rename(source.with_name(".actor.streamconv-deleted"))
    trash = scene.out / FOLDER / "trash/global_step_5"
    trash.mkdir(parents=True)
    scene.round(delete_sources=True)
    assert aside.is_dir()
    scene.round(delete_sources=True, shared={"apply": True})
    assert not aside.exists()
    assert not trash.exists()


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
