"""Every architecture of transformers comes out right: what docs say is supported is made here.

COUNT classes of the installed transformers (all by default) are made as tiny models, each as FSDP2
writes it on two ranks, twice: under the names that the model has in memory and under those of the Hub.
Each is converted by the code that plans and by the code that runs, in this process, and then held
against the library itself: ``save_pretrained`` of the unsharded model, bit for bit by name;
``from_pretrained``, with nothing missing, unexpected or of another shape, and the same state dict bit
for bit; and the logits. A class is *right* when all of it is so; *equal when loaded* when names differ
from ``save_pretrained``'s and what loads is the same; *refused* when streamconv says why; *wrong* else.

``--write`` keeps the outcome in bench/architectures.json, where it takes the place of an earlier one
of the same classes, and the page's statement with it; ``--readme`` writes the statement anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from scripts.campaigns.common import REPOSITORY, scratch
from scripts.makers.architectures import TASKS, Architecture, NotSmallError, architectures, build
from scripts.makers.forward import logits, not_as_saved
from scripts.makers.ranks import write_ranks
from streamconv import formats
from streamconv.conversion.job import run_plan
from streamconv.errors import StreamconvError
from streamconv.options import JobOptions, RunOptions
from streamconv.planning.build import build_plan

RESULT = REPOSITORY / "bench" / "architectures.json"
PAGE = REPOSITORY / "docs" / "reference" / "architectures.md"
_BEGIN, _END = "<!-- architectures -->", "<!-- end of architectures -->"

RIGHT, LOADED, REFUSED, WRONG, UNBUILT = (
    "right",
    "equal when loaded",
    "refused",
    "wrong",
    "not built",
)
_VERDICTS = (RIGHT, LOADED, REFUSED, WRONG, UNBUILT)
_HANG_SECONDS = 120
_MEMORY_BYTES = 12 << 30

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a class, and why it is not right."""

    verdict: str
    reason: str = ""
    logits: bool = False


def trial(work: Path, architecture: Architecture) -> Outcome:
    """Make, convert and compare one class under both kinds of names; the worse outcome counts."""
    with scratch(work) as folder, _quiet():
        try:
            model = build(architecture)
            model.save_pretrained(folder / "truth")
        except NotSmallError as error:
            return Outcome(UNBUILT, str(error))
        except Exception as error:  # noqa: BLE001 - whatever the library says of its own model
            return Outcome(UNBUILT, f"save_pretrained: {_short(error)}")
        truth = stored(folder / "truth")
        state = {n: t.clone() for n, t in model.state_dict().items()}
        problem, _ = _load(folder / "truth", model, state)
        if problem:
            return Outcome(UNBUILT, f"transformers cannot load what it saves itself: {problem}")
        worst = Outcome(RIGHT, logits=True)
        for kind, held in (("memory", state), ("hub", truth)):
            found = _convert(folder / kind, folder / "truth", held, model, state, truth)
            if _VERDICTS.index(found.verdict) >= _VERDICTS.index(worst.verdict):
                reason = f"{kind} names: {found.reason}" if found.reason else ""
                worst = Outcome(found.verdict, reason or worst.reason, found.logits)
        return worst


def _convert(
    folder: Path, side: Path, held: State, model: PreTrainedModel, state: State, truth: State
) -> Outcome:
    actor, plan, out = folder / "actor", folder / "plan.jsonl", folder / "out"
    (actor / "huggingface").mkdir(parents=True)
    for path in side.glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copy(path, actor / "huggingface")
    write_ranks(actor, held, world=2)
    try:
        with plan.open("w", encoding="utf-8") as stream:
            build_plan(formats.find_model(actor).read(), JobOptions(), stream)
        run_plan(plan, out, RunOptions(sync=False, max_mem_bytes=4 << 30))
    except StreamconvError as error:
        return Outcome(REFUSED, ": ".join(filter(None, (error.what, error.where, error.found))))
    made = stored(out)
    same = made.keys() == truth.keys() and all(_same(made[n], truth[n]) for n in truth)
    problem, logits = _load(out, model, state)
    if not problem:
        return Outcome(RIGHT if same else LOADED, "" if same else _names(made, truth), logits)
    return Outcome(WRONG, problem)


def _load(folder: Path, model: PreTrainedModel, state: State) -> tuple[str, bool]:
    """Return what is wrong with what transformers loads, and whether logits were compared."""
    try:
        loaded, report = type(model).from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # noqa: BLE001 - whatever the library says of the output
        return f"does not load: {_short(error)}", False
    wrong = not_as_saved(report)
    if wrong:
        return wrong, False
    found = loaded.state_dict()
    other = [n for n in state if n not in found or not _same(found[n], state[n])]
    if other or found.keys() != state.keys():
        return f"{len(other)} tensors of the state dict differ: {other[:3]}", False
    expected = logits(model)
    if expected is None:
        return "", False
    computed = logits(loaded.eval())
    if computed is None or computed.shape != expected.shape:
        return "the logits have another shape", False
    # Sums are rounded as memory is aligned; the weights are compared bit for bit.
    if not torch.allclose(expected, computed, rtol=1e-4, atol=1e-5, equal_nan=True):
        return f"the logits differ by {(expected - computed).abs().max():.2g}", False
    return "", True


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a model folder."""
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def _names(made: State, truth: State) -> str:
    ours, theirs = sorted(made.keys() - truth.keys()), sorted(truth.keys() - made.keys())
    if not ours and not theirs:
        other = sorted(n for n in truth if not _same(made[n], truth[n]))
        return f"{len(other)} tensors are laid out otherwise: {other[:1]}"
    return f"{len(ours)} names differ: {ours[:1]} for {theirs[:1]}"


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import logging
    import warnings

    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- what a run amounts to ------------------------------------------------------------------------


def merged(kept: Mapping[str, Any], outcomes: Mapping[Architecture, Outcome]) -> dict[str, Any]:
    """Return what is kept of a run: one line for each class, and of one tried again the last."""
    lines = dict(kept.get("classes", {}))
    for architecture, outcome in outcomes.items():
        line = {"type": architecture.model_type, "for": architecture.task, "is": outcome.verdict}
        lines[architecture.name] = line | ({"why": outcome.reason} if outcome.reason else {})
    return {"transformers": transformers.__version__, "classes": dict(sorted(lines.items()))}


def written(kept: Mapping[str, Any]) -> str:
    """Return the file of what is kept, a class a line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(line)}" for name, line in kept["classes"].items()]
    head = f'{{\n "transformers": {json.dumps(kept["transformers"])},\n "classes": {{\n'
    return head + ",\n".join(lines) + "\n }\n}\n"


