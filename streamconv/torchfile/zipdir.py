"""The central directory of a torch.save zip, read strictly: where each record's bytes lie.

Byte layout, back to front: end record (22 bytes, no comment) · ZIP64 locator (20) and ZIP64 end record
(56), which torch always writes and zipfile only past 4 GiB · central directory · records. Each
record is a local header (30 bytes, the name, an extra field) followed by the stored bytes. torch's
writer pads the extra field (``FB`` + ``Z…``) so that the data begin at a multiple of 64 (or of
what the record ``.storage_alignment`` says, since 2.8): ``getPadding`` in
caffe2/serialize/inline_container.cc. So the data's position follows from the directory alone. That
saves one cold read per record; the rule is checked against real local headers of three records of
each file, and where it does not hold (a file packed anew by another tool) every local header is
read. Whoever reads a record later checks its local header with :func:`check_local_header` on the
bytes just before it.

torch's local headers hold zero sizes and CRC (flag bit 3, a data descriptor follows), so sizes and CRCs
are the directory's.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NoReturn

import xxhash

from streamconv.errors import BadInputError, UnsafeInputError
from streamconv.torchfile.window import Window

Entry = tuple[int, int, int, int]
"""(absolute file position of the data, nbytes, CRC-32, bytes of the local header before the data).

