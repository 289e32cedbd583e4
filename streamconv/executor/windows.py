"""Windows: which part of an output file is assembled at a time, and by which reads.

A window is a stretch of an output file. All it needs from one source file is sorted and read in as
few runs as the gaps allow, so that a thousand rank files cost a thousand reads a window and not a
read per tensor and file. Pure functions: plan in, read lists out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from streamconv.ir.boxes import Shape
from streamconv.ir.lowering import Dim, Move, clip
from streamconv.ir.planned import PlannedSource, PlannedTensor
from streamconv.ir.source import Record

# Bytes between two wanted stretches that are cheaper to read than to seek over. Records of one file
# lie about 200 bytes apart (a zip header and torch's padding), and with very many ranks there are
# small ones between that hold nothing but padding. Within a record the gaps of a column come in
# thousands, so less is read for nothing there.
_GAP_BYTES = 4096
_RECORD_GAP_BYTES = 16 << 10
# A read of this size amortizes what a read costs, also on storage with a millisecond of latency.
_GOOD_READ_BYTES = 512 << 10
# Up to here a window grows for nothing; it stays in the CPU's cache on its way to the file.
MIN_WINDOW_BYTES = 1 << 20
SMALL_WINDOW_BYTES = 4 << 20
MAX_WINDOW_BYTES = 256 << 20
# What is known of a window's tensors takes memory, too, of tiny ones more than their bytes: so much
# for a segment and for each of its moves. Up to a small window, the budget's reserve has room for it.
_SEGMENT_BYTES = 4096
_MOVE_BYTES = 512
KNOWLEDGE_SHARE = 4
# What is held beside the windows stands here, for the budget counts it without loading numpy.
# Casts and products are work for the CPU and not for the disk.
CAST_THREADS = 2
# Factors are small and their tiles few: reads of this size are good enough, and need no more memory.
FACTOR_READ_BYTES = 256 << 10
# A product is added in blocks of so many elements. Per thread: the block's sum, one product of it, and
# the sum with the matrix, in float32.
PRODUCT_BLOCK_ELEMENTS = 1 << 16
# So much of a weight that is quantized is held as float32 at a time.
ENCODE_BYTES = 4 << 20
# So many elements of a sum, and of one of its terms, are held as float64 at most.
SUM_ELEMENTS = 1 << 19
SCRATCH_BYTES = 4 * PRODUCT_BLOCK_ELEMENTS * 4


@dataclass(frozen=True, slots=True)
class Ahead:
    """How a store is read: ``requests`` of ``request_bytes`` at once, for several ``windows``."""

    requests: int
    request_bytes: int
    windows: int = 3


@dataclass(frozen=True, slots=True)
class Segment:
    """The elements ``[lo, hi)`` of a tensor, at byte ``at`` of the window."""

    tensor: PlannedTensor
    lo: int
    hi: int
    at: int

    @property
    def nbytes(self) -> int:
        """Return the bytes of the segment in the output."""
        return (self.hi - self.lo) * self.tensor.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive segments of the output file's data.

    The segments of a tied tensor (``same_as``) do not belong to the file; a window holds either
    segments of the file or segments of one tied tensor.
    """

    nbytes: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Fill:
    """One strided copy into a window, out of bytes ``[lo, hi)`` of a source file.

    Input element 0 of ``dims`` lies at byte ``lo``.
    """

    source: PlannedSource
    record: Record
    lo: int
    hi: int
    dst_at: int  # byte of the window where output element 0 of ``dims`` goes
    dims: tuple[Dim, ...]
    move: Move
    tensor: PlannedTensor

    @property
    def begin(self) -> int:
        """Return where a read for this copy begins: with the record's header where that is next to it.

        Whoever reads the first byte of a record checks its header, and one read is cheaper than two.
        """
        return self.lo - self.record.header_nbytes if self.lo == self.record.start else self.lo

    @property
    def direct(self) -> bool:
        """Whether the file's bytes are the window's bytes as they stand."""
        return not self.move.ops and (
            not self.dims or (len(self.dims) == 1 and self.dims[0].dst == self.dims[0].src == 1)
        )


