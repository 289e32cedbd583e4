"""What makes files of ours last, and tells whether they did: fsync, hashes, and full disks."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from streamconv.errors import NoSpaceError
from streamconv.files.inputs import readable

_READ_BYTES = 1 << 20


def no_space(error: OSError, where: Path) -> NoSpaceError | None:
    """Return the error to raise for a full disk or quota, or None where ``error`` is another."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return NoSpaceError(
        "the disk is full",
        where=str(where),
        hint="free some space and run the same command again: it goes on where it was",
    )


@contextmanager
def full_disk_told(where: Path) -> Iterator[None]:
    """Turn a full disk into its error wherever it strikes: lock, plan, journal, manifest."""
    try:
        yield
    except OSError as error:
        raise no_space(error, where) or error from error


def hash_file(path: Path) -> str:
    """Return the xxh3_128 hex digest of a file, read in 1 MiB steps."""
    with readable(path), path.open("rb", buffering=0) as stream:
        return hash_stream(stream)[0]


def hash_stream(stream: io.RawIOBase, *seeds: int) -> list[str]:
    """Return the xxh3_128 of what a stream has left, and one with each of ``seeds``, read once."""
    digests = [xxhash.xxh3_128(), *(xxhash.xxh3_128(seed=seed) for seed in seeds)]
    buffer = memoryview(bytearray(_READ_BYTES))
    while got := stream.readinto(buffer):
        for digest in digests:
            digest.update(buffer[:got])
    return [digest.hexdigest() for digest in digests]


def fsync_directory(path: Path) -> None:
    """Make renames in ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, pieces: Iterable[str], *, sync: bool) -> None:
    """Write a file of UTF-8, durably with ``sync``; raises :class:`NoSpaceError`."""
    try:
        with path.open("w", encoding="utf-8", newline="") as stream:
            stream.writelines(pieces)
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
    except OSError as error:
        raise no_space(error, path) or error from error
