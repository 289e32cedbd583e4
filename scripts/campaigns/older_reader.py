"""Load models under the release of transformers that is imported; run by older_release.py.

A line of JSON names a folder and a class; the answer is what is wrong with what loads, in a few words,
and whether logits were compared with those in ``logits.safetensors`` of the folder beside.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from scripts.makers.forward import logits, not_as_saved

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)


def problem(folder: Path, name: str) -> tuple[str, bool]:
    """Return what is wrong with the model as this release loads it."""
    try:
        model, report = getattr(transformers, name).from_pretrained(
            folder, output_loading_info=True, torch_dtype=torch.float32
        )
    except Exception as error:  # noqa: BLE001 - whatever the library says of the output
        return f"does not load: {type(error).__name__}: {' '.join(str(error).split())[:200]}", False
    # Buffers that version 4 would have saved and version 5 computes; so does 4 where they are missing.
    computed = {name for name, _ in model.named_buffers()}
    wrong = not_as_saved(
        report | {"missing_keys": [k for k in report["missing_keys"] if k not in computed]}
    )
    if wrong:
        return wrong, False
    path = folder.with_name("logits.safetensors")
    if not path.exists():
        return "", False
    expected, found = load_file(path)["logits"], logits(model.eval())
    if found is None or found.shape != expected.shape:
        return "no logits, or of another shape", False
    if torch.allclose(expected, found, rtol=1e-3, atol=1e-4, equal_nan=True):
        return "", True
    return f"the logits differ by {(expected - found).abs().max():.2g}", False


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(sorted(dir(transformers))), flush=True)
    for line in sys.stdin:
        said = json.loads(line)
        print(json.dumps(problem(Path(said["folder"]), said["name"])), flush=True)
