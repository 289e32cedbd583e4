"""Writes zips as torch.save does, and broken ones: every field of every record can lie."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

from streamconv.torchfile.window import check_inside


@dataclass
class E:
    """One record for the writer below; the fields default to what torch writes."""

    name: str
    data: bytes = b""
    method: int = 0
    flags: int = 0x0808
    local_name: str | None = None
    local_method: int | None = None
    local_flags: int | None = None
    shift: int = 0  # added to the local extra length, the data stay where they are
    comment: bytes = b""
    disk: int = 0
    crc: int | None = None
    size: int | None = None  # in the directory
    csize: int | None = None
    offset: int | None = None
    extra: bytes = b""  # in the directory


@dataclass
class Zip:
    """Writes torch-like zips, and broken ones."""

    entries: list[E]
    prefix: str = "archive"
    alignment: int = 64
    count: int | None = None
    zip64: bool = True
    before_directory: bytes = b""
    head: bytes = b""
    positions: dict[str, int] = field(default_factory=dict)

    def bytes(self) -> bytes:
        out = bytearray(self.head)
        central = bytearray()
        for e in self.entries:
            name = f"{self.prefix}/{e.name}".encode() if self.prefix else e.name.encode()
            local = name if e.local_name is None else e.local_name.encode()
            offset = len(out)
            start = offset + 30 + len(local) + 4
            padding = -start % self.alignment
            out += struct.pack(
                "<4sHHHHHIIIHH",
                b"PK\x03\x04",
                0,
                e.flags if e.local_flags is None else e.local_flags,
                e.method if e.local_method is None else e.local_method,
                0,
                0,
                0,
                0,
                0,
                len(local),
                4 + padding + e.shift,
            )
            out += local + b"FB" + struct.pack("<H", padding) + b"Z" * padding
            self.positions[e.name] = len(out)
            out += e.data
            crc = zlib.crc32(e.data) if e.crc is None else e.crc
            size = len(e.data) if e.size is None else e.size
            out += struct.pack("<4sIII", b"PK\x07\x08", crc, len(e.data), len(e.data))
            central += struct.pack(
                "<4sHHHHHHIIIHHHHHII",
                b"PK\x01\x02",
                0,
                0,
                e.flags,
                e.method,
                0,
                0,
                crc,
                size if e.csize is None else e.csize,
                size,
                len(name),
                len(e.extra),
                len(e.comment),
                e.disk,
                0,
                0,
                offset if e.offset is None else e.offset,
            )
            central += name + e.extra + e.comment
        out += self.before_directory
        at, count = len(out), len(self.entries) if self.count is None else self.count
        out += central
        end64 = len(out)
        if self.zip64:
            out += struct.pack(
                "<4sQHHIIQQQQ", b"PK\x06\x06", 44, 0, 0, 0, 0, count, count, len(central), at
            )
            out += struct.pack("<4sIQI", b"PK\x06\x07", 0, end64, 1)
        out += struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(central), at, 0)
        return bytes(out)


class BufferWindow:
    """A window over bytes in memory."""

    __slots__ = ("_buffer", "base", "name", "nbytes")

    def __init__(self, buffer: bytes | memoryview, name: str, base: int = 0) -> None:
        self._buffer = memoryview(buffer)
        self.name = name
        self.base = base
        self.nbytes = len(self._buffer)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return exactly ``nbytes`` bytes; raises when they lie outside."""
        check_inside(self, offset, nbytes)
        return bytes(self._buffer[offset : offset + nbytes])
