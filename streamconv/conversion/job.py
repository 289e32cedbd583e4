"""One conversion from beginning to end: lock, preflight, plan, then its execution."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv.conversion.finished import missing_files, nothing_to_do, proven_output
from streamconv.errors import (
    BadInputError,
    BudgetError,
    NoSpaceError,
    OutputExistsError,
    StreamconvError,
)
from streamconv.files.durable import full_disk_told
from streamconv.files.filesystems import real_path
from streamconv.files.names import MANIFEST
from streamconv.files.newfile import replacing
from streamconv.ir.identity import JobIdentity, why_another
from streamconv.ir.planfile import Plan
from streamconv.ir.planned import SideFile
from streamconv.options import JobOptions, Phase, Result, RunOptions
from streamconv.output import publication
from streamconv.output.former import contents, former_output, is_empty, some
from streamconv.output.journal import Choices
from streamconv.output.manifest import read_manifest
from streamconv.output.publication import OldFile
from streamconv.output.staging import Staging, check_target, locked, staging_path
from streamconv.output.unfinished import discard_leftover, staged_plan
from streamconv.planning.child import make_plan
from streamconv.storage.address import Address, place
from streamconv.system import memory
from streamconv.units import format_size

if TYPE_CHECKING:
    from streamconv.conversion.execution import Execution

_COPY_BYTES = 1 << 20
# A plan, a journal, a manifest: no conversion writes less.
_LEAST_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class IdentifiedJob:
    """Which checkpoint a path means, and what makes its conversion this job and no other.

    ``side`` are the files beside the weights.
    """

    root: Path
    side_dir: Path | None
    side: tuple[SideFile, ...]
    identity: JobIdentity

    @property
    def digest(self) -> str:
        """Return what stands for all of the identity."""
        return self.identity.digest


def identify(src: Path, job: JobOptions) -> IdentifiedJob:
    """Return the identity of converting ``src``; cheap: no pickle is read and nothing is planned.

    Raises :class:`BadInputError` where there is no checkpoint, or one of its files is damaged.
    """
    # Not above: `run` needs none of it, and works in 64 MB.
    from streamconv import formats
    from streamconv.planning.inputs import Contents, identity_of
    from streamconv.planning.sidefiles import side_files

    location = formats.find_model(src, job.model)
    side_dir, side = side_files(location.root, location.side_dir, job)
    others = job.average.sources if job.average is not None else ()
    found = [location, *(formats.find_model(path, job.model) for path in others)]
    source, *averaged = [Contents(c.root, c.format, c.identify()) for c in found]
    identity = identity_of(source, side, job, averaged)
    return IdentifiedJob(location.root, side_dir, tuple(side), identity)


def refuse_others(dst: Path, job: JobIdentity, *, overwrite: bool) -> tuple[OldFile, ...]:
    """Return the files of a former output in ``dst``, which the job replaces.

    Raises :class:`OutputExistsError` where ``dst`` holds what it must not replace.
    """
    # What a stopped run has begun to put in its place, the next command finishes.
    if not dst.is_dir() or is_empty(dst):
        return ()
    if not isinstance(dst, Address) and publication.is_begun(staging_path(dst)):
        return ()
    if overwrite:
        return former_output(dst)
    ours = (dst / MANIFEST).is_symlink() or (dst / MANIFEST).exists()
    what, found = (
        _which_job(dst, job)
        if ours
        else ("the output folder is not empty and was not made by streamconv", contents(dst))
    )
    raise OutputExistsError(
        what,
        where=str(dst),
        found=some(found),
        hint="choose another folder, or replace it with --overwrite"
        if ours
        else "choose another folder, or move that away",
    )


def _which_job(dst: Path, job: JobIdentity) -> tuple[str, list[str]]:
    """Return in words whose output lies there, and which of its files are not as they should be."""
    try:
        manifest = read_manifest(dst, entries=False)
    except StreamconvError as error:
        return f"cannot tell which job wrote the output folder: {error.what}", []
    before: Mapping[str, Any] = manifest["job"] if manifest is not None else {}
    if manifest is not None and before.get("digest") == job.digest:
        return "the output folder is incomplete", missing_files(dst, manifest)
    return f"the output folder is {why_another(before, job)}", []


def convert(src: Path, dst: Path, job: JobOptions, run: RunOptions) -> Result:
    """Convert the checkpoint ``src`` into the folder ``dst``.

    Returns at once where the same job finished before. Raises the errors of :mod:`streamconv.errors`,
    each with its exit code; after any of them ``dst`` is as it was before.
    """
    with prepared(src, dst, job, run) as ready:
        return ready if isinstance(ready, Result) else ready.execute()


def run_plan(plan_path: Path, dst: Path, run: RunOptions) -> Result:
    """Execute a plan that was made before; nothing but the byte path is loaded."""
    with prepared_plan(plan_path, dst, run) as ready:
        return ready if isinstance(ready, Result) else ready.execute()


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is to be converted, and how its plan is made.

    ``others`` are folders that the output must not swallow either. ``plan_at`` makes the plan at a
    path, and hands a lock on to what it starts. ``planned`` is the digest of a plan that was made
    before; where there is none, planning takes memory and time of its own.
    """

    root: Path
    others: tuple[Path | None, ...]
    side: tuple[SideFile, ...]
    identity: JobIdentity
    plan_at: Callable[[Path, int | None], Plan]
    planned: str | None = None


