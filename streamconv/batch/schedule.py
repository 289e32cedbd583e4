"""When the next round is due: a duration (``10m``) or a cron expression (``*/10 * * * *``)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from streamconv.durations import parse_duration
from streamconv.errors import UsageError

_ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
}
# (name, lowest, highest) of the five fields; 7 is Sunday too.
_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_NAMES = {n: i for i, n in enumerate(_WEEKDAYS)} | {n: i for i, n in enumerate(_MONTHS, start=1)}
_HORIZON = timedelta(days=366 * 8 + 1)  # 29 February may be eight years away


@dataclass(frozen=True, slots=True)
class Every:
    """A round every so many seconds, counted from the end of the last one."""

    seconds: float

    def next_after(self, now: datetime) -> datetime:
        """Return when the next round begins."""
        return now + timedelta(seconds=self.seconds)


@dataclass(frozen=True, slots=True)
class Cron:
    """A cron expression in local time; sets of allowed values for its five fields.

    As in cron: where both the day of the month and the weekday are given, either will do.
    """

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either_day: bool

    def next_after(self, now: datetime) -> datetime:
        """Return the first matching minute after ``now``; raises where none comes in eight years."""
        at = now.replace(second=0, microsecond=0) + timedelta(minutes=1)
        end = now + _HORIZON
        while at < end:
            if at.month not in self.months or not self._is_day(at):
                at = at.replace(hour=0, minute=0) + timedelta(days=1)
            elif at.hour not in self.hours:
                at = at.replace(minute=0) + timedelta(hours=1)
            elif at.minute not in self.minutes:
                at += timedelta(minutes=1)
            else:
                return at
        raise UsageError("this cron expression names a day that never comes")

    def _is_day(self, at: datetime) -> bool:
        by_date = at.day in self.days
        by_weekday = at.isoweekday() % 7 in self.weekdays
        return by_date or by_weekday if self.either_day else by_date and by_weekday


Schedule = Every | Cron


def parse_schedule(text: str) -> Schedule:
    """Return what ``--watch`` means: a duration or a cron expression of five fields."""
    fields = _ALIASES.get(text.strip().lower(), text).split()
    if len(fields) != len(_FIELDS):
        try:
            seconds = parse_duration(text)
        except UsageError:
            raise UsageError(
                f"not a schedule: {text!r}",
                expected="a duration such as 10m, or a cron expression of five fields",
            ) from None
        if seconds <= 0:
            raise UsageError("the time between two rounds must be positive", found=text)
        return Every(seconds)
    values = [
        _field(field, name, low, high)
        for field, (name, low, high) in zip(fields, _FIELDS, strict=True)
    ]
    minutes, hours, days, months, weekdays = values
    weekdays = frozenset(d % 7 for d in weekdays)
    either = not fields[2].startswith("*") and not fields[4].startswith("*")
    return Cron(minutes, hours, days, months, weekdays, either)


def _field(text: str, name: str, low: int, high: int) -> frozenset[int]:
    allowed: set[int] = set()
    for item in text.lower().split(","):
        span, _, step = item.partition("/")
        first, dash, last = span.partition("-")
        try:
            every = int(step) if step else 1
            if span == "*":
                begin, end = low, high
            else:
                begin = _number(first)
                end = _number(last) if dash else high if step else begin
        except ValueError:
            begin, end, every = 0, -1, 0
        if every < 1 or not low <= begin <= end <= high:
            raise UsageError(
                f"not the {name} of a cron expression: {text!r}",
                expected=f"{low} to {high}, such as *, */5, 1-5 or 1,15",
            )
        allowed.update(range(begin, end + 1, every))
    return frozenset(allowed)


def _number(text: str) -> int:
    return _NAMES[text] if text in _NAMES else int(text)
