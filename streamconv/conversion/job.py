"""One conversion from beginning to end: lock, plan, preflight, stream, check, publish."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from streamconv.conversion.finished import missing_files, proven_output
from streamconv.errors import (
    BadInputError,
    BudgetError,
    DamagedPlanError,
    NoSpaceError,
    OutputExistsError,
    SourceChangedError,
    StreamconvError,
    UnfitValuesError,
)
from streamconv.executor import budget as budgets
from streamconv.executor.pipeline import WindowFiller, write_output
from streamconv.executor.reader import SourceReader
from streamconv.executor.records import RecordChecks
from streamconv.executor.writer import DIRECT_BYTES
from streamconv.files.durable import hash_file, no_space, write_text
from streamconv.files.filesystems import real_path
from streamconv.files.names import MANIFEST
from streamconv.files.namesakes import refuse_folded
from streamconv.files.newfile import replacing
from streamconv.ir.identity import JobIdentity, job_identity, why_another
from streamconv.ir.planfile import Plan
from streamconv.ir.planned import OutputFile, PlannedTensor, SideFile
from streamconv.options import JobOptions, Phase, Progress, Result, RunOptions
from streamconv.output import publication
from streamconv.output.former import contents, former_output, is_empty, refuse_more, some
from streamconv.output.manifest import read_manifest, write_manifest
from streamconv.output.publication import OldFile
from streamconv.output.staging import Staging, check_target, locked, staging_path
from streamconv.output.unfinished import discard_leftover, staged_plan
from streamconv.planning.child import make_plan
from streamconv.system import memory
from streamconv.units import format_size

_COPY_BYTES = 1 << 20


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
    from streamconv.lora.plan import adapter_inputs
    from streamconv.planning.build import side_files

    location = formats.find_model(src, job.model)
    side_dir, side = side_files(location.root, location.side_dir, job)
    inputs = [*formats.settings(location.root), *adapter_inputs(location.root, job.lora)]
    identity = job_identity(location.format, location.identify(), side, job, inputs)
    return IdentifiedJob(location.root, side_dir, tuple(side), identity)


def refuse_others(dst: Path, job: JobIdentity, *, overwrite: bool) -> tuple[OldFile, ...]:
    """Return the files of a former output in ``dst``, which the job replaces.

    Raises :class:`OutputExistsError` where ``dst`` holds what it must not replace.
    """
    # What a stopped run has begun to put in its place, the next command finishes.
    if not dst.is_dir() or is_empty(dst) or publication.is_begun(staging_path(dst)):
        return ()
    if overwrite:
        return former_output(dst)
    ours = os.path.lexists(dst / MANIFEST)
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
    source = identify(src, job)
    budget = _budget_bytes(run)
    dst = _target(dst, source.root, source.side_dir, job.lora.base)
    with _full_disk_told(dst), _locked(dst) as lock, memory.PeakMeter() as meter:

        def plan_at(path: Path) -> Plan:
            run.on_event(Phase("plan"))
            return make_plan(src, job, path, asked=source.identity, max_mem_bytes=budget, lock=lock)

        done, old = _preflight(dst, source.identity, run, budget, plan_at)
        if done:
            return done
        staging = Staging(dst, sync=run.sync)
        plan = staged_plan(staging, source.root, source.identity, run)
        if plan is not None:
            plan.find_sources(source.root, source.side)
        else:
            staging.begin()
            try:
                plan = plan_at(staging.plan_path)
            except BaseException:
                staging.discard()
                raise
            staging.seal(plan)
            if meter.peak_bytes > budget:
                plan.close()
                staging.discard()
                raise BudgetError(
                    "planning took more memory than the budget",
                    expected=f"at least {format_size(meter.peak_bytes * 1.02)}",
                    found=format_size(budget),
                    hint=f"--max-mem {meter.peak_bytes * 102 // 10**8 + 1}MB works",
                )
        return _Conversion(plan, dst, run, budget, staging, meter, old).execute()


def run_plan(plan_path: Path, dst: Path, run: RunOptions) -> Result:
    """Execute a plan that was made before; nothing but the byte path is loaded."""
    plan = Plan(plan_path)
    budget = _budget_bytes(run)
    first = next(iter(plan.head.side), None)
    side_dir = Path(first.path.removesuffix(first.name)) if first else None
    dst = _target(dst, Path(plan.head.root), side_dir)
    with _full_disk_told(dst), _locked(dst), memory.PeakMeter() as meter:
        job = JobIdentity.from_json(plan.head.job)
        root, side = Path(plan.head.root), plan.head.side

        def plan_at(path: Path) -> Plan:
            copy = _copied(plan, path)
            copy.find_sources(root, side)
            return copy

        done, old = _preflight(dst, job, run, budget, plan_at)
        if done:
            return done
        staging = Staging(dst, sync=run.sync)
        staged = staged_plan(staging, root, job, run, plan.digest)
        if staged is None:
            staging.begin()
            try:
                staged = plan_at(staging.plan_path)
            except BaseException:
                staging.discard()
                raise
            staging.seal(staged)
        else:
            staged.find_sources(root, side)
        return _Conversion(staged, dst, run, budget, staging, meter, old).execute()


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


def _budget_bytes(run: RunOptions) -> int:
    return memory.available_bytes()[0] if run.max_mem_bytes is None else run.max_mem_bytes


@contextmanager
def _full_disk_told(dst: Path) -> Iterator[None]:
    """Turn a full disk into its error wherever it strikes: lock, plan, journal, manifest."""
    try:
        yield
    except OSError as error:
        raise no_space(error, dst) or error from error


@contextmanager
def _locked(dst: Path) -> Iterator[int | None]:
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


def _target(dst: Path, source: Path, *others: Path | None) -> Path:
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
        files = done["files"]
        result = Result(
            "nothing-to-do",
            dst,
            write_bytes=sum(f["nbytes"] for f in files),
            files=len(files),
            tensors=len(done["tensors"]),
        )
        return result, ()
    old = refuse_others(dst, job, overwrite=run.overwrite)
    _refuse_unwritable(dst)
    return None, old


@dataclass
class _Conversion:
    """The executing part: everything is known, bytes move."""

    plan: Plan
    dst: Path
    run: RunOptions
    budget: int
    staging: Staging
    meter: memory.PeakMeter
    old: tuple[OldFile, ...]

    def execute(self) -> Result:
        """Stream every output file, then publish."""
        try:
            with _full_disk_told(self.dst):
                return self._execute()
        except (DamagedPlanError, SourceChangedError, UnfitValuesError):
            # Nobody can go on with this plan: what it speaks of is gone, or is not fit for it.
            self._discard()
            raise
        except BudgetError:
            # Before the first byte: what an earlier run finished is kept for a larger budget.
            if not self.staging.journal.finished:
                self._discard()
            raise
        except NoSpaceError as error:
            if error.expected is None:  # it filled up on the way
                needed, room = self._disk()
                error.expected = f"{format_size(needed)} for what is not yet written"
                error.found = f"{format_size(room)} free"
            raise

    def _execute(self) -> Result:
        run, head = self.run, self.plan.head
        started = time.monotonic()
        self.staging.clear_unfinished()
        outputs = self.plan.outputs()
        sorts = (outputs, head.side, head.written)
        refuse_folded(self.staging.root, [MANIFEST, *(f.name for sort in sorts for f in sort)])
        max_window, factors = budgets.shares(
            self.budget,
            merging=bool(head.totals.merged),
            tensors=max((o.tensors for o in outputs), default=0),
            io_threads=run.io_threads,
            buffer_bytes=DIRECT_BYTES if run.direct else 0,
        )
        reused = self._check_finished(outputs)
        self._check_disk()
        verifiable = run.source_crc and not head.totals.unverifiable_bytes
        with SourceReader(
            Path(head.root), head.files, drop_cache=run.sync, strict_mtime=not verifiable
        ) as reader:
            checks = RecordChecks(reader, check_crc=run.source_crc)
            checks.restore(self.staging.journal.records)
            filler = WindowFiller(
                reader,
                checks,
                max_bytes=max_window,
                io_threads=run.io_threads,
                factor_bytes=factors,
            )
            try:
                run.on_event(Phase("write"))
                progress = _Progress(self, sum(o.nbytes for o in outputs), reused, started)
                for output, tensors in self.plan.sections():
                    if output.name not in self.staging.journal.finished:
                        self._write(output, tensors, filler, checks, progress)
                side = list(self._side_files())
                reader.check_unchanged()
            finally:
                filler.close()
            read_bytes = reader.read_bytes
        run.on_event(Phase("publish"))
        result = Result(
            "done",
            self.dst,
            seconds=time.monotonic() - started,
            read_bytes=read_bytes,
            write_bytes=sum(o.nbytes for o in outputs) + sum(n for _, n, _ in side),
            reused_bytes=reused,
            peak_bytes=self.meter.peak_bytes,
            budget_bytes=self.budget,
            files=len(outputs) + len(side),
            tensors=head.totals.tensors,
            unverifiable_bytes=checks.unverifiable_bytes,
            notices=head.notices,
        )
        write_manifest(
            self.staging.files / MANIFEST,
            self.plan,
            [self.staging.journal.finished[o.name] for o in outputs],
            self.staging.journal.tensor_digests,
            side,
            {
                "seconds": round(result.seconds, 3),
                "peak_bytes": result.peak_bytes,
                "budget_bytes": self.budget,
                "read_bytes": read_bytes,
                "source": head.root,
            },
            sync=run.sync,
        )
        kept = self._publish(outputs)
        if kept is not None:
            notice = f"what appeared in the old output meanwhile is in {kept}"
            result = replace(result, notices=(*result.notices, notice))
        return replace(result, peak_bytes=self.meter.peak_bytes)

    def _check_finished(self, outputs: list[OutputFile]) -> int:
        """Check the files of an earlier run by their digests; return the bytes that need no work."""
        good = 0
        journal = self.staging.journal
        if journal.finished:
            self.run.on_event(Phase("resume"))
        for output in outputs:
            if output.name not in journal.finished:
                continue
            if journal.holds(output.name, self.staging.locate(output.name)):
                good += output.nbytes
            else:
                journal.forget(output.name)
        return good

    def _check_disk(self) -> None:
        needed, room = self._disk()
        if room < needed:
            if not self.staging.journal.finished:
                self._discard()
            raise NoSpaceError(
                "not enough disk space for the output",
                where=str(self.staging.root.parent),
                expected=format_size(needed),
                found=f"{format_size(room)} free",
            )

    def _disk(self) -> tuple[int, int]:
        """Return the bytes that are still to be written, and the room that there is for them."""
        free = shutil.disk_usage(self.staging.root).free
        return self.plan.disk_bytes(
            done=self.staging.journal.finished
        ), free + self.staging.half_done_bytes()

    def _write(
        self,
        output: OutputFile,
        tensors: Iterable[PlannedTensor],
        filler: WindowFiller,
        checks: RecordChecks,
        progress: _Progress,
    ) -> None:
        partial = self.staging.root / f"{output.name}.part"
        partial.parent.mkdir(parents=True, exist_ok=True)
        (self.staging.files / output.name).parent.mkdir(parents=True, exist_ok=True)
        before = progress.done
        finished = write_output(
            output,
            tensors,
            partial,
            filler,
            checks,
            sync=self.run.sync,
            sha256=self.run.sha256,
            direct=self.run.direct,
            seed=self.staging.seed,
            on_bytes=lambda n: progress.add(n, output.name),
        )
        progress.add(output.nbytes - (progress.done - before), output.name)  # the header
        partial.replace(self.staging.files / output.name)
        self.staging.journal.record(finished, checks.journal())

    def _side_files(self) -> Iterable[tuple[str, int, str]]:
        """Copy and write the files beside the weights; yield name, bytes and digest of each."""
        for side in self.plan.head.side:
            target = self.staging.files / side.name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                copied = _copy(Path(side.path), target, sync=self.run.sync)
            except FileNotFoundError as error:
                raise SourceChangedError("a side file vanished", where=side.path) from error
            if copied != side.xxh3:
                raise SourceChangedError("a side file changed meanwhile", where=side.path)
            yield side.name, side.nbytes, side.xxh3
        for written in self.plan.head.written:
            path = self.staging.files / written.name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, self.plan.content(written.name), sync=self.run.sync)
            yield written.name, written.nbytes, hash_file(path)

    def _publish(self, outputs: list[OutputFile]) -> Path | None:
        index = [w.name for w in self.plan.head.written if w.name.endswith(".index.json")]
        if self.dst.is_dir() and not is_empty(self.dst):
            refuse_more(self.dst, self.old)  # hours may have passed
        last = index[0] if index else outputs[-1].name
        kept = self.staging.publish(last=last, old=self.old)
        self._discard()
        return kept

    def _discard(self) -> None:
        # NFS and FUSE keep what is open under another name, and so the folder that it lies in.
        self.plan.close()
        self.staging.discard()


class _Progress:
    """Counts output bytes and tells the listener now and then."""

    _EVERY_SECONDS = 0.2

    def __init__(self, job: _Conversion, total: int, done: int, started: float) -> None:
        self._job = job
        self._total = total
        self._reused = done
        self.done = done
        self._started = started
        self._told = 0.0

    def add(self, nbytes: int, file: str) -> None:
        if self._job.run.cancel is not None:
            self._job.run.cancel.check()
        self.done += nbytes
        now = time.monotonic()
        if now - self._told < self._EVERY_SECONDS and self.done < self._total:
            return
        self._told = now
        self._job.run.on_event(
            Progress(
                done_bytes=min(self.done, self._total),
                total_bytes=self._total,
                reused_bytes=self._reused,
                seconds=now - self._started,
                memory_bytes=self._job.meter.now_bytes,
                budget_bytes=self._job.budget,
                file=file,
            )
        )


def _copy(source: Path, target: Path, *, sync: bool) -> str:
    """Copy a file in small steps (a tokenizer of a gigabyte must not need one); return its xxh3_128."""
    digest = xxhash.xxh3_128()
    # Of a pipe that took the file's place nothing is waited for.
    read = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with target.open("wb") as write:
            while piece := os.read(read, _COPY_BYTES):
                digest.update(piece)
                write.write(piece)
            write.flush()
            if sync:
                os.fsync(write.fileno())
    finally:
        os.close(read)
    return digest.hexdigest()
