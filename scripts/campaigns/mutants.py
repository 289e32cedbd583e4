"""Damaged rank files: cut off, bits flipped, bytes overwritten, moved, repeated.

COUNT mutants of tiny checkpoints of every layout, with and without checksums, are planned and
executed in process, and one in a thousand through the command. What comes out is either the
undamaged output or an error of ours; where the files hold no checksums, other bytes may come out,
but said to be unverifiable. Some mutants have their checksums made right again, as an attacker
would: of these only no hang and no traceback is asked.
"""

from __future__ import annotations

import random
import shutil
import struct
import traceback
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scripts.campaigns.common import Figures, each, main, run, scratch
from scripts.campaigns.inproc import each_number
from scripts.makers.tiny import LAYOUTS, make_tiny
from scripts.outputs import MANIFEST
from streamconv import formats
from streamconv.conversion.job import run_plan
from streamconv.errors import StreamconvError
from streamconv.executor.budget import smallest_run_bytes
from streamconv.options import JobOptions, RunOptions
from streamconv.planning.build import build_plan

_WINDOW_BYTES = 16 << 20
_RIGHT_CODES = (5, 6)


@dataclass(frozen=True)
class Victim:
    """A checkpoint that is damaged: its files, and the safetensors files that come of it unharmed."""

    name: str
    crc: bool
    files: dict[str, bytes]
    regions: dict[str, dict[str, list[range]]]
    expected: dict[str, bytes]


