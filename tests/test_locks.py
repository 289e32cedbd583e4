"""The lock of an output: held as long as anything of the job lives, and no way to write elsewhere."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streamconv.errors import LockedError, OutputExistsError
from streamconv.files import lockfile
from streamconv.options import JobOptions
from streamconv.output.staging import locked
from streamconv.planning import child as planning


def lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.streamconv.lock")


def test_a_held_lock_names_the_process_and_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lockfile, "_ORPHAN_SECONDS", 1e9)
    with locked(tmp_path / "out"), pytest.raises(LockedError) as caught, locked(tmp_path / "out"):
        pass
    assert caught.value.exit_code == 11
    assert caught.value.found == f"process {os.getpid()}"
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_outlives_its_killed_parent_keeps_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lockfile, "_ORPHAN_SECONDS", 0.05)
    program = (
        "import os, subprocess, sys\n"
        "from pathlib import Path\n"
        "from streamconv.output.staging import locked\n"
        "with locked(Path(sys.argv[1])) as fd:\n"
        "    child = subprocess.Popen(['sleep', '100'], pass_fds=[fd], stdout=subprocess.DEVNULL)\n"
        "    print(child.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", program, out], stdout=subprocess.PIPE, check=False)
    orphan = int(done.stdout)
    try:
        with pytest.raises(LockedError) as caught, locked(out):
            pass
        assert f"process {orphan}, which a run that was killed had started" in caught.value.found
        os.kill(orphan, signal.SIGSTOP)
        with pytest.raises(LockedError), locked(out):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)
    monkeypatch.setattr(lockfile, "_ORPHAN_SECONDS", 60.0)  # it is waited for
    with locked(out):
        assert lock_of(out).exists()
    assert list(tmp_path.iterdir()) == []


def test_whoever_waits_for_a_lock_that_is_removed_takes_the_new_one(tmp_path, monkeypatch):
    out, flock = tmp_path / "out", fcntl.flock

    def removed_first(fd: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        lock_of(out).unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with locked(out), pytest.raises(LockedError), locked(out):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["link", "link to nowhere", "folder", "pipe"])
def test_what_is_no_lock_file_is_refused_and_stays(what, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("precious")
    path = lock_of(out)
    if what == "link":
        path.symlink_to(victim)
    elif what == "link to nowhere":
        path.symlink_to(tmp_path / "made")
    elif what == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputExistsError, match="where the lock") as caught, locked(out):
        pass
    assert caught.value.where == str(path)
    assert sorted(tmp_path.iterdir()) == before
    assert victim.read_text() == "precious"


def test_a_file_with_something_in_it_is_locked_and_left_alone(tmp_path):
    victim, path = tmp_path / "victim", lock_of(tmp_path / "out")
    victim.write_text("precious")
    os.link(victim, path)
    with locked(tmp_path / "out"):
        pass
    assert (victim.read_text(), path.read_text()) == ("precious", "precious")


def test_a_file_system_without_locks_is_locked_by_name(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(lockfile, "_ORPHAN_SECONDS", 0.05)
    out, other = tmp_path / "out", tmp_path / "other"
    with locked(out), locked(other), pytest.raises(LockedError), locked(out):
        pass
    with locked(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_planning_child_whose_parent_is_gone_does_nothing(tmp_path, lone_rank_file):
    """As after a kill -9 before the child could ask to end with its parent."""
    plan = tmp_path / "plan.jsonl"
    child = [
        sys.executable,
        "-P",
        "-m",
        "streamconv.planning.child",
        "1",
    ]  # not this process's number
    done = subprocess.run(child, input=b"{}", capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
    made = planning.make_plan(lone_rank_file.parent, JobOptions(layout="memory"), plan)
    assert made.head.totals.tensors == 1
    assert [p.name for p in tmp_path.iterdir()] == ["plan.jsonl"]


def test_a_signal_that_meets_a_destructor_still_ends_in_order():
    """Python prints and drops what is raised there; the end would then be a hard one, seconds later."""
    program = (
        "import os, signal, time\n"
        "from streamconv.system.signals import heeded\n"
        "class Lock:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0)\n"
        "with heeded(60.0):\n"
        "    try:\n"
        "        lock = Lock()\n"
        "        del lock\n"
        "        time.sleep(50)\n"
        "    finally:\n"
        "        print('in order')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=40, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "in order\n", "")


def test_a_signal_that_comes_again_while_the_lost_one_is_told_of_is_not_lost():
    """On a slow machine the second one comes before whoever tells of the first has returned."""
    code = (
        "import os, signal, time\n"
        "from streamconv.system import signals\n"
        "class Lost:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.001)\n"
        "real = signals._thread.start_new_thread\n"
        "def at_once(function, args):\n"
        "    signals._thread.start_new_thread = real\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(function, args)\n"
        "with signals.heeded():\n"
        "    signals._thread.start_new_thread = at_once\n"
        "    Lost()\n"
        "    time.sleep(20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (143, "")
