"""A folder of torch's distributed checkpoints (DCP): one index, and files of records back to back.

Byte layout: ``.metadata`` (see :mod:`streamconv.torchfile.dcp`) and ``__<rank>_<thread>.distcp``, which
has no header and no index of its own. Each piece of a tensor is one record: a complete torch.save zip
of that piece alone, about 1.5 KB longer than its data. The zip's own directory gives the data's
position and CRC-32, its pickle the strides; both are small and lie at the record's two ends, so that
one read at each boundary between records serves the end of one and the beginning of the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from streamconv.errors import BadInputError, StreamconvError, UnsafeInputError
from streamconv.files.inputs import InputFile, cannot_read, check_regular, opened
from streamconv.formats.assembly import Stored
from streamconv.formats.identity import evidence_of
from streamconv.ir.source import Record, SourceFile
from streamconv.torchfile.archive import check_byteorder
from streamconv.torchfile.dcp import DcpIndex, DcpTensor, Piece
from streamconv.torchfile.unpickle import load_inert, no_garbage_collection
from streamconv.torchfile.values import MALFORMED, tensor_parts
from streamconv.torchfile.window import FileWindow, check_inside
from streamconv.torchfile.zipdir import ZipDirectory, read_directory

INDEX = ".metadata"
_MAX_INDEX_NBYTES = 512 << 20
_STEP_NBYTES = 1 << 20
# A small folder that is copied without its times gets them in any order, one right after the other.
_AT_ONCE_NS = 1_000_000_000
_MAX_PICKLE_NBYTES = 1 << 16
# Enough for what lies behind a record's data (some 700 bytes) and before the next one's.
_AROUND_NBYTES = 4096


def has_index(folder: Path) -> bool:
    """Whether ``folder`` holds a finished checkpoint: the index is written last."""
    return (folder / INDEX).is_file()


def source_files(folder: Path, root: Path) -> tuple[SourceFile, ...]:
    """Return the files of records with size, evidence, and the hash of the index that speaks for them.

    The index holds no checksums. That it names the save by a random id, since torch 2.3, says nothing
    of files that another save into the same folder wrote anew.
    """
    digest = hash_index(folder)
    index = (folder / INDEX).relative_to(root).as_posix()
    files = []
    for path in sorted(folder.glob("*.distcp")):
        # Opening a FIFO would wait for a writer for ever.
        if not path.is_file():
            raise BadInputError("a file of records that is not a regular file", where=str(path))
        status = path.stat()
        files.append(
            SourceFile(
                path.relative_to(root).as_posix(),
                status.st_size,
                status.st_mtime_ns,
                digest,
                _PREFIX,
                index,
                evidence_of(path),
            )
        )
    if not files:
        raise BadInputError(
            "no files of records beside the index", where=str(folder), expected="*.distcp"
        )
    return tuple(files)


def older_index(folder: Path, files: Sequence[SourceFile]) -> tuple[str, ...]:
    """Return a notice where files of records are newer than the index, which torch writes last."""
    written = (folder / INDEX).stat().st_mtime_ns + _AT_ONCE_NS
    newer = [Path(f.path).name for f in files if f.mtime_ns > written]
    if not newer:
        return ()
    notice = (
        f"{len(newer)} of {len(files)} files of records ({newer[0]} among them) are newer than "
        f"{INDEX}, which is written last: unless they were copied without their times, a later save "
        "was not finished, and the weights are of two steps"
    )
    return (notice,)


def hash_index(folder: Path) -> str:
    """Return the digest of the index, which need not fit into memory."""
    path = folder / INDEX
    digest = xxhash.xxh3_128()
    with opened(path) as file:
        _check_size(path, file.status.st_size)
        at = 0
        while piece := file.pread(_STEP_NBYTES, at):
            digest.update(piece)
            at += len(piece)
    return digest.hexdigest()


def _check_size(path: Path, nbytes: int) -> None:
    if nbytes > _MAX_INDEX_NBYTES:
        raise UnsafeInputError(
            "the index is too large",
            where=str(path),
            expected=f"at most {_MAX_INDEX_NBYTES} bytes",
            found=f"{nbytes} bytes",
        )


def read_index_bytes(folder: Path) -> bytes:
    """Return the index as it is stored."""
    path = folder / INDEX
    try:
        status = path.stat()
        check_regular(status.st_mode, path)
        _check_size(path, status.st_size)
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(error, path) from error


def read_index(folder: Path) -> DcpIndex:
    """Return what the index of ``folder`` says."""
    return DcpIndex(read_index_bytes(folder), str(folder / INDEX))


# torch.save into a buffer calls its archive so; a file has one prefix for all its records.
_PREFIX = "archive"


class RecordReader:
    """Finds the data of records; ``files`` are those of the folder, in the order of their numbers."""

    def __init__(self, folder: Path, files: Sequence[SourceFile]) -> None:
        self._folder = folder
        self._numbers = {Path(f.path).name: k for k, f in enumerate(files)}
        # Records of the same shape have the same pickle.
        self._parsed: dict[bytes, tuple[Any, ...]] = {}

    def read(self, tensors: Iterable[DcpTensor]) -> dict[str, list[Stored]]:
        """Return the pieces of each tensor, in the index's order.

        The records are visited in the order of their places. Raises :class:`BadInputError` for
        missing or truncated files and for records that are not what the index says they are.
        """
        found: dict[str, list[Stored | None]] = {}
        places: dict[str, list[tuple[int, int, DcpTensor, Piece]]] = {}
        for tensor in tensors:
            found[tensor.name] = [None] * len(tensor.pieces)
            for k, piece in enumerate(tensor.pieces):
                places.setdefault(piece.file, []).append((piece.offset, k, tensor, piece))
        with no_garbage_collection():
            for name, wanted in sorted(places.items()):
                if name not in self._numbers:
                    raise BadInputError(
                        "a file of records is missing",
                        where=str(self._folder / name),
                        expected=f"the pieces of {len({t.name for _, _, t, _ in wanted})} tensors",
                        found="no such file",
                        hint="copy the whole folder, of every node that wrote to it",
                    )
                wanted.sort(key=lambda w: (w[0], w[2].name))
                with opened(self._folder / name) as file:
                    edges = _Edges(file)
                    for _, k, tensor, piece in wanted:
                        found[tensor.name][k] = self._stored(edges, tensor, piece)
        return {name: [s for s in pieces if s is not None] for name, pieces in found.items()}

    def _stored(self, edges: _Edges, tensor: DcpTensor, piece: Piece) -> Stored:
        window = _RecordWindow(edges, piece.offset, piece.nbytes)
        try:
            check_inside(edges.whole, piece.offset, piece.nbytes)
            directory = read_directory(window)
            if directory.prefix != _PREFIX:
                raise BadInputError(
                    "a record that torch's checkpoint writer did not write",
                    expected=f"entries in the folder {_PREFIX!r}",
                    found=repr(directory.prefix[:80]),
                )
            check_byteorder(directory)
            dtype, key, numel, offset, shape, strides = self._view(directory, window)
            if dtype is not tensor.dtype or shape != piece.box.sizes:
                raise BadInputError(
                    "a record holds another tensor than the index says",
                    expected=f"{tensor.dtype} {list(piece.box.sizes)}",
                    found=f"{dtype} {list(shape)}",
                )
            entry = directory.entries.get(f"data/{key}")
            if entry is None or entry[1] != numel * dtype.itemsize:
                raise BadInputError(
                    "a record's data are not as long as its pickle says",
                    expected=f"{numel * dtype.itemsize} bytes",
                    found=f"{entry[1]} bytes" if entry else "no data",
                )
        except StreamconvError as error:
            error.where = f"{edges.whole.name} at byte {piece.offset}, {tensor.name}"
            error.hint = error.hint or (
                "the file is damaged, was cut short or belongs to another save: copy the whole folder "
                "again, .metadata too"
            )
            raise
        start, nbytes, crc, header_nbytes = entry
        record = Record(
            self._numbers[piece.file], key, start, nbytes, crc if nbytes else 0, header_nbytes
        )
        return Stored(piece.box, strides, offset, record)

    def _view(self, directory: ZipDirectory, window: _RecordWindow) -> tuple[Any, ...]:
        """Return (dtype, storage key, elements stored, offset, shape, strides) of a record."""
        data = directory.read_entry("data.pkl", max_nbytes=_MAX_PICKLE_NBYTES)
        parsed = self._parsed.get(data)
        if parsed is None:
            try:
                dtype, storage, numel, offset, shape, strides = tensor_parts(
                    load_inert(data, window.name)
                )
                key = int(storage.key)
                numbers = (*shape, *strides, offset, key)
                if not all(type(n) is int and n >= 0 for n in numbers) or key >> 32:
                    raise ValueError
            except MALFORMED:
                raise BadInputError(
                    "a record holds no tensor that torch could have saved"
                ) from None
            parsed = self._parsed[data] = (dtype, key, numel, offset, shape, strides)
        return parsed


class _Edges:
    """An open file of records; what was read around the last two places is kept."""

    def __init__(self, file: InputFile) -> None:
        self.whole = FileWindow(file)
        self._kept: list[tuple[int, bytes]] = []

    def read(self, start: int, nbytes: int) -> bytes:
        """Return ``nbytes`` bytes from ``start``, which the caller has checked."""
        end = start + nbytes
        for begin, data in self._kept:
            if begin <= start and end <= begin + len(data):
                return data[start - begin : end - begin]
        if nbytes >= _AROUND_NBYTES:
            return self.whole.read(start, nbytes)
        begin = max(0, end - _AROUND_NBYTES)
        data = self.whole.read(begin, min(self.whole.nbytes, end + _AROUND_NBYTES) - begin)
        self._kept = [(begin, data), *self._kept[:1]]
        return data[start - begin : end - begin]


class _RecordWindow:
    """One record of a file, as a window."""

    __slots__ = ("_edges", "base", "name", "nbytes")

    def __init__(self, edges: _Edges, base: int, nbytes: int) -> None:
        self._edges = edges
        self.name = edges.whole.name
        self.base = base
        self.nbytes = nbytes

    def read(self, offset: int, nbytes: int) -> bytes:
        check_inside(self, offset, nbytes)
        return self._edges.read(self.base + offset, nbytes)
