"""The operations that copy: how each puts its result together of its arguments.

Each function runs one aten operation on meta tensors, so that torch computes shape, strides and
dtype of the result, and says by logical index where every element comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from streamconv.errors import BadInputError
from streamconv.ir.boxes import Box, contiguous_strides
from streamconv.ir.dtypes import BY_TORCH, DType
from streamconv.ir.recipe import AddScalar, Cast, Gather, Op, Part, View, Zero
from streamconv.tracing.views import canonical_strides

_Op = torch._ops.OpOverload[..., Any]
_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]


class Recorder(Protocol):
    """What these functions need of the tracer."""

    def look(self, tensor: torch.Tensor, what: str) -> tuple[View, DType]:
        """Return a tensor as a view and its dtype."""
        ...

    def keep(self, result: torch.Tensor, logical: Gather, dtype: DType, what: str) -> torch.Tensor:
        """Remember what a fresh tensor holds, and return it."""
        ...

    def __enter__(self) -> object:
        """Record what is run until the exit, as before."""
        ...

    def __exit__(self, *exc: object) -> None:
        """Go on without."""
        ...


def refusal(func: _Op, where: str | None = None) -> BadInputError:
    """Return the error for an operation that cannot be streamed; ``where`` names its tensors."""
    if func._schema.is_mutable:
        return BadInputError(
            f"operation {func} writes into its argument and cannot be streamed",
            where=where,
            hint="write the conversion with operations that return new tensors",
        )
    return BadInputError(
        f"operation {func} cannot be streamed",
        where=where,
        hint="views, cat, stack, clone, repeat, casts, adding a number and padding with zeros can be",
    )


def _clone(rec: Recorder, func: _Op, args: _Args, kwargs: _Kwargs) -> torch.Tensor:
    view, dtype = rec.look(args[0], str(func))
    return rec.keep(func(*args, **kwargs), _gather(view), dtype, str(func))


def _to_copy(rec: Recorder, func: _Op, args: _Args, kwargs: _Kwargs) -> torch.Tensor:
    view, old = rec.look(args[0], str(func))
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != "meta":
        raise BadInputError(f"operation {func} moves a tensor to {device} and cannot be streamed")
    result = func(*args, **kwargs)
    new = _dtype_of(result)
    return rec.keep(result, _gather(_cast(view, old, new)), new, str(func))


def _cat(rec: Recorder, func: _Op, args: _Args, kwargs: _Kwargs) -> torch.Tensor:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return _joined(rec, func(*args, **kwargs), list(args[0]), dim, str(func))


def _stack(rec: Recorder, func: _Op, args: _Args, kwargs: _Kwargs) -> torch.Tensor:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    columns = [tensor.unsqueeze(dim) for tensor in args[0]]
    return _joined(rec, func(*args, **kwargs), columns, dim, str(func))


def _joined(
    rec: Recorder, result: torch.Tensor, tensors: list[torch.Tensor], dim: int, what: str
) -> torch.Tensor:
    """Record that ``tensors`` lie side by side along ``dim``; mixed dtypes were promoted."""
    new = _dtype_of(result)
    axis = dim % result.dim()
    parts: list[Part] = []
    start = 0
    for tensor in tensors:
        view, old = rec.look(tensor, what)
        # torch lets tensors of shape (0,) take part whatever the rank of the others.
        if 0 not in view.shape:
            offsets = tuple(start if d == axis else 0 for d in range(result.dim()))
            parts.append(Part(Box(offsets, view.shape), _cast(view, old, new)))
            start += view.shape[axis]
    if not parts:
        return rec.keep(result, _empty(result, *rec.look(tensors[0], what)), new, what)
    return rec.keep(result, Gather(tuple(result.shape), tuple(parts)), new, what)


def _empty(result: torch.Tensor, view: View, old: DType) -> Gather:
    """Return the gather of no elements, which still says what tensor they would be of."""
    shape = tuple(result.shape)
    nothing = View(view.base, shape, contiguous_strides(shape), 0, view.ops)
    return _gather(_cast(nothing, old, _dtype_of(result)))


def _repeat(rec: Recorder, func: _Op, args: _Args, kwargs: _Kwargs) -> torch.Tensor:
    view, dtype = rec.look(args[0], str(func))
    result = func(*args, **kwargs)
    added = result.dim() - len(view.shape)
    sizes, steps = (1,) * added + view.shape, (0,) * added + view.strides
    if 0 in result.shape:
        return rec.keep(result, _empty(result, view, dtype), dtype, str(func))
    # One more dimension before each, walked with stride 0; the flat order is that of the result.
    copies = [n // size for n, size in zip(result.shape, sizes, strict=True)]
    shape = tuple(n for pair in zip(copies, sizes, strict=True) for n in pair)
    strides = tuple(s for step in steps for s in (0, step))
    spread = _gather(View(view.base, shape, strides, view.offset, view.ops))
    flat = tuple(result.shape)
    return rec.keep(result, _gather(View(spread, flat, contiguous_strides(flat))), dtype, str(func))


def _zeros(rec: Recorder, func: _Op, args: _Args, kwargs: _Kwargs) -> torch.Tensor:
    """Record zeros that take their dtype from a tensor: of this one, an element is read in vain."""
    view, old = rec.look(args[0], str(func))
    result = func(*args, **kwargs)
    shape, new = tuple(result.shape), _dtype_of(result)
    if 0 in shape:
        return rec.keep(result, _empty(result, view, old), new, str(func))
    if 0 in view.shape:
        raise refusal(func)  # not one element to stand on
    still = canonical_strides(shape, (0,) * len(shape))
    zeros = View(view.base, shape, still, view.offset, (*view.ops, Zero()))
    return rec.keep(result, _gather(_cast(zeros, old, new)), new, str(func))


def _pad(rec: Recorder, func: _Op, args: _Args, kwargs: _Kwargs) -> torch.Tensor:
    """Record zeros around a tensor; ``pad`` has (before, after) from the last dimension on."""
    tensor: torch.Tensor = args[0]
    pad: list[int] = list(args[1])
    if (args[2] if len(args) > 2 else kwargs.get("value", 0)) != 0 or min(pad, default=0) < 0:
        raise refusal(func)

    def joined(sizes: tuple[int, int], axis: int) -> torch.Tensor:
        shape = list(tensor.shape)
        zeros = [tensor.new_zeros([*shape[:axis], n, *shape[axis + 1 :]]) for n in sizes]
        return torch.cat([zeros[0], tensor, zeros[1]], axis)

    with rec:
        for k, sizes in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
            tensor = joined(sizes, tensor.dim() - k)
    return tensor


def _add(rec: Recorder, func: _Op, args: _Args, kwargs: _Kwargs) -> torch.Tensor:
    tensor, other = args[0], args[1]
    alpha = args[2] if len(args) > 2 else kwargs.get("alpha", 1)
    if not (isinstance(tensor, torch.Tensor) and isinstance(other, int | float)):
        raise refusal(func)
    view, dtype = rec.look(tensor, str(func))
    value = float(other) * float(alpha)
    if func in _SUBTRACTIONS:
        value = -value
    result = func(*args, **kwargs)
    if _dtype_of(result) != dtype or not _exact(value, dtype):
        # torch adds in a wider type than it stores: with a number that the dtype would round,
        # whoever executes the recipe in the dtype itself could get other bits.
        raise BadInputError(
            f"operation {func} cannot be streamed: {dtype} holds no exact {other!r}",
            hint="cast first, or add a number that the dtype can hold",
        )
    ops: tuple[Op, ...] = (*view.ops, AddScalar(value))
    added = View(view.base, view.shape, view.strides, view.offset, ops)
    return rec.keep(result, _gather(added), dtype, str(func))


def _exact(value: float, dtype: DType) -> bool:
    if not dtype.castable:
        return False
    stored = torch.tensor(value, dtype=getattr(torch, dtype.torch), device="cpu")
    return bool(stored.item() == value)


def _gather(view: View) -> Gather:
    return Gather(view.shape, (Part(Box.whole(view.shape), view),))


def _cast(view: View, old: DType, new: DType) -> View:
    if old == new:
        return view
    if not (old.castable and new.castable):
        raise BadInputError(f"a cast from {old} to {new} cannot be streamed")
    ops: tuple[Op, ...] = (*view.ops, Cast(new))
    return View(view.base, view.shape, view.strides, view.offset, ops)


def _dtype_of(tensor: torch.Tensor) -> DType:
    dtype = BY_TORCH.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise BadInputError(f"a tensor of {tensor.dtype} cannot be streamed")
    return dtype


_aten = torch.ops.aten
_SUBTRACTIONS = (_aten.sub.Tensor, _aten.sub.Scalar)

COPIES: dict[_Op, Callable[[Any, _Op, _Args, _Kwargs], torch.Tensor]] = {
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.repeat.default: _repeat,
    _aten.new_zeros.default: _zeros,
    _aten.zeros_like.default: _zeros,
    _aten.constant_pad_nd.default: _pad,
    _aten.add.Tensor: _add,
    _aten.add.Scalar: _add,
    _aten.sub.Tensor: _add,
    _aten.sub.Scalar: _add,
}
