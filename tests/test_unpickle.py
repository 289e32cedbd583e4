"""The inert unpickler: it reads what torch pickles, runs nothing, and refuses in its own words."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.errors import BadInputError, StreamconvError, UnsafeInputError
from streamconv.torchfile import allowlist as allowed
from streamconv.torchfile.allowlist import WEIGHTS, build_globals
from streamconv.torchfile.inert import Frozen, Inert, InertDict, InertSize, InertStorage, Token
from streamconv.torchfile.unpickle import load_inert

_events: list[str] = []
_watching = False
_WATCHED = (
    "import",
    "open",
    "os.",
    "subprocess.",
    "socket.",
    "exec",
    "compile",
    "ctypes.",
    "shutil.",
)


def _hook(event: str, _: object) -> None:
    if _watching and event.startswith(_WATCHED):
        _events.append(event)


sys.addaudithook(_hook)


def load(data: bytes, **options: Any) -> Any:
    """Load under the audit hook: reading a pickle must open, import and run nothing."""
    global _watching
    _events.clear()
    _watching = True
    try:
        return load_inert(data, "f.pt", **options)
    finally:
        _watching = False
        assert _events == []


def code(*parts: object) -> bytes:
    """Put a protocol-2 pickle together: bytes are opcodes, (module, name) a GLOBAL, str a string."""
    out = b"\x80\x02"
    for part in parts:
        if isinstance(part, bytes):
            out += part
        elif isinstance(part, tuple):
            out += b"c%s\n%s\n" % tuple(str(p).encode() for p in part)
        elif isinstance(part, str):
            out += b"X" + struct.pack("<I", len(part.encode())) + part.encode()
        elif isinstance(part, int):
            out += b"J" + struct.pack("<i", part)
        else:
            raise TypeError(part)
    return out + b"."


SHARD = ("torch.distributed.tensor.placement_types", "Shard")
TENSOR = ("torch._utils", "_rebuild_tensor_v2")
ODICT = ("collections", "OrderedDict")
NEW = b")\x81"


# --- what torch writes ---------------------------------------------------------------------------


def data_pkl(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch._C.PyTorchFileReader(io.BytesIO(buffer.getvalue())).get_record("data.pkl")


def test_plain_tensor() -> None:
    value = load(data_pkl({"w": torch.ones(2, 3, dtype=torch.bfloat16)}))
    assert type(value) is dict
    tensor = value["w"]
    assert type(tensor) is allowed.REBUILD_TENSOR
    storage, offset, size, stride, grad, hooks = tensor.args
    assert type(storage) is InertStorage
    assert allowed.STORAGE_DTYPES[storage.kind] == "bfloat16"
    assert (storage.key, storage.location, storage.numel) == ("0", "cpu", 6)
    assert (offset, size, stride, grad) == (0, (2, 3), (3, 1), False)
    assert type(hooks) is InertDict
    assert hooks == {}


@pytest.mark.parametrize("dtype", sorted(allowed.DTYPES.values()))
def test_every_dtype(dtype: str) -> None:
    if not hasattr(torch, dtype):
        pytest.skip(f"no torch.{dtype} here")
    tensor = torch.empty(4, dtype=torch.uint8).view(torch.uint8)
    kind = getattr(torch, dtype)
    tensor = torch.empty(64, dtype=torch.uint8).view(kind)
    value = load(data_pkl(tensor))
    storage = value.args[0]
    if type(value) is allowed.REBUILD_TENSOR:
        assert allowed.STORAGE_DTYPES[storage.kind] == dtype
    else:
        assert type(value) is allowed.REBUILD_TENSOR_V3
        assert allowed.DTYPES[value.args[6]] == dtype
        assert storage.numel == 64


def test_parameters_sizes_and_metadata() -> None:
    model = torch.nn.Linear(2, 3)
    state = model.state_dict()
    state["p"] = model.weight
    state["size"] = torch.Size((4, 5))
    state["device"] = torch.device("cpu")
    state["dtype"] = torch.float16
    value = load(data_pkl(state))
    assert type(value) is InertDict
    assert list(value) == ["weight", "bias", "p", "size", "device", "dtype"]
    assert value.attributes["_metadata"][""] == {"version": 1}
    assert type(value["p"]) is allowed.REBUILD_PARAMETER
    assert type(value["size"]) is InertSize
    assert value["size"] == (4, 5)
    assert value["device"].args == ("cpu",)
    assert value["dtype"].path == "torch.float16"


def test_numpy_scalars_stay_inert() -> None:
    import numpy as np

    value = load(data_pkl({"loss": np.float64(1.5), "step": np.int64(3)}))
    assert value["loss"].path.endswith("multiarray.scalar")
    assert value["step"].args[0].path == "numpy.dtype"


def test_plain_values() -> None:
    values = [None, True, 1, -(2**70), 1.5, "ä", b"x", (1, (2,)), [3], {"a": 1, 2: "b"}]
    for protocol in range(6):
        # protocol 2 spells bytes as a call of _codecs.encode, which stays inert
        expected = [v for v in values if protocol > 2 or not isinstance(v, bytes)]
        assert load(pickle.dumps(expected, protocol)) == expected


# --- globals -------------------------------------------------------------------------------------

CALLS = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("__builtin__", "eval"),
    ("__builtin__", "__import__"),
    ("builtins", "open"),
    ("builtins", "type"),
    ("builtins", "object"),
    ("builtins", "print"),
    ("importlib", "import_module"),
    ("functools", "partial"),
    ("operator", "attrgetter"),
    ("operator", "methodcaller"),
    ("copyreg", "_reconstructor"),
    ("copy_reg", "_reconstructor"),
    ("types", "CodeType"),
    ("types", "FunctionType"),
    ("pickle", "loads"),
    ("_pickle", "loads"),
    ("torch", "load"),
    ("torch.hub", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.jit", "load"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._dynamo.guards", "GuardBuilder.get"),
    ("torch.utils.data", "DataLoader"),
    ("numpy", "load"),
    ("numpy.testing._private.utils", "runstring"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("streamconv.torchfile.unpickle", "load_inert"),
    ("torch.distributed.tensor.placement_types", "Shard.__init__"),
    ("torch", "Tensor.__setstate__"),
    ("collections", "OrderedDict.fromkeys"),
    ("collections", "defaultdict"),
    ("a" * 5000, "b" * 5000),
    ("torch.distributed", "tensor.placement_types.Shard"),
    ("__main__", "X"),
    ("antigravity", "x"),
    ("this", "s"),
]


@pytest.mark.parametrize("name", CALLS, ids=lambda n: ".".join(n)[:60])
@pytest.mark.parametrize(
    "use", [b"", b"(U\x07touch xtR", b")R", NEW, b"(U\x01atR}b", b")R}U\x01aU\x01bsb"]
)
def test_unknown_globals_are_named(name: tuple[str, str], use: bytes) -> None:
    with pytest.raises(UnsafeInputError) as caught:
        load(code(name, use))
    assert ".".join(name)[:190] in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert caught.value.where == "f.pt"


@pytest.mark.parametrize(
    "data",
    [
        code("os", "system", b"\x93", b"(U\x01xtR"),  # STACK_GLOBAL
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",
        b"(S'x'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'x'\no.",  # OBJ
        b"\x80\x04cos\nsystem\n)}\x92.",  # NEWOBJ_EX
    ],
)
def test_other_ways_to_a_global(data: bytes) -> None:
    with pytest.raises(UnsafeInputError, match=r"os\.system"):
        load(data)


@pytest.mark.parametrize("data", [b"\x80\x02\x82\x01.", b"\x80\x02\x83\x01\x00.", b"\x84\1\0\0\0."])
def test_extension_registry(data: bytes) -> None:
    with pytest.raises(BadInputError):
        load(data)


def test_keeping_unknown_globals() -> None:
    data = code(("argparse", "Namespace"), NEW, b"}", "lr", 3, b"sb")
    with pytest.raises(UnsafeInputError):
        load(data)
    kept = load(data, unknown="keep")
    assert kept.path == "argparse.Namespace"
    assert kept.state == {"lr": 3}
    same = load(code(b"(", ("a", "B"), ("a", "B"), b"t"), unknown="keep")
    assert same[0] is same[1]


def test_extra_globals() -> None:
    extra = build_globals([("torch.distributed.checkpoint.metadata", Inert, "Metadata Other")])
    value = load(
        code(("torch.distributed.checkpoint.metadata", "Metadata"), NEW), extra_globals=extra
    )
    assert value.path == "torch.distributed.checkpoint.metadata.Metadata"
    assert not set(extra) & set(WEIGHTS)


def test_the_table_is_inert() -> None:
    """Every stand-in is one of ours: no method but those that keep or refuse."""
    for (module, name), kind in WEIGHTS.items():
        assert isinstance(kind, Frozen), (module, name)
        assert kind.__module__.startswith("streamconv."), (module, name)
        assert not hasattr(kind, "__dict__") or "__dict__" not in kind.__dict__


# --- misuse of what is allowed -------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        (("torch", "Tensor"), "__class__"),
        (("torch._utils", "_rebuild_tensor_v2"), "__globals__"),
        (("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"), "__init__"),
        (("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"), "__mro__"),
        (("collections", "OrderedDict"), "ProcessGroupState"),
        ("", "join"),
        (("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"),),
        (),
    ],
)
@pytest.mark.parametrize("module", ["builtins", "__builtin__"])
def test_getattr_is_no_getattr(module: str, args: tuple[object, ...]) -> None:
    with pytest.raises(UnsafeInputError, match="getattr"):
        load(code((module, "getattr"), b"(", *args, b"tR"))


def test_getattr_as_torch_uses_it() -> None:
    sharded = ("torch.distributed._shard.sharded_tensor.api", "ShardedTensor")
    value = load(
        code(
            ("__builtin__", "getattr"),
            sharded,
            "ProcessGroupState",
            b"\x86R",
            NEW,
            b"}",
            "x",
            1,
            b"sb",
        )
    )
    assert type(value) is allowed.PROCESS_GROUP_STATE
    assert value.state == {"x": 1}


GLOBALS = sorted(WEIGHTS)


@pytest.mark.parametrize(
    "state", [b"}", b"}U\x04pathK\x01s", b"N}U\x04argsK\x01s\x86", b"N", b"K\x05"]
)
def test_build_on_a_global(state: bytes) -> None:
    """BUILD on the class itself would change the reader for every later file."""
    for name in GLOBALS:
        before = dict(vars(WEIGHTS[name]))
        with pytest.raises(UnsafeInputError, match="state of"):
            load(code(name, state, b"b"))
        assert dict(vars(WEIGHTS[name])) == before


@pytest.mark.parametrize(
    "more",
    [b"}b}b", b"}U\x01aK\x01sb}b", b"K\x01bK\x02b", b"}bN}U\x05stateK\x01s\x86b", b"(K\x01tb(tb"],
)
def test_second_state(more: bytes) -> None:
    with pytest.raises(UnsafeInputError, match="second state"):
        load(code(SHARD, NEW, more))


@pytest.mark.parametrize("target", [ODICT, ("torch", "Size")])
def test_state_of_containers(target: tuple[str, str]) -> None:
    twice = b"}U\x01aK\x01sb}U\x01aK\x02sb"
    with pytest.raises(UnsafeInputError, match="state"):
        load(code(target, b")R", twice))


def test_state_of_a_storage() -> None:
    storage = code(b"(", "storage", ("torch", "FloatStorage"), "0", "cpu", 1, b"tQ}b")
    with pytest.raises(UnsafeInputError, match="state for a storage"):
        load(storage)


@pytest.mark.parametrize(
    "name", [("torch", "float32"), ("torch", "Tensor"), ("torch", "FloatStorage"),
             ("torch.nn.parameter", "Parameter"), ("torch.storage", "UntypedStorage")]
)  # fmt: skip
@pytest.mark.parametrize("use", [b")R", NEW, b"(K\x01tR", b"}bN", b"K\x01\x85\x81"])
def test_tokens_are_never_made(name: tuple[str, str], use: bytes) -> None:
    with pytest.raises(UnsafeInputError):
        load(code(name, use))


@pytest.mark.parametrize("setter", [setattr, lambda c, n, v: delattr(c, n)])
def test_stand_ins_are_frozen(setter: Callable[..., None]) -> None:
    for kind in (Inert, Token, InertDict, InertSize, allowed.SHARD, allowed.InertGetattr):
        with pytest.raises(Exception, match="an attempt to change"):
            setter(kind, "path", "x")


@pytest.mark.parametrize(
    "key",
    [b"N", b"\x88", b"G" + struct.pack(">d", 1.5), b")", b"(K\x01t", b"ccollections\nOrderedDict\n",
     b"cbuiltins\ngetattr\n"],
)  # fmt: skip
def test_keys_are_str_or_int(key: bytes) -> None:
    with pytest.raises(UnsafeInputError, match="dict key"):
        load(code(ODICT, b")R", key, 1, b"s"))


@pytest.mark.parametrize("value", [b"c" + b"torch._utils\n_rebuild_tensor_v2\n)R", b"}", b"]"])
def test_unhashable_keys(value: bytes) -> None:
    with pytest.raises((BadInputError, UnsafeInputError)):
        load(code(b"}", value, 1, b"s"))


def test_duplicate_keys() -> None:
    with pytest.raises(UnsafeInputError, match="'w' occurs twice"):
        load(code(ODICT, b")R(", "w", 1, "w", 2, b"u"))


@pytest.mark.parametrize(
    "pid",
    [
        b"N", b"K\x01", b"U\x07storage", b")", b"(U\x07storaget", b"}",
        b"(U\x06moduleNNNNt",
        b"(U\x07storageNU\x010U\x03cpuK\x01t",
        b"(U\x07storagectorch\nFloatStorage\nK\x00U\x03cpuK\x01t",
        b"(U\x07storagectorch\nFloatStorage\nU\x010NK\x01t",
        b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuG" + struct.pack(">d", 1) + b"t",
        b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x01K\x01t",
    ],
)  # fmt: skip
def test_persistent_ids(pid: bytes) -> None:
    with pytest.raises(UnsafeInputError, match="names no storage"):
        load(code(pid, b"Q"))


def test_textual_persistent_id() -> None:
    with pytest.raises(UnsafeInputError, match="names no storage"):
        load(b"Pstorage\n.")


def test_append_to_a_record() -> None:
    for more in (b"K\x01a", b"(K\x01K\x02e", b"(K\x01K\x02u", b"\x28K\x01\x90"):
        with pytest.raises(BadInputError):
            load(code(SHARD, NEW, more))


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> bytes:
    return data_pkl(torch.nn.Linear(3, 4).state_dict())


def test_every_truncation(real: bytes) -> None:
    for keep in range(len(real)):
        with pytest.raises(BadInputError, match="damaged or truncated"):
            load(real[:keep])


def test_bytes_after_the_end(real: bytes) -> None:
    for tail in (b".", b"\0", b"x" * 1000, real, b"N."):
        with pytest.raises(BadInputError, match="follow the end"):
            load(real + tail)


@settings(max_examples=400, deadline=None)
@given(at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_flipped_bytes(at: int, value: int) -> None:
    original = _LINEAR
    broken = bytearray(original)
    broken[at % len(original)] = value
    _may_only_refuse(bytes(broken))


_LINEAR = data_pkl(torch.nn.Linear(3, 4).state_dict())
_SMALL_OPCODES = [o.code.encode("latin-1") for o in pickletools.opcodes if o.arg is None]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(_SMALL_OPCODES),
            st.sampled_from([b"K\x01", b"U\x01a", b"h\x00", b"q\x00", b"cos\nsystem\n", b"U\x00"]),
            st.sampled_from(GLOBALS).map(lambda n: b"c%s\n%s\n" % (n[0].encode(), n[1].encode())),
        ),
        max_size=25,
    )
)
def test_random_programs(parts: list[bytes]) -> None:
    _may_only_refuse(b"\x80\x02" + b"".join(parts) + b".")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_garbage(data: bytes) -> None:
    if b"r" not in data and b"\x96" not in data:  # LONG_BINPUT and BYTEARRAY8: see the bombs
        _may_only_refuse(data)


def _may_only_refuse(data: bytes) -> None:
    if _is_bomb(data):
        return
    with contextlib.suppress(StreamconvError):
        load(data)


def _is_bomb(data: bytes) -> bool:
    """A memo index or length that would take gigabytes: those run in a process with a limit."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("LONG_BINPUT", "PUT") and argument > 1 << 20:  # type: ignore[operator]
                return True
    except (ValueError, DeprecationWarning):
        return b"r" in data or b"p" in data
    return False


