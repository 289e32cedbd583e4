"""streamconv on a system that reads and writes as little a call as it may.

``python -m scripts.campaigns.short_io COMMAND …`` runs the command line with planning in the same
process, and every positioned read and write moves between 1 byte and 1000 of what it was asked for.
strace cannot do that: it can only claim that a call was short.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Sequence

from streamconv.__main__ import main
from streamconv.planning import child

_rng = random.Random(0)
_pread, _preadv, _pwrite = os.pread, os.preadv, os.pwrite


def _short(nbytes: int) -> int:
    return min(nbytes, _rng.randint(1, 1000))


def _short_pread(fd: int, nbytes: int, offset: int) -> bytes:
    return _pread(fd, _short(nbytes), offset)


def _short_preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    return _preadv(fd, [buffers[0][: _short(len(buffers[0]))]], offset)


def _short_pwrite(fd: int, data: memoryview, offset: int) -> int:
    return _pwrite(fd, data[: _short(len(data))], offset)


if __name__ == "__main__":
    os.pread, os.preadv, os.pwrite = _short_pread, _short_preadv, _short_pwrite
    child._ask = lambda request, **_: child._TASKS[request["task"]](request)
    child._limited_memory = contextlib.nullcontext
    main()
