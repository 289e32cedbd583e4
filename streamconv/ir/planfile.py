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
        (and "products": [[shape, rank, scale, left pattern, right pattern]], low-rank updates,
        "scales": [[grid, block, pattern, outer pattern, divide]], of quantized weights,
        "encode": [rule, block, shape, part], codes or scales of floats that the moves make;
        in place of "pattern" "terms": [[weight, dtype, pattern]] and "divisor", a sum of tensors)
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
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from streamconv.errors import BadInputError, DamagedPlanError
from streamconv.files.inputs import readable
from streamconv.ir import planlines
from streamconv.ir.identity import SCHEMA, JobIdentity
from streamconv.ir.planned import OutputFile, PlanHead, PlannedSource, PlannedTensor, SideFile

if TYPE_CHECKING:
    from typing_extensions import Buffer

_FIRST = b'{"streamconv_plan"'
_PIECE = '{"piece"'
_PIECE_CHARACTERS = 1 << 16
# Of anything else, such as weights given for a plan, no more is read.
_LONGEST_FIRST_LINE = 1 << 16
# Left free beyond what an output needs: the journal, the manifest, the directories themselves.
_DISK_MARGIN_BYTES = 4 << 20


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


def is_plan(path: Path) -> bool:
    """Whether a file begins as a plan does, of whatever schema."""
    if not path.is_file():
        return False
    with readable(path), path.open("rb") as stream:
        return stream.read(len(_FIRST)) == _FIRST


class Plan:
    """A plan in a file. The head is read at once, sections are streamed as often as one likes.

    The file is opened once: what takes its place meanwhile is not this plan. ``remembered`` says of one
    that was made now that making it again needs neither torch nor transformers.
    """

    remembered = False

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
        self.close = weakref.finalize(self, os.close, self._fd)
        try:
            with readable(path):
                self.digest = self._check_digest()
                self.head = self._read_head()
        except planlines.DAMAGES as error:
            raise DamagedPlanError(
                "not a streamconv plan, or a damaged one",
                where=str(path),
                found=f"{type(error).__name__}: {error}",
                hint="make it again with `streamconv plan SRC -o PLAN`",
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
        outputs, side_folder, job = [], None, None
        for line in self._lines():
            if line.startswith(_PIECE):
                continue
            if line.startswith('{"end"'):
                break
            if line.startswith('{"output"'):
                # Its header, which may be megabytes, is for who streams the section.
                outputs.append(planlines.output_file(planlines.parse(line)).name)
            elif not outputs:
                data = planlines.parse(line)
                kind = next(iter(data))
                if kind == "file":
                    files.append(planlines.source_file(data, job))
                elif kind == "side":
                    one, side_folder = planlines.side_file(data, side_folder)
                    side.append(one)
                elif kind == "text":
                    written.append(planlines.written_file(data))
                elif kind in found:
                    raise ValueError(f"{kind} is there twice")
                else:
                    found |= data
                    job = JobIdentity.from_json(data["job"]) if kind == "job" else job
        planlines.apart([*outputs, *(s.name for s in side), *(w.name for w in written)])
        return PlanHead(
            root=found["root"],
            job=found["job"],
            totals=planlines.totals(found["totals"]),
            notices=planlines.notices(found["notices"]),
            skipped=planlines.skipped(found["skipped"]),
            files=tuple(files),
            side=tuple(side),
            written=tuple(written),
        )

    def outputs(self) -> list[OutputFile]:
        """Return the output files without their tensors, headers and shared records.

        The headers of a large model are megabytes; :meth:`sections` has one at a time.
        """
        return [
            replace(planlines.output_file(planlines.parse(line)), header="", shared=())
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
        section that is not asked for is skipped without being parsed. Raises :class:`DamagedPlanError`
        for what does not fit together.
        """
        lines = self._lines()
        line = next((x for x in lines if x.startswith('{"output"')), "")
        while line:
            section = _Section(self.path, line, lines, len(self.head.files))
            yield section.output, section
            line = section.next_output()


class _Section:
    """The tensors of one section; stops at, and remembers, the line that begins the next one."""

    def __init__(self, path: Path, line: str, lines: Iterator[str], files: int) -> None:
        self.output = planlines.output_file(planlines.parse(line))
        self._path = path
        self._rest = lines
        self._files = files
        self._next: str | None = None

    def __iter__(self) -> Iterator[PlannedTensor]:
        try:
            yield from self._tensors()
        except planlines.DAMAGES as error:
            raise DamagedPlanError(
                "the plan does not fit together",
                where=f"{self._path}, {self.output.name}",
                found=f"{type(error).__name__}: {error}"[:300],
                hint="make it again with `streamconv plan SRC -o PLAN`",
            ) from error

    def _tensors(self) -> Iterator[PlannedTensor]:
        sources: dict[int, PlannedSource] = {}
        patterns: dict[int, planlines.Pattern] = {}
        header = planlines.Header(self.output)
        while line := self._advance():
            data = planlines.parse(line)
            if "source" in data:
                sources[data["source"]] = planlines.source(data, self._files)
            elif "moves" in data:
                patterns[data["pattern"]] = planlines.pattern(data)
            else:
                tensor = planlines.tensor(data, sources, patterns)
                header.tensor(tensor)
                yield tensor
                for k in tensor.last:
                    sources.pop(data["sources"][k], None)
        header.end()

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
