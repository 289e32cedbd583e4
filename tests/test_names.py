"""Names that strangers chose: refused where no model folder can hold them, shown escaped elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from scripts.makers.dcp import save_alone
from streamconv.cli.output import harmless
from streamconv.errors import BadInputError, StreamconvError, shown
from streamconv.formats.huggingface.base import read as read_base
from streamconv.ir.planned import SideFile

REFUSED = ["__metadata__", "w\ud800", "\udcff"]
ODD = ["", "a\nb", "\x1b[31mred", "\u202eright", "\x9b31m", "tab\there", "\0", "ä.weight", "\u2028"]


def fsdp(folder: Path, name: str) -> Path:
    folder.mkdir()
    state = {name: torch.ones(2), "other\nskipped\x1b": 3}
    torch.save(state, folder / "model_world_size_1_rank_0.pt")
    return folder


def dcp(folder: Path, name: str) -> Path:
    return save_alone(folder, {name: torch.ones(2)})


def base(folder: Path, name: str) -> Path:
    folder.mkdir()
    save_file({name: torch.ones(2)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("write", [fsdp, dcp])
def test_names_that_safetensors_cannot_hold(write, name: str, tmp_path: Path) -> None:
    if write is dcp and name != "__metadata__":
        pytest.skip("torch's own writer fails on it")
    source = write(tmp_path / "src", name)
    with pytest.raises(BadInputError, match="safetensors") as caught:
        streamconv.convert(source, tmp_path / "out", layout="memory", sync=False)
    assert f"where: {shown(name)}" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_kept_and_shown_escaped(name: str, tmp_path: Path) -> None:
    source = fsdp(tmp_path / "src", name)
    streamconv.convert(source, tmp_path / "out", layout="memory", sync=False)
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {name}
    assert set(read_base(tmp_path / "out", 0)[1]) == {name}


def command(*args: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "streamconv", *map(os.fsencode, map(str, args))],
        capture_output=True, check=False, env={**os.environ, "COLUMNS": "300"},
    )  # fmt: skip


def test_no_command_prints_a_name_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[2J\nerror: no"
    folder.mkdir()
    source = fsdp(folder / "src", "x\x1b[31m\nformat  forged")
    page = tmp_path / "page.html"
    for args in (
        ("inspect", source),
        ("plan", source, "-o", folder / "plan", "--layout", "memory"),
        ("convert", source, folder / "out", "--layout", "memory", "--report", page),
        ("convert", source, folder / "out", "--layout", "memory"),
        ("verify", folder / "out"),
        ("inspect", folder / "nothing"),
    ):
        done = command(*args)
        assert done.returncode == (5 if args[-1] == folder / "nothing" else 0), done.stderr
        for stream in (done.stdout, done.stderr):
            assert b"\x1b" not in stream, args
            assert b"\nerror: no" not in stream, args
            assert b"\nformat  forged" not in stream, args
    assert "\x1b" not in page.read_text()


@pytest.mark.parametrize("odd", ["side", "folder", "above"])
def test_file_names_that_are_no_text(odd: str, tmp_path: Path) -> None:
    bad = os.fsdecode(b"bad-\xff")
    source = fsdp(tmp_path / "src", "w")
    side = source / "huggingface"
    side.mkdir()
    (side / "tokenizer.json").write_text("{}")
    if odd == "side":
        (side / bad).write_text("{}")
    elif odd == "folder":
        (side / bad).mkdir()
        (side / bad / "x.json").write_text("{}")
    else:
        source = Path(shutil.move(source, tmp_path / bad))
    with pytest.raises(BadInputError, match="not UTF-8") as caught:
        streamconv.convert(source, tmp_path / "out", layout="memory", sync=False)
    assert r"bad-\udcff" in str(caught.value)
    done = command("convert", source, tmp_path / "out", "--layout", "memory")
    assert done.returncode == 5
    assert rb"bad-\udcff" in done.stderr


def test_side_files_are_checked_where_they_are_made() -> None:
    with pytest.raises(BadInputError):
        SideFile("x\udcff", "/x\udcff", 1, "0" * 32)


def test_shown() -> None:
    assert shown("plain, größer · 模型") == "plain, größer · 模型"
    assert shown("a\nb\t\x1b\u202e\udcff") == r"a\nb\t\x1b\u202e\udcff"
    assert harmless("one\ntwo\x07") == "one\ntwo\\x07"
    assert "\n  where: a\\nb" in str(StreamconvError("what", where="a\nb"))
