"""The same bytes whatever the budget, the readers, the files' order on disk, or a stop on the way.

COUNT runs of one plan over a model of some 80 MB, each with a random budget and number of readers,
over the source or a copy of it whose files were made in another order, every third one killed and
started again with other knobs. All outputs must be equal but for the manifest's ``run`` block.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from pathlib import Path

from scripts.campaigns.common import Figures, contents, finish, main, run, scratch, start
from scripts.makers.large import make_large

_MODEL_BYTES = 80_000_000
_BUDGETS = ("72MB", "80MB", "128MB", "512MB", "4GB")
_READERS = (1, 2, 3, 8)
_SMALL = ("--max-shard-size", "8MB", "--dtype", "bfloat16")


def campaign(work: Path, count: int, seed: int) -> Figures:
    rng, figures = random.Random(seed), Figures()
    source = make_large(work / "made", _MODEL_BYTES, 4).source
    copy = work / "copy"
    shutil.copytree(source / "huggingface", copy / "huggingface")
    for path in sorted(source.glob("*.*"), reverse=True):
        shutil.copyfile(path, copy / path.name)
    plans = [work / "plan.jsonl", work / "copy.jsonl"]
    for folder, plan in zip((source, copy), plans, strict=True):
        outcome = run("plan", folder, "-o", plan, *_SMALL)
        if outcome.code != 0:
            raise RuntimeError(outcome.last_words)
    digests: dict[str, str] = {}
    for number in range(count):
        plan = rng.choice(plans)
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
            digests[f"run {number}, {plan.name}, {knobs}"] = _digest(folder / "out")
    different = set(digests.values())
    figures.add("different outputs" if len(different) > 1 else "output", len(different))
    if len(different) > 1:
        figures.breach(str(digests))
    return figures


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
