"""The lines of a plan as data of ours: every name, number and relation checked as it is read.

A plan may come from a stranger. Whoever runs one trusts it as to which files it reads, and no further:
what it names lies in the output, what it moves lies within its tensors, and the headers that it writes
are those of the tensors that it writes.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple, get_args

from streamconv.files.jsonfile import COUNT, NUMBER, TEXT, Leaf, mismatches, unique_keys
from streamconv.files.names import is_output_name
from streamconv.ir.dtypes import BY_NAME, F32, DType
from streamconv.ir.identity import JobIdentity
from streamconv.ir.lowering import Dim, Move, MoveOp, ProductAt, ScaledAt
from streamconv.ir.planned import (
    OutputFile,
    PlannedProduct,
    PlannedScale,
    PlannedSource,
    PlannedTensor,
    PlannedTerm,
    SideFile,
    Totals,
    WrittenFile,
)
from streamconv.ir.recipe import AddScalar, Cast, Code, Decode, Encode, Zero
from streamconv.ir.source import ShardTable, Skipped, SourceFile
from streamconv.options import QUANTIZATIONS
from streamconv.storage.objects import SCHEMES

# Of a table of shards; a column of one value throughout is written as that value.
COLUMNS = {
    "files": "I",
    "keys": "I",
    "starts": "Q",
    "nbytes": "Q",
    "crcs": "I",
    "header_nbytes": "H",
}
# No tensor is larger, and sums of a few of these are still exact in a file's offsets.
_MOST = 1 << 62


# What reading such lines raises where they are not ours.
DAMAGES = (
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
)
_BYTES_BY_TYPE = Leaf(
    "bytes by type", lambda v: isinstance(v, dict) and all(COUNT.holds(n) for n in v.values())
)
_TOTALS = {
    **dict.fromkeys(
        ("tensors", "parameters", "read_bytes", "write_bytes", "unverifiable_bytes", "merged"),
        COUNT,
    ),
    "source_dtypes": _BYTES_BY_TYPE,
    "output_dtypes": _BYTES_BY_TYPE,
    "scaled?": COUNT,
    "encoded?": COUNT,
    "summed?": COUNT,
}


class Shape(NamedTuple):
    """What moves amount to: elements written, the last of them, and how far each reads."""

    elements: int
    last_dst: int
    reads: tuple[tuple[int, int, int, DType | None, tuple[MoveOp, ...]], ...]


Pattern = tuple[tuple[Move, ...], Shape]


def parse(line: str) -> dict[str, Any]:
    """Return the object of a line; raises ``ValueError`` where it is not one, or says a thing twice."""
    data = json.loads(line, object_pairs_hook=unique_keys, parse_constant=_no_number)
    if not isinstance(data, dict) or not data:
        raise ValueError(f"not an object: {line[:40]!r}")
    return data


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def count(value: Any, what: str, below: int = _MOST) -> int:
    """Return a whole number from 0 on; raises ``ValueError`` for anything else."""
    if type(value) is not int or not 0 <= value < below:
        raise ValueError(f"{what} is {str(value)[:40]}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {str(value)[:40]}")
    return value


def output_name(value: Any, *suffixes: str) -> str:
    """Return the name of a file in the output; none is hidden, and none leads out of it."""
    if not is_output_name(value) or any(part.startswith(".") for part in value.split("/")):
        raise ValueError(f"{str(value)[:80]!r} is not the name of an output file")
    if suffixes and not value.endswith(suffixes):
        raise ValueError(f"{value[:80]!r} does not end in {' or '.join(suffixes)}")
    return str(value)


def _clean(path: str, *, absolute: bool) -> bool:
    """Whether a path is written in the one way that leads nowhere else."""
    parts = path.split("/")
    if absolute:
        if parts[0].removesuffix(":") in SCHEMES and parts[1:2] == [""]:
            del parts[0]  # an address: its bucket is what a path's first folder is
        first, *parts = parts
        if first:
            return False
    return "\0" not in path and all(part not in ("", ".", "..") for part in parts)


def totals(data: dict[str, Any]) -> Totals:
    """Return what the plan amounts to."""
    wrong = next(mismatches(data, _TOTALS), None)
    _need(wrong is None, f"the totals: {wrong}")
    return Totals(**data)


def notices(data: Any) -> tuple[str, ...]:
    """Return what there is to tell."""
    return tuple(_text(n, "a notice") for n in data)


def skipped(data: Any) -> tuple[Skipped, ...]:
    """Return what is left out, and why."""
    return tuple(Skipped(_text(n, "a name"), _text(r, "a reason")) for n, r in data)


def source_file(data: dict[str, Any], job: JobIdentity | None) -> SourceFile:
    """Return a source file: below the checkpoint's root, or where the job says that others lie.

    These are the base model's folder, and what the source is averaged with: folders, or files.
    """
    shape = {
        "file": TEXT,
        "nbytes": COUNT,
        "mtime_ns": Leaf("a time", lambda v: type(v) is int and abs(v) < 1 << 63),
        "directory_hash": TEXT,
        "entry_prefix": TEXT,
        "index": TEXT,
        "version?": TEXT,
    }
    wrong = next(mismatches(data, shape), None)
    _need(wrong is None, f"a source file: {wrong}")
    path, index = data["file"], data["index"]
    inside = _clean(path, absolute=False)
    others = [PurePosixPath(o) for o in job.others] if job is not None else []
    if not inside and job is not None and _clean(path, absolute=True):
        at = PurePosixPath(path)
        of_base = job.base is not None and at.parent == PurePosixPath(job.base)
        inside = of_base or any(at.is_relative_to(o) for o in others)
    _need(inside, f"the source file {path[:80]!r} lies outside the checkpoint")
    beside = _clean(index, absolute=True) and any(
        PurePosixPath(index).is_relative_to(o) for o in others
    )
    _need(
        not index or beside or _clean(index, absolute=False),
        f"the index {index[:80]!r} lies outside it",
    )
    return SourceFile(path=path, **{k: v for k, v in data.items() if k != "file"})


def side_file(data: dict[str, Any], folder: str | None) -> tuple[SideFile, str]:
    """Return a side file and the folder that it comes from, which is ``folder`` where that is given."""
    name, path = output_name(data["side"]), _text(data["path"], "the path of a side file")
    _need(
        _clean(path, absolute=True) and path.endswith("/" + name),
        f"{name} comes from {path[:80]!r}",
    )
    comes_from = path.removesuffix(name)
    _need(folder in (None, comes_from), f"side files come from {folder} and {comes_from}")
    side = SideFile(name, path, count(data["nbytes"], "a size"), _text(data["xxh3"], "a hash"))
    return side, comes_from


def written_file(data: dict[str, Any]) -> WrittenFile:
    """Return what is written from the plan itself: settings and indexes, never code."""
    return WrittenFile(output_name(data["text"], ".json"), count(data["nbytes"], "a size"))


def output_file(data: dict[str, Any]) -> OutputFile:
    """Return an output file; its header is held against its tensors as they come (:class:`Header`)."""
    return OutputFile(
        output_name(data["output"], ".safetensors"),
        count(data["nbytes"], "a size"),
        _text(data["header"], "a header"),
        count(data["tensors"], "a number of tensors"),
        tuple((count(f, "a file"), count(at, "an offset")) for f, at in data.get("shared", ())),
    )


def apart(names: Sequence[str]) -> None:
    """Raise ``ValueError`` where two output files have one name, or one is a folder of another."""
    seen: set[str] = set()
    for name in names:
        _need(name not in seen, f"two output files are called {name!r}")
        seen.add(name)
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    both = next(iter(seen & folders), None)
    _need(both is None, f"{both!r} is a file and a folder")


def source(data: dict[str, Any], files: int) -> PlannedSource:
    """Return a tensor of the checkpoint; ``files`` is the number of source files."""
    n = count(data["n"], "a number of pieces")
    columns = {}
    for name, code in COLUMNS.items():
        column = data[name] if isinstance(data[name], list) else [data[name]] * n
        for value in column if isinstance(data[name], list) else column[:1]:
            count(value, name)
        _need(len(column) == n, f"{len(column)} {name} for {n} pieces")
        columns[name] = array(code, column)
    _need(max(columns["files"], default=0) < files, "a piece in a file that there is not")
    return PlannedSource(
        _text(data["fqn"], "a name"), BY_NAME[data["dtype"]], ShardTable(**columns)
    )


def pattern(data: dict[str, Any]) -> Pattern:
    """Return moves, and what they amount to."""
    moves = tuple(_move(m) for m in data["moves"])
    reads = []
    for m in moves:
        last_src = m.src_offset + sum((d.size - 1) * d.src for d in m.dims)
        reads.append((m.source, m.shard, last_src, _result(m.ops), m.ops))
    elements = sum(math.prod(d.size for d in m.dims) for m in moves)
    last_dst = max((m.last_dst for m in moves), default=-1)
    return moves, Shape(elements, last_dst, tuple(reads))


def _move(data: Any) -> Move:
    number, shard, dst, src, dims, ops = data
    found = tuple(Dim(*(count(n, "a step") for n in dim)) for dim in dims)
    _need(all(d.size for d in found), "a step of no size")
    return Move(
        count(number, "a source"),
        count(shard, "a piece"),
        count(dst, "an offset"),
        count(src, "an offset"),
        found,
        tuple(_op(op) for op in ops),
    )


def _op(data: Sequence[Any]) -> MoveOp:
    kind, *values = data
    if kind == "product":
        return ProductAt(*(count(v, "a place in a product") for v in values))
    if kind == "scaled":
        return ScaledAt(*(count(v, "a place in a matrix") for v in values))
    if kind == "zero" and not values:
        return Zero()
    (value,) = values
    if kind == "cast":
        return Cast(BY_NAME[value])
    if kind == "decode":
        _need(value in get_args(Code), f"the code {str(value)[:40]}")
        return Decode(value)
    _need(kind == "add" and NUMBER.holds(value), f"the op {str(kind)[:40]}")
    return AddScalar(float(value))


def _result(ops: Sequence[MoveOp]) -> DType | None:
    """Return the type that the ops leave an element with; None for that of its source."""
    for op in reversed(ops):
        if isinstance(op, Cast):
            return op.dtype
        if isinstance(op, Decode | ScaledAt):
            return F32
    return None


def _fits(
    shape: Shape,
    sources: Sequence[PlannedSource],
    dtype: DType,
    numel: int,
    products: int = 0,
    scales: int = 0,
) -> None:
    """Raise ``ValueError`` unless moves fill ``numel`` elements of ``dtype`` from what there is."""
    _need(shape.elements == numel, f"{shape.elements} elements are moved into {numel}")
    _need(shape.last_dst < numel, "a move writes past the end")
    for number, shard, last, result, ops in shape.reads:
        taken = sources[number]
        itemsize = taken.dtype.itemsize
        _need(
            (last + 1) * itemsize <= taken.shards.nbytes[shard], f"{taken.fqn}: a move reads past"
        )
        made = taken.dtype if result is None else result
        _need(made == dtype, f"{made} is moved where {dtype} is written")
        for k, op in enumerate(ops):
            if isinstance(op, ProductAt):
                _need(op.number < products, "a product that there is not")
            if isinstance(op, ScaledAt):
                _need(op.number < scales, "a scale that there is not")
            if isinstance(op, Decode):
                _need(k == 0 and itemsize == 1, f"{taken.fqn}: codes that are not bytes")


def tensor(
    data: dict[str, Any], sources: dict[int, PlannedSource], patterns: dict[int, Pattern]
) -> PlannedTensor:
    """Return an output tensor, its moves held against its sources."""
    tied = "tied" in data
    name = _text(data["tied" if tied else "tensor"], "a name")
    dtype = BY_NAME[data["dtype"]]
    shape = tuple(count(n, "a size") for n in data["shape"])
    begin, end = (count(n, "an offset") for n in data["at"])
    numel = math.prod(shape)
    _need(end - begin == numel * dtype.itemsize, f"{name}: {end - begin} bytes for {dtype} {shape}")
    drawn = tuple(sources[k] for k in data["sources"])
    products = [_product(p, drawn, patterns) for p in data.get("products", ())]
    scales = [_scale(s, drawn, patterns) for s in data.get("scales", ())]
    encode = _encode(data["encode"], dtype, shape) if "encode" in data else None
    made, count_ = (F32, math.prod(encode.shape)) if encode else (dtype, numel)
    moves: tuple[Move, ...] = ()
    terms: list[PlannedTerm] = []
    for weight, name_, number in data.get("terms", ()):
        term, amount = _term(weight, BY_NAME[name_], patterns[number], made)
        _fits(amount, drawn, term.dtype, count_, len(products), len(scales))
        terms.append(term)
    divisor = data.get("divisor", 1.0)
    _need(NUMBER.holds(divisor) and divisor > 0, "what a sum is divided by")
    if not terms:
        moves, amount = patterns[data["pattern"]]
        _fits(amount, drawn, made, count_, len(products), len(scales))
    return PlannedTensor(
        name=name,
        dtype=dtype,
        shape=shape,
        begin=begin,
        end=end,
        sources=drawn,
        moves=moves,
        last=tuple(count(k, "a source", len(drawn)) for k in data["last"]),
        same_as=_text(data["same_as"], "a name") if tied else None,
        products=tuple(products),
        ended=_ended(data["ended"], drawn) if "ended" in data else None,
        scales=tuple(scales),
        encode=encode,
        terms=tuple(terms),
        divisor=float(divisor),
    )


def _term(weight: Any, dtype: DType, pattern: Pattern, made: DType) -> tuple[PlannedTerm, Shape]:
    _need(NUMBER.holds(weight), "a weight that is not a number")
    _need(
        (dtype.castable and made.castable) or dtype == made,
        f"{dtype} is summed up where {made} is written",
    )
    moves, amount = pattern
    return PlannedTerm(float(weight), dtype, moves), amount


def _ended(data: Sequence[Any], drawn: Sequence[PlannedSource]) -> tuple[tuple[int, int], ...]:
    places = []
    for k, j in data:
        shards = drawn[count(k, "a source", len(drawn))].shards
        places.append((k, count(j, "a shard", len(shards))))
    return tuple(places)


def _product(
    data: Sequence[Any], drawn: Sequence[PlannedSource], patterns: dict[int, Pattern]
) -> PlannedProduct:
    (rows, columns), rank, scale, left, right = data
    for size in (rows, columns, rank):
        count(size, "a size")
    _need(NUMBER.holds(scale), "a scale that is not a number")
    _fits(patterns[left][1], drawn, F32, rows * rank)
    _fits(patterns[right][1], drawn, F32, rank * columns)
    return PlannedProduct((rows, columns), rank, scale, patterns[left][0], patterns[right][0])


def _encode(data: Sequence[Any], dtype: DType, made: tuple[int, ...]) -> Encode:
    rule, (high, wide), (rows, columns), part = data
    for size in (high, wide, rows, columns):
        count(size, "a size")
    _need(high > 0 and wide > 0 and columns > 0, "a block of no size")
    _need(rule in QUANTIZATIONS and part in ("codes", "scales"), f"the rule {str(rule)[:40]}")
    encode = Encode(rule, (high, wide), (rows, columns), part)
    _need(dtype.name == ("F8_E4M3" if part == "codes" else "F32"), f"{dtype} of {part}")
    _need(made == (encode.shape if part == "codes" else encode.grid), f"{part} of another shape")
    return encode


def _scale(
    data: Sequence[Any], drawn: Sequence[PlannedSource], patterns: dict[int, Pattern]
) -> PlannedScale:
    (rows, columns), (high, wide), moves, outer, divide = data
    for size in (rows, columns, high, wide):
        count(size, "a size")
    _need(high > 0 and wide > 0, "a block of no size")
    _need(isinstance(divide, bool), "how a scale is used")
    _fits(patterns[moves][1], drawn, F32, rows * columns)
    if outer is not None:
        _fits(patterns[outer][1], drawn, F32, 1)
    return PlannedScale(
        (rows, columns),
        (high, wide),
        patterns[moves][0],
        () if outer is None else patterns[outer][0],
        divide,
    )


class Header:
    """The header of an output file, held against its tensors one after the other.

    It is the text that :mod:`streamconv.planning.placing` writes, so that nothing but a place in it
    is kept.
    """

    def __init__(self, output: OutputFile) -> None:
        self._output = output
        self._at = 0
        self._end = 0
        self._count = 0
        self._places: dict[str, tuple[int, int]] = {}
        self._take('{"__metadata__":{"format":"pt"}')

    def _take(self, text: str) -> None:
        _need(
            self._output.header.startswith(text, self._at),
            f"the header of {self._output.name} is not that of its tensors",
        )
        self._at += len(text)

    def tensor(self, t: PlannedTensor) -> None:
        """Take the next tensor of the file."""
        if t.same_as is not None:
            _need(
                self._places.get(t.same_as) == (t.begin, t.end),
                f"{t.name} is tied to no tensor",
            )
            return
        _need(t.begin == self._end, f"{t.name} begins at {t.begin}, not at {self._end}")
        _need(t.name not in self._places, f"{t.name} is written twice")
        entry = {"dtype": t.dtype.name, "shape": list(t.shape), "data_offsets": [t.begin, t.end]}
        self._take(f",{_compact(t.name)}:{_compact(entry)}")
        self._places[t.name] = t.begin, t.end
        self._end = t.end
        self._count += 1

    def end(self) -> None:
        """Check that nothing is left over."""
        self._take("}")
        header = self._output.header
        nbytes = len(header.encode())
        _need(
            not header[self._at :].strip(" ") and nbytes % 8 == 0,
            "a header with something behind it",
        )
        _need(self._output.nbytes == 8 + nbytes + self._end, f"the size of {self._output.name}")
        _need(self._output.tensors == self._count, f"the number of tensors in {self._output.name}")


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
