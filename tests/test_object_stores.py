"""Checkpoints in object stores: read, converted and verified there, by a small store on loopback."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamconv
from scripts import measured
from scripts.makers.large import make_large
from scripts.object_store import Request, Store, environment, serving
from streamconv.conversion import remote
from streamconv.conversion.job import run_plan
from streamconv.errors import (
    BadInputError,
    LockedError,
    OutputExistsError,
    SourceChangedError,
    StreamconvError,
    UsageError,
)
from streamconv.options import RunOptions
from streamconv.storage import buckets, lease, objects
from streamconv.storage.address import Address, place
from tests import stores
from tests.hub_double import running
from tests.stores import files
from tests.test_output_folder import record_of

pytest.importorskip("obstore")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    made = Store()
    with serving(made) as address:
        for name, value in environment(address).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(buckets, "_buckets", {})
        monkeypatch.setattr(objects, "_PAUSES_SECONDS", (0.01,) * 4)
        yield made


def put(store: Store, folder: Path, prefix: str = "run/actor/") -> str:
    store.add_folder("bucket", folder, prefix)
    return f"s3://bucket/{prefix.rstrip('/')}"


def test_an_address_is_no_path():
    a = place("s3://bucket/run//actor/")
    assert isinstance(a, Address)
    assert (str(a), str(a / "x.pt"), str(a.parent), a.key) == (
        "s3://bucket/run/actor",
        "s3://bucket/run/actor/x.pt",
        "s3://bucket/run",
        "run/actor",
    )
    assert (a / "x").relative_to(a).as_posix() == "x"
    assert (a / ".." / "b").key == "run/b"
    assert place(str(a)) == a
    with pytest.raises(TypeError, match="not a path"):
        Path(os.fspath(a))


@pytest.mark.parametrize(
    "given",
    [
        "s3://key:hunter2@bucket/x",
        "https://me:hunter2@host/x",
        "https://host/x?sig=hunter2",
        "hf://org",
        "hf://datasets/org/name",
        "hdfs://host/x",
        "s3://",
        "s3://bucket/../x",
    ],
)
def test_addresses_that_are_refused(given):
    with pytest.raises(UsageError) as caught:
        place(given)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp1-tp", "fsdp2-no-crc", "fsdp2-lora"])
def test_same_bytes_as_from_a_disk(name, store, checkpoints, tmp_path):
    source = checkpoints[name].source
    address = put(store, source)
    streamconv.convert(source, tmp_path / "disk", sync=False)
    before = len(store.requests)
    result = streamconv.convert(address, tmp_path / "store", sync=False)
    assert files(tmp_path / "disk") == files(tmp_path / "store")
    assert result.status == "done"
    assert len(store.requests) - before < 60 + 7 * sum(1 for _ in source.rglob("*"))
    assert streamconv.convert(address, tmp_path / "store").status == "nothing-to-do"
    assert streamconv.verify(tmp_path / "store", source=address).passed


def test_dcp_and_inspect(store, checkpoints, tmp_path):
    source = checkpoints["fsdp2-w2"].dcp
    address = put(store, source)
    here, there = streamconv.inspect(source), streamconv.inspect(address)
    assert there.pop("root") == address
    here.pop("root")
    for found in (here, there):
        found.pop("side_dir")
    assert here == there


def ranges(request: Request) -> bool:
    """Whether a request is for weights: in the middle of a big object."""
    return request.method == "GET" and request.range is not None and request.key.endswith(".pt")


@pytest.mark.parametrize("ignored", [False, True], ids=["conditions", "no-conditions"])
def test_a_source_that_changes_is_noticed(ignored, store, checkpoints, tmp_path):
    """Between the plan and its execution an object is written anew: other bytes, same size."""
    address = put(store, checkpoints["fsdp2-no-crc"].source)
    plan = tmp_path / "plan.jsonl"
    streamconv.plan(address, output=plan)
    name = next(k for k in store.names("bucket") if k.endswith("model_world_size_4_rank_1.pt"))
    data = bytearray(store.bytes_of("bucket", name))
    data[len(data) // 2] ^= 1
    store.put("bucket", name, bytes(data))
    if ignored:
        store.ignores = {"if-match"}
    with pytest.raises(SourceChangedError, match="not the one that was planned"):
        run_plan(plan, tmp_path / "out", RunOptions(sync=False))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", [503, 500, "reset"])
def test_what_passes_is_tried_again(fault, store, checkpoints, tmp_path):
    address = put(store, checkpoints["fsdp2"].source)
    streamconv.convert(checkpoints["fsdp2"].source, tmp_path / "disk", sync=False)
    seen = []

    def every_third(request: Request) -> int | str | None:
        seen.append(request)
        return fault if request.method == "GET" and len(seen) % 3 == 0 else None

    store.fault = every_third
    streamconv.convert(address, tmp_path / "store", sync=False)
    assert files(tmp_path / "disk") == files(tmp_path / "store")


def test_damage_is_found(store, checkpoints, tmp_path):
    address = put(store, checkpoints["fsdp2"].source)
    name = next(k for k in store.names("bucket") if k.endswith("model_world_size_4_rank_1.pt"))
    _, start, _ = record_of(checkpoints["fsdp2"].source / name.rpartition("/")[2])
    data = bytearray(store.bytes_of("bucket", name))
    data[start] ^= 1
    store.put("bucket", name, bytes(data))
    with pytest.raises(BadInputError, match="CRC-32"):
        streamconv.convert(address, tmp_path / "out", sync=False)
    assert not (tmp_path / "out").exists()


def test_refused_and_missing(store, checkpoints, tmp_path):
    address = put(store, checkpoints["fsdp2"].source)
    store.fault = lambda _: 403
    with pytest.raises(BadInputError, match="refuses access") as caught:
        streamconv.inspect(address)
    assert "not-to-be-seen" not in str(caught.value)
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint
    store.fault = lambda _: None
    with pytest.raises(BadInputError, match="no such checkpoint"):
        streamconv.inspect("s3://bucket/nowhere")


def test_nothing_secret_is_told(store, checkpoints, tmp_path):
    address = put(store, checkpoints["fsdp2"].source)
    plan = tmp_path / "plan.jsonl"
    streamconv.plan(address, output=plan)
    streamconv.convert(address, tmp_path / "out", sync=False, report=tmp_path / "page.html")
    for path in (plan, tmp_path / "page.html", tmp_path / "out" / "streamconv.json"):
        assert "not-to-be-seen" not in path.read_text()
    assert (
        json.loads((tmp_path / "out" / "streamconv.json").read_text())["run"]["source"] == address
    )


def test_a_plan_tells_the_requests_and_the_time(store, tmp_path, capsys):
    """No more are made than it says, and nothing is left where it tried to write."""
    import torch

    from streamconv.cli.report import plan_report, render_plan

    (tmp_path / "step").mkdir()
    tensors = {f"layers.{k}.weight": torch.randn(512, 1024) for k in range(6)}
    torch.save(tensors, tmp_path / "step" / "model_world_size_1_rank_0.pt")
    address = put(store, tmp_path / "step")
    store.latency = 0.01
    plan = streamconv.plan(address, "s3://out/m", output=tmp_path / "plan.jsonl")
    report = plan_report(plan, place("s3://out/m"))
    told = report["forecast"]
    assert report["disk_free_bytes"] is None
    assert told["seconds"] > 0
    assert told["store"]["latency_seconds"] >= 0.01
    assert not store.names("out")
    assert "ms each" in render_plan(report)
    first = len(store.requests)
    run_plan(tmp_path / "plan.jsonl", place("s3://out/m"), RunOptions(sync=False))
    assert 0 < sum(map(ranges, store.requests[first:])) <= told["requests"]


@pytest.mark.memory
@pytest.mark.parametrize("way", ["out of a store", "into a store", "from store to store"])
def test_the_smallest_budget_is_named_and_kept(way, store, tmp_path):
    make_large(tmp_path / "source", 40_000_000, 2)
    source, out = tmp_path / "source" / "actor", str(tmp_path / "out")
    src = put(store, source) if way != "into a store" else str(source)
    dst = out if way == "out of a store" else "s3://bucket/out"
    plan = tmp_path / "plan.jsonl"
    told = json.loads(measured.run("plan", src, dst, "-o", plan, "--json").out)
    assert (told["disk_needed_bytes"] == 0) == (dst != out)
    refused = measured.run("run", plan, dst, "--max-mem", "40MB")
    assert refused.code == 4
    named = int(re.search(r"--max-mem (\d+)MB is the smallest that works", refused.err)[1])
    assert named <= (66 if dst == out else 104)
    assert abs(told["memory"]["smallest_run_bytes"] - named * 10**6) <= 6_000_000
    done = measured.run("run", plan, dst, "--max-mem", f"{named}MB")
    assert done.code == 0, done.err
    assert done.peak_bytes <= named * 10**6
    assert streamconv.verify(dst).passed


def test_a_store_needs_no_disk(store, checkpoints):
    source = str(checkpoints["fsdp2"].source)
    assert (
        "none needed: the output is in a store"
        in measured.run("plan", source, "s3://bucket/out").out
    )
    assert " MB needed" in measured.run("plan", source).out


def test_doctor_says_whether_a_store_can_be_written(store, checkpoints):
    address = put(store, checkpoints["fsdp2"].source)
    found = streamconv.doctor(address, "s3://out/m")
    row = next(s for s in found["filesystems"] if s["role"] == "output")
    assert row["conditions"] is True
    assert not found["problems"]
    assert "not-to-be-seen" not in json.dumps(found)
    store.ignores = {"if-match"}
    assert streamconv.doctor(address, "s3://out/m")["exit_code"] == 1
    store.fault = lambda r: 403 if r.method == "PUT" else None
    assert streamconv.doctor(address, "s3://out/m")["exit_code"] == 1
    assert not store.names("out")


def test_lazy_tensors(store, checkpoints):
    source = checkpoints["fsdp2"].source
    with streamconv.open(source) as here, streamconv.open(put(store, source)) as there:
        assert list(here) == list(there)
        for name in here:
            assert here[name][...].tobytes() == there[name][...].tobytes()


def test_a_model_runs_out_of_a_store(store, checkpoints):
    source = checkpoints["fsdp2"].source
    with streamconv.open(source) as here, streamconv.open(put(store, source)) as there:
        mine, theirs = there.load_model().state_dict(), here.load_model().state_dict()
    assert mine.keys() == theirs.keys()
    assert all((mine[k] == theirs[k]).all() for k in theirs)


def test_objects_are_opened_to_be_read(store):
    data = bytes(range(256)) * (5 << 12)
    store.put("bucket", "x/y", data)
    one = place("s3://bucket/x/y")
    assert one.open("rb").read() == data
    before = len(store.requests)
    with one.open("rb", buffering=0) as stream:
        pieces = iter(lambda: stream.read(1 << 20), b"")
        assert b"".join(pieces) == data
        assert len(store.requests) - before < 4  # one answer, read to its end
        assert stream.seek(-3, os.SEEK_END) == len(data) - 3
        assert stream.read(9) == data[-3:]
    store.put("bucket", "x/t", b"eins\nzwei")
    assert [*place("s3://bucket/x/t").open(encoding="utf-8")] == ["eins\n", "zwei"]
    for mode in ("w", "ab", "r+b", "x"):
        with pytest.raises(io.UnsupportedOperation, match="can only be read"):
            one.open(mode)


@pytest.mark.parametrize("fault", [503, "reset"])
def test_a_stream_that_breaks_off_goes_on(fault, store):
    data = os.urandom(5 << 20)
    store.put("bucket", "x/y", data)
    numbers = iter(range(10**9))
    store.fault = lambda r: fault if r.method == "GET" and next(numbers) % 2 else None
    with place("s3://bucket/x/y").open("rb", buffering=0) as stream:
        assert b"".join(iter(lambda: stream.read(1 << 20), b"")) == data


def test_from_a_web_server(store, checkpoints, tmp_path):
    """A folder of one that lists by WebDAV."""
    source = checkpoints["fsdp2"].source
    put(store, source)
    address = f"{os.environ['AWS_ENDPOINT_URL']}/bucket/run/actor"
    streamconv.convert(source, tmp_path / "disk", sync=False)
    streamconv.convert(address, tmp_path / "web", sync=False)
    assert files(tmp_path / "disk") == files(tmp_path / "web")
    with pytest.raises(UsageError, match="can only be read"):
        streamconv.convert(source, address + "/out")


def test_from_the_hub(checkpoints, tmp_path):
    """By huggingface_hub, at one commit; written it is by uploads alone."""
    source = checkpoints["fsdp2"].source
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"

    def command(*arguments: object, token: str = "hf_secret"):
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": token}
        whole = [sys.executable, "-m", "streamconv", *map(str, arguments)]
        done = subprocess.run(whole, capture_output=True, text=True, env=env)
        assert "hf_secret" not in done.stdout + done.stderr
        return done

    with running() as hub:
        hub.public = True
        hub.files = {f"step/actor/{name}": data for name, data in files(source).items()}
        planned = command("plan", "hf://me/model/step/actor", "-o", plan)
        assert planned.returncode == 0, planned.stderr
        assert command("run", plan, out, "--no-sync").returncode == 0
        assert files(out) == files(streamconv.convert(source, tmp_path / "disk").output)
        assert command("inspect", "hf://me/model/none").returncode == 5
        assert command("inspect", "hf://me/model/step/actor", token="hf_other").returncode == 5
        refused = command("convert", source, "hf://me/model/out")
        assert refused.returncode == 2
        assert "--hf-upload-path" in refused.stderr
        name = next(n for n in hub.files if "/model_world" in n and n.endswith("rank_1.pt"))
        hub.files[name] = hub.files[name][::-1]
        assert command("run", plan, tmp_path / "again").returncode == 5
        assert not (tmp_path / "again").exists()


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(buckets, "_buckets", {})
    for name, value in environment("http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StreamconvError, match="does not answer"):
        streamconv.inspect("s3://bucket/x")


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return stores.planned(tmp_path_factory.mktemp("planned"))


TARGET = "s3://out/models/m"


def written(store: Store) -> dict[str, bytes]:
    """Return the objects of the output, the manifest left out (it has timings)."""
    prefix = "models/m/"
    names = store.names("out", prefix)
    return {
        n.removeprefix(prefix): store.bytes_of("out", n) for n in names if "streamconv" not in n
    }


def run(plan: Path, **options: object):
    return run_plan(plan, place(TARGET), RunOptions(sync=False, **options))


def assert_whole(store: Store, out: Path) -> None:
    assert written(store) == files(out)
    assert "models/m/streamconv.json" in store.names("out")
    assert not store.names("out", "models/m/.streamconv")
    assert not store.uploads


def test_an_output_in_a_store(store, planned):
    plan, out = planned
    assert run(plan).status == "done"
    assert_whole(store, out)
    put = [r.key.rpartition("/")[2] for r in store.requests if r.method == "PUT"]
    assert put[-1] == "streamconv.json"
    assert run(plan).status == "nothing-to-do"


def test_resume_goes_on_file_by_file(store, planned):
    plan, out = planned
    weights = sorted(n for n in files(out) if n.endswith(".safetensors"))
    assert len(weights) > 2
    store.fault = lambda r: 403 if r.method == "PUT" and weights[2] in r.key else None
    with pytest.raises(BadInputError, match="refuses access"):
        run(plan)
    assert set(weights[:2]) <= set(written(store))
    assert "models/m/streamconv.json" not in store.names("out")
    store.fault = lambda _: None
    before = len(store.requests)
    assert run(plan).reused_bytes == sum(len(files(out)[n]) for n in weights[:2])
    again = [r.key for r in store.requests[before:] if r.method == "PUT"]
    assert not any(k.endswith(tuple(weights[:2])) for k in again)
    assert_whole(store, out)


def test_a_finish_that_was_killed_while_it_tidied_up_is_done(store, planned):
    """The output is whole, and some notes of what was staged are gone."""
    plan, _ = planned
    streamconv.begin(plan, TARGET)
    streamconv.part(TARGET, "1/1")
    notes = store.names("out", "models/m/.streamconv/done/")

    def half_tidied(_: Request) -> int | None:
        left = store.names("out", "models/m/.streamconv/done/")
        return 403 if len(left) == len(notes) - 2 else None

    store.fault = half_tidied
    with pytest.raises(BadInputError, match="refuses access"):
        streamconv.finish(TARGET)
    store.fault = lambda _: None
    assert store.names("out", "models/m/.streamconv/journal")
    assert streamconv.part(TARGET, "1/1").status == "published"
    assert streamconv.finish(TARGET).status == "nothing-to-do"
    assert not store.names("out", "models/m/.streamconv/")


def test_who_goes_on_is_told_of_uploads_that_nobody_sees(store, planned, monkeypatch):
    monkeypatch.setattr(remote, "MIN_PART_BYTES", 1 << 10)
    plan, out = planned
    first = run_plan(plan, place("s3://out/models/a"), RunOptions(sync=False))
    assert not any("unfinished upload" in n for n in first.notices)
    last = max(n for n in files(out) if n.endswith(".safetensors"))
    store.fault = lambda r: 403 if r.method == "PUT" and last in r.key else None
    with pytest.raises(BadInputError, match="refuses access"):
        run(plan)
    store.fault = lambda _: None
    told = [n for n in run(plan).notices if "unfinished upload" in n]
    assert len(told) == 1
    assert "s3://out/models/m" in told[0]


def test_what_lies_in_the_way(store, planned):
    plan, _ = planned
    store.put("out", "models/m/notes.txt", b"mine")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError):
            run(plan, overwrite=overwrite)
    assert store.names("out") == ["models/m/notes.txt"]


def test_overwrite_replaces_another_jobs_output(store, planned, tmp_path):
    plan, out = planned
    other = tmp_path / "other.jsonl"
    streamconv.plan(plan.parent / "step", output=other, max_shard_size="45kB")
    run(other)
    with pytest.raises(OutputExistsError, match="another job"):
        run(plan)
    run(plan, overwrite=True)
    assert_whole(store, out)


def deletes(request: Request) -> bool:
    return request.method == "DELETE" or "delete" in request.query


@pytest.mark.parametrize("command", ["the same", "another job"])
def test_an_old_output_that_is_half_deleted(command, store, planned, tmp_path):
    """What is left of it is known: the same command goes on, and another one may replace it, too."""
    plan, out = planned
    other = tmp_path / "other.jsonl"
    streamconv.plan(plan.parent / "step", output=other, max_shard_size="45kB")
    run(other)
    seen: list[Request] = []

    def after_four(request: Request) -> int | None:
        seen.extend([request] if deletes(request) and ".streamconv" not in request.key else [])
        return 403 if len(seen) > 4 else None

    store.fault = after_four
    with pytest.raises(BadInputError, match="refuses access"):
        run(plan, overwrite=True)
    store.fault = lambda _: None
    assert any(n.endswith(".safetensors") for n in written(store))
    if command == "another job":
        third = tmp_path / "third.jsonl"
        streamconv.plan(plan.parent / "step", output=third, max_shard_size="30kB")
        run_plan(third, tmp_path / "third", RunOptions(sync=False))
        run(third, overwrite=True)
        assert_whole(store, tmp_path / "third")
    else:
        run(plan, overwrite=True)
        assert_whole(store, out)


@pytest.mark.parametrize("ignored", ["if-match", "if-none-match"])
def test_a_store_without_conditions_is_refused(ignored, store, planned):
    store.ignores = {ignored}
    with pytest.raises(UsageError, match="takes no notice of conditions"):
        run(planned[0])
    assert not store.names("out")


def test_two_runs(store, planned, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    with (
        lease.held(place(TARGET) / ".streamconv" / "lock"),
        pytest.raises(LockedError, match="another conversion"),
    ):
        run(planned[0])
    run(planned[0])


def test_a_lost_lease_is_taken_over_and_noticed(store, monkeypatch):
    """A holder that stops renewing, and is not known to be dead, is waited for and then replaced."""
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 60.0)
    lock = place(TARGET) / ".streamconv" / "lock"
    with lease.held(lock) as zombie:
        began = time.monotonic()
        with lease.held(lock) as heir:
            assert time.monotonic() - began > 1
            heir.check()
            with pytest.raises(LockedError, match="taken over"):
                zombie.check()
        assert lock.key not in store.names("out")


def test_an_upload_that_is_given_up_leaves_nothing(store):
    bucket = place("s3://out/x").bucket
    upload = bucket.upload("x/y", 5 << 20, 2)
    for k in range(12):
        upload.write(bytes([k]) * (1 << 20))
    upload.close()
    assert not store.names("out")
    assert not store.uploads
    upload = bucket.upload("x/y", 5 << 20, 2)
    for k in range(12):
        upload.write(bytes([k]) * (1 << 20))
    upload.finish()
    assert store.bytes_of("out", "x/y") == b"".join(bytes([k]) * (1 << 20) for k in range(12))


KILLED = (3, 10, 14, 17, 20, 25, 29, 31, 34)


def test_killed_at_requests(store, planned):
    """After kill -9 at any request: no whole output of other bytes, and the same command goes on."""
    plan, out = planned
    command = [sys.executable, "-m", "streamconv", "run", str(plan), TARGET, "--quiet", "--no-sync"]
    for number in KILLED:
        first = len(store.requests)
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

        def strike(request: Request, first: int = first, number: int = number, pid=process.pid):
            if request.number - first >= number:
                os.kill(pid, signal.SIGKILL)
                return 500
            return None

        store.fault = strike
        process.communicate(timeout=120)
        store.fault = lambda _: None
        if "models/m/streamconv.json" in store.names("out"):
            assert written(store) == files(out)
        again = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
        assert again.returncode == 0, (number, again.stderr)
        assert_whole(store, out)
        store.objects.clear()


@pytest.mark.parametrize("sides", ["from", "into", "both"])
def test_a_batch(sides, store, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    source = checkpoints["fsdp2"].source
    root, dst = str(tmp_path / "run"), str(tmp_path / "models")
    if sides == "into":
        for step in (10, 20):
            shutil.copytree(source, tmp_path / "run" / f"global_step_{step}" / "actor")
    else:
        root = put(store, source, "run/global_step_10/actor/").removesuffix("/global_step_10/actor")
        put(store, source, "run/global_step_20/actor/")
        store.put("bucket", "run/latest_checkpointed_iteration.txt", b"20")
    if sides != "from":
        dst = "s3://out/models"
    made = streamconv.convert_run(root, dst, settle="0s", verify=True)
    assert (made.exit_code, dict(made.counts)) == (0, {"converted": 2}), made.problems
    expected = files(streamconv.convert(source, tmp_path / "one", sync=False).output)
    for step in (10, 20):
        assert files(place(dst) / f"global_step_{step}" / "actor") == expected
    again = streamconv.convert_run(root, dst, settle="0s", verify=True)
    assert dict(again.counts) == {"done": 2}
    assert [(r.step, r.state) for r in streamconv.status(dst)] == [(10, "done"), (20, "done")]
    if sides != "from":  # somebody writes an output anew: it is no longer the one that was written
        name = next(n for n in store.names("out") if n.endswith(".safetensors"))
        store.objects.pop(("out", name))
        third = streamconv.convert_run(root, dst, settle="0s", verify=True, overwrite=True)
        assert dict(third.counts) == {"converted": 1, "done": 1}, third.problems
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(("s3:", "http:"))]


@pytest.mark.parametrize(
    ("option", "side"),
    [("pin", "root"), ("delete_sources", "root"), ("keep_last", "dst"), ("keep_every", "dst")],
)
def test_what_a_batch_cannot_do_in_a_store_is_refused(option, side, store, tmp_path):
    (tmp_path / "run").mkdir()
    root = "s3://bucket/run" if side == "root" else tmp_path / "run"
    dst = "s3://out/models" if side == "dst" else tmp_path / "models"
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} is for folders of a file"):
        streamconv.convert_run(root, dst, **{option: 1 if option.startswith("keep") else True})
    assert not store.requests
