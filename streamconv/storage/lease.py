"""A lock in a store: an object that whoever holds it writes anew every few seconds.

It is made on condition that there is none, and renewed on condition that it is still the version that
was written last: so one process has it at most. A holder that was killed stops renewing, and whoever
has seen no renewal for a while, by its own clock, takes over: no two clocks are compared. A store that
takes no notice of conditions is found out before anything is written, and refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamconv.errors import LockedError, OutputExistsError, StreamconvError, UsageError
from streamconv.storage.address import Address

RENEW_SECONDS = 5.0
EXPIRE_SECONDS = 20.0
_POLL_SECONDS = 0.5


class Lease:
    """A lock that is held: ``check`` before what nobody else may do meanwhile."""

    def __init__(self, place: Address, version: str, owner: dict[str, Any]) -> None:
        self._place = place
        self._version = version
        self._owner = owner
        self._renewed = time.monotonic()
        self._lost: StreamconvError | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._renew_all, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise :class:`LockedError` where another process has taken over, or may have by now."""
        if self._lost is None and time.monotonic() - self._renewed > EXPIRE_SECONDS / 2:
            self._renew()
        if self._lost is not None:
            raise LockedError(
                "another process has taken over this output, for this one was not heard of for a while",
                where=str(self._place.parent.parent),
                found=self._lost.what,
                hint="let the other one finish",
            )

    def _renew_all(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            self._renew()

    def _renew(self) -> None:
        with self._lock:
            if self._lost is not None or self._stop.is_set():
                return
            self._owner["n"] += 1
            try:
                self._version = _put(self._place, self._owner, self._version)
                self._renewed = time.monotonic()
            except OutputExistsError as error:
                # Was it this very request, of which the first answer was lost?
                version = _version_of(self._place, self._owner)
                self._lost = error if version is None else None
                self._version = version or self._version
            except StreamconvError as error:
                # The store does not answer: nobody else hears it either.
                if time.monotonic() - self._renewed > EXPIRE_SECONDS:
                    self._lost = error

    def release(self) -> None:
        """Let go of it, unless another process has it."""
        self._stop.set()
        self._thread.join()
        if self._lost is None:
            bucket, key = self._place.bucket, self._place.key
            # Where the store does not answer it expires by itself.
            with contextlib.suppress(FileNotFoundError, StreamconvError):
                if bucket.look(key).version == self._version:
                    bucket.delete([key])


def _put(place: Address, owner: dict[str, Any], if_version: str | None) -> str:
    return place.bucket.put(place.key, json.dumps(owner).encode(), if_version=if_version)


def _version_of(place: Address, owner: dict[str, Any]) -> str | None:
    """Return the version of the lock where it is this owner's; None where it is not."""
    seen = _seen(place)
    if seen is None:
        return None
    version, holder = seen
    return version if holder.get("owner") == owner["owner"] else None


def _seen(place: Address) -> tuple[str, dict[str, Any]] | None:
    """Return the version of the lock and who holds it; None where there is none, or it just changed."""
    try:
        found = place.bucket.look(place.key)
        holder = json.loads(place.bucket.get(place.key, 0, found.nbytes, found.version))
    except ValueError:
        holder = None
    except (FileNotFoundError, StreamconvError):
        return None
    return found.version, holder if isinstance(holder, dict) else {}


def _me() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "owner": secrets.token_hex(8),
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "pid": os.getpid(),
        "n": 0,
    }


def _is_dead(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is gone."""
    if not me["boot"] or holder.get("boot") != me["boot"]:
        return False
    pid = holder.get("pid")
    # Containers have the host's boot id, and numbers of their own.
    if holder.get("host") != me["host"] or type(pid) is not int or pid <= 0:
        return False
    return not Path(f"/proc/{pid}").exists()


@contextmanager
def held(place: Address) -> Iterator[Lease]:
    """Hold the lock that is the object ``place``; raises :class:`LockedError` where another has it."""
    me = _me()
    lease = Lease(place, _acquire(place, me), me)
    try:
        yield lease
    finally:
        lease.release()


def _acquire(place: Address, me: dict[str, Any]) -> str:
    first_seen, seen = time.monotonic(), ""
    while True:
        try:
            version = _put(place, me, None)
            _check_conditions(place, version, me)
            return version
        except OutputExistsError:
            pass
        there = _seen(place)
        if there is None:
            continue  # it was let go of, or renewed, in this very moment
        version, holder = there
        now = time.monotonic()
        if holder.get("owner") == me["owner"]:
            return version  # the first answer was lost
        if seen and version != seen:
            raise _locked(place, holder)
        if not seen:
            first_seen, seen = now, version
        if _is_dead(holder, me) or now - first_seen > EXPIRE_SECONDS:
            try:
                return _put(place, me, version)
            except OutputExistsError:
                raise _locked(place, holder) from None  # another one was first
        time.sleep(_POLL_SECONDS)


def _check_conditions(place: Address, version: str, me: dict[str, Any]) -> None:
    """Raise :class:`UsageError` where the store writes whatever the condition says."""
    if not _conditions_hold(place, me):
        place.bucket.delete([place.key])
        raise UsageError(
            "this store takes no notice of conditions: two conversions could write into one output",
            where=str(place.parent.parent),
            found=f"an object was replaced although it was there (version {version})",
            hint="convert into a folder of a disk and copy it there",
        )


def _conditions_hold(place: Address, me: dict[str, Any]) -> bool:
    """Whether an object that is there is not replaced on conditions that do not hold."""
    for condition in (None, f'"{"0" * 32}"'):
        try:
            _put(place, me, condition)
        except OutputExistsError:
            continue
        return False
    return True


def takes_conditions(folder: Address) -> bool:
    """Whether a store takes notice of conditions; an object is written for it, and deleted."""
    place = folder / f"probe-{secrets.token_hex(8)}"
    me = _me()
    _put(place, me, None)
    try:
        return _conditions_hold(place, me)
    finally:
        place.bucket.delete([place.key])


def _locked(place: Address, holder: dict[str, Any]) -> LockedError:
    return LockedError(
        "another conversion writes into this output",
        where=str(place.parent.parent),
        found=f"process {holder.get('pid', '?')} on {holder.get('host', 'another machine')}",
        hint="wait until it has ended, or choose another output",
    )
