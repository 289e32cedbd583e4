"""The executing part of a conversion: everything is known, bytes move.

All of it in one process (:meth:`Execution.execute`), or some of the output files in each of several
(:meth:`Execution.write_files`) and the rest of it in the last (:meth:`Execution.publish_parts`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from streamconv.errors import (
    BadInputError,
    BudgetError,
    DamagedPlanError,
    NoSpaceError,
    SourceChangedError,
    UnfitValuesError,
)
from streamconv.executor import budget as budgets
from streamconv.executor.pipeline import WindowFiller, write_output
from streamconv.executor.reader import Source
from streamconv.executor.records import RecordChecks, SharedRecords
from streamconv.executor.remote import open_source
from streamconv.executor.windows import Ahead
from streamconv.executor.writer import DIRECT_BYTES
from streamconv.files.durable import full_disk_told, hash_file, write_text
from streamconv.files.inputs import opened
from streamconv.files.names import MANIFEST
from streamconv.files.namesakes import refuse_folded
from streamconv.ir.finished import FinishedFile
from streamconv.ir.planfile import Plan
from streamconv.ir.planned import OutputFile, PlannedTensor
from streamconv.options import Phase, Progress, Result, RunOptions
from streamconv.output.former import is_empty, refuse_more
from streamconv.output.journal import FileNote
from streamconv.output.manifest import write_manifest
from streamconv.output.publication import OldFile
from streamconv.output.staging import Staging
from streamconv.storage.address import Address, place
from streamconv.system import memory
from streamconv.units import format_size

_COPY_BYTES = 1 << 20


@dataclass
class Stream:
    """What moves bytes: a reader of the source, the checks of what it reads, and windows."""

    reader: Source
    checks: RecordChecks
    filler: WindowFiller


@dataclass
class Execution:
    """A plan that is executed into a staging folder, whose journal says what is done already.

    ``old`` is the former output that is to be replaced.
    """

    plan: Plan
    dst: Path
    run: RunOptions
    budget: int
    staging: Staging
    meter: memory.PeakMeter
    old: tuple[OldFile, ...] = ()
    started: float = field(default_factory=time.monotonic)

    def execute(self) -> Result:
        """Stream every output file, then publish."""
        try:
            with self._telling():
                outputs = self._begin()
                reused = self._check_finished(outputs)
                self.check_disk()
                todo = [o for o in outputs if o.name not in self.staging.journal.notes]
                total = sum(o.nbytes for o in outputs)
                with self._streaming(outputs) as stream:
                    self._write_all(todo, stream, Progressing(self, total, reused))
                    return self._complete(stream, outputs, reused)
        except (DamagedPlanError, SourceChangedError, UnfitValuesError):
            # Nobody can go on with this plan: what it speaks of is gone, or is not fit for it.
            self._discard()
            raise
        except BudgetError:
            # Before the first byte: what an earlier run finished is kept for a larger budget.
            if not self.staging.journal.notes:
                self._discard()
            raise

    def write_files(self, outputs: Sequence[OutputFile]) -> int:
        """Write some of the output's files and return the bytes that were read for it.

        Other processes may write others at the same time, or the same ones: whatever fails here,
        nothing of theirs is removed.
        """
        with self._telling(), self._streaming(outputs) as stream:
            progress = Progressing(self, sum(o.nbytes for o in outputs), 0)
            self._write_all(outputs, stream, progress)
            stream.reader.check_unchanged()
            return stream.reader.read_bytes

    def publish_parts(self) -> Result:
        """Publish what several processes have written: every output file is finished by now."""
        with self._telling():
            outputs = self._begin()
            notes = [*self.staging.journal.notes.values()]
            with self._streaming(()) as stream:
                return self._complete(stream, outputs, 0, notes)

    def _begin(self) -> list[OutputFile]:
        self.staging.clear_unfinished()
        outputs, head = self.plan.outputs(), self.plan.head
        sorts = (outputs, head.side, head.written)
        refuse_folded(self.staging.root, [MANIFEST, *(f.name for sort in sorts for f in sort)])
        return outputs

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell of a full disk what is needed, and what there is."""
        try:
            with full_disk_told(self.dst):
                yield
        except NoSpaceError as error:
            if error.expected is None:  # it filled up on the way
                needed, room = self._disk()
                error.expected = f"{format_size(needed)} for what is not yet written"
                error.found = f"{format_size(room)} free"
            raise

    @contextmanager
    def _streaming(self, outputs: Iterable[OutputFile]) -> Iterator[Stream]:
        run, head = self.run, self.plan.head
        root = place(head.root)
        max_window, factors, ahead = self._shares(root, outputs)
        verifiable = run.source_crc and not head.totals.unverifiable_bytes
        with open_source(
            root, head.files, drop_cache=run.sync, strict_mtime=not verifiable
        ) as reader:
            checks = RecordChecks(reader, check_crc=run.source_crc)
            filler = WindowFiller(
                reader,
                checks,
                max_bytes=max_window,
                io_threads=run.io_threads,
                factor_bytes=factors,
                ahead=ahead,
            )
            try:
                yield Stream(reader, checks, filler)
            finally:
                filler.close()

    def _shares(self, root: Path, outputs: Iterable[OutputFile]) -> tuple[int, int, Ahead | None]:
        """Return how large windows and what is held of factors may be, and how a store is read."""
        run = self.run
        totals = self.plan.head.totals
        tensors = max((o.tensors for o in outputs), default=0)
        buffer_bytes = self._writing_bytes()
        if isinstance(root, Address):
            _ = root.bucket  # its client is loaded before what is left is shared out
            return budgets.remote_shares(
                self.budget,
                totals,
                tensors,
                most_requests=run.io_threads if run.io_threads > 1 else None,
                buffer_bytes=buffer_bytes,
            )
        window, factors = budgets.shares(
            self.budget,
            totals,
            tensors,
            io_threads=run.io_threads,
            buffer_bytes=buffer_bytes,
        )
        return window, factors, None

    def _writing_bytes(self) -> int:
        """Return the memory that writing takes beside windows."""
        return DIRECT_BYTES if self.run.direct else 0

    def _write_all(
        self, outputs: Iterable[OutputFile], stream: Stream, progress: Progressing
    ) -> None:
        self.run.on_event(Phase("write"))
        names = {o.name for o in outputs}
        for output, tensors in self.plan.sections():
            if output.name in names:
                self._write(output, tensors, stream, progress)

    def _check_finished(self, outputs: list[OutputFile]) -> int:
        """Check the files of an earlier run by their digests; return the bytes that need no work."""
        good = 0
        journal = self.staging.journal
        if journal.notes:
            self.run.on_event(Phase("resume"))
        for output in outputs:
            if output.name not in journal.notes:
                continue
            if journal.holds(output.name, self.staging.locate(output.name)):
                good += output.nbytes
            else:
                journal.forget(output.name)
        return good

    def check_disk(self) -> None:
        """Raise :class:`NoSpaceError` where what is not yet written does not fit on the disk."""
        needed, room = self._disk()
        if room < needed:
            if not self.staging.journal.notes:
                self._discard()
            raise NoSpaceError(
                "not enough disk space for the output",
                where=str(self.staging.root.parent),
                expected=format_size(needed),
                found=f"{format_size(room)} free",
                hint="free some space, or choose an output folder on another disk",
            )

    def _disk(self) -> tuple[int, int]:
        """Return the bytes that are still to be written, and the room that there is for them."""
        free = shutil.disk_usage(self.staging.root).free
        return self.plan.disk_bytes(done=self.staging.journal.notes), free

    def _write(
        self,
        output: OutputFile,
        tensors: Iterable[PlannedTensor],
        stream: Stream,
        progress: Progressing,
    ) -> None:
        before, read_before = progress.done, stream.reader.read_bytes
        unverifiable_before = stream.checks.unverifiable_bytes
        started = time.monotonic()
        stream.checks.begin(output.shared)
        finished, version = self._put(
            output, tensors, stream, lambda n: progress.add(n, output.name)
        )
        progress.add(output.nbytes - (progress.done - before), output.name)  # the header
        self.staging.journal.record(
            finished,
            self.staging.locate(output.name),
            stream.checks.shared() if self.run.source_crc else (),
            read_bytes=stream.reader.read_bytes - read_before,
            unverifiable_bytes=stream.checks.unverifiable_bytes - unverifiable_before,
            seconds=time.monotonic() - started,
            peak_bytes=self.meter.peak_bytes,
            version=version,
        )

    def _put(
        self,
        output: OutputFile,
        tensors: Iterable[PlannedTensor],
        stream: Stream,
        on_bytes: Callable[[int], None],
    ) -> tuple[FinishedFile, str]:
        """Make an output file appear, whole; return its digests and, in a store, its version."""
        partial = self.staging.partial(output.name)
        try:
            finished = write_output(
                output,
                tensors,
                partial,
                stream.filler,
                stream.checks,
                sync=self.run.sync,
                sha256=self.run.sha256,
                direct=self.run.direct,
                seed=self.staging.seed,
                on_bytes=on_bytes,
            )
            partial.replace(self.staging.locate(output.name))
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        return finished, ""

    def _complete(
        self,
        stream: Stream,
        outputs: list[OutputFile],
        reused: int,
        parts: Sequence[FileNote] = (),
    ) -> Result:
        """Judge what several files drew from, write side files and manifest, and publish.

        ``parts`` are the files that other processes have written: what that took counts, too.
        """
        run, head, journal, reader = self.run, self.plan.head, self.staging.journal, stream.reader
        unverifiable = stream.checks.unverifiable_bytes
        if run.source_crc:
            shared = SharedRecords(reader)
            for output in outputs:
                shared.add(journal.shared(output.name))
            unverifiable += shared.settle()
        side = list(self._side_files())
        reader.check_unchanged()
        run.on_event(Phase("publish"))
        result = Result(
            "done",
            self.dst,
            seconds=time.monotonic() - self.started + sum(p.seconds for p in parts),
            read_bytes=reader.read_bytes + sum(p.read_bytes for p in parts),
            write_bytes=sum(o.nbytes for o in outputs) + sum(n for _, n, _ in side),
            reused_bytes=reused,
            peak_bytes=max([self.meter.peak_bytes, *(p.peak_bytes for p in parts)]),
            budget_bytes=self.budget,
            files=len(outputs) + len(side),
            tensors=head.totals.tensors,
            unverifiable_bytes=unverifiable + sum(p.unverifiable_bytes for p in parts),
            notices=head.notices,
        )
        write_manifest(
            self.staging.files / MANIFEST,
            self.plan,
            [journal.notes[o.name].finished for o in outputs],
            journal.tensor_digests,
            side,
            {
                "seconds": round(result.seconds, 3),
                "peak_bytes": result.peak_bytes,
                "budget_bytes": self.budget,
                "read_bytes": result.read_bytes,
                "source": head.root,
            },
            sync=run.sync,
        )
        kept = self._publish(outputs)
        if kept is not None:
            notice = f"what appeared in the old output meanwhile is in {kept}"
            result = replace(result, notices=(*result.notices, notice))
        return replace(result, peak_bytes=max(result.peak_bytes, self.meter.peak_bytes))

    def _side_files(self) -> Iterable[tuple[str, int, str]]:
        """Copy and write the files beside the weights; yield name, bytes and digest of each."""
        for side in self.plan.head.side:
            target = self.staging.files / side.name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                copied = _copy(place(side.path), target, sync=self.run.sync)
            except BadInputError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
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


class Progressing:
    """Counts output bytes and tells the listener now and then."""

    _EVERY_SECONDS = 0.2

    def __init__(self, job: Execution, total: int, done: int) -> None:
        self._job = job
        self._total = total
        self._reused = done
        self.done = done
        self._told = 0.0

    def add(self, nbytes: int, file: str) -> None:
        """Count bytes of a file; the listener hears of them now and then."""
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
                seconds=now - self._job.started,
                memory_bytes=self._job.meter.now_bytes,
                budget_bytes=self._job.budget,
                file=file,
            )
        )


def _copy(source: Path, target: Path, *, sync: bool) -> str:
    """Copy a file in small steps (a tokenizer of a gigabyte must not need one); return its xxh3_128."""
    digest = xxhash.xxh3_128()
    with opened(source) as read, target.open("wb") as write:
        at = 0
        while piece := read.pread(_COPY_BYTES, at):
            digest.update(piece)
            write.write(piece)
            at += len(piece)
        write.flush()
        if sync:
            os.fsync(write.fileno())
    return digest.hexdigest()
