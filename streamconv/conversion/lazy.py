"""A checkpoint as a mapping of Hub names to lazy tensors: only what a slice needs is read."""

from __future__ import annotations

import functools
import math
import operator
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from html import escape
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from streamconv.executor.pipeline import WindowFiller
from streamconv.executor.reader import Source
from streamconv.executor.records import RecordChecks
from streamconv.executor.remote import open_source
from streamconv.executor.windows import Segment, Window
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import DType
from streamconv.ir.lowering import clip_box
from streamconv.ir.planfile import Plan
from streamconv.ir.planned import PlannedTensor
from streamconv.ir.source import SourceFile
from streamconv.options import JobOptions
from streamconv.planning.child import make_plan
from streamconv.storage.address import place
from streamconv.units import counted, format_size

if TYPE_CHECKING:
    import torch

_SHOWN_ROWS = 50
# Of tensors that were pickled, in the process that unpickles them: the checkpoints that stay open.
_SOURCES_KEPT = 8

Array = np.ndarray[Any, np.dtype[Any]]


class LazyTensor:
    """One output tensor. ``t[...]`` reads what the index needs and returns what numpy would.

    Integers, slices, ``...`` and ``None`` are understood; for what else numpy takes as an index, read
    first: ``t[...][mask]``. bfloat16 and fp8 come as ml_dtypes; :meth:`torch` gives a torch tensor.
    Records are not checked against their CRC-32 here, as they are rarely read whole. After the
    checkpoint is closed reading raises :class:`ClosedError`.
    """

    def __init__(self, tensor: PlannedTensor, filler: WindowFiller, reader: Source) -> None:
        self._tensor = tensor
        self._filler = filler
        self._reader = reader

    @property
    def name(self) -> str:
        """Return the output name."""
        return self._tensor.name

    @property
    def shape(self) -> Shape:
        """Return the shape."""
        return self._tensor.shape

    @property
    def ndim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> DType:
        """Return the element type: ``.torch`` is torch's name of it, ``.to_numpy()`` numpy's dtype."""
        return self._tensor.dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole tensor."""
        return self._tensor.nbytes

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, shape={list(self.shape)}, dtype={self.dtype})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self._tensor, self._reader.root, tuple(self._reader.files))

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without dimensions has no length")
        return self.shape[0]

    def __bool__(self) -> bool:
        raise TypeError(
            f"{self.name} is neither true nor false before it is read; to see whether it is there "
            "ask `is not None`"
        )

    def __iter__(self) -> Iterator[Array]:
        return (self[k] for k in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError(
                "a lazy tensor is read into new memory: it cannot be had without a copy"
            )
        array = np.asarray(self[...])
        return array if dtype is None else array.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> Array:
        self._reader.check_open()
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
        """Read the whole tensor as numpy has it; bfloat16 and fp8 are types of ml_dtypes."""
        return self[...]

    def torch(self, index: Any = ...) -> torch.Tensor:
        """Read ``self[index]`` as a torch tensor."""
        import torch

        array = np.asarray(self[index])
        # ascontiguousarray turns what has no dimension into one.
        flat = np.ascontiguousarray(array).reshape(-1)
        raw = torch.from_numpy(flat.view(np.uint8))
        return raw.view(getattr(torch, self.dtype.torch)).reshape(array.shape)


def _bounds(index: Any, shape: Shape) -> tuple[list[tuple[int, int]], tuple[Any, ...]]:
    """Return the box to read and the index to apply to what was read."""
    items = index if isinstance(index, tuple) else (index,)
    if sum(1 for i in items if i is Ellipsis) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    given = sum(1 for i in items if i is not Ellipsis and i is not None)
    if given > len(shape):
        raise IndexError(f"{given} indices for {len(shape)} dimensions")
    at = next((k for k, i in enumerate(items) if i is Ellipsis), len(items))
    fill = (slice(None),) * (len(shape) - given)
    items = (*items[:at], *fill, *items[at + 1 :])
    sizes = iter(shape)
    bounds: list[tuple[int, int]] = []
    rest: list[Any] = []
    for item in items:
        if item is None:
            rest.append(None)
        elif isinstance(item, slice):
            wanted = range(next(sizes))[item]
            ends = sorted((wanted[0], wanted[-1])) if wanted else (0, -1)
            bounds.append((ends[0], ends[1] + 1))
            rest.append(slice(None, None, wanted.step))
        else:
            size = next(sizes)
            i = _integer(item)
            if not -size <= i < size:
                raise IndexError(f"index {i} is out of bounds for size {size}")
            bounds.append((i % size, i % size + 1))
            rest.append(0)
    return bounds, tuple(rest)


def _integer(item: Any) -> int:
    # A bool is an integer to Python and a mask to numpy.
    if not isinstance(item, bool | np.bool_):
        try:
            return operator.index(item)
        except TypeError:
            pass
    raise IndexError(
        "only integers, slices (`:`), an ellipsis (`...`) and None are valid indices of a lazy tensor, "
        f"not {type(item).__name__}; read it first for others: tensor[...][index]"
    )


class LazyCheckpoint(Mapping[str, LazyTensor]):
    """The tensors of a checkpoint under their output names. Close it, or use it in a ``with``.

    Several threads may read at once. What is being read when it is closed ends in
    :class:`ClosedError`, as does whatever is read later. A tied tensor that the output leaves out
    (``lm_head.weight``) is not a part of the mapping, but can be asked for; ``tied`` says which repeats
    which. A tensor can be pickled: where it is unpickled the files are opened again.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Mapping[str, PlannedTensor],
        reader: Source,
        tied: Mapping[str, str],
    ) -> None:
        self.plan = plan
        self.tied = MappingProxyType(dict(tied))
        self._tensors = tensors
        self._reader = reader
        self._filler = _filler(reader)

    def __getitem__(self, name: str) -> LazyTensor:
        planned = self._tensors[self.tied.get(name, name)]
        return LazyTensor(planned, self._filler, self._reader)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and torch tensors, each read when asked for: what vLLM and SGLang load.

        That is the argument of their models' ``load_weights``.
        """
        return ((name, tensor.torch()) for name, tensor in self.items())

    def load_model(self, **settings: Any) -> Any:
        """Return the transformers model, its weights read from the checkpoint one after another.

        ``settings`` go to ``from_pretrained``: ``dtype``, ``device_map`` and so on. Raises
        :class:`streamconv.BadInputError` where there is no config.json.
        """
        from streamconv.conversion.inference import load_model

        return load_model(self.plan, self, settings)

    def __repr__(self) -> str:
        nbytes = sum(t.nbytes for t in self._tensors.values())
        return (
            f"LazyCheckpoint({self.plan.head.root!r}, {counted(len(self), 'tensor')}, "
            f"{format_size(nbytes)})"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{t.dtype.torch}</td>"
            f"<td>{escape(str(list(t.shape)))}</td><td>{format_size(t.nbytes)}</td></tr>"
            for name, t in islice(self._tensors.items(), _SHOWN_ROWS)
        )
        more = len(self) - _SHOWN_ROWS
        rest = f"<p>and {more} more</p>" if more > 0 else ""
        head = "<tr><th>tensor</th><th>dtype</th><th>shape</th><th>size</th></tr>"
        return f"<p>{escape(repr(self))}</p><table>{head}{rows}</table>{rest}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def close(self) -> None:
        """Close the source files."""
        self._reader.close()
        self._filler.close()

    def __enter__(self) -> LazyCheckpoint:
        self._reader.check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_checkpoint(src: Path, job: JobOptions) -> LazyCheckpoint:
    """Plan ``src`` and return its tensors; no weight is read before a tensor is indexed."""
    with tempfile.TemporaryDirectory(prefix="streamconv-") as folder:
        plan = make_plan(src, job, Path(folder) / "plan.jsonl")
        planned = [t for _, section in plan.sections() for t in section]
    tensors = {t.name: t for t in planned if not t.same_as}
    tied = {t.name: t.same_as for t in planned if t.same_as}
    reader = open_source(place(plan.head.root), plan.head.files)
    return LazyCheckpoint(plan, tensors, reader, tied)


def _filler(reader: Source) -> WindowFiller:
    return WindowFiller(reader, RecordChecks(reader, check_crc=False), max_bytes=4 << 20)


@functools.lru_cache(maxsize=_SOURCES_KEPT)
def _opened_again(root: Path, files: tuple[SourceFile, ...]) -> tuple[WindowFiller, Source]:
    reader = open_source(root, files)
    return _filler(reader), reader


def _unpickled(tensor: PlannedTensor, root: Path, files: tuple[SourceFile, ...]) -> LazyTensor:
    return LazyTensor(tensor, *_opened_again(root, files))
