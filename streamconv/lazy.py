"""A checkpoint as a mapping of Hub names to lazy tensors: only what a slice needs is read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamconv.boxes import Shape
from streamconv.dtypes import DType
from streamconv.executor import WindowFiller
from streamconv.lowering import clip_box
from streamconv.options import JobOptions
from streamconv.plan import Plan
from streamconv.planned import PlannedTensor
from streamconv.planning import make_plan
from streamconv.reader import SourceReader
from streamconv.records import RecordChecks
from streamconv.windows import Segment, Window

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, np.dtype[Any]]


class LazyTensor:
    """One output tensor. ``t[...]`` reads what the index needs and returns a numpy array.

    Integers, slices (any positive step) and ``...`` are understood; anything numpy can do on top is
    done on what was read. bfloat16 and fp8 come as ml_dtypes; :meth:`torch` gives a torch tensor.
    Records are not checked against their CRC-32 here, as they are rarely read whole.
    """

    def __init__(self, tensor: PlannedTensor, filler: WindowFiller) -> None:
        self._tensor = tensor
        self._filler = filler

    @property
    def name(self) -> str:
        """Return the output name."""
        return self._tensor.name

    @property
    def shape(self) -> Shape:
        """Return the shape."""
        return self._tensor.shape

    @property
    def dtype(self) -> DType:
        """Return the element type."""
        return self._tensor.dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole tensor."""
        return self._tensor.nbytes

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, shape={list(self.shape)}, dtype={self.dtype})"

    def __getitem__(self, index: Any) -> Array:
        bounds, rest = _bounds(index, self.shape)
        lo = tuple(a for a, _ in bounds)
        sizes = tuple(max(0, b - a) for a, b in bounds)
        moves = tuple(
            part for move in self._tensor.moves for part in clip_box(move, self.shape, lo, sizes)
        )
        t = self._tensor
        numel = int(np.prod(sizes, dtype=np.int64))
        part = replace(t, shape=sizes, begin=0, end=numel * t.dtype.itemsize, moves=moves, last=())
        buffer = memoryview(bytearray(part.nbytes))
        self._filler.fill(Window(part.nbytes, (Segment(part, 0, numel, 0),)), buffer)
        array: Array = np.frombuffer(buffer, dtype=t.dtype.to_numpy()).reshape(sizes)
        result: Array = array[rest]
        return result

    def numpy(self) -> Array:
        """Read the whole tensor."""
        return self[...]

    def torch(self, index: Any = ...) -> torch.Tensor:
        """Read ``self[index]`` as a torch tensor."""
        import torch

        array = np.ascontiguousarray(self[index])
        raw = torch.from_numpy(array.reshape(-1).view(np.uint8))
        return raw.view(getattr(torch, self.dtype.torch)).reshape(array.shape)


def _bounds(index: Any, shape: Shape) -> tuple[list[tuple[int, int]], tuple[Any, ...]]:
    """Return the box to read and the index to apply to what was read."""
    items = index if isinstance(index, tuple) else (index,)
    if sum(1 for i in items if i is Ellipsis) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    given = sum(1 for i in items if i is not Ellipsis)
    if given > len(shape):
        raise IndexError(f"{given} indices for {len(shape)} dimensions")
    at = next((k for k, i in enumerate(items) if i is Ellipsis), len(items))
    fill = (slice(None),) * (len(shape) - given)
    items = (*items[:at], *fill, *items[at + 1 :])
    bounds: list[tuple[int, int]] = []
    rest: list[Any] = []
    for item, size in zip(items, shape, strict=True):
        if isinstance(item, slice):
            start, stop, step = item.indices(size)
            if step < 1:
                raise IndexError("negative steps are not supported")
            bounds.append((start, max(start, stop)))
            rest.append(slice(None, None, step))
        else:
            i = int(item)
            if not -size <= i < size:
                raise IndexError(f"index {i} is out of bounds for size {size}")
            bounds.append((i % size, i % size + 1))
            rest.append(0)
    return bounds, tuple(rest)


class LazyCheckpoint(Mapping[str, LazyTensor]):
    """The tensors of a checkpoint under their output names. Close it, or use it in a ``with``."""

    def __init__(
        self, plan: Plan, tensors: Mapping[str, PlannedTensor], reader: SourceReader
    ) -> None:
        self.plan = plan
        self._tensors = tensors
        self._reader = reader
        checks = RecordChecks(reader, check_crc=False)
        self._filler = WindowFiller(reader, checks, max_bytes=4 << 20)

    def __getitem__(self, name: str) -> LazyTensor:
        return LazyTensor(self._tensors[name], self._filler)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def close(self) -> None:
        """Close the source files."""
        self._filler.close()
        self._reader.close()

    def __enter__(self) -> LazyCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_checkpoint(src: Path, job: JobOptions) -> LazyCheckpoint:
    """Plan ``src`` and return its tensors; no weight is read before a tensor is indexed."""
    with tempfile.TemporaryDirectory(prefix="streamconv-") as folder:
        plan = make_plan(src, job, Path(folder) / "plan.jsonl")
        tensors = {t.name: t for _, section in plan.sections() for t in section if not t.same_as}
    return LazyCheckpoint(plan, tensors, SourceReader(Path(plan.head.root), plan.head.files))
