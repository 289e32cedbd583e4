"""How fast a store is here: asked for a moment, the way a conversion asks."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from streamconv.errors import StreamconvError
from streamconv.executor.remote import RemoteReader
from streamconv.executor.windows import Ahead, runs, windows
from streamconv.ir.planfile import Plan
from streamconv.output.staging import staging_path
from streamconv.storage.address import Address
from streamconv.storage.objects import READ_ONLY

_LOOKS = 5
_PIECE_BYTES = 8 << 20
# How many requests a plan makes is counted for so long; the rest is taken to be like that.
_COUNT_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class StoreSpeed:
    """What reading from a store is like: seconds of a small request, bytes per second.

    ``rate`` is that of ``at_once`` requests of ``request_bytes``, ``connection_rate`` that of one
    alone. Both are None where there is too little to read.
    """

    latency_seconds: float
    connection_rate: float | None
    rate: float | None
    at_once: int
    request_bytes: int


def read_speed(files: Sequence[Address], ahead: Ahead, seconds: float = 2.0) -> StoreSpeed | None:
    """Read some of these files for so long; None where there are none that hold anything."""
    found = [file.bucket.stat(file.key) for file in files]
    found = [one for one in found if one.nbytes]
    if not found:
        return None
    took = []
    for one in itertools.islice(itertools.cycle(found), _LOOKS):
        began = time.monotonic()
        one.bucket.get(one.key, 0, 1, one.version)
        took.append(time.monotonic() - began)
    largest = max(found, key=lambda one: one.nbytes)
    began = time.monotonic()
    size = min(_PIECE_BYTES, largest.nbytes)
    largest.bucket.get(largest.key, 0, size, largest.version)
    single = _rate(size, time.monotonic() - began)
    pieces = [
        (one, at, min(at + ahead.request_bytes, one.nbytes))
        for one in found
        for at in range(0, one.nbytes, ahead.request_bytes)
    ]
    endless = itertools.cycle(pieces)
    began = time.monotonic()
    deadline = began + max(0.2, seconds - sum(took) - size / (single or 1e9))

    def read(_: int) -> int:
        done = 0
        while time.monotonic() < deadline:
            one, lo, hi = next(endless)
            buffer = memoryview(bytearray(hi - lo))
            one.bucket.read_into(one.key, lo, one.version, buffer)
            done += hi - lo
        return done

    with ThreadPoolExecutor(ahead.requests) as pool:
        done = sum(pool.map(read, range(ahead.requests)))
    rate = _rate(done, time.monotonic() - began)
    return StoreSpeed(statistics.median(took), single, rate, ahead.requests, ahead.request_bytes)


def write_speed(folder: Address, seconds: float = 1.0) -> float | None:
    """Return bytes per second of writing objects below ``folder``; None where it cannot be tried.

    What is written is deleted again.
    """
    if folder.scheme in READ_ONLY:
        return None
    place = staging_path(folder) / f"probe-{secrets.token_hex(8)}"
    assert isinstance(place, Address)  # noqa: S101 - it lies in one
    piece = secrets.token_bytes(_PIECE_BYTES)
    done, began = 0, time.monotonic()
    try:
        while time.monotonic() - began < seconds:
            place.bucket.put(place.key, piece)
            done += len(piece)
        return _rate(done, time.monotonic() - began)
    except StreamconvError:
        return None
    finally:
        with contextlib.suppress(StreamconvError):
            place.bucket.delete([place.key])


def _rate(nbytes: int, seconds: float) -> float | None:
    return nbytes / seconds if nbytes >= 1 << 20 and seconds > 0 else None


def requests_of(plan: Plan, ahead: Ahead, window_bytes: int) -> int:
    """Return how many requests for weights executing ``plan`` makes; of a large one an estimate."""
    began = time.monotonic()
    count = counted_bytes = 0
    for _, tensors in plan.sections():
        for window in windows(tensors, window_bytes, window_bytes):
            count += len(runs(window, ahead.request_bytes, RemoteReader.gap_bytes))
            counted_bytes += window.nbytes
            if time.monotonic() - began > _COUNT_SECONDS:
                return round(count * plan.head.totals.write_bytes / max(1, counted_bytes))
    return count
