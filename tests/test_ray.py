"""One conversion on a Ray cluster: three nodes on this machine, kills of workers and of a node."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import streamconv
from scripts.outputs import MANIFEST, contents
from streamconv.batch.state import read_records
from streamconv.errors import BadInputError, BudgetError, StreamconvError, UsageError
from streamconv.nodes import ray_engine, tasks
from streamconv.options import Event, Phase, Progress

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    # Ray's own processes and sockets are still open when the interpreter ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SHARD = "40KB"
MEMORY = 300 * 10**6


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        head = {"num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            made.add_node(num_cpus=1, memory=3 * MEMORY, object_store_memory=80 << 20)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def whole(checkpoints, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    streamconv.convert(source(checkpoints), out, max_shard_size=SHARD, sync=False)
    return out


def source(checkpoints: dict[str, Any]) -> Path:
    path: Path = checkpoints["fsdp2"].source
    return path


def convert(src: Path, out: Path, on_event: Callable[[Event], None] = lambda _: None, **options):
    defaults = {"max_mem": 10**9, "max_shard_size": SHARD, "sync": False}
    return streamconv.convert(src, out, nodes="ray", on_event=on_event, **(defaults | options))


def test_a_cluster_makes_what_one_machine_makes(cluster, checkpoints, whole, tmp_path):
    events: list[Event] = []
    result = convert(source(checkpoints), tmp_path / "out", events.append, max_mem=800 * 10**6)
    assert result.status == "done"
    assert contents(tmp_path / "out") == contents(whole)
    assert [e.name for e in events if isinstance(e, Phase)] == ["plan", "write", "publish"]
    done = [e.done_bytes for e in events if isinstance(e, Progress)]
    assert done == sorted(done)
    assert done[-1] == sum(p.stat().st_size for p in whole.glob("*.safetensors"))
    again = convert(source(checkpoints), tmp_path / "out", max_mem=800 * 10**6)
    assert again.status == "nothing-to-do"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_files_that_all_machines_have_are_replicas(cluster, checkpoints, whole, tmp_path):
    """They are read from the machines' servers, whose token ends with the run."""
    src = source(checkpoints)
    result = convert(src, tmp_path / "out", max_mem=800 * 10**6, scattered=True)
    assert (result.status, result.read_bytes > 0) == ("done", True)
    files = {n: b for n, b in contents(tmp_path / "out").items() if n != MANIFEST}
    assert files == {n: b for n, b in contents(whole).items() if n != MANIFEST}
    with pytest.raises(UsageError, match="base model"):
        convert(src, tmp_path / "out", max_mem=800 * 10**6, scattered=True, base=src)
    with pytest.raises(BadInputError, match="no machine of the cluster"):
        convert(tmp_path / "no", tmp_path / "out", max_mem=800 * 10**6, scattered=True)


def test_bad_input_is_told_once_with_its_machine(cluster, checkpoints, tmp_path):
    with pytest.raises(StreamconvError) as caught:
        convert(tmp_path / "nothing", tmp_path / "out", max_mem=800 * 10**6)
    assert caught.value.exit_code in (2, 5)
    assert " on " in (caught.value.where or "")


def test_a_machine_without_the_memory_is_told_before(cluster, checkpoints, tmp_path):
    with pytest.raises(BudgetError, match="no machine of the Ray cluster"):
        convert(source(checkpoints), tmp_path / "out", max_mem="100GB")


def test_machines_must_be_alike(cluster, checkpoints, tmp_path, monkeypatch):
    real = tasks.describe()
    monkeypatch.setattr(ray_engine.tasks, "describe", lambda: {**real, "streamconv": "9.9"})
    with pytest.raises(BadInputError, match="another streamconv"):
        ray_engine._checked(_as_it_is(real), _request(source(checkpoints), tmp_path / "out"))


def test_a_machine_that_dies_while_it_is_asked_is_done_without(cluster, checkpoints, tmp_path):
    """Ray counts a machine as alive for a while after it has died."""
    dead = {**ray.nodes()[-1], "NodeID": "e" * 56, "Alive": True}
    looks = iter([[*ray.nodes(), dead]])

    class Late:
        def __getattr__(self, name: str) -> Any:
            return getattr(ray, name)

        def nodes(self) -> list[dict[str, Any]]:
            return next(looks, None) or ray.nodes()

    request = _request(source(checkpoints), tmp_path / "out")
    assert ray_engine._checked(Late(), request) is request


def _as_it_is(described: dict[str, Any]) -> Any:
    """Ray, whose machines say what they are and not what the patched function says."""

    class There:
        def __getattr__(self, name: str) -> Any:
            return getattr(ray, name)

        def remote(self, _: Any) -> Any:
            return ray.remote(lambda: described)

    return There()


def _request(src: Path, out: Path, budget: int = MEMORY) -> tasks.Request:
    job = streamconv.options.job_options(max_shard_size=SHARD)
    return tasks.Request(src, out, job, streamconv.RunOptions(max_mem_bytes=budget, sync=False))


