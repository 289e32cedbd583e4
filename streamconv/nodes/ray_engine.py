"""One conversion on a Ray cluster: a task begins it, one writes each output file, one finishes it.

Ray places the tasks, with their memory as a resource, and runs them again when a machine dies; bad
input is never tried again, since errors come back as data. No bytes of a weight pass through Ray: all
machines read the source and write the output at the same paths.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamconv.errors import BudgetError, StreamconvError, UsageError
from streamconv.files.userkey import Sealer, user_key
from streamconv.nodes import serving, tasks
from streamconv.options import Event, Phase, Progress, Result
from streamconv.storage.address import Address, place
from streamconv.storage.scattered import address as scattered_address
from streamconv.units import format_size

_LOOK_EVERY_SECONDS = 0.3
_RETRIES = 5


class _Board:
    """An actor that knows how many bytes of each output file are done."""

    def __init__(self) -> None:
        self._done: Counter[str] = Counter()

    def put(self, name: str, done_bytes: int) -> None:
        """Note how far a file is; one that is begun again starts from nothing."""
        self._done[name] = done_bytes

    def total(self) -> int:
        """Return the bytes that are done, of all files."""
        return self._done.total()


def convert(
    nodes: str,
    request: tasks.Request,
    on_event: Callable[[Event], None],
    *,
    scattered: bool = False,
) -> Result:
    """Run a conversion on the cluster ``nodes``: ``ray``, or ``ray://HOST[:PORT]``.

    ``scattered``: the machines have each a part of the source on disks of their own. Where this
    process is connected to a cluster already, that one is taken. Raises :class:`UsageError` where there
    is none, :class:`BadInputError` where the machines differ in what must be alike,
    :class:`BudgetError` where none has the memory, and what converting raises.
    """
    with ExitStack() as stack:
        ray = stack.enter_context(_connected(nodes))
        started = time.monotonic()
        request = _checked(ray, request)
        keep_serving: Callable[[list[str]], None] | None = None
        if scattered:
            request, keep_serving = stack.enter_context(_served(ray, request))
        on_event(Phase("plan"))
        begun = _answer(ray, tasks.begin, request, "beginning the conversion")
        if begun["status"] == "begun":
            if keep_serving is not None:
                keep_serving(begun["sources"])
            on_event(Phase("write"))
            _write_all(ray, request, begun, on_event, started)
        on_event(Phase("publish"))
        told = _answer(ray, tasks.finish, request, "publishing the output")
    return Result(**{**told, "output": Path(told["output"]), "notices": tuple(told["notices"])})


@contextmanager
def _connected(nodes: str) -> Iterator[Any]:
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "--nodes ray needs Ray, which is not installed here",
            hint="pip install 'streamconv[ray]'",
        ) from error
    if ray.is_initialized():
        yield ray
        return
    address = tasks.cluster_address(nodes)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, OSError) as error:
        raise UsageError(
            "no Ray cluster answers",
            where=address,
            found=str(error).splitlines()[0],
            hint="start one: `ray start --head`, and on other machines `ray start --address=HOST:6379`",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _alive(ray: Any) -> list[dict[str, Any]]:
    """Return the machines that can do anything, as Ray describes them."""
    alive = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    if not alive:
        raise UsageError("the Ray cluster has no machine with a processor")
    return alive


def _alive_with(ray: Any, budget_bytes: int) -> list[dict[str, Any]]:
    """Return those machines; raises :class:`BudgetError` where none has so much memory."""
    alive = _alive(ray)
    room = max(n["Resources"].get("memory", 0) for n in alive)
    if room < budget_bytes:
        raise BudgetError(
            "no machine of the Ray cluster has the memory of one part",
            expected=format_size(budget_bytes),
            found=format_size(int(room)),
            hint="choose a smaller --max-mem: it is each worker's",
        )
    return alive


def _there(node: Mapping[str, Any]) -> Any:
    """Return what makes Ray run something on one machine, and on no other."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


