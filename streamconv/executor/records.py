"""Checks of the source records that a run reads: their local headers and their CRC-32.

torch.load checks neither. A record is checked as its bytes pass, in whatever order, and the bytes
that no output wanted (the padding of an uneven shard, rows of a padded vocabulary) are read at the
end for the checksum's sake alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from streamconv.errors import BadInputError
from streamconv.executor.reader import SourceReader
from streamconv.ir.planned import PlannedSource
from streamconv.ir.source import Record
from streamconv.torchfile.crc import Coverage
from streamconv.torchfile.zipdir import check_local_header

_STEP_BYTES = 1 << 20


@dataclass
class _Seen:
    coverage: Coverage
    verified: bool = False
    header: bool = False  # checked, and right
    lock: threading.Lock = field(default_factory=threading.Lock)


class RecordChecks:
    """Follows every record from its first byte to its verdict.

    ``unverifiable_bytes`` counts records whose writer stored no checksum. With ``check_crc`` off
    only headers are checked.
    """

    def __init__(self, reader: SourceReader, *, check_crc: bool = True) -> None:
        self._reader = reader
        self._check_crc = check_crc
        self._seen: dict[tuple[int, int], _Seen] = {}
        # Records that finish had to complete: several tensors may be views of one storage, and it
        # should not be read again for each of them.
        self._completed: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self.unverifiable_bytes = 0

    def see(
        self,
        source: PlannedSource,
        record: Record,
        lo: int,
        data: memoryview,
        header: memoryview | None = None,
    ) -> None:
        """Take in ``data``, which lies at byte ``lo`` of the record's file.

        What lies outside the record is ignored. ``header`` is the record's local header where the
        caller has read it too; it is read here where it is needed and not given. Raises
        :class:`BadInputError` for a wrong header or checksum, naming file, tensor and record.
        """
        key = (record.file, record.start)
        if key in self._completed:
            return
        with self._lock:
            seen = self._seen.get(key)
            if seen is None:
                seen = self._seen[key] = _Seen(Coverage())
        if not seen.header:
            # Whoever reads the record meanwhile waits, and one that is wrong is wrong every time.
            with seen.lock:
                if not seen.header:
                    self._check_header(source, record, header)
                    seen.header = True
        if not self._check_crc or seen.verified:
            return
        begin, end = max(lo, record.start), min(lo + len(data), record.start + record.nbytes)
        if begin >= end:
            return
        with seen.lock:
            seen.coverage.add(begin - record.start, data[begin - lo : end - lo])
            crc = seen.coverage.whole(record.nbytes)
            if crc is not None:
                self._verdict(source, record, crc)
                seen.verified = True
                seen.coverage = Coverage()

    def finish(self, records: Iterable[tuple[PlannedSource, Record]]) -> None:
        """Complete the records that were read in part, and forget them all.

        Each comes with a tensor that it holds.
        """
        buffer: memoryview | None = None
        for source, record in records:
            seen = self._seen.get((record.file, record.start))
            if seen is None:
                continue
            if self._check_crc and not seen.verified:
                buffer = buffer or memoryview(bytearray(_STEP_BYTES))
                for lo, hi in list(seen.coverage.missing(record.nbytes)):
                    for at in range(lo, hi, _STEP_BYTES):
                        piece = buffer[: min(_STEP_BYTES, hi - at)]
                        self._reader.read(record.file, record.start + at, piece)
                        self.see(source, record, record.start + at, piece)
                self._completed.add((record.file, record.start))
            self._seen.pop((record.file, record.start), None)

    def _check_header(
        self, source: PlannedSource, record: Record, header: memoryview | None
    ) -> None:
        if not record.header_nbytes:
            return
        if header is None:
            header = memoryview(bytearray(record.header_nbytes))
            self._reader.read(record.file, record.start - record.header_nbytes, header)
        check_local_header(header, self._name(record), self._where(source, record))

    def _verdict(self, source: PlannedSource, record: Record, crc: int) -> None:
        if crc == record.crc32:
            return
        if record.crc32 == 0:
            self.unverifiable_bytes += record.nbytes
            return
        raise BadInputError(
            "a source record is damaged: its bytes do not match their CRC-32",
            where=self._where(source, record),
            expected=f"{record.crc32:08x}",
            found=f"{crc:08x}",
            hint="copy the file again from where it was made; --no-source-crc converts it as it is",
        )

    def _name(self, record: Record) -> str:
        return f"{self._reader.files[record.file].entry_prefix}/data/{record.key}"

    def _where(self, source: PlannedSource, record: Record) -> str:
        return f"{self._reader.path(record.file)}, {source.fqn}, record {self._name(record)}"

    def journal(self) -> list[list[Any]]:
        """Return what is known of records that are not yet complete, as plain data."""
        return [
            [file, start, seen.verified, seen.coverage.intervals()]
            for (file, start), seen in self._seen.items()
        ]

    def restore(self, journal: Iterable[list[Any]]) -> None:
        """Go on from :meth:`journal`, in place of what is known now."""
        self._seen = {
            (file, start): _Seen(Coverage(tuple(i) for i in intervals), verified, header=True)
            for file, start, verified, intervals in journal
        }
