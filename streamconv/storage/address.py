"""An address of an object store (``s3://bucket/run/actor``), with the reading half of a path.

Formats walk through folders and read files by a path's methods, and so they do here. What a path hands
to the system (``os.open``, ``os.stat``) an address refuses: there it would mean a local folder that is
called ``s3:``.
"""

from __future__ import annotations

import fnmatch
import io
import os
import posixpath
import re
from collections.abc import Generator, Iterator
from pathlib import Path, PosixPath
from typing import IO, Any

from streamconv.errors import UsageError
from streamconv.storage import buckets, objects

StrPath = str | os.PathLike[str]
# An address begins with a scheme; of its slashes a Path keeps one. ./s3:/x is a path in any case.
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/")
_STREAMED_BYTES = 256 << 10
_HINTS = {
    "file": "give the path alone",
    "hdfs": "copy it with `hdfs dfs -get`, or mount it, and name that folder",
}


class Address(PosixPath):
    """A folder or an object of a store. Equal addresses name the same place."""

    def __str__(self) -> str:
        """Return it as it is given, and as messages, plans and manifests have it."""
        text = "/".join(self.parts) or "."
        return text.replace(":/", "://", 1) if _ADDRESS.match(text) else text

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is not a path of this machine's file systems")

    def __reduce__(self) -> tuple[Any, ...]:
        return Address, (str(self),)

    @property
    def scheme(self) -> str:
        """Return the kind of store: s3, gs, az, hf, http, https or nodes."""
        return self.parts[0].removesuffix(":")

    @property
    def bucket(self) -> objects.Bucket:
        """Return the bucket (for http the server, for hf the repository) that it lies in."""
        return buckets.bucket(self.scheme, "/".join(self.parts[1 : self._depth]))

    @property
    def key(self) -> str:
        """Return its name in the bucket. There are no links: ``..`` is the folder that is written."""
        return posixpath.normpath("/" + "/".join(self.parts[self._depth :])).strip("/")

    @property
    def _depth(self) -> int:
        """Return how many parts name the bucket; those of the Hub have an owner."""
        return 3 if self.parts[0] == "hf:" else 2

    @property
    def parents(self) -> tuple[Address, ...]:
        """Return the folders above it; the last one is the bucket."""
        return tuple(p for p in super().parents if len(p.parts) >= self._depth)

    def is_absolute(self) -> bool:
        """Return True: an address begins with its store."""
        return True

    def absolute(self) -> Address:
        """Return it as it is."""
        return self

    def resolve(self, strict: bool = False) -> Address:  # noqa: ARG002 - a path's
        """Return it as it is: no links lead anywhere."""
        return self

    def is_symlink(self) -> bool:
        """Return False."""
        return False

    def exists(self, *_: Any, **__: Any) -> bool:
        """Whether there is such an object, or one below it."""
        return self.bucket.kind(self.key) is not None

    def is_dir(self, *_: Any, **__: Any) -> bool:
        """Whether there is an object below it."""
        return self.bucket.kind(self.key) == "folder"

    def is_file(self, *_: Any, **__: Any) -> bool:
        """Whether there is such an object."""
        return self.bucket.kind(self.key) == "object"

    def stat(self, *_: Any, **__: Any) -> os.stat_result:
        """Return kind, size and time of change; raises ``FileNotFoundError``."""
        kind = self.bucket.kind(self.key)
        if kind is None:
            raise objects.not_found(self.bucket.name, self.key)
        return objects.FOLDER if kind == "folder" else self.bucket.stat(self.key).status

    lstat = stat

    @property
    def version(self) -> str:
        """Return what tells this content of the object from another."""
        return self.bucket.stat(self.key).version

    def iterdir(self) -> Generator[Address, None, None]:
        """Yield what lies in this folder."""
        yield from (self / name for name in self.bucket.names(self.key))

    def glob(self, pattern: str, *_: Any, **__: Any) -> Generator[Address, None, None]:
        """Yield what lies in this folder and fits the pattern, of names or of folders and names."""
        first, slash, rest = pattern.partition("/")
        for inner in self.iterdir():
            if fnmatch.fnmatchcase(inner.name, first):
                if not slash:
                    yield inner
                elif inner.is_dir():
                    yield from inner.glob(rest)

    def rglob(self, pattern: str, *_: Any, **__: Any) -> Generator[Address, None, None]:
        """Yield what lies below this folder, however deep, and has a name that fits the pattern."""
        for inner in self.iterdir():
            if fnmatch.fnmatchcase(inner.name, pattern):
                yield inner
            if inner.is_dir():
                yield from inner.rglob(pattern)

    def read_bytes(self) -> bytes:
        """Return the whole object; for small ones."""
        return self.bucket.stat(self.key).read(0, None)

    def read_text(self, encoding: str | None = None, errors: str | None = None, *_: Any) -> str:
        """Return the whole object as text; for small ones."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def open(  # type: ignore[override]
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """Return the object as a stream, to be read: an object is written as a whole, by its bucket."""
        if set(mode) - set("rbt"):
            raise io.UnsupportedOperation(f"{self} can only be read, not opened with mode {mode!r}")
        raw = ObjectStream(self.bucket.stat(self.key))
        if buffering == 0:
            return raw  # type: ignore[return-value]
        stream = io.BufferedReader(raw, 1 << 16)
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding, errors, newline)


class ObjectStream(io.RawIOBase):
    """An object as a stream that can be wound forward and back.

    Small pieces come out of the cache of blocks. Where large ones follow each other, somebody reads
    from one end to the other: one answer is gone on with then, and nothing is kept.
    """

    def __init__(self, item: objects.Object) -> None:
        self._object = item
        self._at = 0
        self._flow: Iterator[memoryview] = iter(())
        self._flow_at = self._large_end = -1
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte, counted from the beginning, from here or from the end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._object.nbytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there are bytes."""
        data: bytes | memoryview
        large = len(buffer) >= _STREAMED_BYTES
        if self._flow_at == self._at or (large and self._large_end == self._at):
            data = self._next(len(buffer))
        else:
            data = self._object.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        self._large_end = self._at if large else -1
        return len(data)

    def _next(self, most: int) -> memoryview:
        if self._flow_at != self._at:
            self._flow, self._rest = self._object.flow(self._at), memoryview(b"")
            self._flow_at = self._at
        if not self._rest:
            self._rest = next(self._flow, memoryview(b""))
        data, self._rest = self._rest[:most], self._rest[most:]
        self._flow_at += len(data)
        return data


