"""Times as people type and read them: ``90s``, ``10m``, ``2h``, ``1d``, ``1h30m``."""

from __future__ import annotations

import re

from streamconv.errors import UsageError

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PART = re.compile(r"(\d+(?:\.\d+)?)([smhd])", re.ASCII)
# A hundred years: far more than anybody means, and what clocks and calendars can still add up.
_MOST_DAYS = 36500


def parse_duration(text: str) -> float:
    """Return the seconds that ``90s``, ``10m``, ``2h``, ``1d`` or ``1h30m`` mean."""
    stripped = re.sub(r"\s+", "", text.lower())
    parts = _PART.findall(stripped)
    if not parts or "".join(number + unit for number, unit in parts) != stripped:
        raise UsageError(f"not a duration: {text!r}", expected="such as 90s, 10m, 2h or 1d")
    seconds = sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)
    if seconds > _MOST_DAYS * _UNIT_SECONDS["d"]:
        raise UsageError(f"too long a time: {text!r}", expected=f"at most {_MOST_DAYS}d")
    return seconds


def format_duration(seconds: float) -> str:
    """Return seconds as people say them: ``8 s``, ``3:05 min``, ``2:03 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole // 60 % 60:02} h"
