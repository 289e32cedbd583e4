"""What the inert values of a rank file mean: tensors, dtypes, placements, and which dict is the model.

Pure functions of what :func:`streamconv.torchfile.unpickle.load_inert` returns. The pickled tree
is typed ``Any`` here, and nowhere else: whatever does not have the form that torch writes raises
one of the exceptions in :data:`MALFORMED`, or BadInputError where more can be said.
"""

from __future__ import annotations

from typing import Any

from streamconv.errors import BadInputError
from streamconv.ir.dtypes import BY_TORCH, DType
from streamconv.ir.placements import Kind, Placement
from streamconv.torchfile import allowlist as allowed
from streamconv.torchfile.inert import InertDict, InertSize, InertStorage

MALFORMED = (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError)

_MAX_WRAPPERS = 4

# Looked up once for each of two million tensors, hence names of the module's own.
REBUILD_TENSOR, SHARD = allowed.REBUILD_TENSOR, allowed.SHARD

_PLACEMENT_KINDS = {
    allowed.SHARD: Kind.SHARD,
    allowed.STRIDED_SHARD: Kind.STRIDED,
    allowed.REPLICATE: Kind.REPLICATE,
    allowed.PARTIAL: Kind.PARTIAL,
}


def bad(what: str, **parts: str) -> BadInputError:
    """Return the error that says ``what`` is wrong; the caller adds where."""
    return BadInputError(what, **parts)


def name_of(value: Any) -> str:
    """Return what to call a value or a stand-in in a message."""
    return getattr(value, "path", None) or type(value).__name__


def why_no_tensor(value: Any) -> str:
    """Return why a value of a state dict is left out."""
    if value is None:
        return "None, not a tensor"
    if type(value) in (dict, InertDict):
        return "a nested dict, not a tensor"
    return f"a value of type {type(value).__name__}, not a tensor"


TENSOR_CALLS = {
    allowed.REBUILD_TENSOR,
    allowed.REBUILD_TENSOR_V3,
    allowed.REBUILD_PARAMETER,
    allowed.REBUILD_PARAMETER_WITH_STATE,
    allowed.REBUILD_META_TENSOR,
    allowed.REBUILD_FROM_TYPE,
}

TensorParts = tuple[DType, InertStorage, int, int, tuple[int, ...], tuple[int, ...]]


def tensor_parts(value: Any) -> TensorParts:
    """Return (dtype, storage, its numel in elements, offset, shape, strides) of a plain tensor.

    All arguments are those that torch writes: what it would do with others, it alone knows.
    """
    call, args = type(value), value.args
    for _ in range(_MAX_WRAPPERS):
        if call is REBUILD_TENSOR:
            storage, offset, shape, strides, grad, hooks, *more = args
            dtype = _STORAGE_DTYPES.get(storage.kind)
            if dtype is None:
                raise bad(f"a tensor of a dtype that is not supported: {name_of(storage.kind)}")
            numel = storage.numel
        elif call is allowed.REBUILD_TENSOR_V3:
            storage, offset, shape, strides, grad, hooks, kind, *more = args
            if storage.kind is not allowed.UNTYPED_STORAGE:
                raise bad("a tensor of a typed storage with a dtype of its own")
            dtype = dtype_of(kind)
            numel, remainder = divmod(storage.numel, dtype.itemsize)
            if remainder:
                raise bad(f"a storage of {storage.numel} bytes holds no whole number of {dtype}")
        elif call is allowed.REBUILD_FROM_TYPE:
            function, kind, inner, state = args
            if kind not in _PLAIN_TYPES:
                raise bad(f"an unknown tensor subclass: {name_of(kind)}")
            check_attributes(state)
            call, args = function, inner
            continue
        elif call is allowed.REBUILD_PARAMETER:
            inner, grad, hooks = args
            _check_grad(grad, hooks)
            call, args = type(inner), inner.args
            continue
        elif call is allowed.REBUILD_PARAMETER_WITH_STATE:
            inner, grad, hooks, state = args
            _check_grad(grad, hooks)
            check_attributes(state)
            call, args = type(inner), inner.args
            continue
        else:
            break
        if type(shape) not in _SIZES or type(strides) not in _SIZES:
            raise bad("a tensor whose sizes are not a tuple")
        if grad is not False or type(hooks) is not InertDict or hooks:
            _check_grad(grad, hooks)
            if dtype.name[0] in "IU" or dtype.name == "BOOL":
                raise bad(f"a tensor of {dtype} that requires a gradient")
        if more:
            _check_tensor_metadata(*more)
        return dtype, storage, numel, offset, tuple(shape), tuple(strides)
    if call is allowed.REBUILD_META_TENSOR:
        raise bad("a meta tensor: it was saved without data")
    raise bad(f"no tensor: {name_of(call)}")


