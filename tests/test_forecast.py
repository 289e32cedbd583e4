"""Forecasts: which file system a path lies on, how fast it is, how long it takes, what will hurt."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.makers import runs
from streamconv.environment import doctor, speed
from streamconv.environment.forecast import more_machines, moving_seconds, warnings
from streamconv.executor import budget
from streamconv.files.filesystems import FileSystem, filesystem_of
from streamconv.system import memory
from streamconv.units import format_size

GB = 10**9
DISK = FileSystem(Path("/"), "ext4", "/dev/sda1", 1, 500 * GB, 1000 * GB)


# File systems

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / {home} rw - tmpfs tmpfs rw
31 30 0:41 / {home}/with\\040space rw master:2 - nfs4 server:/export rw,vers=4.2
32 22 0:42 / {home}-other rw - xfs /dev/sdb rw
33 30 0:43 / {home}/twice rw - xfs /dev/sdc rw
34 30 0:44 / {home}/twice rw - lustre mgs:/fs rw
garbage
"""


@pytest.mark.parametrize(
    ("path", "kind", "source"),
    [
        ("", "tmpfs", "tmpfs"),
        ("with space/model", "nfs4", "server:/export"),
        ("twice", "lustre", "mgs:/fs"),
        ("not/there/yet", "tmpfs", "tmpfs"),
        ("..", "ext4", "/dev/sda1"),
    ],
)
def test_the_mount_that_is_nearest_counts(tmp_path, path, kind, source):
    home = tmp_path / "home"
    (home / "with space").mkdir(parents=True)
    (home / "twice").mkdir()
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS.format(home=home))
    found = filesystem_of(home / path, table)
    assert (found.kind, found.source) == (kind, source)
    assert found.is_network == (kind in ("nfs4", "lustre"))
    assert found.is_memory == (kind == "tmpfs")


def test_this_machine_has_file_systems_too(tmp_path):
    found = filesystem_of(tmp_path)
    assert found.kind != "unknown"
    assert found.device == tmp_path.stat().st_dev
    assert 0 < found.free_bytes <= found.total_bytes


def test_no_table_of_mounts_is_no_catastrophe(tmp_path):
    assert filesystem_of(tmp_path, tmp_path / "nothing").kind == "unknown"


# Speed


def test_reading_is_measured_and_little_is_not(tmp_path):
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(40 << 20))
    small.write_bytes(b"x" * 1000)
    rate = speed.read_speed([small, large], 0.2)
    assert rate is not None
    assert rate > 0
    assert speed.read_speed([small], 0.2) is None
    assert speed.read_speed([], 0.2) is None


def test_writing_is_measured_and_leaves_nothing(tmp_path):
    rate = speed.write_speed(tmp_path / "not/there", 0.1)
    assert rate is not None
    assert rate > 0
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_nothing_is_known():
    assert speed.write_speed(Path("/proc"), 0.1) is None


def test_checksums_are_measured():
    assert speed.checksum_speed() > 10**6


# Time


def test_two_disks_work_at_once_and_one_takes_turns():
    rates = {"read_rate": 2 * GB, "write_rate": GB, "checksum_rate": 10 * GB}
    assert moving_seconds(100 * GB, 100 * GB, **rates, one_disk=False) == 100
    assert moving_seconds(100 * GB, 100 * GB, **rates, one_disk=True) == 150


def test_checksums_may_be_what_takes_longest():
    rates = {"read_rate": 50 * GB, "write_rate": 50 * GB, "checksum_rate": GB}
    assert moving_seconds(100 * GB, 10 * GB, **rates, one_disk=False) == 100


def test_what_was_not_measured_is_not_guessed():
    assert moving_seconds(GB, GB, None, GB, GB, one_disk=False) is None


# What will hurt


def told(**changes) -> str:
    source = changes.pop("source", DISK)
    output = changes.pop("output", dataclasses.replace(DISK, device=2))
    needed, limit = changes.pop("needed", 10 * GB), changes.pop("limit", GB)
    one = source.device == output.device
    return "; ".join(warnings(source, output, needed, limit, one_disk=one))


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    state = memory.MemoryState(64 * GB, 8 * GB, 0)
    monkeypatch.setattr(memory, "memory_state", lambda: state)


def test_nothing_hurts():
    assert told() == ""