BOMBS = {
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "text memo": b"\x80\x02Np4000000000\n.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "unicode": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b".",
    "long": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 50) + b"N.",
    "nested lists": b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "nested tuples": b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
    "nested marks": b"\x80\x02" + b"(" * 5_000_000 + b".",
    "laughs": b"\x80\x02)" + b"2\x86" * 60 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_in_a_limited_process(name: str, tmp_path: Path) -> None:
    """As the planner runs it: in a child with an address-space limit."""
    (tmp_path / "bomb").write_bytes(BOMBS[name])
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from streamconv.torchfile.unpickle import load_inert\n"
        "from streamconv.errors import StreamconvError\n"
        "try:\n"
        "    load_inert(open(sys.argv[1], 'rb').read(), 'bomb')\n"
        "except StreamconvError as error:\n"
        "    print(type(error).__name__)\n"
        "else:\n"
        "    print('read')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "bomb")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).resolve().parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    harmless = {"laughs", "nested lists", "nested tuples"}
    assert done.stdout.strip() in (
        {"read"} if name in harmless else {"BadInputError", "UnsafeInputError"}
    )
    # CPython 3.11 looks at a field that it has not set yet when a bytearray cannot be allocated, and
    # says so or not as the memory happens to be. Nobody sees it: the planner drops this stream.
    told = "SystemError: deallocated bytearray object has exported buffers\n"
    assert done.stderr == "" or (name == "bytearray" and done.stderr == told)