def campaign(work: Path, count: int, seed: int) -> Figures:
    victims = [_victim(work, layout, crc) for crc in (True, False) for layout in LAYOUTS]
    figures = each_number(
        work, count, partial(_trial, victims, seed), on_crash=partial(_crashed, work, victims, seed)
    )
    sample = random.Random(seed).sample(range(count), max(1, count // 1000))
    figures.merge(each(sample, partial(_through_the_command, work, victims, seed)))
    return figures


def _victim(work: Path, layout: str, crc: bool) -> Victim:
    name = layout if crc else f"{layout}-no-crc"
    folder = make_tiny(work / "victims" / name, layout, crc=crc)
    files = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    with scratch(work) as place:
        expected, _ = convert(folder, place)
    return Victim(name, crc, files, {n: _regions(folder / n) for n in files}, expected)


def _regions(path: Path) -> dict[str, list[range]]:
    """Return where a rank file's pickle, records, headers and directory lie."""
    with zipfile.ZipFile(path) as archive:
        found: dict[str, list[range]] = {"headers": [], "records": [], "pickle": [], "small": []}
        for info in archive.infolist():
            name = info.filename.partition("/")[2]
            names, extra = struct.unpack_from("<HH", path.read_bytes(), info.header_offset + 26)
            start = info.header_offset + 30 + names + extra
            found["headers"].append(range(info.header_offset, start))
            kind = "pickle" if name == "data.pkl" else "records" if "data/" in name else "small"
            found[kind].append(range(start, start + info.file_size))
        found["directory"] = [range(archive.start_dir, path.stat().st_size)]
    return {kind: [r for r in places if r] for kind, places in found.items()}


def mutate(victim: Victim, rng: random.Random) -> tuple[str, str, bytes, bool]:
    """Return which file is damaged, how, its new bytes, and whether its checksums were made right."""
    file = rng.choice(sorted(victim.files))
    data = bytearray(victim.files[file])
    region = rng.choice([k for k, places in victim.regions[file].items() if places])
    place = rng.choice(victim.regions[file][region])
    at = rng.choice(place)
    how = rng.choice(["cut", "bit", "bit", "bit", "bits", "byte", "zero", "move", "repeat", "drop"])
    length = rng.randint(1, 64)
    if how == "cut":
        del data[at:]
    elif how == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "bits":
        for _ in range(rng.randint(2, 8)):
            data[rng.choice(place)] ^= 1 << rng.randrange(8)
    elif how == "byte":
        data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif how == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif how == "move":
        other = rng.randrange(len(data))
        data[at : at + length] = data[other : other + length]
    elif how == "repeat":
        data[at:at] = data[at : at + length]
    else:
        del data[at : at + length]
    sealed = region == "pickle" and len(data) == len(victim.files[file]) and rng.random() < 0.5
    if sealed:
        _seal(data, place, victim.regions[file]["directory"][0].start)
    return file, f"{how} in {region}", bytes(data), sealed


def _seal(data: bytearray, pickle: range, directory: int) -> None:
    """Give the directory the checksum that the changed pickle has now."""
    entry = data.index(b"/data.pkl", directory)
    start = data.rindex(b"PK\x01\x02", 0, entry)
    struct.pack_into("<I", data, start + 16, zlib.crc32(data[pickle.start : pickle.stop]))


def convert(source: Path, place: Path) -> tuple[dict[str, bytes], int]:
    """Plan and execute here; return the weight files and how many bytes are unverifiable."""
    plan, out = place / "plan.jsonl", place / "out"
    checkpoint = formats.find_model(source, None).read()
    with plan.open("w", encoding="utf-8") as stream:
        build_plan(checkpoint, JobOptions(), stream)
    budget = smallest_run_bytes() + _WINDOW_BYTES
    result = run_plan(plan, out, RunOptions(sync=False, max_mem_bytes=budget))
    assert (out / MANIFEST).is_file()
    return {p.name: p.read_bytes() for p in out.glob("*.safetensors")}, result.unverifiable_bytes


def _set_up(
    victims: list[Victim], seed: int, folder: Path, number: int
) -> tuple[Victim, str, bool]:
    rng = random.Random(f"{seed}/{number}")
    victim = victims[number % len(victims)]
    file, how, data, sealed = mutate(victim, rng)
    folder.mkdir()
    for name, intact in victim.files.items():
        (folder / name).write_bytes(data if name == file else intact)
    return victim, f"mutant {number}, {victim.name}, {how}", sealed


def _trial(victims: list[Victim], seed: int, folder: Path, number: int) -> Figures:
    figures = Figures()
    shutil.rmtree(folder)
    folder.mkdir()
    victim, where, sealed = _set_up(victims, seed, folder / "source", number)
    figures.add("mutants")
    try:
        found, unverifiable = convert(folder / "source", folder)
    except StreamconvError as error:
        figures.add("refused")
        if error.exit_code not in _RIGHT_CODES:
            figures.breach(f"{where}: exit code {error.exit_code}, {error.what}, {error.found}")
        if not error.where:
            figures.breach(f"{where}: does not say where: {error.what}")
        if (folder / "out").exists():
            figures.breach(f"{where}: refused but published")
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        at = traceback.extract_tb(error.__traceback__)[-1]
        figures.breach(f"{where}: {type(error).__name__}: {error} ({at.filename}:{at.lineno})")
    else:
        _judge(figures, where, found, victim.expected, sealed, unverifiable)
    return figures


def _judge(
    figures: Figures,
    where: str,
    found: dict[str, bytes],
    expected: dict[str, bytes],
    sealed: bool,
    unverifiable: int,
) -> None:
    if found == expected:
        figures.add("harmless")
    elif sealed:
        figures.add("other contents under right checksums")
    elif not unverifiable:
        figures.breach(f"{where}: silently different")
    elif {n: _header(d) for n, d in found.items()} == {n: _header(d) for n, d in expected.items()}:
        figures.add("different in data bytes that are said to be unverifiable")
    elif "no-crc" in where:
        # A name or a shape: without a checksum of the pickle nobody can know.
        figures.add("other tensors that are said to be unverifiable")
    else:
        figures.breach(f"{where}: other tensors, not only other bytes")


def _header(data: bytes) -> bytes:
    return data[: 8 + int.from_bytes(data[:8], "little")]


def _crashed(work: Path, victims: list[Victim], seed: int, number: int, signal: str) -> Figures:
    figures = _through_the_command(work, victims, seed, number)
    if signal == "SIGALRM":
        figures.breach(f"mutant {number}: a hang")
    figures.add(f"ended by {signal} in process")
    return figures


def _through_the_command(work: Path, victims: list[Victim], seed: int, number: int) -> Figures:
    figures = Figures()
    with scratch(work) as folder:
        victim, where, sealed = _set_up(victims, seed, folder / "source", number)
        outcome = run("convert", folder / "source", folder / "out", "--json")
        figures.add("through the command")
        if outcome.code == 0:
            found = {p.name: p.read_bytes() for p in (folder / "out").glob("*.safetensors")}
            unverifiable = 1 if '"unverifiable_bytes": 0' not in outcome.stdout else 0
            _judge(figures, f"command, {where}", found, victim.expected, sealed, unverifiable)
        elif outcome.code not in _RIGHT_CODES or "Traceback" in outcome.stderr:
            figures.breach(f"command, {where}: code {outcome.code}, {outcome.last_words}")
        elif (folder / "out").exists():
            figures.breach(f"command, {where}: refused but published")
    return figures


if __name__ == "__main__":
    main(campaign, count=100_000)
