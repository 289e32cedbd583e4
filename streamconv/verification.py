"""Verification of an output folder: against its manifest, its source, another model.

Each check streams through files in small steps, so that its memory is bounded whatever the model.
A problem is a line that says what differs; the caller decides that any problem is a failure.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from streamconv import budget as budgets
from streamconv.errors import BadInputError
from streamconv.executor import WindowFiller, filled_windows
from streamconv.options import JobOptions
from streamconv.plan import INDEX, MANIFEST
from streamconv.planning import make_plan
from streamconv.reader import SourceReader
from streamconv.records import RecordChecks
from streamconv.safefile import FileTensor, read_folder
from streamconv.staging import read_manifest
from streamconv.writer import hash_file

_STEP_BYTES = 1 << 20


@dataclass
class Report:
    """What a verification found. ``rows`` are the differing tensors of a comparison, worst first."""

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return not self.problems

    def extend(self, other: Report) -> None:
        """Add what another check found."""
        self.checked += other.checked
        self.problems += other.problems
        self.rows += other.rows

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "passed": self.passed,
            "checked": self.checked,
            "problems": self.problems,
            "rows": self.rows,
        }


def verify_output(folder: Path) -> Report:
    """Check a folder against its own manifest: files, headers, index, config, nothing astray.

    Raises :class:`BadInputError` where there is no manifest to check against.
    """
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None or "files" not in manifest or "tensors" not in manifest:
        raise BadInputError(
            f"no {MANIFEST} here: this folder was not made by streamconv", where=str(folder)
        )
    report = Report()
    listed = {f["name"]: f for f in manifest["files"]}
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            report.problems.append(f"{name}: missing")
        elif path.stat().st_size != entry["nbytes"]:
            report.problems.append(
                f"{name}: {path.stat().st_size} bytes, the manifest says {entry['nbytes']}"
            )
        elif (found := hash_file(path)) != entry["xxh3_128"]:
            report.problems.append(
                f"{name}: xxh3_128 {found}, the manifest says {entry['xxh3_128']}"
            )
    report.checked.append(f"{len(listed)} files against the manifest")
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    report.problems += [
        f"{name}: not in the manifest" for name in sorted(present - listed.keys() - {MANIFEST})
    ]
    if not report.passed:
        return report
    tensors = read_folder(folder, nested=True)
    _compare_headers(folder, tensors, manifest["tensors"], report)
    _check_index(folder, {n: t for n, t in tensors.items() if t.path.parent == folder}, report)
    _check_side_files(folder, manifest, report)
    for name, tensor in tensors.items():
        found = _hash_tensor(tensor)
        if found != manifest["tensors"].get(name, {}).get("xxh3_128", found):
            report.problems.append(f"{name}: its bytes do not have the hash of the manifest")
    report.checked.append(f"{len(tensors)} tensors against the manifest")
    return report


def _compare_headers(
    folder: Path, tensors: dict[str, FileTensor], listed: dict[str, Any], report: Report
) -> None:
    report.problems += [f"{n}: in the manifest, in no file" for n in listed if n not in tensors]
    for name, tensor in tensors.items():
        entry = listed.get(name)
        file = tensor.path.relative_to(folder).as_posix()
        if entry is None:
            report.problems.append(f"{name}: in {file}, not in the manifest")
        elif (tensor.dtype.name, list(tensor.shape), file) != (
            entry["dtype"],
            entry["shape"],
            entry["file"],
        ):
            report.problems.append(
                f"{name}: {tensor.dtype.name} {list(tensor.shape)} in {file}, the manifest "
                f"says {entry['dtype']} {entry['shape']} in {entry['file']}"
            )


def _check_index(folder: Path, tensors: dict[str, FileTensor], report: Report) -> None:
    path = folder / INDEX
    files = {t.path.name for t in tensors.values()}
    if not path.is_file():
        if len(files) > 1:
            report.problems.append(f"{INDEX}: missing, with {len(files)} weight files")
        return
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map = dict(index["weight_map"])
        total = index["metadata"]["total_size"]
    except (ValueError, KeyError, TypeError) as error:
        report.problems.append(f"{INDEX}: cannot be read ({error})")
        return
    wrong = [
        n
        for n in weight_map.keys() | tensors.keys()
        if n not in tensors or weight_map.get(n) != tensors[n].path.name
    ]
    report.problems += [f"{INDEX}: {n} is not where it says" for n in sorted(wrong)]
    if total != sum(t.end - t.begin for t in tensors.values()):
        report.problems.append(f"{INDEX}: total_size {total} is not the sum of the tensors")
    report.checked.append("the index against the files")


def _check_side_files(folder: Path, manifest: dict[str, Any], report: Report) -> None:
    """Config and tokenizer must be there where the source had them, and be readable."""
    for name, _ in manifest["job"]["side"]:
        if not (folder / name).is_file():
            report.problems.append(f"{name}: the source had it, the output does not")
        elif name.endswith(".json"):
            try:
                json.loads((folder / name).read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                report.problems.append(f"{name}: no valid JSON ({error})")
    report.checked.append(f"{len(manifest['job']['side'])} config, tokenizer and other side files")


def _hash_tensor(tensor: FileTensor) -> str:
    digest = xxhash.xxh3_128()
    with tensor.path.open("rb", buffering=0) as stream:
        for piece in _pieces(stream, tensor):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(stream: IO[bytes], tensor: FileTensor, step: int = _STEP_BYTES) -> Iterator[bytes]:
    stream.seek(tensor.begin)
    left = tensor.end - tensor.begin
    while left:
        piece = stream.read(min(step, left))
        if not piece:
            raise BadInputError("the file became shorter", where=str(tensor.path))
        left -= len(piece)
        yield piece


# --- against the source ---------------------------------------------------------------------------


def verify_source(folder: Path, src: Path, *, max_mem_bytes: int | None = None) -> Report:
    """Compare every tensor of a folder with the source shards, byte by byte.

    The source is planned anew with the options that the manifest names, so that neither the plan
    nor the journal of the conversion is trusted; every source record's CRC-32 is checked again.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise BadInputError(f"no {MANIFEST} here", where=str(folder))
    options: dict[str, Any] = {"hf_config": None, "model": None, **manifest["job"]["options"]}
    if base := manifest["job"].get("base"):
        options["lora"] = {**options["lora"], "base": base}
    job = JobOptions.from_json(options)
    budget = max_mem_bytes or budgets.available_bytes()[0]
    report = Report()
    tensors = read_folder(folder, nested=True)
    with tempfile.TemporaryDirectory(prefix="streamconv-") as scratch, ExitStack() as stack:
        plan = make_plan(src, job, Path(scratch) / "plan.jsonl", max_mem_bytes=budget)
        reader = stack.enter_context(SourceReader(Path(plan.head.root), plan.head.files))
        checks = RecordChecks(reader)
        factors = budgets.factor_bytes(budget)
        merging = budgets.merging_bytes(factors) if plan.head.totals.merged else 0
        max_window = budgets.window_bytes(budget, merging)
        filler = WindowFiller(reader, checks, max_bytes=max_window, factor_bytes=factors)
        stack.callback(filler.close)
        streams: dict[Path, IO[bytes]] = {}
        seen: set[str] = set()
        bad: set[str] = set()
        for _, section in plan.sections():
            for window, buffer in filled_windows(section, filler, checks):
                for s in window.segments:
                    t = s.tensor
                    target = tensors.get(t.same_as or t.name)
                    seen.add(t.name)
                    if target is None or (target.dtype, target.shape) != (t.dtype, t.shape):
                        bad.add(t.name)
                        continue
                    if target.path not in streams:
                        opened = stack.enter_context(target.path.open("rb"))
                        streams[target.path] = opened
                    stream = streams[target.path]
                    stream.seek(target.begin + s.lo * t.dtype.itemsize)
                    for at in range(0, s.nbytes, _STEP_BYTES):
                        n = min(_STEP_BYTES, s.nbytes - at)
                        if stream.read(n) != buffer[s.at + at : s.at + at + n]:
                            bad.add(t.name)
        reader.check_unchanged()
    report.problems += [f"{n}: differs from the source" for n in sorted(bad)]
    report.problems += [f"{n}: not in the source" for n in sorted(tensors.keys() - seen)]
    report.checked.append(f"{len(seen)} tensors against the source, byte by byte")
    if checks.unverifiable_bytes:
        report.checked.append(f"{checks.unverifiable_bytes} source bytes carry no checksum")
    return report


