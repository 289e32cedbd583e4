"""A range of bytes that can be read at random: a file, a part of a file, or a buffer.

A torch.save zip is a whole file for verl and one item among many inside a DCP ``.distcp``; both are a
window. Reads are ``pread`` into owned bytes: a map would count as resident memory, and would turn a
file that shrinks meanwhile into a SIGBUS.
"""

from __future__ import annotations

from typing import Protocol

from streamconv.errors import BadInputError, SourceChangedError
from streamconv.files.inputs import InputFile


class Window(Protocol):
    """``nbytes`` readable bytes that begin at byte ``base`` of the file that messages call ``name``."""

    name: str
    base: int
    nbytes: int

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return exactly ``nbytes`` bytes from ``offset``, counted from the window's start."""
        ...


class FileWindow:
    """A window over an open file, which stays the caller's to close; over all of it, or a part."""

    __slots__ = ("_file", "base", "name", "nbytes")

    def __init__(self, file: InputFile, base: int = 0, nbytes: int | None = None) -> None:
        self._file = file
        self.name = file.name
        self.base = base
        self.nbytes = file.status.st_size - base if nbytes is None else nbytes

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return exactly ``nbytes`` bytes; raises when they lie outside or the file has shrunk."""
        check_inside(self, offset, nbytes)
        pieces: list[bytes] = []
        position, missing = self.base + offset, nbytes
        while missing:  # one pread returns at most 2 GiB, and may return less
            piece = self._file.pread(missing, position)
            if not piece:
                raise SourceChangedError(
                    "the file became shorter while it was read", where=self.name
                )
            pieces.append(piece)
            position += len(piece)
            missing -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def check_inside(window: Window, offset: int, nbytes: int) -> None:
    """Raise :class:`BadInputError` unless the range lies inside ``window``."""
    if offset < 0 or nbytes < 0 or offset + nbytes > window.nbytes:
        raise BadInputError(
            "the file points outside itself: it is damaged or truncated",
            where=window.name,
            expected=f"at most {window.nbytes} bytes",
            found=f"bytes {offset} to {offset + nbytes}",
        )
