"""Other releases of transformers, each installed into a folder of its own once a session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

# All that transformers 4.57 wants at other releases than transformers 5, or beside them.
TRANSFORMERS_4 = (
    "transformers==4.57.6",
    "tokenizers>=0.22,<0.23",
    "huggingface_hub>=0.34,<1.0",
    "requests",
    "urllib3",
    "idna",
    "certifi",
    "charset-normalizer",
)


def install(folder: Path, packages: tuple[str, ...] = TRANSFORMERS_4) -> str | None:
    """Install ``packages`` into ``folder`` unless they are there; return why pip cannot."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    complete = folder.with_name(folder.name + ".complete")
    with FileLock(folder.with_name(folder.name + ".lock")):
        if complete.exists():
            return None
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--target", str(folder), *packages]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        complete.touch()
    return None


def environment(folder: Path | None) -> dict[str, str]:
    """Return the environment of a process that imports what is in ``folder``, if any, first."""
    paths = [str(folder)] if folder is not None else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
