"""COUNT rounds of eight processes that plan with one cache, between them changes of all it depends on.

A round picks a checkpoint and changes its config, its weights (names, shapes or dtypes), the options,
the packages that are installed, or the files of the cache itself (bits flipped, cut off, swapped,
planted, given other rights, removed meanwhile). Then eight processes plan it at once. Every plan must
be that which is made without a cache, byte for byte; nothing may fail.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.campaigns.common import REPOSITORY, Figures, main
from scripts.makers import fsdp

# All of four ranks and of one model, or nearly: names, shapes or dtypes differ.
_RECIPES = ("fsdp2", "fsdp2-bf16", "fsdp2-mixed", "fsdp2-buffers", "fsdp2-tied", "fsdp2-moe")
_PROCESSES = 8
_CONFIGS = (
    "rope_theta=5e5",
    "tie_word_embeddings=false",
    "model_type=nothing_known",
    "num_hidden_layers=1",
    "architectures=[]",
)
# Both in one process, for each would be two to start.
_PLAN = """
import json, sys
from pathlib import Path
from streamconv.errors import StreamconvError
from streamconv.options import job_options
from streamconv.planning import child
child._ask = lambda request, **_: child._TASKS[request["task"]](request)
child._limited_memory = __import__("contextlib").nullcontext
source, options, plan, cache = sys.argv[1:]
try:
    job = job_options(**json.loads(options))
    made = child.make_plan(Path(source), job, Path(plan), cache=cache == "yes")
    print("hit" if "torch" not in sys.modules else "asked")
except StreamconvError as error:
    Path(plan).write_text(str(error))
    print("refused")
"""


def campaign(work: Path, count: int, seed: int) -> Figures:
    figures = Figures()
    choose = random.Random(seed)
    made = work.parent / "cache-sources"
    if not made.exists():
        fsdp.make_all(made, _RECIPES)
    cache, packages = work / "cache", work / "packages"
    packages.mkdir()
    for number in range(count):
        source = work / f"source-{number % 3}"
        if not source.exists() or choose.random() < 0.3:
            shutil.rmtree(source, ignore_errors=True)
            shutil.copytree(made / choose.choice(_RECIPES) / "actor", source)
        options = _change(made, source, cache, packages, choose, figures)
        expected = _plan([work / "expected"], source, options, work, packages, cache="no")
        plans = [work / f"plan-{k}" for k in range(_PROCESSES)]
        outcomes = _plan(plans, source, options, work, packages, cache="yes")
        if outcomes == [] or expected == []:
            figures.breach(f"round {number}: a process failed")
            continue
        for outcome in outcomes:
            figures.add(f"plans {outcome}")
        truth = (work / "expected").read_bytes()
        wrong = sum(plan.read_bytes() != truth for plan in plans)
        if wrong:
            figures.breach(f"round {number}: {wrong} plans differ from the one without a cache")
        left = [p.name for p in cache.iterdir() if ".part" in p.name] if cache.exists() else []
        if left:
            figures.breach(f"round {number}: {left[0]} is left in the cache")
    return figures


def _change(
    made: Path, source: Path, cache: Path, packages: Path, choose: random.Random, figures: Figures
) -> str:
    kind = choose.choice(("nothing", "config", "weights", "option", "package", "files"))
    figures.add(f"changes of {kind}")
    if kind == "config":
        return f'{{"config": ["{choose.choice(_CONFIGS)}"]}}'
    if kind == "option":
        return choose.choice(
            ('{"dtype": "bfloat16"}', '{"layout": "memory"}', '{"dtype": "float16"}')
        )
    if kind == "weights":
        for path in (made / choose.choice(_RECIPES) / "actor").glob("model_world_size_*.pt"):
            shutil.copy(path, source)
    elif kind == "package":
        for old in packages.iterdir():
            old.rmdir()
        (packages / f"anything-{choose.randrange(3)}.dist-info").mkdir()
    elif kind == "files" and cache.exists():
        for path in [*cache.glob("*.entry")]:
            _damage(path, choose)
    return "{}"


def _damage(path: Path, choose: random.Random) -> None:
    data = bytearray(path.read_bytes())
    how = choose.randrange(6)
    if how == 0:
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        path.write_bytes(data)
    elif how == 1:
        path.write_bytes(data[: choose.randrange(len(data))])
    elif how == 2:
        others = [p for p in path.parent.glob("*.entry") if p != path]
        if others:
            path.write_bytes(choose.choice(others).read_bytes())
    elif how == 3:
        path.write_bytes(b"{}")
    elif how == 4:
        path.chmod(0o666)
    else:
        path.unlink()


def _plan(
    plans: Sequence[Path], source: Path, options: str, work: Path, packages: Path, *, cache: str
) -> list[str]:
    """Plan in as many processes at once; return how each went, nothing where one failed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(packages))),
        "STREAMCONV_CACHE": str(work / "cache"),
        "XDG_STATE_HOME": str(work / "state"),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PLAN, str(source), options, str(plan), cache],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for plan in plans
    ]
    said = [process.communicate()[0].strip() for process in started]
    return said if all(process.returncode == 0 for process in started) else []


if __name__ == "__main__":
    main(campaign, count=100)