_SIZES = (tuple, InertSize)
_PLAIN_TYPES = {
    allowed.WEIGHTS["torch", "Tensor"],
    allowed.WEIGHTS["torch.nn.parameter", "Parameter"],
    allowed.WEIGHTS["torch.nn.parameter", "Buffer"],
}
# What an attribute of this name would set in a tensor is not an attribute: its data, its type.
_SETTERS = {
    *("data", "real", "imag", "H", "T", "mH", "mT", "names", "volatile"),
    *("grad", "grad_dtype", "requires_grad", "_grad", "_grad_fn"),
    *("_backward_hooks", "_post_accumulate_grad_hooks"),
}


def _check_grad(grad: Any, hooks: Any) -> None:
    if type(grad) is not bool or type(hooks) is not InertDict or hooks:
        raise bad("a tensor with arguments that no torch writes")


def check_attributes(state: Any) -> None:
    """Refuse a tensor's state that does more than to add attributes."""
    parts = state if type(state) is tuple and len(state) == 2 else (state,)
    for part in parts:
        if part is None:
            continue
        if type(part) is not dict or not all(
            type(k) is str and k not in _SETTERS and not k.startswith("__") for k in part
        ):
            raise bad("a tensor with a state that no torch writes")


_STORAGE_DTYPES = {kind: BY_TORCH[name] for kind, name in allowed.STORAGE_DTYPES.items()}


def dtype_of(kind: Any) -> DType:
    """Return the element type that the stand-in ``kind`` names."""
    name = allowed.DTYPES.get(kind)
    dtype = BY_TORCH.get(name or "")
    if dtype is None:
        raise bad(f"a tensor of a dtype that is not supported: {name_of(kind)}")
    return dtype


def _check_tensor_metadata(metadata: Any) -> None:
    """Lazy conjugation and negation (``conj``, ``neg``) would change what the bytes mean."""
    if type(metadata) is not dict or metadata:
        named = metadata if isinstance(metadata, dict) else ()
        raise bad(
            "a tensor with a lazy view of its bytes, or other metadata that no bytes show",
            found=", ".join(sorted(str(k)[:20] for k in named)) or name_of(metadata),
            hint="call .resolve_conj().resolve_neg() before saving",
        )


def check_numbers(numbers: tuple[Any, ...]) -> None:
    """Refuse what is not an exact int before a tuple of it is hashed.

    A tuple of tuples of … a few hundred bytes long can take years to hash, and 4.0, True and 1 are
    equal as keys. That they are not negative is checked when a spec is made.
    """
    if set(map(type, numbers)) != _INT:
        raise bad("a size, stride or offset that is not a number")


_INT = {int}


def check_dtensor(kind: Any, outer: Any, attributes: Any, fields: Any, spec: Any) -> None:
    """Refuse a DTensor of a form that no torch writes.

    Its state is (instance attributes: None, or a dict for a Parameter; slots: what we read).
    """
    if type(spec) is not allowed.DTENSOR_SPEC or spec.args or outer[0] is not kind:
        raise bad("a DTensor without a spec")
    if type(fields) is not dict or len(fields) != 2 or type(spec.state) is not dict:
        raise bad("a DTensor with a state that no torch writes")
    # A field of a later torch may change what the others mean, as shard_order did.
    if not spec.state.keys() <= _SPEC_FIELDS:
        strange = [k for k in spec.state if k not in _SPEC_FIELDS and not str(k).startswith("_")]
        if strange:
            raise bad("a DTensor's spec with an unknown field", found=str(strange[0])[:80])
    if attributes is not None:
        check_attributes(attributes)


