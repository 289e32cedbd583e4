"""Records that somebody damaged, or another release wrote: each costs itself and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from scripts.makers import runs
from streamconv.batch import hooks, metrics
from streamconv.batch.record_file import SCHEMA
from streamconv.batch.state import FOLDER, STATUS, Record, Store, read_records
from streamconv.cli.batch_report import print_status, status_json
from tests.scenes import Scene, cli

HUGE = 10**400
DEEP = "[" * 100_000
VALUES = [
    None, True, 0, -1, 0.5, 1 << 63, HUGE, float("nan"), float("inf"), 1e300, "", "x", "\udce9",
    "\ud800", "a\0b", "../../x", [], [[]], [[1, 2]], [["x"]], [["x", 1]], [["x", 1, 2, 3]], {},
    {"what": 1}, {"exit_code": "x"}, {"errno": [1]}, {"kind": {}},
]  # fmt: skip


def record_of(scene: Scene, step: int) -> Path:
    return scene.out / FOLDER / "jobs" / f"global_step_{step}.json"


@pytest.fixture
def two(scene: Scene) -> Scene:
    scene.step(10, 20)
    scene.round()
    return scene


def test_any_change_of_one_field_costs_at_most_that_record(two, capsys):
    path = record_of(two, 10)
    good = json.loads(path.read_text())
    for key in [f.name for f in dataclasses.fields(Record)]:
        for value in VALUES:
            path.write_text(json.dumps({**good, key: value}), errors="backslashreplace")
            records = read_records(two.out)
            assert {r.step for r in records if r.name == "global_step_20"} == {20}
            if len(records) == 1:
                continue  # it is lost
            for record in records:
                hooks.environment(record)
                assert Record.from_json(record.to_json(), two.out) == record
            print_status(records[:1])
            capsys.readouterr()
            json.dumps(status_json(records), allow_nan=False)
            metrics.render(records)
            store = Store(two.out)
            store.begin()
            store.publish({})
            status = (two.out / STATUS).read_bytes()
            assert json.loads(status, parse_constant=pytest.fail)["counts"]
            store.save(next(iter(store)))
            assert len(read_records(two.out)) == len(records), "what was written can be read"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", DEEP.encode(), b'{"a":' * 50_000, b" " * (17 << 20)],
    ids=["empty", "cut", "null", "array", "no-text", "deep", "deep-objects", "huge"],
)
def test_what_is_no_record_costs_that_record(two, content):
    record_of(two, 10).write_bytes(content)
    shutil.rmtree(two.out / "global_step_10")
    assert two.round().counts == {"done": 1, "converted": 1}
    assert two.states() == {10: "done", 20: "done"}


@pytest.mark.parametrize("what", ["folder", "pipe", "of another name"])
def test_what_lies_in_a_records_place(two, what):
    path = record_of(two, 10)
    if what == "of another name":
        shutil.copy(record_of(two, 20), path)
    else:
        path.unlink()
        path.mkdir() if what == "folder" else os.mkfifo(path)
    shutil.rmtree(two.out / "global_step_10")
    made = two.batch().round()
    assert made.counts == {"done": 1, "converted": 1}
    if what == "folder":  # there is nowhere to remember it
        assert str(path) in str(made.problems[0])
    else:
        assert (made.problems, two.states()) == ([], {10: "done", 20: "done"})
    assert (two.out / "global_step_10/model.safetensors").is_file()


@pytest.mark.parametrize("what", ["folder", "link"])
def test_what_lies_in_a_locks_place_costs_that_output(two, what):
    path = two.out / FOLDER / "locks/global_step_10.lock"
    path.unlink()
    path.mkdir() if what == "folder" else path.symlink_to(path.name)
    for step in (10, 20):
        shutil.rmtree(two.out / f"global_step_{step}")
    made = two.batch().round()
    assert made.counts == {"converted": 1, "elsewhere": 1}
    assert (made.exit_code, [p.where for p in made.problems]) == (3, [str(path)])
    assert (two.out / "global_step_20/model.safetensors").is_file()


def test_what_is_no_lease_is_nobodys(two):
    rules = two.out / FOLDER / "rules"
    (rules / "folder.lease").mkdir(parents=True)
    (rules / "loop.lease").symlink_to("loop.lease")
    (rules / "damaged.lease").write_bytes(b"\xff")
    assert two.round(keep_last=1, shared={"apply": True}).counts == {"done": 2}
    assert two.states() == {10: "pruned", 20: "done"}


def test_a_record_of_a_newer_release_is_left_alone_with_its_output(two):
    path = record_of(two, 10)
    newer = {**json.loads(path.read_text()), "schema": SCHEMA + 1, "state": "frozen"}
    path.write_text(json.dumps(newer))
    before = path.read_bytes()
    two.step(30)
    made = two.batch(keep_last=1, shared={"apply": True}).round()
    assert path.read_bytes() == before
    assert (two.out / "global_step_10/model.safetensors").is_file()
    assert "a newer streamconv" in str(made.problems[0])
    assert (made.exit_code, made.counts["elsewhere"], made.counts["converted"]) == (3, 1, 1)
    assert cli("status", str(two.out)).returncode == 0


def test_records_of_older_releases_are_taken(two):
    for step in (10, 20):
        old = json.loads(record_of(two, step).read_text())
        del old["schema"]
        record_of(two, step).write_text(json.dumps(old))
    assert two.round().counts == {"done": 2}


def test_names_that_are_no_text(scene, tmp_path):
    folder = os.fsdecode(b"caf\xe9")
    runs.add_step(scene.run / folder, 10, scene.file)
    report, numbers = tmp_path / "report.html", tmp_path / "m.prom"
    made = scene.round(shared={"report": str(report), "prometheus": str(numbers)})
    assert made.counts == {"converted": 1}
    assert (scene.out / folder / "global_step_10/model.safetensors").is_file()
    status = json.loads((scene.out / STATUS).read_text(encoding="utf-8"))
    assert status["checkpoints"][0]["name"] == f"{folder}/global_step_10"
    for page in (report, numbers):
        assert r"caf\udce9" in page.read_text(encoding="utf-8").replace("\\\\", "\\")
    assert scene.round().counts == {"done": 1}


def test_a_step_that_no_number_holds_is_no_step(scene):
    runs.add_step(scene.run, 10**30, scene.file)
    assert scene.round(model=None).counts == {"converted": 1}
    assert scene.round(model=None).counts == {"done": 1}
    assert scene.states() == {None: "done"}
