"""The output folder appears whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

import streamconv
from scripts.makers.fsdp import Made
from scripts.makers.large import LargeMade
from scripts.outputs import (
    INDEX,
    MANIFEST,
    contents,
    differences,
    large_checkpoint,
    large_differences,
    read_model,
    read_truth,
)
from streamconv.conversion import execution, job
from streamconv.errors import (
    BadInputError,
    LockedError,
    NoSpaceError,
    OutputExistsError,
    SourceChangedError,
    UsageError,
)
from streamconv.executor.budget import smallest_run_bytes
from streamconv.options import Event, Phase, Progress, RunOptions
from streamconv.output.staging import locked

LARGE_BYTES = 80_000_000


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> LargeMade:
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    return large_checkpoint(base, LARGE_BYTES, 4)


def convert(src: Path, dst: Path, **options) -> streamconv.Result:
    return streamconv.convert(src, dst, **({"sync": False, "max_shard_size": "64KB"} | options))


def copied(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.source, tmp_path / "copy"))


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def assert_whole(out: Path, made: Made) -> None:
    assert differences(read_model(out), read_truth(made.truth_hf)) == []
    assert (out / MANIFEST).is_file()
    assert hidden(out.parent) == []
    assert hidden(out) == []


# --- a target that exists --------------------------------------------------------------------


@pytest.mark.usefixtures("planned_here")
def test_the_same_job_again_has_nothing_to_do(checkpoints, tmp_path, monkeypatch):
    source, out = checkpoints["fsdp2"].source, tmp_path / "out"
    first = convert(source, out)
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.iterdir()}

    def no_planning(*_: object, **__: object) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(job, "make_plan", no_planning)
    again = convert(source, out)
    assert (first.status, again.status) == ("done", "nothing-to-do")
    assert (again.files, again.tensors) == (first.files, first.tensors)
    assert again.write_bytes == first.write_bytes
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.iterdir()} == before
    assert hidden(tmp_path) == []


@pytest.mark.usefixtures("planned_here")
def test_another_jobs_output_is_refused_and_swapped_with_overwrite(checkpoints, tmp_path):
    made, out = checkpoints["fsdp2"], tmp_path / "out"
    convert(made.source, out, dtype="bfloat16")
    before = contents(out)
    with pytest.raises(OutputExistsError, match="another job's") as caught:
        convert(made.source, out)
    assert caught.value.exit_code == 8
    assert contents(out) == before
    assert hidden(tmp_path) == []

    assert convert(made.source, out, overwrite=True).status == "done"
    assert_whole(out, made)


@pytest.mark.usefixtures("planned_here")
def test_overwrite_keeps_the_old_output_until_the_new_one_is_whole(checkpoints, tmp_path):
    made, out = checkpoints["fsdp2"], tmp_path / "out"
    convert(made.source, out, dtype="bfloat16")
    before = contents(out)
    seen = []

    def look(event: Event) -> None:
        if isinstance(event, Phase):
            seen.append((event.name, contents(out) == before))

    convert(made.source, out, overwrite=True, on_event=look)
    assert seen == [("plan", True), ("write", True), ("publish", True)]
    assert_whole(out, made)


@pytest.mark.usefixtures("planned_here")
def test_an_output_that_lost_a_file_is_refused_and_repaired_with_overwrite(checkpoints, tmp_path):
    made, out = checkpoints["fsdp2"], tmp_path / "out"
    convert(made.source, out)
    next(out.glob("model-00002-*")).unlink()
    with pytest.raises(OutputExistsError, match="incomplete"):
        convert(made.source, out)
    convert(made.source, out, overwrite=True)
    assert_whole(out, made)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.usefixtures("planned_here")
def test_a_folder_that_holds_no_model_is_never_replaced(overwrite, checkpoints, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("three years")
    with pytest.raises(OutputExistsError):
        convert(checkpoints["fsdp2"].source, out, overwrite=overwrite)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(("size", "last"), [("64KB", INDEX), ("5GB", "model.safetensors")])
@pytest.mark.usefixtures("planned_here")
def test_an_empty_folder_is_filled_in_place(size, last, checkpoints, tmp_path, monkeypatch):
    """It may be a mount point. The file without which no loader starts comes last."""
    made, out = checkpoints["fsdp2"], tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    arrived = []
    replace = Path.replace

    def spy(self: Path, target: Path) -> Path:
        if Path(target).parent == out:
            arrived.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    convert(made.source, out, max_shard_size=size)
    assert out.stat().st_ino == inode
    assert arrived[-1] == last
    assert set(arrived) == {p.name for p in out.iterdir()}
    assert_whole(out, made)


@pytest.mark.usefixtures("planned_here")
def test_a_run_that_stopped_while_filling_a_folder_goes_on(checkpoints, tmp_path, monkeypatch):
    made, out = checkpoints["fsdp2"], tmp_path / "out"
    out.mkdir()
    replace, moved = Path.replace, []

    def stop_after_three(self: Path, target: Path) -> Path:
        if Path(target).parent == out:
            moved.append(target)
            if len(moved) > 3:
                raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            convert(made.source, out)
    assert not (out / INDEX).exists()
    convert(made.source, out)
    assert_whole(out, made)


# --- disk ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("planned_here")
def test_too_little_disk_is_refused_before_anything_is_written(checkpoints, tmp_path, monkeypatch):
    free = SimpleNamespace(total=1 << 40, used=0, free=300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    writes = []
    monkeypatch.setattr(execution, "write_output", lambda *a, **k: writes.append(a))
    with pytest.raises(NoSpaceError, match="not enough disk space") as caught:
        convert(checkpoints["fsdp2"].source, tmp_path / "out")
    assert caught.value.exit_code == 7
    assert "300 kB free" in caught.value.found
    assert "another disk" in caught.value.hint
    assert writes == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("planned_here")
def test_a_disk_that_fills_up_says_what_is_missing(checkpoints, tmp_path, monkeypatch):
    made, out = checkpoints["fsdp2"], tmp_path / "out"
    write, written = os.pwrite, []

    def full(fd: int, data: memoryview, at: int) -> int:
        written.append(len(data))
        if sum(written) > 200_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(NoSpaceError, match="the disk is full") as caught:
            convert(made.source, out)
    assert "for what is not yet written" in caught.value.expected
    assert caught.value.found.endswith(" free")
    assert not out.exists()
    assert convert(made.source, out).reused_bytes > 0
    assert_whole(out, made)


@pytest.mark.usefixtures("planned_here")
def test_what_a_stopped_run_left_counts_as_room(checkpoints, tmp_path, monkeypatch):
    """A half-written file is written anew in its own place: it must not be counted twice."""
    made, out = checkpoints["fsdp2"], tmp_path / "out"
    stop_after(1, monkeypatch, lambda: convert(made.source, out))
    half = tmp_path / ".out.streamconv" / f"model-00002-of-00007.safetensors.{'0' * 16}.part"
    half.write_bytes(bytes(100_000_000))

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(total=1 << 40, used=0, free=0 if half.exists() else 100_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    convert(made.source, out)
    assert_whole(out, made)


# --- stopped and resumed ---------------------------------------------------------------------


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    """Do ``run`` and raise after ``count`` output files."""
    write, done = execution.write_output, []

    def stopping(output, *args, **kwargs):
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(output.name)
        return write(output, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(execution, "write_output", stopping)
        with pytest.raises(KeyboardInterrupt):
            run()


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-tied", "fsdp2-moe", "fsdp1-sharded-tensor"])
@pytest.mark.usefixtures("planned_here")
def test_a_stopped_run_resumes_to_the_same_bytes(name, checkpoints, tmp_path, monkeypatch):
    made, out = checkpoints[name], tmp_path / "out"
    convert(made.source, tmp_path / "clean")
    for count in (1, 2):
        stop_after(count, monkeypatch, lambda: convert(made.source, out))
        assert not out.exists()
        assert hidden(tmp_path) == [".out.streamconv"]
        assert [*tmp_path.rglob("*.safetensors.part")] == []
    result = convert(made.source, out)
    staged = sum(p.stat().st_size for p in sorted(out.glob("*.safetensors"))[:3])
    assert result.reused_bytes == staged
    assert contents(out) == contents(tmp_path / "clean")
    assert hidden(tmp_path) == []


@pytest.mark.usefixtures("planned_here")
def test_a_staged_file_that_was_damaged_is_made_again(checkpoints, tmp_path, monkeypatch):
    made, out = checkpoints["fsdp2"], tmp_path / "out"
    stop_after(2, monkeypatch, lambda: convert(made.source, out))
    staged = sorted((tmp_path / ".out.streamconv" / "files").iterdir())
    flip(staged[0], staged[0].stat().st_size - 1)
    whole_bytes = staged[1].stat().st_size
    assert convert(made.source, out).reused_bytes == whole_bytes
    assert_whole(out, made)


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize("cut", [1, 20])
def test_a_note_that_was_cut_off_counts_for_nothing(cut, checkpoints, tmp_path, monkeypatch):
    made, out = checkpoints["fsdp2"], tmp_path / "out"
    stop_after(2, monkeypatch, lambda: convert(made.source, out))
    one, two = sorted((tmp_path / ".out.streamconv" / "done").iterdir())
    one.write_bytes(one.read_bytes()[:-cut])
    kept = (tmp_path / ".out.streamconv" / "files" / two.stem).stat().st_size
    assert convert(made.source, out).reused_bytes == kept
    assert_whole(out, made)


@pytest.mark.usefixtures("planned_here")
def test_damage_is_found_in_a_resumed_run_too(checkpoints, tmp_path, monkeypatch):
    """The record was half read before; the rest is checked against the same checksum."""
    made, out = checkpoints["fsdp2-moe"], tmp_path / "out"
    source = copied(made, tmp_path)
    options = {"max_shard_size": "8KB"}
    stop_after(6, monkeypatch, lambda: convert(source, out, **options))
    record = record_of(source / "model_world_size_4_rank_0.pt", largest=False)
    flip(source / "model_world_size_4_rank_0.pt", record[1] + record[2] - 1)
    with pytest.raises(BadInputError, match="damaged"):
        convert(source, out, **options)
    assert not out.exists()


@pytest.mark.usefixtures("planned_here")
def test_an_unfinished_run_of_another_job_is_refused(checkpoints, tmp_path, monkeypatch):
    made, out = checkpoints["fsdp2"], tmp_path / "out"
    stop_after(1, monkeypatch, lambda: convert(made.source, out, dtype="bfloat16"))
    with pytest.raises(OutputExistsError, match="unfinished run of another job"):
        convert(made.source, out)
    assert convert(made.source, out, overwrite=True).reused_bytes == 0
    assert_whole(out, made)


@pytest.mark.parametrize(
    "change", ["rewritten", "other side file", "gone, and another in its place"]
)
@pytest.mark.usefixtures("planned_here")
def test_an_unfinished_run_of_what_is_no_more_is_begun_afresh(
    change, checkpoints, tmp_path, monkeypatch
):
    """Not even its own command could finish it."""
    made, other, out = checkpoints["fsdp2"], checkpoints["fsdp2-tied"], tmp_path / "out"
    source = copied(made, tmp_path)
    stop_after(1, monkeypatch, lambda: convert(source, out))
    if change == "rewritten":
        shutil.rmtree(source)
        shutil.copytree(other.source, source)
    elif change == "other side file":
        (source / "huggingface" / "vocab.txt").write_text("new")
    else:
        shutil.rmtree(source)
        source = other.source
    assert convert(source, out).reused_bytes == 0
    assert_whole(out, made if change == "other side file" else other)


@pytest.mark.usefixtures("planned_here")
def test_a_checkpoint_that_was_moved_meanwhile_resumes(checkpoints, tmp_path, monkeypatch):
    """As do the hard links of a batch: each process has a folder of its own for them."""
    made, out = checkpoints["fsdp2"], tmp_path / "out"
    source = copied(made, tmp_path)
    stop_after(2, monkeypatch, lambda: convert(source, out))
    source = source.rename(tmp_path / "moved")
    assert convert(source, out).reused_bytes > 0
    assert_whole(out, made)
    assert json.loads((out / MANIFEST).read_text())["run"]["source"] == str(source)


def start(source: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "streamconv", "convert", source, out, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_process_leaves_no_output_and_resumes(large, tmp_path):
    out = tmp_path / "out"
    done = tmp_path / ".out.streamconv" / "done"
    process = start(large.source, out, "--max-shard-size", "4MB", "--no-sync")
    try:
        deadline = time.monotonic() + 120
        while len([*done.glob("*.json")]) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()

    result = streamconv.convert(large.source, out, sync=False, max_shard_size="4MB")
    assert 8_000_000 < result.reused_bytes < LARGE_BYTES
    assert large_differences(out, large) == []
    assert hidden(tmp_path) == []


@pytest.mark.slow
def test_a_terminated_process_says_so_and_resumes(large, tmp_path):
    out = tmp_path / "out"
    done = tmp_path / ".out.streamconv" / "done"
    process = start(large.source, out, "--max-shard-size", "4MB", "--no-sync")
    while process.poll() is None and len([*done.glob("*.json")]) < 2:
        time.sleep(0.005)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert not out.exists()
    result = streamconv.convert(large.source, out, sync=False, max_shard_size="4MB")
    assert result.reused_bytes > 0
    assert large_differences(out, large) == []


# --- two at once -----------------------------------------------------------------------------


@pytest.mark.slow
def test_of_two_runs_one_wins_and_the_other_exits_11(checkpoints, tmp_path):
    made, out = checkpoints["fsdp2"], tmp_path / "out"
    racers = [start(made.source, out, "--no-sync", "--json") for _ in range(2)]
    answers = [r.communicate(timeout=120) for r in racers]
    assert sorted(r.returncode for r in racers) == [0, 11], answers
    assert_whole(out, made)


@pytest.mark.usefixtures("planned_here")
def test_a_locked_output_is_left_alone(checkpoints, tmp_path):
    out = tmp_path / "out"
    with locked(out):
        with pytest.raises(LockedError, match="another process") as caught:
            convert(checkpoints["fsdp2"].source, out)
        assert caught.value.exit_code == 11
        assert not out.exists()
    convert(checkpoints["fsdp2"].source, out)
    assert_whole(out, checkpoints["fsdp2"])


# --- sources that change or are damaged ------------------------------------------------------


def record_of(path: Path, *, largest: bool = True) -> tuple[str, int, int]:
    """Return name, first byte and size of a storage in a rank file, as zipfile reads it."""
    with zipfile.ZipFile(path) as archive:
        storages = [i for i in archive.infolist() if "/data/" in i.filename and i.file_size]
        info = max(storages, key=lambda i: i.file_size) if largest else storages[-1]
    with path.open("rb") as stream:
        stream.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", stream.read(4))
    return info.filename, info.header_offset + 30 + name + extra, info.file_size


def flip(path: Path, offset: int, mask: int = 1) -> None:
    """Flip bits of one byte without touching the file's times."""
    stat = path.stat()
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ mask]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.usefixtures("planned_here")
def test_a_flipped_bit_is_named(where, checkpoints, tmp_path):
    source = copied(checkpoints["fsdp2"], tmp_path)
    file = source / "model_world_size_4_rank_2.pt"
    record, start_byte, nbytes = record_of(file)
    flip(file, start_byte if where == "first" else start_byte + nbytes - 1)
    with pytest.raises(BadInputError, match="damaged") as caught:
        convert(source, tmp_path / "out")
    error = caught.value
    assert error.exit_code == 5
    # The largest record is a piece of the embedding or of the head, which are equally large.
    assert str(file) in error.where
    assert "model.embed_tokens.weight" in error.where or "lm_head.weight" in error.where
    assert record in error.where
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("planned_here")
def test_a_flipped_bit_in_the_padding_is_found_too(checkpoints, tmp_path):
    """Rank 3 holds fewer rows than its storage has room for; no output wants the rest."""
    made = checkpoints["fsdp2"]
    assert made.oracle["model.embed_tokens.weight"]["padding_bytes"][3] > 0
    source = copied(made, tmp_path)
    file = source / "model_world_size_4_rank_3.pt"
    _, start_byte, nbytes = record_of(file)
    flip(file, start_byte + nbytes - 1)
    with pytest.raises(BadInputError, match="damaged"):
        convert(source, tmp_path / "out")