A plain tuple: 1024 rank files of 2000 tensors have two million of them.
"""

_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")
_CENTRAL = struct.Struct("<4sxxxxHHxxxxIIIHHHHxxxxxxI")
_LOCAL = struct.Struct("<4sxxHHxxxxIIIHH")
_CENTRAL_NBYTES = 46
_LOCAL_NBYTES = 30

_DESCRIPTOR, _UTF8 = 1 << 3, 1 << 11
_ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
_FORBIDDEN_FLAGS = 0xFFFF & ~(_DESCRIPTOR | _UTF8)
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_TORCH_ALIGNMENT = 64
_MAX_ALIGNMENT = 1 << 14  # header_nbytes must fit 16 bits
_MAX_NAME_NBYTES = 1024
_MAX_DIRECTORY_NBYTES = 1 << 30
_SMALL_NBYTES = 64


class ZipDirectory:
    """What a torch.save zip holds.

    ``prefix`` precedes every entry name (``model_world_size_8_rank_0``), ``entries`` maps the rest of
    the name (``data/17``) to its :data:`Entry`, ``directory_hash`` is the xxh3_128 hex digest of the
    raw central directory, ``checksums`` whether that holds the CRC-32 of every record.
    """

    __slots__ = ("checksums", "directory_hash", "entries", "prefix", "window")

    def __init__(
        self,
        window: Window,
        prefix: str,
        entries: dict[str, Entry],
        directory_hash: str,
        checksums: bool,
    ) -> None:
        self.window = window
        self.prefix = prefix
        self.entries = entries
        self.directory_hash = directory_hash
        self.checksums = checksums

    def read_entry(self, name: str, *, max_nbytes: int) -> bytes:
        """Return the bytes of a small entry, its local header and its CRC-32 checked."""
        window = self.window
        entry = self.entries.get(name)
        if entry is None:
            raise BadInputError(f"no record {name!r} in this torch.save file", where=window.name)
        start, nbytes, crc, header_nbytes = entry
        if nbytes > max_nbytes:
            raise UnsafeInputError(
                f"the record {name!r} is too large",
                where=window.name,
                expected=f"at most {max_nbytes} bytes",
                found=f"{nbytes} bytes",
            )
        raw = window.read(start - header_nbytes - window.base, header_nbytes + nbytes)
        check_local_header(
            raw[:header_nbytes], f"{self.prefix}/{name}", window.name, nbytes=nbytes, crc32=crc
        )
        data = raw[header_nbytes:]
        if crc and zlib.crc32(data) != crc:
            raise BadInputError(
                f"the record {name!r} is damaged: its CRC-32 is wrong",
                where=window.name,
                expected=f"{crc:08x}",
                found=f"{zlib.crc32(data):08x}",
                hint="copy the file again from where it was written",
            )
        return data


def read_directory(window: Window) -> ZipDirectory:
    """Read and check the directory of the zip that fills ``window``.

    Raises :class:`BadInputError` for damage and truncation, :class:`UnsafeInputError` for what only a
    crafted file has (two records of one name, overlaps, bytes hidden behind a second directory).
    """
    directory_offset, directory_nbytes, count = _find_directory(window)
    raw = window.read(directory_offset, directory_nbytes)
    prefix, entries, in_order = _parse(window, raw, count, _TORCH_ALIGNMENT)
    alignment = _storage_alignment(window, entries)
    if alignment != _TORCH_ALIGNMENT:
        prefix, entries, in_order = _parse(window, raw, count, alignment)
    if not _rule_holds(window, entries):
        entries = {name: _real_position(window, entry, name) for name, entry in entries.items()}
        in_order = False
    if not in_order:
        _check_overlaps(window, entries)
    _check_ends(window, entries, directory_offset)
    name = raw[_CENTRAL_NBYTES : _CENTRAL_NBYTES + len(prefix)]
    digest = xxhash.xxh3_128_hexdigest(raw)
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        _damaged(window, "an entry name is not UTF-8")
    return ZipDirectory(window, text[:-1], entries, digest, has_checksums(raw))


def check_local_header(
    header: bytes | memoryview,
    name: str,
    where: str,
    *,
    nbytes: int | None = None,
    crc32: int | None = None,
) -> None:
    """Check the ``header`` bytes that precede a record's data against what the directory said.

    ``name`` is the full entry name, ``where`` the file (and FQN) for messages. The length of
    ``header`` is the distance from the header to the data, so a shifted position shows here. Sizes
    and CRC are compared where they are given and the header holds them.
    """
    if len(header) < _LOCAL_NBYTES:
        raise BadInputError("a local header is cut off", where=where)
    sig, flags, method, crc, csize, usize, name_nbytes, extra_nbytes = _LOCAL.unpack_from(header)
    encoded = name.encode()
    found_name = bytes(header[_LOCAL_NBYTES : _LOCAL_NBYTES + name_nbytes])
    problem: tuple[str, object, object] | None = None
    if sig != b"PK\x03\x04":
        raise BadInputError(
            f"no local header where the record {name!r} should begin: the file is damaged",
            where=where,
        )
    if method:
        problem = ("compression method", 0, method)
    elif flags & _FORBIDDEN_FLAGS:
        problem = ("flags", 0, f"{flags:#06x}")
    elif found_name != encoded:
        problem = ("name", name, found_name.decode("utf-8", "replace")[:80])
    elif _LOCAL_NBYTES + name_nbytes + extra_nbytes != len(header):
        problem = ("data position", len(header), _LOCAL_NBYTES + name_nbytes + extra_nbytes)
    elif not flags & _DESCRIPTOR:
        if crc32 is not None and crc != crc32:
            problem = ("CRC-32", f"{crc32:08x}", f"{crc:08x}")
        elif nbytes is not None and (
            _unless_zip64(csize, nbytes) != nbytes or _unless_zip64(usize, nbytes) != nbytes
        ):
            problem = ("size", nbytes, f"{csize}/{usize}")
    if problem is not None:
        what, expected, found = problem
        raise UnsafeInputError(
            f"the local header of {name!r} contradicts the directory: {what}",
            where=where,
            expected=str(expected),
            found=str(found),
            hint="the file is damaged or was tampered with: copy it again from where it was written",
        )


def _unless_zip64(size: int, otherwise: int) -> int:
    return otherwise if size == _FULL32 else size


def _damaged(window: Window, what: str, **parts: str) -> NoReturn:
    raise BadInputError(
        f"the zip directory is damaged: {what}", where=window.name, **parts
    ) from None


def _find_directory(window: Window) -> tuple[int, int, int]:
    """Return the central directory's (offset, nbytes, number of entries)."""
    end_offset = window.nbytes - _END.size
    if end_offset < 0:
        raise BadInputError(
            "not a torch.save file: too short", where=window.name, found=f"{window.nbytes} bytes"
        )
    tail_nbytes = min(window.nbytes, _END.size + _LOCATOR64.size + _END64.size)
    tail = window.read(window.nbytes - tail_nbytes, tail_nbytes)
    sig, disk, disk_cd, here, count, nbytes, offset, comment_nbytes = _END.unpack_from(
        tail, tail_nbytes - _END.size
    )
    if sig != b"PK\x05\x06":
        _explain_missing_end(window)
    if comment_nbytes:
        _damaged(window, "the end record announces a comment that is not there")
    if disk not in (0, _FULL16) or disk_cd not in (0, _FULL16) or here != count:
        _damaged(window, "it is spread over several disks")
    at = tail_nbytes - _END.size - _LOCATOR64.size
    stop = end_offset
    if at >= 0 and tail[at : at + 4] == b"PK\x06\x07":
        _, disk64, end64_offset, disks = _LOCATOR64.unpack_from(tail, at)
        at64 = at - _END64.size
        stop = end_offset - _LOCATOR64.size - _END64.size
        if at64 < 0 or disk64 or disks != 1 or end64_offset != stop:
            _damaged(window, "the ZIP64 end record is not where it should be")
        sig, size, _, _, disk, disk_cd, here64, count64, nbytes64, offset64 = _END64.unpack_from(
            tail, at64
        )
        if sig != b"PK\x06\x06" or size != _END64.size - 12 or disk or disk_cd:
            _damaged(window, "the ZIP64 end record is malformed")
        if here64 != count64 or not (
            count in (count64, _FULL16)
            and nbytes in (nbytes64, _FULL32)
            and offset in (offset64, _FULL32)
        ):
            _damaged(window, "the two end records disagree")
        count, nbytes, offset = count64, nbytes64, offset64
    if offset + nbytes != stop:
        _damaged(
            window,
            "it is not where it should be",
            expected=f"to end at byte {stop}",
            found=f"bytes {offset} to {offset + nbytes}",
        )
    if nbytes > _MAX_DIRECTORY_NBYTES or count * _CENTRAL_NBYTES > nbytes or not count:
        _damaged(window, f"{count} entries in {nbytes} bytes")
    return offset, nbytes, count


