"""Checks of the source records that a run reads: their local headers and their CRC-32.

torch.load checks neither. A record is checked as its bytes pass, in whatever order, and the bytes
that no output wanted (the padding of an uneven shard, rows of a padded vocabulary) are read at the
end for the checksum's sake alone. Of a record that several output files draw from, each of which may be
written elsewhere, every one keeps what it saw, and all of that is put together in the end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from streamconv.errors import BadInputError, SourceChangedError
from streamconv.executor.reader import Source
from streamconv.ir.finished import SharedRecord
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
    """Follows every record from its first byte to its verdict, while an output file is written.

    ``unverifiable_bytes`` counts records whose writer stored no checksum. With ``check_crc`` off
    only headers are checked.
    """

    def __init__(self, reader: Source, *, check_crc: bool = True) -> None:
        self._reader = reader
        self._check_crc = check_crc
        self._seen: dict[tuple[int, int], _Seen] = {}
        # Records that finish had to complete: several tensors may be views of one storage, and it
        # should not be read again for each of them.
        self._completed: set[tuple[int, int]] = set()
        self._shared: dict[tuple[int, int], tuple[str, Record] | None] = {}
        self._lock = threading.Lock()
        self.unverifiable_bytes = 0

    def begin(self, shared: Iterable[tuple[int, int]]) -> None:
        """Begin an output file; of the records ``shared``, as (file, start), others see a part."""
        self._seen, self._completed = {}, set()
        self._shared = dict.fromkeys(shared)

    def shared(self) -> list[SharedRecord]:
        """Return what was seen of the shared records since the output file was begun."""
        return [
            SharedRecord(*of, self._seen[key].coverage.intervals())
            for key, of in self._shared.items()
            if of is not None
        ]

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
        shared = key in self._shared
        if shared and self._shared[key] is None:
            self._shared[key] = source.fqn, record
        begin, end = max(lo, record.start), min(lo + len(data), record.start + record.nbytes)
        if begin >= end:
            return
        with seen.lock:
            seen.coverage.add(begin - record.start, data[begin - lo : end - lo])
            crc = None if shared else seen.coverage.whole(record.nbytes)
            if crc is not None:
                self.unverifiable_bytes += _verdict(self._reader, source.fqn, record, crc)
                seen.verified = True
                seen.coverage = Coverage()

    def finish(self, records: Iterable[tuple[PlannedSource, Record]]) -> None:
        """Complete the records that were read in part, and forget them all.

        Each comes with a tensor that it holds.
        """
        buffer: memoryview | None = None
        for source, record in records:
            key = record.file, record.start
            seen = None if key in self._shared else self._seen.get(key)
            if seen is None:
                continue
            if self._check_crc and not seen.verified:
                buffer = buffer or memoryview(bytearray(_STEP_BYTES))
                for lo, hi in list(seen.coverage.missing(record.nbytes)):
                    for at in range(lo, hi, _STEP_BYTES):
                        piece = buffer[: min(_STEP_BYTES, hi - at)]
                        self._reader.read(record.file, record.start + at, piece)
                        self.see(source, record, record.start + at, piece)
                self._completed.add(key)
            self._seen.pop(key, None)

    def _check_header(
        self, source: PlannedSource, record: Record, header: memoryview | None
    ) -> None:
        if not record.header_nbytes:
            return
        if header is None:
            header = memoryview(bytearray(record.header_nbytes))
            self._reader.read(record.file, record.start - record.header_nbytes, header)
        name = _name(self._reader, record)
        try:
            check_local_header(header, name, _where(self._reader, source.fqn, record))
        except BadInputError:
            self._reader.check_same(record.file)
            raise


class SharedRecords:
    """What the writers of all output files saw of the records that they share, put together."""

    def __init__(self, reader: Source) -> None:
        self._reader = reader
        self._found: dict[tuple[int, int], tuple[str, Record, Coverage]] = {}

    def add(self, records: Iterable[SharedRecord]) -> None:
        """Take in what was seen while one output file was written.

        Raises :class:`SourceChangedError` where another writer read other bytes at the same place.
        """
        for fqn, record, seen in records:
            key = record.file, record.start
            known = self._found.setdefault(key, (fqn, record, Coverage()))
            try:
                known[2].merge(seen)
            except ValueError as error:
                raise SourceChangedError(
                    "a source record was read twice and its bytes differ",
                    where=_where(self._reader, fqn, record),
                    found=str(error),
                    hint="convert again from the beginning, once nothing writes to the source",
                ) from None

    def settle(self) -> int:
        """Read what nobody saw, and judge every record; return the bytes without a checksum.

        Raises :class:`BadInputError` for a wrong checksum, naming file, tensor and record.
        """
        unverifiable = 0
        buffer = memoryview(bytearray(_STEP_BYTES)) if self._found else memoryview(b"")
        for fqn, record, coverage in self._found.values():
            for lo, hi in list(coverage.missing(record.nbytes)):
                for at in range(lo, hi, _STEP_BYTES):
                    piece = buffer[: min(_STEP_BYTES, hi - at)]
                    self._reader.read(record.file, record.start + at, piece)
                    coverage.add(at, piece)
            crc = coverage.whole(record.nbytes)
            assert crc is not None  # noqa: S101 - nothing is missing any more
            unverifiable += _verdict(self._reader, fqn, record, crc)
        return unverifiable


def _verdict(reader: Source, fqn: str, record: Record, crc: int) -> int:
    """Hold the CRC-32 of a record's bytes against the stored one; ``fqn`` is a tensor in it.

    Returns the bytes that cannot be verified, as their writer stored none.
    """
    if crc == record.crc32:
        return 0
    if record.crc32 == 0:
        return record.nbytes
    reader.check_same(record.file)
    raise BadInputError(
        "a source record is damaged: its bytes do not match their CRC-32",
        where=_where(reader, fqn, record),
        expected=f"{record.crc32:08x}",
        found=f"{crc:08x}",
        hint="copy the file again from where it was made; --no-source-crc converts it as it is",
    )


def _name(reader: Source, record: Record) -> str:
    return f"{reader.files[record.file].entry_prefix}/data/{record.key}"


def _where(reader: Source, fqn: str, record: Record) -> str:
    return f"{reader.path(record.file)}, {fqn}, record {_name(reader, record)}"