@pytest.mark.usefixtures("planned_here")
def test_no_source_crc_converts_damage_as_it_is(checkpoints, tmp_path):
    made = checkpoints["fsdp2"]
    source = copied(made, tmp_path)
    file = source / "model_world_size_4_rank_2.pt"
    _, start_byte, _ = record_of(file)
    flip(file, start_byte)
    convert(source, tmp_path / "out", source_crc=False)
    (wrong,) = differences(read_model(tmp_path / "out"), read_truth(made.truth_hf))
    assert wrong.endswith("other bytes")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4096)


def replace_tensor(file: Path) -> None:
    """Put other values and their right checksum into the file, as a trainer would that saves again."""
    with zipfile.ZipFile(file) as archive:
        info = max(archive.infolist(), key=lambda i: i.file_size)
        data = bytearray(archive.read(info))
    _, start_byte, _ = record_of(file)
    data[0] ^= 1
    old, new = struct.pack("<I", info.CRC), struct.pack("<I", zlib.crc32(data))
    raw = bytearray(file.read_bytes())
    raw[start_byte : start_byte + len(data)] = data
    file.write_bytes(bytes(raw).replace(old, new))
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("phase", ["write", "progress"])
@pytest.mark.parametrize("change", [cut, Path.unlink, replace_tensor])
@pytest.mark.usefixtures("planned_here")
def test_a_rank_file_that_changes_meanwhile_publishes_nothing(change, phase, checkpoints, tmp_path):
    """While it is read, or after the last byte was."""
    source = copied(checkpoints["fsdp2"], tmp_path)
    file = source / "model_world_size_4_rank_1.pt"

    def listen(event: Event) -> None:
        if isinstance(event, Progress):
            now = phase == "progress" and event.done_bytes == event.total_bytes
        else:
            now = event == Phase(phase)
        if now and not done:
            done.append(event)
            change(file)

    done: list[Event] = []
    with pytest.raises(BadInputError) as caught:
        convert(source, tmp_path / "out", on_event=listen)
    assert done, "the last progress event says that everything is done"
    if not (phase == "write" and change is replace_tensor):  # there the record itself is wrong
        assert isinstance(caught.value, SourceChangedError)
    assert caught.value.exit_code == 5
    assert file.name in caught.value.where
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("planned_here")
def test_a_file_without_checksums_may_not_even_be_touched(checkpoints, tmp_path):
    source = copied(checkpoints["fsdp2-no-crc"], tmp_path)
    file = source / "model_world_size_4_rank_1.pt"

    def listen(event: Event) -> None:
        if event == Phase("write"):
            os.utime(file, ns=(0, 0))

    with pytest.raises(SourceChangedError, match="not the one that was planned"):
        convert(source, tmp_path / "out", on_event=listen)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [Path.unlink, lambda p: p.write_text("{}")])
