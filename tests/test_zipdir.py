"""The zip directory reader: what torch writes, and every way in which a zip can lie."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable

import pytest
import torch
import xxhash

from scripts.makers.zips import BufferWindow, E, Zip
from streamconv.errors import BadInputError, SourceChangedError, UnsafeInputError
from streamconv.files.inputs import LocalFile
from streamconv.torchfile.window import FileWindow
from streamconv.torchfile.zipdir import ZipDirectory, check_local_header, read_directory


def read(data: bytes, base: int = 0) -> ZipDirectory:
    return read_directory(BufferWindow(data, "file.pt", base))


def usual() -> list[E]:
    return [E("data.pkl", b"\x80\x02N."), E("byteorder", b"little"), E("data/0", b"abcd" * 9)]


# --- what is right -------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [1, 4, 64, 4096])
@pytest.mark.parametrize("zip64", [True, False])
def test_literal(alignment: int, zip64: bool) -> None:
    entries = [*usual(), E(".storage_alignment", str(alignment).encode())]
    made = Zip(entries, alignment=alignment, zip64=zip64)
    data = made.bytes()
    found = read(data, base=1000)
    assert found.prefix == "archive"
    for e in entries:
        start, nbytes, crc, header = found.entries[e.name]
        assert start == 1000 + made.positions[e.name]
        assert data[start - 1000 : start - 1000 + nbytes] == e.data
        assert crc == zlib.crc32(e.data)
        assert data[start - 1000 - header :][:4] == b"PK\x03\x04"


def test_alignment_without_its_record() -> None:
    """A file aligned otherwise, that does not say so: the rule fails and headers are read."""
    made = Zip(usual(), alignment=16)
    made.bytes()
    found = read(made.bytes())
    assert {n: e[0] for n, e in found.entries.items()} == made.positions


@pytest.mark.parametrize("name", ["model_world_size_1_rank_0.pt", "名前.pt", "a.b c.pt"])
def test_what_torch_writes(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("torch") / name
    torch.save({str(k): torch.arange(k + 1) for k in range(40)}, path)
    fd = os.open(path, os.O_RDONLY)
    found = read_directory(FileWindow(LocalFile(fd, str(path))))
    with zipfile.ZipFile(path) as peer:
        for info in peer.infolist():
            prefix, _, rest = info.filename.partition("/")
            assert prefix == found.prefix
            start, nbytes, crc, _ = found.entries[rest]
            assert os.pread(fd, nbytes, start) == peer.read(info)
            assert crc == info.CRC
        assert len(found.entries) == len(peer.infolist())
    os.close(fd)


def test_repacked_by_zipfile() -> None:
    source = io.BytesIO()
    torch.save({"a": torch.arange(50), "b": torch.ones(3)}, source)
    out = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w") as new:
        for info in reversed(old.infolist()):
            new.writestr(info.filename, old.read(info))
    found = read(out.getvalue())
    assert out.getvalue()[found.entries["data/0"][0] :][:8] == bytes(8)
    assert found.read_entry("byteorder", max_nbytes=99) == b"little"


def test_inside_another_file() -> None:
    made = Zip(usual())
    data = b"x" * 777 + made.bytes() + b"y" * 55
    inner = BufferWindow(memoryview(data)[777:-55], "a.distcp", 777)
    assert read_directory(inner).entries["data/0"][0] == 777 + made.positions["data/0"]


def test_directory_hash() -> None:
    data = Zip(usual(), zip64=False).bytes()
    at = data.index(b"PK\x01\x02")
    assert read(data).directory_hash == xxhash.xxh3_128_hexdigest(data[at:-22])
    changed = Zip([*usual()[:2], E("data/0", b"abcd" * 8 + b"abce")], zip64=False).bytes()
    assert read(changed).directory_hash != read(data).directory_hash


class Sparse:
    """A window of 12 GiB of which only some bytes exist."""

    name, base = "sparse", 0

    def __init__(self, nbytes: int, parts: dict[int, bytes]) -> None:
        self.nbytes, self.parts = nbytes, parts

    def read(self, offset: int, nbytes: int) -> bytes:
        for at, part in self.parts.items():
            if at <= offset and offset + nbytes <= at + len(part):
                return part[offset - at : offset - at + nbytes]
        raise AssertionError(f"a read of {nbytes} bytes at {offset}")


def test_zip64_positions() -> None:
    """A record of 5 GiB, one before and one after 4 GiB: torch's own ZIP64 extra shifts the data."""
    big, parts, central = 5 << 30, {}, b""
    offset = 0
    expected = {}
    for name, size in (("data.pkl", 4), ("data/0", big), ("data/1", 8)):
        full = f"a/{name}".encode()
        wide = 4 * (size >= 0xFFFFFFFF or offset >= 0xFFFFFFFF)
        wide += 16 * (size >= 0xFFFFFFFF) + 8 * (offset >= 0xFFFFFFFF)
        start = offset + 30 + len(full) + 4 + wide
        start += -start % 64
        header = struct.pack(
            "<4sHHHHHIIIHH", b"PK\x03\x04", 0, 0x808, 0, 0, 0, 0, 0, 0, len(full),
            start - offset - 30 - len(full),
        )  # fmt: skip
        parts[offset] = header + full
        expected[name] = (start, size, 7, start - offset)
        extra = b""
        if wide:
            values = [size, size] if size >= 0xFFFFFFFF else []
            values += [offset] if offset >= 0xFFFFFFFF else []
            extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)
        narrow = min(size, 0xFFFFFFFF), min(size, 0xFFFFFFFF)
        central += struct.pack(
            "<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 0, 0, 0x808, 0, 0, 0, 7, *narrow,
            len(full), len(extra), 0, 0, 0, 0, min(offset, 0xFFFFFFFF),
        ) + full + extra  # fmt: skip
        offset = start + size + 24
    ends = struct.pack(
        "<4sQHHIIQQQQ", b"PK\x06\x06", 44, 0, 0, 0, 0, 3, 3, len(central), offset
    ) + struct.pack("<4sIQI", b"PK\x06\x07", 0, offset + len(central), 1)
    ends += struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 3, 3, len(central), 0xFFFFFFFF, 0)
    parts[offset] = central + ends
    window = Sparse(offset + len(central) + len(ends), parts)
    assert read_directory(window).entries == expected


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 21, 22, 50, 100, 300])
def test_truncated(keep: int) -> None:
    with pytest.raises(BadInputError):
        read(Zip(usual()).bytes()[:keep])


