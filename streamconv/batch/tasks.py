"""One conversion that is to be done, and what is recorded of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.batch.discover import Candidate
from streamconv.batch.state import Record, Store
from streamconv.conversion.finished import finished_output
from streamconv.errors import StreamconvError
from streamconv.options import JobOptions
from streamconv.output.manifest import is_ours
from streamconv.storage.address import place
from streamconv.storage.buckets import forget

UNCOMPARED = "its source went away before it was compared with it"


@dataclass(slots=True)
class Task:
    """A checkpoint that is ready, with everything that converting it needs.

    ``request`` holds the options of the run that change no byte. ``pin``: link the source first,
    into one of ``pin_places``; ``pinned`` is where it was linked. ``report``: the page to write.
    ``refused``: why it cannot be converted, where that showed without reading it.
    ``tries`` counts the starts of this round, ``not_before`` (monotonic seconds)
    is when the next may be, ``alone`` says that it needs the whole budget.
    """

    candidate: Candidate
    record: Record
    store: Store
    job: JobOptions
    run_options: dict[str, Any]
    verify: bool
    pin: bool
    pin_places: tuple[Path, ...] = ()
    pinned: Path | None = None
    report: Path | None = None
    refused: StreamconvError | None = None
    tries: int = 0
    not_before: float = 0.0
    alone: bool = False

    @property
    def output(self) -> Path:
        """Return the output folder."""
        return place(self.record.output)

    @property
    def key(self) -> str:
        """Return what tells this task from every other of the batch."""
        return self.record.output


def take_over_finished(
    record: Record, digest: str, reason: str = "", *, sealed: bool = False
) -> bool:
    """Take an output for done that is the whole one of the job ``digest``; else do nothing.

    ``sealed``: only where a run of this user proves to have written it.
    """
    if not digest:
        return False
    forget()
    try:
        manifest = finished_output(place(record.output), digest)
        if manifest is None or (sealed and not is_ours(manifest)):
            return False
        record.take_over(manifest, reason)
    except (StreamconvError, OSError):
        return False
    return True
