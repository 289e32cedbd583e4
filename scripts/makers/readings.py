"""One file, two readers: what torch.load and what ours make of a torch.save file, in the same words.

Also the files: genuine ones of every form that holds weights, and crafted ones that the two might read
in different ways.
"""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from scripts.makers.zips import E, Zip
from streamconv.ir.placements import Kind
from streamconv.torchfile.rankfile import RankReader, Stored

Reading = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Source:
    """A torch.save file in parts: its pickle, and its other records."""

    name: str
    pickle: bytes
    records: dict[str, bytes]

    def file(self, pickle: bytes | None = None) -> bytes:
        """Return the file, with another pickle where one is given."""
        data = self.pickle if pickle is None else pickle
        others = [E(name, content) for name, content in self.records.items()]
        return Zip([E("data.pkl", data), *others]).bytes()


def source_of(name: str, data: bytes) -> Source:
    """Take a file apart that torch.save wrote."""
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        records = {i.filename.partition("/")[2]: zipped.read(i) for i in zipped.infolist()}
    return Source(name, records.pop("data.pkl"), records)


# --- the two readers -----------------------------------------------------------------------------


def read_ours(data: bytes, path: Path) -> Reading:
    """Return what our reader finds in a file, its bytes gathered as the executor would."""
    path.write_bytes(data)
    found = RankReader().read(path, 0)
    return {name: _ours(stored, data) for name, stored in found.tensors.items()}


def _ours(stored: Stored, data: bytes) -> tuple[Any, ...]:
    spec = stored.spec
    size = spec.dtype.itemsize
    raw = np.ndarray(
        (*spec.shape, size),
        np.uint8,
        data[stored.start : stored.start + stored.nbytes] or b"\0",
        spec.storage_offset * size if 0 not in spec.shape else 0,
        (*(s * size for s in spec.strides), 1),
    )
    local = (spec.dtype.torch, tuple(spec.shape), raw.tobytes())
    if spec.kind == "plain":
        return "plain", *local
    if spec.kind == "sharded":
        return "sharded", *local, tuple(spec.global_shape), spec.offsets
    mesh = spec.mesh
    assert mesh is not None
    placements = tuple((p.kind, p.dim, p.split_factor) for p in spec.placements)
    where = (tuple(mesh.shape), tuple(mesh.ranks), tuple(mesh.dim_names))
    return "dtensor", *local, tuple(spec.global_shape), placements, where


