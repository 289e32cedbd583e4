"""The plan: everything that an executor will do, as JSON lines.

One line is one JSON object whose first key says what it is. The order is fixed::

    {"streamconv_plan": 1, "root": …}             where the source lies; no part of the digest
    {"job": {…}}                                  format, options, identity of the source
    {"totals": {…}}  {"notices": […]}  {"skipped": […]}
    {"file": "model_world_size_8_rank_0.pt", …}   source files, numbered in this order from 0
    {"side": "tokenizer.json", …}                 files copied byte for byte
    {"text": "config.json", "nbytes": …}          files written by us, each followed by its content
      {"piece": …}                                in pieces, so that no line is long
    {"output": "model-00001-of-00002.safetensors", "header": …}
      {"source": 3, "fqn": …, "files": […], …}    where a tensor's shards lie (one column each)
      {"pattern": 7, "moves": [[…], …]}           strided copies; shared by tensors cut alike
      {"tensor": …, "at": [begin, end], "sources": [3], "pattern": 7, "last": [3]}
        (and "products": [[shape, rank, scale, left pattern, right pattern]], low-rank updates)
      {"tied": …, "same_as": …}                   dropped if its bytes equal those of another tensor
    {"end": digest, "lines": n}

A section (an ``output`` line and what follows it) is complete in itself, so that a reader can stream
through it in little memory, skip it, or hand it to another machine. The plan knows neither the
budget nor the number of threads: the same plan gives the same bytes whatever they are. ``digest`` is
the xxh3_128 of all lines but the first and the last.
"""

from __future__ import annotations

import io
import json
import os
import stat
import weakref
from array import array
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import xxhash

from streamconv.dtypes import BY_NAME
from streamconv.errors import BadInputError
from streamconv.inputs import readable
from streamconv.lowering import Dim, Move, MoveOp, ProductAt
from streamconv.planned import (
    OutputFile,
    PlanHead,
    PlannedProduct,
    PlannedSource,
    PlannedTensor,
    SideFile,
    TextFile,
    Totals,
    WrittenFile,
)
from streamconv.recipe import AddScalar, Cast, Zero
from streamconv.source import ShardTable, Skipped, SourceFile

if TYPE_CHECKING:
    from typing_extensions import Buffer

SCHEMA = 1
_PIECE = '{"piece"'
_PIECE_CHARACTERS = 1 << 16
# Of anything else, such as weights given for a plan, no more is read.
_LONGEST_FIRST_LINE = 1 << 16
# Left free beyond what an output needs: the journal, the manifest, the directories themselves.
_DISK_MARGIN_BYTES = 4 << 20


def _op_to_json(op: MoveOp) -> list[Any]:
    if isinstance(op, ProductAt):
        return ["product", *astuple(op)]
    if isinstance(op, Zero):
        return ["zero"]
    return ["cast", op.dtype.name] if isinstance(op, Cast) else ["add", op.value]


def _op_from_json(data: Sequence[Any]) -> MoveOp:
    if data[0] == "product":
        return ProductAt(*data[1:])
    if data[0] == "zero":
        return Zero()
    return Cast(BY_NAME[data[1]]) if data[0] == "cast" else AddScalar(float(data[1]))


def _column(values: array[int]) -> list[int] | int:
    """Return a column as JSON; one that holds a single value throughout is that value alone."""
    return values[0] if len(values) > 1 and len(set(values)) == 1 else values.tolist()


def _table_from_json(data: dict[str, Any]) -> ShardTable:
    n = max((len(data[c]) for c in _COLUMNS if isinstance(data[c], list)), default=data["n"])
    columns = {
        c: array(code, data[c] if isinstance(data[c], list) else [data[c]] * n)
        for c, code in _COLUMNS.items()
    }
    return ShardTable(**columns)


_COLUMNS = {
    "files": "I",
    "keys": "I",
    "starts": "Q",
    "nbytes": "Q",
    "crcs": "I",
    "header_nbytes": "H",
}


