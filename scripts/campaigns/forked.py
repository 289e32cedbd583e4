"""The command line in processes that are forked, not started: a batch in tens of milliseconds.

What runs is what always runs, from the entry point of each process on; only the interpreter and its
imports are there already, torch among them, which ``--verify`` takes seconds to load. So this is not
for what memory takes. Keep threads out of the process that forks.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pkgutil
import resource
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_OURS = "streamconv"


def prepare() -> None:
    """Load what the commands need, and become the parent of whoever loses theirs."""

    import streamconv.system.children

    for module in pkgutil.walk_packages(streamconv.__path__, "streamconv."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    # Torch alone has more addresses than are allowed.
    streamconv.system.children.PARSE_BYTES = 1 << 40
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    subprocess.Popen = _ForkedPopen  # type: ignore[misc]
    gc.collect()
    gc.freeze()


def start(
    arguments: Sequence[str],
    output: Path,
    *,
    most_bytes: int | None = None,
    before: Callable[[], None] = lambda: None,
) -> int:
    """Run ``streamconv ARGUMENTS`` in a process of its own; return its number.

    What it says goes to the file ``output``; files may grow to ``most_bytes``; ``before`` is called in
    it first.
    """

    def child() -> None:
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        before()
        from streamconv.__main__ import main

        sys.argv = ["streamconv", *arguments]
        main()

    said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _fork(child, (nothing, said, said), (), session=True)
    finally:
        os.close(said)
        os.close(nothing)


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes below one."""
    below: list[int] = []
    # It may end while it is looked at, and so may each of its threads.
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with contextlib.suppress(OSError):
                below += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    for one in below:
        yield one
        yield from descendants(one)


def end_all() -> int:
    """Kill and bury whatever is left below this process; return how many that were."""
    count = 0
    while left := list(descendants(os.getpid())):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while True:
            try:
                os.waitpid(-1, 0)
                count += 1
            except ChildProcessError:
                break
    return count


def _fork(
    run: Callable[[], Any], streams: Sequence[int], inherit: Sequence[int], *, session: bool
) -> int:
    # A signal that arrives in the hooks of fork would be lost: exceptions there are ignored.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    parent = os.getpid()
    try:
        pid = os.fork()
        if pid == 0:
            _be_the_child(run, streams, inherit, before, session=session)
    finally:
        if os.getpid() != parent:
            os._exit(1)  # never back into what the parent was doing
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _be_the_child(
    run: Callable[[], Any],
    streams: Sequence[int],
    inherit: Sequence[int],
    mask: Iterable[int],
    *,
    session: bool,
) -> None:
    code = 1
    try:
        if session:
            os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        copies = [os.dup(fd) for fd in streams]
        for number, copy in enumerate(copies):
            os.dup2(copy, number)
        keep = {0, 1, 2, *inherit}
        for fd in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
            if fd not in keep:
                with contextlib.suppress(OSError):
                    os.close(fd)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        gc.disable()
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:  # noqa: BLE001 - whatever it is, this process ends here
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class _ForkedPopen(subprocess.Popen[Any]):
    """A Popen that forks the modules of streamconv, and starts what else there is as ever."""

    def _execute_child(self, args: Any, *others: Any) -> None:
        ours = isinstance(args, list) and args[:3] == [sys.executable, "-P", "-m"]
        if not (ours and str(args[3]).startswith(_OURS)):
            super()._execute_child(args, *others)  # type: ignore[misc]
            return
        (_, _, _, inherit, _, env, _, _, _, stdin, to_stdin, from_stdout, stdout, from_stderr, stderr,
         *_, session, _group) = others  # fmt: skip

        def child() -> None:
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            sys.argv = [str(a) for a in args[3:]]
            sys.modules.pop(args[3], None)
            runpy.run_module(args[3], run_name="__main__", alter_sys=True)

        streams = [fd if fd != -1 else k for k, fd in enumerate((stdin, stdout, stderr))]
        self.pid = _fork(child, streams, tuple(inherit), session=session)
        self._child_created = True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            stdin, to_stdin, from_stdout, stdout, from_stderr, stderr
        )