def test_a_killed_worker_and_a_killed_node_cost_time(cluster, checkpoints, whole, tmp_path):
    """The parts that were begun there are begun again elsewhere."""
    doomed = cluster.add_node(num_cpus=2, memory=3 * MEMORY, object_store_memory=80 << 20)
    killed: list[str] = []

    def kill(event: Event) -> None:
        if isinstance(event, Progress) and not killed:
            killed.append("worker")
            for process in psutil.process_iter(["cmdline"]):
                if any("ray::_write" in part for part in process.info["cmdline"] or ()):
                    process.kill()
                    break
            threading.Thread(target=cluster.remove_node, args=(doomed, False)).start()

    out = tmp_path / "out"
    plan = tmp_path / "plan.jsonl"
    streamconv.plan(source(checkpoints), output=plan, max_shard_size=SHARD)
    convert(plan, out, kill, max_mem=MEMORY, max_shard_size="5GB")
    assert killed
    assert contents(out) == contents(whole)


def test_a_worker_that_was_given_up_comes_back_while_it_is_published(
    cluster, checkpoints, whole, tmp_path
):
    """It stops while it writes and its node dies; what others have written stays as it is."""
    doomed = cluster.add_node(num_cpus=2, memory=3 * MEMORY, object_store_memory=80 << 20)
    raylet = psutil.Process(doomed.all_processes["raylet"][0].process.pid)
    stopped: list[psutil.Process] = []
    is_over = threading.Event()

    def stop() -> None:
        while not stopped and not is_over.wait(0.002):
            for process in raylet.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "ray::_write" in " ".join(process.cmdline()):
                        process.suspend()
                        stopped.append(process)
        if stopped:
            cluster.remove_node(doomed, False)

    def wake(event: Event) -> None:
        if isinstance(event, Phase) and event.name == "publish":
            for process in stopped:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        convert(source(checkpoints), tmp_path / "out", wake, max_mem=MEMORY * 2)
    finally:
        is_over.set()
        thread.join()
    assert stopped
    psutil.wait_procs(stopped, timeout=20)
    assert contents(tmp_path / "out") == contents(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_batch_lets_the_cluster_convert_and_keeps_the_rest(cluster, scene, monkeypatch, tmp_path):
    """Records, hooks and errors are those of a batch on one machine."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.chdir(tmp_path)
    scene.step(1, 2)
    scene.step(3)
    rank = next((scene.run / "global_step_3").rglob("*.pt"))
    damaged = bytearray(rank.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    rank.unlink()  # a link to the others'
    rank.write_bytes(damaged)
    scene.tracker(3)
    heard = tmp_path / "heard"
    shared = {
        "nodes": "ray",
        "jobs": 2,
        "max-mem": "600MB",
        "on-done": f"echo $STREAMCONV_STEP >> {heard}",
    }
    made = scene.batch(fake=False, shared=shared).round()
    assert scene.states() == {1: "done", 2: "done", 3: "failed"}
    assert sorted(heard.read_text().split()) == ["1", "2"]
    assert made.counts["converted"] == 2
    failed = next(r for r in read_records(scene.out) if r.state == "failed")
    assert failed.attempts == 1
    streamconv.convert(scene.run / "global_step_1" / "actor", tmp_path / "alone", sync=False)
    output = next(r.output for r in read_records(scene.out) if r.step == 1)
    assert contents(Path(output)) == contents(tmp_path / "alone")


def test_a_batch_asks_the_machine_that_converts_and_no_other(cluster, monkeypatch):
    """However many machines there are, a conversion costs one look at a version."""

    def work(request: str) -> Iterator[str]:
        yield from (f"{request} {k}" for k in range(3))

    monkeypatch.setattr(ray_engine, "_share_a_key", None)
    assert [*ray_engine.lines("ray", MEMORY, work, "line")] == ["line 0", "line 1", "line 2"]
    described = tasks.describe()
    for what, error in (
        ("streamconv", BadInputError),
        ("Python", BadInputError),
        ("key", UsageError),
    ):
        monkeypatch.setattr(tasks, "describe", lambda what=what: {**described, what: "another"})
        with pytest.raises(error, match="a machine of the cluster has another") as caught:
            [*ray_engine.lines("ray", MEMORY, work, "line")]
        assert described["host"] in str(caught.value)


def test_below_what_a_worker_has_the_part_runs_as_a_child(checkpoints, whole, tmp_path):
    out = tmp_path / "out"
    request = _request(source(checkpoints), out, budget=8 * 10**9)
    begun = tasks.begin(request)
    assert "sizes" in begun, begun
    told: list[tuple[str, int]] = []
    small = _request(source(checkpoints), out, budget=80 * 10**6)
    for name in begun["sizes"]:
        made = tasks.write(small, name, lambda file, done: told.append((file, done)))
        assert made["status"] == "written", made
        assert made["peak_bytes"] < small.budget_bytes
    assert {name for name, _ in told} <= set(begun["sizes"])
    assert tasks.finish(request)["status"] == "done"
    assert contents(out) == contents(whole)
    lost = tasks.write(small, "nothing.safetensors", lambda *_: None)
    assert "error" not in lost or lost["error"]["exit_code"] == 2


def test_without_a_cluster_it_says_so(checkpoints, tmp_path, monkeypatch):
    def refused(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(UsageError, match="no Ray cluster answers") as caught:
        convert(source(checkpoints), tmp_path / "out")
    assert caught.value.found == "Could not find any running Ray instance."
    with pytest.raises(UsageError, match="takes ray"):
        tasks.cluster_address("slurm")
