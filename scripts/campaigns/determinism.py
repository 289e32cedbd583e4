"""The same bytes whatever the budget, the readers, the files' order on disk, or a stop on the way.

COUNT runs of plans over a model of some 80 MB, each with a random budget and number of readers,
over the source or a copy of it whose files were made in another order, every third one killed and
started again with other knobs. The plans cast, quantize by each rule, decode what was quantized, and
average, in turn. All outputs of one of these must be equal but for the manifest's ``run`` block.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from pathlib import Path
from typing import Any

import streamconv
from scripts.campaigns.common import Figures, contents, finish, main, run, scratch, start
from scripts.makers.large import make_large
from streamconv.options import AverageOptions

_MODEL_BYTES = 80_000_000
_BUDGETS = ("80MB", "96MB", "128MB", "512MB", "4GB")
_READERS = (1, 2, 3, 8)
_SMALL: dict[str, Any] = {"max_shard_size": "8MB", "dtype": "bfloat16"}
_RULES = ("fp8-block", "fp8-block:ue8m0", "fp8-channel")


def campaign(work: Path, count: int, seed: int) -> Figures:
    rng, figures = random.Random(seed), Figures()
    source = make_large(work / "made", _MODEL_BYTES, 4).source
    copy = work / "copy" / source.name
    shutil.copytree(source / "huggingface", copy / "huggingface")
    for path in sorted(source.glob("*.*"), reverse=True):
        shutil.copyfile(path, copy / path.name)
    plans = _plans(work, source, copy, count)
    digests: dict[str, dict[str, str]] = {}
    for number in range(count):
        what = list(plans)[number % len(plans)]
        plan = rng.choice(plans[what])
        with scratch(work) as folder:
            command = ("run", plan, folder / "out", "-q", "--no-sync")
            if number % 3 == 2:
                process, mark = start(*command, *_knobs(rng))
                time.sleep(rng.uniform(0.3, 1.0))
                process.kill()
                finish(process, mark)
                figures.add("killed and resumed")
            knobs = _knobs(rng)
            outcome = run(*command, *knobs)
            figures.add("runs")
            if outcome.code != 0:
                figures.breach(f"run {number}, {knobs}: {outcome.code}, {outcome.last_words}")
                continue
            made = digests.setdefault(what, {})
            made[f"run {number}, {plan.name}, {knobs}"] = _digest(folder / "out")
    for what, found in digests.items():
        different = set(found.values())
        figures.add("different outputs" if len(different) > 1 else "output", len(different))
        if len(different) > 1:
            figures.breach(f"{what}: {found}")
    return figures


def _plans(work: Path, source: Path, copy: Path, count: int) -> dict[str, list[Path]]:
    """Return the plans of each operation, over the source and over its copy."""
    fp8 = work / "fp8"
    streamconv.convert(source, fp8, quantize="fp8-block", max_shard_size="8MB", sync=False)
    again = shutil.copytree(fp8, work / "fp8_copy")
    half = AverageOptions((fp8,), (0.25, 0.75))
    operations: dict[str, tuple[tuple[Path, Path], dict[str, Any]]] = {
        "cast": ((source, copy), {}),
        "average": ((source, copy), {"average": half, "dequantize": True}),
        "dequantize": ((fp8, again), {"dequantize": True}),
        **{rule: ((source, copy), {"quantize": rule}) for rule in _RULES},
        "average and quantize": (
            (source, copy),
            {"average": half, "dequantize": True, "quantize": "fp8-block"},
        ),
    }
    made: dict[str, list[Path]] = {}
    # Each is run twice at least.
    for name, (places, options) in list(operations.items())[: max(1, count // 2)]:
        for k, place in enumerate(places):
            plan = work / f"{name}_{k}.jsonl"
            streamconv.plan(place, output=plan, **_SMALL, **options)
            made.setdefault(name, []).append(plan)
    return made


def _knobs(rng: random.Random) -> tuple[object, ...]:
    return ("--max-mem", rng.choice(_BUDGETS), "--io-threads", rng.choice(_READERS))


def _digest(out: Path) -> str:
    digest = hashlib.sha256()
    for name, data in sorted(contents(out).items()):
        # The plan names the folder that it was made of, so two plans of one job have two digests.
        is_manifest = name == "streamconv.json"
        data = data.replace(_plan_digest(data), b"") if is_manifest else data
        digest.update(f"{name} {len(data)} ".encode() + data)
    return digest.hexdigest()


def _plan_digest(manifest: bytes) -> bytes:
    return manifest.partition(b'"plan_digest": "')[2].partition(b'"')[0]


if __name__ == "__main__":
    main(campaign, count=60)
