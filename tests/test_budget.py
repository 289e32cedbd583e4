"""The memory budget: where it comes from, when it is refused, and that it holds, seen from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

import streamconv
from scripts.makers.fsdp import Made
from scripts.makers.large import LargeMade, make_large
from scripts.makers.zips import E, Zip
from scripts.measured import run
from scripts.outputs import (
    differences,
    large_checkpoint,
    large_differences,
    read_model,
    read_truth,
)
from streamconv.errors import BadInputError, BudgetError, UnsafeInputError
from streamconv.executor import budget
from streamconv.planning import child
from streamconv.system import children, memory

GB = 10**9

# --- where the default comes from ------------------------------------------------------------


@pytest.fixture(autouse=True)
def a_machine_with_64_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    state = memory.MemoryState(available_bytes=64 * GB, swap_bytes=0, swap_used_bytes=0)
    monkeypatch.setattr(memory, "memory_state", lambda: state)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_limits_it_is_available_memory_less_15_percent(tmp_path: Path) -> None:
    assert memory.available_bytes(tmp_path, "0::/\n") == (int(64 * GB * 0.85), "available memory")


def test_meminfo_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    nbytes, source = memory.available_bytes(Path("/nonexistent"), "0::/\n")
    assert source == "available memory"
    assert 0.5 < nbytes / psutil.virtual_memory().available < 1


@pytest.mark.parametrize(
    "limited",
    ["user/job/memory.max", "user/memory.max", "memory.max"],
    ids=["own", "above", "root"],
)
def test_cgroup_v2(limited: str, tmp_path: Path) -> None:
    """The tightest limit counts, whether it is the process's own cgroup's or an ancestor's."""
    for folder in ("user/job", "user", "."):
        write(tmp_path / folder / "memory.max", "max\n")
    write(tmp_path / limited, f"{8 * GB}\n")
    found = memory.available_bytes(tmp_path, "0::/user/job\n")
    assert found == (int(8 * GB * 0.85), "cgroup v2 limit")


def test_cgroup_v2_subtracts_what_is_used_but_not_the_page_cache(tmp_path: Path) -> None:
    write(tmp_path / "job/memory.max", f"{8 * GB}\n")
    write(tmp_path / "job/memory.stat", f"anon {3 * GB}\nfile {4 * GB}\nanon_thp 7\n")
    assert memory.available_bytes(tmp_path, "0::/job\n")[0] == int(5 * GB * 0.85)


def test_cgroup_v1(tmp_path: Path) -> None:
    controller = tmp_path / "memory"
    write(controller / "memory.limit_in_bytes", "9223372036854771712\n")  # its way to say unlimited
    write(controller / "docker/abc/memory.limit_in_bytes", f"{4 * GB}\n")
    write(controller / "docker/abc/memory.stat", f"cache {2 * GB}\ntotal_rss {GB}\n")
    own = "12:cpu,cpuacct:/docker/abc\n5:memory:/docker/abc\n1:name=systemd:/docker/abc\n"
    found = memory.available_bytes(tmp_path, own)
    assert found == (int(3 * GB * 0.85), "cgroup v1 limit")


def test_cgroup_v1_without_a_limit(tmp_path: Path) -> None:
    write(tmp_path / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert memory.available_bytes(tmp_path, "5:memory:/\n")[1] == "available memory"


def test_inside_a_container_the_limit_is_at_the_root(tmp_path: Path) -> None:
    """The path is the host's and does not exist here."""
    write(tmp_path / "memory.max", f"{2 * GB}\n")
    found = memory.available_bytes(tmp_path, "0::/kubepods/pod1/abc\n")
    assert found == (int(2 * GB * 0.85), "cgroup v2 limit")
    write(tmp_path / "v1/memory/memory.limit_in_bytes", f"{GB}\n")
    found = memory.available_bytes(tmp_path / "v1", "5:memory:/docker/abc\n")
    assert found == (int(GB * 0.85), "cgroup v1 limit")


def test_a_cgroup_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "job/memory.max", f"{GB}\n")
    write(tmp_path / "job/memory.stat", f"anon {2 * GB}\n")
    assert memory.available_bytes(tmp_path, "0::/job\n") == (0, "cgroup v2 limit")


def test_a_cgroup_path_cannot_leave_the_tree(tmp_path: Path) -> None:
    write(tmp_path / "memory.max", "1\n")
    found = memory.available_bytes(tmp_path / "root", "0::/../../x\n")
    assert found[1] == "available memory"