class PlanWriter:
    """Writes a plan line by line; nothing is kept but what numbers sources and patterns."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._digest = xxhash.xxh3_128()
        self._lines = 0
        self._sources: dict[int, int] = {}
        self._patterns: dict[tuple[Move, ...], int] = {}

    def _line(self, data: dict[str, Any]) -> None:
        text = json.dumps(data, separators=(",", ":"), ensure_ascii=False) + "\n"
        if self._lines:
            self._digest.update(text.encode())
        self._lines += 1
        self._stream.write(text)

    def head(self, head: PlanHead, texts: Iterable[TextFile]) -> None:
        """Write everything that comes before the first section; ``texts`` are ``head.written``."""
        self._line({"streamconv_plan": SCHEMA, "root": head.root})
        self._line({"job": head.job})
        self._line({"totals": asdict(head.totals)})
        self._line({"notices": list(head.notices)})
        self._line({"skipped": [[s.name, s.reason] for s in head.skipped]})
        for f in head.files:
            self._line({"file": f.path, **{k: v for k, v in asdict(f).items() if k != "path"}})
        for side in head.side:
            self._line(
                {"side": side.name, "path": side.path, "nbytes": side.nbytes, "xxh3": side.xxh3}
            )
        for written, text in zip(head.written, texts, strict=True):
            self._line({"text": written.name, "nbytes": written.nbytes})
            for at in range(0, len(text.content), _PIECE_CHARACTERS):
                self._line({"piece": text.content[at : at + _PIECE_CHARACTERS]})

    def output(self, output: OutputFile) -> None:
        """Begin a section."""
        self._sources.clear()
        self._patterns.clear()
        self._line(
            {
                "output": output.name,
                "nbytes": output.nbytes,
                "tensors": output.tensors,
                "header": output.header,
            }
        )

    def tensor(self, tensor: PlannedTensor) -> None:
        """Add a tensor to the section, with the sources and the pattern it is the first to use."""
        ids = [self._source_id(s) for s in tensor.sources]
        line: dict[str, Any] = {"tied" if tensor.same_as else "tensor": tensor.name}
        if tensor.same_as:
            line["same_as"] = tensor.same_as
        line |= {
            "dtype": tensor.dtype.name,
            "shape": tensor.shape,
            "at": [tensor.begin, tensor.end],
            "sources": ids,
            "pattern": self._pattern_id(tensor.moves),
            "last": tensor.last,
        }
        if tensor.products:
            line["products"] = [
                [p.shape, p.rank, p.scale, self._pattern_id(p.left), self._pattern_id(p.right)]
                for p in tensor.products
            ]
        self._line(line)

    def _source_id(self, source: PlannedSource) -> int:
        known = self._sources.get(id(source.shards))
        if known is not None:
            return known
        number = self._sources[id(source.shards)] = len(self._sources)
        table = source.shards
        line: dict[str, Any] = {
            "source": number,
            "fqn": source.fqn,
            "dtype": source.dtype.name,
            "n": len(table),
        }
        line |= {c: _column(getattr(table, c)) for c in _COLUMNS}
        self._line(line)
        return number

    def _pattern_id(self, moves: tuple[Move, ...]) -> int:
        known = self._patterns.get(moves)
        if known is not None:
            return known
        number = self._patterns[moves] = len(self._patterns)
        self._line(
            {
                "pattern": number,
                "moves": [
                    [
                        m.source,
                        m.shard,
                        m.dst_offset,
                        m.src_offset,
                        m.dims,
                        [_op_to_json(op) for op in m.ops],
                    ]
                    for m in moves
                ],
            }
        )
        return number

    def end(self) -> str:
        """Write the last line; return the digest."""
        digest = self._digest.hexdigest()
        lines = self._lines + 1
        self._stream.write(json.dumps({"end": digest, "lines": lines}) + "\n")
        return digest


class _At(io.RawIOBase):
    """Reads an open file from its beginning, whatever else reads it through the same descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        got = os.preadv(self._fd, [buffer], self._at)
        self._at += got
        return got