def _explain_missing_end(window: Window) -> NoReturn:
    head = window.read(0, min(window.nbytes, 4))
    tail_nbytes = min(window.nbytes, _FULL16 + _END.size)
    tail = window.read(window.nbytes - tail_nbytes, tail_nbytes)
    if b"PK\x05\x06" in tail:
        raise UnsafeInputError(
            "bytes follow the end of the zip: a comment, or something hidden behind it",
            where=window.name,
        )
    if head == b"PK\x03\x04":
        raise BadInputError(
            "the file is truncated: its zip directory is missing",
            where=window.name,
            hint="copy the file again, or wait until the trainer has written it",
        )
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
        raise BadInputError(
            "the file is in torch's old format (before 1.6, or "
            "_use_new_zipfile_serialization=False), not a zip",
            where=window.name,
            hint="load it with torch.load and save it again with torch.save",
        )
    raise BadInputError("not a torch.save file: no zip", where=window.name)


def _parse(
    window: Window, raw: bytes, count: int, alignment: int
) -> tuple[str, dict[str, Entry], bool]:
    """Return the prefix with its slash, the entries by the alignment rule, and whether in order.

    The one hot loop of this module: some 0.6 µs an entry. latin-1 keeps byte and text positions
    equal; names behind the prefix are ASCII.
    """
    unpack, base, full = _CENTRAL.unpack_from, window.base, _FULL32
    text = raw.decode("latin-1")
    slash = text.find("/", _CENTRAL_NBYTES)
    prefix = text[_CENTRAL_NBYTES : slash + 1]
    if slash < 0 or not prefix[:-1] or len(prefix) > _MAX_NAME_NBYTES:
        _damaged(window, "entry names have no common folder")
    skip = _CENTRAL_NBYTES + len(prefix)
    entries: dict[str, Entry] = {}
    position = end = 0
    in_order = True
    try:
        for _ in range(count):
            (
                sig,
                flags,
                method,
                crc,
                csize,
                nbytes,
                name_nbytes,
                extra_nbytes,
                comment_nbytes,
                disk,
                offset,
            ) = unpack(raw, position)
            stop = position + _CENTRAL_NBYTES + name_nbytes
            name = text[position + skip : stop]
            if (
                sig != b"PK\x01\x02"
                or flags & _FORBIDDEN_FLAGS
                or method
                or comment_nbytes
                or disk
                or name_nbytes > _MAX_NAME_NBYTES
                or text[position + _CENTRAL_NBYTES : position + skip] != prefix
            ):
                _refuse_entry(window, raw, position, prefix)
            if nbytes == full or csize == full or offset == full:
                extra = raw[stop : stop + extra_nbytes]
                nbytes, csize, offset = _zip64(window, extra, nbytes, csize, offset)
            if csize != nbytes:
                _damaged(window, f"{name!r} is stored but has two sizes, {csize} and {nbytes}")
            at = offset + name_nbytes + 34
            if nbytes >= full or offset >= full:  # torch's own ZIP64 extra field comes first
                at += 4 + 16 * (nbytes >= full) + 8 * (offset >= full)
            at += -at % alignment
            if offset < end:
                in_order = False
            end = at + nbytes
            entries[name] = (base + at, nbytes, crc, at - offset)
            position = stop + extra_nbytes
    except struct.error:
        _damaged(window, f"it ends before its {count} entries")
    if position != len(raw):
        _damaged(window, f"{len(raw) - position} bytes follow its {count} entries")
    if len(entries) != count:
        raise UnsafeInputError(
            "two records have the same name: readers would disagree about which one counts",
            where=window.name,
            found=f"{count} entries, {len(entries)} names",
        )
    return prefix, entries, in_order


