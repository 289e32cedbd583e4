"""When the next round is due: a duration (``10m``) or a cron expression (``*/10 * * * *``).

Cron expressions are in local time, and mean when clocks are put forward or back what they mean to
Debian's cron: a round at a fixed hour comes once, a moment late where that hour is skipped, and one
with ``*`` as its minute or hour follows the time that really passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

from cronsim import CronSim, CronSimError

from streamconv.errors import UsageError
from streamconv.units import parse_duration

_ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
}
_FIELDS = 5


class _LocalTime(tzinfo):
    """The time zone of this machine, or of ``TZ``, with all its changes as the C library knows them.

    ``datetime.astimezone`` has the offset of one moment only.
    """

    def utcoffset(self, at: datetime | None) -> timedelta | None:
        return None if at is None else at.replace(tzinfo=None).astimezone().utcoffset()

    def dst(self, _at: datetime | None) -> timedelta | None:
        return None

    def tzname(self, at: datetime | None) -> str | None:
        return None if at is None else at.replace(tzinfo=None).astimezone().tzname()

    def fromutc(self, at: datetime) -> datetime:
        return datetime.fromtimestamp(at.replace(tzinfo=UTC).timestamp()).replace(tzinfo=self)  # noqa: DTZ006 - made aware at once


_LOCAL = _LocalTime()


def local_now() -> datetime:
    """Return the time, aware of its zone."""
    return datetime.now(_LOCAL)


@dataclass(frozen=True, slots=True)
class Every:
    """A round every so many seconds, counted from the end of the last one."""

    seconds: float

    def next_after(self, now: datetime) -> datetime:
        """Return when the next round begins."""
        # Not "now + …", which puts hands forward instead of letting time pass.
        return datetime.fromtimestamp(now.timestamp() + self.seconds, now.tzinfo)


@dataclass(frozen=True, slots=True)
class Cron:
    """A cron expression of five fields in local time."""

    expression: str

    def next_after(self, now: datetime) -> datetime:
        """Return the first matching minute after ``now``."""
        for at in CronSim(self.expression, now):
            # When an hour comes twice, what is fixed to it was due in the first: that is past.
            if at.timestamp() > now.timestamp():
                return at
        raise UsageError("this cron expression names a day that never comes")


Schedule = Every | Cron


def parse_schedule(text: str) -> Schedule:
    """Return what ``--watch`` means: a duration or a cron expression of five fields."""
    fields = _ALIASES.get(text.strip().lower(), text).split()
    if len(fields) != _FIELDS:
        try:
            seconds = parse_duration(text)
        except UsageError as error:
            if error.what.startswith("too long"):
                raise
            raise UsageError(
                f"not a schedule: {text!r}",
                expected="a duration such as 10m, or a cron expression of five fields",
            ) from None
        if seconds <= 0:
            raise UsageError("the time between two rounds must be positive", found=text)
        return Every(seconds)
    cron = Cron(" ".join(fields))
    try:
        cron.next_after(datetime(2000, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        raise UsageError(
            f"not a cron expression, or one of a day that never comes: {text!r}",
            found=str(error),
            expected="minute, hour, day, month and weekday, such as '*/10 9-17 * * mon-fri'",
        ) from None
    return cron
