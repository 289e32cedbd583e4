"""What happened when: memory and bytes over the time of a run, for the charts of a report."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from streamconv.options import Event, Phase, Progress
from streamconv.system import memory

_INTERVAL_SECONDS = 0.1
# Of a long run every second sample is dropped, again and again: a chart has no more pixels.
_MAX_SAMPLES = 1200


@dataclass(frozen=True, slots=True)
class Sample:
    """A moment: seconds since the start, resident bytes of the process tree, output bytes so far."""

    seconds: float
    memory_bytes: int
    done_bytes: int


class Timeline:
    """Samples this process tree in the background while it is used in a ``with``.

    ``phases`` are (seconds, name) of what began when.
    """

    def __init__(self, interval_seconds: float = _INTERVAL_SECONDS) -> None:
        self._interval = interval_seconds
        self._began = time.monotonic()
        self._done = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="timeline")
        self.samples: list[Sample] = []
        self.phases: list[tuple[float, str]] = []

    @property
    def seconds(self) -> float:
        """Return the time since the start."""
        return time.monotonic() - self._began

    def note(self, done_bytes: int) -> None:
        """Say how many bytes are written by now."""
        self._done = done_bytes

    def listening(self, on_event: Callable[[Event], None]) -> Callable[[Event], None]:
        """Return a listener that hears every event before ``on_event`` does."""

        def heard(event: Event) -> None:
            if isinstance(event, Phase):
                self.phases.append((self.seconds, event.name))
            elif isinstance(event, Progress):
                self.note(event.done_bytes)
            on_event(event)

        return heard

    def _sample(self) -> None:
        while True:
            self._take()
            if self._stop.wait(self._interval):
                return

    def _take(self) -> None:
        self.samples.append(Sample(self.seconds, memory.tree_bytes(), self._done))
        if len(self.samples) > _MAX_SAMPLES:
            del self.samples[1::2]
            self._interval *= 2

    def __enter__(self) -> Timeline:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._take()
