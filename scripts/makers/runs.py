"""Training runs for the tests of batch: tiny whole checkpoints, and a worker that only pretends.

A checkpoint is a world of one rank with one plain tensor: what torch.save writes, in 1 kB.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from pathlib import Path

RANK_FILE = "model_world_size_1_rank_0.pt"
_LONG_AGO = 1_700_000_000
# Beside the script: the folder that converting the rank file makes.
MADE = "made"
TRACKER = "latest_checkpointed_iteration.txt"


def rank_file(path: Path, value: float = 1.0) -> Path:
    """Write one real rank file."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"layer.weight": torch.full((4, 4), value)}, path)
    return path


def add_step(run: Path, step: int, file: Path, *, model: str = "actor", old: bool = True) -> Path:
    """Add a step that is a hard link of ``file``; ``old``: it has lain there for an hour."""
    folder = run / f"global_step_{step}" / model
    folder.mkdir(parents=True)
    os.link(file, folder / RANK_FILE)
    if old:
        age(folder)
    return folder


def age(folder: Path) -> None:
    """Make a folder and all in it look untouched for long; the same moment for every link to a file."""
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (_LONG_AGO, _LONG_AGO))


def fake_worker(script: Path) -> list[str]:
    """Return the command of a worker that does as the JSON file ``script`` says.

    It maps a step to what happens at each try, the last for ever after: ``ok``, ``sleep`` (for a
    minute), ``crash`` or a kind of error (``EIO``, ``bad-input``, ``no-space``, ``budget``).
    """
    return [sys.executable, "-I", "-S", __file__, str(script)]


def _main() -> int:
    request = json.load(sys.stdin)
    source, output, script = Path(request["source"]), Path(request["output"]), Path(sys.argv[1])
    with (script.parent / "starts.jsonl").open("a") as log:
        share = request["run"]["max_mem_bytes"]
        log.write(json.dumps({"output": output.name, "source": str(source), "share": share}) + "\n")
    step = "".join(c for c in output.name if c.isdecimal())
    plan = json.loads(script.read_text()) if script.exists() else {}
    outcomes = plan.get(step, plan.get("*", ["ok"]))
    tries = sum(json.loads(line)["output"] == output.name for line in _lines(script))
    outcome = outcomes[min(tries, len(outcomes)) - 1]
    if outcome == "sleep":
        time.sleep(60)
    if outcome == "short-sleep":
        time.sleep(0.5)
    if outcome == "noise":  # of a library
        sys.stdout.write('5\nnull\n["finished"]\n"error"\n' + "[" * 200_000 + "\n")
        outcome = "ok"
    if outcome == "crash":
        os.abort()
    if outcome in ("ok", "sleep", "short-sleep"):
        made = script.parent / MADE
        _finish(source, output, made if made.is_dir() else None, verified=request["verify"])
        return 0
    if outcome == "killed":  # what read a file for it
        _say(event="error", kind="bad-input", exit_code=5, what="a crash", found="SIGKILL")
        return 5
    number = getattr(errno, outcome, None)
    kind = "failed" if number else outcome
    code = {"bad-input": 5, "no-space": 7, "budget": 4}.get(outcome, 1)
    _say(event="error", kind=kind, exit_code=code, what=f"told to: {outcome}", errno=number)
    return code


def _lines(script: Path) -> list[str]:
    return (script.parent / "starts.jsonl").read_text().splitlines()


def _finish(source: Path, output: Path, made: Path | None, *, verified: bool) -> None:
    if not (source / RANK_FILE).exists():
        _say(event="error", kind="source-changed", exit_code=5, what="the source is gone")
        return
    _say(event="progress", done_bytes=1, total_bytes=2, memory_bytes=3)
    partial = output.with_name(f".{output.name}.part")
    if made is not None:
        shutil.copytree(made, partial)
        names = [p.name for p in made.iterdir() if p.name != "streamconv.json"]
    else:
        partial.mkdir(parents=True)
        shutil.copy(source / RANK_FILE, partial / "model.safetensors")
        names = ["model.safetensors"]
        files = {n: (partial / n).stat().st_size for n in names}
        (partial / "streamconv.json").write_text(json.dumps(manifest(files)))
    if output.exists():  # which is only compared
        shutil.rmtree(partial)
    else:
        partial.rename(output)
    stats = [(n, (output / n).stat()) for n in [*names, "streamconv.json"]]
    _say(
        event="finished",
        status="done",
        evidence=[[n, s.st_size, s.st_mtime_ns] for n, s in stats],
        verified=verified or None,
        tensors=1,
        notices=[],
        seconds=0.5,
        read_bytes=1000,
        write_bytes=1000,
        peak_bytes=10**8,
    )


def manifest(files: dict[str, int], **more: object) -> dict[str, object]:
    """Return a manifest that lists these files and their sizes, as whole as a conversion's."""
    job = {
        "format": "fsdp",
        "options": {
            "layout": "hub",
            "dtype": "keep",
            "keep_dtype": [],
            "max_shard_bytes": 5 * 10**9,
            "strict": False,
        },
        "source": [["model_world_size_1_rank_0.pt", 3, "0" * 32]],
        "side": [],
        "digest": "ab" * 16,
    }
    return {
        "streamconv": "0.1.0",
        "job": job,
        "plan_digest": "cd" * 16,
        "unverifiable_bytes": 0,
        "notices": [],
        "skipped": [],
        "files": [{"name": n, "nbytes": k, "xxh3_128": "0" * 32} for n, k in files.items()],
        "tensors": {},
        **more,
    }


def _say(**event: object) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(_main())
