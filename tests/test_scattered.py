"""A checkpoint whose rank files lie on the disks of several machines: addresses of this one."""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import streamconv
from scripts.outputs import MANIFEST, contents
from streamconv.errors import BadInputError, SourceChangedError, StreamconvError, UsageError
from streamconv.nodes import serving, tasks
from streamconv.storage import buckets, objects, scattered
from streamconv.storage.address import place
from tests.test_format_conformance import SAMPLES

pytest.importorskip("obstore")
PATH = "/runs/step/actor"


class Machines:
    """Folders as the disks of machines, which are called by their addresses."""

    def __init__(self, tmp: Path) -> None:
        self._tmp = tmp
        self._shelves: dict[str, serving.Shelf] = {}

    def folder(self, host: str, path: str = PATH) -> Path:
        made = self._tmp / host / path.lstrip("/")
        made.mkdir(parents=True, exist_ok=True)
        self._shelves.setdefault(host, serving.Shelf(str(self._tmp / host)))
        return made

    def scatter(self, source: Path, count: int, below: str = PATH) -> None:
        """Give each file to one of ``count`` machines."""
        for k, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
            to = self.folder(f"127.0.0.{k % count + 2}", below) / path.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, to)

    def serve(self, path: str = PATH) -> str:
        return serving.serve(path, {host: host for host in self._shelves}, self._ask)

    def keep(self, keys: list[str]) -> None:
        self._ask("keep", dict.fromkeys(self._shelves, (keys,)))

    def _ask(self, method: str, arguments: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        return {host: getattr(self._shelves[host], method)(*a) for host, a in arguments.items()}

    def close(self) -> None:
        for shelf in self._shelves.values():
            shelf.close()


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    monkeypatch.setattr(buckets, "_buckets", {})
    monkeypatch.setattr(objects, "_PAUSES_SECONDS", (0.01,) * 2)
    made = Machines(tmp_path / "machines")
    yield made
    made.close()


@pytest.fixture
def serve(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def run(path: str = PATH) -> str:
        monkeypatch.setenv(scattered.SERVERS, machines.serve(path))
        return scattered.address(path)

    return run


def made(folder: Path) -> dict[str, bytes]:
    """Return an output without what says where its source lay and when it was written."""
    found = contents(folder)
    manifest = json.loads(found.pop(MANIFEST))
    del manifest["plan_digest"], manifest["job"]
    return found | {MANIFEST: json.dumps(manifest).encode()}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_machines_together_are_the_checkpoint(
    name, shared_checkpoints, machines, serve, tmp_path, planned_here
):
    path, job = SAMPLES[name]
    job = {k: shared_checkpoints / v if k == "hf_config" else v for k, v in job.items()}
    job |= {"max_shard_size": "40kB", "sync": False}
    source = shared_checkpoints / path
    streamconv.convert(source, tmp_path / "whole", **job)
    # With what lies above, where the config may be.
    machines.scatter(source.parent, 3, below=f"/runs/{source.parent.name}")
    result = streamconv.convert(
        serve(f"/runs/{source.parent.name}/{source.name}"), tmp_path / "out", **job
    )
    assert made(tmp_path / "out") == made(tmp_path / "whole")
    assert result.read_bytes > 0


def test_another_run_has_other_servers_and_knows_the_checkpoint_again(
    checkpoints, machines, serve, tmp_path, planned_here
):
    source = checkpoints["fsdp2-no-crc"].source
    machines.scatter(source, 3)
    streamconv.convert(serve(), tmp_path / "out", sync=False)
    src = serve()
    assert streamconv.convert(src, tmp_path / "out").status == "nothing-to-do"
    assert streamconv.verify(tmp_path / "out", source=src).passed


def request(setting: str, path: str, **headers: str) -> tuple[int, bytes]:
    token, _, server = setting.rpartition("@")
    connection = http.client.HTTPConnection(server, timeout=10)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} | headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_nothing_else_is_served(machines):
    folder = machines.folder("127.0.0.2")
    (folder / "a.pt").write_bytes(b"0123456789")
    (folder.parent / "secret").write_bytes(b"secret")
    setting = machines.serve()
    assert request(setting, "/0") == (200, b"0123456789")
    assert request(setting, "/0", Range="bytes=2-4") == (206, b"234")
    assert request(setting, "/0", Range="bytes=8-99") == (206, b"89")
    assert request(setting, "/0", Range="bytes=10-12")[0] == 416
    assert request(setting, "/0", **{"If-Match": '"1-2"'})[0] == 412
    for path in (
        "/",
        "",
        "/1",
        "/-1",
        "/0/",
        "/%30",
        "/../secret",
        "/runs/step/secret",
    ):
        assert request(setting, path)[0] in (400, 404), path
    for token in ("", "Bearer", "Bearer x", setting.partition("@")[0], "Bearer \xe9"):
        for path in ("/0", "/catalogue", "/nothing"):
            assert request(setting, path, Authorization=token) == (401, b""), token
    catalogue = json.loads(request(setting, "/catalogue")[1])
    assert [*catalogue] == ["runs/step/actor/a.pt"]
    (folder / "later.pt").write_bytes(b"later")
    assert request(setting, "/1")[0] == 404
    (folder / "a.pt").unlink()
    (folder / "a.pt").symlink_to(folder.parent / "secret")
    assert request(setting, "/0") == (412, b"")


@pytest.mark.usefixtures("planned_here")
def test_once_it_is_planned_only_what_is_planned_is_served(
    checkpoints, machines, monkeypatch, tmp_path
):
    """What lies beside a checkpoint, optimizer states and all, is of nobody's concern then."""
    source = checkpoints["fsdp2"].source
    machines.scatter(source.parent, 3, below="/runs/step")
    (machines.folder("127.0.0.2") / "optim_world_size_2_rank_0.pt").write_bytes(b"private")
    setting = machines.serve()
    monkeypatch.setenv(scattered.SERVERS, setting)
    out = tmp_path / "out"
    job, run = streamconv.options.job_options(), streamconv.RunOptions(sync=False)
    asked = tasks.Request(place(scattered.address(PATH)), out, job, run, servers=setting)
    begun = tasks.begin(asked)
    catalogue = json.loads(request(setting, "/catalogue")[1])

    def served() -> set[str]:
        token = setting.partition("@")[0]
        return {
            key
            for key, file in catalogue.items()
            if request(f"{token}@{file['server']}", f"/{file['number']}")[0] == 200
        }

    planned = {place(path).key for path in begun["sources"]}
    assert served() == set(catalogue)
    assert planned < served()
    machines.keep(list(planned))
    assert served() == planned
    for name in begun["sizes"]:
        assert tasks.write(asked, name, lambda *_: None)["status"] == "written"
    assert tasks.finish(asked)["status"] == "done"
    streamconv.convert(source, tmp_path / "whole", sync=False)
    # Its manifest says that the other file was left out.
    ours, whole = contents(out), contents(tmp_path / "whole")
    assert ours | {MANIFEST: b""} == whole | {MANIFEST: b""}


def test_equal_files_are_replicas_and_different_ones_an_error(machines, serve):
    one, other = machines.folder("127.0.0.2"), machines.folder("127.0.0.3")
    for name in ("a.pt", "b.pt"):
        (one / name).write_bytes(b"equal")
        (other / name).write_bytes(b"equal")
    folder = place(serve())
    assert [p.read_bytes() for p in sorted(folder.iterdir())] == [b"equal"] * 2
    files = folder.bucket._files.values()
    assert len({f.server for f in files}) == 2, "both serve"
    for different in (b"other", b"x"):
        (other / "b.pt").write_bytes(different)
        folder = place(serve())
        assert (folder / "a.pt").read_bytes() == b"equal"
        with pytest.raises(BadInputError, match="two machines have different") as caught:
            (folder / "b.pt").read_bytes()
        assert caught.value.where == f"{PATH}/b.pt"
        assert caught.value.found is not None
        assert "127.0.0.2" in caught.value.found
        assert "127.0.0.3" in caught.value.found


def test_the_same_rank_of_two_runs_is_one_error(
    machines, serve, checkpoints, tmp_path, planned_here
):
    source = checkpoints["fsdp2"].source
    machines.scatter(source, 2)
    rank = next(p for p in machines.folder("127.0.0.2").rglob("model_world*"))
    data = bytearray(rank.read_bytes())
    data[len(data) // 2] ^= 1
    (machines.folder("127.0.0.3") / rank.name).write_bytes(data)
    with pytest.raises(BadInputError, match="two machines have different") as caught:
        streamconv.convert(serve(), tmp_path / "out")
    assert "127.0.0.2 and on 127.0.0.3" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_is_an_error_and_a_machine_that_goes_too(machines, serve, checkpoints):
    source = checkpoints["fsdp2"].source
    machines.scatter(source, 2)
    folder = place(serve())
    weights = next(p for p in sorted(folder.iterdir()) if p.name.startswith("model_world"))
    on_disk = next(
        p for host in ("127.0.0.2", "127.0.0.3") for p in machines.folder(host).glob(weights.name)
    )
    data = on_disk.read_bytes()
    assert weights.read_bytes() == data
    on_disk.write_bytes(data[:-1])
    with pytest.raises(SourceChangedError):
        weights.bucket.look(weights.key)
    with pytest.raises(SourceChangedError):
        weights.bucket.get(weights.key, 0, 10, weights.version)
    machines.close()
    with pytest.raises(StreamconvError, match="does not answer") as caught:
        weights.bucket.look(weights.key)
    assert "127.0.0." in str(caught.value), "the machine is named"


def test_outside_of_a_run_it_says_so(monkeypatch):
    monkeypatch.delenv(scattered.SERVERS, raising=False)
    with pytest.raises(UsageError, match="--scattered"):
        streamconv.inspect(scattered.address(PATH))
    with pytest.raises(UsageError, match="for a cluster"):
        streamconv.convert("x", "y", scattered=True)


def test_no_machine_has_it(machines):
    machines.folder("127.0.0.2")
    with pytest.raises(BadInputError, match="no machine of the cluster"):
        machines.serve("/elsewhere")


def test_links_are_followed_but_not_in_a_circle(machines, serve):
    folder = machines.folder("127.0.0.2")
    (folder / "a.pt").write_bytes(b"a")
    (folder / "circle").symlink_to(folder)
    (folder / "gone").symlink_to(folder / "nothing")
    (folder.parent / "config").mkdir()
    (folder.parent / "config" / "config.json").write_bytes(b"{}")
    (folder / "huggingface").symlink_to(folder.parent / "config")
    top = place(serve())
    assert sorted(str(p.relative_to(top)) for p in top.rglob("*")) == [
        "a.pt",
        "huggingface",
        "huggingface/config.json",
    ]


def test_the_run_leaves_no_secret_in_the_process(checkpoints, tmp_path, monkeypatch):
    monkeypatch.delenv("STREAMCONV_KEY", raising=False)
    monkeypatch.setenv(scattered.SERVERS, "mine")
    job = streamconv.options.job_options()
    asked = tasks.Request(tmp_path / "no", tmp_path / "out", job, streamconv.RunOptions())
    asked = tasks.replace(asked.with_key(b"k" * 32), servers="t@h:1")
    assert "t@h:1" not in repr(asked)
    assert "error" in tasks.begin(asked)
    import os

    assert "STREAMCONV_KEY" not in os.environ
    assert os.environ[scattered.SERVERS] == "mine"