# --- too small -------------------------------------------------------------------------------


def test_a_process_that_ends_while_it_is_looked_at_counts_for_what_was_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(path: Path) -> None:
        raise ProcessLookupError(str(path))

    monkeypatch.setattr(Path, "iterdir", gone)
    assert memory.tree_bytes() > 0


def test_no_window_fits() -> None:
    resident = memory.resident_bytes()
    with pytest.raises(BudgetError, match="too small to move tensors"):
        budget.window_bytes(resident + (1 << 20))
    smallest = budget.smallest_run_bytes()
    assert budget.window_bytes(smallest + (1 << 20)) >= 1 << 20
    assert budget.window_bytes(1 << 40) == 256 << 20


def named_smallest(error: str) -> str:
    found = re.search(r"--max-mem (\d+MB)", error)
    assert found, error
    return found[1]


def test_a_budget_too_small_to_plan_names_one_that_works(
    checkpoints: dict[str, Made], tmp_path: Path
) -> None:
    made = checkpoints["fsdp2-moe"]
    refused = run(made.source, tmp_path / "out", "--max-mem", "100MB")
    assert refused.code == 4
    assert "too small to plan" in refused.err
    assert list(tmp_path.iterdir()) == []

    smallest = named_smallest(refused.err)
    done = run(made.source, tmp_path / "out", "--max-mem", smallest)
    assert done.code == 0, done.err
    assert differences(read_model(tmp_path / "out"), read_truth(made.truth_hf)) == []
    assert done.peak_bytes <= int(smallest.removesuffix("MB")) * 10**6


def test_a_budget_too_small_to_run_names_one_that_works(
    checkpoints: dict[str, Made], tmp_path: Path
) -> None:
    made, plan = checkpoints["fsdp2-moe"], tmp_path / "plan.jsonl"
    planned = run("plan", made.source, "-o", plan, "--json")
    assert planned.code == 0
    refused = run("run", plan, tmp_path / "out", "--max-mem", "20MB")
    assert refused.code == 4
    assert "too small to move tensors" in refused.err
    assert list(tmp_path.iterdir()) == [plan], "nothing is staged that another job would meet"
    told = json.loads(planned.out)["memory"]["smallest_run_bytes"]
    assert abs(told - int(named_smallest(refused.err).removesuffix("MB")) * 10**6) <= 4_000_000
    assert not (tmp_path / "out").exists()

    smallest = named_smallest(refused.err)
    done = run("run", plan, tmp_path / "out", "--max-mem", smallest)
    assert done.code == 0, done.err
    assert differences(read_model(tmp_path / "out"), read_truth(made.truth_hf)) == []
    assert done.peak_bytes <= int(smallest.removesuffix("MB")) * 10**6


def test_many_tiny_tensors_and_many_readers_are_within_the_budget(tmp_path: Path) -> None:
    """What is known of a tensor may take more than its bytes, and a reader more than its buffer."""
    actor, plan = tmp_path / "actor", tmp_path / "plan.jsonl"
    actor.mkdir()
    state = {
        f"layers.{k // 192}.experts.{k // 3 % 64}.part_{k % 3}": torch.full((4,), float(k))
        for k in range(16_000)
    }
    torch.save(state, actor / "model_world_size_1_rank_0.pt")
    planned = run("plan", actor, "-o", plan, "--json")
    assert planned.code == 0, planned.err
    run_it = ("run", plan, tmp_path / "out", "--no-sync", "--io-threads", "300")
    refused = run(*run_it, "--max-mem", "20MB")
    assert refused.code == 4
    smallest = named_smallest(refused.err)
    done = run(*run_it, "--max-mem", smallest)
    assert done.code == 0, done.err
    assert done.peak_bytes <= int(smallest.removesuffix("MB")) * 10**6
    assert read_model(tmp_path / "out").keys() == state.keys()