@pytest.mark.usefixtures("planned_here")
def test_a_side_file_that_changes_meanwhile_publishes_nothing(change, checkpoints, tmp_path):
    source = copied(checkpoints["fsdp2"], tmp_path)
    file = source / "huggingface" / "tokenizer.json"

    def listen(event: Event) -> None:
        if event == Phase("write"):
            change(file)

    with pytest.raises(SourceChangedError, match="a side file") as caught:
        convert(source, tmp_path / "out", on_event=listen)
    assert "tokenizer.json" in caught.value.where
    assert not (tmp_path / "out").exists()


# --- the same bytes whatever the machine -----------------------------------------------------


@pytest.mark.slow
def test_budget_and_threads_do_not_change_a_byte(large, tmp_path):
    plan_path = tmp_path / "plan.jsonl"
    plan = streamconv.plan(large.source, max_shard_size="30MB", output=plan_path)
    assert plan.head.totals.tensors == len(large.shapes)
    digests = []
    for k, (small, threads) in enumerate([(False, 1), (True, 1), (False, 4), (True, 3)]):
        out = tmp_path / f"out{k}"
        # Windows of a MiB or two, or of many; what this process holds besides changes by the run.
        budget = smallest_run_bytes() + 2_000_000 if small else None
        run = RunOptions(max_mem_bytes=budget, io_threads=threads, sync=False)
        job.run_plan(plan_path, out, run)
        files = contents(out)
        digests.append({name: hashlib.sha256(files[name]).digest() for name in files})
    assert large_differences(tmp_path / "out0", large) == []
    assert digests[1:] == digests[:1] * 3


