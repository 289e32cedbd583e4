"""Writes a plan, line by line: see :mod:`streamconv.ir.planfile`."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from dataclasses import asdict, astuple
from typing import IO, Any

import xxhash

from streamconv.ir.identity import SCHEMA
from streamconv.ir.lowering import Move, MoveOp, ProductAt, ScaledAt
from streamconv.ir.planlines import COLUMNS
from streamconv.ir.planned import OutputFile, PlanHead, PlannedSource, PlannedTensor, TextFile
from streamconv.ir.recipe import Decode
from streamconv.ir.recipejson import op_to_json

_PIECE_CHARACTERS = 1 << 16


def _op_to_json(op: MoveOp) -> list[Any]:
    if isinstance(op, ProductAt):
        return ["product", *astuple(op)]
    if isinstance(op, ScaledAt):
        return ["scaled", *astuple(op)]
    if isinstance(op, Decode):
        return ["decode", op.code]
    return op_to_json(op)


def _column(values: array[int]) -> list[int] | int:
    """Return a column as JSON; one that holds a single value throughout is that value alone."""
    return values[0] if len(values) > 1 and len(set(values)) == 1 else values.tolist()


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
        totals = asdict(head.totals)
        for name in ("scaled", "encoded", "summed"):
            if not totals[name]:
                del totals[name]  # as before there were any
        self._line({"totals": totals})
        self._line({"notices": list(head.notices)})
        self._line({"skipped": [[s.name, s.reason] for s in head.skipped]})
        for f in head.files:
            said = {k: v for k, v in asdict(f).items() if k not in ("path", "version")}
            # A file of a file system has none.
            version = {"version": f.version} if f.version else {}
            self._line({"file": f.path, **said, **version})
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
        line = {
            "output": output.name,
            "nbytes": output.nbytes,
            "tensors": output.tensors,
            "header": output.header,
        }
        self._line(line | ({"shared": output.shared} if output.shared else {}))

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
        }
        if tensor.terms:
            terms = [[t.weight, t.dtype.name, self._pattern_id(t.moves)] for t in tensor.terms]
            line |= {"terms": terms, "divisor": tensor.divisor}
        else:
            line["pattern"] = self._pattern_id(tensor.moves)
        line["last"] = tensor.last
        if tensor.ended is not None:
            line["ended"] = tensor.ended
        if tensor.products:
            line["products"] = [
                [p.shape, p.rank, p.scale, self._pattern_id(p.left), self._pattern_id(p.right)]
                for p in tensor.products
            ]
        if tensor.scales:
            line["scales"] = [
                [s.grid, s.block, self._pattern_id(s.moves), self._outer_id(s.outer), s.divide]
                for s in tensor.scales
            ]
        if tensor.encode is not None:
            line["encode"] = astuple(tensor.encode)
        self._line(line)

    def _outer_id(self, moves: tuple[Move, ...]) -> int | None:
        return self._pattern_id(moves) if moves else None

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
        line |= {c: _column(getattr(table, c)) for c in COLUMNS}
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