def _refuse_entry(window: Window, raw: bytes, position: int, prefix: str) -> NoReturn:
    sig, flags, method, *_, name_nbytes, _, comment_nbytes, disk, _ = _CENTRAL.unpack_from(
        raw, position
    )
    start = position + _CENTRAL_NBYTES
    name = raw[start : start + min(name_nbytes, 80)].decode("utf-8", "replace")
    if sig != b"PK\x01\x02":
        _damaged(window, f"no entry at its byte {position}")
    if flags & _ENCRYPTED:
        raise UnsafeInputError(f"the record {name!r} is encrypted", where=window.name)
    if method:
        raise BadInputError(
            f"the record {name!r} is compressed (method {method}); torch.save stores records as they "
            "are",
            where=window.name,
            hint="load the file with torch.load and save it again with torch.save",
        )
    if flags & _FORBIDDEN_FLAGS:
        raise UnsafeInputError(
            f"the record {name!r} has flags that torch never sets",
            where=window.name,
            found=f"{flags:#06x}",
        )
    if comment_nbytes:
        raise UnsafeInputError(f"the record {name!r} has a comment", where=window.name)
    if disk:
        _damaged(window, f"{name!r} lies on disk {disk}")
    if name_nbytes > _MAX_NAME_NBYTES:
        raise UnsafeInputError(
            f"an entry name of {name_nbytes} bytes, {name!r}…", where=window.name
        )
    raise UnsafeInputError(
        "the zip holds more than one folder",
        where=window.name,
        expected=f"names that begin with {prefix!r}",
        found=name,
    )


