"""What a round of a batch came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from streamconv.batch.retention import Removal
from streamconv.batch.state import Record
from streamconv.batch.tasks import Task
from streamconv.errors import StreamconvError


@dataclass(slots=True)
class Round:
    """What a round came to. ``counts`` are outputs by how they ended; ``problems`` are of no output.

    ``notices`` say what an earlier round of this batch did not say already. ``lost`` are those whose
    source went away before this round.
    """

    counts: Counter[str] = field(default_factory=Counter)
    removals: list[Removal] = field(default_factory=list)
    problems: list[StreamconvError] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    budget_bytes: int = 0
    tasks: list[Task] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    lost: list[Record] = field(default_factory=list)

    @property
    def is_idle(self) -> bool:
        """Whether nothing happened that anybody need read about."""
        quiet = self.counts.keys() <= {"done", "waiting", "pruned"}
        return quiet and not (self.problems or self.notices or self.removals)

    @property
    def exit_code(self) -> int:
        """Return 0, 3 where a part failed, or the code of what kept the batch from starting."""
        if self.problems and not self.counts:
            return self.problems[0].exit_code
        return 3 if self.problems or self.counts["failed"] or self.counts["gone"] else 0
