"""What the byte path asks of the system: how many reads, what it leaves in the page cache, O_DIRECT."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.makers.large import make_large
from streamconv.errors import NoSpaceError
from streamconv.executor import writer
from streamconv.executor.pipeline import WindowFiller, filled_windows, write_output
from streamconv.executor.reader import SourceReader
from streamconv.executor.records import RecordChecks
from streamconv.ir.dtypes import F32
from streamconv.ir.planfile import Plan
from streamconv.ir.planned import OutputFile
from tests.test_executor import Source, make_plan, whole

# --- how many reads --------------------------------------------------------------------------


def reads_of(plan: Plan, *, one_by_one: bool) -> int:
    """Count the reads that bring in the plan's tensors, in windows or each tensor by itself."""
    with SourceReader(Path(plan.head.root), plan.head.files) as reader:
        checks = RecordChecks(reader)
        filler = WindowFiller(reader, checks, max_bytes=64 << 20)
        for _, section in plan.sections():
            tensors = list(section)
            for group in [[t] for t in tensors] if one_by_one else [tensors]:
                for _ in filled_windows(group, filler, checks):
                    pass
        filler.close()
        return reader.reads


def test_many_files_of_many_small_tensors_cost_a_read_per_file_and_window(tmp_path: Path) -> None:
    files, tensors = 128, 60
    source = Source(tmp_path, files)
    rows = np.arange(files * 64, dtype=np.float32).reshape(files, 64)
    names = [f"t{k}" for k in range(tensors)]
    for name in names:
        source.add(name, rows, F32, [list(range(1, files)), []])
    plan = make_plan(source, [whole(n, rows, F32) for n in names])
    assert reads_of(plan, one_by_one=True) == files * tensors
    assert reads_of(plan, one_by_one=False) == files


def test_a_records_header_is_read_with_its_bytes(tmp_path: Path) -> None:
    from streamconv.api import plan as plan_checkpoint

    made = make_large(tmp_path / "run", 2_000_000, world=4)
    plan = plan_checkpoint(made.source)
    records = len(
        {
            (s.fqn, r.file)
            for _, ts in plan.sections()
            for t in ts
            for s in t.sources
            for r in s.shards
        }
    )
    assert records > 40
    assert reads_of(plan, one_by_one=True) <= records * 1.1


# --- the page cache --------------------------------------------------------------------------


def cached_bytes(path: Path) -> int:
    """Return how much of a file the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = path.stat().st_size
    with path.open("rb") as stream:
        address = libc.mmap(
            None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, stream.fileno(), 0
        )
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    try:
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(p & 1 for p in pages) * mmap.PAGESIZE


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_a_durable_run_leaves_the_page_cache_as_it_was(tmp_path: Path, direct: bool) -> None:
    source = Source(tmp_path, 4)
    array = np.zeros((64 << 20,), np.float32)
    array[::1024] = 1.5
    source.add("t", array, F32, [[16 << 20, 32 << 20, 48 << 20]])
    plan = make_plan(source, [whole("t", array, F32)])
    source.data.clear()
    del array
    paths = [tmp_path / f.path for f in plan.head.files]
    if not sum(map(cached_bytes, paths)):
        pytest.skip("this file system has no page cache to speak of")
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())  # dirty pages cannot be dropped
    with SourceReader(tmp_path, plan.head.files, drop_cache=True) as reader:
        checks = RecordChecks(reader)
        filler = WindowFiller(reader, checks, max_bytes=4 << 20)
        for output, tensors in plan.sections():
            out = tmp_path / output.name
            paths.append(out)
            write_output(
                output,
                tensors,
                out,
                filler,
                checks,
                sync=True,
                sha256=False,
                direct=direct,
                on_bytes=lambda _: None,
            )
        filler.close()
    assert sum(map(cached_bytes, paths)) < 32 << 20  # of 512 MiB that went through


# --- O_DIRECT --------------------------------------------------------------------------------


def written(path: Path, parts: list[bytes], *, direct: bool) -> tuple[bytes, str]:
    """Write ``parts`` through a ShardWriter; return the file's bytes and its digest."""
    header = '{"t":{}}'
    nbytes = 8 + len(header) + sum(map(len, parts))
    output = OutputFile(path.name, nbytes, header, 1)
    with writer.ShardWriter(path, output, sync=True, direct=direct) as shard:
        for part in parts:
            shard.write(memoryview(part))
        shard.finish()
    assert path.stat().st_size == nbytes
    return path.read_bytes(), shard.xxh3


