"""Staging: the output folder appears whole or not at all, and a stopped run can go on.

Beside the target ``DST`` a hidden folder holds everything until the end::

    .DST.streamconv/plan.jsonl       the plan that is being executed
    .DST.streamconv/journal.jsonl    one line per finished file, written after the file's fsync
    .DST.streamconv/files/…          the output as it will be
    .DST.streamconv.lock             held while a process works on DST

Publishing renames ``files`` to ``DST``. Where ``DST`` is an empty folder already (a mount point,
say) the hidden folder lies inside it and the files are moved one by one, last the one without which
no loader starts (the index, or the only weight file). Names that end in ``.safetensors`` exist only
in ``files``: loaders glob.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from streamconv.errors import OutputExistsError, UsageError
from streamconv.executor import FinishedFile
from streamconv.lockfile import locked_file
from streamconv.planned import MANIFEST
from streamconv.writer import fsync_directory

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def staging_path(target: Path) -> Path:
    """Return where the staging folder of ``target`` lies: beside it, or inside an existing one."""
    if target.is_dir() and _is_ours_to_fill(target):
        return target / ".streamconv"
    return target.parent / f".{target.name}.streamconv"


def _is_ours_to_fill(target: Path) -> bool:
    """Whether an existing folder is empty, or holds an unfinished run of ours inside it."""
    return (target / ".streamconv").is_dir() or not any(
        p.name != "lost+found" for p in target.iterdir()
    )


def check_target(target: Path, source: Path, side_dir: Path | None = None) -> None:
    """Refuse a target that would swallow its own source, or that is no folder.

    ``side_dir`` is where the side files come from: publishing into it would change the source.
    """
    if target.is_symlink() and not target.exists():
        raise UsageError(
            "the output is a link that leads nowhere",
            where=str(target),
            found=str(target.readlink()),
            hint="make the folder it leads to, or choose another",
        )
    if target.exists() and not target.is_dir():
        raise UsageError("the output is an existing file, not a folder", where=str(target))
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir():
        raise UsageError(
            "the output cannot lie in a file", where=str(target), found=f"{parent} is a file"
        )
    real_target = target.resolve()
    if source.resolve().is_relative_to(real_target):
        raise UsageError(
            "the output folder contains the source", where=str(target), hint="choose another folder"
        )
    if side_dir is None:
        return
    real_side = side_dir.resolve()
    if source.resolve().is_relative_to(real_side):
        return  # of a folder that holds the weights, too, single files are taken
    if real_side.is_relative_to(real_target) or real_target.is_relative_to(real_side):
        raise UsageError(
            "the output folder overlaps the one with config and tokenizer",
            where=str(target),
            found=str(side_dir),
            hint="choose another folder",
        )


@contextmanager
def locked(target: Path) -> Iterator[int]:
    """Hold the target's lock; yield the descriptor that every child process of the job inherits.

    Raises :class:`LockedError` where another process has it, or one that a dead run has left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.streamconv.lock"
    if not os.access(target.parent, os.W_OK) and target.is_dir():
        path = target / ".streamconv.lock"
    with locked_file(path, target) as fd:
        yield fd