def _zip64(
    window: Window, extra: bytes, nbytes: int, csize: int, offset: int
) -> tuple[int, int, int]:
    """Replace the fields that are 0xFFFFFFFF by the 64-bit ones of the extra field (id 1)."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra[: at + 4 + length], at + 4))
            wide = [next(values, -1) if v == _FULL32 else v for v in (nbytes, csize, offset)]
            if -1 in wide:
                break
            return wide[0], wide[1], wide[2]
        at += 4 + length
    _damaged(window, "a ZIP64 extra field is missing or too short")


def _storage_alignment(window: Window, entries: dict[str, Entry]) -> int:
    """Return what the record ``.storage_alignment`` says (torch ≥ 2.8), 64 where there is none."""
    name = ".storage_alignment"
    entry = entries.get(name)
    if entry is None:
        return _TORCH_ALIGNMENT
    start, nbytes, _, _ = _real_position(window, entry, name)
    text = window.read(start - window.base, nbytes) if nbytes <= _SMALL_NBYTES else b""
    if not text.isdigit() or not 0 < int(text) <= _MAX_ALIGNMENT:
        _damaged(window, f"the record {name!r} is not alignment")
    return int(text)


def _real_position(window: Window, entry: Entry, name: str) -> Entry:
    """Return ``entry`` with the data position that its local header says."""
    start, nbytes, crc, header_nbytes = entry
    offset = start - header_nbytes - window.base
    sig, *_, name_nbytes, extra_nbytes = _LOCAL.unpack(window.read(offset, _LOCAL_NBYTES))
    if sig != b"PK\x03\x04":
        _damaged(window, f"no local header where {name!r} should begin")
    header_nbytes = _LOCAL_NBYTES + name_nbytes + extra_nbytes
    if header_nbytes > _FULL16:
        raise UnsafeInputError(
            f"the local header of {name!r} has {header_nbytes} bytes", where=window.name
        )
    return (window.base + offset + header_nbytes, nbytes, crc, header_nbytes)


def _rule_holds(window: Window, entries: dict[str, Entry]) -> bool:
    """Whether the alignment rule gives the real positions of the pickle, the first and last record."""
    data = [name for name in entries if name.startswith("data/")]
    names = {"data.pkl", *data[:1], *data[-1:]} & entries.keys()
    return all(_real_position(window, entries[n], n) == entries[n] for n in names)


def _check_overlaps(window: Window, entries: dict[str, Entry]) -> None:
    end, before = 0, ""
    rows = sorted(
        (e[0] - e[3] - window.base, e[0] + e[1] - window.base, n) for n, e in entries.items()
    )
    for begin, stop, name in rows:
        if begin < end:
            raise UnsafeInputError(
                f"the records {before!r} and {name!r} overlap", where=window.name
            )
        end, before = stop, name


def _check_ends(window: Window, entries: dict[str, Entry], directory_offset: int) -> None:
    """The first record begins the file and the last one ends before the directory."""
    first = min(e[0] - e[3] for e in entries.values()) - window.base
    last = max(e[0] + e[1] for e in entries.values()) - window.base
    if first:
        raise UnsafeInputError(f"{first} bytes precede the zip's first record", where=window.name)
    if last > directory_offset:
        _damaged(
            window,
            "a record reaches past the directory: the file is truncated or its sizes are wrong",
            expected=f"at most byte {directory_offset}",
            found=f"byte {last}",
        )


def hash_directory(window: Window) -> tuple[str, bool]:
    """Return the xxh3_128 hex digest of the raw central directory, and whether it holds checksums.

    Nothing is parsed.
    """
    offset, nbytes, _ = _find_directory(window)
    raw = window.read(offset, nbytes)
    return xxhash.xxh3_128_hexdigest(raw), has_checksums(raw)


# A CRC-32 of 0 in an entry that is not empty. May match by chance inside of an entry: then a file
# counts as one without checksums, which is the safe side.
_NO_CRC = re.compile(rb"PK\x01\x02.{12}\0{4}(?!\0{4})", re.DOTALL)


def has_checksums(directory: bytes) -> bool:
    """Whether every record of the raw central directory has a CRC-32."""
    return _NO_CRC.search(directory) is None
