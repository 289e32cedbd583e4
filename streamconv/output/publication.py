"""Putting a finished output in its place: whole or not at all, and over a former one without a gap.

Two folders are swapped at once where the file system can. Where it cannot (NFS, the lower layer of an
overlay, a mount point) the former output's files are removed and the new ones moved in, one by one:
config.json goes first, and the file without which no loader starts comes last. What was begun is
written down before, in ``publishing.json`` in the staging folder, and finished by whichever command
comes next. So the old output or the new one is there whole at any moment, in its place or staged.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from streamconv.errors import OutputExistsError
from streamconv.files import askedfile, newfile
from streamconv.files.durable import fsync_directory, hash_file
from streamconv.files.names import MANIFEST
from streamconv.files.userkey import Sealer, same_seal, user_key

RECORD = "publishing.json"
# In the target, while a file is copied there.
PARTIAL = ".streamconv.part"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# No such call, not on this file system, not across its layers, a mount point.
_CANNOT_SWAP = (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EBUSY, errno.EOPNOTSUPP, errno.EPERM)
# Without these no loader starts, whatever else is there.
CONFIGS = frozenset({"config.json", "adapter_config.json"})
_COPY_BYTES = 1 << 20
_LONGEST_RECORD = 64 << 20


@dataclass(frozen=True, slots=True)
class OldFile:
    """A file of a former output, and how it looked when it was found to be just that."""

    name: str
    nbytes: int
    mtime_ns: int

    def is_at(self, folder: Path) -> bool:
        """Whether it still lies in ``folder`` as it was."""
        try:
            status = (folder / self.name).lstat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.nbytes, self.mtime_ns)


@dataclass(frozen=True)
class Publication:
    """A finished output in ``root/files``, on its way to ``target``.

    ``old`` is the former output there, which goes; what else lies in it stays. ``last`` is the file
    that makes the new one loadable.
    """

    root: Path
    target: Path
    last: str
    old: tuple[OldFile, ...]
    sync: bool

    @property
    def _files(self) -> Path:
        return self.root / "files"

    def publish(self) -> Path | None:
        """Put the output in its place; return where what lay in the old one unlisted was kept."""
        if self.sync:
            fsync_directory(self._files)
        if not os.path.lexists(self.target):
            self._files.rename(self.target)
            self._synced(self.target.parent)
            return None
        manifest = hash_file(self._files / MANIFEST)
        if self.old and self.root.parent != self.target:
            self._write_down(swap=True, manifest=manifest, old=self.old)
            _give_access(self._files, self.target)
            if _swapped(self._files, self.target):
                self._synced(self.target.parent)
                return self._remove_swapped()
        self._write_down(swap=False, manifest=manifest, old=self.old)
        self._move_in(manifest)
        return None

    def _synced(self, folder: Path) -> None:
        if self.sync:
            fsync_directory(folder)

    def _write_down(self, *, swap: bool, manifest: str, old: tuple[OldFile, ...]) -> None:
        rows = [[o.name, o.nbytes, o.mtime_ns] for o in old]
        data = {"swap": swap, "last": self.last, "manifest": manifest, "old": rows}
        text = json.dumps(data)
        with askedfile.written(self.root / RECORD) as out:
            out.write(f"{_seal(self.target, text)} {text}")
            out.flush()
            if self.sync:
                os.fsync(out.fileno())
        self._synced(self.root)

    def finish(self, data: dict[str, Any]) -> None:
        """Finish what a stopped run had written down and begun."""
        if data["swap"]:
            manifest = self.target / MANIFEST
            if manifest.is_file() and hash_file(manifest) == data["manifest"]:
                self._remove_swapped()
            else:
                (self.root / RECORD).unlink()  # it was not swapped: all is as before
                return
        else:
            self._check(data["manifest"])
            self._move_in(data["manifest"])
        shutil.rmtree(self.root, ignore_errors=True)

    def _check(self, manifest: str) -> None:
        """Raise :class:`OutputExistsError` where the new output is not as the stopped run made it."""

        def place(name: str) -> Path:
            return next(
                (f / name for f in (self._files, self.target) if os.path.lexists(f / name)),
                self._files / name,
            )

        changed = [MANIFEST]
        if _is_file(place(MANIFEST)) and hash_file(place(MANIFEST)) == manifest:
            files = json.loads(place(MANIFEST).read_bytes())["files"]
            changed = [
                f["name"]
                for f in files
                if not _is_file(place(f["name"])) or hash_file(place(f["name"])) != f["xxh3_128"]
            ]
        if changed:
            raise _left(
                self.root,
                self.target,
                f"{changed[0]} is not as the run that was stopped while it moved it had made it",
            )

    def _remove_swapped(self) -> Path | None:
        """Remove the old output from where the new one was; keep what was not found there before."""
        if not self._files.is_dir():
            return None  # a run that was stopped right here had done it
        _remove(self._files, self.old)
        with contextlib.suppress(OSError):
            self._files.rmdir()
            return None
        # Somebody has put something there in the moment between the last look and the swap.
        kept = next(
            path
            for k in range(1, 1 << 20)
            if not os.path.lexists(
                path := self.target.with_name(f"{self.target.name}.replaced-{k}")
            )
        )
        self._files.rename(kept)
        return kept

    def _move_in(self, manifest: str) -> None:
        if self.old:
            _remove(self.target, self.old)
            # Before the first of the new files comes: none of these must be taken for an old one.
            self._synced(self.target)
            self._write_down(swap=False, manifest=manifest, old=())
        names = sorted(_names(self._files), key=lambda n: (n == self.last, n in CONFIGS, n))
        in_the_way = [n for n in names if self._is_in_the_way(n)]
        if in_the_way:
            raise OutputExistsError(
                "what streamconv did not write lies where a file of the output goes",
                where=str(self.target / in_the_way[0]),
                hint="move it away and run the same command again",
            )
        for name in names:
            if name == self.last:
                self._synced(self.target)
            (self.target / name).parent.mkdir(parents=True, exist_ok=True)
            self._move(name)
            # File by file, as a run stopped here may have moved some of a folder.
            if self.sync and "/" in name:
                fsync_directory((self.target / name).parent)
        self._synced(self.target)

    def _is_in_the_way(self, name: str) -> bool:
        new, there = self._files / name, self.target / name
        if not os.path.lexists(there):
            return False
        # A copy of ours that only has to be removed where it came from.
        return not _is_file(there) or hash_file(there) != hash_file(new)

    def _move(self, name: str) -> None:
        new, there = self._files / name, self.target / name
        try:
            new.replace(there)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy_in(new, there, self.target / PARTIAL, sync=self.sync)


def finish(root: Path, target: Path, *, sync: bool) -> None:
    """Finish the publication that a stopped run had begun in the staging folder ``root``.

    Raises :class:`OutputExistsError` for what no run of this user can be shown to have begun.
    """
    if not is_begun(root):
        return
    fd = newfile.reopen(root / RECORD)
    seal, text = "", ""
    if fd is not None:
        with os.fdopen(fd, encoding="utf-8", errors="replace") as stream:
            seal, _, text = stream.read(_LONGEST_RECORD).partition(" ")
    if not same_seal(seal, _seal(target, text)):
        raise _left(root, target, "nothing shows that a run of this user has begun to publish this")
    data = json.loads(text)
    old = tuple(OldFile(*row) for row in data["old"])
    Publication(root, target, data["last"], old, sync).finish(data)


def is_begun(root: Path) -> bool:
    """Whether a stopped run had begun to put its output in its place."""
    return os.path.lexists(root / RECORD)


def _seal(target: Path, text: str) -> str:
    # Of any release: what one has begun, another one can finish.
    return Sealer(user_key(), "publication", str(target)).seal("publication", text.encode())


def _left(root: Path, target: Path, what: str) -> OutputExistsError:
    return OutputExistsError(
        what,
        where=str(root),
        hint=f"look at {root / 'files'} and {target}: together they may hold a whole output. Move "
        "the first into the second, or both away, and run the same command again",
    )


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _names(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def _remove(folder: Path, old: Iterable[OldFile]) -> None:
    """Remove the files of a former output that are as they were, and the folders that they leave."""
    parents: set[PurePosixPath] = set()
    for file in sorted(old, key=lambda o: o.name not in CONFIGS):
        if file.is_at(folder):
            (folder / file.name).unlink()
        parents.update(PurePosixPath(file.name).parents)
    for parent in sorted(parents, key=lambda p: -len(p.parts)):
        if parent.parts:
            with contextlib.suppress(OSError):  # something else is in it
                (folder / parent).rmdir()


def _give_access(new: Path, old: Path) -> None:
    """Let those use a folder who can use the one whose place it takes, and nobody else."""
    status = old.stat()
    with contextlib.suppress(OSError):
        os.chown(new, -1, status.st_gid)
    for name in ("system.posix_acl_access", "system.posix_acl_default"):
        with contextlib.suppress(OSError):
            os.setxattr(new, name, os.getxattr(old, name))
    new.chmod(stat.S_IMODE(status.st_mode))


def _swapped(new: Path, old: Path) -> bool:
    """Swap two folders at once; return False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    done = libc.renameat2(
        _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE
    )
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_SWAP:
        return False
    raise OSError(code, os.strerror(code), str(old))


def _copy_in(source: Path, target: Path, partial: Path, *, sync: bool) -> None:
    """Move a file onto another mount: what appears under its name is whole all the same."""
    partial.unlink(missing_ok=True)  # of a run that was stopped right here
    with source.open("rb") as read, partial.open("xb") as write:
        shutil.copyfileobj(read, write, _COPY_BYTES)
        write.flush()
        if sync:
            os.fsync(write.fileno())
        status = source.stat()
        os.utime(write.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
    partial.replace(target)
    source.unlink()
