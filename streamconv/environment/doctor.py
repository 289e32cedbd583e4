"""What this environment is and can do, as plain data, without loading anything heavy."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import stat
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from streamconv._version import __version__
from streamconv.errors import BudgetError, StreamconvError
from streamconv.files.names import in_words
from streamconv.storage import aws
from streamconv.storage.address import Address
from streamconv.storage.objects import CREDENTIALS, READ_ONLY
from streamconv.units import counted, format_size

_LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "isal", "xxhash", "ml_dtypes")
# What people load the result with; transformers is among the libraries above.
_LOADERS = ("vllm", "sglang", "peft", "accelerate", "ctranslate2", "mlx-lm", "tensorrt-llm")
_MEASURE_SECONDS = 0.5
# No model is smaller, with what lies beside its weights.
_FULL_BELOW_BYTES = 1 << 20
# The reader keeps up to 128 files open, and there are libraries and pipes beside it.
_FEW_OPEN_FILES = 256
_CONDITIONS = {
    True: "takes conditions",
    False: "TAKES NO NOTICE OF CONDITIONS: nothing can be written safely",
    None: "cannot be written",
}


def examine(
    src: Path | None = None, model: str | None = None, dst: Path | None = None
) -> dict[str, Any]:
    """Return the findings; ``problems`` lists what would keep a conversion from working.

    ``exit_code`` is 0, or what a conversion of ``src`` would end with. The disks of the working
    folder, ``src`` and ``dst`` are measured for a moment.
    """
    from streamconv.environment.speed import checksum_speed
    from streamconv.executor.budget import check_planning
    from streamconv.files.filesystems import why_not_writable
    from streamconv.system.memory import available_bytes

    memory, limit = available_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    problems: list[str] = []
    versions = {name: _version(name) for name in _LIBRARIES}
    problems += [
        f"{name} is not installed\n  next: pip install {name}"
        for name, version in versions.items()
        if not version
    ]
    if soft < _FEW_OPEN_FILES:
        problems.append(f"only {soft} files may be open at once\n  next: `ulimit -n 1024`")
    refused = why_not_writable(dst) if dst is not None else None
    if refused is not None:
        problems.append(f"the output cannot be written: {refused}\n  next: choose another folder")
    systems = _filesystems(src, dst)
    if any(
        "credentials" in s and s["role"] == "output" and not s.get("conditions") for s in systems
    ):
        problems.append(f"{dst} cannot be written safely\n  next: see the row `disk of output`")
    problems += _full_disks(systems)
    code = 1 if problems else 0
    try:
        check_planning(memory)
    except BudgetError as too_small:
        if src is None or not _is_planned_within(memory, src, model):
            problems.append(str(too_small))
            code = code or too_small.exit_code
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
        "checksum_bytes_per_second": checksum_speed(),
        "loaders": {n: v for n in _LOADERS if (v := _version(n))},
        "working_directory_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "filesystems": systems,
        "source": None,
        "problems": problems,
        "exit_code": code,
    }
    if src is not None:
        found["source"], error = _try(src, model)
        if error is not None:
            problems.append(str(error))
            found["exit_code"] = error.exit_code
    return found


def _full_disks(systems: list[dict[str, Any]]) -> list[str]:
    """Return what is wrong with the disk that an output would go to: of DST, or else of this folder."""
    written = [s for s in systems if s["role"] != "source" and "credentials" not in s][-1:]
    return [
        f"the disk at {s['mount']} is full: {format_size(s['free_bytes'])} free"
        "\n  next: free some space, or choose an output folder on another disk"
        for s in written
        if s["free_bytes"] < _FULL_BELOW_BYTES
    ]


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # in a folder that this user may not look into
        return False


def _filesystems(src: Path | None, dst: Path | None) -> list[dict[str, Any]]:
    """Return the file systems of the paths in question, each measured the way it is used."""
    from streamconv.environment.speed import read_speed, write_speed
    from streamconv.files.filesystems import filesystem_of

    places = [("working folder", Path.cwd()), ("source", src), ("output", dst)]
    measured = []
    for role, path in places:
        if path is None or (role == "source" and not _is_there(path)):
            continue
        system = filesystem_of(path)
        store: dict[str, Any] = {}
        if isinstance(path, Address):
            store = _of_store(path, role)
            read, write = store.pop("read"), store.pop("write")
        elif role == "source":
            read, write = read_speed(_large_files(path), _MEASURE_SECONDS), None
        else:
            read, write = None, write_speed(path, _MEASURE_SECONDS)
        measured.append(
            {
                "role": role,
                "path": str(path),
                "mount": str(system.mount),
                "type": system.kind,
                "network": system.is_network,
                "memory": system.is_memory,
                "free_bytes": system.free_bytes,
                "read_bytes_per_second": read,
                "write_bytes_per_second": write,
                **store,
            }
        )
    return measured


def _of_store(path: Address, role: str) -> dict[str, Any]:
    """Return what a store is like here, and where credentials come from; never what they are.

    ``conditions`` says whether it takes notice of them, which writing needs; None where it cannot be
    tried.
    """
    from streamconv.environment import store_speed
    from streamconv.executor.windows import Ahead
    from streamconv.storage.lease import takes_conditions

    found: dict[str, Any] = {"read": None, "write": None, "latency_seconds": None}
    if role == "source":
        files = [p for p in _large_files(path) if isinstance(p, Address)]
        speed = store_speed.read_speed(files, Ahead(4, 2 << 20), 2 * _MEASURE_SECONDS)
        if speed is not None:
            found |= {"read": speed.rate, "latency_seconds": speed.latency_seconds}
    elif path.scheme not in READ_ONLY:
        found["write"] = store_speed.write_speed(path, _MEASURE_SECONDS)
        found["conditions"] = None if found["write"] is None else takes_conditions(path)
    found["credentials"] = aws.source() if path.scheme == "s3" else CREDENTIALS[path.scheme]
    return found


def _large_files(path: Path, most: int = 64) -> list[Path]:
    """Return some of the largest files of a checkpoint: those whose reading takes the time."""
    if isinstance(path, Address):
        files: list[Path] = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        return sorted(files, key=lambda p: -p.stat().st_size)[:most]
    sizes = []
    names = (
        [path] if not path.is_dir() else [Path(at, n) for at, _, ns in os.walk(path) for n in ns]
    )
    for name in names:
        with contextlib.suppress(OSError):  # why it cannot be read, the reading itself says
            status = name.stat()
            if stat.S_ISREG(status.st_mode) and os.access(name, os.R_OK):
                sizes.append((status.st_size, name))
    return [name for _, name in sorted(sizes, reverse=True)[:most]]


def _filesystem_rows(systems: list[dict[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for s in systems:
        speeds = [
            f"{verb} {format_size(rate)}/s"
            for verb, rate in (
                ("reads", s["read_bytes_per_second"]),
                ("writes", s["write_bytes_per_second"]),
            )
            if rate is not None
        ]
        kind = s["type"] + (", network" if s["network"] else ", in memory" if s["memory"] else "")
        facts = [f"{kind} at {s['mount']}", f"{format_size(s['free_bytes'])} free", *speeds]
        if s.get("credentials"):
            facts = [kind, *speeds, f"credentials: {s['credentials']}"]
            if s["latency_seconds"] is not None:
                facts.insert(1, f"{1000 * s['latency_seconds']:.0f} ms a request")
            if s["role"] == "output":
                facts.insert(1, _CONDITIONS[s.get("conditions")])
        rows.append((f"disk of {s['role']}", ", ".join(facts)))
    return rows


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


def _is_planned_within(budget_bytes: int, src: Path, model: str | None) -> bool:
    """Whether so much memory is enough to plan ``src``, as it is where its model is known."""
    from streamconv.options import JobOptions
    from streamconv.planning.child import make_plan

    with tempfile.TemporaryDirectory(prefix="streamconv-") as scratch:
        try:
            make_plan(
                src, JobOptions(model=model), Path(scratch) / "plan", max_mem_bytes=budget_bytes
            ).close()
        except (StreamconvError, OSError):
            return False
    return True


def _try(src: Path, model: str | None) -> tuple[dict[str, Any], StreamconvError | None]:
    from streamconv.files.inputs import reading
    from streamconv.planning.child import inspect_checkpoint

    try:
        with reading(src):
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


def _loaders(found: dict[str, Any]) -> str:
    here = {"transformers": found["versions"]["transformers"], **found["loaders"]}
    named = [f"{name} {version}" for name, version in here.items() if version]
    return ", ".join(named) or "nothing that is installed here"


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
        ("checksums", f"{format_size(found['checksum_bytes_per_second'])}/s (CRC-32 and xxh3)"),
        *_filesystem_rows(found["filesystems"]),
        ("loads the result", _loaders(found)),
    ]
    source = found["source"]
    if source is not None and source["readable"]:
        files, tensors = counted(source["files"], "file"), counted(source["tensors"], "tensor")
        facts = f"{source['format']}, {files}, {tensors}"
        table.append(("source", f"{source['root']}: readable, {facts}"))
        table += [
            (name.replace("_", " "), in_words(value)) for name, value in source["facts"].items()
        ]
        table += [("notice", text) for text in source["notices"]]
    elif source is not None:
        table.append(("source", f"{source['path']}: not readable here"))
    return table


def verdict(found: dict[str, Any]) -> str:
    """Return whether a conversion works here, and if not, why and what to do about it."""
    problems = found["problems"]
    if not problems:
        source = found["source"]
        return "verdict: ready" + ("" if source is None else f" to convert {source['root']}")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"verdict: not ready, {count}", *(f"error: {text}" for text in problems)])