def test_what_hurts_is_said(monkeypatch):
    assert "take turns" in told(output=DISK)
    nfs = dataclasses.replace(DISK, kind="nfs4", source="server:/x", device=3)
    assert "the source is on nfs4 (server:/x)" in told(source=nfs)
    assert "the output is on nfs4" in told(output=nfs)
    assert "takes 10.0 GB of memory" in told(
        output=dataclasses.replace(DISK, kind="tmpfs", device=3)
    )
    assert "almost full: 5.00 GB left" in told(needed=495 * GB)
    assert "would swap" in told(limit=65 * GB)
    monkeypatch.setattr(memory, "memory_state", lambda: memory.MemoryState(GB // 2, 0, 0))
    assert "the kernel may kill it" in told()
    monkeypatch.setattr(memory, "memory_state", lambda: memory.MemoryState(64 * GB, 8 * GB, 5 * GB))
    assert "swapping: 5.00 GB" in told()


def test_the_state_of_memory_is_read(tmp_path):
    (tmp_path / "meminfo").write_text(
        "MemTotal: 100 kB\nMemAvailable:  40 kB\nSwapTotal: 30 kB\nSwapFree: 10 kB\nHugePages: 0\n"
    )
    state = budget_state(tmp_path / "meminfo")
    assert state == memory.MemoryState(40 * 1024, 30 * 1024, 20 * 1024)


budget_state = memory.memory_state  # before a test puts another in its place


# As the commands show it


def test_doctor_measures_the_disks(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights").write_bytes(bytes(10 << 20))
    monkeypatch.setattr(
        doctor, "_try", lambda src, model: ({"path": str(src), "readable": False}, None)
    )
    found = doctor.examine(source, dst=tmp_path / "out")
    roles = {s["role"]: s for s in found["filesystems"]}
    assert list(roles) == ["working folder", "source", "output"]
    assert roles["source"]["read_bytes_per_second"] > 0
    assert roles["output"]["write_bytes_per_second"] > 0
    shown = dict(doctor.rows(found))
    assert "writes" in shown["disk of output"]
    assert "transformers" in shown["loads the result"]


def test_doctor_says_that_a_disk_is_full(tmp_path, monkeypatch):
    at = {"working": 4096, "output": 10 * GB}

    def found(path):
        role = "output" if path == tmp_path / "out" else "working"
        return dataclasses.replace(DISK, mount=Path("/", role), free_bytes=at[role])

    monkeypatch.setattr("streamconv.files.filesystems.filesystem_of", found)
    (problem,) = doctor.examine()["problems"]
    assert problem.startswith("the disk at /working is full: 4.10 kB free")
    assert doctor.examine(dst=tmp_path / "out")["problems"] == []
    at["output"] = 0
    (problem,) = doctor.examine(dst=tmp_path / "out")["problems"]
    assert problem.startswith("the disk at /output is full: 0 B free")


def test_doctor_says_what_would_keep_a_conversion_from_ending(checkpoints, tmp_path, monkeypatch):
    """Limits that are another process's: its own would be too small for this one."""
    monkeypatch.setenv("STREAMCONV_CACHE", str(tmp_path / "cache"))
    taken = tmp_path / "file"
    taken.touch()

    def doctor(source):
        return [sys.executable, "-m", "streamconv", "doctor", str(source), str(taken / "out")]

    command = doctor(checkpoints["fsdp2-w2"].source)
    script = f"ulimit -v 400000; exec {shlex.join(command)} --json"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert found["default_budget_from"] == "the limit of `ulimit -v`"
    assert found["default_budget_bytes"] <= 400_000 * 1024
    refused, too_small = found["problems"]
    assert (
        refused
        == f"the output cannot be written: {taken} is not a folder\n  next: choose another folder"
    )
    assert f"at least {format_size(budget.PLANNING_FLOOR_BYTES)}" in too_small
    assert done.returncode == 1
    # Where nothing has to be asked of transformers, so little is enough.
    without_config = runs.rank_file(tmp_path / "actor" / runs.RANK_FILE).parent
    script = f"ulimit -v 400000; exec {shlex.join(doctor(without_config))} --json"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["problems"] == [refused]


def test_a_disk_that_takes_nothing_is_told(monkeypatch, tmp_path):
    from streamconv.files import filesystems

    assert filesystems.why_not_writable(tmp_path / "new/out") is None
    read_only = SimpleNamespace(f_flag=os.ST_RDONLY)
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: read_only)
        assert "is read-only" in filesystems.why_not_writable(tmp_path / "new/out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "no permission" in filesystems.why_not_writable(tmp_path / "new/out")


def test_plan_says_how_long_and_what_to_mind(tmp_path):
    source = runs.rank_file(tmp_path / "actor" / runs.RANK_FILE).parent
    command = [sys.executable, "-m", "streamconv", "plan", str(source), str(tmp_path / "out")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    data = json.loads(done.stdout)["forecast"]
    assert data["checksum_rate"] > 0
    assert data["one_disk"] is True
    assert any("take turns" in w for w in data["warnings"])


@pytest.mark.parametrize(
    ("source", "output", "files", "by_processor", "expected"),
    [
        ("ext4", "nfs4", 9, False, "more of them bring nothing: the source is on this one's disk"),
        ("ext4", "tmpfs", 9, False, "more of them bring nothing: the source and the output are"),
        ("nfs4", "lustre", 1, True, "more of them bring nothing: there is one output file"),
        ("nfs4", "lustre", 9, True, "1/n of it, up to 9 parts"),
        ("nfs4", "lustre", 9, False, "as far as the file server"),
    ],
)
def test_what_more_machines_would_bring(source, output, files, by_processor, expected):
    systems = [dataclasses.replace(DISK, kind=kind) for kind in (source, output)]
    told = more_machines(*systems, files, by_processor)
    assert expected in told