@pytest.mark.parametrize("name", ["fsdp2-moe", "fsdp2-tp-2x3"])
@pytest.mark.usefixtures("planned_here")
def test_two_runs_give_the_same_folder(name, checkpoints, tmp_path):
    source = checkpoints[name].source
    convert(source, tmp_path / "one", io_threads=4)
    convert(source, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    manifest = json.loads((tmp_path / "one" / MANIFEST).read_text())
    assert manifest["run"]["source"] == str(source)


# --- what a folder must not cost -----------------------------------------------------------------


@pytest.mark.usefixtures("planned_here")
def test_overwrite_spares_a_project_that_has_a_config_but_no_weights(checkpoints, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text("{}")
    (project / "precious").write_text("x")
    with pytest.raises(OutputExistsError, match="did not write"):
        convert(checkpoints["fsdp2"].source, project, overwrite=True)
    assert (project / "precious").read_text() == "x"


@pytest.mark.parametrize("inside", ["huggingface", "huggingface/new", "."])
@pytest.mark.usefixtures("planned_here")
def test_the_output_never_overlaps_what_it_is_made_of(inside, checkpoints, tmp_path):
    def everything() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(source.rglob("*")) if p.is_file()}

    source = copied(checkpoints["fsdp2"], tmp_path)
    before = everything()
    with pytest.raises(UsageError):
        convert(source, source / inside, overwrite=True)
    assert everything() == before


def test_a_link_to_nowhere_is_refused_before_any_work(checkpoints, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match="leads nowhere"):
        convert(checkpoints["fsdp2"].source, tmp_path / "link")


@pytest.mark.usefixtures("planned_here")
def test_a_link_to_another_disk_stays_a_link(checkpoints, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "link").symlink_to(disk)
    convert(checkpoints["fsdp2"].source, tmp_path / "link")
    convert(checkpoints["fsdp2"].source, tmp_path / "link", dtype="bfloat16", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert json.loads((disk / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.usefixtures("planned_here")
def test_an_earlier_output_may_lend_its_side_files(checkpoints, tmp_path):
    made = checkpoints["fsdp2"]
    convert(made.source, tmp_path / "first")
    convert(made.source, tmp_path / "second", hf_config=tmp_path / "first")
    assert convert(made.source, tmp_path / "second", hf_config=tmp_path / "first").status == (
        "nothing-to-do"
    )
    plan = streamconv.plan(made.source, hf_config=tmp_path / "first")
    left_out = {s.name for s in plan.head.skipped}
    assert any(n.endswith(".safetensors") for n in left_out), "weights are left out aloud"


def test_a_fifo_among_the_rank_files_is_refused(checkpoints, tmp_path):
    source = copied(checkpoints["fsdp2"], tmp_path)
    victim = source / "model_world_size_4_rank_2.pt"
    victim.unlink()
    os.mkfifo(victim)
    with pytest.raises(BadInputError, match="not a regular file"):
        convert(source, tmp_path / "out")


@pytest.mark.usefixtures("planned_here")
def test_after_a_changed_source_the_same_command_starts_afresh(checkpoints, tmp_path, monkeypatch):
    source = copied(checkpoints["fsdp2"], tmp_path)
    tokenizer = source / "huggingface" / "tokenizer.json"

    def change(event: Event) -> None:
        if isinstance(event, Progress) and not tokenizer.read_text().endswith("\n\n"):
            tokenizer.write_text(tokenizer.read_text() + "\n\n")

    with pytest.raises(SourceChangedError):
        convert(source, tmp_path / "out", on_event=change)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text().endswith("\n\n")


# --- going on after a stop -----------------------------------------------------------------------


@pytest.mark.usefixtures("planned_here")
def test_a_folder_of_side_files_survives_a_stop_while_filling(checkpoints, tmp_path, monkeypatch):
    source, out = copied(checkpoints["fsdp2"], tmp_path), tmp_path / "out"
    templates = source / "huggingface" / "additional_chat_templates"
    templates.mkdir()
    for name in ("a.jinja", "b.jinja"):
        (templates / name).write_text(name)
    out.mkdir()
    replace = Path.replace

    def stop_at_the_second(self: Path, target: Path) -> Path:
        if self.name == "b.jinja":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out)
    assert (out / templates.name / "a.jinja").is_file()
    convert(source, out)
    assert {p.name: p.read_text() for p in (out / templates.name).iterdir()} == {
        "a.jinja": "a.jinja",
        "b.jinja": "b.jinja",
    }


@pytest.mark.usefixtures("planned_here")
def test_another_plan_of_the_same_job_does_not_take_over_finished_files(
    checkpoints, tmp_path, monkeypatch
):
    """Two releases may plan one job differently; here the second plan has one more notice."""
    source, out = checkpoints["fsdp2"].source, tmp_path / "out"
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    streamconv.plan(source, max_shard_size="64KB", output=one)
    with monkeypatch.context() as patch:
        told = streamconv.planning.build.corrected_config
        patch.setattr(
            streamconv.planning.build,
            "corrected_config",
            lambda *a, **k: (told(*a, **k)[0], ["another release says more"]),
        )
        streamconv.plan(source, max_shard_size="64KB", output=two)
    run = RunOptions(sync=False)
    stop_after(1, monkeypatch, lambda: job.run_plan(one, out, run))
    with pytest.raises(OutputExistsError, match="unfinished run"):
        job.run_plan(two, out, run)
    job.run_plan(two, out, RunOptions(sync=False, overwrite=True))
    assert_whole(out, checkpoints["fsdp2"])


@pytest.mark.usefixtures("planned_here")
def test_a_resumed_run_tells_what_it_did_not_do_itself(checkpoints, tmp_path, monkeypatch):
    source, out = checkpoints["fsdp2"].source, tmp_path / "out"
    stop_after(1, monkeypatch, lambda: convert(source, out))
    events: list[Event] = []
    result = convert(source, out, on_event=events.append)
    progress = [e for e in events if isinstance(e, Progress)]
    assert result.reused_bytes > 0
    assert {e.reused_bytes for e in progress} == {result.reused_bytes}


def test_side_files_beside_the_weights_may_be_there_but_not_elsewhere(tmp_path):
    """As with torch DCP, whose folder holds nothing but the weights."""
    from streamconv.errors import UnsafeInputError
    from streamconv.planning.sidefiles import list_side_files

    weights, beside = tmp_path / "step/pytorch_model_fsdp_0", tmp_path / "step/huggingface"
    weights.mkdir(parents=True)
    beside.mkdir()
    (beside / "config.json").write_text("{}")
    assert [f.name for f in list_side_files(beside, root=weights)] == ["config.json"]
    (tmp_path / "secret").write_text("x")
    (beside / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeInputError, match="leads out"):
        list(list_side_files(beside, root=weights))
    (beside / "vocab.txt").unlink()
    beside.rename(tmp_path / "moved")
    beside.symlink_to(tmp_path / "moved")
    with pytest.raises(UnsafeInputError, match="leads out"):
        list(list_side_files(beside, root=weights))


@pytest.mark.parametrize("name", ["fsdp2-qwen2_5_vl", "fsdp2-qwen3_vl"])
def test_a_processor_goes_with_the_model(name, checkpoints, tmp_path):
    """The files that a processor of a vision-language model is saved in, by any release."""
    src = Path(shutil.copytree(checkpoints[name].source, tmp_path / "actor"))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    written = {
        "preprocessor_config.json": '{"image_processor_type": "Qwen2VLImageProcessor"}',
        "video_preprocessor_config.json": '{"video_processor_type": "Qwen2VLVideoProcessor"}',
        "processor_config.json": '{"processor_class": "Qwen2_5_VLProcessor"}',
        "chat_template.json": json.dumps({"chat_template": template}),
        "chat_template.jinja": template,
        "additional_chat_templates/tool_use.jinja": template,
    }
    for file, text in written.items():
        path = src / "huggingface" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    convert(src, tmp_path / "out")
    for file, text in written.items():
        assert (tmp_path / "out" / file).read_text() == text, file
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert asked == "ab"
    assert streamconv.verify(tmp_path / "out").passed
