"""A run, an output folder and a batch between them, for the tests of batch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.makers import runs
from streamconv.batch.cycle import Batch
from streamconv.batch.round import Round
from streamconv.batch.settings import settings
from streamconv.batch.state import read_records

REPOSITORY = Path(__file__).resolve().parents[1]


class Scene:
    """A run, an output folder and what the pretended conversions do."""

    def __init__(self, folder: Path, file: Path, made: Path | None = None) -> None:
        self.run, self.out, self.script = folder / "run", folder / "out", folder / "script.json"
        self.file = file
        self.told: list[tuple[str, str]] = []
        self.run.mkdir(parents=True)
        if made is not None:
            (folder / runs.MADE).symlink_to(made)

    def step(self, *steps: int, **kwargs) -> None:
        for step in steps:
            runs.add_step(self.run, step, self.file, **kwargs)

    def tracker(self, step: int) -> None:
        (self.run / runs.TRACKER).write_text(str(step))

    def says(self, **outcomes: list[str]) -> None:
        self.script.write_text(json.dumps({k.removeprefix("s"): v for k, v in outcomes.items()}))

    def batch(
        self, *, fake: bool = True, shared: dict[str, Any] | None = None, **run: Any
    ) -> Batch:
        data = {"run": [{"root": self.run, "output": self.out, "model": "actor", **run}]}
        return Batch(
            settings({"max-mem": "4GB", **data, **(shared or {})}),
            lambda what, task, text: self.told.append((what, task.record.name)),
            command=runs.fake_worker(self.script) if fake else None,
            backoff=lambda tries: 0.01,
        )

    def round(self, **kwargs) -> Round:
        made = self.batch(**kwargs).round()
        assert not made.problems, made.problems
        return made

    def starts(self) -> list[str]:
        log = self.script.parent / "starts.jsonl"
        return (
            [json.loads(line)["output"] for line in log.read_text().splitlines()]
            if log.exists()
            else []
        )

    def states(self) -> dict[int | None, str]:
        return {r.step: r.state for r in read_records(self.out)}


def command(scene: Scene, *extra: str) -> list[str]:
    """A batch in a process of its own, with pretended conversions."""
    code = (
        "import json, sys; from scripts.makers import runs; from pathlib import Path\n"
        "from streamconv.batch import worker\n"
        f"worker.command = lambda: runs.fake_worker(Path({str(scene.script)!r}))\n"
        "from streamconv.__main__ import main; main()"
    )
    args = ["batch", str(scene.run), str(scene.out), "--model", "actor", "--max-mem", "4GB"]
    return [sys.executable, "-c", code, *args, *extra]


def start(scene: Scene, *extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(scene, *extra),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def cli(*args: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streamconv", *args],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