_SPEC_FIELDS = {
    *("mesh", "placements", "tensor_meta"),
    *("shard_order", "use_strided_shard_as_shard_order", "_hash"),
}


def placement_key(value: Any) -> tuple[object, int, int]:
    """Return a placement as a hashable (stand-in, dim, split factor)."""
    kind, state = type(value), value.state
    if kind is SHARD:
        dim, factor = state["dim"], 1
        if len(state) != 1:
            raise bad("a placement with an unknown field")
    elif kind is allowed.STRIDED_SHARD:
        dim, factor = state["dim"], state["split_factor"]
        if len(state) != 2:
            raise bad("a placement with an unknown field")
    elif kind in _PLACEMENT_KINDS:
        return kind, 0, 1
    else:
        raise bad(f"an unknown placement: {name_of(value)}")
    if type(dim) is not int or type(factor) is not int:
        raise bad("a placement without its dimension")
    return kind, dim, factor


def placement_of(kind: Any, dim: int, split_factor: int) -> Placement:
    """Return the placement for what :func:`placement_key` returned."""
    return Placement(_PLACEMENT_KINDS[kind], dim, split_factor)


def shard_order_entry(entry: Any) -> tuple[int, tuple[int, ...]]:
    """Return a ``ShardOrderEntry`` as (tensor dim, mesh dims)."""
    dim, mesh_dims = entry.args
    if type(dim) is not int or type(mesh_dims) is not tuple:
        raise bad("a shard_order that is malformed")
    for m in mesh_dims:
        if type(m) is not int:
            raise bad("a shard_order that is malformed")
    return dim, mesh_dims


def find_state_dict(root: Any, where: str) -> tuple[dict[Any, Any], str | None]:
    """Return the state dict and the key it was found under, if the top level is a wrapper.

    A wrapper is a dict without tensors of its own, exactly one of whose values is a dict that has some
    (``{'model': {…}, 'step': 7}``). Several such dicts are refused, and one beside tensors, too: which
    is the model? Extra states of layers may hold what they like.
    """
    if type(root) not in (dict, InertDict):
        raise BadInputError(
            "the file holds no state dict",
            where=where,
            expected="a dict of tensors",
            found=name_of(root),
        )
    top: dict[Any, Any] = root
    tensors = [k for k, v in top.items() if _looks_like_tensor(v)]
    inner = [
        (k, v)
        for k, v in top.items()
        if type(v) in (dict, InertDict)
        and any(map(_looks_like_tensor, v.values()))
        and not (tensors and str(k).endswith("_extra_state"))
    ]
    if tensors and inner:
        raise BadInputError(
            "the file holds tensors beside a dict of tensors: cannot determine which is the model",
            where=where,
            found=f"{str(tensors[0])[:40]}, and below {str(inner[0][0])[:40]} others",
            hint="save the model's state dict alone",
        )
    if tensors:
        return top, None
    if len(inner) > 1:
        raise BadInputError(
            "the file holds several dicts of tensors: cannot determine which is the model",
            where=where,
            found=", ".join(str(k)[:40] for k, _ in inner),
        )
    if inner:
        return inner[0][1], str(inner[0][0])[:80]
    return top, None


def _looks_like_tensor(value: Any) -> bool:
    return type(value) in TENSOR_CALLS


def fsdp1_modules(state_dict: dict[Any, Any]) -> bool | None:
    """Whether ``_metadata`` names modules as FSDP1's wrapper renames them; None where it is absent."""
    attributes = getattr(state_dict, "attributes", None)
    metadata = attributes.get("_metadata") if type(attributes) is dict else None
    if type(metadata) not in (dict, InertDict) or not metadata:
        return None
    return any(_FSDP1_MODULE in k for k in metadata if type(k) is str)


_FSDP1_MODULE = "_fsdp_wrapped_module"  # torch.distributed.fsdp._common_utils.FSDP_WRAPPED_MODULE
