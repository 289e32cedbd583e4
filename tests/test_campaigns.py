"""A sample of every reliability campaign of ``scripts/campaigns``, through the same code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.campaigns import strace

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all samples share, so that their checkpoints are made and planned once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "campaigns"


@pytest.fixture(scope="session")
def tampering() -> None:
    reason = strace.why_not()
    if reason is not None:
        pytest.skip(reason)


def sample(name: str, count: int, work: Path, *, seed: int = 1) -> str:
    """Run a campaign; return its line of figures."""
    done = subprocess.run(
        [sys.executable, "-m", f"scripts.campaigns.{name}",
         "--count", str(count), "--seed", str(seed), "--work", str(work)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{name}: ")
    assert " 0 breaches" in line
    return line


@pytest.mark.slow
@pytest.mark.usefixtures("tampering")
def test_killed_anywhere(work: Path) -> None:
    # Six calls are struck by name; the two random moments may come after the end on a busy machine.
    killed = re.search(r" (\d+) killed", sample("kill_points", 2, work))
    assert killed is not None
    assert int(killed[1]) >= 6


@pytest.mark.slow
def test_a_store_that_fails_and_forgets(work: Path) -> None:
    pytest.importorskip("obstore")
    line = sample("stores", 1, work)
    assert "3 kills after" in line
    assert "1 zombies" in line


@pytest.mark.slow
@pytest.mark.usefixtures("tampering")
def test_parts_that_come_back(work: Path) -> None:
    line = sample("late_parts", 1, work)
    assert "1 parts stopped, 1 finishes stopped" in line


@pytest.mark.slow
@pytest.mark.usefixtures("tampering")
def test_a_disk_that_fails(work: Path) -> None:
    line = sample("faults", 6, work)
    assert "6 failing calls of run" in line
    assert "2 runs with every read and write short" in line


@pytest.mark.slow
def test_a_cache_that_many_use_while_all_it_depends_on_changes(work: Path) -> None:
    line = sample("cache", 2, work)
    assert "plans asked" in line
    assert "plans hit" in line


@pytest.mark.slow
def test_damaged_files(work: Path) -> None:
    assert "300 mutants" in sample("mutants", 300, work)


@pytest.mark.slow
def test_malicious_pickles(work: Path) -> None:
    assert " malicious pickles, " in sample("pickles", 60, work)


@pytest.mark.slow
def test_two_runs_at_once(work: Path) -> None:
    assert "3 races" in sample("races", 3, work)


@pytest.mark.slow
def test_processes_that_outlive_another(work: Path) -> None:
    assert "8 orphans" in sample("orphans", 8, work)


@pytest.mark.slow
def test_what_a_stranger_planted(work: Path) -> None:
    assert " forms, " in sample("planted", 1, work)


@pytest.mark.slow
def test_signals(work: Path) -> None:
    assert "1 stuck disks" in sample("stops", 2, work)


def test_a_source_that_changes(work: Path) -> None:
    assert "60 changes" in sample("changes", 60, work)


def test_zips_and_safetensors_that_lie(work: Path) -> None:
    assert " rules, " in sample("tricks", 0, work)


@pytest.mark.slow
def test_a_file_has_one_reading(work: Path) -> None:
    line = sample("two_readings", 400, work)
    assert " 400 mutants" in line
    assert " read alike" in line


@pytest.mark.slow
def test_the_same_bytes_whatever_the_knobs(work: Path) -> None:
    # Casts, averages, decodes.
    assert "3 output," in sample("determinism", 6, work)


@pytest.mark.slow
def test_batches_beside_training(work: Path) -> None:
    line = sample("operation", 40, work)
    assert " 40 rounds" in line
    assert " outputs made" in line


def test_files_of_others(work: Path) -> None:
    assert "24 commands" in sample("bystanders", 24, work)


def test_a_file_system_that_ignores_case(work: Path) -> None:
    assert "200 sets of names pretended" in sample("case_folding", 1, work)


@pytest.mark.slow
@pytest.mark.compat
def test_configs_there_and_back(work: Path) -> None:
    assert "configs that version 4 reads alike" in sample("version_4", 2, work)
