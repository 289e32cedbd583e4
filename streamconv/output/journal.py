"""The journal of a staged run: which files are finished, sealed line by line with the user's key.

Its first line seals the plan, every later one what it says, its place and all lines before it; a
finished file counts only with the very bytes that were written. What does not fit was not written by a
run of this user for this target, and counts for nothing, as does all that comes after it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from streamconv.executor.pipeline import FinishedFile
from streamconv.files import newfile
from streamconv.files.durable import hash_open_file
from streamconv.files.userkey import Sealer, same_seal

# A million tensors in a file.
_LONGEST_LINE_BYTES = 256 << 20


class Journal:
    """What a run has finished, in a file.

    ``finished`` are the output files that are complete, by name; the digests of their tensors stay in
    the file (:meth:`tensor_digests`), as a large model has many. ``records`` is what is known of
    half-read records of the source.
    """

    def __init__(self, path: Path, sealer: Sealer, *, sync: bool) -> None:
        self._path = path
        self._sealer = sealer
        self._sync = sync
        self.finished: dict[str, FinishedFile] = {}
        self.records: list[list[Any]] = []
        self._proofs: dict[str, str] = {}
        # Of each finished file where its line begins, and the seal before it.
        self._lines: dict[str, tuple[int, str]] = {}
        self._nbytes = 0
        self._seal = ""

    def begin(self, plan: bytes) -> None:
        """Begin the journal of a plan, given by its digest."""
        os.close(newfile.create(self._path))
        self._append({"plan": plan.hex()}, "")

    def resume(self, plan: bytes) -> bool:
        """Read the journal where it is that of this plan; return whether it is."""
        lines = self._read()
        first = next(lines, None)
        if first is None or first[0].get("plan") != plan.hex():
            return False
        _, self._seal, self._nbytes = first
        for data, seal, nbytes in lines:
            self._keep(data, seal, nbytes)
        fd = newfile.reopen(self._path, os.O_RDWR)
        if fd is None:
            return False
        os.ftruncate(fd, self._nbytes)
        os.close(fd)
        return True

    def is_ours(self) -> bool:
        """Whether a run of this user has begun the journal for this target, of whatever plan."""
        return next(self._read(), None) is not None

    def _read(self) -> Iterator[tuple[dict[str, Any], str, int]]:
        """Yield what the lines say, with their seals and sizes, as far as the seals are right."""
        fd = newfile.reopen(self._path)
        if fd is None:
            return
        before = ""
        with os.fdopen(fd, "rb") as stream:
            while line := stream.readline(_LONGEST_LINE_BYTES):
                seal, _, text = line.rstrip(b"\n").partition(b" ")
                expected = self._sealer.seal("line", before.encode(), text)
                if not line.endswith(b"\n") or not same_seal(seal.decode("latin-1"), expected):
                    return  # it was being written when the power went, or is not ours
                yield json.loads(text), expected, len(line)
                before = expected

    def record(self, finished: FinishedFile, records: list[list[Any]]) -> None:
        """Note a finished file (which is durable by now) and the half-read records."""
        facts = {k: v for k, v in asdict(finished).items() if k != "keyed"}
        data = {"file": facts, "proof": self._proof(finished), "records": records}
        self._append(data, finished.name)

    def _append(self, data: dict[str, Any], name: str) -> None:
        text = json.dumps(data).encode()
        seal = self._sealer.seal("line", self._seal.encode(), text)
        line = seal.encode() + b" " + text + b"\n"
        fd = newfile.reopen(self._path, os.O_WRONLY)
        if fd is None:
            raise FileNotFoundError(2, "the journal is gone", str(self._path))
        with os.fdopen(fd, "wb") as stream:
            stream.seek(self._nbytes)
            stream.write(line)
            stream.flush()
            if self._sync:
                os.fsync(stream.fileno())
        if name:
            self._keep(data, seal, len(line))
        else:
            self._seal, self._nbytes = seal, len(line)

    def _keep(self, data: dict[str, Any], seal: str, line_nbytes: int) -> None:
        finished = FinishedFile(**data["file"])
        self.finished[finished.name] = replace(finished, tensors={})
        self._proofs[finished.name] = data["proof"]
        self._lines[finished.name] = self._nbytes, self._seal
        self.records = data["records"]
        self._nbytes += line_nbytes
        self._seal = seal

    def _proof(self, finished: FinishedFile) -> str:
        return self._sealer.seal(
            "file", os.fsencode(finished.name), finished.keyed.encode(), finished.xxh3.encode()
        )

    def holds(self, name: str, path: Path) -> bool:
        """Whether ``path`` is the finished file ``name``, with the very bytes that were written."""
        fd = newfile.reopen(path)
        if fd is None:
            return False
        try:
            xxh3, keyed = hash_open_file(fd, self._sealer.seed)
        finally:
            os.close(fd)
        found = replace(self.finished[name], xxh3=xxh3, keyed=keyed)
        return same_seal(self._proof(found), self._proofs[name])

    def _journaled(self, name: str) -> dict[str, Any]:
        fd = newfile.reopen(self._path)
        if fd is None:
            raise FileNotFoundError(2, "the journal is gone", str(self._path))
        with os.fdopen(fd, "rb") as stream:
            stream.seek(self._lines[name][0])
            data: dict[str, Any] = json.loads(stream.readline().partition(b" ")[2])
        return data

    def tensor_digests(self, name: str) -> dict[str, str]:
        """Return the xxh3_128 of each tensor of a finished file."""
        return dict(self._journaled(name)["file"]["tensors"])

    def forget(self, name: str) -> None:
        """Take back a finished file whose bytes are not there any more, and all that came after it."""
        names = list(self.finished)
        before = names[: names.index(name)]
        self.records = self._journaled(before[-1])["records"] if before else []
        self._nbytes, self._seal = self._lines[name]
        fd = newfile.reopen(self._path, os.O_RDWR)
        if fd is not None:
            os.ftruncate(fd, self._nbytes)
            os.close(fd)
        self.finished = {n: self.finished[n] for n in before}
