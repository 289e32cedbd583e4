"""A worker whose conversion runs on a cluster: ``python -m streamconv.batch.relay NODES``.

To the batch it is a :mod:`streamconv.batch.worker`: it hands the request on to one on some machine of
the cluster, and what that one tells back. Records, locks, hooks and retention stay with the batch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from streamconv.batch import worker
from streamconv.batch.hook_process import last_line
from streamconv.errors import StreamconvError
from streamconv.nodes import ray_engine
from streamconv.options import JobOptions
from streamconv.storage.address import place
from streamconv.system.signals import (
    WORKER_GRACE_SECONDS,
    end_with_parent,
    heeded,
    how_it_ended,
)

_TAIL_BYTES = 1 << 14


def command(nodes: str) -> list[str]:
    """Return the command line of a worker whose conversions run on the cluster ``nodes``."""
    return [sys.executable, "-P", "-m", "streamconv.batch.relay", nodes]


def run_there(request: str) -> Iterator[str]:
    """Yield the lines of a worker; runs on a machine of the cluster, and the worker ends with it."""
    asked = {**json.loads(request), "parent": os.getpid()}
    with tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            worker.command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True
        )
        assert process.stdin is not None  # noqa: S101 - a pipe, see above
        assert process.stdout is not None  # noqa: S101 - a pipe, see above
        line = ""
        try:
            process.stdin.write(json.dumps(asked))
            process.stdin.close()
            for line in process.stdout:
                yield line
        finally:
            process.terminate()
            code = process.wait()
            process.stdout.close()
        if not line.startswith(('{"event": "finished"', '{"event": "error"')):
            err.seek(max(0, err.seek(0, os.SEEK_END) - _TAIL_BYTES))
            crash = StreamconvError(
                "the conversion process died without reporting an error",
                where=asked["source"],
                found=f"{how_it_ended(code)}; {last_line(err.read())}".strip("; "),
            )
            yield json.dumps({"event": "error", **crash.to_json(), "kind": "crashed"}) + "\n"


def _absolute(request: dict[str, Any]) -> dict[str, Any]:
    """Return the request for a process in another folder, on another machine."""
    paths = {name: request[name] for name in ("source", "output", "report")}
    return {
        **request,
        **{name: path and str(place(path).absolute()) for name, path in paths.items()},
        "job": JobOptions.from_json(request["job"]).absolute().to_json(),
    }


def main() -> int:
    """Let the cluster do what the request on stdin asks for."""
    with heeded(WORKER_GRACE_SECONDS):
        request = json.load(sys.stdin)
        if not end_with_parent(signal.SIGTERM, request["parent"]):
            return 1
        try:
            budget_bytes = request["run"]["max_mem_bytes"]
            sent = json.dumps(_absolute(request))
            for line in ray_engine.lines(sys.argv[1], budget_bytes, run_there, sent):
                sys.stdout.write(line)
                sys.stdout.flush()
        except (StreamconvError, OSError, MemoryError) as error:
            told = error if isinstance(error, StreamconvError) else StreamconvError.of_system(error)
            sys.stdout.write(json.dumps({"event": "error", **told.to_json()}) + "\n")
            return told.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
