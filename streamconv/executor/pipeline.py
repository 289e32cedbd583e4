"""The executor: streams the tensors of one output file through windows into the file.

It decides nothing: the plan says which bytes go where, the budget how large a window may grow. One
thread fills windows (reads, checks, casts), the calling thread hashes and writes them; two windows
take turns. The bytes are the same for every window size and thread count.
"""

from __future__ import annotations

import mmap
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from streamconv.errors import VerificationError
from streamconv.executor.reader import Source
from streamconv.executor.records import RecordChecks
from streamconv.executor.windows import (
    CAST_THREADS,
    FACTOR_READ_BYTES,
    SMALL_WINDOW_BYTES,
    Ahead,
    Fill,
    Run,
    Segment,
    Window,
    runs,
    windows,
)
from streamconv.executor.writer import ShardWriter
from streamconv.ir.finished import FinishedFile
from streamconv.ir.lowering import PlacedAt
from streamconv.ir.planned import OutputFile, PlannedTensor

if TYPE_CHECKING:
    from streamconv.executor.encoding import Encoder
    from streamconv.executor.products import Factors
    from streamconv.executor.sums import Summer

# Bytes are summed, hashed and written in steps that are still in the CPU's cache from the one before.
_STEP_BYTES = 1 << 20
_PLAIN_BYTES = 64 << 10


