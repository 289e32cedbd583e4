"""One conversion in parts: in any order, at once, killed, again, and the bytes of a single run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import streamconv
from scripts.makers.fsdp import RECIPES
from scripts.outputs import MANIFEST, contents
from streamconv.conversion import execution
from streamconv.conversion.parts import Share
from streamconv.errors import (
    BadInputError,
    LockedError,
    OutputExistsError,
    SourceChangedError,
    UnfinishedError,
    UsageError,
)
from streamconv.executor.reader import SourceReader
from streamconv.executor.records import SharedRecords
from streamconv.ir.finished import SharedRecord
from streamconv.ir.planned import OutputFile
from streamconv.ir.source import Record
from streamconv.torchfile.crc import Coverage, crc32
from tests.test_format_conformance import SAMPLES
from tests.test_output_folder import stop_after

SHARD = "40KB"


def plan_of(src: Path, folder: Path, **job) -> Path:
    path = folder / "plan.jsonl"
    streamconv.plan(src, output=path, max_shard_size=SHARD, **job)
    return path


def begin(plan: Path, out: Path, **run):
    return streamconv.begin(plan, out, sync=False, **run)


def in_parts(plan: Path, out: Path, count: int, seed: int = 0) -> None:
    begin(plan, out)
    order = [*range(1, count + 1)]
    random.Random(seed).shuffle(order)
    for k in order:
        streamconv.part(out, f"{k}/{count}")
    streamconv.finish(out)


@pytest.fixture(scope="module", autouse=True)
def planning_here() -> Iterator[None]:
    from tests.conftest import plan_here

    with pytest.MonkeyPatch.context() as patch:
        plan_here(patch)
        yield


@pytest.fixture(scope="module")
def planned(checkpoints, tmp_path_factory) -> tuple[Path, Path]:
    """A plan of several files, and the output of a single run."""
    folder = tmp_path_factory.mktemp("planned")
    plan = plan_of(checkpoints["fsdp2"].source, folder)
    run(plan, folder / "whole")
    return plan, folder / "whole"


def run(plan: Path, out: Path) -> None:
    from streamconv.conversion.job import run_plan

    run_plan(plan, out, streamconv.RunOptions(sync=False))


# --- the same bytes ----------------------------------------------------------------------------


WHOLE = [n for n, r in RECIPES.items() if r.buffers != "complex128" and not r.lora]


@pytest.mark.parametrize("name", WHOLE)
def test_parts_make_what_one_run_makes(name, checkpoints, tmp_path):
    plan = plan_of(checkpoints[name].source, tmp_path)
    run(plan, tmp_path / "whole")
    count = (1, 2, 3, 7)[WHOLE.index(name) % 4]
    in_parts(plan, tmp_path / "out", count, seed=count)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("name", SAMPLES)
def test_parts_of_every_format(name, shared_checkpoints, tmp_path):
    path, job = SAMPLES[name]
    job = {k: shared_checkpoints / v if k == "hf_config" else v for k, v in job.items()}
    plan = plan_of(shared_checkpoints / path, tmp_path, **job)
    run(plan, tmp_path / "whole")
    in_parts(plan, tmp_path / "out", 3)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_any_number_of_parts(count, planned, tmp_path):
    plan, whole = planned
    in_parts(plan, tmp_path / "out", count)
    assert contents(tmp_path / "out") == contents(whole)


def test_what_a_part_wrote_is_neither_written_nor_read_again(planned, tmp_path, monkeypatch):
    plan, whole = planned
    out = tmp_path / "out"
    begin(plan, out)
    names = begin(plan, out).files
    first = streamconv.part(out, files=names[:2])
    assert first.files == tuple(names[:2])
    assert streamconv.part(out, files=names[:2]).status == "nothing-to-do"
    assert begin(plan, out).finished == tuple(names[:2])
    streamconv.part(out, "1/1")
    reads: list[tuple[int, int]] = []
    read = SourceReader.read
    monkeypatch.setattr(
        SourceReader,
        "read",
        lambda self, file, at, *b: (reads.append((file, at)), read(self, file, at, *b))[1],
    )
    monkeypatch.setattr("streamconv.output.journal.hash_stream", None)
    result = streamconv.finish(out)
    assert reads == []
    assert result.read_bytes > first.read_bytes > 0
    assert contents(out) == contents(whole)


def test_parts_go_on_with_a_single_run(planned, tmp_path, monkeypatch):
    plan, whole = planned
    out = tmp_path / "out"
    stop_after(2, monkeypatch, lambda: run(plan, out))
    assert len(begin(plan, out).finished) == 2
    streamconv.part(out, "1/1")
    streamconv.finish(out)
    assert contents(out) == contents(whole)


def test_a_single_run_goes_on_with_parts(planned, tmp_path):
    plan, whole = planned
    out = tmp_path / "out"
    begin(plan, out)
    streamconv.part(out, "1/2")
    run(plan, out)
    assert contents(out) == contents(whole)


def test_a_checkpoint_is_begun_without_a_plan(checkpoints, planned, tmp_path):
    out = tmp_path / "out"
    begun = streamconv.begin(checkpoints["fsdp2"].source, out, max_shard_size=SHARD)
    assert begun.status == "begun"
    streamconv.part(out, "1/1")
    streamconv.finish(out)
    assert contents(out) == contents(planned[1])
    again = streamconv.begin(checkpoints["fsdp2"].source, out, max_shard_size=SHARD)
    assert again.status == "nothing-to-do"
    with pytest.raises(UsageError, match="the plan has them"):
        streamconv.begin(planned[0], out, dtype="bfloat16")


# --- what is missing, and what is wrong --------------------------------------------------------


def test_finish_names_what_is_missing_and_does_nothing(planned, tmp_path):
    plan, whole = planned
    out = tmp_path / "out"
    names = begin(plan, out).files
    streamconv.part(out, files=names[1:])
    with pytest.raises(UnfinishedError, match=f"1 of {len(names)}") as caught:
        streamconv.finish(out)
    assert names[0] in (caught.value.found or "")
    assert not out.exists()
    streamconv.part(out, files=names[:1])
    assert streamconv.finish(out).status == "done"
    assert streamconv.finish(out).status == "nothing-to-do"
    assert streamconv.part(out, "1/2").status == "published"
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "its note is gone"])
def test_a_finished_file_that_changed_is_to_be_written_again(how, planned, tmp_path):
    plan, whole = planned
    out = tmp_path / "out"
    names = begin(plan, out).files
    streamconv.part(out, "1/1")
    path = tmp_path / ".out.streamconv" / "files" / names[0]
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[:-1])
    elif how == "flipped":
        data[-1] ^= 1
        path.write_bytes(data)
    elif how == "gone":
        path.unlink()
    else:
        (tmp_path / ".out.streamconv" / "done" / f"{names[0]}.json").unlink()
    with pytest.raises(UnfinishedError, match="1 of"):
        streamconv.finish(out)
    assert streamconv.part(out, "1/1").files == (names[0],)
    streamconv.finish(out)
    assert contents(out) == contents(whole)


def test_what_was_not_begun_has_no_parts(planned, tmp_path):
    for call in (lambda p: streamconv.part(p, "1/1"), streamconv.finish):
        with pytest.raises(BadInputError, match="has been begun"):
            call(tmp_path / "out")
    names = begin(planned[0], tmp_path / "out").files
    with pytest.raises(UsageError, match="no such file"):
        streamconv.part(tmp_path / "out", files=["model-9.safetensors"])
    (tmp_path / ".out.streamconv" / "journal.jsonl").write_text("{}\n")
    with pytest.raises(OutputExistsError, match="nothing shows that this user"):
        streamconv.part(tmp_path / "out", files=names[:1])


def test_machines_that_share_no_home_share_a_key(planned, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("STREAMCONV_KEY", "ab" * 32)
    begin(planned[0], out)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    streamconv.part(out, "1/1")
    monkeypatch.delenv("STREAMCONV_KEY")
    with pytest.raises(OutputExistsError, match="STREAMCONV_KEY"):
        streamconv.finish(out)
    monkeypatch.setenv("STREAMCONV_KEY", "short")
    with pytest.raises(UsageError, match="64 hexadecimal"):
        streamconv.finish(out)
    monkeypatch.setenv("STREAMCONV_KEY", "ab" * 32)
    streamconv.finish(out)
    assert contents(out) == contents(planned[1])


def test_a_former_output_is_replaced_at_the_end_if_that_was_asked_for(
    planned, checkpoints, tmp_path
):
    plan, whole = planned
    out = tmp_path / "out"
    streamconv.convert(checkpoints["fsdp2-tied"].source, out, sync=False)
    before = contents(out)
    with pytest.raises(OutputExistsError):
        begin(plan, out)
    begin(plan, out, overwrite=True)
    streamconv.part(out, "1/1")
    assert contents(out) == before
    streamconv.finish(out)
    assert contents(out) == contents(whole)


def test_what_was_chosen_at_the_beginning_holds_for_every_part(planned, tmp_path):
    out = tmp_path / "out"
    begin(planned[0], out, checksum="sha256")
    streamconv.part(out, "1/1")
    streamconv.finish(out)
    files = json.loads((out / MANIFEST).read_text())["files"]
    assert all("sha256" in f for f in files if f["name"].endswith(".safetensors"))


def test_one_damaged_byte_that_two_files_share_is_one_error(shared_checkpoints, tmp_path):
    """A record of a flat group: no part sees all of it, and the last one reads it no second time."""
    source = tmp_path / "source"
    shutil.copytree(shared_checkpoints / "deepspeed" / "hft_s3_qwen3_bf16_w2", source)
    step = source / "global_step3"
    plan = plan_of(step, tmp_path)
    lines = map(json.loads, plan.read_text().splitlines())
    shared = [line["shared"] for line in lines if "output" in line]
    assert len(shared) > 2
    assert all(shared)
    damaged = next(step.glob("*rank_1*optim_states.pt"))
    data = bytearray(damaged.read_bytes())
    times = damaged.stat()
    _, start = max(shared[0])
    data[start + 1000] ^= 4
    damaged.write_bytes(data)
    os.utime(damaged, ns=(times.st_atime_ns, times.st_mtime_ns))
    out = tmp_path / "out"
    begin(plan, out)
    for k in (3, 1, 2):
        streamconv.part(out, f"{k}/3")
    with pytest.raises(BadInputError, match="CRC-32"):
        streamconv.finish(out)
    assert not out.exists()


# --- several at once, and kills ----------------------------------------------------------------


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "streamconv", *args]


def test_parts_at_once_twice_and_killed(planned, tmp_path):
    plan, whole = planned
    out = tmp_path / "out"
    begin(plan, out)
    victim = subprocess.Popen(command("part", str(out), "--part", "1/1", "-q"))
    deadline = time.monotonic() + 60
    while not [*(tmp_path / ".out.streamconv").rglob("*.part")]:
        assert time.monotonic() < deadline
        if victim.poll() is not None:
            break
        time.sleep(0.001)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    shares = ["1/2", "2/2", "1/2", "2/3"]
    at_once = [subprocess.Popen(command("part", str(out), "--part", s, "-q")) for s in shares]
    assert [p.wait(timeout=120) for p in at_once] == [0] * len(shares)
    assert streamconv.finish(out).status == "done"
    assert contents(out) == contents(whole)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_part_that_is_late_finds_the_output_published(planned, tmp_path, monkeypatch):
    """It was begun twice, and the other one and `finish` were faster."""
    plan, whole = planned
    out = tmp_path / "out"
    begin(plan, out)
    write = execution.write_output

    def slow(output, tensors, path, *args, **kwargs):
        finished = write(output, tensors, path, *args, **kwargs)
        if not out.exists():
            with monkeypatch.context() as patch:
                patch.setattr(execution, "write_output", write)
                streamconv.part(out, "1/1")
                streamconv.finish(out)
        return finished

    monkeypatch.setattr(execution, "write_output", slow)
    assert streamconv.part(out, "1/1").status == "published"
    assert contents(out) == contents(whole)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_part_meets_a_finish_that_has_moved_its_files(planned, tmp_path, monkeypatch):
    """The output is in its place, and what is staged is not removed yet."""
    plan, whole = planned
    out = tmp_path / "out"
    begin(plan, out)
    streamconv.part(out, "1/1")
    with monkeypatch.context() as patch:
        patch.setattr(execution.Execution, "_discard", lambda _: None)
        streamconv.finish(out)
    staged = tmp_path / ".out.streamconv"
    assert streamconv.part(out, "1/1").status == "published"
    (staged / "plan.jsonl").unlink()
    assert streamconv.part(out, "1/1").status == "published"
    assert staged.exists()
    assert contents(out) == contents(whole)
    streamconv.finish(out)
    assert contents(out) == contents(whole)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_whoever_finishes_holds_the_lock(planned, tmp_path):
    from streamconv.output.staging import locked

    out = tmp_path / "out"
    begin(planned[0], out)
    with locked(out):
        streamconv.part(out, "1/1")
        with pytest.raises(LockedError):
            streamconv.finish(out)
    streamconv.finish(out)


def test_the_commands(planned, tmp_path):
    plan, whole = planned
    out = tmp_path / "out"
    for args in (
        ["begin", str(plan), str(out)],
        ["part", str(out), "--part", "auto"],
        ["part", str(out), "--part", "2/2"],
        ["finish", str(out)],
    ):
        slurm = {
            "SLURM_ARRAY_TASK_ID": "10",
            "SLURM_ARRAY_TASK_MIN": "10",
            "SLURM_ARRAY_TASK_COUNT": "2",
        }
        done = subprocess.run(
            command(*args), env=os.environ | slurm, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert contents(out) == contents(whole)
    done = subprocess.run(command("part", str(out)), capture_output=True, text=True, check=False)
    assert done.returncode == 2


# --- how files are shared out, and what is known of records ------------------------------------


def outputs(*sizes: int) -> list[OutputFile]:
    return [OutputFile(f"{k}.safetensors", size, "", 1) for k, size in enumerate(sizes)]


def test_shares_are_balanced_by_bytes_and_leave_nothing_out():
    files = outputs(50, 10, 40, 20, 30)
    shares = [Share(k, 2).of(files) for k in (1, 2)]
    assert [sum(f.nbytes for f in share) for share in shares] == [80, 70]
    assert sorted(f.name for share in shares for f in share) == [f.name for f in files]
    assert [len(Share(k, 7).of(files)) for k in range(1, 8)] == [1] * 5 + [0] * 2


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("2/8", {}, (2, 8)),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "6",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            (4, 4),
        ),
        ("auto/3", {"JOB_COMPLETION_INDEX": "0"}, (1, 3)),
        ("0/8", {}, "no such part"),
        ("9/8", {}, "no such part"),
        ("auto", {}, "no number"),
        ("auto", {"JOB_COMPLETION_INDEX": "0"}, "how many"),
        ("auto/x", {}, "takes I/N"),
        ("half", {}, "takes I/N"),
    ],
)
def test_what_a_share_is_called(text, environment, expected):
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            Share.parse(text, environment)
    else:
        assert Share.parse(text, environment) == Share(*expected)


def test_what_several_saw_of_a_record_is_put_together():
    data = random.Random(1).randbytes(1000)

    def seen(*pieces: tuple[int, int]) -> list[tuple[int, int, int]]:
        return [(lo, hi, crc32(data[lo:hi])) for lo, hi in pieces]

    dice = random.Random(2)
    for _ in range(300):
        cuts = sorted({0, 1000, *(dice.randrange(1000) for _ in range(9))})
        pieces = [*pairwise(cuts)]
        twice = dice.sample(pieces, 2) if len(pieces) > 2 else []
        wide = [(pieces[0][0], pieces[1][1])] if dice.random() < 0.3 and len(pieces) > 1 else []
        order = [*pieces, *twice, *wide]
        dice.shuffle(order)
        coverage = Coverage()
        for piece in order:
            coverage.merge(seen(piece))
        for lo, hi in [*coverage.missing(1000)]:
            coverage.add(lo, memoryview(data)[lo:hi])
        assert coverage.whole(1000) == crc32(data)
    coverage = Coverage(seen((0, 10)))
    with pytest.raises(ValueError, match="two checksums"):
        coverage.merge([(0, 10, 7)])


def test_two_writers_that_read_other_bytes_at_one_place_are_told_so(checkpoints):
    """The file changed between them, with its size and times kept: nothing says which was right."""
    plan = streamconv.plan(checkpoints["fsdp2"].source)
    with SourceReader(Path(plan.head.root), plan.head.files) as reader:
        record = Record(file=0, key=0, start=64, nbytes=100, crc32=7, header_nbytes=0)
        shared = SharedRecords(reader)
        shared.add([SharedRecord("embed", record, [(0, 10, 1)])])
        with pytest.raises(SourceChangedError, match=r"rank_0\.pt, embed.*\n.*two checksums"):
            shared.add([SharedRecord("embed", record, [(0, 10, 2)])])
