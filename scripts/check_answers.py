"""Convert every checkpoint below a folder that has its answer beside it, and compare bit for bit.

    python scripts/check_answers.py FOLDER

An answer is a HuggingFace model folder called ``hf_answer``, ``hf`` or ``hf_truth``; what lies beside
it is converted with the answer's config. One line a checkpoint; the exit code is the number of those
that differ.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

import streamconv
from streamconv.errors import StreamconvError
from streamconv.formats import find_model

ANSWERS = ("hf_answer", "hf", "hf_truth")


def checkpoints(root: Path) -> Iterator[tuple[Path, Path]]:
    """Yield (checkpoint, answer)."""
    for answer in sorted(p for name in ANSWERS for p in root.rglob(name) if p.is_dir()):
        for beside in sorted(answer.parent.iterdir()):
            if not beside.is_dir() or beside == answer:
                continue
            try:
                find_model(beside)
            except StreamconvError:
                continue
            yield beside, answer


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a model folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return found


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    """Return in words how two models differ, or nothing."""
    missing, superfluous = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or superfluous:
        return f"missing {sorted(missing)[:3]}, superfluous {sorted(superfluous)[:3]}"
    for name, truth in expected.items():
        mine = found[name]
        if (mine.dtype, mine.shape) != (truth.dtype, truth.shape):
            return f"{name}: {mine.dtype} {list(mine.shape)} for {truth.dtype} {list(truth.shape)}"
        if not torch.equal(mine.reshape(-1).view(torch.uint8), truth.reshape(-1).view(torch.uint8)):
            return f"{name}: other bytes"
    return ""


def problem_of(src: Path, answer: Path, hf_config: Path | None) -> str:
    """Convert ``src``; return in words how it differs from ``answer`` or why it failed, or nothing."""
    out = Path(tempfile.mkdtemp())
    try:
        streamconv.convert(src, out / "model", hf_config=hf_config, sync=False)
        return difference(tensors(out / "model"), tensors(answer))
    except StreamconvError as error:
        return " | ".join(str(error).splitlines())
    finally:
        shutil.rmtree(out)


def main() -> int:
    """Convert and compare; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    root = parser.parse_args().folder
    wrong = 0
    for src, answer in checkpoints(root):
        problem = problem_of(src, answer, answer)
        wrong += bool(problem)
        print(
            f"{'differs' if problem else 'equal  '} {src.relative_to(root)} {problem}", flush=True
        )
    return wrong


if __name__ == "__main__":
    sys.exit(main())
