"""Writing one safetensors file: header first, data in order, the page cache left as it was.

Byte layout (safetensors README): 8 bytes little-endian header length, the JSON header padded with
spaces to a multiple of 8, then the tensors' bytes without holes. There are two ways to the disk.
Through the page cache, in calls of at most 1 MiB (larger ones are several times slower), dirty
pages pushed out behind the writer so that the closing ``fsync`` has little left to do; or past it
(O_DIRECT), in aligned blocks, where the disk and its file system are faster that way.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import xxhash

from streamconv.files import newfile
from streamconv.files.durable import no_space
from streamconv.ir.planned import OutputFile
from streamconv.storage.address import Address

_WRITE_BYTES = 1 << 20
# What is worth handing to another thread, which hashes it meanwhile.
_LEAST_BESIDE_BYTES = 256 << 10
# Dirty pages are pushed out in bursts, the next one written meanwhile. A disk that also reads wants
# them long: with 16 MiB the same conversion took 1.4 times as long as with 128. On a slow disk they
# become shorter, or nothing would be heard of it for minutes.
_LEAST_BURST_BYTES = 16 << 20
_FIRST_BURST_BYTES = 64 << 20
_MOST_BURST_BYTES = 128 << 20
_SHORT_WAIT_SECONDS = 0.25
_LONG_WAIT_SECONDS = 0.5
# How much the kernel is asked to push out, or to wait for, at once: no signal ends that, not even
# SIGKILL, and a stop is promised within seconds.
_STEP_BYTES = 1 << 20
# What a direct write moves at once (a constant of the budget's, too), and what it is aligned to.
DIRECT_BYTES = 4 << 20
_BLOCK_BYTES = 4096
# Parts of an upload (S3 takes no more than 10,000 of them), and how many are on their way at once.
MIN_PART_BYTES = 8 << 20
# What the client takes for uploads beside their parts, and parts on their way at once: what a large
# budget is worth, and how much of it is for each.
_UPLOAD_BASE_BYTES = 12 << 20
_MOST_UPLOADS = 8
_UPLOAD_FROM_BYTES = 96 << 20
_UPLOAD_SHARE = 4
_MOST_PARTS = 9000

_libc = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE_WAIT = 1 | 2 | 4
# Not known to the kernel, forbidden by a sandbox, or not for this kind of file.
_NO_SUCH_CALL = (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP)


def _sync_file_range(fd: int, lo: int, hi: int, flags: int) -> None:
    """Start or await write-back of the bytes ``[lo, hi)``; raises ``OSError`` for what did not get out.

    The kernel tells a descriptor of a failed write-back once: were it not heard here, ``fsync`` would
    find nothing wrong with a file that has a hole. Where there is no such call ``fsync`` does it all.
    """
    for at in range(lo, hi, _STEP_BYTES):
        nbytes = min(_STEP_BYTES, hi - at)
        if _libc.sync_file_range(
            fd, ctypes.c_int64(at), ctypes.c_int64(nbytes), ctypes.c_uint(flags)
        ):
            code = ctypes.get_errno()
            if code in _NO_SUCH_CALL:
                return
            raise OSError(code, os.strerror(code))


def next_burst(nbytes: int, seconds: float) -> int:
    """Return how many bytes to push out at once, where the last ``nbytes`` took ``seconds``."""
    if seconds < _SHORT_WAIT_SECONDS:
        return min(nbytes * 2, _MOST_BURST_BYTES)
    if seconds > _LONG_WAIT_SECONDS:
        return max(nbytes // 2, _LEAST_BURST_BYTES)
    return nbytes


class _CachedFile:
    """Appends to a descriptor through the page cache; ``sync`` keeps the cache clean behind itself."""

    def __init__(self, fd: int, *, sync: bool) -> None:
        self._fd = fd
        self._sync = sync
        self._at = 0
        self._pushed = 0
        self._clean = 0
        self._burst = _FIRST_BURST_BYTES

    def append(self, data: memoryview) -> None:
        self._at = _pwrite_all(self._fd, data, self._at)
        if self._sync and self._at - self._pushed >= self._burst:
            self._flush_behind()

    def _flush_behind(self) -> None:
        start = time.monotonic()
        _sync_file_range(self._fd, self._pushed, self._at, _SYNC_FILE_RANGE_WRITE)
        if self._pushed:
            _sync_file_range(self._fd, self._clean, self._pushed, _SYNC_FILE_RANGE_WAIT)
            os.posix_fadvise(self._fd, 0, self._pushed, os.POSIX_FADV_DONTNEED)
            self._burst = next_burst(self._burst, time.monotonic() - start)
        self._clean, self._pushed = self._pushed, self._at

    def close(self) -> None:
        os.close(self._fd)

    def finish(self) -> None:
        if self._sync:
            _sync_file_range(self._fd, self._pushed, self._at, _SYNC_FILE_RANGE_WRITE)
            _sync_file_range(self._fd, self._clean, self._at, _SYNC_FILE_RANGE_WAIT)
            os.fsync(self._fd)  # sizes and extents, and the disk's own cache
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)


class _DirectFile:
    """Appends to a descriptor past the page cache, in aligned blocks out of an aligned buffer.

    Where the file system has no direct I/O the same blocks go through the cache. The last block is
    written whole and the file cut to its size.
    """

    def __init__(self, fd: int, *, sync: bool) -> None:
        self._fd = fd
        self._sync = sync
        self._buffer = memoryview(mmap.mmap(-1, DIRECT_BYTES))
        self._filled = 0
        self._at = 0
        with contextlib.suppress(OSError):
            self._set_direct(True)

    def append(self, data: memoryview) -> None:
        while len(data):
            take = min(len(data), DIRECT_BYTES - self._filled)
            self._buffer[self._filled : self._filled + take] = data[:take]
            self._filled += take
            data = data[take:]
            if self._filled == DIRECT_BYTES:
                self._write(DIRECT_BYTES)
                self._filled = 0

    def close(self) -> None:
        os.close(self._fd)

    def finish(self) -> None:
        nbytes = self._at + self._filled
        if self._filled:
            whole = -(-self._filled // _BLOCK_BYTES) * _BLOCK_BYTES
            self._buffer[self._filled : whole] = bytes(whole - self._filled)
            self._write(whole)
            os.ftruncate(self._fd, nbytes)
        if self._sync:
            os.fsync(self._fd)  # sizes and extents, and the disk's own cache

    def _write(self, nbytes: int) -> None:
        try:
            self._at = _pwrite_all(self._fd, self._buffer[:nbytes], self._at, DIRECT_BYTES)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # The file system takes the flag and not the write, or wants larger blocks.
            self._set_direct(False)
            self._at = _pwrite_all(self._fd, self._buffer[:nbytes], self._at)

    def _set_direct(self, on: bool) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)


def _pwrite_all(fd: int, data: memoryview, at: int, step: int = _WRITE_BYTES) -> int:
    """Write ``data`` at byte ``at`` in calls of at most ``step`` bytes; return where it ends."""
    while len(data):
        done = os.pwrite(fd, data[:step], at)
        at += done
        data = data[done:]
    return at


class _Object:
    """Appends to a new object of a store, which appears when it is whole, and not at all otherwise."""

    def __init__(self, path: Address, nbytes: int, at_once: int) -> None:
        self._path = path
        self._upload = path.bucket.upload(path.key, part_bytes(nbytes), at_once)

    def append(self, data: memoryview) -> None:
        # The client keeps what it is given, and these bytes are a window's, which is filled again.
        self._upload.write(bytes(data))

    def finish(self) -> None:
        self._upload.finish()

    def close(self) -> None:
        self._upload.close()


def part_bytes(nbytes: int) -> int:
    """Return in what parts an object of so many bytes is uploaded.

    It follows from the size alone, as the version that some stores give to an object depends on it.
    """
    return max(MIN_PART_BYTES, -(-nbytes // _MOST_PARTS >> 20) + 1 << 20)


def upload_share(budget_bytes: int, nbytes: int) -> tuple[int, int]:
    """Return how many parts of an object of so many bytes are on their way at once, and their memory.

    One is what the smallest budgets have; the part that is filled meanwhile is counted, too.
    """
    part = part_bytes(nbytes)
    spare = (budget_bytes - _UPLOAD_FROM_BYTES) // (_UPLOAD_SHARE * part)
    at_once = min(max(1, spare), _MOST_UPLOADS)
    return at_once, _UPLOAD_BASE_BYTES + part * (at_once + 1)


def _created(
    path: Path, output: OutputFile, *, sync: bool, direct: bool, uploads: int
) -> _Object | _CachedFile | _DirectFile:
    if isinstance(path, Address):
        return _Object(path, output.nbytes, uploads)
    path.unlink(missing_ok=True)  # what a stopped run left; written through, it may be a link
    return (_DirectFile if direct else _CachedFile)(newfile.create(path), sync=sync)


class ShardWriter:
    """Writes one output file; as a context manager it leaves a partial file on an exception.

    ``sync`` makes the data durable at :meth:`finish` and keeps the page cache clean behind the
    writer; ``direct`` writes past the page cache where that can be; into a store, ``uploads`` parts are
    on their way at once. ``xxh3``, ``sha256`` and ``keyed`` (made with ``seed``) are hex digests of the
    whole file, once finished.
    """

    def __init__(
        self,
        path: Path,
        output: OutputFile,
        *,
        sync: bool,
        sha256: bool = False,
        direct: bool = False,
        seed: int = 0,
        uploads: int = 1,
    ) -> None:
        self._path = path
        self._output = output
        self._hash = xxhash.xxh3_128()
        self._keyed = xxhash.xxh3_128(seed=seed)
        self._sha256 = hashlib.sha256() if sha256 else None
        # It takes longer than writing does, and lets go of the interpreter.
        self._beside = ThreadPoolExecutor(1, "sha256") if sha256 else None
        self._nbytes = 0
        self.xxh3 = self.keyed = ""
        self.sha256: str | None = None
        self._file = _created(path, output, sync=sync, direct=direct, uploads=uploads)
        try:
            header = output.header.encode()
            self.write(memoryview(len(header).to_bytes(8, "little") + header))
        except BaseException:
            self._close()
            raise

    def write(self, data: memoryview) -> None:
        """Append ``data``; raises :class:`NoSpaceError` on a full disk."""
        for lo in range(0, len(data), _WRITE_BYTES):
            piece = data[lo : lo + _WRITE_BYTES]
            hashed = self._hash_sha256(piece)
            self._hash.update(piece)
            self._keyed.update(piece)
            try:
                self._file.append(piece)
            except OSError as error:
                raise no_space(error, self._path) or error from error
            if hashed is not None:
                hashed.result()  # the bytes are the caller's again
        self._nbytes += len(data)

    def _hash_sha256(self, piece: memoryview) -> Future[None] | None:
        """Take in a piece, now or until the future that is returned is done."""
        if self._sha256 is None or self._beside is None:
            return None
        if len(piece) >= _LEAST_BESIDE_BYTES:
            return self._beside.submit(self._sha256.update, piece)
        self._sha256.update(piece)
        return None

    def _close(self) -> None:
        if self._beside is not None:
            self._beside.shutdown()
        self._file.close()

    def finish(self) -> None:
        """Make the file whole and, with ``sync``, durable."""
        if self._nbytes != self._output.nbytes:
            raise AssertionError(
                f"{self._path}: wrote {self._nbytes} bytes, planned {self._output.nbytes}"
            )
        try:
            self._file.finish()
        except OSError as error:
            raise no_space(error, self._path) or error from error
        self.xxh3, self.keyed = self._hash.hexdigest(), self._keyed.hexdigest()
        self.sha256 = self._sha256.hexdigest() if self._sha256 else None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()
