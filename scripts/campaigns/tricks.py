"""Zips and safetensors files that lie: at least five cases of every rule for untrusted input.

Every case is one lie in an otherwise valid file. All are planned and executed in process and the first
COUNT of each rule through the command; each is refused with exit code 5 or 6 and a line that says what
and where, and nothing is published.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from scripts.campaigns.common import Figures, each, main, run, scratch
from scripts.campaigns.gadgets import tensor, text
from scripts.campaigns.mutants import convert
from scripts.makers.zips import E, Zip
from streamconv.errors import StreamconvError
from streamconv.formats.safetensors_file import read_folder

RANK_FILE = "model_world_size_1_rank_0.pt"
_FULL32 = 0xFFFFFFFF
# Case: makes a folder; a safetensors folder is one that a rule of that name is about.
Case = Callable[[Path], None]


def campaign(work: Path, count: int, seed: int) -> Figures:
    figures = Figures()
    rules = {rule: list(cases) for rule, cases in _rules()}
    with scratch(work) as folder:
        _zip_file(folder / "source", _entries())
        convert(folder / "source", folder)  # the honest file is taken
    with scratch(work) as folder:
        _safetensors(folder / "source", _header(), bytes(24))
        read_folder(folder / "source")
    figures.add("rules", len(rules))
    for rule, cases in rules.items():
        if len(cases) < 5:
            figures.breach(f"{rule}: only {len(cases)} cases")
        for number, case in enumerate(cases):
            figures.merge(_try_here(work, f"{rule}, case {number}", case))
    rng = random.Random(seed)
    chosen = [
        (rule, case)
        for rule, cases in rules.items()
        if not rule.startswith("safetensors")
        for case in rng.sample(cases, min(count, len(cases)))
    ]
    figures.merge(each(chosen, partial(_through_the_command, work)))
    return figures


def _try_here(work: Path, where: str, case: Case) -> Figures:
    figures = Figures()
    figures.add("cases")
    with scratch(work) as folder:
        source = folder / "source"
        case(source)
        try:
            if (source / RANK_FILE).exists():
                convert(source, folder)
            else:
                read_folder(source)
        except StreamconvError as error:
            if error.exit_code not in (5, 6) or "\n" in error.what or not error.where:
                figures.breach(f"{where}: {error.exit_code}, {error}")
            figures.add(f"refused with {error.exit_code}")
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            figures.breach(f"{where}: {type(error).__name__}: {error}")
        else:
            figures.breach(f"{where}: taken")
        if (folder / "out").exists():
            figures.breach(f"{where}: published")
    return figures


def _through_the_command(work: Path, chosen: tuple[str, Case]) -> Figures:
    rule, case = chosen
    figures = Figures()
    figures.add("through the command")
    with scratch(work) as folder:
        case(folder / "source")
        outcome = run("convert", folder / "source", folder / "out", "-q")
        first, _, rest = outcome.stderr.partition("\n")
        told = first.startswith("error: ") and "where: " in rest and "Traceback" not in rest
        if outcome.code not in (5, 6) or not told or (folder / "out").exists():
            figures.breach(f"command, {rule}: {outcome.code}, {outcome.last_words}")
    return figures


def _pickle(value: bytes | None = None) -> bytes:
    return b"\x80\x04}" + text("good") + (tensor() if value is None else value) + b"s."


def _entries(pickle: bytes | None = None) -> list[E]:
    return [
        E("data.pkl", _pickle() if pickle is None else pickle),
        E("byteorder", b"little"),
        E("data/0", bytes(range(16))),
        E("version", b"3\n"),
    ]


def _zip_file(folder: Path, entries: list[E], **facts: object) -> None:
    folder.mkdir(parents=True)
    (folder / RANK_FILE).write_bytes(Zip(entries, **facts).bytes())


def _rules() -> Iterator[tuple[str, Iterator[Case]]]:
    names = ["os.system", "builtins.eval", "torch.load", "nt.system", "collections.defaultdict"]
    yield "names of the pickle are on the list", (_named(name) for name in names)
    yield "the pickle is small", map(_large_pickle, (65, 66, 100, 1000, 1 << 20))
    yield "records are stored as they are", (_lying(method=m) for m in (1, 8, 9, 12, 14, 93))
    yield "no encryption, no odd flags", (_lying(flags=1 << k) for k in (0, 1, 4, 5, 6, 12, 13, 15))
    yield "names occur once", map(_twice, ("data.pkl", "data/0", "byteorder", "version", "data/1"))
    yield (
        "one folder",
        map(_other_prefix, ("x/data/9", "/etc/passwd", "../data/9", "data", "archiv/a")),
    )
    yield (
        "names agree",
        (_lying(local_name=n) for n in ("archive/data/1", "x", "", "archive/data/00", "a" * 14)),
    )
    yield "methods agree", (_lying(local_method=m) for m in (1, 8, 9, 12, 93))
    yield "flags agree", (_lying(local_flags=f) for f in (1, 2, 1 << 6, 1 << 13, 0xFFFF))
    yield "positions agree", (_lying(shift=n) for n in (-4, 4, 1, 64, 4000))
    yield "nothing overlaps", (_lying(offset=n) for n in (0, 1, 64, 100, 300))
    yield (
        "all is inside the file",
        (_lying(size=n, csize=n) for n in (17, 64, 1 << 20, 1 << 31, _FULL32 - 1)),
    )
    yield (
        "ZIP64 fields are sane",
        map(
            _zip64,
            (
                b"",
                b"\1\0\0\0",
                b"\1\0\x08\0" + b"\xff" * 8,
                b"\2\0\x08\0" + bytes(8),
                b"\1\0\x10\0" + b"\xff" * 16,
            ),
        ),
    )
    yield (
        "nothing before, between and behind",
        map(_hidden, ("head", "before", "tail", "comment", "count")),
    )
    yield "checksums hold", (_lying(crc=n) for n in (1, 2, _FULL32, 0x12345678, 1 << 31))
    views = [
        (1, 4, 1),
        (0, 5, 1),
        (0, 2, 4),
        (0, 1 << 62, 1),
        (1 << 62, 1, 1),
        (0, 4, -1),
        (-1, 4, 1),
        (0, -4, 1),
    ]
    yield "views lie inside their storage", map(_view, views)
    yield "storages are what their records are", map(_storage, (0, 3, 5, -4, 1 << 40, 1 << 62))
    yield (
        "no link leads out",
        map(_link, ("/etc/passwd", "../../outside", "/dev/null", "/", "/proc/self/environ")),
    )
    sizes = (100_000_001, 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1)
    yield "safetensors: the header is small", (partial(_oversized, nbytes=n) for n in sizes)
    raw = (
        b"",
        b"\1\0\0",
        b"{",
        b"[]",
        b"null",
        b'{"a":1}',
        b"[" * 100_000,
        b'{"a":{},"a":{}}',
        b"\xff",
    )
    yield "safetensors: the header is a header", (partial(_raw, raw=r) for r in raw)
    holes = ([4, 12], [0, 20], [0, 1 << 60], [12, 0], [-4, 8], [0.0, 12], ["0", "12"], [0], None)
    yield "safetensors: no holes, no overlaps", (partial(_offsets, offsets=o) for o in holes)
    shapes = ([4], [-3], [1 << 62, 1 << 62], [3.0], ["3"], None, [True, 3], [[3]])
    yield "safetensors: shapes fit their bytes", (partial(_shape, shape=s) for s in shapes)


def _named(name: str) -> Case:
    module, _, attribute = name.rpartition(".")
    call = b"c" + module.encode() + b"\n" + attribute.encode() + b"\n(" + text("x") + b"tR"
    return lambda folder: _zip_file(folder, _entries(_pickle(call)))


def _large_pickle(mebibytes: int) -> Case:
    """The directory says so; the bytes are a hole in the file."""

    def make(folder: Path) -> None:
        claimed = min(mebibytes << 20, _FULL32 - 1)
        entries = _entries()
        last = E("data.pkl", _pickle(), size=claimed, csize=claimed)
        raw = Zip([*entries[1:], last]).bytes()
        directory = raw.index(b"PK\x01\x02")
        folder.mkdir(parents=True)
        with (folder / RANK_FILE).open("wb") as stream:
            stream.write(raw[:directory])
            stream.seek(claimed, os.SEEK_CUR)
            moved = stream.tell()
            tail = bytearray(raw[directory:])
            end64 = tail.index(b"PK\x06\x06")
            struct.pack_into("<Q", tail, end64 + 48, moved)
            struct.pack_into("<Q", tail, tail.index(b"PK\x06\x07") + 8, moved + end64)
            struct.pack_into("<I", tail, len(tail) - 6, min(moved, _FULL32))
            stream.write(tail)

    return make


def _lying(**lie: object) -> Case:
    def make(folder: Path) -> None:
        entries = _entries()
        entries[2] = E("data/0", bytes(range(16)), **lie)
        _zip_file(folder, entries)

    return make


def _twice(name: str) -> Case:
    return lambda folder: _zip_file(folder, [*_entries(), E(name, b"other"), E(name, b"other")])


def _other_prefix(name: str) -> Case:
    def make(folder: Path) -> None:
        _zip_file(folder, _entries())
        path = folder / RANK_FILE
        entries = [E(f"archive/{e.name}", e.data) for e in _entries()] + [E(name, b"x")]
        path.write_bytes(Zip(entries, prefix="").bytes())

    return make


def _zip64(extra: bytes) -> Case:
    return _lying(size=_FULL32, csize=_FULL32, extra=extra)


def _hidden(what: str) -> Case:
    def make(folder: Path) -> None:
        lies = {"head": b"#!/bin/sh\n"} if what == "head" else {}
        lies |= {"before_directory": b"hidden"} if what == "before" else {}
        lies |= {"count": 3} if what == "count" else {}
        _zip_file(folder, _entries(), **lies)
        path = folder / RANK_FILE
        if what == "tail":
            path.write_bytes(path.read_bytes() + b"hidden")
        if what == "comment":
            path.write_bytes(path.read_bytes()[:-2] + b"\x06\x00hidden")
        if what == "before":  # between the records and the directory, where offsets do not know it
            raw = path.read_bytes()
            at = raw.index(b"PK\x06\x06")
            path.write_bytes(raw[:at] + b"hidden" + raw[at:])

    return make


def _view(view: tuple[int, int, int]) -> Case:
    offset, size, stride = (_integer(n) for n in view)
    value = tensor().replace(b"K\x00K\x04\x85K\x01\x85", offset + size + b"\x85" + stride + b"\x85")
    return lambda folder: _zip_file(folder, _entries(_pickle(value)))


def _storage(numel: int) -> Case:
    value = tensor().replace(text("cpu") + b"K\x04t", text("cpu") + _integer(numel) + b"t")
    return lambda folder: _zip_file(folder, _entries(_pickle(value)))


def _integer(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def _link(target: str) -> Case:
    def make(folder: Path) -> None:
        _zip_file(folder, _entries())
        (folder.parent / "outside").write_text("secret")
        (folder / "huggingface").mkdir()
        (folder / "huggingface" / "config.json").write_text("{}")
        (folder / "huggingface" / "vocab.txt").symlink_to(target)

    return make


def _header(**changes: object) -> dict[str, object]:
    tensors = [
        {"dtype": "F32", "shape": [3], "data_offsets": [12 * k, 12 * k + 12]} for k in (0, 1)
    ]
    return {"a": tensors[0] | changes, "b": tensors[1]}


def _safetensors(folder: Path, header: object, data: bytes) -> None:
    _raw(folder, json.dumps(header).encode(), data)


def _raw(folder: Path, raw: bytes, data: bytes = b"") -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def _oversized(folder: Path, nbytes: int) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(nbytes.to_bytes(8, "little") + b"{}")


def _offsets(folder: Path, offsets: object) -> None:
    _safetensors(folder, _header(data_offsets=offsets), bytes(24))


def _shape(folder: Path, shape: object) -> None:
    _safetensors(folder, _header(shape=shape), bytes(24))


if __name__ == "__main__":
    main(campaign, count=1)
