"""The key of this user, and seals made with it: what a run goes on with, a run of this user wrote.

The key lies in the user's state folder and nowhere else, unless ``STREAMCONV_KEY`` holds one, for
machines that share no such folder. Where it cannot be kept to oneself there, each process has a key of
its own: everything works, but no run goes on with what another one has left.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from pathlib import Path

from streamconv.errors import UsageError
from streamconv.files import newfile

_KEY_BYTES = 32
_SEAL_BYTES = 20
_OF_THIS_PROCESS = secrets.token_bytes(_KEY_BYTES)


def state_folder() -> Path | None:
    """Return the folder for what streamconv keeps for this user; None where there can be none."""
    given = os.environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(given) if given.startswith("/") else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return base / "streamconv" if base.is_absolute() else None


def user_key() -> bytes:
    """Return the key, making it where there is none."""
    given = os.environ.get("STREAMCONV_KEY")
    if given:
        return _given(given)
    folder = state_folder()
    if folder is None:
        return _OF_THIS_PROCESS
    path = folder / "key"
    # Twice: whoever makes it at the same moment may be first.
    for _ in range(2):
        key = _read(path)
        if key is not None:
            return key
        try:
            _make(path)
        except OSError:
            break
    return _read(path) or _OF_THIS_PROCESS


def _given(text: str) -> bytes:
    if not re.fullmatch(f"[0-9a-fA-F]{{{2 * _KEY_BYTES}}}", text):
        raise UsageError(
            f"STREAMCONV_KEY is not {2 * _KEY_BYTES} hexadecimal digits",
            hint=f"make one, and keep it: `openssl rand -hex {_KEY_BYTES}`",
        )
    return bytes.fromhex(text)


def _read(path: Path) -> bytes | None:
    """Return the key in a file that nobody else can have read or written."""
    data = newfile.read_own(path, _KEY_BYTES, 0o077)
    return data if data is not None and len(data) == _KEY_BYTES else None


def _make(path: Path) -> None:
    # With sudo the home is still another user's: what root made there would be in that user's way.
    above = next(p for p in path.parents if p.exists())
    if above.stat().st_uid != os.geteuid():
        raise PermissionError(str(above))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if _is_cut_off(path):
        path.unlink()
    partial = newfile.partial_name(path)
    fd = newfile.create(partial, 0o600)
    try:
        os.write(fd, secrets.token_bytes(_KEY_BYTES))
        os.fsync(fd)
        os.link(partial, path)  # which never replaces the key that another process has made
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            partial.unlink()


def _is_cut_off(path: Path) -> bool:
    """Whether there is a key file of ours that a crash has left without its content."""
    fd = newfile.reopen(path)
    if fd is None:
        return False
    status = os.fstat(fd)
    os.close(fd)
    return status.st_uid == os.geteuid() and status.st_size < _KEY_BYTES


class Sealer:
    """Makes seals that nobody without the key can make, for one purpose (``scope``)."""

    def __init__(self, key: bytes, *scope: str) -> None:
        self._key = key
        self._key = self._digest("scope", *map(os.fsencode, scope)).digest()[:_KEY_BYTES]
        seed = self._digest("seed").digest()[:8]
        # For hashes of whole files, at the speed of memory. Nobody sees them, only seals of them.
        self.seed = int.from_bytes(seed, "little")

    def seal(self, kind: str, *parts: bytes) -> str:
        """Return the seal of ``parts``, which stands for nothing else and for no other kind."""
        return self._digest(kind, *parts).hexdigest()[: 2 * _SEAL_BYTES]

    def derived(self) -> bytes:
        """Return a key for this purpose alone, which may be given to others: it tells no other key."""
        return self._digest("derived").digest()[:_KEY_BYTES]

    def _digest(self, kind: str, *parts: bytes) -> hashlib.blake2b:
        digest = hashlib.blake2b(key=self._key)
        for part in (kind.encode(), *parts):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest


def strong_digest(fd: int) -> bytes:
    """Return a digest of an open file that no other file has, from its first byte to its last."""
    digest = hashlib.blake2b()
    buffer = bytearray(1 << 20)
    at = 0
    while got := os.preadv(fd, [buffer], at):
        digest.update(memoryview(buffer)[:got])
        at += got
    return digest.digest()


def same_seal(one: str, other: str) -> bool:
    """Compare two seals in a time that says nothing about either."""
    return secrets.compare_digest(one.encode(), other.encode())