def test_every_truncation() -> None:
    data = Zip(usual()).bytes()
    for keep in range(len(data)):
        with pytest.raises((BadInputError, UnsafeInputError)):
            read(data[:keep])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too short"),
        (b"\x80\x02" + b"x" * 500, "old format"),
        (b"PK\x03\x04" + b"x" * 500, "truncated"),
        (b"x" * 500, "no zip"),
        (b"\0" * 5000, "no zip"),
    ],
)
def test_no_zip(data: bytes, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        read(data)


def bad_count(n: int) -> bytes:
    return Zip(usual(), count=n).bytes()


def test_wrong_counts() -> None:
    for count in (0, 1, 2, 4, 5, 65535):
        with pytest.raises(BadInputError, match="directory is damaged"):
            read(bad_count(count))


@pytest.mark.parametrize("delta", [-64, -1, 1, 2, 64])
@pytest.mark.parametrize("zip64", [True, False])
def test_directory_elsewhere(delta: int, zip64: bool) -> None:
    data = bytearray(Zip(usual(), zip64=zip64).bytes())
    at = len(data) - 22 - 20 - 56 + 48 if zip64 else len(data) - 6
    kind = "<Q" if zip64 else "<I"
    (offset,) = struct.unpack_from(kind, data, at)
    struct.pack_into(kind, data, at, offset + delta)
    with pytest.raises(BadInputError):
        read(bytes(data))


@pytest.mark.parametrize("at", [0, 4, 8, 16])
def test_broken_locator(at: int) -> None:
    data = bytearray(Zip(usual()).bytes())
    data[len(data) - 42 + at] ^= 0x41
    with pytest.raises(BadInputError):
        read(bytes(data))


@pytest.mark.parametrize(
    "entry",
    [
        E("data/1", b"abcd", size=10**6),
        E("data/1", b"abcd", size=0xFFFFFFFE),
        E("data/1", b"abcd", offset=10**6),
        E("data/1", b"abcd", size=0xFFFFFFFF),
        E("data/1", b"abcd", size=0xFFFFFFFF, extra=struct.pack("<HHQQ", 1, 16, 2**63, 2**63)),
        E("data/1", b"abcd", size=0xFFFFFFFF, extra=struct.pack("<HHQ", 1, 8, 4)),
        E("data/1", b"abcd", offset=0xFFFFFFFF, extra=struct.pack("<HHQ", 1, 8, 2**64 - 1)),
        E("data/1", b"abcd", csize=3),
        E("data/1", b"abcd", disk=1),
        E("data/1", b"abcd", extra=b"xyz", size=0xFFFFFFFF),
    ],
)
def test_entry_out_of_bounds(entry: E) -> None:
    with pytest.raises(BadInputError):
        read(Zip([*usual(), entry]).bytes())


@pytest.mark.parametrize("text", [b"0", b"-64", b"", b"64.0", b"99999999", b"x" * 200])
def test_bad_alignment(text: bytes) -> None:
    with pytest.raises(BadInputError):
        read(Zip([*usual(), E(".storage_alignment", text)]).bytes())


def test_entry_with_a_wrong_crc() -> None:
    found = read(Zip([E("data.pkl", b"abc", crc=1)]).bytes())
    with pytest.raises(BadInputError, match="CRC-32 is wrong"):
        found.read_entry("data.pkl", max_nbytes=9)
    assert (
        read(Zip([E("data.pkl", b"abc", crc=0)]).bytes()).read_entry("data.pkl", max_nbytes=9)
        == b"abc"
    )


def test_missing_entry() -> None:
    with pytest.raises(BadInputError, match=r"no record 'data\.pkl'"):
        read(Zip([E("x", b"abc")]).bytes()).read_entry("data.pkl", max_nbytes=9)


def test_file_that_shrinks(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("t") / "a.pt"
    path.write_bytes(Zip(usual()).bytes())
    size = path.stat().st_size
    fd = os.open(path, os.O_RDWR)
    os.ftruncate(fd, 10)
    with pytest.raises(SourceChangedError):
        read_directory(FileWindow(LocalFile(fd, "a.pt"), 0, size))
    os.close(fd)


# --- tricks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: Zip([*usual(), E("data/0", b"other")]),
        lambda: Zip([*usual(), E("data/0", b"abcd" * 9)]),
        lambda: Zip([E("data.pkl", b"N."), *usual()]),
        lambda: Zip([*usual(), E("byteorder", b"big")]),
        lambda: Zip([*usual(), E("data/1"), E("data/1")]),
    ],
)
def test_duplicate_names(make: Callable[[], Zip]) -> None:
    with pytest.raises(UnsafeInputError, match="same name"):
        read(make().bytes())