@dataclass(frozen=True, slots=True)
class Run:
    """One read: bytes ``[lo, hi)`` of file ``file``, and the copies that it serves."""

    file: int
    lo: int
    hi: int
    fills: tuple[Fill, ...]


def windows(
    tensors: Iterable[PlannedTensor], max_bytes: int, small_bytes: int = SMALL_WINDOW_BYTES
) -> Iterator[Window]:
    """Cut the tensors of an output file, in their order, into windows of at most ``max_bytes``.

    A window closes as soon as its reads are good ones: at ``small_bytes`` where each file gives long
    stretches, as late as ``max_bytes`` where a thousand files give a few bytes each. And as soon as
    what is known of its tensors takes more than a ``KNOWLEDGE_SHARE`` of that.
    """
    small = min(small_bytes, max_bytes)
    most_known = max(small, max_bytes // KNOWLEDGE_SHARE)
    segments: list[Segment] = []
    files: set[int] = set()
    size = known = 0

    def close() -> Window:
        nonlocal size, known
        window = Window(size, tuple(segments))
        segments.clear()
        files.clear()
        size = known = 0
        return window

    for tensor in tensors:
        if segments and (tensor.same_as or segments[-1].tensor.same_as):
            yield close()
        itemsize = tensor.dtype.itemsize
        numel = tensor.nbytes // itemsize
        step = _step(tensor, max_bytes, small)
        at = 0
        while at < numel or (numel == 0 and at == 0):
            take = min(numel - at, step, (max_bytes - size) // itemsize)
            if tensor.encode is not None and take < numel - at and step > take:
                # No band is begun that does not fit: both windows would read all of it.
                take = take // _band(tensor) * _band(tensor) or (0 if segments else take)
            if take == 0 and numel:
                yield close()
                continue
            segments.append(Segment(tensor, at, at + take, size))
            moved = list(_files(tensor, at, at + take))
            files.update(moved)
            size += take * itemsize
            known += _SEGMENT_BYTES + len(moved) * _MOVE_BYTES
            at += take
            # What lies close together in a file becomes one read, so files count and not tensors.
            good = size >= small and size >= min(max_bytes, len(files) * _GOOD_READ_BYTES)
            if good or known >= most_known:
                yield close()
            if numel == 0:
                break
    if segments:
        yield close()


def _files(tensor: PlannedTensor, lo: int, hi: int) -> Iterator[int]:
    for move in tensor.moves:
        if move.dst_offset < hi and move.last_dst >= lo:
            yield tensor.sources[move.source].shards.files[move.shard]


def _step(tensor: PlannedTensor, max_bytes: int, small_bytes: int) -> int:
    """Return how many elements of a tensor go into one window.

    Whole rows where they fit: a cut in the middle of a row makes three copies out of one. More than
    a small window where that makes fewer reads: for a transpose, or shards of very many files.
    """
    itemsize = tensor.dtype.itemsize
    numel = tensor.nbytes // itemsize
    if numel == 0:
        return 1
    if tensor.encode is not None:
        # Whole bands of blocks where they fit: what is in none is read again for the next window.
        most = min(numel, max(1, small_bytes // itemsize))
        band = _band(tensor)
        return most // band * band or max_bytes // band * band or _whole_rows(tensor.shape, most)
    step = max(1, small_bytes // itemsize)
    while True:
        step = _whole_rows(tensor.shape, min(step, numel))
        nbytes = step * itemsize
        if step == numel or nbytes * 2 > max_bytes:
            return step
        reads = runs(Window(nbytes, (Segment(tensor, 0, step, 0),)), nbytes * 4)
        if nbytes >= len(reads) * _GOOD_READ_BYTES:
            return step
        step *= 2


def _band(tensor: PlannedTensor) -> int:
    """Return the elements of a band of blocks, or of a row of scales."""
    codes = tensor.encode is not None and tensor.encode.part == "codes"
    return tensor.shape[-1] * (tensor.encode.block[0] if codes and tensor.encode else 1)


def _whole_rows(shape: Shape, step: int) -> int:
    row = 1
    for size in reversed(shape):
        if row * size > step:
            break
        row *= size
    return max(row, step // row * row)


def runs(window: Window, max_run_bytes: int, gap_bytes: int | None = None) -> list[Run]:
    """Return the reads that fill ``window``, by file and offset, none longer than ``max_run_bytes``.

    Headers of records come on top, and a single element that is wider than that is still read whole.
    What lies between two stretches is read over up to ``gap_bytes``; None: as a disk is best read.
    """
    fills: list[Fill] = []
    for segment in window.segments:
        fills.extend(_fills(segment, max_run_bytes))
    fills.sort(key=lambda f: (f.record.file, f.lo))
    result: list[Run] = []
    group: list[Fill] = []
    hi = 0
    for fill in fills:
        inside = group and fill.record.start == group[-1].record.start
        if group and (
            fill.record.file != group[0].record.file
            or fill.begin > hi + (gap_bytes or (_GAP_BYTES if inside else _RECORD_GAP_BYTES))
            or max(hi, fill.hi) - group[0].lo > max_run_bytes
        ):
            result.append(Run(group[0].record.file, group[0].begin, hi, tuple(group)))
            group = []
        hi = max(hi, fill.hi) if group else fill.hi
        group.append(fill)
    if group:
        result.append(Run(group[0].record.file, group[0].begin, hi, tuple(group)))
    return result


def _fills(segment: Segment, max_bytes: int) -> Iterator[Fill]:
    tensor = segment.tensor
    for move in tensor.moves:
        if move.dst_offset >= segment.hi or move.last_dst < segment.lo:
            continue
        source = tensor.sources[move.source]
        record = source.shards[move.shard]
        for part in clip(move, segment.lo, segment.hi):
            yield from _split(
                tensor,
                source,
                record,
                move,
                segment.at + (part.dst_offset - segment.lo) * tensor.dtype.itemsize,
                record.start + part.src_offset * source.dtype.itemsize,
                part.dims,
                max_bytes,
            )


def _split(
    tensor: PlannedTensor,
    source: PlannedSource,
    record: Record,
    move: Move,
    dst_at: int,
    src_at: int,
    dims: tuple[Dim, ...],
    max_bytes: int,
) -> Iterator[Fill]:
    """Yield copies whose stretch of the file is short and mostly wanted.

    A walk that leaves most of its stretch unread (a transpose, a column block) is cut along its
    widest input step, down to single rows.
    """
    itemsize = source.dtype.itemsize
    wanted = itemsize
    hull = itemsize
    for d in dims:
        wanted *= d.size
        hull += (d.size - 1) * d.src * itemsize
    sparse = hull > 2 * wanted and hull > wanted + _GAP_BYTES
    if dims and (hull > max_bytes or sparse):
        k = max(range(len(dims)), key=lambda i: dims[i].src)
        wide = dims[k]
        inner = hull - (wide.size - 1) * wide.src * itemsize
        # Over gaps as short as these one read goes anyway, and one copy is cheaper than many.
        apart = sparse and wide.src * itemsize - inner > _GAP_BYTES
        step = 1 if apart else max(1, (max_bytes - inner) // (wide.src * itemsize) + 1)
        if wide.size > 1 and step < wide.size:
            for i in range(0, wide.size, step):
                n = min(step, wide.size - i)
                kept = (Dim(n, wide.dst, wide.src),) if n > 1 else ()
                yield from _split(
                    tensor,
                    source,
                    record,
                    move,
                    dst_at + i * wide.dst * tensor.dtype.itemsize,
                    src_at + i * wide.src * itemsize,
                    (*dims[:k], *kept, *dims[k + 1 :]),
                    max_bytes,
                )
            return
    yield Fill(source, record, src_at, src_at + hull, dst_at, dims, move, tensor)
