"""What is known of an output file that is written, and of the records that it shares with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, NamedTuple

from streamconv.ir.source import Record


@dataclass(frozen=True, slots=True)
class FinishedFile:
    """An output file that is written: its size, digests, and the digest of each tensor's bytes.

    ``keyed`` is the hash with the seed that was asked for.
    """

    name: str
    nbytes: int
    xxh3: str
    sha256: str | None
    tensors: dict[str, str] = field(default_factory=dict)
    keyed: str = ""


class SharedRecord(NamedTuple):
    """What the writer of one output file saw of a record that others draw from, too.

    ``fqn`` is a tensor in it, ``seen`` are (start, end, CRC-32) of its bytes.
    """

    fqn: str
    record: Record
    seen: list[tuple[int, int, int]]

    def to_json(self) -> list[Any]:
        """Return it as plain data."""
        return [self.fqn, astuple(self.record), self.seen]

    @staticmethod
    def from_json(data: Sequence[Any]) -> SharedRecord:
        """Rebuild it from :meth:`to_json`."""
        fqn, record, seen = data
        return SharedRecord(fqn, Record(*record), [(lo, hi, crc) for lo, hi, crc in seen])
