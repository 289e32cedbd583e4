"""Planning in a child process: the parent stays small, and what reads strangers' files is fenced in.

Reading untrusted pickles, and torch and transformers with their 300 MB, live and die in the child.
It reads the metadata under a limit on its address space, asks transformers for the model's shape,
writes the plan to a file, and answers with one line of JSON.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamconv._version import __version__
from streamconv.errors import SourceChangedError
from streamconv.executor.budget import check_planning, check_reading, smallest_convert_bytes
from streamconv.files import memory_limit
from streamconv.files.memory_limit import PARSE_BYTES, MemoryNeededError
from streamconv.files.newfile import replacing
from streamconv.ir.identity import JobIdentity
from streamconv.ir.planfile import Plan
from streamconv.ir.source import Checkpoint
from streamconv.options import JobOptions
from streamconv.storage.address import Address, place
from streamconv.system.children import ask, make_room_for_torch, serve, too_large
from streamconv.system.children import limited_memory as _limited_memory
from streamconv.system.memory import available_bytes

# The index of a folder of a million pieces is large, and some 15 times as large in memory; what it
# may take follows from its size on disk.
_PARSE_BYTES_A_BYTE = 24
# Seconds of one core for the metadata, and more for every file: 1024 files of 2000 tensors take one
# minute. A tuple of tuples of … as a dict key, sixty bytes long, would be hashed for years.
_PARSE_SECONDS = 20.0
_PARSE_SECONDS_A_FILE = 0.5
_MOST_PARSE_SECONDS = 600.0


def make_plan(
    src: Path,
    job: JobOptions,
    plan_path: Path,
    *,
    asked: JobIdentity | None = None,
    max_mem_bytes: int | None = None,
    lock: int | None = None,
    cache: bool = True,
) -> Plan:
    """Plan the conversion of ``src`` and write the plan to ``plan_path``.

    ``asked`` is the job that it must be the plan of, whatever becomes of ``src`` meanwhile. ``cache``:
    what was asked about the model before need not be asked again (:mod:`streamconv.planning.answers`).

    The child writes into a file that is made here, and inherits the descriptor ``lock``: whenever this
    process is killed, the child neither outlives the lock nor writes into what a later run has made.
    Raises what planning raises, and :class:`BudgetError` where it would not fit ``max_mem_bytes``.
    """
    if max_mem_bytes is not None:
        check_reading(max_mem_bytes, from_store=isinstance(src, Address))
    with replacing(plan_path) as fd:
        answer = _ask(
            {
                "task": "plan",
                "src": str(src),
                "job": job.to_json(),
                "plan_path": str(plan_path.absolute()),
                "plan_fd": fd,
                "asked": asked and asked.to_json(),
                "cache": cache,
                "floor_bytes": smallest_convert_bytes(),
            },
            inherit=(fd,) if lock is None else (fd, lock),
            budget_bytes=max_mem_bytes,
        )
    plan = Plan(plan_path)
    plan.remembered = answer["remembered"]
    if asked is not None and JobIdentity.from_json(plan.head.job) != asked:
        raise SourceChangedError("the plan is that of another job", where=str(src))
    return plan


def inspect_checkpoint(src: Path, model: str | None = None) -> dict[str, Any]:
    """Return what is in a checkpoint as plain data: what ``streamconv inspect --json`` prints."""
    return _ask({"task": "inspect", "src": str(src), "model": model})


def _ask(
    request: dict[str, Any], inherit: Sequence[int] = (), budget_bytes: int | None = None
) -> dict[str, Any]:
    return ask(
        "streamconv.planning.child",
        request,
        doing="reading the checkpoint's metadata",
        inherit=inherit,
        budget_bytes=available_bytes()[0] if budget_bytes is None else budget_bytes,
        torch=False,
    )


@contextlib.contextmanager
def _limited_time(src: Path) -> Any:
    """End this process by SIGXCPU when it works for too long on the metadata of ``src``."""
    seconds = _MOST_PARSE_SECONDS
    if not isinstance(src, Address):
        files = sum(len(names) for _, _, names in os.walk(src))
        seconds = min(_PARSE_SECONDS + _PARSE_SECONDS_A_FILE * files, seconds)
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limits = [n for n in (soft, hard) if n != resource.RLIM_INFINITY]
    limit = min([math.ceil(time.process_time() + seconds), *limits])
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def read_checkpoint(src: Path, model: str | None) -> Checkpoint:
    """Read a checkpoint's metadata within what memory and time may be worth; for children only."""
    from streamconv import formats

    most = PARSE_BYTES
    try:
        with _limited_time(src):
            with _limited_memory(most):
                location = formats.find_model(src, model)
            most = max(PARSE_BYTES, _PARSE_BYTES_A_BYTE * location.index_nbytes)
            with _limited_memory(most):
                return _pinned(location.read())
    except MemoryNeededError:
        raise
    except MemoryError:
        mine = memory_limit.limit()
        if mine is not None and mine < most:
            raise  # a larger budget would do
        raise too_large(src) from None


