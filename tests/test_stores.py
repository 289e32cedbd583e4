"""What every object store must be good for, tried with servers of other people's make.

They are started on loopback: moto for S3, Azurite for Azure, the project's own for GCS. With
``STREAMCONV_TEST_STORE=s3://bucket/folder`` the same is tried there, with
credentials from where they always come from; what is written is deleted again.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import streamconv
from scripts import store_servers
from scripts.object_store import Store, environment, serving
from streamconv.conversion.job import run_plan
from streamconv.conversion.remote import RemoteExecution
from streamconv.errors import (
    BadInputError,
    LockedError,
    OutputExistsError,
    SourceChangedError,
    UnfinishedError,
)
from streamconv.options import RunOptions
from streamconv.storage import buckets, lease
from streamconv.storage.address import Address, place
from tests import stores
from tests.stores import files, put_folder

pytest.importorskip("obstore")

GIVEN = os.environ.get("STREAMCONV_TEST_STORE", "")
KINDS = [GIVEN] if GIVEN else ["moto", "azurite", "gcs"]
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_ACCOUNT_KEY", "GOOGLE_SERVICE_ACCOUNT_KEY")


@pytest.fixture(scope="module", params=KINDS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, dict[str, str]]]:
    """Where a store is, and the environment in which it is reached."""
    if request.param == "gcs":
        with serving(Store()) as address:
            yield "gs://streamconv-test", environment(address)
    elif request.param in ("moto", "azurite"):
        made = (
            store_servers.moto()
            if request.param == "moto"
            else store_servers.azurite(tmp_path_factory.mktemp("azurite"))
        )
        try:
            found = made.__enter__()
        except store_servers.MissingError as error:
            pytest.skip(str(error))
        yield found
        made.__exit__(None, None, None)
    else:
        yield request.param, {}


@pytest.fixture
def root(server: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Address]:
    """A folder of its own in the store."""
    address, settings = server
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(buckets, "_buckets", {})
    made = place(f"{address}/try-{secrets.token_hex(6)}")
    assert isinstance(made, Address)
    yield made
    left = made.bucket.below(made.key)
    made.bucket.delete(f"{made.key}/{name}" for name in left)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return stores.planned(tmp_path_factory.mktemp("planned"))


def run(plan: Path, target: Path, **options: object):
    return run_plan(plan, target, RunOptions(sync=False, **options))


def written(target: Address) -> dict[str, bytes]:
    buckets.forget()
    return files(target)


def assert_whole(target: Address, out: Path) -> None:
    assert written(target) == files(out)
    assert (target / "streamconv.json").is_file()
    assert not (target / ".streamconv").exists()


def test_from_the_store_and_into_it(root, checkpoints, tmp_path):
    source = checkpoints["fsdp2"].source
    disk = streamconv.convert(source, tmp_path / "disk", sync=False).output
    put_folder(root / "run", source)
    result = streamconv.convert(str(root / "run"), str(root / "model"), sync=False)
    assert result.status == "done"
    assert_whole(root / "model", disk)
    again = streamconv.convert(str(root / "run"), str(root / "model"))
    assert again.status == "nothing-to-do"
    for report in (
        streamconv.verify(str(root / "model")),
        streamconv.verify(str(root / "model"), source=str(root / "run")),
        streamconv.diff(disk, str(root / "model")),
    ):
        assert report.passed, report.problems


def test_verify_finds_a_flipped_byte_and_a_lost_file(root, planned):
    plan, _ = planned
    target = root / "model"
    run(plan, target)
    names = sorted(n for n in written(target) if n.endswith(".safetensors"))
    data = bytearray((target / names[0]).read_bytes())
    data[-1] ^= 1
    (target / names[0]).bucket.put((target / names[0]).key, bytes(data))
    target.bucket.delete([(target / names[1]).key])
    report = streamconv.verify(str(target))
    assert any(p.startswith(f"{names[0]}: xxh3_128") for p in report.problems)
    assert f"{names[1]}: missing" in report.problems


def test_a_source_that_is_written_anew_is_noticed(root, planned, tmp_path):
    put_folder(root / "run", planned[0].parent / "step")
    plan = tmp_path / "plan.jsonl"
    streamconv.plan(str(root / "run"), output=plan)
    one = next((root / "run").iterdir())
    time.sleep(1.1)  # where versions are times of change
    one.bucket.put(one.key, one.read_bytes()[::-1])
    with pytest.raises(SourceChangedError, match="not the one that was planned"):
        run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_upload_in_parts_is_what_was_written(root):
    """The client keeps the memory it is given: pieces of one buffer must not become one another."""
    bucket, key = root.bucket, f"{root.key}/big"
    upload = bucket.upload(key, 5 << 20, 2)
    buffer = bytearray(1 << 20)
    for k in range(12):
        buffer[:] = bytes([k]) * len(buffer)
        upload.write(bytes(buffer))
    upload.finish()
    found = bucket.look(key)
    data = bucket.get(key, 0, found.nbytes, found.version)
    assert data == b"".join(bytes([k]) * (1 << 20) for k in range(12))
    upload = bucket.upload(f"{root.key}/given-up", 5 << 20, 2)
    for k in range(12):
        upload.write(bytes([k]) * (1 << 20))
    upload.close()
    assert [*bucket.below(root.key)] == ["big"]


def test_what_lies_in_the_way_and_overwrite(root, planned, tmp_path):
    plan, out = planned
    target = root / "model"
    note = target / "notes.txt"
    note.bucket.put(note.key, b"mine")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError):
            run(plan, target, overwrite=overwrite)
    assert [*target.bucket.below(target.key)] == ["notes.txt"]
    target.bucket.delete([note.key])
    other = tmp_path / "other.jsonl"
    streamconv.plan(plan.parent / "step", output=other, max_shard_size="45kB")
    run(other, target)
    with pytest.raises(OutputExistsError, match="another job"):
        run(plan, target)
    run(plan, target, overwrite=True)
    assert_whole(target, out)


def test_one_of_two_runs_has_the_output(root, planned, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    plan, out = planned
    lock = root / "model" / ".streamconv" / "lock"
    with lease.held(lock), pytest.raises(LockedError, match="another conversion"):
        run(plan, root / "model")
    run(plan, root / "model")
    assert_whole(root / "model", out)


def test_a_lease_that_is_lost_is_noticed(root, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 1.5)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 60.0)
    with lease.held(root / "lock") as zombie, lease.held(root / "lock") as heir:
        heir.check()
        with pytest.raises(LockedError, match="taken over"):
            zombie.check()


def test_in_parts(root, planned):
    """In any order, at once, twice, after a kill; what was finished before stays."""
    plan, out = planned
    target = str(root / "model")
    begun = streamconv.begin(plan, target)
    assert len(begun.files) > 3
    with pytest.raises(UnfinishedError):
        streamconv.finish(target)
    with ThreadPoolExecutor(3) as pool:
        parts = [pool.submit(streamconv.part, target, share) for share in ("2/3", "1/3", "2/3")]
        assert {p.result().status for p in parts} <= {"written", "nothing-to-do"}
    assert streamconv.part(target, "1/3").status == "nothing-to-do"
    again = streamconv.begin(plan, target)
    assert set(again.finished) < set(begun.files)
    assert again.finished
    streamconv.part(target, "3/3")
    assert streamconv.finish(target).status == "done"
    assert_whole(root / "model", out)
    assert streamconv.finish(target).status == "nothing-to-do"
    assert streamconv.part(target, "1/3").status == "published"
    with pytest.raises(BadInputError, match="no conversion into this folder"):
        streamconv.part(str(root / "nowhere"), "1/3")


def test_a_file_written_twice_counts_whichever_was_noted(root, planned):
    """Azure and GCS give equal bytes a version for each time that they are written."""
    plan, out = planned
    target = str(root / "model")
    begun = streamconv.begin(plan, target)
    streamconv.part(target, "1/1")
    twice = root / "model" / begun.files[0]
    data = twice.read_bytes()
    twice.bucket.put(twice.key, data)
    assert streamconv.begin(plan, target).finished
    twice.bucket.put(twice.key, data[:-1] + bytes([data[-1] ^ 1]))
    assert streamconv.part(target, files=[begun.files[0]]).status == "written"
    twice.bucket.put(twice.key, data)
    assert streamconv.finish(target).status == "done"
    assert_whole(root / "model", out)


def test_a_part_that_comes_late(root, planned, monkeypatch):
    """It ends its upload after the output was published: nothing of an unfinished run may be left."""
    plan, out = planned
    target = str(root / "model")
    streamconv.begin(plan, target)
    put = RemoteExecution._put

    def late(self, *args):
        monkeypatch.setattr(RemoteExecution, "_put", put)
        streamconv.part(target, "1/1")
        streamconv.finish(target)
        return put(self, *args)

    monkeypatch.setattr(RemoteExecution, "_put", late)
    assert streamconv.part(target, "1/1").status == "published"
    assert_whole(root / "model", out)


def test_killed_on_the_way_and_gone_on(root, planned, server):
    plan, out = planned
    target = root / "model"
    command = [sys.executable, "-m", "streamconv", "run", str(plan), str(target)]
    command += ["--quiet", "--no-sync"]
    for seconds in (0.3, 0.5, 0.8):
        process = subprocess.Popen(command, env=os.environ | server[1])
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, env=os.environ | server[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_whole(target, out)


def test_no_secret_is_shown(root, planned, server, tmp_path):
    put_folder(root / "run", planned[0].parent / "step")
    hidden = [server[1][n] for n in SECRETS if n in server[1]]
    base = [sys.executable, "-m", "streamconv"]
    told = ""
    for command in (
        ["doctor", str(root / "run"), str(root / "m")],
        [
            "run",
            str(planned[0]),
            str(root / "m"),
            "--report",
            str(tmp_path / "page.html"),
            "--json",
        ],
        ["inspect", str(root / "nowhere")],
    ):
        done = subprocess.run(
            [*base, *command],
            env=os.environ | server[1],
            capture_output=True,
            text=True,
        )
        told += done.stdout + done.stderr
    buckets.forget()
    told += (root / "m" / "streamconv.json").read_text() + (tmp_path / "page.html").read_text()
    assert not [s for s in hidden if s in told]
