"""Reading source files: positioned reads into buffers we own, few descriptors, a clean page cache.

``preadv`` into owned buffers and never mmap: mapped pages count as resident memory and would make a
budget a lie. Behind the reading position the kernel is told to drop its cached pages, so that a
conversion does not evict everything else a node has cached.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import xxhash

from streamconv.errors import BadInputError, ClosedError, SourceChangedError
from streamconv.files.inputs import open_input, opened, readable
from streamconv.ir.source import SourceFile
from streamconv.torchfile.window import FileWindow
from streamconv.torchfile.zipdir import hash_directory

# One preadv moves at most 0x7ffff000 bytes on Linux, and page cache works best in small steps.
_READ_BYTES = 1 << 20
# Pages are dropped this far behind the reader; an exact range leaves most of them cached.
_DROP_BYTES = 16 << 20
_DROP_OVERLAP_BYTES = 8 << 20


class Source(Protocol):
    """What is asked of whoever reads source files, on a disk or in a store.

    A read takes ``step_bytes`` at most; what lies between two wanted stretches is read for nothing up
    to ``gap_bytes``, or as a disk is best read where that is None.
    """

    files: Sequence[SourceFile]
    read_bytes: int
    step_bytes: int
    gap_bytes: int | None

    @property
    def root(self) -> Path:
        """Return the folder that the files' paths are relative to."""

    def path(self, file: int, /) -> Path:
        """Return where a file lies."""

    def read(self, file: int, offset: int, /, *buffers: memoryview) -> None:
        """Fill ``buffers`` from byte ``offset`` of a file."""

    def check_open(self) -> None:
        """Raise :class:`ClosedError` after :meth:`close`."""

    def check_unchanged(self) -> None:
        """Raise :class:`SourceChangedError` unless every file is what was planned."""

    def check_same(self, file: int, /) -> None:
        """Raise :class:`SourceChangedError` where a file was written since it was planned."""

    def close(self) -> None:
        """Read no more."""

    def __enter__(self) -> Source: ...

    def __exit__(self, *exc: object) -> None: ...


