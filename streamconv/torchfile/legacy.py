"""Files that torch.save wrote without a zip, as before torch 1.6 and still where it is told so.

Byte layout: a pickle of the magic number, one of the protocol version, one of a dict about the machine
(``little_endian``), the object, whose storages are persistent ids, and a list of their keys. Then comes
each storage in the order of that list: its number of elements (int64), then its bytes. There are no
checksums.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import xxhash

from streamconv.errors import BadInputError, UnsafeInputError
from streamconv.files.inputs import opened, readable
from streamconv.ir.dtypes import BY_TORCH
from streamconv.torchfile.allowlist import KEPT, STORAGE_DTYPES
from streamconv.torchfile.inert import InertDict, InertStorage, RefusedPickleError
from streamconv.torchfile.unpickle import InertUnpickler, no_garbage_collection, refusals
from streamconv.torchfile.window import FileWindow
from streamconv.torchfile.zipdir import ZipDirectory

_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_PROTOCOL = 1001
_LENGTH_NBYTES = 8
_HEAD_NBYTES = 1 << 16


def is_legacy(path: Path) -> bool:
    """Whether the file begins as such a file does."""
    return _head(path, len(_MAGIC)) == _MAGIC


def hash_head(path: Path) -> str:
    """Return the hash of a file's first bytes, where its pickle is; of the weights it says nothing."""
    return xxhash.xxh3_128_hexdigest(_head(path, _HEAD_NBYTES))


def _head(path: Path, nbytes: int) -> bytes:
    with opened(path) as file:
        return file.pread(nbytes, 0)


def read_legacy(path: Path, *, max_nbytes: int) -> tuple[os.stat_result, ZipDirectory, object]:
    """Return status, places of the storages and the object of a file, as of a zip's.

    The pickles may take ``max_nbytes``. Raises :class:`BadInputError` for a damaged or truncated file,
    :class:`UnsafeInputError` for one that is a trap.
    """
    where = str(path)
    with opened(path) as file, file.stream() as raw:
        status = file.status
        # Limited, and read through a BufferedReader: an unpickler leaves that right behind its pickle.
        limited = _Limited(raw, max_nbytes, where)
        stream = io.BufferedReader(cast("io.RawIOBase", limited), 1 << 16)
        with readable(path), refusals(where, min(status.st_size, max_nbytes)):
            with no_garbage_collection():
                known: dict[str, InertStorage] = {}
                values = [_Unpickler(cast("IO[bytes]", stream), known).load() for _ in range(5)]
            at = stream.tell()
        magic, protocol, machine, root, keys = values
        _check_head(magic, protocol, machine, where)
        window = FileWindow(file)
        entries = _places(window, at, keys, known)
    return status, ZipDirectory(window, "", entries, hash_head(path), False), root


def _check_head(magic: Any, protocol: Any, machine: Any, where: str) -> None:
    if magic != int.from_bytes(_MAGIC[4:14], "little") or protocol != _PROTOCOL:
        raise BadInputError("a file of torch.save in an unknown form", where=where)
    if type(machine) not in (dict, InertDict) or machine.get("little_endian") is not True:
        raise BadInputError("the file holds big-endian numbers", where=where, expected="little")


def _places(
    window: FileWindow, at: int, keys: Any, known: Mapping[str, InertStorage]
) -> dict[str, tuple[int, int, int, int]]:
    if type(keys) is not list or not all(type(k) is str for k in keys) or set(keys) != set(known):
        raise BadInputError(
            "the storages of the file are not those of its pickle", where=window.name
        )
    entries = {}
    for key in keys:
        storage = known[key]
        dtype = BY_TORCH.get(STORAGE_DTYPES.get(storage.kind, ""))
        numel = int.from_bytes(window.read(at, _LENGTH_NBYTES), "little", signed=True)
        if dtype is None or numel != storage.numel:
            raise BadInputError(
                "a storage is not as long as its pickle says",
                where=window.name,
                expected=f"{storage.numel} elements",
                found=f"{numel}",
            )
        start, nbytes = at + _LENGTH_NBYTES, numel * dtype.itemsize
        if start + nbytes > window.nbytes:
            raise BadInputError(
                "the file is truncated",
                where=window.name,
                expected=f"{start + nbytes} bytes or more",
                found=f"{window.nbytes} bytes",
            )
        entries[f"data/{storage.key}"] = (start, nbytes, 0, 0)
        at = start + nbytes
    if at != window.nbytes:
        raise UnsafeInputError("bytes follow the last storage", where=window.name)
    return entries


class _Unpickler(InertUnpickler):
    """Numbers the storages: here their keys are addresses in the memory of whoever wrote the file."""

    def __init__(self, stream: IO[bytes], known: dict[str, InertStorage]) -> None:
        super().__init__(stream, KEPT, "keep")
        self._known = known

    def persistent_load(self, pid: object) -> InertStorage:
        """Return the record for a storage."""
        if type(pid) is not tuple or len(pid) != 6 or pid[5] is not None:
            raise RefusedPickleError("a persistent id that names no storage")
        key = pid[2]
        if type(key) is not str or len(key) > 40:
            raise RefusedPickleError("a persistent id that names no storage")
        number = self._known[key].key if key in self._known else str(len(self._known))
        storage = super().persistent_load((*pid[:2], number, *pid[3:5]))
        self._known.setdefault(key, storage)
        return storage


class _Limited(io.RawIOBase):
    """The first bytes of a file, and an error behind them."""

    def __init__(self, raw: io.RawIOBase, nbytes: int, where: str) -> None:
        self._readinto: Callable[[Any], int | None] = raw.readinto
        self._left = nbytes
        self._where = where
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return how much was read."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as the file goes."""
        if self._at > self._left:
            raise UnsafeInputError(
                "the pickle is too large",
                where=self._where,
                expected=f"at most {self._left} bytes",
            )
        got = self._readinto(buffer) or 0
        self._at += got
        return got
