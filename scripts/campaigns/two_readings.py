"""One file, two readings: pickles that torch.load and our reader both take, but not for the same.

COUNT mutants of genuine torch.save files of every form (plain tensors, views, parameters, subclass
states, DTensors, ShardedTensors; files of older releases where they are kept beside the repository).
The mutants know the structure of a pickle: opcodes, arguments, globals, memo and stack, and all stay
complete zips. Both succeed and differ is a breach. What ours takes and torch refuses is counted.
"""

from __future__ import annotations

import contextlib
import pickletools
import random
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from scripts.campaigns.common import REPOSITORY, Figures, main
from scripts.campaigns.inproc import each_number
from scripts.makers import readings
from scripts.makers.readings import Source
from streamconv.errors import StreamconvError

_GLOBALS = (
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"),
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
    *("torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_wrapper_subclass"),
    *("torch.FloatStorage", "torch.IntStorage", "torch.BFloat16Storage", "torch.HalfStorage"),
    *("torch.LongStorage", "torch.ByteStorage", "torch.storage.UntypedStorage"),
    *("torch.float32", "torch.bfloat16", "torch.int32", "torch.uint8", "torch.uint16"),
    *("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"),
    *("torch.Size", "collections.OrderedDict", "torch.distributed.tensor.DTensor"),
    *(
        f"torch.distributed.tensor.placement_types.{p}"
        for p in ("Shard", "_StridedShard", "Replicate", "Partial")
    ),
)
_KEYS = (
    *("data", "real", "imag", "grad", "requires_grad", "neg", "conj", "names", "_backward_hooks"),
    *("_local_tensor", "_spec", "mesh", "_mesh", "_rank_map", "_flatten_rank_map", "_layout"),
    *("placements", "tensor_meta", "shard_order", "dim", "split_factor", "shape", "stride"),
    *("_metadata", "shard_offsets", "shard_sizes", "tensor", "metadata", "size", "model", "w"),
    *("mesh_dim_names", "_mesh_dim_names", "partition_dim", "items", "0", "1", "cpu", "storage"),
)
_HOOKS = readings.HOOKS


class Op:
    """An opcode of a pickle: its name, its argument, and its bytes."""

    __slots__ = ("arg", "name", "raw")

    def __init__(self, name: str, arg: object, raw: bytes) -> None:
        self.name, self.arg, self.raw = name, arg, raw


def parse(data: bytes) -> list[Op]:
    """Return the opcodes of a pickle."""
    found = [(op.name, arg, at) for op, arg, at in pickletools.genops(data)]
    ends = [*(at for *_, at in found[1:]), len(data)]
    return [Op(n, arg, data[at:end]) for (n, arg, at), end in zip(found, ends, strict=True)]


