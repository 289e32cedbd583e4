"""Side files that get in the way of an output's, or of each other: found before anything is written."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamconv
from scripts.campaigns import folding
from scripts.outputs import contents
from streamconv.errors import BadInputError, OutputExistsError, UsageError
from streamconv.files import namesakes

pytestmark = pytest.mark.usefixtures("planned_here")


@pytest.fixture
def source(tmp_path: Path, lone_rank_file: Path) -> Path:
    folder = tmp_path / "actor"
    (folder / "huggingface").mkdir(parents=True)
    (folder / "huggingface" / "tokenizer.json").write_text("{}")
    shutil.copy(lone_rank_file, folder)
    return folder


@pytest.fixture(scope="module")
def ntfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    reason = folding.why_not()
    if reason is not None:
        pytest.skip(reason)
    try:
        with folding.folding(tmp_path_factory.mktemp("folding")) as place:
            yield place
    except OSError as error:
        pytest.skip(str(error))


def convert(source: Path, out: Path, **options) -> streamconv.Result:
    return streamconv.convert(source, out, sync=False, **options)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "streamconv.json", "config.json", "tokenizer_config.json"]
)
def test_a_folder_with_the_name_of_a_file_is_found_while_planning(name, source, tmp_path):
    (source / "huggingface" / name).mkdir()
    (source / "huggingface" / name / "inner.txt").touch()
    with pytest.raises(BadInputError, match=r"each other's place|in the place of a") as caught:
        streamconv.plan(source)
    assert name in str(caught.value)
    with pytest.raises(BadInputError):
        convert(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["actor"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda p: p.symlink_to("nowhere")])
@pytest.mark.parametrize("place", ["", "huggingface"])
def test_what_only_has_the_name_of_a_config_is_no_missing_config(make, place, source):
    shutil.rmtree(source / "huggingface")
    (source / place).mkdir(exist_ok=True)
    make(source / place / "config.json")
    with pytest.raises(BadInputError) as caught:
        streamconv.plan(source)
    assert "config.json" in caught.value.where


def test_what_is_left_out_is_told(source):
    side = source / "huggingface"
    (side / "adapter_config.json").write_text("{}")
    (side / "MODEL.SAFETENSORS").touch()
    (side / "link").symlink_to(side / "folder")
    (side / "folder").mkdir()
    head = streamconv.plan(source).head
    assert [s.name for s in head.side] == ["tokenizer.json"]
    told = {s.name: s.reason for s in head.skipped}
    assert "adapter's config" in told["huggingface/adapter_config.json"]
    assert "weights" in told["huggingface/MODEL.SAFETENSORS"]
    assert told["huggingface/link"] == "a link to a folder"


@pytest.mark.parametrize(
    "names",
    [
        ("README.md", "readme.md"),
        ("TOKENIZER.JSON", "tokenizer.json"),
        ("caf\u00e9.txt", "cafe\u0301.txt"),
        ("Stra\u00dfe", "STRASSE"),
        ("notes", "NOTES/inner"),
    ],
)
def test_names_that_some_file_systems_take_for_one_are_two_where_they_are_two(
    names, source, tmp_path
):
    for name in names:
        path = source / "huggingface" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    convert(source, tmp_path / "out")
    for name in names:
        assert (tmp_path / "out" / name).read_text() == name
    assert list(namesakes._alike(names))


def test_they_are_refused_where_they_are_one(source, ntfs):
    (source / "huggingface" / "Tokenizer.json").write_text('{"other": 1}')
    before = sorted(ntfs.iterdir())
    with pytest.raises(BadInputError, match="two of its files for one") as caught:
        convert(source, ntfs / "names")
    assert caught.value.found == "Tokenizer.json and tokenizer.json"
    assert [p for p in ntfs.iterdir() if p not in before and not p.name.startswith(".")] == []


def test_an_output_on_a_file_system_that_ignores_case(source, ntfs, tmp_path):
    """And has no exchange of two folders."""
    out = ntfs / "out"
    convert(source, out)
    assert convert(source, ntfs / "OUT").status == "nothing-to-do"
    with pytest.raises(OutputExistsError):
        convert(source, ntfs / "Out", dtype="bfloat16")
    convert(source, ntfs / "OUT", dtype="bfloat16", overwrite=True)
    convert(source, tmp_path / "expected", dtype="bfloat16")
    assert contents(out) == contents(tmp_path / "expected")
    # A file that is still open keeps its folder there, under another name.
    assert [p.name for p in ntfs.iterdir() if p.name.startswith(".out")] == []
    (ntfs / "OUT" / "Notes.txt").touch()
    with pytest.raises(OutputExistsError, match="did not write"):
        convert(source, out, overwrite=True)


def test_a_checkpoint_by_another_name_is_still_the_checkpoint(source, ntfs):
    shutil.copytree(source, ntfs / "step")
    before = {p: p.read_bytes() for p in (ntfs / "step").rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match="would lie in the checkpoint"):
        convert(ntfs / "step", ntfs / "elsewhere", report=ntfs / "STEP" / "page.html")
    with pytest.raises(UsageError, match="contains the source"):
        convert(ntfs / "step", ntfs / "STEP", overwrite=True)
    assert {p: p.read_bytes() for p in (ntfs / "step").rglob("*") if p.is_file()} == before


def test_a_name_twice_and_a_file_that_is_a_folder_are_refused():
    for names in (["a", "a"], ["a", "a/b"], ["a/b/c", "a/b"]):
        with pytest.raises(BadInputError, match="each other's place"):
            namesakes.refuse_overlaps(names)
    namesakes.refuse_overlaps(["a/b", "a/c", "d"])


# --- what the system gives ------------------------------------------------------------------------


def limited(source: Path, out: Path, limit: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "streamconv", "convert", str(source), str(out), "--no-sync"]
    return subprocess.run(
        ["bash", "-c", f'{limit}; exec "$@"', "bash", *command], capture_output=True, text=True
    )


def test_too_few_files_are_told_with_what_to_do(source, tmp_path):
    done = limited(source, tmp_path / "out", "ulimit -n 9")
    assert done.returncode == 1
    assert "Too many open files" in done.stderr
    assert "ulimit -n 1024" in done.stderr
    assert not (tmp_path / "out").exists()
    done = limited(source, tmp_path / "out", "ulimit -n 16")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("mask", "mode"), [("0777", 0o600), ("0077", 0o600), ("0022", 0o644)])
def test_what_is_made_can_be_opened_by_its_maker(mask, mode, source, tmp_path):
    # Root may open anything, unless it gives that up.
    drop = "setpriv --bounding-set=-dac_override,-dac_read_search" if os.geteuid() == 0 else "env"
    if shutil.which(drop.split()[0]) is None:
        pytest.skip("no setpriv here")
    place = tmp_path / "place"
    place.mkdir()
    command = f'set -- {drop} "$@"; umask {mask}'
    done = limited(source, place / "out", command)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in place.iterdir()] == ["out"]
    files = [p for p in (place / "out").rglob("*") if p.is_file()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {mode}