class WindowFiller:
    """Fills windows from source files; ``max_bytes`` bounds a window, and its buffers are reused.

    ``io_threads`` read at once. Casts are work for the CPU and not for the disk: two threads share
    them whatever ``io_threads`` is.
    ``factor_bytes`` bounds what is held of the factors of low-rank updates, where there are any.
    ``ahead`` says how a store is read, where each read costs a round trip.
    """

    def __init__(
        self,
        reader: Source,
        checks: RecordChecks,
        *,
        max_bytes: int,
        io_threads: int = 1,
        factor_bytes: int = 8 << 20,
        ahead: Ahead | None = None,
        factors: Factors | None = None,
    ) -> None:
        self._reader = reader
        self._checks = checks
        self.max_bytes = max_bytes
        self.ahead = ahead
        self._io_threads = io_threads if ahead is None else ahead.requests
        most = max(self._io_threads, CAST_THREADS)
        if ahead is None:
            self._run_bytes = max(1, min(SMALL_WINDOW_BYTES, max_bytes) // most)
        else:
            self._run_bytes = ahead.request_bytes
        self._staging = threading.local()
        # The calling thread is one of them.
        self._pool = ThreadPoolExecutor(most - 1, thread_name_prefix="window-filler")
        self._factor_bytes = factor_bytes
        self._factors: Factors | None = factors
        self._making = threading.Lock()
        self._encoder: Encoder | None = None
        self._summer: Summer | None = None
        self._float_filler: WindowFiller | None = None
        self._factor_filler: WindowFiller | None = None

    def begin(self, window: Window, buffer: memoryview) -> list[Future[None]]:
        """Begin to bring every byte of ``window`` into ``buffer``: it is there when all is done."""
        encoded = [s for s in window.segments if s.tensor.encode is not None]
        # Its readers serve this thread: were it one of them, they could all wait for each other.
        self._sum(window, buffer)
        reads = runs(_plain(window) if encoded else window, self._run_bytes, self._reader.gap_bytes)
        begun = [self._pool.submit(self._serve, read, buffer) for read in reads]
        return begun + [self._pool.submit(self._encode, s, buffer) for s in encoded]

    def fill(self, window: Window, buffer: memoryview) -> None:
        """Bring every byte of ``window`` into ``buffer``."""
        encoded = [s for s in window.segments if s.tensor.encode is not None]
        for segment in encoded:
            self._encode(segment, buffer)
        self._sum(window, buffer)
        if encoded:
            window = _plain(window)
        reads = runs(window, self._run_bytes, self._reader.gap_bytes)
        threads = self._io_threads
        if any(fill.move.ops for read in reads for fill in read.fills):
            threads = max(threads, CAST_THREADS)
        pending = iter(reads)  # shared: next() on it is atomic
        helpers = [
            self._pool.submit(self._serve_all, pending, buffer)
            for _ in range(min(threads, len(reads)) - 1)
        ]
        try:
            self._serve_all(pending, buffer)
        finally:
            wait(helpers)  # none may write into the buffer any more
        for helper in helpers:
            helper.result()

    def _serve_all(self, reads: Iterator[Run], buffer: memoryview) -> None:
        for read in reads:
            self._serve(read, buffer)

    def _serve(self, read: Run, buffer: memoryview) -> None:
        first = read.fills[0]
        if len(read.fills) == 1 and first.direct:
            header = memoryview(bytearray(first.lo - read.lo))
            self._read_checked(
                read, header, buffer[first.dst_at : first.dst_at + first.hi - first.lo]
            )
            return
        data = self._staging_buffer(read.hi - read.lo)
        self._read_checked(read, data[:0], data)
        for fill in read.fills:
            self._copy(fill, read.lo, data, buffer)

    def _read_checked(self, read: Run, header: memoryview, data: memoryview) -> None:
        """Read a run, its first bytes into ``header`` and the rest into ``data``, and check it."""
        records = {f.record.start: f for f in reversed(read.fills)}
        begin = read.lo + len(header)
        step = min(self._reader.step_bytes, max(1, read.hi - begin))
        for lo in range(begin, read.hi, step):
            piece = data[lo - begin : lo - begin + step]
            if lo == begin:
                self._reader.read(read.file, read.lo, header, piece)
            else:
                self._reader.read(read.file, lo, piece)
            for start, fill in records.items():
                if start < lo + len(piece) and lo < start + fill.record.nbytes:
                    at = start - fill.record.header_nbytes
                    own = header or data[at - begin : start - begin] if at >= read.lo else None
                    self._checks.see(fill.source, fill.record, lo, piece, own)

    def _fill_factor(self, window: Window, buffer: memoryview) -> None:
        # A filler of its own: this one's staging buffer holds what the factor is for. It is called
        # by one thread at a time.
        if self._factor_filler is None:
            self._factor_filler = WindowFiller(
                self._reader, self._checks, max_bytes=FACTOR_READ_BYTES
            )
        self._factor_filler.fill(window, buffer)

    def _encode(self, segment: Segment, buffer: memoryview) -> None:
        from streamconv.executor.encoding import Encoder

        tiles = self._tiles()
        with self._making:
            if self._encoder is None:
                self._encoder = Encoder(self._fill_floats)
                self._float_filler = WindowFiller(
                    self._reader, self._checks, max_bytes=FACTOR_READ_BYTES, factors=tiles
                )
        self._encoder.fill(segment, buffer[segment.at : segment.at + segment.nbytes])

    def _sum(self, window: Window, buffer: memoryview) -> None:
        summed = [s for s in window.segments if s.tensor.terms and s.tensor.encode is None]
        if not summed:
            return
        from streamconv.executor.sums import Summer

        with self._making:
            if self._summer is None:
                self._summer = Summer(self.fill, self._file_of)
        for segment in summed:
            self._summer.fill(segment, buffer[segment.at : segment.at + segment.nbytes])

    def _file_of(self, tensor: PlannedTensor) -> str:
        move = tensor.moves[0]
        return str(self._reader.path(tensor.sources[move.source].shards.files[move.shard]))

    def _fill_floats(self, window: Window, buffer: memoryview) -> None:
        # Called by the encoder alone, which does one thing at a time.
        if self._float_filler is not None:
            self._float_filler.fill(window, buffer)

    def _copy(self, fill: Fill, data_lo: int, data: memoryview, buffer: memoryview) -> None:
        ops = fill.move.ops
        nbytes = _plain_nbytes(fill)
        if nbytes is not None:
            at = fill.lo - data_lo
            buffer[fill.dst_at : fill.dst_at + nbytes] = data[at : at + nbytes]
            return
        if any(isinstance(op, PlacedAt) for op in ops):
            from streamconv.executor.products import run_placed

            run_placed(
                buffer[fill.dst_at :],
                fill.tensor.dtype,
                data[fill.lo - data_lo :],
                fill.source.dtype,
                fill.dims,
                (fill.lo - fill.record.start) // fill.source.dtype.itemsize,
                ops,
                fill.tensor,
                self._tiles(),
            )
            return
        from streamconv.executor.kernels import run as run_kernel

        run_kernel(
            buffer[fill.dst_at :],
            fill.tensor.dtype,
            data[fill.lo - data_lo :],
            fill.source.dtype,
            fill.dims,
            ops,
            what=fill.tensor.name,
        )

    def _tiles(self) -> Factors:
        from streamconv.executor.products import Factors

        with self._making:
            if self._factors is None:
                most = max(self._io_threads, CAST_THREADS)
                self._factors = Factors(self._fill_factor, self._factor_bytes, most)
            return self._factors

    def _staging_buffer(self, nbytes: int) -> memoryview:
        buffer: memoryview | None = getattr(self._staging, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._staging.buffer = memoryview(mmap.mmap(-1, max(nbytes, self._run_bytes)))
        return buffer[:nbytes]

    def close(self) -> None:
        """Stop the readers."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._factor_filler is not None:
            self._factor_filler.close()
        if self._float_filler is not None:
            self._float_filler.close()


def _plain(window: Window) -> Window:
    """Return the window without what is quantized."""
    return Window(window.nbytes, tuple(s for s in window.segments if s.tensor.encode is None))


def _plain_nbytes(fill: Fill) -> int | None:
    """Return the bytes of a copy that is one small run on both sides, None for any other.

    numpy, which is not loaded for such, lets go of the interpreter's lock while it copies more.
    """
    numel = 1
    for size, dst, src in reversed(fill.dims):
        if dst != numel or src != numel:
            return None
        numel *= size
    nbytes = numel * fill.tensor.dtype.itemsize
    return nbytes if not fill.move.ops and nbytes <= _PLAIN_BYTES else None


def write_output(
    output: OutputFile,
    tensors: Iterable[PlannedTensor],
    path: Path,
    filler: WindowFiller,
    checks: RecordChecks,
    *,
    sync: bool,
    sha256: bool,
    direct: bool = False,
    seed: int = 0,
    uploads: int = 1,
    on_bytes: Callable[[int], None],
    before_end: Callable[[], None] = lambda: None,
) -> FinishedFile:
    """Write one output file to ``path`` and return its digests.

    ``seed`` is that of the hash ``keyed``, which nobody can foretell who does not know it;
    ``uploads``: how many parts of an object in a store are on their way at once.
    ``on_bytes`` is called with the number of output bytes done since the last call. Raises what the
    reader, the checks and the writer raise; the partial file then stays for the caller to remove.
    ``before_end`` is called when all bytes are written and the file is not yet whole.
    """
    digests: dict[str, str] = {}
    digest = xxhash.xxh3_128()
    with ShardWriter(
        path, output, sync=sync, sha256=sha256, direct=direct, seed=seed, uploads=uploads
    ) as writer:
        for window, buffer in filled_windows(tensors, filler, checks):
            for segment in window.segments:
                piece = buffer[segment.at : segment.at + segment.nbytes]
                for at in range(0, len(piece), _STEP_BYTES):
                    part = piece[at : at + _STEP_BYTES]
                    digest.update(part)
                    if segment.tensor.same_as is None:
                        writer.write(part)
                if segment.hi * segment.tensor.dtype.itemsize == segment.tensor.nbytes:
                    _tensor_done(segment.tensor, digest.hexdigest(), digests)
                    digest.reset()
            on_bytes(window.nbytes if window.segments[0].tensor.same_as is None else 0)
        before_end()
        writer.finish()
        return FinishedFile(
            output.name, output.nbytes, writer.xxh3, writer.sha256, digests, writer.keyed
        )


def filled_windows(
    tensors: Iterable[PlannedTensor], filler: WindowFiller, checks: RecordChecks
) -> Iterator[tuple[Window, memoryview]]:
    """Yield the windows of ``tensors`` with their bytes; a buffer is good until the next one."""
    with _Pipeline(tensors, filler, checks) as pipeline:
        yield from pipeline


def _tensor_done(tensor: PlannedTensor, digest: str, digests: dict[str, str]) -> None:
    if tensor.same_as is not None and digests[tensor.same_as] != digest:
        raise VerificationError(
            "two tensors that should be tied differ",
            where=f"{tensor.name} and {tensor.same_as}",
            hint="their CRC-32 agree but their bytes do not: the checkpoint is damaged",
        )
    digests[tensor.name] = digest


_Filled = tuple[Window, memoryview, list[Future[None]]]


class _Pipeline:
    """Windows filled by a thread of their own, handed over in order, two buffers taking turns."""

    def __init__(
        self, tensors: Iterable[PlannedTensor], filler: WindowFiller, checks: RecordChecks
    ) -> None:
        self._tensors = tensors
        self._filler = filler
        self._checks = checks
        self._free: queue.Queue[memoryview | None] = queue.Queue()
        ahead = filler.ahead
        for _ in range(2 if ahead is None else ahead.windows):
            # Anonymous maps: only pages that a window really fills become resident.
            self._free.put(memoryview(mmap.mmap(-1, max(filler.max_bytes, 4096))))
        self._full: queue.Queue[_Filled | BaseException | None] = queue.Queue()
        self._begun: list[Future[None]] = []
        self._thread = threading.Thread(target=self._fill_all, name="window-filler")

    def _fill_all(self) -> None:
        try:
            most, ahead = self._filler.max_bytes, self._filler.ahead
            small = SMALL_WINDOW_BYTES if ahead is None else most
            for window in windows(self._tensors, most, small):
                buffer = self._free.get()
                if buffer is None:
                    return
                if ahead is None:
                    self._filler.fill(window, buffer)
                    self._full.put((window, buffer, []))
                    self._finish_records(window)
                else:
                    self._begun = [f for f in self._begun if not f.done()]
                    reads = self._filler.begin(window, buffer)
                    self._begun += reads
                    self._full.put((window, buffer, reads))
            self._full.put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self._full.put(error)

    def _finish_records(self, window: Window) -> None:
        for segment in window.segments:
            tensor = segment.tensor
            if segment.hi * tensor.dtype.itemsize == tensor.nbytes:
                self._checks.finish(tensor.ended_records())

    def __iter__(self) -> Iterator[tuple[Window, memoryview]]:
        while (item := self._full.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            window, buffer, reads = item
            for read in reads:
                read.result()
            if self._filler.ahead is not None:
                self._finish_records(window)
            yield window, buffer
            self._free.put(buffer)

    def __enter__(self) -> _Pipeline:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._free.put(None)
        self._thread.join()
        for read in self._begun:
            read.cancel()
        wait(self._begun)  # none may write into a buffer any more
