"""Real Megatron checkpoints of many versions, layouts and parallel sizes, each beside its answer.

    python -m bench.megatron_matrix TOOL CORES [--versions V …] [--only CASE …] [--every N]
                                      [--jobs N] [--record]

TOOL is the folder of ``make_megatron.py``, which starts real ranks of megatron-core on gloo, saves what
they hold in every layout and writes the HuggingFace model that they were filled from. CORES keeps one
folder a version; what is not there is installed by pip, without its dependencies. Each checkpoint is
converted and compared bit for bit. ``--every 3`` takes every third pair of case and version, so that
each case still meets several versions and each version many cases. One line a checkpoint; the last line
counts them, and the exit code is 1 if one differs or could not be made. ``--record`` writes the table
into bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from bench.measure import conditions, record, table
from scripts.check_answers import problem_of

VERSIONS = ("0.11.0", "0.12.2", "0.13.1", "0.14.0", "0.15.3", "0.16.1")
_BESIDE = ("einops", "six")

# What the maker calls them; verl's distributed checkpoints were in model/ for a while.
LAYOUTS = {
    "verl dist_ckpt": "global_step_1",
    "verl model/dist_ckpt": "moved/global_step_1",
    "iter_N torch_dist": "mlm_dist",
    "verl mp_rank_*": "verl_ranks/global_step_1",
    "iter_N mp_rank_*": "mlm_ranks",
}


@dataclass(frozen=True, slots=True)
class Case:
    """A model as the maker's options say it, and the versions that can make it: from, up to."""

    name: str
    options: str
    since: str = "0.11.0"
    until: str = VERSIONS[-1]

    def of(self, version: str) -> bool:
        """Whether megatron-core ``version`` can make it."""
        return _number(self.since) <= _number(version) <= _number(self.until)