def test_odd_escapes_are_no_warning() -> None:
    with pytest.raises(BadInputError, match="DeprecationWarning"):  # pytest makes it an error
        load(b"S'\\o'\n.")


def test_size_cap() -> None:
    with pytest.raises(UnsafeInputError, match="too large"):
        load(b"\x80\x02" + b"N0" * 100 + b"N.", max_nbytes=100)


# --- malice --------------------------------------------------------------------------------------


class _Evil:
    def __init__(self, call: Callable[..., object], *args: object) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.args


def _evils(canary: Path) -> Iterator[object]:
    touch = f"open({str(canary)!r}, 'w').close()"
    yield _Evil(os.system, f"touch {canary}")
    yield _Evil(eval, touch)
    yield _Evil(exec, touch)
    yield _Evil(open, str(canary), "w")
    yield _Evil(os.mkdir, str(canary))
    yield _Evil(subprocess.Popen, ["touch", str(canary)])
    yield _Evil(__import__, "antigravity")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "hide", [lambda e: e, lambda e: [1, {"a": (e,)}], lambda e: {"w": torch.ones(1), "z": e}]
)
def test_nothing_is_executed(
    hide: Callable[[object], object], protocol: int, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    for evil in _evils(canary):
        value = hide(evil)
        has_tensor = isinstance(value, dict)
        data = data_pkl(value) if has_tensor else pickle.dumps(value, protocol)
        with pytest.raises(UnsafeInputError):
            load(data)
        load(data, unknown="keep")
        assert not canary.exists()