@contextmanager
def prepared(
    src: Path, dst: Path, job: JobOptions, run: RunOptions
) -> Iterator[Execution | Result]:
    """Lock the output, plan, and yield what remains to be executed; a result where nothing does."""
    source = identify(src, job)
    budget = budget_bytes(run)

    def plan_at(path: Path, lock: int | None) -> Plan:
        run.on_event(Phase("plan"))
        return make_plan(
            src,
            job,
            path,
            asked=source.identity,
            max_mem_bytes=budget,
            lock=lock,
            cache=run.cache,
        )

    others = (source.side_dir, *job.folders)
    asked = _Asked(source.root, others, source.side, source.identity, plan_at)
    with _ready(dst, asked, run, budget) as ready:
        yield ready


@contextmanager
def prepared_plan(plan_path: Path, dst: Path, run: RunOptions) -> Iterator[Execution | Result]:
    """Do as :func:`prepared` with a plan that was made before."""
    plan = Plan(plan_path)
    root, side = place(plan.head.root), plan.head.side
    first = next(iter(side), None)
    side_dir = place(first.path.removesuffix(first.name)) if first else None

    def plan_at(path: Path, _lock: int | None) -> Plan:
        copy = _copied(plan, path)
        copy.find_sources(root, side)
        return copy

    identity = JobIdentity.from_json(plan.head.job)
    asked = _Asked(root, (side_dir,), side, identity, plan_at, plan.digest)
    with _ready(dst, asked, run, budget_bytes(run)) as ready:
        yield ready


def _ready(
    dst: Path, asked: _Asked, run: RunOptions, budget: int
) -> AbstractContextManager[Execution | Result]:
    if isinstance(dst, Address):
        return _in_store(dst, asked, run, budget)
    return _on_disk(output_path(dst, asked.root, *asked.others), asked, run, budget)


@contextmanager
def _on_disk(
    dst: Path, asked: _Asked, run: RunOptions, budget: int
) -> Iterator[Execution | Result]:
    with full_disk_told(dst), held(dst) as lock, memory.PeakMeter() as meter:

        def plan_at(path: Path) -> Plan:
            return asked.plan_at(path, lock)

        done, old = _preflight(dst, asked.identity, run, budget, plan_at)
        if done:
            yield done
            return
        staging = Staging(dst, sync=run.sync)
        plan = staged_plan(staging, asked.root, asked.identity, run, asked.planned)
        if plan is not None:
            plan.find_sources(asked.root, asked.side)
        elif asked.planned is not None:
            plan = _begun(staging, plan_at, run)
        else:
            # What the weights need, the plan says.
            refuse_full_disk(dst, sum(side.nbytes for side in asked.side))
            plan = _begun(staging, plan_at, run)
            if meter.peak_bytes > budget:
                plan.close()
                staging.discard()
                raise BudgetError(
                    "planning took more memory than the budget",
                    expected=f"at least {format_size(meter.peak_bytes * 1.02)}",
                    found=format_size(budget),
                    hint=f"--max-mem {meter.peak_bytes * 102 // 10**8 + 1}MB works",
                )
        # What moves bytes is loaded when the planning child and its memory are gone.
        from streamconv.conversion.execution import Execution

        yield Execution(plan, dst, run, budget, staging, meter, old)