CASES = (
    Case("llama, padded vocabulary", "--case llama --tp 2 --pp 2 --vpp 2 --pad-vocab"),
    Case("llama, uneven stages", "--case llama --pp 2 --set num_hidden_layers=5"),
    Case("llama, own modules, per layer", "--case llama --tp 2 --spec local --metadata per_layer"),
    Case("qwen2, tied", "--case qwen2 --tp 2 --pp 2"),
    Case("qwen3, one group a rank", "--case qwen3 --tp 4"),
    Case("qwen3, optimizer state", "--case qwen3 --tp 2 --dp 2 --optim default", until="0.15.3"),
    Case("qwen3_moe, etp 2", "--case qwen3_moe --tp 2 --ep 2 --etp 2"),
    Case("qwen2_moe", "--case qwen2_moe --tp 2 --ep 2", "0.16.0"),
    Case("qwen3_moe, sequential experts", "--case qwen3_moe --pp 2 --ep 2 --sequential-experts"),
    Case("mixtral, own modules", "--case mixtral --ep 2 --spec local"),
    Case(
        "mixtral, optimizer state",
        "--case mixtral --tp 2 --pp 2 --ep 2 --optim fully_reshardable",
        "0.16.0",
    ),
    Case("deepseek_v3", "--case deepseek_v3 --tp 2 --pp 2 --ep 2"),
    Case(
        "deepseek_v3, MTP",
        "--case deepseek_v3 --pp 2 --ep 2 --set num_nextn_predict_layers=1",
        "0.12.0",
    ),
    Case("qwen3_next", "--case qwen3_next --tp 2 --ep 2", "0.16.0"),
    Case(
        "mixtral, older optimizer state",
        "--case mixtral --tp 2 --pp 2 --ep 2 --optim default",
        until="0.15.3",
    ),
    Case("qwen3_moe, singleton", "--case qwen3_moe --tp 2 --ep 2 --metadata singleton", "0.14.0"),
    Case("deepseek_v3, whole queries", "--case deepseek_v3 --tp 2 --ep 2 --set q_lora_rank=null"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A case of one version: what became of each layout, nothing where it is equal."""

    version: str
    case: Case
    problems: dict[str, str]


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def install(cores: Path, version: str) -> None:
    """Put megatron-core into its folder below ``cores``, unless it is there."""
    if not (cores / version / "megatron").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        wanted = [f"megatron-core=={version}", *_BESIDE]
        subprocess.run([*command, str(cores / version), *wanted], check=True)


def make(tool: Path, core: Path, case: Case, out: Path) -> str:
    """Make the case; return what went wrong, or nothing."""
    path = os.pathsep.join(map(str, (core, tool / "fake_te")))
    command = [sys.executable, "-W", "ignore", str(tool / "make_megatron.py"), "--out", str(out)]
    made = subprocess.run(
        [*command, *shlex.split(case.options)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        return f"not made: {(made.stderr.strip() or 'no message').splitlines()[-1]}"
    moved = out / "moved/global_step_1/actor"
    shutil.copytree(out / "global_step_1/actor", moved)
    (moved / "model").mkdir()
    (moved / "dist_ckpt").rename(moved / "model/dist_ckpt")
    return ""


def run(tool: Path, core: Path, case: Case) -> Row:
    """Make one case and convert it in all layouts."""
    out = Path(tempfile.mkdtemp(prefix="megatron-"))
    try:
        failed = make(tool, core, case, out)
        answer = out / "hf_answer"
        problems = {
            layout: failed
            # verl keeps the config beside the weights, Megatron-LM does not.
            or problem_of(out / where, answer, None if layout.startswith("verl") else answer)
            for layout, where in LAYOUTS.items()
        }
    finally:
        shutil.rmtree(out)
    return Row(core.name, case, problems)


def chosen(versions: Sequence[str], only: Sequence[str], every: int) -> list[tuple[Case, str]]:
    """Return the pairs of case and version to make."""
    return [
        (case, version)
        for k, case in enumerate(CASES)
        for n, version in enumerate(versions)
        if case.of(version)
        and (k + n) % every == 0
        and (not only or any(o in case.name for o in only))
    ]


def run_all(tool: Path, cores: Path, pairs: Sequence[tuple[Case, str]], jobs: int) -> Iterator[Row]:
    """Yield the rows as they become ready."""
    with ProcessPoolExecutor(jobs) as pool:
        waiting = [pool.submit(run, tool, cores / v, case) for case, v in pairs]
        for done in as_completed(waiting):
            yield done.result()


def text_of(rows: Sequence[Row], versions: Sequence[str], last: str) -> str:
    """Return the table: for each case and version how many layouts are equal."""
    cells = {(r.case.name, r.version): list(r.problems.values()) for r in rows}

    def cell(case: Case, version: str) -> str:
        found = cells.get((case.name, version))
        if found is None:
            return "–"
        equal = found.count("")
        return f"{equal} equal" if equal == len(found) else f"{equal} of {len(found)} equal"

    lines = [
        (c.name, f"`{c.options}`", *(cell(c, v) for v in versions))
        for c in CASES
        if any(c.name == name for name, _ in cells)
    ]
    each = ", ".join(LAYOUTS)
    return (
        f"{conditions()}. Every case in {len(LAYOUTS)} layouts: {each}; – where it was not made, or "
        "that version of megatron-core cannot.\n\n"
        f"{table(('case', 'made with', *versions), lines)}\n> {last}"
    )


def main() -> int:
    """Make, convert, compare; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tool", type=Path)
    parser.add_argument("cores", type=Path)
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument(
        "--only", nargs="+", default=(), help="cases whose name contains one of these"
    )
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    for version in options.versions:
        install(options.cores, version)
    rows = []
    pairs = chosen(options.versions, options.only, options.every)
    for row in run_all(options.tool.absolute(), options.cores.absolute(), pairs, options.jobs):
        rows.append(row)
        for layout, problem in row.problems.items():
            word = "differs" if problem else "equal  "
            print(f"{word} {row.version} {row.case.name} | {layout} {problem}", flush=True)
    found = [p for row in rows for p in row.problems.values()]
    equal, unmade = found.count(""), sum(p.startswith("not made") for p in found)
    last = (
        f"megatron_matrix: {len(found)} checkpoints: {len(rows)} models in {len(LAYOUTS)} layouts, "
        f"{len(options.versions)} versions; {equal} equal, {len(found) - equal - unmade} not, "
        f"{unmade} not made ({time.monotonic() - start:.0f} s)"
    )
    if options.record:
        record("megatron", text_of(rows, options.versions, last))
    print(last)
    return int(equal < len(found))


if __name__ == "__main__":
    sys.exit(main())