class Mutator:
    """Changes a pickle in one to three places, each in a way that most often leaves it whole."""

    def __init__(self, ops: Sequence[Op], rng: random.Random) -> None:
        self._ops = list(ops)
        self._rng = rng
        self._memo = sorted({op.arg for op in ops if op.name in ("BINPUT", "LONG_BINPUT")})

    def mutant(self) -> bytes:
        """Return a mutated pickle."""
        changes = (
            *((self._number,) * 5),
            *((self._global,) * 4),
            *((self._text,) * 3),
            *((self._insert_state,) * 4),
            *((self._insert_item,) * 4),
            *((self._later,) * 4),
            *((self._argument,) * 3),
            self._replace_value,
            self._swap,
            self._delete,
            self._repeat,
            self._get,
            self._call,
            self._container,
        )
        for _ in range(self._rng.choice((1, 1, 1, 2, 2, 3))):
            self._rng.choice(changes)()
        return b"".join(op.raw for op in self._ops)

    def _at(self, *names: str) -> int | None:
        found = [k for k, op in enumerate(self._ops) if op.name in names]
        return self._rng.choice(found) if found else None

    def _put(self, at: int, raw: bytes, *, replace: int = 0) -> None:
        self._ops[at : at + replace] = [Op("NEW", None, raw)]

    def _value(self) -> bytes:
        rng = self._rng
        memo = rng.choice(self._memo)
        return rng.choice(
            [
                b"N", b"\x88", b"\x89", b")", b"]", b"}", _HOOKS, b"K\x00", b"K\x01", b"K\x02",
                b"J\xff\xff\xff\xff", b"G" + struct.pack(">d", 2.0), b"K\x02\x85",
                b"K\x02K\x01\x86", b"}" + readings.text(rng.choice(_KEYS)) + b"\x88s",
                _HOOKS + readings.text(rng.choice(_KEYS)) + b"\x88s",
                readings.text(rng.choice(_KEYS)), readings.named(rng.choice(_GLOBALS)),
                _get(memo), _get(memo), _get(memo), readings.tensor(),
            ]
        )  # fmt: skip

    def _number(self) -> None:
        at = self._at("BININT", "BININT1", "BININT2", "LONG1", "BININT1")
        if at is None:
            return
        old = self._ops[at].arg
        new = self._rng.choice([0, 1, 2, 3, 4, 6, 8, -1, old, old, 12, 24])
        new += self._rng.choice([0, 0, 1, -1])
        kinds = [b"J" + struct.pack("<i", max(-(2**31), min(new, 2**31 - 1)))]
        kinds.append(b"G" + struct.pack(">d", float(new)))
        if 0 <= new < 256:
            kinds += [b"K" + bytes([new])] * 3
        if new in (0, 1):
            kinds.append(b"\x88" if new else b"\x89")
        self._put(at, self._rng.choice(kinds), replace=1)

    def _global(self) -> None:
        at = self._at("GLOBAL")
        if at is not None:
            self._put(at, readings.named(self._rng.choice(_GLOBALS)), replace=1)

    def _text(self) -> None:
        at = self._at("BINUNICODE")
        if at is not None:
            others = [op.raw for op in self._ops if op.name == "BINUNICODE"]
            new = self._rng.choice([*others, *map(readings.text, _KEYS)])
            self._put(at, new, replace=1)

    def _insert_state(self) -> None:
        """BUILD on what a call has just made."""
        at = self._at("REDUCE", "NEWOBJ", "BUILD", "BINPERSID", "EMPTY_DICT")
        if at is None:
            return
        item = b"}" + readings.text(self._rng.choice(_KEYS)) + self._value() + b"s"
        state = self._rng.choice([item, b"N" + item + b"\x86", self._value(), item + b"N\x86"])
        self._put(at + 1, state + b"b")

    def _insert_item(self) -> None:
        """Another item in a dict that has just been opened."""
        at = self._at("EMPTY_DICT", "EMPTY_DICT", "SETITEM", "SETITEMS", "REDUCE")
        if at is not None:
            item = readings.text(self._rng.choice(_KEYS)) + self._value() + b"s"
            put = 1 + (self._ops[at + 1].name in ("BINPUT", "LONG_BINPUT"))
            self._put(at + put, item)

    def _later(self) -> None:
        """A dict or an object is changed through the memo when it was used already."""
        end = max(k for k, op in enumerate(self._ops) if op.name in ("SETITEMS", "SETITEM"))
        changed = _get(self._rng.choice(self._memo))
        item = readings.text(self._rng.choice(_KEYS)) + self._value() + b"s"
        kind = self._rng.randrange(3)
        change = (item, b"}" + item + b"b", self._value() + b"a")[kind]
        if self._ops[end].name == "SETITEMS":
            self._put(end, readings.text("later") + changed + change)

    def _argument(self) -> None:
        """One argument more, or one less."""
        at = self._at("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
        if at is None:
            return
        if self._ops[at].name == "TUPLE":
            if self._rng.random() < 0.7:
                self._put(at, self._value())
            else:
                self._put(at - 1, b"", replace=1)
        else:
            self._put(at, self._rng.choice([b"\x85", b"\x86", b"\x87"]), replace=1)

    def _replace_value(self) -> None:
        names = ("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "BININT1", "BINGET", "BINUNICODE")
        at = self._at(*names)
        if at is not None:
            self._put(at, self._value(), replace=1)

    def _swap(self) -> None:
        at = self._rng.randrange(1, len(self._ops) - 2)
        self._ops[at], self._ops[at + 1] = self._ops[at + 1], self._ops[at]

    def _delete(self) -> None:
        del self._ops[self._rng.randrange(1, len(self._ops) - 1)]

    def _repeat(self) -> None:
        at = self._rng.randrange(1, len(self._ops) - 1)
        self._ops.insert(at, self._ops[at])

    def _get(self) -> None:
        at = self._at("BINGET", "LONG_BINGET")
        if at is not None:
            self._put(at, _get(self._rng.choice(self._memo)), replace=1)

    def _call(self) -> None:
        """REDUCE for NEWOBJ and the other way round."""
        at = self._at("REDUCE", "NEWOBJ")
        if at is not None:
            self._put(at, b"R" if self._ops[at].name == "NEWOBJ" else b"\x81", replace=1)

    def _container(self) -> None:
        at = self._at("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE")
        if at is not None:
            self._put(at, self._rng.choice([b"}", b"]", b")", _HOOKS, b"\x8f"]), replace=1)


def _get(memo: object) -> bytes:
    number = int(str(memo))
    return b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)


def campaign(work: Path, count: int, seed: int) -> Figures:
    torch.set_num_threads(1)
    sources = [*readings.genuine(), *_older(work)]
    parsed = [(source, parse(source.pickle)) for source in sources]
    trial = partial(_trial, parsed, seed)
    figures = each_number(work, count, trial, on_crash=_crashed)
    for name, data in (readings.CRAFTED | readings.REFUSED_BY_TORCH).items():
        figures.merge(_compare(readings.crafted_file(data), work / "crafted.pt", name))
    return figures


def _older(work: Path) -> Iterator[Source]:
    """Yield files of older releases that the torch here still reads."""
    folder = REPOSITORY.parent / "shared" / "checkpoints" / "fsdp"
    for path in sorted(folder.glob("t2*/*_rank_0.pt")):
        data = path.read_bytes()
        if len(data) < 1 << 20:
            try:
                same = readings.read_torch(data) == readings.read_ours(data, work / "older.pt")
            except Exception:  # noqa: BLE001 - whatever torch raises for what it cannot read
                continue
            if same:
                yield readings.source_of(path.parent.name, data)


def _trial(
    parsed: Sequence[tuple[Source, Sequence[Op]]], seed: int, folder: Path, number: int
) -> Figures:
    rng = random.Random(f"{seed}/{number}")
    source, ops = rng.choice(parsed)
    data = Mutator(ops, rng).mutant()
    figures = _compare(source.file(data), folder / "mutant.pt", f"{source.name}, mutant {number}")
    figures.add("mutants")
    return figures


def _compare(data: bytes, path: Path, name: str) -> Figures:
    figures = Figures()
    ours = theirs = None
    try:
        ours = readings.read_ours(data, path)
    except StreamconvError:
        pass
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        figures.breach(f"{name}: {type(error).__name__}: {error}"[:300])
    with contextlib.suppress(Exception):  # torch raises whatever Python does
        theirs = readings.read_torch(data)
    if ours is None:
        figures.add("refused by both" if theirs is None else "refused by us alone")
    elif theirs is None:
        figures.add("taken by us alone")
    elif ours == theirs:
        figures.add("read alike")
    else:
        odd = [n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)]
        figures.breach(
            f"{name}: {odd[0]!r} is {str(ours.get(odd[0]))[:200]} and {str(theirs.get(odd[0]))[:200]}"
        )
    return figures


def _crashed(_: int, signal: str) -> Figures:
    figures = Figures()
    figures.add("mutants")
    figures.add(f"ended by {signal} in process")
    return figures


if __name__ == "__main__":
    main(campaign, count=20_000)
