"""What is computed on the way: ``python -m bench.quantised [--gb N] [--converter PYTHON]``.

``run`` of a plan over a float32 model of rank files, of eight times the budget and more: as it is,
quantized, decoded again, averaged. Every process tree is sampled from outside; CPU seconds say more
than time where the machine has other work. With ``--converter``, a Python that has
compressed-tensors, its ``convert_checkpoint`` decodes the same fp8 folder on the CPU.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import streamconv
from bench.measure import conditions, measured, record, table
from bench.measure import streamconv as run
from scripts.makers.large import make_large
from scripts.measured import Ran
from streamconv.options import AverageOptions

_BUDGET = "80MB"
_WORLD = 8
_HIDDEN = 1024
_CONVERTER = """
import sys
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer, convert_checkpoint
made = FP8BlockDequantizer(targets=[r"re:.*_proj$"])
convert_checkpoint(sys.argv[1], sys.argv[2], made, max_workers=1)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--converter", help="a Python with compressed-tensors")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="streamconv-quantised-") as scratch:
        rows = _rows(Path(scratch), int(options.gb * 1e9), options.converter)
    head = ("operation", "read", "written", "time", "CPU", "read a CPU second", "peak")
    record("quantised", f"{conditions()}, within {_BUDGET}\n\n{table(head, rows)}")


def _rows(root: Path, nbytes: int, converter: str | None) -> list[tuple[str, ...]]:
    # Whole blocks: compressed-tensors 0.20.1 fails to save a matrix whose last block is cut.
    made = make_large(root / "a", nbytes, _WORLD, hidden_size=_HIDDEN)
    other = make_large(root / "b", nbytes, _WORLD // 2, hidden_size=_HIDDEN)
    rows: list[tuple[str, ...]] = []

    def add(name: str, done: Ran, read: int, written: int) -> None:
        rows.append(_row(name, done, read, written))
        print(*rows[-1], sep=" | ", flush=True)

    def one(name: str, src: Path, keep: bool = False, **options: object) -> Path:
        plan, out = root / "plan.jsonl", root / name.replace(" ", "_").replace(":", "_")
        streamconv.plan(src, output=plan, **options)  # type: ignore[arg-type]
        done = run("run", plan, out, "--no-sync", "--max-mem", _BUDGET)
        add(name, done, done.last["read_bytes"], done.last["write_bytes"])
        plan.unlink()
        if not keep:
            shutil.rmtree(out)
        return out

    one("convert", made.source)
    one("convert to bfloat16", made.source, dtype="bfloat16")
    for rule in ("fp8-block:ue8m0", "fp8-channel"):
        one(f"quantize {rule}", made.source, quantize=rule, dtype="bfloat16")
    fp8 = one("quantize fp8-block", made.source, True, quantize="fp8-block", dtype="bfloat16")
    one("dequantize", fp8, dequantize=True, dtype="bfloat16")
    if converter is not None:
        script = root / "converter.py"
        script.write_text(_CONVERTER)
        done = measured([converter, str(script), str(fp8), str(root / "theirs")])
        size = sum(p.stat().st_size for p in fp8.glob("*.safetensors"))
        made_bytes = sum(p.stat().st_size for p in (root / "theirs").glob("*.safetensors"))
        add("dequantize, compressed-tensors", done, size, made_bytes)
    one("average of two", made.source, average=AverageOptions.mean([other.source]))
    one("difference", made.source, average=AverageOptions((other.source,), (1.0, -1.0)))
    return rows


def _row(name: str, done: Ran, read: int, written: int) -> tuple[str, ...]:
    return (
        name,
        f"{read / 1e6:.0f} MB",
        f"{written / 1e6:.0f} MB",
        f"{done.seconds:.1f} s",
        f"{done.cpu_seconds:.1f} s",
        f"{read / 1e6 / done.cpu_seconds:.0f} MB",
        f"{done.peak_bytes / 1e6:.1f} MB",
    )


if __name__ == "__main__":
    main()
