"""Run ordinary torch code on meta tensors and write down what it did, as recipes.

A view of a meta tensor keeps its storage, ``storage_offset()`` and ``stride()``: that is the
recipe, torch computed it. Ops that copy are seen by a ``TorchDispatchMode``, which remembers for
every new storage how its elements are gathered. Anything else is refused by name while planning.

Traps that are handled here: a copy may keep its input's strides (``t().clone()``, casts, ``cat`` of
channels-last tensors), so a gather is written in the order of the new *storage*; a view may carry a
conj or neg bit, or reinterpret the dtype; and ops may write into their arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streamconv.errors import BadInputError
from streamconv.ir.boxes import Shape, contiguous_strides
from streamconv.ir.dtypes import DType
from streamconv.ir.recipe import Gather, Recipe, SourceRef, View
from streamconv.tracing.copies import COPIES, refusal
from streamconv.tracing.views import canonical_strides, permute_gather, simplify

_NAMED = 4

Body = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def trace(inputs: Mapping[str, tuple[Shape, DType]], body: Body) -> dict[str, Recipe]:
    """Return the recipe of each tensor that ``body`` makes of tensors with these shapes and dtypes.

    ``body`` gets meta tensors by name and returns tensors by name; its order is kept. An input that
    is returned unchanged becomes the identity view. Raises :class:`BadInputError` for an operation
    that cannot be streamed; what ``body`` itself raises passes through.
    """
    recorder = _Recorder()
    given = {name: recorder.source(name, shape, dtype) for name, (shape, dtype) in inputs.items()}
    with torch.no_grad(), recorder, _ListsOfIndices():
        made = dict(body(given))
    return {name: recorder.recipe(name, tensor) for name, tensor in made.items()}


@dataclass(frozen=True, slots=True)
class _Stored:
    """What a storage holds: a base in storage order, and the element type."""

    base: SourceRef | Gather
    dtype: DType
    # Kept alive while its address is a key: a freed storage's address would be given out again.
    storage: torch.UntypedStorage


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records, for every storage that the traced code makes, how it is put together."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stored: dict[int, _Stored] = {}

    def source(self, fqn: str, shape: Shape, dtype: DType) -> torch.Tensor:
        """Return a C-contiguous meta tensor that stands for a global tensor of the checkpoint."""
        tensor = torch.empty(shape, dtype=getattr(torch, dtype.torch), device="meta")
        storage = tensor.untyped_storage()
        self._stored[storage._cdata] = _Stored(SourceRef(fqn, shape), dtype, storage)
        return tensor

    def recipe(self, name: str, tensor: torch.Tensor) -> Recipe:
        """Return the recipe of a tensor that the traced code made."""
        view, dtype = self.look(tensor, f"output {name}")
        return Recipe(name, dtype, view)

    def look(self, tensor: torch.Tensor, what: str) -> tuple[View, DType]:
        """Return ``tensor`` as a view, through every gather that allows it, and its dtype."""
        stored = self._lookup(tensor, what)
        shape = tuple(tensor.shape)
        strides = canonical_strides(shape, tuple(tensor.stride()))
        if 0 in shape:
            return simplify(View(stored.base, shape, strides)), stored.dtype
        offset = int(tensor.storage_offset())
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if last >= math.prod(stored.base.shape):
            raise BadInputError(
                f"{what}: a view reaches past its storage",
                expected=f"at most {math.prod(stored.base.shape)} elements",
                found=f"{last + 1} elements",
            )
        return simplify(View(stored.base, shape, strides, offset)), stored.dtype

    def keep(self, result: torch.Tensor, logical: Gather, dtype: DType, what: str) -> torch.Tensor:
        """Remember that the fresh ``result`` holds ``logical``, and return it.

        The gather is turned into storage order first, because ``result`` may be dense without being
        C-contiguous, and its later views speak in strides of the storage.
        """
        strides = tuple(result.stride())
        order = tuple(sorted(range(result.dim()), key=lambda d: (-strides[d], d)))
        gather = permute_gather(logical, order)
        dense = result.storage_offset() == 0 and all(
            n == 1 or strides[d] == s
            for d, n, s in zip(order, gather.shape, contiguous_strides(gather.shape), strict=True)
        )
        if result.numel() and not dense:
            raise BadInputError(
                f"operation {what} makes a tensor with gaps, which cannot be streamed",
                found=f"shape {list(result.shape)}, strides {list(strides)}",
            )
        storage = result.untyped_storage()
        self._stored[storage._cdata] = _Stored(gather, dtype, storage)
        return result

    def _lookup(self, tensor: torch.Tensor, what: str) -> _Stored:
        stored = None
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
            stored = self._stored.get(tensor.untyped_storage()._cdata)
        if stored is None:
            raise BadInputError(f"{what} is not a tensor made of the checkpoint's tensors")
        if tensor.is_conj() or tensor.is_neg():
            raise BadInputError(f"{what}: a conjugated or negated view cannot be streamed")
        if str(tensor.dtype) != f"torch.{stored.dtype.torch}":
            raise BadInputError(
                f"{what}: a view that reads {stored.dtype} as {tensor.dtype} cannot be streamed"
            )
        return stored

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation on meta tensors and record what it copied."""
        kwargs = kwargs or {}
        if _is_view(func):
            # Checked when it is looked at: conj and dtype views are views too.
            return func(*args, **kwargs)
        record = COPIES.get(func)
        if record is not None:
            return record(self, func, args, kwargs)
        if not func._schema.is_mutable:
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        raise refusal(func, self._sources((args, kwargs)))

    def _sources(self, arguments: Any) -> str | None:
        """Name the checkpoint's tensors that an operation's arguments are made of."""
        tensors = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)]
        tensors = [t for t in tensors if t.layout == torch.strided]
        held = [self._stored.get(t.untyped_storage()._cdata) for t in tensors]
        views = [View(s.base, (), ()) for s in held if s is not None]
        names = list(dict.fromkeys(name for view in views for name in view.sources()))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return ", ".join(names[:_NAMED]) + more or None


class _ListsOfIndices(TorchFunctionMode):
    """Takes ``tensor[:, [0, 3]]`` apart while the numbers are there: on meta, they are lost."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            tensor, index = args
            items = index if isinstance(index, tuple) else (index,)
            lists = [k for k, item in enumerate(items) if isinstance(item, list)]
            plain = all(isinstance(i, slice | list) for i in items)
            if len(lists) == 1 and plain and all(type(i) is int for i in items[lists[0]]):
                (dim,) = lists
                rest = tensor[tuple(slice(None) if k == dim else i for k, i in enumerate(items))]
                return torch.cat([rest.narrow(dim, i, 1) for i in items[dim]], dim)
        return func(*args, **(kwargs or {}))


@cache
def _is_view(func: torch._ops.OpOverload[..., Any]) -> bool:
    """Whether ``func`` always returns a view.

    Composite operations (``reshape``, ``to``) say that they do, and copy where they have to. They
    arrive here under inference_mode only, where torch does not take them apart first.
    """
    if func is torch.ops.aten._unsafe_view.default:
        return True
    name = str(func.name())  # type: ignore[no-untyped-call]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    return bool(func.is_view and not composite)