class Staging:
    """The staging folder of one target, for one job.

    ``finished`` are the output files that are complete, by name; the digests of their tensors stay in
    the journal (:meth:`tensor_digests`), as a large model has many. ``crc_journal`` is what an earlier
    run knew of half-read records.
    """

    def __init__(self, target: Path, *, sync: bool) -> None:
        self.target = target
        self.root = staging_path(target)
        self.inside = self.root.parent == target
        self.files = self.root / "files"
        self.plan_path = self.root / "plan.jsonl"
        self._journal = self.root / "journal.jsonl"
        self._sync = sync
        self.finished: dict[str, FinishedFile] = {}
        self.crc_journal: list[list[Any]] = []
        self._lines: dict[str, int] = {}
        self._journal_nbytes = 0

    def begin(self) -> None:
        """Make the folder and read the journal of an earlier run, if there is one."""
        self.files.mkdir(parents=True, exist_ok=True)
        self._journal_nbytes = 0
        if not self._journal.exists():
            return
        with self._journal.open("rb") as stream:
            for line in stream:
                try:
                    data = json.loads(line)
                except ValueError:
                    break  # it was being written when the power went
                if not line.endswith(b"\n"):
                    break
                self._keep(FinishedFile(**data["file"]), len(line))
                self.crc_journal = data["records"]
        os.truncate(self._journal, self._journal_nbytes)

    def record(self, finished: FinishedFile, records: list[list[Any]]) -> None:
        """Journal a finished file (which is durable by now) and the half-read records."""
        line = json.dumps({"file": asdict(finished), "records": records}).encode() + b"\n"
        with self._journal.open("ab") as stream:
            stream.write(line)
            stream.flush()
            if self._sync:
                os.fsync(stream.fileno())
        self._keep(finished, len(line))

    def _keep(self, finished: FinishedFile, line_nbytes: int) -> None:
        self.finished[finished.name] = replace(finished, tensors={})
        self._lines[finished.name] = self._journal_nbytes
        self._journal_nbytes += line_nbytes

    def _journaled(self, name: str) -> dict[str, Any]:
        with self._journal.open("rb") as stream:
            stream.seek(self._lines[name])
            data: dict[str, Any] = json.loads(stream.readline())
        return data

    def tensor_digests(self, name: str) -> dict[str, str]:
        """Return the xxh3_128 of each tensor of a finished file."""
        return dict(self._journaled(name)["file"]["tensors"])

    def forget(self, name: str) -> None:
        """Take back a finished file whose bytes are not there any more, and all that came after it."""
        names = list(self.finished)
        before = names[: names.index(name)]
        self.crc_journal = self._journaled(before[-1])["records"] if before else []
        self._journal_nbytes = self._lines[name]
        os.truncate(self._journal, self._journal_nbytes)
        self.finished = {n: self.finished[n] for n in before}

    def half_done_bytes(self) -> int:
        """Return the size of what a stopped run left: it is written anew in the room that it takes."""
        finished = {self.files / name for name in self.finished}
        left = [*self.root.glob("*.part"), *self.files.rglob("*")]
        return sum(p.stat().st_size for p in left if p.is_file() and p not in finished)

    def discard(self) -> None:
        """Remove the staging folder and everything in it."""
        shutil.rmtree(self.root, ignore_errors=True)

    def locate(self, name: str) -> Path:
        """Return where a finished file lies; a run stopped while publishing has moved it already."""
        staged = self.files / name
        published = self.target / name
        return published if self.inside and not staged.exists() else staged

    def publish(self, *, last: str, overwrite: bool) -> None:
        """Make the output appear under its name; ``last`` is the file that makes it loadable."""
        if self._sync:
            fsync_directory(self.files)
        if self.inside:
            self._move_into_target(last)
        elif self.target.exists():
            if not overwrite:
                raise OutputExistsError(
                    "the output folder appeared meanwhile", where=str(self.target)
                )
            _exchange(self.files, self.target, self.root / "replaced")
        else:
            self.files.rename(self.target)
        if self._sync:
            fsync_directory(self.target.parent)
        self.discard()

    def _move_into_target(self, last: str) -> None:
        # File by file and not folder by folder: a run stopped here may have moved some of a folder.
        names = sorted(str(p.relative_to(self.files)) for p in self.files.rglob("*") if p.is_file())
        for name in sorted(names, key=lambda n: n == last):
            if name == last and self._sync:
                fsync_directory(self.target)
            (self.target / name).parent.mkdir(parents=True, exist_ok=True)
            (self.files / name).replace(self.target / name)
        if self._sync:
            fsync_directory(self.target)


def _exchange(new: Path, old: Path, aside: Path) -> None:
    """Swap two folders, atomically where the file system can; ``new`` then is the replaced one."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        done = libc.renameat2(
            _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE
        )
        if done == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))
    old.rename(aside)
    new.rename(old)


def may_be_replaced(target: Path) -> bool:
    """Whether ``--overwrite`` may remove an existing folder: only one that holds a model."""
    names = [p.name for p in target.iterdir()]
    # Many a project has a config.json; only together with weights is it a model.
    return MANIFEST in names or (
        "config.json" in names and any(n.endswith(".safetensors") for n in names)
    )
