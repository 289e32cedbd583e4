"""How Python 3.8 to 3.14 spell enums, sets, bytes and nested classes at protocol 2: all are read.

The literal pickles are those that these interpreters write for classes of the names that torch has.
"""

from __future__ import annotations

import collections
import datetime
import enum
import io
import operator
import pickle
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scripts.makers import readings
from streamconv.errors import UnsafeInputError
from streamconv.torchfile import dcp
from streamconv.torchfile.allowlist import MEMBERS, PROCESS_GROUP_STATE
from streamconv.torchfile.unpickle import load_inert

_GETATTR = (b"c__builtin__\ngetattr\n", b"cbuiltins\ngetattr\n")
_FORMATS = "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING"
_OWNERS = sorted({owner for owner, _ in MEMBERS})


def load(data: bytes, **options: object) -> object:
    return load_inert(b"\x80\x02" + data + b".", "f.pt", extra_globals=dcp._GLOBALS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("owner", "name"), sorted(MEMBERS))
@pytest.mark.parametrize("getattr_", _GETATTR)
def test_members_by_name(owner: str, name: str, getattr_: bytes) -> None:
    """Python 3.11.0 to 3.11.3 for enums, all for nested classes."""
    value = load(getattr_ + readings.named(owner) + readings.text(name) + b"\x86R")
    assert value is MEMBERS[owner, name]


@pytest.mark.parametrize("owner", [o for o in _OWNERS if not o.endswith("ShardedTensor")])
def test_members_by_value(owner: str) -> None:
    assert load(readings.named(owner) + b"K\x00\x85q\x01R").args == (0,)  # type: ignore[attr-defined]


def test_objects_of_nested_classes() -> None:
    for memo in ((b"", b"", b""), (b"q\x01", b"q\x02", b"q\x03")):  # before 3.13 and since
        owner = readings.named("torch.distributed._shard.sharded_tensor.api.ShardedTensor")
        name = readings.text("ProcessGroupState")
        data = _GETATTR[0] + owner + memo[0] + name + memo[1] + b"\x86" + memo[2] + b"R"
        value = load(data + b")\x81}" + readings.text("local_rank") + b"K\x01sb")
        assert type(value) is PROCESS_GROUP_STATE
        assert value.state == {"local_rank": 1}


@pytest.mark.parametrize(
    "data",
    [
        b"c__builtin__\nset\n](K\x01K\x02e\x85R",
        b"cbuiltins\nset\n](K\x01K\x02e\x85R",
        b"c__builtin__\nfrozenset\n]K\x01a\x85R",
        b"c__builtin__\ncomplex\nG\0\0\0\0\0\0\0\0G?\xf0\0\0\0\0\0\0\x86R",
        b"c_codecs\nencode\nX\x04\0\0\0ab\xc3\xbfX\x06\0\0\0latin1\x86R",
        b"c__builtin__\nbytes\n)R",
        b"c__builtin__\nbytearray\nc_codecs\nencode\nX\x01\0\0\0xX\x06\0\0\0latin1\x86R\x85R",
        b"cpathlib\nPosixPath\nX\x01\0\0\0/\x85R",
        b"cpathlib._local\nPosixPath\nX\x01\0\0\0/\x85R",  # 3.13
    ],
)
def test_plain_values(data: bytes) -> None:
    assert load(data).path  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "made",
    [
        b")\x81}X\x01\0\0\0aK\x01sb",  # a dataclass
        b")\x81]K\x01ab",  # one with slots, frozen
        b"K\x01K\x02\x86\x81",  # a named tuple
        b"K\x05\x85R",  # a member of an enum
    ],
)
def test_classes_that_are_only_reported(made: bytes) -> None:
    outer = b"cmegatron.core.enums\nOuter\n"
    inner = _GETATTR[0] + outer + readings.text("Inner") + b"\x86R"
    deep = _GETATTR[0] + inner + readings.text("Deep") + b"\x86R"
    for owner, path in ((outer, "Outer"), (inner, "Outer.Inner"), (deep, "Outer.Inner.Deep")):
        value = load(owner + made, unknown="keep")
        assert value.path == f"megatron.core.enums.{path}"  # type: ignore[attr-defined]
        with pytest.raises(UnsafeInputError):
            load(owner + made)


class Keywords:
    """An object that protocol 2 makes by ``functools.partial(cls.__new__, cls, ...)``."""

    def __getnewargs_ex__(self) -> tuple[tuple[int, ...], dict[str, int]]:
        return (1,), {"b": 2}

    def method(self) -> None: ...

    @classmethod
    def maker(cls) -> None: ...


class Level(enum.Flag):
    LOW = 1
    HIGH = 2

    def __reduce_ex__(self, protocol: Any) -> Any:  # as Python 3.11.0 to 3.11.3 do
        if self is Level.LOW | Level.HIGH:
            return operator.or_, (Level.LOW, Level.HIGH)
        return getattr, (Level, self.name)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(Keywords(), id="keywords"),
        pytest.param(Keywords().method, id="method"),
        Keywords.maker,
        Level.LOW,
        Level.LOW | Level.HIGH,
        signal.SIGTERM,
        collections.deque([1], 2),
        collections.defaultdict(list, a=[1]),
        collections.Counter("ab"),
        range(3),
        bytearray(b"x"),
        {b"x": frozenset({1, 2j})},
        datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        type,
        torch.optim.AdamW,
        ValueError("x"),
    ],
    ids=str,
)
@pytest.mark.parametrize("pickler", [pickle._Pickler, pickle.Pickler])  # type: ignore[attr-defined]
def test_whatever_a_trainer_keeps_is_passed_over(value: object, pickler: Any) -> None:
    stream = io.BytesIO()
    pickler(stream, 2).dump({"kept": value, "beside": 1})
    found = load_inert(stream.getvalue(), "f.pt", unknown="keep")
    assert found["beside"] == 1  # type: ignore[index]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (_FORMATS, "__class__"),
        (_FORMATS, "OTHER"),
        ("torch.distributed._shard.sharded_tensor.api.ShardedTensor", "__init__"),
        ("megatron.X", "__globals__"),
        ("megatron.X", "a.b"),
        ("megatron.X", ""),
        ("torch._utils._rebuild_tensor_v2", "x"),
    ],
)
def test_no_other_member(owner: str, name: str) -> None:
    data = _GETATTR[0] + readings.named(owner) + readings.text(name) + b"\x86R"
    with pytest.raises(UnsafeInputError, match=r"builtins\.getattr"):
        load(data, unknown="keep")


def test_a_sharded_tensor_of_python_3_11(tmp_path: Path) -> None:
    try:
        source = next(s for s in readings.genuine() if s.name == "sharded")
    finally:
        dist.destroy_process_group()
    by_value = re.compile(re.escape(readings.named(_FORMATS)) + rb"(q.)K(.)\x85(q.)R", re.DOTALL)
    found = by_value.search(source.pickle)
    assert found is not None
    by_name = readings.text("TORCH_CONTIGUOUS_FORMAT")
    form = _GETATTR[0] + readings.named(_FORMATS) + found[1] + by_name + b"\x86" + found[3] + b"R"
    pickle = source.pickle[: found.start()] + form + source.pickle[found.end() :]
    ours = readings.read_ours(source.file(pickle), tmp_path / "a.pt")
    assert ours == readings.read_ours(source.file(), tmp_path / "a.pt")
    assert ours["w"][0] == "sharded"
