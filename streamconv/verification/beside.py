"""The files of an output, all of them: which the source gives, and whether they are what it gives.

The manifest has no say in this: whoever changes a tokenizer or adds a module can make it fit. What
the conversion would write is planned anew, and held against what is there: config, tokenizer, code
and index byte for byte, the headers of the weight files likewise. Nothing else may be there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from streamconv.errors import listed
from streamconv.files.durable import hash_file
from streamconv.files.inputs import readable
from streamconv.files.names import MANIFEST
from streamconv.ir.planfile import Plan
from streamconv.output.former import NOT_OUTPUT
from streamconv.storage.address import place

# Of these the differing keys are named.
_MOST_NAMED_BYTES = 1 << 20
_LISTED = 6


def file_problems(folder: Path, plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield (name, what is wrong) for the files of an output that ``plan`` would not write so."""
    expected = {MANIFEST}
    for side in plan.head.side:
        expected.add(side.name)
        path = folder / side.name
        if not path.is_file():
            yield side.name, "the source has it, the output does not"
        elif path.stat().st_size != side.nbytes or hash_file(path) != side.xxh3:
            yield side.name, f"differs from the source's{_keys(path, place(side.path))}"
    for written in plan.head.written:
        expected.add(written.name)
        path = folder / written.name
        if not path.is_file():
            yield written.name, "the conversion writes it, the output does not have it"
            continue
        digest = xxhash.xxh3_128()
        for piece in plan.content(written.name):
            digest.update(piece.encode())
        if hash_file(path) != digest.hexdigest():
            text = "".join(plan.content(written.name))
            yield written.name, f"differs from what the source gives{_keys(path, text)}"
    for output, _ in plan.sections():
        expected.add(output.name)
        header = output.header.encode()
        if not _begins_with(folder / output.name, len(header).to_bytes(8, "little") + header):
            yield output.name, "has another header than the conversion writes"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.partition("/")[0] in NOT_OUTPUT:
            continue
        if name not in expected and (path.is_symlink() or not path.is_dir()):
            yield name, "nothing in the source gives this file"


def _begins_with(path: Path, start: bytes) -> bool:
    try:
        with readable(path), path.open("rb") as stream:
            return stream.read(len(start)) == start
    except FileNotFoundError:
        return False


def _keys(here: Path, there: Path | str) -> str:
    """Return which keys differ between two JSON objects; nothing where one is not an object."""
    if here.suffix != ".json" or here.stat().st_size > _MOST_NAMED_BYTES:
        return ""
    try:
        if isinstance(there, Path):
            if there.stat().st_size > _MOST_NAMED_BYTES:
                return ""
            there = there.read_text(encoding="utf-8")
        ours, theirs = json.loads(here.read_text(encoding="utf-8")), json.loads(there)
    except (ValueError, OSError, RecursionError):
        return ""
    names = [*_differing(ours, theirs)] if isinstance(ours, dict) else []
    return f" in {listed(names, _LISTED)}" if names else ""


def _differing(ours: Mapping[str, Any], theirs: object) -> Iterator[str]:
    if not isinstance(theirs, dict):
        return
    missing = object()
    for key in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(key, missing), theirs.get(key, missing)
        if one == other and type(one) is type(other):
            continue
        inner = (
            [f"{key}.{k}" for k in _differing(one, other)]
            if isinstance(one, dict) and isinstance(other, dict)
            else []
        )
        yield from inner or [repr(key)[1:-1]]
