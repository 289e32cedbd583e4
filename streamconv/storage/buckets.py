"""The buckets that this process reads and writes: each is opened once."""

from __future__ import annotations

import os
import threading

from streamconv.storage.objects import NODES, Bucket
from streamconv.storage.scattered import SERVERS, Nodes

_buckets: dict[tuple[str, str], Bucket] = {}
_lock = threading.Lock()


def bucket(scheme: str, name: str) -> Bucket:
    """Return the bucket of that name, opened once a process."""
    # Each run has machines of its own that serve.
    known = (scheme, os.environ.get(SERVERS, "") if scheme == NODES else name)
    with _lock:
        if known not in _buckets:
            _buckets[known] = Nodes() if scheme == NODES else _kind(scheme)(scheme, name)
        return _buckets[known]


def _kind(scheme: str) -> type[Bucket]:
    if scheme != "hf":
        return Bucket
    from streamconv.storage.hub import Repository

    return Repository


def forget() -> None:
    """Forget what was learnt of all buckets: a new command looks anew."""
    with _lock:
        for one in _buckets.values():
            one.forget()
