"""What an engine runs on its machines: the parts of a conversion, as functions of plain data.

Nothing here loads an engine. Where a budget is smaller than an engine's worker process, the part runs
in a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from streamconv._version import __version__
from streamconv.errors import BadInputError, StreamconvError, UsageError
from streamconv.files.userkey import Sealer, user_key
from streamconv.ir.identity import SCHEMA
from streamconv.options import Event, JobOptions, Progress, RunOptions
from streamconv.storage.scattered import SERVERS
from streamconv.system.signals import how_it_ended

# An idle worker of Ray has 80 to 90 MB, and 105 while it converts.
CHILD_BELOW_BYTES = 150 * 10**6
DEFAULT_BUDGET_BYTES = 10**9
_TAIL_CHARACTERS = 2000
_CLUSTER = "ray://"
_CLIENT_PORT = 10001

# Called with an output file and how many of its bytes are done.
Told = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Request:
    """A conversion that an engine runs: what, how, and by which key what is staged is sealed.

    ``run`` is each worker's; it must be such as can be sent, with nobody who listens. ``key`` is for
    machines that do not have the user's own, in hexadecimal, ``servers`` says who serves a checkpoint
    that is scattered over them: both are secrets.
    """

    src: Path
    dst: Path
    job: JobOptions
    run: RunOptions
    key: str | None = field(default=None, repr=False)
    servers: str | None = field(default=None, repr=False)

    @property
    def budget_bytes(self) -> int:
        """Return the budget of each worker."""
        return self.run.max_mem_bytes or DEFAULT_BUDGET_BYTES

    def with_key(self, key: bytes) -> Request:
        """Return the same request with a key for its seals."""
        return replace(self, key=key.hex())


def cluster_address(nodes: str) -> str:
    """Return what Ray calls a cluster.

    >>> cluster_address("ray"), cluster_address("ray://head"), cluster_address("ray://head:10002")
    ('auto', 'ray://head:10001', 'ray://head:10002')
    """
    if nodes == "ray":
        return "auto"
    if not nodes.startswith(_CLUSTER) or not nodes.removeprefix(_CLUSTER):
        raise UsageError("--nodes takes ray or ray://HOST[:PORT]", found=repr(nodes))
    host = nodes.removeprefix(_CLUSTER)
    return nodes if ":" in host else f"{_CLUSTER}{host}:{_CLIENT_PORT}"


def describe() -> dict[str, Any]:
    """Return what must be alike on all machines, and how this one is called.

    ``key`` stands for the user's key and does not tell it.
    """
    return {
        "host": socket.gethostname(),
        "streamconv": __version__,
        "plan schema": SCHEMA,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "key": Sealer(user_key(), "nodes").seal("alike", b""),
    }


def hold_against(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raise :class:`BadInputError` where two machines describe themselves as too different."""
    for what in ("streamconv", "plan schema", "Python"):
        if there[what] != here[what]:
            raise BadInputError(
                f"a machine of the cluster has another {what}",
                where=there["host"],
                expected=str(here[what]),
                found=str(there[what]),
                hint="install the same version of streamconv everywhere",
            )


def lines_there(
    work: Callable[[str], Iterator[str]], request: str, asking: Mapping[str, Any]
) -> Iterator[Any]:
    """Yield what is wrong with this machine for who asks, as data, and then what ``work`` yields."""

    def check() -> dict[str, Any]:
        here = describe()
        hold_against(asking, here)
        if here["key"] != asking["key"]:
            raise UsageError(
                "a machine of the cluster has another key than this one",
                hint="let them share the state folder (XDG_STATE_HOME), or give all of them the same "
                "STREAMCONV_KEY",
            )
        return {}

    told = answer(check)
    yield told
    if "error" not in told:
        yield from work(request)


def begin(request: Request) -> dict[str, Any]:
    """Begin the conversion; return its output files with their sizes, or the error."""
    return _answer(request, lambda: _begin(request))


def write(request: Request, name: str, told: Told) -> dict[str, Any]:
    """Write the output file ``name``; return what :class:`Part` says, or the error."""
    if request.budget_bytes < CHILD_BELOW_BYTES:
        return _answer(request, lambda: _write_in_child(request, name, told))
    return _answer(request, lambda: _write(request, name, told))


def finish(request: Request) -> dict[str, Any]:
    """Publish the output; return the result, or the error."""
    return _answer(request, lambda: _finish(request))


def _answer(request: Request, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    with _environment({"STREAMCONV_KEY": request.key, SERVERS: request.servers}):
        return answer(work)


def answer(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return errors as data: an engine that sees an exception might try the same again."""
    try:
        return work()
    except StreamconvError as error:
        return {"error": error.to_json(), "host": socket.gethostname()}
    except (OSError, MemoryError) as error:
        told = StreamconvError.of_system(error).to_json()
        return {"error": told, "host": socket.gethostname()}


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables, for child processes, too; an engine's process does other work afterwards."""
    before = {name: os.environ.get(name) for name in values}
    _set({name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _begin(request: Request) -> dict[str, Any]:
    from streamconv.conversion.parts import begin as begin_parts

    begun = begin_parts(request.src, request.dst, request.job, request.run)
    return {**begun.to_json(), "sources": [str(path) for path in begun.sources]}


def _write(request: Request, name: str, told: Told) -> dict[str, Any]:
    from streamconv.conversion.parts import write_part

    def heed(event: Event) -> None:
        if isinstance(event, Progress):
            told(name, event.done_bytes)

    return write_part(request.dst, [name], replace(request.run, on_event=heed)).to_json()


def _write_in_child(request: Request, name: str, told: Told) -> dict[str, Any]:
    command = [sys.executable, "-m", "streamconv", "part", str(request.dst)]
    command += ["--file", name, "--json", "--max-mem", str(request.budget_bytes)]
    command += ["--io-threads", str(request.run.io_threads)]
    command += ["--direct"] if request.run.direct else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    last: Mapping[str, Any] = {}
    with process:
        assert process.stdout is not None  # noqa: S101 - a pipe, see above
        assert process.stderr is not None  # noqa: S101 - a pipe, see above
        for line in process.stdout:
            event = json.loads(line)
            if event.get("event") == "progress":
                told(name, event["done_bytes"])
            elif event.get("event") in ("result", "error"):
                last = event
        said = process.stderr.read()[-_TAIL_CHARACTERS:]
    if last.get("event") == "result":
        return {key: value for key, value in last.items() if key != "event"}
    if last.get("event") == "error":
        return {"error": dict(last), "host": socket.gethostname()}
    raise StreamconvError(
        "the process of a part died without reporting an error",
        where=name,
        found=f"{how_it_ended(process.returncode)}; {said.strip()}",
    )


def _finish(request: Request) -> dict[str, Any]:
    from streamconv.conversion.parts import finish as finish_parts

    result = finish_parts(request.dst, request.run)
    return {**asdict(result), "output": str(result.output)}