def statement(kept: Mapping[str, Any]) -> str:
    """Return the page's statement of what is supported."""
    classes = kept["classes"].values()
    tried = [c for c in classes if c["is"] != UNBUILT]
    counts = Counter(c["is"] for c in classes)
    tried_with = (
        f"Tried with transformers {kept['transformers']} by "
        f"`python -m scripts.campaigns.architectures`: {len({c['type'] for c in tried})} model types, "
        f"{len(tried)} classes, each on two ranks under its in-memory and under its Hub names. "
        f"{counts[RIGHT]} come out as `save_pretrained` writes them, bit for bit, load with nothing "
        "missing and, where they run on text or a picture alone, give the same logits; "
        f"{counts[LOADED]} have other names, mostly those of the released models, and load to the "
        f"same; {counts[REFUSED]} are refused; {counts[WRONG]} are wrong."
    )
    lines = [
        tried_with,
        "",
        "| for | classes | right | equal when loaded | refused | wrong |",
        "|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        verdicts = [c["is"] for c in tried if c["for"] == task]
        cells = " | ".join(str(verdicts.count(v)) for v in _VERDICTS[:4])
        lines.append(f"| {task} | {len(verdicts)} | {cells} |")
    for verdict in (LOADED, REFUSED, WRONG):
        names = sorted({c["type"] for c in tried if c["is"] == verdict})
        if names:
            lines += ["", f"{verdict.capitalize()}: {', '.join(names)}."]
    untried = (
        f"{counts[UNBUILT]} more could not be made small, want libraries that were not there, or "
        "cannot be loaded from what they save. `bench/architectures.json` "
        "names every class and every reason."
    )
    lines += ["", untried]
    return "\n".join(lines) + "\n"


def page_with(text: str, kept: Mapping[str, Any]) -> str:
    """Return the page's text with the statement that belongs to a kept outcome."""
    head, _, rest = text.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    return f"{head}{_BEGIN}\n{statement(kept)}{_END}{tail}"


def _hang(*_: object) -> None:
    raise TimeoutError(f"not done after {_HANG_SECONDS} seconds")


def sweep(work: Path, chosen: Sequence[Architecture]) -> dict[Architecture, Outcome]:
    """Try classes one after the other; tell each that is not right as it is found."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _hang)
    outcomes = {}
    for architecture in chosen:
        signal.alarm(_HANG_SECONDS)
        try:
            outcome = trial(work, architecture)
        except Exception as error:  # noqa: BLE001 - a traceback where an error should be is wrong, too
            outcome = Outcome(WRONG, _short(error))
        finally:
            signal.alarm(0)
        outcomes[architecture] = outcome
        if outcome.reason:
            print(
                f"{outcome.verdict.upper()} {architecture.name}: {outcome.reason}", file=sys.stderr
            )
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.campaigns.architectures")
    parser.add_argument("--count", type=int, help="how many classes; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="a folder for temporary files")
    parser.add_argument("--only", action="append", help="a class or a model type; may be repeated")
    parser.add_argument("--write", action="store_true", help=f"keep the outcome in {RESULT.name}")
    parser.add_argument(
        "--readme", action="store_true", help="only write the page's statement anew"
    )
    options = parser.parse_args()
    if options.readme:
        PAGE.write_text(page_with(PAGE.read_text(), json.loads(RESULT.read_text())))
        return
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    started = time.monotonic()
    chosen = architectures()
    if options.only:
        chosen = [a for a in chosen if {a.name, a.model_type} & set(options.only)]
    if options.count is not None:
        chosen = random.Random(options.seed).sample(chosen, min(options.count, len(chosen)))
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        outcomes = sweep(Path(work), chosen)
    counts = Counter(o.verdict for o in outcomes.values())
    if options.write:
        before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        kept = merged(before, outcomes)
        RESULT.write_text(written(kept))
        PAGE.write_text(page_with(PAGE.read_text(), kept))
    line = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _VERDICTS)
    compared = sum(o.logits for o in outcomes.values())
    print(
        f"architectures: {len({a.model_type for a in outcomes})} model types, {len(outcomes)} classes, "
        f"{line}, {compared} with equal logits, {counts[WRONG]} breaches "
        f"({time.monotonic() - started:.0f} s)"
    )
    sys.exit(bool(counts[WRONG]))


if __name__ == "__main__":
    main()