# --- against another model ------------------------------------------------------------------------


def verify_reference(
    folder: Path, reference: Path, *, atol: float = 0.0, rtol: float = 0.0
) -> Report:
    """Compare with another folder of safetensors: exactly, or within ``atol + rtol * |reference|``.

    Dtypes may differ only where a tolerance is given. ``rows`` lists the tensors that differ with
    their largest absolute difference, worst first.
    """
    ours, theirs = read_folder(folder), read_folder(reference)
    if not theirs:
        raise BadInputError("no safetensors files in the reference", where=str(reference))
    report = Report()
    report.problems += [f"{n}: missing here" for n in sorted(theirs.keys() - ours.keys())]
    report.problems += [f"{n}: not in the reference" for n in sorted(ours.keys() - theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        row = _difference(ours[name], theirs[name], atol, rtol)
        if row is not None:
            report.rows.append(row)
    report.rows.sort(key=lambda r: -r["max_abs"])
    report.problems += [f"{r['name']}: {r['what']}" for r in report.rows]
    report.checked.append(f"{len(ours.keys() & theirs.keys())} tensors against {reference}")
    return report


def _difference(
    ours: FileTensor, theirs: FileTensor, atol: float, rtol: float
) -> dict[str, Any] | None:
    exact = not atol and not rtol
    if ours.shape != theirs.shape:
        return _row(ours, f"shape {list(ours.shape)}, there {list(theirs.shape)}", float("inf"))
    if exact and ours.dtype != theirs.dtype:
        return _row(ours, f"{ours.dtype}, there {theirs.dtype}", float("inf"))
    step = 1 << 17  # elements
    worst, differing = 0.0, 0
    with ours.path.open("rb") as a, theirs.path.open("rb") as b:
        for x, y in zip(
            _pieces(a, ours, step * ours.dtype.itemsize),
            _pieces(b, theirs, step * theirs.dtype.itemsize),
            strict=True,
        ):
            if exact and x == y:
                continue
            left, right = _numbers(x, ours.dtype), _numbers(y, theirs.dtype)
            with np.errstate(invalid="ignore"):
                distance = np.abs(left - right)
                far = ~(distance <= atol + rtol * np.abs(right))
            far &= ~(np.isnan(left) & np.isnan(right)) if not exact else True
            if exact:
                far |= left != right
            differing += int(far.sum())
            if far.any():
                worst = max(worst, float(np.nanmax(np.where(far, distance, 0.0))))
            elif exact:  # equal numbers, other bits: -0.0, or another NaN
                differing += 1
    if not differing:
        return None
    return _row(ours, f"{differing} elements differ, by {worst:.6g} at most", worst)


def _row(tensor: FileTensor, what: str, worst: float) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "what": what,
        "max_abs": worst,
        "dtype": tensor.dtype.torch,
        "shape": list(tensor.shape),
    }


def _numbers(raw: bytes, dtype: Any) -> np.ndarray[Any, np.dtype[Any]]:
    array = np.frombuffer(raw, dtype.to_numpy())
    wide = np.complex128 if dtype.name == "C64" else np.float64
    return array.astype(wide)
