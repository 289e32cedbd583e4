"""Staging: the output folder appears whole or not at all, and a stopped run can go on.

Beside the target ``DST`` a hidden folder holds everything until the end::

    .DST.streamconv/plan.jsonl       the plan that is being executed
    .DST.streamconv/journal.jsonl    whose plan it is, and what was chosen, sealed
    .DST.streamconv/done/NAME.json   one note per finished file, written after its fsync, sealed
    .DST.streamconv/files/…          the output as it will be
    .DST.streamconv.lock             held while a process plans, or publishes, or does all of it

:mod:`streamconv.output.publication` renames ``files`` to ``DST``. Where ``DST`` is an empty folder
already, or a mount point, the hidden folder lies inside it and the files are moved one by one. Names
that end in ``.safetensors`` exist only in ``files``: loaders glob.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamconv._version import __version__
from streamconv.errors import BadInputError, UsageError
from streamconv.files import newfile
from streamconv.files.filesystems import lies_in
from streamconv.files.lockfile import locked_file
from streamconv.files.userkey import Sealer, strong_digest, user_key
from streamconv.ir.planfile import Plan
from streamconv.output.journal import JOURNAL, Choices, Journal
from streamconv.output.publication import OldFile, Publication
from streamconv.storage.address import Address

PLAN = "plan.jsonl"


def staging_path(target: Path) -> Path:
    """Return where the staging folder of ``target`` lies: beside it, or inside an existing one.

    In a store, where nothing is renamed, what a folder holds of an unfinished run lies inside it.
    """
    beside = target.parent / f".{target.name}.streamconv"
    inside = target / ".streamconv"
    if isinstance(target, Address):
        return inside
    if not target.is_dir():
        return beside
    if inside.is_dir() or not _can_be_swapped(target):
        return inside
    empty = not any(p.name != "lost+found" for p in target.iterdir())
    return inside if empty and not beside.is_dir() else beside


def _can_be_swapped(target: Path) -> bool:
    """Whether a folder beside ``target`` can take its place: not where a volume is mounted on it."""
    same_disk = target.stat().st_dev == target.parent.stat().st_dev
    return same_disk and os.access(target.parent, os.W_OK)


def check_target(target: Path, source: Path, side_dir: Path | None = None) -> None:
    """Refuse a target that would swallow its own source, or that is not a folder.

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
    if lies_in(source, target):
        raise UsageError(
            "the output folder contains the source", where=str(target), hint="choose another folder"
        )
    if side_dir is None:
        return
    if lies_in(source, side_dir):
        return  # of a folder that holds the weights, too, single files are taken
    if lies_in(side_dir, target) or lies_in(target, side_dir):
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

    What is in it counts only where its journal, sealed with the user's key, is that of the plan beside
    it: such a folder may lie in the archive that a checkpoint came in.
    """

    def __init__(self, target: Path, *, sync: bool, root: Path | None = None) -> None:
        self.target = target
        self.root = staging_path(target) if root is None else root
        self.inside = self.root.parent == target
        self.files = self.root / "files"
        self.plan_path = self.root / PLAN
        # For this target and release: another one may plan the same job differently.
        self._sealer = Sealer(user_key(), __version__, str(target))
        self.seed = self._sealer.seed
        self.journal = Journal(self.root, self._sealer, sync=sync)
        self._sync = sync

    def begin(self) -> None:
        """Make the folder, which is not there; nobody else has business in it."""
        self.root.mkdir(mode=0o700)
        self.files.mkdir()

    def seal(self, plan: Plan, choices: Choices) -> None:
        """Begin the journal of the plan that lies in the folder by now; make its files' folders."""
        names = [o.name for o in plan.outputs()]
        for folder in {(self.files / name).parent for name in names}:
            folder.mkdir(parents=True, exist_ok=True)
        self.journal.begin(strong_digest(plan.fileno()), choices, names)

    def sealed_plan(self) -> Plan | None:
        """Return the plan of a run of this user for this target, its journal read; None without one."""
        if self.root.is_symlink() or not self.root.is_dir():
            return None
        fd = newfile.reopen(self.plan_path)
        if fd is None:
            return None
        if not self.journal.resume(strong_digest(fd)):
            os.close(fd)
            return None
        try:
            return Plan(self.plan_path, fd)
        except BadInputError:
            return None  # of a schema of its own

    def clear_unfinished(self) -> None:
        """Remove what a stopped run left unfinished: it is written anew, from nothing."""
        finished = {self.files / name for name in self.journal.notes}
        for path in [*self.root.rglob("*.part"), *self.files.rglob("*")]:
            if not path.is_dir() and path not in finished:
                path.unlink(missing_ok=True)

    def partial(self, name: str) -> Path:
        """Return where a process writes what will be the output's file ``name``; nobody else does."""
        return newfile.partial_name(self.root / name.replace("/", "-"))

    def exists(self) -> bool:
        """Whether anything is staged, whoever has staged it."""
        return os.path.lexists(self.root)

    def choose(self, choices: Choices) -> None:
        """Let what remains to be done be done with these choices."""
        self.journal.choose(choices)

    def is_finished(self, name: str) -> bool:
        """Whether the output's file ``name`` is finished and looks as it did then."""
        return name in self.journal.notes and self.journal.looks_finished(name, self.locate(name))

    def discard(self) -> None:
        """Remove the staging folder and everything in it.

        The journal, which says whose it is, goes last: of a run that is killed right here nothing
        looks foreign.
        """
        with contextlib.suppress(OSError):
            for path in self.root.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
            for path in self.root.iterdir():
                if path.name != JOURNAL:
                    path.unlink()
        shutil.rmtree(self.root, ignore_errors=True)

    def is_rest_of_ours(self) -> bool:
        """Whether there is what a run of this user leaves that is killed while it discards the rest."""
        names = {p.name for p in self.root.iterdir()} if self.root.is_dir() else {""}
        return not names or (names == {JOURNAL} and self.journal.is_ours())

    def locate(self, name: str) -> Path:
        """Return where a finished file lies."""
        return self.files / name

    def publish(self, *, last: str, old: tuple[OldFile, ...]) -> Path | None:
        """Make the output appear under its name; ``last`` is the file that makes it loadable.

        ``old`` is the former output there, which it replaces. Returns where that was kept, should
        something else have appeared in it meanwhile.
        """
        return Publication(self.root, self.target, last, old, self._sync).publish()
