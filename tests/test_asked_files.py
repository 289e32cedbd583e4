"""Reports, plans, metrics and status files: nothing that streamconv did not write is replaced."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import streamconv
from scripts.makers import runs
from streamconv.errors import OutputExistsError, StreamconvError, UsageError

pytestmark = pytest.mark.usefixtures("planned_here")


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder: bytes of files, targets of links, and what else there is."""
    return {
        p.relative_to(folder).as_posix(): str(p.readlink())
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else f"mode {p.stat().st_mode:o}"
        for p in folder.rglob("*")
    }


@pytest.fixture
def source(tmp_path: Path, lone_rank_file: Path) -> Path:
    folder = tmp_path / "step" / "actor"
    folder.mkdir(parents=True)
    shutil.copy(lone_rank_file, folder)
    return folder


def reported(source: Path, path: Path) -> None:
    streamconv.convert(source, path.parents[1] / "out", report=path, sync=False)


def planned(source: Path, path: Path) -> None:
    streamconv.plan(source, output=path)


def a_rank_file(place: Path, source: Path) -> None:
    shutil.copy(source / runs.RANK_FILE, place)


def a_hard_link_to_one(place: Path, source: Path) -> None:
    os.link(source / runs.RANK_FILE, place)


def a_link_to_one(place: Path, source: Path) -> None:
    place.symlink_to(source / runs.RANK_FILE)


def notes(place: Path, source: Path) -> None:
    place.write_text("three years of work")


def a_page_of_another_program(place: Path, source: Path) -> None:
    place.write_text("<!doctype html>\n<html></html>")


def a_manifest(place: Path, source: Path) -> None:
    place.write_text('{"streamconv": "1", "job": {}}')


def a_folder(place: Path, source: Path) -> None:
    place.mkdir()


def a_pipe(place: Path, source: Path) -> None:
    os.mkfifo(place)


def a_link_to_nowhere(place: Path, source: Path) -> None:
    place.symlink_to(place.with_name("nowhere"))


FOREIGN = [
    a_rank_file,
    a_hard_link_to_one,
    a_link_to_one,
    notes,
    a_page_of_another_program,
    a_manifest,
    a_folder,
    a_pipe,
    a_link_to_nowhere,
]


@pytest.mark.parametrize("write", [reported, planned])
@pytest.mark.parametrize("lay", FOREIGN)
def test_what_lies_there_is_named_and_stays(lay, write, source, tmp_path):
    place = tmp_path / "notes" / "page"
    place.parent.mkdir()
    lay(place, source)
    before = tree(tmp_path)
    with pytest.raises(StreamconvError, match=r"report|plan") as caught:
        write(source, place)
    assert caught.value.exit_code in (2, 8)
    assert str(place.name) in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("write", [reported, planned])
def test_a_former_one_and_an_empty_file_are_replaced(write, source, tmp_path):
    place = tmp_path / "notes" / "page"
    place.parent.mkdir()
    place.touch()
    write(source, place)
    first = place.read_bytes()
    link = tmp_path / "notes" / "link"
    link.symlink_to(place)
    assert len(first) > 100
    write(source, link)
    assert link.is_symlink()
    assert len(place.read_bytes()) > 100
    assert sorted(p.name for p in place.parent.iterdir()) == ["link", "page"]


def test_a_plan_is_no_report_and_a_report_no_plan(source, tmp_path):
    page, plan = tmp_path / "notes" / "page.html", tmp_path / "notes" / "plan.jsonl"
    reported(source, page)
    planned(source, plan)
    with pytest.raises(OutputExistsError, match="not a plan"):
        planned(source, page)
    with pytest.raises(OutputExistsError, match="not a report"):
        reported(source, plan)


@pytest.mark.parametrize(
    "place",
    [
        "step/actor/page",
        "step/actor/new/page",
        "link/page",
        "out/page",
        "out",
        ".out.streamconv/page",
        ".out.streamconv.lock",
        "elsewhere/.streamconv/files/model.safetensors",
    ],
)
def test_none_lies_in_a_checkpoint_an_output_or_among_working_files(place, source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="the report would"):
        streamconv.convert(source, tmp_path / "out", report=tmp_path / place)
    with pytest.raises(UsageError, match="the plan would"):
        streamconv.plan(source, tmp_path / "out", output=tmp_path / place)
    assert tree(tmp_path) == before


def test_a_report_is_not_where_the_output_folder_is_to_be(source, tmp_path):
    with pytest.raises(UsageError, match="take the place of the output folder"):
        streamconv.convert(source, tmp_path / "new" / "out", report=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("write", [reported, planned])
def test_a_place_that_takes_no_file_is_found_before_any_work(write, source, tmp_path):
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    with pytest.raises(StreamconvError, match="cannot be written"):
        write(source, tmp_path / "file" / "page")
    assert tree(tmp_path) == before


def test_of_several_models_each_page_has_a_free_place_or_nothing_is_done(source, tmp_path):
    shutil.copytree(source, source.with_name("critic"))
    (tmp_path / "page-critic.html").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(OutputExistsError, match="not a report"):
        streamconv.convert_all(source.parent, tmp_path / "out", report=tmp_path / "page.html")
    assert tree(tmp_path) == before


def test_a_plan_that_fails_leaves_nothing(source, tmp_path):
    (source / runs.RANK_FILE).write_bytes(b"PK")
    before = tree(tmp_path)
    with pytest.raises(StreamconvError):
        streamconv.plan(source, output=tmp_path / "plan.jsonl")
    assert tree(tmp_path) == before


# --- a batch's ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["report", "prometheus"])
@pytest.mark.parametrize("lay", FOREIGN)
def test_a_batch_replaces_nothing_of_others(lay, key, scene, tmp_path):
    scene.step(10)
    place = tmp_path / "page"
    lay(place, scene.run / "global_step_10" / "actor")
    before = tree(tmp_path)
    with pytest.raises(StreamconvError, match=r"report|metrics"):
        scene.batch(shared={key: place})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("key", ["report", "prometheus"])
def test_a_batch_writes_nothing_into_a_checkpoint(key, scene):
    scene.step(10)
    with pytest.raises(UsageError, match="lies in a checkpoint"):
        scene.batch(shared={key: scene.run / "global_step_10" / "page"})


def test_a_status_file_of_others_stays(scene):
    scene.step(10)
    scene.out.mkdir()
    (scene.out / "status.json").write_text('{"mine": true}')
    made = scene.batch().round()
    (problem,) = made.problems
    assert "not a status of streamconv" in problem.what
    assert (made.exit_code, scene.starts()) == (8, [])
    assert tree(scene.out) == {"status.json": b'{"mine": true}'}


def test_the_files_of_a_batch_are_written_round_after_round(scene, tmp_path):
    files = {"report": tmp_path / "page.html", "prometheus": tmp_path / "batch.prom"}
    for step in (10, 20):
        scene.step(step)
        scene.round(shared=files)
        assert f"global_step_{step}" in files["report"].read_text()
    assert [p for p in tmp_path.rglob("*.part") if p.name.startswith(".")] == []
