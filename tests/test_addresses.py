"""Addresses of stores are refused where only a path may be given, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

import streamconv
from streamconv.__main__ import _run
from streamconv.batch import settings
from streamconv.cli.commands import app
from streamconv.errors import UsageError
from streamconv.files.inputs import local_path

ADDRESS = "s3://bucket/run/global_step_10"
REQUIRED = {"backend": "fsdp"}


def commands() -> Iterator[tuple[tuple[str, ...], list]]:
    for name, command in typer.main.get_command(app).commands.items():
        for sub, inner in getattr(command, "commands", {}).items():
            yield (name, sub), inner.params
        if not hasattr(command, "commands"):
            yield (name,), command.params


def paths() -> Iterator[tuple[list[str], str]]:
    """Yield command lines, each with the address in place of one of the paths."""
    for words, params in commands():
        mine = [p for p in params if getattr(p.type, "func", None) is local_path]
        for wanted in mine:
            line = [*words]
            for p in params:
                value = ADDRESS if p is wanted else "nowhere"
                if p.param_type_name == "argument":
                    line.append(value)
                elif p is wanted or (p.required and p in mine):
                    line += [p.opts[0], value]
                elif p.name in REQUIRED:
                    line += [p.opts[0], REQUIRED[p.name]]
            yield line, wanted.name


def test_no_path_is_declared_otherwise():
    """typer's own type for paths would take an address for a folder's name."""
    wrong = [
        (words, p.name)
        for words, params in commands()
        for p in params
        if "Path" in type(p.type).__name__
    ]
    assert not wrong


LINES = list(paths())


@pytest.mark.parametrize("line", [x for x, _ in LINES], ids=["-".join([x[0], n]) for x, n in LINES])
def test_commands(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert _run(line) == 2
    said = capsys.readouterr().err
    assert "s3:// is not supported" in said
    assert ADDRESS in said
    assert not list(tmp_path.iterdir())


CALLS = {
    "convert with": lambda a: streamconv.convert("in", "out", hf_config=a),
    "convert onto": lambda a: streamconv.convert("in", "out", base=a),
    "convert report": lambda a: streamconv.convert("in", "out", report=a),
    "plan output": lambda a: streamconv.plan("in", output=a),
    "verify base": lambda a: streamconv.verify("out", base=a),
    "upload": lambda a: streamconv.upload(a, "org/name"),
}


@pytest.mark.parametrize("given", [ADDRESS, Path(ADDRESS)], ids=["text", "path"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls(call, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="not supported") as caught:
        call(given)
    assert caught.value.where == ADDRESS
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["hf-config", "base"])
def test_job_files(key, tmp_path):
    run = {"root": "runs", "output": "out"} | {key: ADDRESS}
    lines = "".join(f'{k} = "{v}"\n' for k, v in run.items())
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(f"[[run]]\n{lines}")
    with pytest.raises(UsageError, match="not supported"):
        settings.load(jobs, {})


@pytest.mark.parametrize("path", ["./s3:/x", "a:b/c", "run:1", "C:/x", "-:/x", "/s3://x", "1s:/x"])
def test_paths_that_look_a_little_like_it(path):
    assert local_path(path) == Path(path)
