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

from streamconv.errors import BadInputError, StreamconvError
from streamconv.inputs import of_input
from streamconv.signals import end_with_parent
from streamconv.writer import no_space

# Enough for the metadata of most checkpoints, too little for a pickle that asks for the moon.
PARSE_BYTES = 1 << 30


def ask(
    module: str, request: Mapping[str, Any], *, doing: str, inherit: Sequence[int] = ()
) -> dict[str, Any]:
    """Run ``module`` in a child and return its answer.

    ``request["task"]`` names one of its tasks, ``request["src"]`` what it is about; ``doing`` says in
    messages what it was doing; ``inherit`` are descriptors that the child has, too. Raises the child's
    error.
    """
    # -P: the working directory, which may be the checkpoint's, is no place to import from.
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
        out, err = process.communicate(json.dumps(request).encode())
    except BaseException:
        process.kill()
        process.wait()
        raise
    try:
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        last = err.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        if process.returncode < 0:
            # No Python error can end a process by signal: the pickle broke the interpreter, or the
            # kernel ran out of memory, or of patience.
            name = signal.Signals(-process.returncode).name
            endless = process.returncode == -signal.SIGXCPU
            raise BadInputError(
                f"{doing} "
                + ("takes longer than any that torch writes" if endless else "ended in a crash"),
                where=str(request["src"]),
                found=name,
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
        answer = {"error": error.to_json()}
    except (MemoryError, RecursionError) as error:
        answer = {
            "error": BadInputError(
                "the checkpoint's metadata is too large or too deep to read",
                where=request["src"],
                found=type(error).__name__,
            ).to_json()
        }
    except OSError as error:
        # A plan is written here too, so that a full disk shows first in this process.
        full = no_space(error, Path(request.get("plan_path", request["src"])))
        other = of_input(error, _places(request)) or StreamconvError.of_system(error)
        answer = {"error": (full or other).to_json()}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    return 0


def _places(request: Mapping[str, Any]) -> list[Path]:
    """Return what a request says is to be read: what cannot be read there is bad input."""
    job = request.get("job", {})
    given = (
        request["src"],
        request.get("folder"),
        job.get("hf_config"),
        job.get("lora", {}).get("base"),
    )
    return [Path(place) for place in given if place]


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
