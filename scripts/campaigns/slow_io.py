"""streamconv on a disk that is stuck: one system call takes a minute, and no signal interrupts it.

``python -m scripts.campaigns.slow_io NAME N COMMAND …`` runs the command line; the N-th ``os.NAME`` of
the process sleeps first, deaf to signals, as a call on a stuck disk is. (strace can delay calls,
but then also holds the process back when it ends.)
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys
from typing import Any

from streamconv.__main__ import main


def stick(name: str, ordinal: int) -> None:
    """Make the ``ordinal``-th call of ``os.name`` take a minute more."""
    call, numbers = getattr(os, name), itertools.count(1)

    def stuck(*arguments: Any) -> Any:
        if next(numbers) == ordinal:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            ctypes.CDLL(None).sleep(60)
        return call(*arguments)

    setattr(os, name, stuck)


if __name__ == "__main__":
    stick(sys.argv[1], int(sys.argv[2]))
    del sys.argv[1:3]
    main()
