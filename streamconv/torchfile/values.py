"""What the inert values of a rank file mean: tensors, dtypes, placements, and which dict is the model.

Pure functions of what :func:`streamconv.torchfile.unpickle.load_inert` returns. The pickled tree
is typed ``Any`` here, and nowhere else: whatever does not have the form that torch writes raises
one of the exceptions in :data:`MALFORMED`, or BadInputError where more can be said.
"""

from __future__ import annotations

from typing import Any

from streamconv.dtypes import BY_TORCH, DType
from streamconv.errors import BadInputError
from streamconv.placements import Kind, Placement
from streamconv.torchfile import allowlist as allowed
from streamconv.torchfile.inert import InertDict, InertStorage

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
    """Return (dtype, storage, its numel in elements, offset, shape, strides) of a plain tensor."""
    call, args = type(value), value.args
    for _ in range(_MAX_WRAPPERS):
        if call is REBUILD_TENSOR:
            storage, offset, shape, strides, *_, last = args
            if type(last) is dict:
                _check_tensor_metadata(last)
            dtype = _STORAGE_DTYPES.get(storage.kind)
            if dtype is None:
                raise bad(f"a tensor of a dtype that is not supported: {name_of(storage.kind)}")
            return dtype, storage, storage.numel, offset, tuple(shape), tuple(strides)
        if call is allowed.REBUILD_TENSOR_V3:
            storage, offset, shape, strides, _, _, kind, *rest = args
            if rest:
                _check_tensor_metadata(rest[0])
            if storage.kind is not allowed.UNTYPED_STORAGE:
                raise bad("a tensor of a typed storage with a dtype of its own")
            dtype = dtype_of(kind)
            numel, remainder = divmod(storage.numel, dtype.itemsize)
            if remainder:
                raise bad(f"a storage of {storage.numel} bytes holds no whole number of {dtype}")
            return dtype, storage, numel, offset, tuple(shape), tuple(strides)
        if call is allowed.REBUILD_FROM_TYPE:
            call, args = args[0], args[2]
        elif call in (allowed.REBUILD_PARAMETER, allowed.REBUILD_PARAMETER_WITH_STATE):
            call, args = type(args[0]), args[0].args
        elif call is allowed.REBUILD_META_TENSOR:
            raise bad("a meta tensor: it was saved without data")
        else:
            break
    raise bad(f"no tensor: {name_of(call)}")


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
    if type(metadata) is dict and any(metadata.values()):
        raise bad(
            "a tensor with a lazy view of its bytes",
            found=", ".join(sorted(str(k)[:20] for k, v in metadata.items() if v)),
            hint="call .resolve_conj().resolve_neg() before saving",
        )


def check_numbers(numbers: tuple[Any, ...]) -> None:
    """Refuse what is no number before a tuple of it is hashed.

    A tuple of tuples of … a few hundred bytes long can take years to hash. ``sum`` is the cheapest call
    that fails on everything but numbers; that they are exact ints is checked when a spec is made.
    """
    sum(numbers)


def check_dtensor(attributes: Any, fields: Any, spec: Any) -> None:
    """Refuse a state of a DTensor that no torch writes.

    The state is (instance attributes: None, or a dict for a Parameter; slots: what we read).
    """
    if type(spec) is not allowed.DTENSOR_SPEC:
        raise bad("a DTensor without a spec")
    for state in ({} if attributes is None else attributes, fields, spec.state):
        if type(state) is not dict or not all(type(k) is str for k in state):
            raise bad("a DTensor with a state that no torch writes")


def placement_key(value: Any) -> tuple[object, int, int]:
    """Return a placement as a hashable (stand-in, dim, split factor)."""
    kind, state = type(value), value.state
    if kind is SHARD:
        dim, factor = state["dim"], 1
    elif kind is allowed.STRIDED_SHARD:
        dim, factor = state["dim"], state["split_factor"]
    elif kind in _PLACEMENT_KINDS:
        return kind, 0, 1
    else:
        raise bad(f"a placement that is not known: {name_of(value)}")
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
    (``{'model': {…}, 'step': 7}``). Several such dicts are refused: which is the model?
    """
    if type(root) not in (dict, InertDict):
        raise BadInputError(
            "the file holds no state dict",
            where=where,
            expected="a dict of tensors",
            found=name_of(root),
        )
    top: dict[Any, Any] = root
    if any(_looks_like_tensor(v) for v in top.values()):
        return top, None
    inner = [
        (k, v)
        for k, v in top.items()
        if type(v) in (dict, InertDict) and any(map(_looks_like_tensor, v.values()))
    ]
    if len(inner) > 1:
        raise BadInputError(
            "the file holds several dicts of tensors; which is the model cannot be told",
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
