"""One memory budget for all conversions at once: who may have how much of it.

Plain arithmetic: the shares that are out, plus this process itself, never exceed the whole.
"""

from __future__ import annotations

from streamconv.errors import BudgetError
from streamconv.units import format_size

# What this process may grow by while it runs: states of thousands of checkpoints, lines of children.
_GROWTH_BYTES = 24 << 20


class Ledger:
    """Grants shares of ``total_bytes``.

    ``own_bytes`` is what this process takes, ``floor_bytes`` the least that any conversion works in,
    ``known_floor_bytes`` the least for one of a model that is known, where that is less. ``slots`` is
    how many can run at once: where there is no room for any conversion, as many as of models that are
    known, and the others say what they need. Raises :class:`BudgetError` where not even one can.
    """

    def __init__(
        self,
        total_bytes: int,
        own_bytes: int,
        floor_bytes: int,
        jobs: int,
        *,
        known_floor_bytes: int | None = None,
    ) -> None:
        self.total_bytes = total_bytes
        self._own = own_bytes + _GROWTH_BYTES
        free = total_bytes - self._own
        self.slots = min(jobs, free // floor_bytes)
        if self.slots < 1 and known_floor_bytes is not None:
            self.slots = min(jobs, free // known_floor_bytes)
        if self.slots < 1:
            least = -(-(self._own + floor_bytes) // 10**7) * 10**7
            raise BudgetError(
                "the memory budget is too small for a batch",
                expected=f"at least {format_size(least)}",
                found=format_size(total_bytes),
                hint=f"--max-mem {least // 10**6}MB is the smallest that works",
            )
        self.share_bytes = free // self.slots
        self.whole_bytes = free
        self._granted: dict[str, int] = {}

    @property
    def can_grant_more(self) -> bool:
        """Whether a conversion that runs alone gets more than its share."""
        return self.whole_bytes > self.share_bytes

    @property
    def granted_bytes(self) -> int:
        """Return the sum of the shares that are out."""
        return sum(self._granted.values())

    def grant(self, name: str, *, alone: bool = False) -> int | None:
        """Return the share for the job ``name``, or None where it must wait for others to end.

        ``alone``: it needs all there is.
        """
        share = self.whole_bytes if alone else self.share_bytes
        if name in self._granted or self.granted_bytes + share > self.whole_bytes:
            return None
        self._granted[name] = share
        return share

    def release(self, name: str) -> None:
        """Take a share back."""
        del self._granted[name]


class EachItsOwn(Ledger):
    """Grants ``jobs`` times ``share_bytes``: each conversion has a machine to itself, not this one."""

    def __init__(self, share_bytes: int, jobs: int) -> None:
        self.slots = jobs
        self.total_bytes = jobs * share_bytes
        self.share_bytes = self.whole_bytes = share_bytes
        self._granted: dict[str, int] = {}

    def grant(self, name: str, *, alone: bool = False) -> int | None:  # noqa: ARG002 - as it is
        """Return the share for the job ``name``, or None where it must wait for others to end."""
        if name in self._granted or len(self._granted) >= self.slots:
            return None
        self._granted[name] = self.share_bytes
        return self.share_bytes