class SourceReader:
    """Reads from the files of a checkpoint; safe to use from several threads.

    ``max_open`` bounds the open descriptors (least recently used first out), and so does what the
    system allows a process, of which a quarter is taken. ``drop_cache`` tells
    the kernel to forget pages that have been read. ``strict_mtime`` takes a newer modification time
    for a change: the only sign of one where no checksums are there to tell.
    """

    step_bytes = _READ_BYTES
    gap_bytes: int | None = None

    def __init__(
        self,
        root: Path,
        files: Sequence[SourceFile],
        *,
        max_open: int = 128,
        drop_cache: bool = False,
        strict_mtime: bool = False,
    ) -> None:
        self.files = files
        self._root = root
        self._paths = [root / f.path for f in files]
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        quarter = max_open if allowed == resource.RLIM_INFINITY else max(1, allowed // 4)
        self._max_open = min(max_open, quarter)
        self._drop_cache = drop_cache
        self._strict_mtime = strict_mtime
        self._open: OrderedDict[int, int] = OrderedDict()
        self._in_use: Counter[int] = Counter()
        self._read_since_drop: dict[int, int] = {}
        self._index_hashes: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.read_bytes = 0
        self.reads = 0

    @property
    def root(self) -> Path:
        """Return the folder that the files lie in."""
        return self._root

    def path(self, file: int) -> Path:
        """Return where file number ``file`` lies."""
        return self._paths[file]

    def read(self, file: int, offset: int, *buffers: memoryview) -> None:
        """Fill ``buffers``, in order, from byte ``offset`` of file number ``file``.

        Raises :class:`SourceChangedError` where the file ends before they are full, or is not the
        file that was planned, :class:`BadInputError` where the system cannot read it, and
        :class:`ClosedError` after :meth:`close`.
        """
        with self._lock:
            self.check_open()
            fd = self._descriptor(file)
            self._in_use[file] += 1
        try:
            at = offset
            pending = [b for b in buffers if len(b)]
            while pending:
                with readable(self.path(file)):
                    got = os.preadv(fd, pending, at)
                self.reads += 1
                if got == 0:
                    raise SourceChangedError(
                        "a source file became shorter while it was read",
                        where=str(self.path(file)),
                        expected=f"{self.files[file].nbytes} bytes",
                        found=f"the end at byte {at}",
                    )
                at += got
                self.read_bytes += got
                while pending and got >= len(pending[0]):
                    got -= len(pending.pop(0))
                if pending:
                    pending[0] = pending[0][got:]
            if self._drop_cache:
                self._drop_behind(file, fd, offset, at)
        finally:
            with self._lock:
                self._in_use[file] -= 1
                if self._closed and not self._in_use[file]:
                    os.close(self._open.pop(file))

    def check_open(self) -> None:
        """Raise :class:`ClosedError` after :meth:`close`."""
        if self._closed:
            raise ClosedError(
                "the checkpoint is closed", where=str(self._root), hint="read before you close it"
            )

    def _descriptor(self, file: int) -> int:
        fd = self._open.get(file)
        if fd is not None:
            self._open.move_to_end(file)
            return fd
        if len(self._open) >= self._max_open:
            idle = next((f for f in self._open if not self._in_use[f]), None)
            if idle is not None:  # every one in use: more threads than descriptors
                os.close(self._open.pop(idle))
        try:
            fd = open_input(self.path(file))
        except FileNotFoundError as error:
            raise SourceChangedError(
                "a source file vanished", where=str(self.path(file))
            ) from error
        try:
            self._check_stat(file, os.fstat(fd))
        except SourceChangedError:
            os.close(fd)
            raise
        self._open[file] = fd
        return fd

    def _check_stat(self, file: int, stat: os.stat_result) -> None:
        planned = self.files[file]
        if stat.st_size != planned.nbytes or (
            (self._strict_mtime or planned.evidence) and stat.st_mtime_ns != planned.mtime_ns
        ):
            raise SourceChangedError(
                "a source file is not the one that was planned",
                where=str(self.path(file)),
                expected=f"{planned.nbytes} bytes, modified at {planned.mtime_ns} ns",
                found=f"{stat.st_size} bytes, modified at {stat.st_mtime_ns} ns",
                hint="plan again once the trainer has finished writing",
            )

    def check_unchanged(self) -> None:
        """Raise :class:`SourceChangedError` unless every file is still what was planned."""
        self._index_hashes.clear()
        for file in range(len(self.files)):
            try:
                with readable(self.path(file)):
                    status = self.path(file).stat()
                self._check_stat(file, status)
                self._check_directory(file)
            except FileNotFoundError as error:
                raise SourceChangedError(
                    "a source file vanished", where=str(self.path(file))
                ) from error

    def check_same(self, file: int) -> None:
        """Raise :class:`SourceChangedError` where a file was written since it was planned.

        For one whose bytes are wrong: a file that is only older or newer by its time may be a copy.
        """
        planned = self.files[file]
        mtime_ns = self.path(file).stat().st_mtime_ns
        if mtime_ns != planned.mtime_ns:
            raise SourceChangedError(
                "a source file was written since it was planned, and its bytes are others",
                where=str(self.path(file)),
                expected=f"modified at {planned.mtime_ns} ns",
                found=f"modified at {mtime_ns} ns",
                hint="plan again; if the file is a copy of the one that was planned, it is damaged",
            )
        self._check_directory(file)

    def _check_directory(self, file: int) -> None:
        planned = self.files[file]
        if planned.index:
            self._check_index(planned)
            return
        if not planned.entry_prefix:
            return
        try:
            with opened(self.path(file)) as stored:
                found, _ = hash_directory(FileWindow(stored, 0, planned.nbytes))
        except BadInputError as error:
            found = error.what
        if found != planned.directory_hash:
            raise SourceChangedError(
                "a source file is not the one that was planned",
                where=str(self.path(file)),
                expected=f"a zip directory with the hash {planned.directory_hash}",
                found=found,
                hint="plan again once the trainer has finished writing",
            )

    def _check_index(self, planned: SourceFile) -> None:
        """One index stands for all files of its folder: it is read once."""
        path = self._root / planned.index
        found = self._index_hashes.get(planned.index)
        if found is None:
            try:
                found = _hash_file(path)
            except OSError as error:
                raise SourceChangedError(
                    f"the checkpoint's index cannot be read: {error.strerror}", where=str(path)
                ) from None
            self._index_hashes[planned.index] = found
        expected = planned.directory_hash
        if found != expected:
            raise SourceChangedError(
                "the checkpoint is not the one that was planned",
                where=str(path),
                expected=f"an index with the hash {expected}",
                found=found,
                hint="plan again once the trainer has finished writing",
            )

    def _drop_behind(self, file: int, fd: int, start: int, end: int) -> None:
        seen = self._read_since_drop.get(file, 0) + end - start
        if seen >= _DROP_BYTES:
            lo = max(0, start - seen - _DROP_OVERLAP_BYTES)
            os.posix_fadvise(fd, lo, end - lo, os.POSIX_FADV_DONTNEED)
            seen = 0
        self._read_since_drop[file] = seen

    def close(self) -> None:
        """Close every descriptor; one in use by another thread as soon as that has read.

        Closed under its feet, its number could be another file's by then.
        """
        with self._lock:
            self._closed = True
            for file, fd in list(self._open.items()):
                if self._drop_cache:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                if not self._in_use[file]:
                    os.close(self._open.pop(file))

    def __del__(self) -> None:
        # Descriptors are mere numbers: nobody else would close them.
        if getattr(self, "_open", None):
            self.close()

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
