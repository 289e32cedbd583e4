"""Reading source objects: ranges of one version each, many requests in flight."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from streamconv.errors import BadInputError, ClosedError, SourceChangedError, UsageError
from streamconv.executor.reader import Source, SourceReader
from streamconv.ir.source import SourceFile
from streamconv.storage.address import Address

# A request takes as long as so many bytes on their way: so many are worth reading for nothing.
_GAP_BYTES = 1 << 20


class RemoteReader:
    """Reads from the objects of a checkpoint in a store; safe to use from several threads.

    Every range is asked for in the version that was planned.
    """

    step_bytes = 1 << 62
    gap_bytes: int | None = _GAP_BYTES

    def __init__(self, root: Address, files: Sequence[SourceFile]) -> None:
        outside = next((f.path for f in files if f.path.startswith("/")), None)
        if outside is not None:
            raise UsageError(
                "a plan with files in a store and on a disk",
                where=str(root),
                found=outside,
                hint="put both in one of the two",
            )
        self.files = files
        self.root: Path = root
        self._paths = [root / f.path for f in files]
        self._bucket = root.bucket
        self._closed = False
        self._lock = threading.Lock()
        self.read_bytes = 0
        self.reads = 0

    def path(self, file: int) -> Path:
        """Return where file number ``file`` lies."""
        return self._paths[file]

    def read(self, file: int, offset: int, *buffers: memoryview) -> None:
        """Fill ``buffers``, in order, from byte ``offset`` of file number ``file``, by one request.

        Raises :class:`SourceChangedError` where it is not the object that was planned, and
        :class:`ClosedError` after :meth:`close`.
        """
        self.check_open()
        wanted = [b for b in buffers if len(b)]
        nbytes = sum(map(len, wanted))
        planned = self.files[file]
        if offset + nbytes > planned.nbytes:
            raise BadInputError(
                "the plan asks for bytes behind the end of a file", where=str(self.path(file))
            )
        key = self._paths[file].key
        version = planned.version or self._bucket.stat(key).version
        self._bucket.read_into(key, offset, version, *wanted)
        with self._lock:
            self.reads += 1
            self.read_bytes += nbytes

    def check_open(self) -> None:
        """Raise :class:`ClosedError` after :meth:`close`."""
        if self._closed:
            raise ClosedError(
                "the checkpoint is closed", where=str(self.root), hint="read before you close it"
            )

    def check_unchanged(self) -> None:
        """Raise :class:`SourceChangedError` unless every object is still what was planned."""
        for path, planned in zip(self._paths, self.files, strict=True):
            try:
                found = self._bucket.look(path.key)
            except FileNotFoundError as error:
                raise SourceChangedError("a source file vanished", where=str(path)) from error
            if found.nbytes != planned.nbytes or found.version != planned.version:
                raise SourceChangedError(
                    "a source file is not the one that was planned",
                    where=str(path),
                    expected=f"{planned.nbytes} bytes, version {planned.version}",
                    found=f"{found.nbytes} bytes, version {found.version}",
                    hint="plan again once the trainer has finished writing",
                )

    def check_same(self, file: int, /) -> None:
        """Do nothing: what was read of an object was of the version that was planned."""

    def close(self) -> None:
        """Read no more."""
        self._closed = True

    def __enter__(self) -> RemoteReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_source(
    root: Path,
    files: Sequence[SourceFile],
    *,
    drop_cache: bool = False,
    strict_mtime: bool = False,
) -> Source:
    """Return a reader of the files of the checkpoint in ``root``, a folder or an address.

    The other arguments are those of :class:`SourceReader`.
    """
    if isinstance(root, Address):
        return RemoteReader(root, files)
    return SourceReader(root, files, drop_cache=drop_cache, strict_mtime=strict_mtime)