def _pinned(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint in a store with the versions that were read: whoever goes on reads these."""
    root = checkpoint.root
    if not isinstance(root, Address):
        return checkpoint
    files = tuple(replace(f, version=(root / f.path).version) for f in checkpoint.files)
    return replace(checkpoint, files=files)


def _plan(request: dict[str, Any]) -> dict[str, Any]:
    from streamconv.files.cache import Cache, cache_folder
    from streamconv.planning.answers import Answers
    from streamconv.planning.build import build_plan

    job = JobOptions.from_json(request["job"])
    checkpoint = read_checkpoint(place(request["src"]), job.model)
    others = [read_checkpoint(p, job.model) for p in job.average.sources] if job.average else []
    asked = request["asked"]

    def before_loading() -> None:
        if "budget_bytes" in request:
            check_planning(request["budget_bytes"], request["floor_bytes"])
            make_room_for_torch(request)
        from streamconv.tracing import light

        light.load()

    folder = cache_folder() if request["cache"] else None
    answers = Answers(Cache(folder) if folder is not None else None, before_loading)
    with os.fdopen(request["plan_fd"], "w", encoding="utf-8", closefd=False) as stream:
        identity = asked and JobIdentity.from_json(asked)
        build_plan(checkpoint, job, stream, identity, answers, others)
        stream.flush()
        os.fsync(stream.fileno())
    return {"remembered": answers.remembered}


def _inspect(request: dict[str, Any]) -> dict[str, Any]:
    c = read_checkpoint(place(request["src"]), request["model"])
    tensors = [*c.tensors.values(), *(u.pieces for u in c.undecided.values())]
    return {
        "streamconv": __version__,
        "format": c.format,
        "root": str(c.root),
        "side_dir": str(c.side_dir) if c.side_dir else None,
        "files": [
            {"path": f.path, "nbytes": f.nbytes, "directory_hash": f.directory_hash}
            for f in c.files
        ],
        "facts": dict(c.facts),
        "tensors": [
            {
                "name": t.fqn,
                "dtype": t.dtype.torch,
                "shape": list(t.shape),
                "placement": t.placement
                + (" (or replicas: undecided)" if t.fqn in c.undecided else ""),
                "shards": len(t.shards),
            }
            for t in tensors
        ],
        "skipped": [{"name": s.name, "reason": s.reason} for s in c.skipped],
        "notices": [*c.notices, *([c.unproved] if c.unproved and c.side_dir is None else [])],
    }


_TASKS = {"plan": _plan, "inspect": _inspect}

if __name__ == "__main__":
    # Short-lived, and next to nothing it makes is garbage: looking for some costs a sixth of its time.
    gc.disable()
    code = serve(_TASKS)
    # The answer is out and the plan is on the disk: taking torch down module by module helps nobody.
    os._exit(code)
