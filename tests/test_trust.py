"""What lies beside a checkpoint is not trusted: a run goes on with what a run of this user wrote."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import streamconv
from scripts.makers.tiny import make_tiny, whole
from scripts.outputs import contents, read_model
from streamconv.conversion import execution, job
from streamconv.errors import DamagedPlanError, OutputExistsError, SourceChangedError
from streamconv.files import userkey
from streamconv.options import Event, Notice, Phase
from streamconv.planning import child

OPTIONS: dict[str, Any] = {"sync": False, "max_shard_size": 120, "layout": "memory"}
VICTIM = "embed.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few numbers, which becomes several files."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "actor", "fsdp")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another step: the same names and shapes, other numbers."""
    return make_tiny(tmp_path_factory.mktemp("other") / "actor", "fsdp", salt="other")


def convert(src: Path, out: Path, **options) -> tuple[int, list[str]]:
    """Convert; return how many bytes were taken from an earlier run, and the notices."""
    told: list[Event] = []
    result = streamconv.convert(src, out, **(OPTIONS | options), on_event=told.append)
    return result.reused_bytes, [e.text for e in told if isinstance(e, Notice)]


def stopped(src: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options) -> Path:
    """Stop a conversion after three files; return the staging folder."""
    write, done = execution.write_output, []

    def stopping(output, *args, **kwargs):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(output.name)
        return write(output, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(execution, "write_output", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert(src, out, **options)
    inside = out / ".streamconv"
    return inside if inside.exists() else staged(out)


def staged(out: Path) -> Path:
    return out.with_name(f".{out.name}.streamconv")


def assert_is_tiny(out: Path, clean: Path) -> None:
    assert contents(out) == contents(clean)
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []


@pytest.fixture(scope="module")
def clean(tiny: Path) -> Path:
    """What the checkpoint becomes undisturbed, held against torch's own numbers."""
    out = tiny.parent / "clean"
    convert(tiny, out)
    data = whole(VICTIM).view(torch.uint8).numpy().tobytes()
    assert read_model(out)[VICTIM].data == data
    assert len(list(out.glob("*.safetensors"))) > 3
    return out


# --- what is ours is gone on with ------------------------------------------------------------


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize("inside", [False, True])
def test_a_run_of_ones_own_is_gone_on_with(inside, tiny, clean, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if inside:
        out.mkdir()
    stopped(tiny, out, monkeypatch)
    reused, notices = convert(tiny, out)
    assert (reused > 0, notices) == (True, [])
    assert_is_tiny(out, clean)


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize("home", ["unwritable", "open to all", "another key", "cut off"])
def test_without_the_key_a_run_begins_afresh_and_says_so(
    home, tiny, clean, tmp_path, monkeypatch, user_state
):
    out, state = tmp_path / "out", tmp_path / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    stopped(tiny, out, monkeypatch)
    key = state / "streamconv" / "key"
    assert key.stat().st_mode & 0o777 == 0o600
    if home == "unwritable":
        monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")
    elif home == "open to all":
        key.chmod(0o640)
    elif home == "another key":
        key.write_bytes(bytes(32))
    else:
        key.write_bytes(b"")
    reused, notices = convert(tiny, out)
    assert reused == 0
    assert len(notices) == 1
    assert str(staged(out)) in notices[0]
    assert_is_tiny(out, clean)
    if home == "cut off":
        assert len(key.read_bytes()) == 32


def test_the_key_is_made_once_and_never_written_through_a_link(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    first = userkey.user_key()
    assert userkey.user_key() == first == (tmp_path / "state/streamconv/key").read_bytes()
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(32))
    victim.chmod(0o600)
    (tmp_path / "state/streamconv/key").unlink()
    (tmp_path / "state/streamconv/key").symlink_to(victim)
    assert userkey.user_key() not in (first, bytes(32))
    assert victim.read_bytes() == bytes(32)


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize("left", [["plan.jsonl", "journal.jsonl"], ["journal.jsonl"], []])
def test_what_a_run_leaves_that_is_killed_after_publishing_is_removed(
    left, tiny, clean, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    folder = stopped(tiny, out, monkeypatch)
    shutil.copytree(clean, out)
    shutil.rmtree(folder / "files")
    shutil.rmtree(folder / "done")
    for path in folder.iterdir():
        if path.name not in left:
            path.unlink()
    convert(tiny, out)
    assert_is_tiny(out, clean)


# --- what is not ours is not -----------------------------------------------------------------


def _other_plan(folder: Path, _: Path) -> None:
    lines = (folder / "plan.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "plan.jsonl").write_bytes(
        b"".join(lines[:1] + lines[1:]).replace(b'"dtype"', b'"dtypf"')
    )


def _edited_line(folder: Path, _: Path) -> None:
    for path in (folder / "done").iterdir():
        path.write_bytes(path.read_bytes().replace(b'"nbytes": ', b'"nbytes":  '))


def _notes_swapped(folder: Path, _: Path) -> None:
    one, two, *_rest = sorted((folder / "done").iterdir())
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def _files_swapped(folder: Path, _: Path) -> None:
    """What an attacker who controls the hash of the manifest would do as well."""
    one, two, *_rest = sorted((folder / "files").glob("*.safetensors"))
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def _of_another_target(folder: Path, away: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(away, folder)


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize(
    "change", [_other_plan, _edited_line, _notes_swapped, _files_swapped, _of_another_target]
)
def test_nothing_that_was_changed_or_moved_here_reaches_an_output(
    change: Callable[[Path, Path], None], tiny, other, clean, tmp_path, monkeypatch
):
    out, away = tmp_path / "out", tmp_path / "away" / "out"
    away.parent.mkdir()
    elsewhere = stopped(other, away, monkeypatch)
    change(stopped(tiny, out, monkeypatch), elsewhere)
    # Two of three finished files are touched, or all of them.
    third = sorted((staged(out) / "files").glob("*.safetensors"))[2:]
    most = sum(path.stat().st_size for path in third)
    assert convert(tiny, out)[0] <= most < 1000
    assert_is_tiny(out, clean)


@pytest.mark.usefixtures("planned_here")
def test_a_finished_file_of_another_target_and_job_is_made_again(
    tiny, other, clean, tmp_path, monkeypatch
):
    """Of one user, with genuine seals: they are those of another folder."""
    out, away = tmp_path / "out", tmp_path / "away" / "out"
    away.parent.mkdir()
    here, there = stopped(tiny, out, monkeypatch), stopped(other, away, monkeypatch)
    for name in ("journal.jsonl", "done", "files"):
        path = here / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        (there / name).rename(path)
    assert convert(tiny, out)[0] == 0
    assert_is_tiny(out, clean)


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize(
    "name",
    [
        *("notes.txt", "files/modeling_evil.py", "files/sub/x.py", "files/model.safetensors.bak"),
        *("a/b", "done/evil.json", "done/sub/model.safetensors.json", "done/model.safetensors"),
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_a_foreign_file_is_named_and_left_alone(name, ours, tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    folder = stopped(tiny, out, monkeypatch)
    if not ours:
        (folder / "journal.jsonl").unlink()
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("three years")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(OutputExistsError, match="did not write") as caught:
            convert(tiny, out, **options)
        assert caught.value.where in (str(path), str(path.parent))
    assert path.read_text() == "three years"
    assert not out.exists()


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize(
    "name",
    [
        *("", "files", "plan.jsonl", "journal.jsonl", "done", "done/{first}.json"),
        *("files/{first}", "{next}.part", "files/{next}"),
    ],
)
def test_nothing_is_written_or_removed_through_a_link(name, tiny, clean, tmp_path, monkeypatch):
    """Links to a folder or a file elsewhere: refused by name, or replaced as names."""
    out, victim = tmp_path / "out", tmp_path / "victim"
    folder = stopped(tiny, out, monkeypatch)
    files = [f"model-{k:05d}-of-00004.safetensors" for k in (1, 4)]
    path = folder / name.format(first=files[0], next=files[1])
    if path.exists():
        path.rename(victim)
    else:
        victim.write_bytes(b"precious")
    path.symlink_to(victim)
    before = contents_of(victim)
    with pytest.raises(OutputExistsError) as caught:
        convert(tiny, out)
    assert caught.value.where == str(path)
    assert contents_of(victim) == before
    path.unlink()
    if victim.is_file():
        os.link(victim, path)
        convert(tiny, out)
        assert_is_tiny(out, clean)
        assert contents_of(victim) == before


def contents_of(path: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in [path, *path.rglob("*")] if p.is_file()}


@pytest.mark.usefixtures("planned_here")
def test_a_folder_with_other_files_is_not_filled_because_of_a_staging_folder(
    tiny, tmp_path, monkeypatch
):
    """An output of a stranger, with a staging folder inside it."""
    for ours in (True, False):
        out = tmp_path / f"out{ours}"
        out.mkdir()
        folder = stopped(tiny, out, monkeypatch)
        if not ours:
            (folder / "journal.jsonl").write_text("")
        (out / "modeling_evil.py").write_text("evil")
        with pytest.raises(OutputExistsError, match="not empty") as caught:
            convert(tiny, out)
        assert caught.value.found == "modeling_evil.py"
        assert sorted(p.name for p in out.iterdir()) == [".streamconv", "modeling_evil.py"]


@pytest.mark.usefixtures("planned_here")
def test_a_plan_that_changes_while_it_is_executed_is_not_read_again(
    tiny, other, clean, tmp_path, monkeypatch
):
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    options = {"max_shard_size": 120, "layout": "memory"}
    streamconv.plan(tiny, output=plan, **options)
    streamconv.plan(other, output=tmp_path / "other.jsonl", **options)
    other_plan = (tmp_path / "other.jsonl").read_bytes()

    def replaced(event: Event) -> None:
        if isinstance(event, Phase):
            plan.write_bytes(other_plan)

    job.run_plan(plan, out, streamconv.RunOptions(sync=False, on_event=replaced))
    assert_is_tiny(out, clean)
    assert json.loads(plan.read_text().splitlines()[0])["root"] == str(other)


# --- the plan is that of the job that was asked for ------------------------------------------


def test_a_source_that_changes_between_the_question_and_the_plan_is_refused(
    tiny, other, tmp_path, monkeypatch
):
    """Through the real child: it is asked for one checkpoint, and finds another in its place."""
    source, out = tmp_path / "actor", tmp_path / "out"
    shutil.copytree(tiny, source)
    make = job.make_plan

    def swapped(*args, **kwargs):
        shutil.rmtree(source)
        shutil.copytree(other, source)
        return make(*args, **kwargs)

    monkeypatch.setattr(job, "make_plan", swapped)
    with pytest.raises(SourceChangedError, match="while it was planned"):
        convert(source, out)
    assert not out.exists()
    assert not staged(out).exists()


@pytest.mark.usefixtures("planned_here")
def test_a_plan_of_another_job_is_not_executed(tiny, other, tmp_path, monkeypatch):
    """As a child of another run would leave it."""
    out = tmp_path / "out"
    ask = child._ask
    monkeypatch.setattr(
        child,
        "_ask",
        lambda request, **k: ask({**request, "src": str(other), "asked": None}, **k),
    )
    with pytest.raises(SourceChangedError, match="another job"):
        convert(tiny, out)
    assert not out.exists()


# --- a plan is checked line by line -----------------------------------------------------------


def _refitted(plan: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Edit the lines of a plan and make its digest fit, which anybody can."""
    lines = [json.loads(line) for line in plan.read_text().splitlines()]
    change(lines)
    texts = [json.dumps(line, separators=(",", ":")) for line in lines[:-1]]
    body = "".join(text + "\n" for text in texts[1:]).encode()
    end = {"end": xxhash.xxh3_128_hexdigest(body), "lines": len(lines)}
    plan.write_text("\n".join([*texts, json.dumps(end)]) + "\n")


def _first(lines: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return next(line for line in lines if key in line)


@pytest.mark.parametrize(
    ("key", "change", "told"),
    [
        ("output", {"output": "../evil.safetensors"}, "not the name of an output file"),
        ("output", {"output": "/tmp/evil.safetensors"}, "not the name of an output file"),
        ("output", {"output": "modeling_evil.py"}, "does not end in .safetensors"),
        ("output", {"nbytes": -1}, "a size is -1"),
        ("output", {"tensors": 99}, "the number of tensors"),
        ("file", {"file": "../../etc/passwd"}, "outside the checkpoint"),
        ("file", {"file": "/etc/passwd"}, "outside the checkpoint"),
        ("file", {"index": "../.metadata"}, "outside it"),
        ("source", {"starts": [-1, 0, 0]}, "starts is -1"),
        ("source", {"files": [9, 9, 9]}, "a file that there is not"),
        ("source", {"dtype": "F99"}, "F99"),
        ("tensor", {"at": [8, 56]}, "begins at 8"),
        ("tensor", {"shape": [1, 6]}, "the header of"),
        ("tensor", {"sources": [7]}, "KeyError"),
        ("moves", {"moves": [[0, 0, 1 << 40, 0, [], []]]}, "elements are moved|past the end"),
        ("moves", {"moves": [[0, 0, 0, 1 << 40, [[6, 1, 1]], []]]}, "reads past"),
        ("job", {"job": {}}, "the job"),
    ],
)
def test_a_crafted_plan_is_refused_and_writes_nothing(key, change, told, tiny, tmp_path):
    plan, out = tmp_path / "place" / "plan.jsonl", tmp_path / "place" / "out"
    plan.parent.mkdir()
    shutil.copy(_tiny_plan(tiny), plan)
    _refitted(plan, lambda lines: _first(lines, key).update(change))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DamagedPlanError) as caught:
        job.run_plan(plan, out, streamconv.RunOptions(sync=False))
    assert caught.value.exit_code == 5
    assert re.search(told, caught.value.found), caught.value.found
    assert sorted(tmp_path.rglob("*")) == before


def _tiny_plan(tiny: Path) -> Path:
    path = tiny.parent / "plan.jsonl"
    if not path.exists():
        streamconv.plan(tiny, output=path, max_shard_size="1MB", layout="memory")
    return path


def test_side_files_of_a_plan_come_from_one_folder_under_their_own_names(tiny, tmp_path):
    plan, secret = tmp_path / "plan.jsonl", tmp_path / "id_rsa"
    secret.write_text("secret")
    digest = xxhash.xxh3_128_hexdigest(secret.read_bytes())
    for names in (["notes.txt"], ["id_rsa", "x/../id_rsa"]):
        shutil.copy(_tiny_plan(tiny), plan)
        side = [{"side": n, "path": str(secret), "nbytes": 6, "xxh3": digest} for n in names]

        def add(lines: list[dict[str, Any]], side: list[dict[str, Any]] = side) -> None:
            at = lines.index(_first(lines, "output"))
            lines[at:at] = side

        _refitted(plan, add)
        with pytest.raises(DamagedPlanError):
            job.run_plan(plan, tmp_path / "out", streamconv.RunOptions(sync=False))
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize(
    "name",
    [
        f".streamconv-{'0' * 16}.part",
        f"plan.jsonl.{'0' * 16}.part",
        f"journal.jsonl.{'0' * 16}.part",
        f"model-00004-of-00004.safetensors.{'0' * 16}.part",
        f"done/model-00004-of-00004.safetensors.json.{'0' * 16}.part",
    ],
)
def test_what_a_killed_run_leaves_half_written_is_ours(name, tiny, clean, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (stopped(tiny, out, monkeypatch) / name).write_bytes(b"half")
    assert convert(tiny, out)[0] > 0
    assert_is_tiny(out, clean)
