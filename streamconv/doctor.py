"""What this environment is and can do, as plain data, without loading anything heavy."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from streamconv._version import __version__
from streamconv.errors import StreamconvError
from streamconv.sizes import format_size

_LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "isal", "xxhash", "ml_dtypes")


def examine(src: Path | None = None, model: str | None = None) -> dict[str, Any]:
    """Return the findings; ``problems`` lists what would keep a conversion from working.

    ``exit_code`` is 0, or what a conversion of ``src`` would end with.
    """
    from streamconv.budget import available_bytes

    memory, limit = available_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    problems: list[str] = []
    versions = {name: _version(name) for name in _LIBRARIES}
    problems += [f"{name} is not installed" for name, version in versions.items() if not version]
    found: dict[str, Any] = {
        "streamconv": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "versions": versions,
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": _cpu(),
        "default_budget_bytes": memory,
        "default_budget_from": limit,
        "open_files_soft": soft,
        "open_files_hard": hard,
        "working_directory_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "source": None,
        "problems": problems,
        "exit_code": 1 if problems else 0,
    }
    if src is not None:
        found["source"], error = _try(src, model)
        if error is not None:
            problems.append(str(error))
            found["exit_code"] = error.exit_code
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _try(src: Path, model: str | None) -> tuple[dict[str, Any], StreamconvError | None]:
    from streamconv.planning import inspect_checkpoint

    try:
        inspection = inspect_checkpoint(src, model)
    except StreamconvError as error:
        return {"path": str(src), "readable": False, "error": error.to_json()}, error
    return {
        "path": str(src),
        "readable": True,
        "format": inspection["format"],
        "root": inspection["root"],
        "facts": inspection["facts"],
        "files": len(inspection["files"]),
        "tensors": len(inspection["tensors"]),
        "notices": inspection["notices"],
    }, None


def _fact(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(v) for v in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the findings as the rows of a table."""
    memory = (
        f"{format_size(found['default_budget_bytes'])} is the default budget, "
        f"from {found['default_budget_from']}"
    )
    table = [
        ("streamconv", found["streamconv"]),
        ("python", f"{found['python']} ({found['executable']})"),
        *((name, version or "not installed") for name, version in found["versions"].items()),
        ("platform", found["platform"]),
        ("cpu", f"{found['cpus']} × {found['cpu']}"),
        ("memory", memory),
        ("open files", f"{found['open_files_soft']} (at most {found['open_files_hard']})"),
        ("disk here", f"{format_size(found['working_directory_free_bytes'])} free"),
    ]
    source = found["source"]
    if source is not None and source["readable"]:
        facts = f"{source['format']}, {source['files']} files, {source['tensors']} tensors"
        table.append(("source", f"{source['root']}: readable, {facts}"))
        table += [(name.replace("_", " "), _fact(value)) for name, value in source["facts"].items()]
        table += [("notice", text) for text in source["notices"]]
    elif source is not None:
        table.append(("source", f"{source['path']}: not readable here"))
    table += [("problem", text) for text in found["problems"]]
    return table
