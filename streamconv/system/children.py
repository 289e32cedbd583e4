"""Work in a child process: the parent stays small, and what reads strangers' files is fenced in.

A child is a module run with ``-m`` whose main is :func:`serve`. It gets a request as JSON on stdin
and answers with one line of JSON on stdout: a result, or an error of :mod:`streamconv.errors`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamconv.errors import BadInputError, BudgetError, StreamconvError
from streamconv.files.durable import no_space
from streamconv.files.inputs import of_input
from streamconv.files.memory_limit import PARSE_BYTES, MemoryNeededError, bind, share_of
from streamconv.storage.address import place
from streamconv.system.memory import resident_bytes
from streamconv.system.signals import end_with_parent, how_it_ended
from streamconv.units import format_size


def ask(
    module: str,
    request: Mapping[str, Any],
    *,
    doing: str,
    inherit: Sequence[int] = (),
    budget_bytes: int | None = None,
    torch: bool = True,
) -> dict[str, Any]:
    """Run ``module`` in a child and return its answer.

    ``request["task"]`` names one of its tasks, ``request["src"]`` what it is about; ``doing`` says in
    messages what it was doing; ``inherit`` are descriptors that the child has, too. ``budget_bytes``
    binds the child from its first line to its last: this process and it take no more together. A child
    that does not load ``torch``, or calls :func:`make_room_for_torch` before, has more of it for
    itself. Raises the child's error.
    """
    # -P: the working directory, which may be the checkpoint's, is not a place to import from.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(os.getpid())],
        pass_fds=inherit,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            # glibc would keep an arena per thread; one is enough here and keeps the peak down.
            "MALLOC_ARENA_MAX": "1",
        },
    )
    try:
        if budget_bytes is not None:
            # It reads nothing before the request, which comes after this.
            others = resident_bytes()
            share = share_of(budget_bytes, others, torch=torch)
            bind(share, process.pid)
            request = {
                **request,
                "budget_bytes": budget_bytes,
                "others_bytes": others,
                "share_bytes": share,
            }
        out, err = process.communicate(json.dumps(request).encode())
    except BaseException:
        process.kill()
        process.wait()
        raise
    try:
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        if budget_bytes is not None and any(sign in err for sign in _NO_MEMORY):
            raise _too_small(request) from None
        last = err.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        if process.returncode < 0:
            # No Python error can end a process by signal: the pickle broke the interpreter, or the
            # kernel ran out of memory, or of patience.
            endless = process.returncode == -signal.SIGXCPU
            raise BadInputError(
                f"{doing} "
                + ("takes longer than any that torch writes" if endless else "ended in a crash"),
                where=str(request["src"]),
                found=how_it_ended(process.returncode),
                hint="the file is damaged or hostile, or the machine is out of memory",
            ) from None
        raise StreamconvError(f"{doing} failed", where=str(request["src"]), found=last[0]) from None
    if "error" in answer:
        raise StreamconvError.from_json(answer["error"])
    return answer


Task = Callable[[dict[str, Any]], dict[str, Any]]


def serve(tasks: Mapping[str, Task]) -> int:
    """Be the child: read the request, do its task, answer. Dies with its parent."""
    # Nothing has been done yet: were the parent gone already, nothing would be.
    if not end_with_parent(signal.SIGKILL, int(sys.argv[1])):
        return 1
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash here says nothing about us
    answers = sys.stdout
    request = json.load(sys.stdin)
    try:
        # Libraries may print; only the answer may reach the parent's pipe.
        with contextlib.redirect_stdout(io.StringIO()):
            answer = tasks[request["task"]](request)
    except StreamconvError as error:
        # A library may have turned it into an error of its own.
        short = _ran_out(error) if "share_bytes" in request else None
        answer = {"error": (error if short is None else _too_small(request, short)).to_json()}
    except MemoryError as error:
        answer = {
            "error": (
                _too_small(request, error)
                if "share_bytes" in request
                else too_large(Path(request["src"]))
            ).to_json()
        }
    except RecursionError:
        answer = {"error": too_large(Path(request["src"])).to_json()}
    except OSError as error:
        # A plan is written here too, so that a full disk shows first in this process.
        full = no_space(error, Path(request.get("plan_path", request["src"])))
        other = of_input(error, _places(request)) or StreamconvError.of_system(error)
        answer = {"error": (full or other).to_json()}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    return 0


def make_room_for_torch(request: dict[str, Any]) -> None:
    """Bind this child as one that loads torch; ``request`` is the one that it was given."""
    request["share_bytes"] = share_of(request["budget_bytes"], request["others_bytes"])
    bind(request["share_bytes"])


def too_large(src: Path) -> BadInputError:
    """Return that no memory is worth what the metadata of ``src`` asks for."""
    return BadInputError(
        "the checkpoint's metadata is too large or too deep to read", where=str(src)
    )


# What allocators of libraries write before they give up the process.
_NO_MEMORY = (b"bad_alloc", b"MemoryError", b"memory allocation of", b"Cannot allocate memory")


def _ran_out(error: BaseException) -> MemoryError | None:
    """Return what an error was made of where that is a lack of memory."""
    cause: BaseException | None = error
    for _ in range(20):
        if cause is None or isinstance(cause, MemoryError):
            return cause
        if isinstance(cause, ImportError | RuntimeError) and any(
            sign.decode() in str(cause) for sign in (*_NO_MEMORY, b"not enough memory")
        ):
            return MemoryError(str(cause))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _too_small(request: Mapping[str, Any], error: MemoryError | None = None) -> BudgetError:
    """Return that what is to be read needs more than the budget, with one that is enough."""
    budget, share = request["budget_bytes"], request["share_bytes"]
    if isinstance(error, MemoryNeededError):
        need = budget - share + error.needed_bytes
        return BudgetError(
            f"the memory budget is too small for what {Path(error.where).name} says",
            where=error.where,
            expected=f"at least {format_size(need)} to read {format_size(error.nbytes)} of it",
            found=format_size(budget),
            hint=f"--max-mem {-(-need // 10**7) * 10}MB is enough for it",
        )
    need = max(2 * budget, 10**9)
    return BudgetError(
        "the memory budget is too small for what the checkpoint's metadata and config say",
        where=str(request["src"]),
        expected=f"more than {format_size(budget)}",
        found=format_size(budget),
        hint=f"try --max-mem {need // 10**6}MB",
    )


def _places(request: Mapping[str, Any]) -> list[Path]:
    """Return what a request says is to be read: what cannot be read there is bad input."""
    job = request.get("job", {})
    given = (
        request["src"],
        request.get("folder"),
        job.get("hf_config"),
        job.get("lora", {}).get("base"),
        *(job.get("average") or {}).get("sources", ()),
    )
    return [place(given_place) for given_place in given if given_place]


@contextlib.contextmanager
def limited_memory(nbytes: int = PARSE_BYTES) -> Iterator[None]:
    """Bound the address space while strangers' metadata is parsed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    cap = nbytes if hard == resource.RLIM_INFINITY else min(nbytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (cap, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
