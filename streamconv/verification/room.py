"""Whether the JSON that a verification reads fits the memory budget, told before any of it is parsed.

A folder may come from a stranger, and Python takes up to a hundred times the bytes of a text for what
the text says. What it takes at most follows from the signs in it, and those can be counted in a
stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from streamconv.errors import BudgetError
from streamconv.files.names import MANIFEST
from streamconv.formats.safetensors_file import MAX_HEADER_BYTES
from streamconv.output.manifest import MAX_MANIFEST_BYTES
from streamconv.system import memory
from streamconv.units import format_size

_STEP_BYTES = 1 << 20
# What CPython's objects take at most, by the signs that tell of them: a dict of five slots, a list, an
# item and the number in it, a slot of a large dict while it grows, and half of a string.
_SIGNS = {b"{": 240, b"[": 90, b",": 48, b":": 100, b'"': 26}
_FILE_TENSOR_BYTES = 450  # what is made of a tensor's entry in a header
# Buffers, numpy's temporaries, and the garbage between two collections.
_MARGIN_BYTES = 12 << 20


def check_room(folders: Iterable[Path], budget_bytes: int) -> None:
    """Raise :class:`BudgetError` where the texts of these folders take more than the budget leaves.

    Manifest and headers are held together, other texts one after the other. Texts that are refused
    for their size alone are not counted.
    """
    held = passing = 0
    for folder in folders:
        for path, text_bytes in _texts(folder):
            with path.open("rb") as stream:
                if path.suffix == ".safetensors":
                    stream.seek(8)
                    held += parsed_bytes(stream, text_bytes, _FILE_TENSOR_BYTES)
                elif path.name == MANIFEST:
                    held += parsed_bytes(stream, text_bytes)
                else:
                    passing = max(passing, parsed_bytes(stream, text_bytes))
    need = memory.resident_bytes() + held + passing + _MARGIN_BYTES
    if need > budget_bytes:
        raise BudgetError(
            "the memory budget is too small for what manifest, headers and config say",
            where=", ".join(map(str, folders)),
            expected=f"at least {format_size(need)}",
            found=format_size(budget_bytes),
            hint=f"--max-mem {-(-need // 10**7) * 10}MB is enough for these",
        )


def _texts(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the files that are JSON or begin with it, and how many bytes of it they hold."""
    for path in folder.rglob("*"):
        if path.suffix not in (".json", ".safetensors") or not path.is_file():
            continue
        size, most = path.stat().st_size, MAX_MANIFEST_BYTES
        if path.suffix == ".safetensors":
            with path.open("rb") as stream:
                size, most = int.from_bytes(stream.read(8), "little"), MAX_HEADER_BYTES
        if size <= most:
            yield path, size


def parsed_bytes(stream: IO[bytes], size: int, more: int = 0) -> int:
    """Return what ``size`` bytes of JSON take at most, as text and as objects.

    ``more``: what is made of each object beside it.
    """
    objects = 0
    wide = False
    left = size
    while left and (piece := stream.read(min(left, _STEP_BYTES))):
        left -= len(piece)
        objects += sum(piece.count(sign) * nbytes for sign, nbytes in _SIGNS.items())
        objects += piece.count(b"{") * more
        wide = wide or not piece.isascii() or b"\\u" in piece
    # The bytes, the text, and the strings cut out of it; 4 bytes a character where one needs it.
    return objects + size * (9 if wide else 3)