def _open(path: Path) -> int:
    # A pipe would be waited for, and a device never ends.
    with readable(path):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    raise BadInputError(
        "a plan is a file",
        where=str(path),
        found="a folder" if stat.S_ISDIR(mode) else "a pipe or a device",
        hint="make one with `streamconv plan SRC -o PLAN`",
    )


class Plan:
    """A plan in a file. The head is read at once, sections are streamed as often as one likes.

    The file is opened once: what takes its place meanwhile is not this plan.
    """

    def __init__(self, path: Path, fd: int | None = None) -> None:
        """Read the head and check the digest; raises :class:`BadInputError` for a damaged plan.

        ``fd`` is the open file where the caller has opened it; it is closed with the plan.
        """
        self.path = path
        try:
            self._fd = _open(path) if fd is None else fd
        except FileNotFoundError as error:
            raise BadInputError(
                "there is no such plan",
                where=str(path),
                hint="make one with `streamconv plan SRC -o PLAN`",
            ) from error
        weakref.finalize(self, os.close, self._fd)
        try:
            with readable(path):
                self.digest = self._check_digest()
                self.head = self._read_head()
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise BadInputError(
                "this is no streamconv plan, or a damaged one",
                where=str(path),
                found=f"{type(error).__name__}: {error}",
                hint="make it anew with `streamconv plan SRC -o PLAN`",
            ) from error

    def fileno(self) -> int:
        """Return the descriptor of the open file."""
        return self._fd

    def find_sources(self, root: Path, side: Iterable[SideFile]) -> None:
        """Read from ``root`` and ``side``: the very files that were planned, wherever they are now."""
        there = {(s.name, s.xxh3): s for s in side}
        self.head = replace(
            self.head,
            root=str(root.absolute()),
            side=tuple(there.get((s.name, s.xxh3), s) for s in self.head.side),
        )

    def _check_digest(self) -> str:
        digest = xxhash.xxh3_128()
        with io.BufferedReader(_At(self._fd)) as stream:
            first = json.loads(stream.readline(_LONGEST_FIRST_LINE))
            if first["streamconv_plan"] != SCHEMA:
                raise ValueError(f"schema {first['streamconv_plan']}, this program knows {SCHEMA}")
            # No part of the digest, so that it may be edited.
            if not isinstance(first["root"], str) or "\0" in first["root"]:
                raise ValueError(f"root is {first['root']!r}")
            previous = b""
            for line in stream:
                digest.update(previous)
                previous = line
        end = json.loads(previous)["end"]
        if end != digest.hexdigest():
            raise ValueError(f"digest {digest.hexdigest()}, the last line says {end}")
        return str(end)

    def _read_head(self) -> PlanHead:
        found: dict[str, Any] = {}
        files, side, written = [], [], []
        for line in self._lines():
            if line.startswith(_PIECE):
                continue
            if line.startswith(('{"output"', '{"end"')):
                break
            data = json.loads(line)
            kind = next(iter(data))
            if kind == "file":
                files.append(SourceFile(path=data.pop("file"), **data))
            elif kind == "side":
                side.append(SideFile(data["side"], data["path"], data["nbytes"], data["xxh3"]))
            elif kind == "text":
                written.append(WrittenFile(data["text"], data["nbytes"]))
            else:
                found |= data
        return PlanHead(
            root=found["root"],
            job=found["job"],
            totals=Totals(**found["totals"]),
            notices=tuple(found["notices"]),
            skipped=tuple(Skipped(n, r) for n, r in found["skipped"]),
            files=tuple(files),
            side=tuple(side),
            written=tuple(written),
        )

    def outputs(self) -> list[OutputFile]:
        """Return the output files without their tensors and headers.

        The headers of a large model are megabytes; :meth:`sections` has one at a time.
        """
        return [
            replace(_output_from_json(json.loads(line)), header="")
            for line in self._lines()
            if line.startswith('{"output"')
        ]

    def disk_bytes(self, done: Container[str] = ()) -> int:
        """Return the disk that the output takes beyond the output files named in ``done``."""
        return (
            sum(o.nbytes for o in self.outputs() if o.name not in done)
            + sum(s.nbytes for s in self.head.side)
            + sum(w.nbytes for w in self.head.written)
            + _DISK_MARGIN_BYTES
        )

    def content(self, name: str) -> Iterator[str]:
        """Yield the content of the written file ``name``, piece by piece."""
        lines = self._lines()
        for line in lines:
            if line.startswith('{"text"') and json.loads(line)["text"] == name:
                break
        for line in lines:
            if not line.startswith(_PIECE):
                break
            yield json.loads(line)["piece"]

    def _lines(self) -> Iterator[str]:
        with io.BufferedReader(_At(self._fd)) as stream:
            for line in stream:
                yield line.decode()

    def sections(self) -> Iterator[tuple[OutputFile, Iterable[PlannedTensor]]]:
        """Yield each output file with its tensors.

        The tensors of a section are parsed as they are asked for, in the order of their bytes; a
        section that is not asked for is skipped without being parsed.
        """
        lines = self._lines()
        line = next((x for x in lines if x.startswith('{"output"')), "")
        while line:
            section = _Section(lines)
            yield _output_from_json(json.loads(line)), section
            line = section.next_output()