def refuse_full_disk(dst: Path, nbytes: int) -> None:
    """Raise :class:`NoSpaceError` where ``dst`` has no room for ``nbytes`` and a plan."""
    needed = nbytes + _LEAST_BYTES
    above = next(p for p in (dst, *dst.parents) if p.exists())
    room = shutil.disk_usage(above).free
    if room < needed:
        raise NoSpaceError(
            "not enough disk space for the output",
            where=str(above),
            expected=f"more than {format_size(needed)}",
            found=f"{format_size(room)} free",
            hint="free some space, or choose an output folder on another disk",
        )


@contextmanager
def _in_store(
    dst: Address, asked: _Asked, run: RunOptions, budget: int
) -> Iterator[Execution | Result]:
    from streamconv.conversion.remote import (
        RemoteExecution,
        RemoteStaging,
        locked_target,
        refuse_overlap,
        scratch_folder,
        staged,
    )

    refuse_overlap(dst, asked.root, *asked.others)

    def plan_at(path: Path) -> Plan:
        return asked.plan_at(path, None)

    with locked_target(dst) as lease, memory.PeakMeter() as meter, scratch_folder() as scratch:
        done = proven_output(dst, asked.identity.digest, run, budget, plan_at)
        staging = RemoteStaging(dst, scratch, lease)
        if done is not None:
            staging.discard()
            yield nothing_to_do(dst, done)
            return
        plan = staged(staging, asked.root, asked.identity, run, asked.planned)
        if plan is not None:
            plan.find_sources(asked.root, asked.side)
            old: tuple[OldFile, ...] = ()
        else:
            old = refuse_others(dst, asked.identity, overwrite=run.overwrite)
            plan = plan_at(staging.plan_path)
            staging.seal(plan, Choices.of(run))
        execution = RemoteExecution(plan, dst, run, budget, staging, meter, old)
        execution.begin_in_store()
        yield execution


def _begun(staging: Staging, plan_at: Callable[[Path], Plan], run: RunOptions) -> Plan:
    """Make the staging folder and the plan in it."""
    staging.begin()
    try:
        plan = plan_at(staging.plan_path)
    except BaseException:
        staging.discard()
        raise
    staging.seal(plan, Choices.of(run))
    return plan


def _copied(plan: Plan, path: Path) -> Plan:
    """Return a copy of our own at ``path``: whoever writes to the plan's file does not write to it."""
    with replacing(path) as fd:
        at = 0
        while sent := os.sendfile(fd, plan.fileno(), at, _COPY_BYTES):
            at += sent
        os.fsync(fd)
    copy = Plan(path)
    if copy.digest != plan.digest or copy.head != plan.head:
        raise BadInputError(
            "the plan changed while it was read",
            where=str(plan.path),
            hint="run it again when nobody writes to it",
        )
    return copy


def budget_bytes(run: RunOptions) -> int:
    """Return the budget of a run: what was given, or what the machine can give."""
    return memory.available_bytes()[0] if run.max_mem_bytes is None else run.max_mem_bytes


@contextmanager
def held(dst: Path) -> Iterator[int | None]:
    """Hold the lock of an output; where nobody of us can write there is none, and it may be done."""
    if dst.is_dir() and not any(os.access(f, os.W_OK | os.X_OK) for f in (dst, dst.parent)):
        yield None
    else:
        with locked(dst) as lock:
            yield lock


def _refuse_unwritable(dst: Path) -> None:
    """Raise before hours of work what would be raised after them, where ``dst`` is another's."""
    if dst.is_dir() and not os.access(dst, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "the output folder cannot be written to", str(dst))


def output_path(dst: Path, source: Path, *others: Path | None) -> Path:
    """Return where an output lies really; raises :class:`UsageError` for one that holds its source."""
    dst = dst.absolute()
    for other in {None, *others}:
        check_target(dst, source, other)
    # A link to a folder on another disk stays one: what it leads to is made and replaced.
    return real_path(dst)


def _preflight(
    dst: Path,
    job: JobIdentity,
    run: RunOptions,
    budget: int,
    plan_at: Callable[[Path], Plan],
) -> tuple[Result | None, tuple[OldFile, ...]]:
    """Return a result where there is nothing to do, and the former output that is to be replaced."""
    digest = job.digest
    publication.finish(staging_path(dst), dst, sync=run.sync)
    done = proven_output(dst, digest, run, budget, plan_at)
    if done is not None:
        discard_leftover(dst, digest)
        return nothing_to_do(dst, done), ()
    old = refuse_others(dst, job, overwrite=run.overwrite)
    _refuse_unwritable(dst)
    return None, old
