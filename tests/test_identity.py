"""The identity of a job: what changes it, and what must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamconv.ir import identity
from streamconv.ir.planned import SideFile
from streamconv.ir.source import SourceFile
from streamconv.options import JobOptions

FILES = [SourceFile("model_world_size_1_rank_0.pt", 100, 7, "ab" * 16)]
SIDE = [SideFile("config.json", "/x/config.json", 9, "cd" * 16)]


def digest(options=None, files=FILES, side=SIDE, name="fsdp") -> str:
    return identity.job_identity(name, files, side, options or JobOptions()).digest


@pytest.mark.parametrize(
    "other",
    [
        {"options": JobOptions(dtype="bfloat16")},
        {"options": JobOptions(keep_dtype=("*.gate.*",))},
        {"options": JobOptions(strict=True)},
        {"options": JobOptions(max_shard_bytes=10**9)},
        {"files": [SourceFile("model_world_size_1_rank_0.pt", 100, 7, "ef" * 16)]},
        {"side": []},
        {"name": "dcp"},
    ],
)
def test_what_makes_another_job(other):
    assert digest(**other) != digest()


def test_what_does_not():
    moved = [SourceFile("model_world_size_1_rank_0.pt", 100, 99999, "ab" * 16)]
    assert digest(files=moved) == digest()
    assert digest(options=JobOptions(hf_config=Path("/elsewhere"), model="actor")) == digest()


def test_an_option_that_a_later_release_adds_leaves_old_outputs_what_they_are(monkeypatch):
    before = digest()
    plain = JobOptions.to_json
    monkeypatch.setattr(JobOptions, "to_json", lambda self: {**plain(self), "later": False})
    monkeypatch.setattr(identity, "_DEFAULTS", {**identity._DEFAULTS, "later": False})
    assert digest() == before
