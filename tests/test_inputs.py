"""What the system does not let us read is bad input, named, from every command: exit code 5."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import streamconv
from streamconv.__main__ import _run
from streamconv.errors import BadInputError, StreamconvError
from streamconv.files import inputs

pytestmark = pytest.mark.usefixtures("planned_here")

RANK_FILE = "model_world_size_1_rank_0.pt"


@pytest.fixture
def actor(tmp_path: Path) -> Path:
    folder = tmp_path / "actor"
    folder.mkdir()
    torch.save({"a.weight": torch.ones(4, 4)}, folder / RANK_FILE)
    return folder


def command(*arguments: object) -> tuple[int, str]:
    """Run the command line in this process; return exit code and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = _run([str(a) for a in arguments])
    return code, out.getvalue()


def command_without_privileges(*arguments: object) -> tuple[int, str]:
    """Run it in a process for which a file's mode counts, as it does not for root."""

    def give_up() -> None:
        libc = ctypes.CDLL(None)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: for what is executed next

    done = subprocess.run(
        [sys.executable, "-m", "streamconv", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        preexec_fn=give_up if os.getuid() == 0 else None,
    )
    return done.returncode, done.stdout


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


KINDS = [folder, pipe, nowhere, circle]


@pytest.mark.parametrize("spoil", KINDS)
@pytest.mark.parametrize("name", ["convert", "plan", "inspect", "doctor", "verl"])
def test_a_rank_file_of_another_kind(
    spoil: Callable[[Path], None], name: str, actor: Path, tmp_path: Path
) -> None:
    spoil(actor / RANK_FILE)
    arguments: list[object] = [name, actor]
    if name == "convert":
        arguments += [tmp_path / "out"]
    if name == "verl":
        arguments = ["verl", "merge", "--backend", "fsdp", "--local_dir", actor]
        arguments += ["--target_dir", tmp_path / "out"]
    code, told = command(*arguments)
    assert code == 5, told
    assert RANK_FILE in told or str(actor) in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["actor"]


@pytest.mark.parametrize(
    ("name", "unreadable"),
    [
        ("convert", RANK_FILE),
        ("convert", "config.json"),
        ("plan", RANK_FILE),
        ("plan", "tokenizer.json"),
        ("plan", "."),
        ("inspect", "."),
        ("doctor", "."),
        ("verify", "."),
    ],
)
def test_what_a_user_may_not_read(name: str, unreadable: str, actor: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if name == "verify":
        streamconv.convert(actor, out)
    for side in ("tokenizer.json", "config.json"):
        (actor / side).write_text('{"model_type": "no-such-model"}')
    (actor / unreadable).chmod(0)
    try:
        arguments: list[object] = [name, actor]
        if name == "verify":
            arguments = ["verify", out, "--source", actor]
        if name == "convert":
            arguments.append(out)
        code, told = command_without_privileges(*arguments)
    finally:
        actor.chmod(0o755)
    assert code == 5, told
    assert (actor.name if unreadable == "." else unreadable) in told, told
    assert "Permission denied" in told


@pytest.mark.parametrize("spoil", KINDS)
def test_a_plan_of_another_kind(spoil: Callable[[Path], None], actor: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.jsonl"
    streamconv.plan(actor, output=plan)
    spoil(plan)
    code, told = command("run", plan, tmp_path / "out")
    assert code == 5, told
    assert "plan.jsonl" in told


@pytest.mark.parametrize("spoil", KINDS)
@pytest.mark.parametrize("name", ["streamconv.json", "model.safetensors"])
def test_an_output_of_another_kind(
    spoil: Callable[[Path], None], name: str, actor: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    streamconv.convert(actor, out)
    spoil(out / name)
    code, told = command("verify", out)
    assert code == 5, told
    assert name in told


@pytest.mark.parametrize("spoil", [pipe, nowhere, circle])
def test_a_side_file_of_another_kind_is_not_left_out(
    spoil: Callable[[Path], None], actor: Path, tmp_path: Path
) -> None:
    (actor / "huggingface").mkdir()
    side = actor / "huggingface" / "tokenizer.json"
    side.write_text("{}")
    spoil(side)
    with pytest.raises((BadInputError, StreamconvError)) as caught:
        streamconv.convert(actor, tmp_path / "out")
    assert caught.value.exit_code == 5
    assert "tokenizer.json" in str(caught.value)


def fails(*_: object) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_disk_that_fails_while_metadata_is_read(
    actor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(BadInputError, match=RANK_FILE) as caught:
        streamconv.convert(actor, tmp_path / "out")
    assert caught.value.errno == errno.EIO, "a batch tries such an error again"


def test_a_disk_that_fails_while_weights_are_read(
    actor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with streamconv.open(actor) as checkpoint:
        monkeypatch.setattr(os, "preadv", fails)
        with pytest.raises(BadInputError, match=RANK_FILE) as caught:
            checkpoint["a.weight"].numpy()
    assert caught.value.errno == errno.EIO


def test_what_says_nothing_about_the_input_is_not_bad_input(tmp_path: Path) -> None:
    for code in (errno.EMFILE, errno.ENOMEM, errno.ENOSPC, errno.EROFS):
        with pytest.raises(OSError, match=r"^\[Errno"), inputs.readable(tmp_path / "x"):
            raise OSError(code, os.strerror(code), str(tmp_path / "x"))
    out = tmp_path / "src" / "out"
    for place in (out / "x", out.parent / ".out.streamconv" / "plan.jsonl", tmp_path / "other"):
        with pytest.raises(PermissionError), inputs.reading(tmp_path / "src", but=out):
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
    with pytest.raises(BadInputError), inputs.reading(None, tmp_path / "src", but=out):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "src" / "x"))
