"""The budget holds: models of eight times the budget, and metadata that says more than it weighs.

Measured from outside.

COUNT is how many of the budgets 512 MB, 1 GB, 2 GB and 4 GB are tried with ``convert``; at the first,
``run PLAN`` is tried in 64 and 256 MB too. A case for which the disk has no room is counted as such.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from scripts.campaigns.common import Figures, main, scratch
from scripts.makers.large import Cut, LargeMade, make_large
from scripts.measured import Ran, run
from scripts.outputs import large_differences

_BUDGETS_MB = (512, 1000, 2000, 4000)
_RUN_BUDGETS_MB = (64, 256)
_TIMES = 8.2
_LAYOUTS: dict[str, Cut] = {
    "FSDP2, padded": "rows",
    "FSDP2 on columns": "columns",
    "HSDP": "hybrid",
    "FSDP and TP": "grid",
    "torch DCP": "rows",
}


_METADATA_BUDGETS_MB = (500, 700)
# Done, or refused: the budget, the input, the danger.
_FAIR = (0, 4, 5, 6)


def campaign(work: Path, count: int, _: int) -> Figures:
    figures = Figures()
    _metadata(figures, work)
    for budget in _BUDGETS_MB[:count]:
        for name, cut in _LAYOUTS.items():
            nbytes = int(budget * 1e6 * _TIMES)
            sources = 2 * nbytes if cut == "hybrid" else nbytes
            if shutil.disk_usage(work).free < sources + 1.1 * nbytes:
                figures.add(f"no disk for {budget} MB, {name}")
                continue
            with scratch(work) as folder:
                made = make_large(folder, nbytes, 8, cut=cut)
                if name == "torch DCP":
                    made = _as_dcp(made)
                _convert(figures, made, folder, budget, name, deep=budget == _BUDGETS_MB[0])
                if budget == _BUDGETS_MB[0]:
                    _run(figures, made, folder, name)
    return figures


def _metadata(figures: Figures, work: Path) -> None:
    """Metadata that is small on disk and large in memory: whatever comes of it, within the budget."""
    for name, make in _METADATA.items():
        with scratch(work) as folder:
            actor = folder / "actor"
            (actor / "huggingface").mkdir(parents=True)
            state: dict[str, object] = {"a.weight": torch.ones(4, 4)}
            config = make(state)
            torch.save(state, actor / "model_world_size_1_rank_0.pt")
            if config:
                (actor / "huggingface" / "config.json").write_text(config)
            for budget in _METADATA_BUDGETS_MB:
                done = run("convert", actor, folder / "out", "--max-mem", f"{budget}MB")
                what = f"{name} in {budget} MB"
                _judge(figures, what, done, budget)
                if done.code not in _FAIR:
                    figures.breach(f"{what}: exit code {done.code}: {done.err[-200:]}")
                shutil.rmtree(folder / "out", ignore_errors=True)


def _many(state: dict[str, object], more: object) -> str:
    state["more"] = more
    return ""


def _objects(count: int) -> str:
    return '{"model_type": "qwen2", "x": [' + ",".join(['{"a":1}'] * count) + "]}"


def _tensors(state: dict[str, object]) -> str:
    state |= {f"a.{k}.weight": torch.ones(1) for k in range(30_000)}
    return ""


_METADATA: dict[str, Callable[[dict[str, object]], str]] = {
    "a pickle of lists": lambda s: _many(s, [[k] for k in range(2_000_000)]),
    "a pickle of dicts": lambda s: _many(s, [{} for _ in range(3_000_000)]),
    "a pickle of strings": lambda s: _many(s, [f"{k:08}" for k in range(1_500_000)]),
    "many tiny tensors": _tensors,
    "a config of 15 MB": lambda _: _objects(1_900_000),
    "a config of 4 MB": lambda _: _objects(490_000),
    "a config that nests": lambda _: (
        '{"model_type": "qwen2", "x": ' + "[" * 10**6 + "]" * 10**6 + "}"
    ),
}


def _as_dcp(made: LargeMade) -> LargeMade:
    """Put torch's own distributed checkpoint of the same weights in the place of the rank files."""
    state = {name: made.expected(name) for name in made.shapes}
    for rank_file in made.source.glob("*.pt"):
        rank_file.unlink()
    (made.source / "fsdp_config.json").unlink()
    dcp.save(state, checkpoint_id=made.source, no_dist=True)
    return made


def _convert(
    figures: Figures, made: LargeMade, folder: Path, budget: int, name: str, *, deep: bool
) -> None:
    done = run("convert", made.source, folder / "out", "--max-mem", f"{budget}MB")
    _judge(figures, f"convert in {budget} MB, {name}", done, budget)
    if deep and done.code == 0 and (wrong := large_differences(folder / "out", made)):
        figures.breach(f"{name}: {wrong[:3]} differ")
    shutil.rmtree(folder / "out", ignore_errors=True)


def _run(figures: Figures, made: LargeMade, folder: Path, name: str) -> None:
    run("plan", made.source, "-o", folder / "plan.jsonl")
    for budget in _RUN_BUDGETS_MB:
        done = run("run", folder / "plan.jsonl", folder / "out", "--max-mem", f"{budget}MB")
        _judge(figures, f"run in {budget} MB, {name}", done, budget)
        shutil.rmtree(folder / "out", ignore_errors=True)


def _judge(figures: Figures, what: str, done: Ran, budget: int) -> None:
    figures.add("cases")
    if done.code:
        figures.breach(f"{what}: exit code {done.code}: {done.err[-200:]}")
        return
    peak_bytes = done.peak_bytes
    figures.add(f"MB of {budget}: {what}", -(-peak_bytes // 10**6))
    if peak_bytes > budget * 10**6:
        figures.breach(f"{what}: {peak_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main(campaign, count=2)