def test_a_limit_of_open_files_is_kept(tmp_path: Path) -> None:
    actor, plan = make_large(tmp_path, 2_000_000, world=48).source, tmp_path / "plan.jsonl"
    few = ["sh", "-c", f'ulimit -n 32; exec "{sys.executable}" -m streamconv "$@"', "sh"]
    for command in (("plan", actor, "-o", plan), ("run", plan, tmp_path / "out")):
        done = subprocess.run(
            [*few, *map(str, command), "-q"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


# --- metadata that says more than it weighs -----------------------------------------------------


@pytest.fixture
def in_100_mb(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that a test can afford to exceed; this process, which has torch, counts for nothing."""
    monkeypatch.setattr(children, "resident_bytes", lambda: 0)
    monkeypatch.setattr(child, "available_bytes", lambda: (100 * 10**6, "the test"))


def test_a_pickle_that_needs_more_than_the_budget_is_named(in_100_mb: None, tmp_path: Path) -> None:
    path = tmp_path / "model_world_size_1_rank_0.pt"
    torch.save({"a.weight": torch.ones(2), "more": [{} for _ in range(10**6)]}, path)
    with pytest.raises(BudgetError, match=r"rank_0\.pt says") as caught:
        child.inspect_checkpoint(tmp_path)
    assert caught.value.where == str(path)
    assert "--max-mem" in str(caught.value.hint)


def test_what_no_budget_is_worth_is_unsafe(in_100_mb: None, tmp_path: Path) -> None:
    """A memo index of two billion: the pickle is tiny, and its table is not."""
    hostile = b"\x80\x02}r" + (2**31 - 1).to_bytes(4, "little") + b"."
    raw = Zip([E("data.pkl", hostile), E("version", b"3\n")]).bytes()
    (tmp_path / "model_world_size_1_rank_0.pt").write_bytes(raw)
    with pytest.raises(UnsafeInputError, match="too much memory"):
        child.inspect_checkpoint(tmp_path)


def test_a_config_that_nobody_writes_is_not_parsed(tmp_path: Path) -> None:
    side = tmp_path / "huggingface"
    side.mkdir()
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "model_world_size_1_rank_0.pt")
    (side / "config.json").write_text('{"x": [' + "1," * 2_200_000 + "1]}")
    with pytest.raises(UnsafeInputError, match=r"config\.json is too large"):
        streamconv.plan(tmp_path)


def test_a_lack_of_memory_is_not_taken_for_another_error() -> None:
    """Libraries turn it into errors of their own, and what is refused for another reason is not one."""
    for inside in (MemoryError(), RuntimeError("not enough memory: you tried to allocate")):
        wrapped = BadInputError("cannot build")
        wrapped.__cause__ = inside
        assert isinstance(children._ran_out(wrapped), MemoryError)
    refused = UnsafeInputError("too much")
    refused.__context__, refused.__suppress_context__ = MemoryError(), True  # raised from None
    assert children._ran_out(refused) is None


# --- kept ------------------------------------------------------------------------------------

LARGE_BYTES = 1_200_000_000


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> LargeMade:
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    made = large_checkpoint(base, LARGE_BYTES, 8)
    files = list(made.source.glob("*.pt"))
    assert len(files) == 8
    assert sum(f.stat().st_size for f in files) > 0.9 * LARGE_BYTES
    return made


@pytest.mark.slow
@pytest.mark.memory
@pytest.mark.parametrize("options", [[], ["--io-threads", "4", "--dtype", "bfloat16"]])
def test_a_model_nine_times_the_budget(
    options: list[str], large: LargeMade, tmp_path: Path
) -> None:
    limit = 128 * 10**6
    child = [o for o in options if o in ("--dtype", "bfloat16")]
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    planned = run("plan", large.source, "-o", plan, *child)
    assert planned.code == 0, planned.err

    running = [o for o in options if o not in child]
    done = run("run", plan, out, "--max-mem", "128MB", "--no-sync", "--json", *running)
    assert done.code == 0, done.err
    assert done.peak_bytes <= limit
    # What streamconv says of itself is what was seen.
    told = json.loads((out / "streamconv.json").read_text())["run"]
    assert told["budget_bytes"] == limit
    assert abs(told["peak_bytes"] - done.peak_bytes) < 0.15 * done.peak_bytes
    if not child:
        assert large_differences(out, large) == []


@pytest.mark.slow
@pytest.mark.memory
def test_the_whole_conversion_in_512_mb(large: LargeMade, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(large.source, out, "--max-mem", "512MB", "--max-shard-size", "500MB", "--no-sync")
    assert done.code == 0, done.err
    assert done.peak_bytes <= 512 * 10**6
    assert len(list(out.glob("*.safetensors"))) == 3
    assert large_differences(out, large) == []
