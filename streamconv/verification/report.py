"""What a verification found, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from typing import Any


@dataclass
class Report:
    """What a verification found.

    ``rows`` are the differing tensors of a comparison, worst first. ``forward`` is what running the
    model gave (:mod:`streamconv.verification.forward` says which keys), None where it was not run.
    """

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    forward: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.passed

    def _repr_html_(self) -> str:
        verdict = "verified" if self.passed else f"{len(self.problems)} problems"
        items = "".join(f"<li>{escape(text)}</li>" for text in self.problems or self.checked)
        return f"<p><b>{verdict}</b></p><ul>{items}</ul>"

    def extend(self, other: Report) -> None:
        """Add what another check found."""
        self.checked += other.checked
        self.problems += other.problems
        self.rows += other.rows
        self.forward = other.forward or self.forward

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data; a number that is none, or infinite, is None."""
        found: dict[str, Any] = _finite(
            {
                "passed": self.passed,
                "checked": self.checked,
                "problems": self.problems,
                "rows": self.rows,
                "forward": self.forward,
            }
        )
        return found


def _finite(value: Any) -> Any:
    """JSON has no word for NaN and infinity; most readers refuse what Python writes for them."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
