"""Sizes and times as people type and read them: ``32GB`` is 32·10⁹ bytes, ``32GiB`` 32·2³⁰; ``1h30m``.

As on the HuggingFace Hub, in Kubernetes and in ``numfmt``: a plain letter is decimal, an ``i`` makes
it binary. A share of something (``80%``) needs the whole it is a share of.
"""

from __future__ import annotations

import re

from streamconv.errors import UsageError

_UNIT = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "p": 2**50}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(?:([kmgtp]?)(i?)b?|(%))\s*", re.IGNORECASE)

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PART = re.compile(r"(\d+(?:\.\d+)?)([smhd])", re.ASCII)
# A hundred years: far more than anybody means, and what clocks and calendars can still add up.
_MOST_DAYS = 36500


def parse_size(text: str | int, *, whole_bytes: int | None = None) -> int:
    """Return the bytes that ``text`` means.

    ``whole_bytes`` is what a percentage is a share of; without it a percentage is refused.
    Raises :class:`UsageError` for anything that is not a positive size.
    """
    if isinstance(text, int):
        text = str(text)
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise UsageError(
            f"not a size: {text!r}",
            expected="a number with a unit, such as 32GB, 32GiB, 500MB or 80%",
        )
    whole, _, decimals = match[1].partition(".")
    digits, scale = int(whole + decimals), int(10 ** len(decimals))
    unit, binary, percent = (match[2] or "").lower(), match[3], match[4]
    if percent:
        if whole_bytes is None:
            raise UsageError(f"a share makes no sense here: {text!r}", expected="a size in bytes")
        if digits > 100 * scale:
            raise UsageError(f"more than the whole: {text!r}", expected="at most 100%")
        result = whole_bytes * digits // (100 * scale)
    else:
        result = digits * (_BINARY[unit] if binary else _UNIT[unit]) // scale
    if result <= 0:
        raise UsageError(f"a size must be positive: {text!r}")
    return result


def format_size(nbytes: int | float) -> str:
    """Return ``nbytes`` in decimal units with three significant digits: ``1.23 GB``, ``17 B``."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    if unit == "B":
        return f"{int(value)} B"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def counted(count: int, noun: str) -> str:
    """Return how many there are of what ``noun`` names: ``1 file``, ``2 files``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


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
