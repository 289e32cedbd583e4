"""Reads what a conversion wrote, with a parser of its own: json and slices, nothing of streamconv."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock

from scripts.makers.large import LargeMade, make_large

MANIFEST = "streamconv.json"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a safetensors file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes = field(repr=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Stored]]:
    """Return the header's metadata and the tensors; the data must be without holes or leftovers."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    data = raw[8 + size :]
    metadata = header.pop("__metadata__", {})
    ranges = sorted(entry["data_offsets"] for entry in header.values())
    ends = [0, *(end for _, end in ranges)]
    assert [begin for begin, _ in ranges] == ends[:-1]
    assert ends[-1] == len(data)
    tensors = {
        name: Stored(e["dtype"], tuple(e["shape"]), data[slice(*e["data_offsets"])])
        for name, e in header.items()
    }
    return metadata, tensors


def read_model(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a model folder; no name may be in two files."""
    found: dict[str, Stored] = {}
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no weights in {folder}"
    for path in files:
        metadata, tensors = read_safetensors(path)
        assert metadata == {"format": "pt"}
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def read_truth(path: Path | None) -> dict[str, Stored]:
    """Return the tensors of a truth: a save_pretrained folder, or one safetensors file."""
    assert path is not None
    return read_model(path) if path.is_dir() else read_safetensors(path)[1]


def differences(found: dict[str, Stored], expected: dict[str, Stored]) -> list[str]:
    """Say in a few lines what differs; tensors are too long for pytest's own report."""
    lines = [f"missing: {n}" for n in sorted(expected.keys() - found.keys())]
    lines += [f"unexpected: {n}" for n in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        a, b = found[name], expected[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            lines.append(f"{name}: {a} instead of {b}")
        elif a.data != b.data:
            lines.append(f"{name}: other bytes")
    return lines


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of an output; of the manifest what does not depend on the run."""
    found = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    manifest = json.loads(found.pop(MANIFEST))
    del manifest["run"]
    return found | {MANIFEST: json.dumps(manifest, sort_keys=True).encode()}


TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def cast(tensor: Stored, dtype: torch.dtype) -> Stored:
    """Return the tensor as torch casts it; what is no ordinary float stays as it is."""
    if tensor.dtype not in TORCH_DTYPES:
        return tensor
    if not tensor.numel:  # torch makes no tensor of an empty buffer
        return Stored(_NAMES[dtype], tensor.shape, b"")
    source = torch.frombuffer(bytearray(tensor.data), dtype=TORCH_DTYPES[tensor.dtype])
    raw = source.to(dtype).view(torch.uint8).numpy().tobytes()
    return Stored(_NAMES[dtype], tensor.shape, raw)


def large_checkpoint(base: Path, nbytes: int, world: int) -> LargeMade:
    """Make a large checkpoint once for all pytest-xdist workers that share ``base``."""
    root = base / f"large-{nbytes}-{world}"
    facts = root.with_suffix(".json")
    with FileLock(root.with_suffix(".lock")):
        if not facts.exists():
            made = make_large(root, nbytes, world)
            facts.write_text(json.dumps(made.shapes))
    shapes = {name: tuple(shape) for name, shape in json.loads(facts.read_text()).items()}
    return LargeMade(root / "actor", shapes, torch.float32)


def large_differences(folder: Path, made: LargeMade) -> list[str]:
    """Compare an output with the computed truth, one tensor in memory at a time."""
    from safetensors import safe_open

    wrong, seen = [], set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a handle is no mapping
                seen.add(name)
                found, expected = file.get_tensor(name), made.expected(name)
                same = found.shape == expected.shape and found.dtype == expected.dtype
                if not (same and torch.equal(found.view(torch.int32), expected.view(torch.int32))):
                    wrong.append(name)
    return wrong + sorted(seen ^ made.shapes.keys())
