"""Two processes that read rank files find what one finds, errors too."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.makers.fsdp import Made
from scripts.makers.large import make_large
from streamconv.errors import BadInputError, StreamconvError
from streamconv.formats.fsdp import rank_files
from streamconv.ir.source import Checkpoint
from streamconv.torchfile import rankfiles


@pytest.fixture
def _two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rankfiles, "MANY_FILES", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def known(checkpoint: Checkpoint) -> list[object]:
    facts = dict(checkpoint.facts)
    tensors = dict(checkpoint.tensors)
    return [
        replace(checkpoint, facts={}, tensors={}, undecided={}),
        facts,
        tensors,
        dict(checkpoint.undecided),
    ]


def one_and_two(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    found: list[object] = []
    for many in (1000, 2):
        monkeypatch.setattr(rankfiles, "MANY_FILES", many)
        try:
            found.append(known(rank_files.read(folder)))
        except StreamconvError as error:
            found.append(error.to_json())
    return found


@pytest.mark.usefixtures("_two_processes")
def test_every_checkpoint_reads_the_same(
    checkpoints: dict[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    several = [
        m for m in checkpoints.values() if len(list(m.source.glob("model_world_size_*"))) > 1
    ]
    assert len(several) > 5
    for made in several:
        one, two = one_and_two(made.source, monkeypatch)
        assert one == two, made.source


@pytest.mark.usefixtures("_two_processes")
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_damaged_file_is_the_same_error(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_large(tmp_path, 400_000, world=3)
    file = made.source / f"model_world_size_3_rank_{rank}.pt"
    file.write_bytes(file.read_bytes()[:-7])
    one, two = one_and_two(made.source, monkeypatch)
    assert one == two
    assert f"rank_{rank}.pt" in str(one)


@pytest.mark.usefixtures("_two_processes")
def test_a_helper_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_large(tmp_path, 400_000, world=2)
    dies = tmp_path / "dies"
    dies.write_text("#!/bin/sh\ncat > /dev/null\nkill -SEGV $$\n")
    dies.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dies))
    with pytest.raises(BadInputError, match="ended in a crash") as caught:
        rank_files.read(made.source)
    assert caught.value.found == "SIGSEGV"