class _Shelf:
    """An actor on each machine: its shelf, whose errors come back as data."""

    def __init__(self) -> None:
        self._shelf = serving.Shelf()

    def ask(self, method: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """Call a method of the shelf."""
        return tasks.answer(lambda: {"told": getattr(self._shelf, method)(*arguments)})


@contextmanager
def _served(
    ray: Any, request: tasks.Request
) -> Iterator[tuple[tasks.Request, Callable[[list[str]], None]]]:
    """Let each machine serve what it has of the source.

    Yields the request that reads it there, and what to call with the addresses of the files that are
    planned: nothing else is served any more.
    """
    if isinstance(request.src, Address):
        raise UsageError(
            "--scattered is for a folder on the machines' own disks", found=str(request.src)
        )
    if request.job.lora.base is not None:
        raise UsageError(
            "a scattered adapter cannot be merged into a base model on a disk",
            found=str(request.job.lora.base),
            hint="copy the adapter's checkpoint into one folder; it is small",
        )
    path = os.path.normpath(request.src)
    nodes = {_name(node): node for node in _alive(ray)}
    shelf = ray.remote(_Shelf)
    actors = {
        name: shelf.options(num_cpus=0, scheduling_strategy=_there(node)).remote()
        for name, node in nodes.items()
    }

    def ask(method: str, arguments: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        asked = {name: actors[name].ask.remote(method, args) for name, args in arguments.items()}
        return {
            name: _raise_error(_get(ray, told, f"asking {name} for its files"))["told"]
            for name, told in asked.items()
        }

    def keep(sources: list[str]) -> None:
        places = [place(source) for source in sources]
        keys = [path.key for path in places if isinstance(path, Address)]
        ask("keep", dict.fromkeys(actors, (keys,)))

    try:
        addresses = {name: node["NodeManagerAddress"] for name, node in nodes.items()}
        servers = serving.serve(path, addresses, ask)
        yield replace(request, src=place(scattered_address(path)), servers=servers), keep
    finally:
        for actor in actors.values():
            ray.kill(actor)


def _name(node: Mapping[str, Any]) -> str:
    """Return how a machine is called; of one with several nodes each has another address, or number."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:6]})"


def _checked(ray: Any, request: tasks.Request) -> tasks.Request:
    """Hold the machines against this one; return the request with a key where they have not ours."""
    if _share_a_key(ray, request.budget_bytes):
        return request
    # Of this output alone: who has it can finish, or forge, this conversion and no other.
    return request.with_key(Sealer(user_key(), "nodes", str(request.dst)).derived())


def _share_a_key(ray: Any, budget_bytes: int) -> bool:
    """Hold the machines against this one; return whether all have this user's key.

    Raises :class:`BudgetError` where none has the memory, :class:`BadInputError` for what differs.
    """
    alive = _alive_with(ray, budget_bytes)
    describe = ray.remote(tasks.describe)
    asked = [
        describe.options(num_cpus=0, scheduling_strategy=_there(node)).remote() for node in alive
    ]
    here, keys = tasks.describe(), set()
    for node, reference in zip(alive, asked, strict=True):
        try:
            there = _get(ray, reference, f"asking {node['NodeManagerHostname']} for its version")
        except StreamconvError:
            if node["NodeID"] in {other["NodeID"] for other in _alive(ray)}:
                raise
            continue  # it has died: the others do its work
        keys.add(there["key"])
        tasks.hold_against(here, there)
    return keys == {here["key"]}


def lines(
    nodes: str, budget_bytes: int, work: Callable[[str], Iterator[str]], request: str
) -> Iterator[str]:
    """Run ``work`` on some machine of the cluster, and yield the lines that it yields.

    Only that machine is held against this one, by itself, before it works. One that dies is an
    ``OSError``: who asked may try again. Raises as :func:`convert`.
    """
    with _connected(nodes) as ray:
        _alive_with(ray, budget_bytes)
        task = ray.remote(tasks.lines_there).options(
            num_cpus=1,
            memory=budget_bytes,
            scheduling_strategy="SPREAD",
            max_retries=0,
            num_returns="streaming",
        )
        try:
            told = iter(task.remote(work, request, tasks.describe()))
            _raise_error(ray.get(next(told)))
            for reference in told:
                yield ray.get(reference)
        except ray.exceptions.RayError as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise OSError(errno.EIO, f"the machine that converted it is gone: {said}") from error


def _write_all(
    ray: Any,
    request: tasks.Request,
    begun: dict[str, Any],
    on_event: Callable[[Event], None],
    started: float,
) -> None:
    """Write every output file that is not finished; tell how far all of them are together."""
    sizes: dict[str, int] = begun["sizes"]
    reused = sum(sizes[name] for name in begun["finished"])
    todo = [name for name in sizes if name not in begun["finished"]]
    board = ray.remote(_Board).options(num_cpus=0, max_restarts=-1).remote()
    task = ray.remote(_write).options(
        num_cpus=1,
        memory=request.budget_bytes,
        scheduling_strategy="SPREAD",
        max_retries=_RETRIES,
        retry_exceptions=False,
    )
    # The largest first: none of them is begun when all others are done.
    pending = {
        task.remote(request, name, board): name for name in sorted(todo, key=lambda n: -sizes[n])
    }
    try:
        while pending:
            done, _ = ray.wait([*pending], num_returns=1, timeout=_LOOK_EVERY_SECONDS)
            for reference in done:
                name = pending.pop(reference)
                _raise_error(_get(ray, reference, f"writing {name}"))
            so_far = reused + sum(sizes[n] for n in todo if n not in pending.values())
            on_event(
                Progress(
                    done_bytes=max(so_far, min(sum(sizes.values()), reused + _total(ray, board))),
                    total_bytes=sum(sizes.values()),
                    reused_bytes=reused,
                    seconds=time.monotonic() - started,
                    memory_bytes=0,
                    budget_bytes=request.budget_bytes,
                    file=next(iter(pending.values()), ""),
                )
            )
    finally:
        for reference in pending:
            ray.cancel(reference)
        ray.kill(board)


def _write(request: tasks.Request, name: str, board: Any) -> dict[str, Any]:
    return tasks.write(request, name, lambda file, done: board.put.remote(file, done))


def _total(ray: Any, board: Any) -> int:
    """Return the bytes that are done; nothing where the machine of the board has just died."""
    try:
        return int(ray.get(board.total.remote(), timeout=_LOOK_EVERY_SECONDS))
    except (ray.exceptions.RayError, TimeoutError):
        return 0


def _answer(
    ray: Any,
    work: Callable[[tasks.Request], dict[str, Any]],
    request: tasks.Request,
    what: str,
) -> dict[str, Any]:
    """Run a task that is the only one of its kind, and return what it says; raise its error."""
    task = ray.remote(work).options(
        num_cpus=1, memory=request.budget_bytes, max_retries=_RETRIES, retry_exceptions=False
    )
    return _raise_error(_get(ray, task.remote(request), what))


def _get(ray: Any, reference: Any, what: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()
        missing = "No module named 'streamconv'" in str(error)
        raise StreamconvError(
            f"Ray failed while {what}"
            if what.startswith(("asking", "writing"))
            else f"Ray: {what}",
            found=lines[-1] if lines else type(error).__name__,
            hint="install streamconv on every machine of the cluster" if missing else None,
        ) from error
    return found


def _raise_error(told: dict[str, Any]) -> dict[str, Any]:
    if "error" in told:
        error = StreamconvError.from_json(told["error"])
        error.where = " on ".join(filter(None, (error.where, told.get("host"))))
        raise error
    return told