class _Section:
    """The tensors of one section; stops at, and remembers, the line that begins the next one."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._rest = lines
        self._next: str | None = None

    def __iter__(self) -> Iterator[PlannedTensor]:
        sources: dict[int, PlannedSource] = {}
        patterns: dict[int, tuple[Move, ...]] = {}
        while line := self._advance():
            data = json.loads(line)
            if "source" in data:
                sources[data["source"]] = PlannedSource(
                    data["fqn"], BY_NAME[data["dtype"]], _table_from_json(data)
                )
            elif "pattern" in data and "moves" in data:
                patterns[data["pattern"]] = tuple(
                    Move(
                        source,
                        shard,
                        dst,
                        src,
                        tuple(Dim(*d) for d in dims),
                        tuple(_op_from_json(op) for op in ops),
                    )
                    for source, shard, dst, src, dims, ops in data["moves"]
                )
            else:
                tensor = _tensor_from_json(data, sources, patterns)
                yield tensor
                for k in tensor.last:
                    sources.pop(data["sources"][k], None)

    def _advance(self) -> str | None:
        if self._next is not None:
            return None
        line = next(self._rest, "")
        if not line or line.startswith(('{"output"', '{"end"')):
            self._next = line if line.startswith('{"output"') else ""
            return None
        return line

    def next_output(self) -> str:
        while self._advance():
            pass
        return self._next or ""


def _output_from_json(data: dict[str, Any]) -> OutputFile:
    return OutputFile(data["output"], data["nbytes"], data["header"], data["tensors"])


def _tensor_from_json(
    data: dict[str, Any],
    sources: dict[int, PlannedSource],
    patterns: dict[int, tuple[Move, ...]],
) -> PlannedTensor:
    return PlannedTensor(
        name=data["tied"] if "tied" in data else data["tensor"],
        dtype=BY_NAME[data["dtype"]],
        shape=tuple(data["shape"]),
        begin=data["at"][0],
        end=data["at"][1],
        sources=tuple(sources[k] for k in data["sources"]),
        moves=patterns[data["pattern"]],
        last=tuple(data["last"]),
        same_as=data.get("same_as"),
        products=tuple(
            PlannedProduct(tuple(shape), rank, scale, patterns[left], patterns[right])
            for shape, rank, scale, left, right in data.get("products", ())
        ),
    )
