"""How fast disks and checksums are here: measured for about a second, past the page cache.

What is measured is what conversions do: long sequential pieces, and writes that are durable.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import xxhash

from streamconv.files.filesystems import nearest
from streamconv.torchfile.crc import crc32

_PIECE_BYTES = 8 << 20
_RUN_PIECES = 4  # so many in a row before the next file: what a disk calls sequential
_LEAST_BYTES = 8 << 20  # less says more about the clock than about the disk
_SYNC_BYTES = 64 << 20  # about as far as the writer lets what is not on disk yet grow
_MOST_WRITTEN_BYTES = 512 << 20


def read_speed(files: Sequence[Path], seconds: float = 1.0) -> float | None:
    """Return bytes per second of reading these files; None where they are too small to tell."""
    buffer = mmap.mmap(-1, _PIECE_BYTES)  # page-aligned, as reading past the cache asks for
    done, began = 0, time.monotonic()
    deadline = began + seconds
    try:
        for path in files:
            done += _read_some(path, buffer, deadline)
            if time.monotonic() >= deadline:
                break
    finally:
        buffer.close()
    return _rate(done, began)


def _read_some(path: Path, buffer: mmap.mmap, deadline: float) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        # The file system has no such way; then at least what is cached is dropped first.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    done = 0
    try:
        for number in range(_RUN_PIECES):
            try:
                count = os.preadv(fd, [buffer], number * _PIECE_BYTES)
            except OSError:
                break  # it will tell when the conversion reads it
            done += count
            if count < _PIECE_BYTES or time.monotonic() >= deadline:
                break
    finally:
        os.close(fd)
    return done


def write_speed(folder: Path, seconds: float = 1.0) -> float | None:
    """Return bytes per second of durable writing below ``folder``; None where it cannot be tried.

    A nameless file is written, so that nothing is left whatever happens.
    """
    piece = os.urandom(1 << 20) * (_PIECE_BYTES >> 20)  # nothing that a file system could compress
    here = nearest(folder)
    try:
        room = os.statvfs(here)
        limit = min(_MOST_WRITTEN_BYTES, room.f_bavail * room.f_frsize // 10)
        with tempfile.TemporaryFile(dir=here) as file:
            done, began = 0, time.monotonic()
            while done + len(piece) <= limit and time.monotonic() - began < seconds:
                done += os.pwrite(file.fileno(), piece, done)
                if done % _SYNC_BYTES == 0:
                    os.fdatasync(file.fileno())
            os.fdatasync(file.fileno())
            return _rate(done, began)
    except OSError:
        return None


def checksum_speed() -> float:
    """Return bytes per second of what is computed over every byte: CRC-32 in, xxh3 out."""
    data = memoryview(os.urandom(1 << 20) * 64)  # more than the processor's caches hold
    best = float("inf")
    for _ in range(3):  # the best of a few: this is about the processor, not about its other work
        began = time.monotonic()
        crc32(data)
        xxhash.xxh3_128_digest(data)
        best = min(best, time.monotonic() - began)
    return len(data) / max(best, 1e-9)


def _rate(done: int, began: float) -> float | None:
    elapsed = time.monotonic() - began
    return done / elapsed if done >= _LEAST_BYTES and elapsed > 0 else None