@pytest.mark.parametrize(
    "name", ["other/data/0", "data/0", "/x", "archivex/data/0", "../archive/x"]
)
def test_several_prefixes(name: str) -> None:
    data = Zip(
        [E("archive/data.pkl", b"N."), E("archive/data/0", b"abcd"), E(name, b"x")], prefix=""
    )
    with pytest.raises(UnsafeInputError, match="more than one folder"):
        read(data.bytes())


@pytest.mark.parametrize("offset", [0, 1, 64, 200, 300])
def test_overlaps(offset: int) -> None:
    entries = [*usual(), E("data/1", b"abcd" * 9, offset=offset), E("data/2", b"abcd")]
    with pytest.raises((UnsafeInputError, BadInputError), match=r"overlap|local header"):
        read(Zip(entries).bytes())


def test_two_names_for_one_record() -> None:
    made = Zip(usual())
    made.bytes()
    header = made.positions["data/0"] - 64
    entries = [*usual(), E("data/1", b"abcd" * 9, offset=header)]
    with pytest.raises((UnsafeInputError, BadInputError)):
        read(Zip(entries).bytes())


@pytest.mark.parametrize("method", [1, 8, 12, 14, 93])
def test_compressed(method: int) -> None:
    with pytest.raises(BadInputError, match="compressed"):
        read(Zip([*usual(), E("data/1", b"x", method=method)]).bytes())


@pytest.mark.parametrize("flag", [1 << 0, 1 << 6, 1 << 13])
def test_encrypted(flag: int) -> None:
    with pytest.raises(UnsafeInputError, match="encrypted"):
        read(Zip([*usual(), E("data/1", b"x", flags=0x808 | flag)]).bytes())


@pytest.mark.parametrize("flag", [1 << 1, 1 << 4, 1 << 5, 1 << 12, 1 << 15])
def test_unknown_flags(flag: int) -> None:
    with pytest.raises(UnsafeInputError, match="flags"):
        read(Zip([*usual(), E("data/1", b"x", flags=0x808 | flag)]).bytes())