def test_sha256_is_of_what_was_written_whatever_becomes_of_the_buffer(tmp_path: Path) -> None:
    header = '{"t":{}}'
    buffer = bytearray(5 << 20)
    sizes = (3, 300 << 10, 5 << 20, 1000, 3 << 20)
    output = OutputFile("f", 8 + len(header) + sum(sizes), header, 1)
    with writer.ShardWriter(tmp_path / "f", output, sync=False, sha256=True) as shard:
        for seed, size in enumerate(sizes):
            buffer[:size] = np.random.default_rng(seed).bytes(size)
            shard.write(memoryview(buffer)[:size])
        buffer[:] = bytes(len(buffer))
        shard.finish()
    assert shard.sha256 == hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()


@pytest.mark.parametrize("tail", [0, 1, 4079, 4080, 4081, (4 << 20) - 16, (4 << 20) + 5])
def test_direct_writes_give_the_same_file(tmp_path: Path, tail: int) -> None:
    rng = np.random.default_rng(tail)
    parts = [rng.bytes(n) for n in (3, 1 << 20, 5 << 20, tail)]
    assert written(tmp_path / "d", parts, direct=True) == written(
        tmp_path / "c", parts, direct=False
    )


def test_a_file_system_without_direct_writes_gets_cached_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.pwrite, []

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        if writer.fcntl.fcntl(fd, writer.fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(at)
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    parts = [os.urandom(9 << 20)]
    found, _ = written(tmp_path / "d", parts, direct=True)
    assert found.endswith(parts[0])
    assert len(refused) <= 1  # and 0 where the flag itself was refused


# --- write-back ------------------------------------------------------------------------------


class Kernel:
    """Stands in for libc: remembers what write-back is asked for, and fails it with ``code``."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.asked: list[tuple[int, int, int]] = []

    def sync_file_range(self, fd: int, offset: Any, nbytes: Any, flags: Any) -> int:
        self.asked.append((offset.value, nbytes.value, flags.value))
        ctypes.set_errno(self.code)
        return -1 if self.code else 0


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_bytes_that_did_not_get_out_are_heard_of(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of them once; an fsync that comes later finds nothing wrong."""
    monkeypatch.setattr(writer, "_libc", Kernel(code))
    with pytest.raises((OSError, NoSpaceError)) as caught:
        written(tmp_path / "x", [bytes(1 << 20)], direct=False)
    assert isinstance(caught.value, NoSpaceError) == (code == errno.ENOSPC)


def test_without_such_a_call_fsync_does_it_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_libc", Kernel(errno.ENOSYS))
    assert written(tmp_path / "x", [b"data"], direct=False)[0].endswith(b"data")


def test_no_wait_for_the_disk_is_a_long_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing ends a system call that waits for write-back: 64 MiB at 2 MB/s were half a minute."""
    kernel = Kernel()
    monkeypatch.setattr(writer, "_libc", kernel)
    monkeypatch.setattr(writer, "_FIRST_BURST_BYTES", 3 << 20)
    data, _ = written(tmp_path / "x", [bytes(1 << 20)] * 10 + [b"tail"], direct=False)
    assert max(nbytes for _, nbytes, _ in kernel.asked) <= 1 << 20
    for flags in (writer._SYNC_FILE_RANGE_WRITE, writer._SYNC_FILE_RANGE_WAIT):
        at = 0
        for offset, nbytes, of in kernel.asked:
            if of == flags:
                assert offset == at  # without holes, and nothing twice
                at += nbytes
        assert at == len(data)


def test_bursts_grow_on_a_quick_disk_and_shrink_on_a_slow_one() -> None:
    burst, seen = 64 << 20, []
    for seconds in (0.01, 0.01, 0.3, 2, 2, 2, 2, 0.01):
        burst = writer.next_burst(burst, seconds)
        seen.append(burst >> 20)
    assert seen == [128, 128, 128, 64, 32, 16, 16, 32]