def place(path: StrPath) -> Path:
    """Return what a user or a plan names: a path, or an :class:`Address` where it begins as one.

    Of a path that goes up (``..``) the folder is what it really is: plans and records hold none such.
    Raises :class:`UsageError` for a scheme that is not served, and for an address that would show
    a secret.
    """
    if isinstance(path, Address):
        return path
    text = os.fspath(path)
    match = _ADDRESS.match(text)
    if match is None:
        return _without_parents(Path(path))
    scheme, rest = match["scheme"].lower(), text[match.end() :].lstrip("/")
    shown = f"{scheme}://{objects.without_secrets(rest)}"
    if scheme not in objects.SCHEMES:
        known = ", ".join(f"{s}://" for s in objects.SCHEMES if s != objects.NODES)
        raise UsageError(
            f"{scheme}:// is not supported",
            where=shown,
            expected=f"a path, or an address that begins with {known}",
            hint=_HINTS.get(
                scheme, "copy the checkpoint to a disk, or mount the store, and name that folder"
            ),
        )
    if "@" in rest.partition("/")[0] or (scheme.startswith("http") and "?" in rest):
        raise UsageError(
            "an address with credentials: it would be seen in lists of processes and in reports",
            where=shown,
            hint=f"leave them out; {objects.CREDENTIALS[scheme]}",
        )
    name, _, key = rest.partition("/")
    if scheme == "hf" and (not key or name in ("datasets", "spaces")):
        raise UsageError(
            "not a model's repository on the Hub", where=shown, expected="hf://ORG/NAME/folder"
        )
    if not name or "\0" in rest or any(part in (".", "..") for part in key.split("/")):
        raise UsageError(
            "not an address of an object store",
            where=shown,
            expected=f"{scheme}://{'server' if scheme.startswith('http') else 'bucket'}/folder",
        )
    return Address(f"{scheme}:", name, *filter(None, key.split("/")))


def _without_parents(path: Path) -> Path:
    """Return a path whose part up to the last ``..`` is resolved; links behind that stay."""
    if ".." not in path.parts:
        return path
    last = len(path.parts) - path.parts[::-1].index("..")
    return Path(os.path.realpath(Path(*path.parts[:last])), *path.parts[last:])