@pytest.mark.parametrize(
    "tail", [b"x", b"\0" * 22, b"junk" * 50, Zip(usual()).bytes(), b"PK\x05\x06"]
)
def test_bytes_after_the_end(tail: bytes) -> None:
    data = Zip(usual()).bytes() + tail
    if tail[:2] == b"PK" and len(tail) > 100:  # a second zip: its offsets are not from the start
        with pytest.raises(BadInputError, match="not where it should be"):
            read(data)
    else:
        with pytest.raises(UnsafeInputError, match="bytes follow the end"):
            read(data)


def test_file_comment() -> None:
    data = Zip(usual()).bytes()
    with pytest.raises(UnsafeInputError, match="bytes follow the end"):
        read(data[:-2] + b"\x05\x00hello")
    with pytest.raises(BadInputError, match="comment"):
        read(data[:-2] + b"\x05\x00")


@pytest.mark.parametrize("comment", [b"x", b"x" * 100])
def test_entry_comment(comment: bytes) -> None:
    with pytest.raises(UnsafeInputError, match="comment"):
        read(Zip([*usual(), E("data/1", b"x", comment=comment)]).bytes())


@pytest.mark.parametrize("head", [b"x", b"#!/bin/sh\n", b"\0" * 64, b"PK\x03\x04", b"MZ" * 500])
def test_bytes_before_the_first_record(head: bytes) -> None:
    with pytest.raises(UnsafeInputError, match="precede"):
        read(Zip(usual(), head=head).bytes())


def test_bytes_between_directory_and_end() -> None:
    data = Zip(usual(), zip64=False).bytes()
    with pytest.raises(BadInputError, match="not where it should be"):
        read(data[:-22] + b"hidden" + data[-22:])


def test_long_names() -> None:
    with pytest.raises(UnsafeInputError, match="entry name"):
        read(Zip([*usual(), E("x" * 2000)]).bytes())


# --- local headers -------------------------------------------------------------------------------

NAME = "archive/data/0"


def header(**changes: object) -> bytes:
    entry = E("data/0", b"abcd", **changes)  # type: ignore[arg-type]
    made = Zip([entry])
    data = made.bytes()
    return data[: made.positions["data/0"]]


def test_right_header() -> None:
    check_local_header(header(), NAME, "f")
    check_local_header(header(), NAME, "f", nbytes=4, crc32=zlib.crc32(b"abcd"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_name": "archive/data/1"}, "name"),
        ({"local_name": "data/0"}, "name"),
        ({"local_name": "archive/data/0x"}, "name"),
        ({"local_name": "ARCHIVE/data/0"}, "name"),
        ({"local_name": ""}, "name"),
        ({"local_method": 8}, "compression method"),
        ({"local_flags": 0x809}, "flags"),
        ({"local_flags": 0xFFFF}, "flags"),
        ({"shift": 4}, "data position"),
        ({"shift": -4}, "data position"),
        ({"shift": 64}, "data position"),
        ({"shift": -1}, "data position"),
        ({"local_flags": 0x800}, "CRC-32"),
    ],
)
def test_header_that_disagrees(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UnsafeInputError, match=f"contradicts the directory: {message}"):
        check_local_header(header(**changes), NAME, "f.pt, w", nbytes=4, crc32=zlib.crc32(b"abcd"))


def test_no_header() -> None:
    with pytest.raises(BadInputError, match="no local header"):
        check_local_header(b"\0" * 64, NAME, "f")
    with pytest.raises(BadInputError, match="cut off"):
        check_local_header(b"PK\x03\x04", NAME, "f")


def test_shifted_header_shows_in_the_sampled_records() -> None:
    """The first and last data record are looked at: the real position replaces the computed one."""
    made = Zip([E("data.pkl", b"N."), E("data/0", b"abcd" * 30, shift=4)])
    data = made.bytes()
    assert read(data).entries["data/0"][0] == made.positions["data/0"] + 4


def test_sizes_in_the_header() -> None:
    raw = bytearray(header(local_flags=0x800))
    struct.pack_into("<III", raw, 14, zlib.crc32(b"abcd"), 4, 4)
    check_local_header(raw, NAME, "f", nbytes=4, crc32=zlib.crc32(b"abcd"))
    struct.pack_into("<II", raw, 18, 5, 4)
    with pytest.raises(UnsafeInputError, match="size"):
        check_local_header(raw, NAME, "f", nbytes=4, crc32=zlib.crc32(b"abcd"))
