"""Runs, outputs and a batch's own files in each other's way: told, and never mistaken."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scripts.makers import runs
from streamconv.batch.cycle import Batch
from streamconv.batch.settings import load, settings
from streamconv.batch.state import FOLDER, STATUS, Store
from streamconv.errors import StreamconvError, UsageError
from tests.scenes import Scene, cli


@pytest.mark.parametrize(
    ("name", "shared", "what"),
    [
        ("status.json", {}, "status"),
        ("status.json/{step}", {}, "status"),
        ("report.html", {"report": "report.html"}, "report"),
        ("metrics", {"prometheus": "metrics/batch.prom"}, "metrics"),
        ("metrics/batch.prom", {"prometheus": "metrics/batch.prom"}, "metrics"),
        ("pages", {"report": "pages.html"}, "pages"),
    ],
)
def test_an_output_takes_no_place_of_a_file_of_the_batch(scene, name, shared, what):
    scene.step(10)
    shared = {key: scene.out / value for key, value in shared.items()}
    made = scene.batch(name=name, shared=shared).round()
    (problem,) = made.problems
    assert f"where the batch keeps its {what}" in problem.what
    assert (made.exit_code, scene.starts()) == (2, [])
    assert scene.states() == {}
    assert [p.name for p in scene.out.iterdir()] == [FOLDER], "nothing was written before"


@pytest.mark.parametrize("where", ["status", "report", "prometheus", "root", "output", "base"])
def test_a_link_that_leads_to_itself_is_an_error_of_the_users(scene, tmp_path, where):
    scene.step(10)
    loop = scene.out / STATUS if where == "status" else tmp_path / "loop"
    loop.parent.mkdir(exist_ok=True)
    loop.symlink_to(loop.name)
    given = {"root": scene.run, "output": scene.out, where: loop}
    options = [] if where in ("root", "output", "status") else [f"--{where}", str(loop)]
    made = cli("batch", str(given["root"]), str(given["output"]), *options)
    assert made.returncode
    assert "internal" not in made.stderr
    assert str(loop) in made.stderr


@pytest.mark.parametrize("option", ["report", "prometheus"])
@pytest.mark.parametrize(
    "place", ["weights", "beside weights", "rank file", "in a step", "jobs.toml"]
)
def test_what_tells_of_a_batch_takes_no_place_of_what_is_not_its_own(
    scene, tmp_path, place, option
):
    scene.step(10)
    scene.round()
    scene.step(20)
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(f'[[run]]\nroot = "{scene.run}"\noutput = "{scene.out}"\nmodel = "actor"\n')
    path = {
        "weights": scene.out / "global_step_10/model.safetensors",
        "beside weights": scene.out / "global_step_10/new.html",
        "rank file": scene.run / "global_step_10/actor" / runs.RANK_FILE,
        "in a step": scene.run / "global_step_20/new.html",
        "jobs.toml": jobs,
    }[place]

    def everything() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    before = everything()
    with pytest.raises(StreamconvError) as refused:
        Batch(load(jobs, {option: path}), lambda *_: None)
    assert refused.value.exit_code in (2, 8)
    assert str(path) in str(refused.value)
    assert everything() == before


def test_a_status_that_is_not_ours_stays(scene):
    scene.step(10)
    scene.out.mkdir()
    (scene.out / STATUS).write_text('{"status": "mine"}')
    made = scene.batch().round()
    assert made.exit_code == 8
    assert (scene.out / STATUS).read_text() == '{"status": "mine"}'
    assert [p.name for p in scene.out.iterdir()] == [STATUS]


def test_a_report_without_a_suffix_has_its_pages_beside_it(scene, tmp_path):
    scene.step(10)
    scene.round(shared={"report": tmp_path / "report"})
    assert (tmp_path / "report").is_file()


def test_files_of_the_batch_may_lie_beside_the_outputs(scene):
    """The folder of the pages may even be the one that the outputs are in."""
    scene.step(10)
    shared = {"report": scene.out.with_suffix(".html"), "prometheus": scene.out / "batch.prom"}
    assert scene.round(shared=shared).counts == {"converted": 1}


@pytest.mark.parametrize("inside", ["actor/hf", "hf", "actor"])
def test_an_output_folder_in_a_checkpoint_is_refused(scene, inside):
    """Its files would make the checkpoint look changed, and rotation would take them along."""
    scene.step(10)
    scene.out = scene.run / "global_step_10" / inside
    before = sorted(scene.run.rglob("*"))
    (problem,) = scene.batch().round().problems
    assert "lies in a checkpoint" in problem.what
    assert sorted(scene.run.rglob("*")) == before


def test_a_single_checkpoint_as_the_run_is_no_place_for_outputs_either(scene):
    scene.step(10)
    actor = scene.run / "global_step_10/actor"
    done = cli("batch", str(actor), str(actor / "hf"))
    assert done.returncode == 2
    assert "the output folder lies in a checkpoint" in done.stderr


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([("run", ".")], "the output folder contains the run"),
        ([("run", "out"), ("other", "out/more")], "lies in that of another"),
        ([("run", "out/more"), ("other", "out")], "lies in that of another"),
    ],
)
def test_folders_that_contain_each_other_are_refused(tmp_path, places, words):
    rows = [{"root": tmp_path / root, "output": tmp_path / out} for root, out in places]
    with pytest.raises(UsageError, match=words):
        settings({"run": rows})


def test_two_files_of_a_batch_are_two(tmp_path):
    run = [{"root": tmp_path / "run", "output": tmp_path / "out"}]
    with pytest.raises(UsageError, match="would be one"):
        settings({"run": run, "report": tmp_path / "out/status.json"})


def test_outputs_of_another_run_in_this_run_are_no_checkpoints(scene, tmp_path):
    """Those of the same job file, and those of a batch of its own."""
    scene.step(10)
    other = Scene(tmp_path / "other", scene.file)
    other.step(5)
    other.out = scene.run / "outputs_of_other"
    other.round()
    # Whatever may lie there, such as a source that somebody kept beside its output.
    shutil.copytree(other.run / "global_step_5", other.out / "global_step_7")
    assert scene.round().counts == {"converted": 1}
    assert scene.states() == {10: "done"}


def test_a_source_that_holds_an_output_is_not_deleted(scene):
    """One of another run, or one that somebody made by hand."""
    scene.step(10, 20, 30)
    by_hand = scene.run / "global_step_10/actor/hf"
    by_hand.mkdir()
    for name in ("model.safetensors", "streamconv.json"):
        (by_hand / name).touch()
    runs.age(scene.run / "global_step_10/actor")
    scene.round()
    store = Store(scene.out)
    store.begin()
    for record in store:
        record.verified = True
        store.save(record)
    made = scene.round(delete_sources=True, shared={"apply": True})
    refused = {r.path.parent.name: r.refused for r in made.removals}
    assert refused == {
        "global_step_10": f"an output lies in it: {by_hand}",
        "global_step_20": "",
        "global_step_30": "training goes on from it",
    }
    assert (by_hand / "model.safetensors").is_file()
