"""Outputs of COUNT classes of transformers load in 4.57, its last version 4, and give the same logits.

Each class that both releases have is made as a tiny model whose settings are not version 4's defaults:
another rotary base, and with an odd seed embeddings tied where the default is that they are not, and
the other way round. The installed release computes its logits, streamconv converts what two ranks hold,
and 4.57 loads the output with nothing missing or unexpected and must compute the same. Where it does
not, a notice of the output has to say so, and only there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
import transformers
from safetensors.torch import save_file

from scripts import releases
from scripts.campaigns.common import REPOSITORY, Figures, main, scratch
from scripts.makers.architectures import Architecture, architectures, build
from scripts.makers.forward import logits
from scripts.makers.ranks import write_ranks
from scripts.outputs import MANIFEST
from streamconv import formats
from streamconv.conversion.job import run_plan
from streamconv.options import JobOptions, RunOptions
from streamconv.planning.build import build_plan

_READER = Path(__file__).with_name("older_reader.py")


def campaign(work: Path, count: int, seed: int) -> Figures:
    packages = work.parent / "transformers-4"
    why_not = releases.install(packages)
    if why_not is not None:
        figures = Figures()
        figures.breach(f"pip cannot install transformers 4: {why_not}")
        return figures
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    classes = random.Random(seed).sample(architectures(), len(architectures()))
    return compare(work, packages, classes, count, untie=seed % 2 == 1)


def compare(
    work: Path, packages: Path, classes: Iterable[Architecture], count: int, *, untie: bool
) -> Figures:
    """Try the first ``count`` of ``classes`` that the release in the folder ``packages`` has."""
    figures = Figures()
    environment = releases.environment(packages)
    environment["PYTHONPATH"] += f":{REPOSITORY}"
    with subprocess.Popen(
        [sys.executable, str(_READER)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        known = set(json.loads(reader.stdout.readline()))
        for one in itertools.islice((a for a in classes if a.name in known), count):
            with scratch(work) as folder:
                try:
                    compared = _make(folder, build(one, lambda s: _other(s, untie=untie)))
                except Exception as error:  # noqa: BLE001 - architectures.py judges these
                    figures.add("not made")
                    print(f"NOT MADE {one.name}: {str(error)[:200]}", file=sys.stderr)
                    continue
                said = {"folder": str(folder / "out"), "name": one.name}
                problem, same = _ask(reader.stdin, reader.stdout, said)
                notices = json.loads((folder / "out" / MANIFEST).read_text())["notices"]
                told = any(n.startswith("transformers 4 ") for n in notices)
                if problem and told:
                    figures.add("that say what is not")
                elif problem or told:
                    problem = problem or "nothing is wrong with what a notice tells of"
                    figures.breach(f"{one.name} ({one.model_type}): {problem}")
                else:
                    figures.add("with equal logits" if same and compared else "that load")
        reader.stdin.close()
    return figures


def _ask(given: IO[str], made: IO[str], said: dict[str, str]) -> tuple[str, bool]:
    given.write(json.dumps(said) + "\n")
    given.flush()
    problem, same = json.loads(made.readline())
    return problem, same


def _other(settings: Any, *, untie: bool) -> None:
    """Set what version 4 has a default for to something else, in the whole config."""
    for key, value in settings.items():
        if isinstance(value, dict):
            _other(value, untie=False)
        elif key == "rope_theta" and value:
            settings[key] = 777.0
    if untie:
        settings["tie_word_embeddings"] = not settings.get("tie_word_embeddings", True)


def _make(folder: Path, model: Any) -> bool:
    """Convert a model to ``out``, with its logits beside; return whether it gives any."""
    found = logits(model)
    if found is not None:
        save_file({"logits": found.contiguous()}, folder / "logits.safetensors")
    model.save_pretrained(folder / "truth")
    actor, plan = folder / "actor", folder / "plan.jsonl"
    (actor / "huggingface").mkdir(parents=True)
    for path in (folder / "truth").glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copy(path, actor / "huggingface")
    write_ranks(actor, {n: t.clone() for n, t in model.state_dict().items()}, world=2)
    with contextlib.redirect_stderr(None), plan.open("w", encoding="utf-8") as stream:
        build_plan(formats.find_model(actor).read(), JobOptions(), stream)
    run_plan(plan, folder / "out", RunOptions(sync=False, max_mem_bytes=4 << 30))
    return found is not None


if __name__ == "__main__":
    main(campaign, count=1000)