class _Allowed(pickle.Unpickler):
    """For what torch's weights-only reader refuses: our own mutants, none of which names more."""

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        if module.startswith("torch") or (module, name) in (
            ("collections", "OrderedDict"),
            ("builtins", "getattr"),
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


class _Restricted:
    Unpickler = _Allowed
    load = staticmethod(pickle.load)


def read_torch(data: bytes) -> Reading:
    """Return what torch.load finds in a file; raises what it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            root = torch.load(io.BytesIO(data), weights_only=True)
        except pickle.UnpicklingError:
            if b"ShardedTensor" not in data:
                raise
            root = torch.load(io.BytesIO(data), weights_only=False, pickle_module=_Restricted)
        return {n: _torch(v) for n, v in _model(root).items() if isinstance(v, torch.Tensor)}


def _model(root: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict: of a dict without tensors, the only one in it that has some."""
    if any(isinstance(v, torch.Tensor) for v in root.values()):
        return root
    inner = [
        v
        for v in root.values()
        if isinstance(v, dict) and any(isinstance(x, torch.Tensor) for x in v.values())
    ]
    return inner[0] if len(inner) == 1 else root


def _torch(value: torch.Tensor) -> tuple[Any, ...]:
    if isinstance(value, DTensor):
        mesh = value.device_mesh
        placements = tuple(map(_placement, value.placements))
        where = (
            tuple(mesh.mesh.shape),
            tuple(mesh.mesh.flatten().tolist()),
            tuple(mesh.mesh_dim_names or ()),
        )
        return "dtensor", *_local(value._local_tensor), tuple(value.shape), placements, where
    if isinstance(value, ShardedTensor):
        (shard,) = value.local_shards()
        return (
            "sharded",
            *_local(shard.tensor),
            tuple(value.size()),
            tuple(shard.metadata.shard_offsets),
        )
    return "plain", *_local(value)


def _local(value: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    value = value.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg()
    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return str(value.dtype).removeprefix("torch."), tuple(value.shape), raw


def _placement(value: Any) -> tuple[Kind, int, int]:
    kind = type(value).__name__
    if kind == "Replicate":
        return Kind.REPLICATE, 0, 1
    if kind == "_StridedShard":
        return Kind.STRIDED, value.dim, value.split_factor
    if kind == "Shard":
        return Kind.SHARD, value.dim, 1
    return Kind.PARTIAL, 0, 1


# --- genuine files -------------------------------------------------------------------------------


def genuine() -> list[Source]:
    """Return files of every form in which torch writes weights; begins a group of one fake process."""
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    return [source_of(name, _saved(make())) for name, make in _STATES.items()]


def _saved(state: object) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(state, stream)
    return stream.getvalue()


def _plain() -> object:
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "whole": whole,
        "row": whole[1],
        "turned": whole.t(),
        "bf16": torch.arange(6).bfloat16(),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "u16": torch.arange(4).to(torch.uint16),
        "step": 3,
    }


def _module() -> object:
    return torch.nn.Linear(2, 3).state_dict()


def _parameters() -> object:
    with_state = torch.nn.Parameter(torch.ones(2, 2))
    with_state.partition_dim = 0  # type: ignore[attr-defined]
    tensor = torch.arange(4.0)
    tensor.note = "x"  # type: ignore[attr-defined]
    buffer = torch.nn.Buffer(torch.arange(3.0))
    frozen = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    plain = torch.nn.Parameter(torch.ones(3))
    return {"a": with_state, "b": tensor, "c": buffer, "d": frozen, "e": plain}


def _lazy() -> object:
    return {"z": torch.ones(2, dtype=torch.complex64), "x": torch.ones(2), "i": torch.ones(2)}


def _dtensors() -> object:
    mesh = DeviceMesh("cpu", torch.arange(4).reshape(2, 2), mesh_dim_names=("fsdp", "tp"))
    flat = DeviceMesh("cpu", torch.arange(4), mesh_dim_names=("fsdp",))

    def made(local: torch.Tensor, where: DeviceMesh, placements: list[Any]) -> DTensor:
        return DTensor.from_local(local, where, placements, run_check=False)

    return {
        "rows": made(torch.arange(6.0).reshape(2, 3), flat, [Shard(0)]),
        "both": made(torch.arange(4.0).reshape(2, 2), mesh, [Shard(0), Shard(1)]),
        "copy": made(torch.arange(4.0), mesh, [Replicate(), Replicate()]),
        "parameter": torch.nn.Parameter(made(torch.arange(4.0), flat, [Shard(0)])),
        "plain": torch.arange(3.0),
    }


def _sharded() -> object:
    from torch.distributed._shard.sharded_tensor import Shard as Piece
    from torch.distributed._shard.sharded_tensor.metadata import (
        ShardedTensorMetadata,
        TensorProperties,
    )
    from torch.distributed._shard.sharding_spec import ShardMetadata

    places = [ShardMetadata([2 * r, 0], [2, 3], f"rank:{r}/cpu") for r in range(4)]
    local = Piece(torch.arange(6.0).reshape(2, 3), places[0])
    whole = ShardedTensorMetadata(places, torch.Size([8, 3]), TensorProperties(dtype=torch.float32))
    made = ShardedTensor._init_from_local_shards_and_global_metadata(
        [local], sharded_tensor_metadata=whole
    )
    return {"w": made, "b": torch.arange(3.0)}


_STATES: dict[str, Callable[[], object]] = {
    "plain": _plain,
    "module": _module,
    "wrapped": lambda: {"model": _plain(), "step": 7},
    "parameters": _parameters,
    "lazy": _lazy,
    "dtensors": _dtensors,
    "sharded": _sharded,
}


# --- crafted ones --------------------------------------------------------------------------------


def text(value: str) -> bytes:
    """Return the opcode of a string."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(path: str) -> bytes:
    """Return the opcode of a global."""
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def storage(key: str = "0", kind: str = "torch.FloatStorage", numel: int = 4) -> bytes:
    """Return the opcodes of a storage."""
    return b"(" + text("storage") + named(kind) + text(key) + text("cpu") + _int(numel) + b"tQ"


def _int(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


HOOKS = named("collections.OrderedDict") + b")R"
TENSOR = named("torch._utils._rebuild_tensor_v2")


def arguments(
    held: bytes | None = None,
    *,
    offset: bytes = _int(0),
    size: bytes = b"K\x04\x85",
    strides: bytes = b"K\x01\x85",
    grad: bytes = b"\x89",
    hooks: bytes = HOOKS,
    more: bytes = b"",
) -> bytes:
    """Return the opcodes of the arguments of a plain tensor of four elements."""
    return b"(" + (held or storage()) + offset + size + strides + grad + hooks + more + b"t"


def tensor(held: bytes | None = None, **parts: bytes) -> bytes:
    """Return the opcodes of a plain tensor."""
    return TENSOR + arguments(held, **parts) + b"R"


def pickled(*named_values: tuple[str, bytes]) -> bytes:
    """Return the pickle of a dict."""
    items = b"".join(text(name) + value for name, value in named_values)
    return b"\x80\x02}(" + items + b"u."


GOOD = pickled(("w", tensor()))
OTHER = storage("1")
_FROM_TYPE = named("torch._tensor._rebuild_from_type_v2")
_WITH_STATE = named("torch._utils._rebuild_parameter_with_state")
_NEG = text("neg") + b"\x88"


def _from_type(state: bytes, kind: str = "torch.Tensor") -> bytes:
    return _FROM_TYPE + b"(" + TENSOR + named(kind) + arguments() + state + b"tR"


CRAFTED: dict[str, bytes] = {
    "build-on-a-tensor": pickled(("w", tensor() + b"(" + OTHER + b"K\x00K\x04\x85K\x01\x85tb")),
    "data-in-a-state": pickled(("w", _from_type(b"}" + text("data") + tensor(OTHER) + b"s"))),
    "data-in-slots": pickled(("w", _from_type(b"N}" + text("data") + tensor(OTHER) + b"s\x86"))),
    "real-in-a-state": pickled(("w", _from_type(b"}" + text("real") + tensor(OTHER) + b"s"))),
    "data-in-an-ordered-state": pickled(
        ("w", _from_type(HOOKS + text("data") + tensor(OTHER) + b"s"))
    ),
    "data-of-a-parameter": pickled(
        (
            "w",
            _WITH_STATE
            + b"("
            + tensor()
            + b"\x89"
            + HOOKS
            + b"}"
            + text("data")
            + tensor(OTHER)
            + b"stR",
        )
    ),
    "neg": pickled(("w", tensor(more=b"}" + _NEG + b"s"))),
    "neg-in-an-ordered-dict": pickled(("w", tensor(more=HOOKS + _NEG + b"s"))),
    "conj-in-an-ordered-dict": pickled(
        (
            "w",
            tensor(
                storage("0", "torch.ComplexFloatStorage", 2),
                size=b"K\x02\x85",
                more=HOOKS + text("conj") + b"\x88s",
            ),
        )
    ),
    "two-types-of-a-storage": pickled(
        ("v", tensor()), ("w", tensor(storage("0", "torch.IntStorage")))
    ),
    "two-sizes-of-a-storage": pickled(
        ("v", tensor(storage("0", numel=4))),
        ("w", tensor(storage("0", "torch.HalfStorage", 8), size=b"K\x08\x85")),
    ),
    "hidden-methods": b"\x80\x02" + HOOKS + text("w") + tensor() + b"s}" + text("items") + b"Nsb.",
}
"""Forms that torch.load takes, and reads or may read otherwise than by the arguments alone."""

REFUSED_BY_TORCH: dict[str, bytes] = {
    "five-arguments": pickled(("w", TENSOR + b"(" + storage() + b"K\x00K\x04\x85K\x01\x85\x89tR")),
    "eight-arguments": pickled(("w", tensor(more=b"}}"))),
    "a-function-as-a-class": pickled(("w", TENSOR + arguments() + b"\x81")),
    "sizes-of-floats": pickled(
        ("v", tensor()), ("w", tensor(size=b"G" + struct.pack(">d", 4.0) + b"\x85"))
    ),
    "half-a-subclass": pickled(
        ("w", named("torch._utils._rebuild_wrapper_subclass") + arguments() + b"R")
    ),
    "sizes-in-a-dict": pickled(("w", tensor(size=b"}K\x04Ns"))),
    "hooks-that-are-none-of-it": pickled(("w", tensor(hooks=b"K\x05"))),
    "integers-with-gradients": pickled(
        ("w", tensor(storage("0", "torch.IntStorage"), grad=b"\x88"))
    ),
    "a-gradient-flag-of-text": pickled(("w", tensor(grad=text("no")))),
    "metadata-of-another-type": pickled(("w", tensor(more=b"K\x05"))),
    "a-subclass-that-is-a-dtype": pickled(("w", _from_type(b"}", "torch.float32"))),
}


def crafted_file(data: bytes, **records: bytes) -> bytes:
    """Return a file with two records of sixteen bytes and the pickle ``data``."""
    held = {
        "byteorder": b"little",
        "data/0": np.arange(1, 5, dtype=np.float32).tobytes(),
        "data/1": np.arange(5, 9, dtype=np.float32).tobytes(),
        "version": b"3\n",
    } | {k.replace("_", "."): v for k, v in records.items()}
    return Source("crafted", data, held).file()


def changed_later(source: Source) -> dict[str, bytes]:
    """Return pickles of DTensors whose states are changed through the memo when they were used."""
    data = source.pickle
    end = data.rindex(b"u")

    def later(first: str, key: str, value: bytes) -> bytes:
        # The dict whose first key is `first` was put into the memo when it was opened: }q<n>(
        opened = data.rindex(b"}q", 0, data.index(text(first)))
        change = b"h" + data[opened + 2 : opened + 3] + text(key) + value + b"s"
        # Of a layer's extra state: a dict of tensors is refused beside tensors.
        return data[:end] + text("later._extra_state") + change + data[end:]

    local = arguments(storage("0", numel=6), size=b"K\x02K\x03\x86", strides=b"K\x01K\x02\x86")
    shard = named("torch.distributed.tensor.placement_types.Shard") + b")\x81}" + text("dim")
    return {
        "local-tensor": later("_local_tensor", "_local_tensor", TENSOR + local + b"R"),
        "placements": later("mesh", "placements", shard + b"K\x01sb\x85"),
    }
