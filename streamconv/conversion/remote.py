"""A conversion into an object store: whole or absent, without a rename.

Stores have none: every object appears under its final name, whole, when its upload ends. So what makes
the output an output comes last, and what is known of an unfinished one lies beside it::

    DST/.streamconv/lock               held while a process works on DST (storage.lease)
    DST/.streamconv/plan.jsonl         the plan that is being executed
    DST/.streamconv/journal.jsonl      as on a disk, sealed with the user's key
    DST/.streamconv/former.json        what of a former output is to be deleted first
    DST/.streamconv/done/NAME.json     the note of a finished file, with the version of its object
    DST/model-00001-of-….safetensors   the weights, then
    DST/config.json, tokenizer …       what lies beside them, then
    DST/model.safetensors.index.json   without which no loader starts, and
    DST/streamconv.json                at last

The journal is kept in a folder of this machine meanwhile, and each note is copied to the store as
it is made: whoever goes on, here or elsewhere, begins with what is there. No weights are kept here.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from streamconv.conversion.execution import Execution, Progressing, Stream
from streamconv.errors import OutputExistsError, StreamconvError, UsageError
from streamconv.executor.pipeline import write_output
from streamconv.executor.writer import MIN_PART_BYTES, upload_share
from streamconv.files.names import MANIFEST
from streamconv.ir.finished import FinishedFile
from streamconv.ir.identity import JobIdentity
from streamconv.ir.planfile import Plan
from streamconv.ir.planned import OutputFile, PlannedTensor
from streamconv.options import Result, RunOptions
from streamconv.output.journal import DONE, FORMER, JOURNAL, Choices
from streamconv.output.publication import CONFIGS
from streamconv.output.staging import PLAN, Staging, staging_path
from streamconv.output.unfinished import goes_on
from streamconv.storage.address import Address
from streamconv.storage.buckets import forget
from streamconv.storage.lease import Lease, held
from streamconv.storage.objects import READ_ONLY, Found

_LOCK = "lock"
_OLD = "old"
# Larger files beside the weights are uploaded in parts.
_SMALL_BYTES = 8 << 20


def work_folder(target: Address) -> Address:
    """Return where lies what is known of an unfinished output."""
    return target / staging_path(target).name


class Guard(Protocol):
    """What says that this process may go on writing into an output."""

    def check(self) -> None:
        """Raise where it may not."""


class Standing:
    """The guard of a part: what was begun stands as it did when the part looked first."""

    def __init__(self, target: Address) -> None:
        self._journal = work_folder(target) / JOURNAL
        try:
            self._version = self._journal.bucket.look(self._journal.key).version
        except FileNotFoundError:
            self._version = ""

    def check(self) -> None:
        """Raise ``FileNotFoundError`` where it is finished, or another one's by now."""
        found = self._journal.bucket.look(self._journal.key)
        if found.version != self._version:
            raise FileNotFoundError(errno.ENOENT, "another run was begun", str(self._journal))


class RemoteStaging(Staging):
    """What is known of an unfinished output in a store; its journal lies in the folder ``scratch``."""

    def __init__(self, target: Address, scratch: Path, guard: Guard) -> None:
        super().__init__(target, sync=False, root=scratch)
        self.address = target
        self._names: frozenset[str] = frozenset()
        self.work = work_folder(target)
        self.guard = guard
        self.was_begun = False

    def fetch(self) -> None:
        """Bring what a stopped run has left in the store into the folder."""
        bucket = self.work.bucket
        self.was_begun = False
        for name, found in bucket.below(self.work.key).items():
            known = name in (PLAN, JOURNAL, FORMER) or (
                name.startswith(f"{DONE}/") and ".." not in name
            )
            self.was_begun |= name == JOURNAL
            if known:
                path = self.root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(
                    bucket.get(f"{self.work.key}/{name}", 0, found.nbytes, found.version)
                )

    def seal(self, plan: Plan, choices: Choices) -> None:
        """Begin the journal of the plan that lies in the folder by now."""
        self._names = frozenset(o.name for o in plan.outputs())
        super().seal(plan, choices)

    def sealed_plan(self) -> Plan | None:
        """Return the plan of a run of this user for this target; None without one."""
        plan = super().sealed_plan()
        if plan is not None:
            self._names = frozenset(o.name for o in plan.outputs())
            for name in self._names:
                self.journal.note_path(name).parent.mkdir(parents=True, exist_ok=True)
        return plan

    def keep(self, path: Path) -> None:
        """Copy a file of the folder to the store."""
        name = path.relative_to(self.root).as_posix()
        put_file(self.work / name, path)

    def locate(self, name: str) -> Path:
        """Return where a finished file lies."""
        return self.target / name

    def exists(self) -> bool:
        """Whether anything is known of an unfinished run."""
        return any(name != _LOCK for name in self.work.bucket.below(self.work.key))

    def choose(self, choices: Choices) -> None:
        """Let what remains to be done be done with these choices."""
        super().choose(choices)
        self.keep(self.root / JOURNAL)

    def is_finished(self, name: str) -> bool:
        """Whether the object of the output's file ``name`` is what was written."""
        note = self.journal.notes.get(name)
        if note is None:
            return False
        try:
            found = self.address.bucket.look(f"{self.address.key}/{name}")
        except FileNotFoundError:
            return False
        if found.nbytes != note.finished.nbytes:
            return False
        # Two processes that write one part at once note their own versions, where bytes make none.
        if found.version == note.version:
            return True
        with self.locate(name).open("rb", buffering=0) as stream:
            return self.journal.has_bytes(name, stream)

    def discard(self) -> None:
        """Remove what is known of the run, and what it wrote unless the output is whole."""
        forget()
        below = self.address.bucket.below(self.address.key)
        gone = [] if MANIFEST in below else [n for n in below if n in self._names]
        gone += self.former_among(below)
        # The journal, which says whose these are, goes last.
        work = self.work.name
        works = sorted(n for n in below if n.startswith(f"{work}/") and n != f"{work}/{_LOCK}")
        works.sort(key=lambda n: n.endswith(JOURNAL))
        self.address.bucket.delete(f"{self.address.key}/{n}" for n in (*gone, *works))
        forget()

    def former_among(self, below: Mapping[str, Found]) -> list[str]:
        """Return which of a former output's objects are still there, as they were when it was taken."""
        former = self.journal.former().items()
        return [
            name for name, version in former if name in below and below[name].version == version
        ]

    def clear_scratch(self) -> None:
        """Empty the folder of this machine."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(mode=0o700)
        self.files.mkdir()


def put_file(target: Address, path: Path) -> None:
    """Copy a file to the store."""
    size = path.stat().st_size
    bucket = target.bucket
    if size <= _SMALL_BYTES:
        bucket.put(target.key, path.read_bytes())
        return
    upload = bucket.upload(target.key, _SMALL_BYTES, 1)
    try:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                upload.write(piece)
        upload.finish()
    finally:
        upload.close()


@contextmanager
def locked_target(target: Address) -> Iterator[Lease]:
    """Hold the lock of an output in a store."""
    if target.scheme in READ_ONLY:
        hint = "write to s3://, gs://, az:// or a folder"
        hint += "; --hf-upload-path ORG/NAME uploads that to the Hub" * (target.scheme == "hf")
        raise UsageError(f"{target.scheme}:// can only be read", where=str(target), hint=hint)
    if not target.key:
        raise UsageError(
            "an output needs a folder of its own in the bucket",
            where=str(target),
            hint=f"such as {target}/model",
        )
    with held(work_folder(target) / _LOCK) as lease:
        forget()
        yield lease


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder of this machine for the plan and the journal."""
    with tempfile.TemporaryDirectory(prefix="streamconv-") as folder:
        root = Path(folder) / "staging"
        root.mkdir(mode=0o700)
        (root / "files").mkdir()
        yield root


@contextmanager
def begun_in_store(target: Address, *, lock: bool) -> Iterator[RemoteStaging]:
    """Yield what is known of a conversion that was begun; ``lock`` is for the end of it."""
    with ExitStack() as stack:
        guard = stack.enter_context(locked_target(target)) if lock else Standing(target)
        staging = RemoteStaging(target, stack.enter_context(scratch_folder()), guard)
        forget()
        staging.fetch()
        yield staging


def staged(
    staging: RemoteStaging,
    root: Path,
    job: JobIdentity,
    run: RunOptions,
    plan_digest: str | None = None,
) -> Plan | None:
    """Return the plan of a stopped run that can go on; what cannot is removed where it is ours.

    Raises :class:`OutputExistsError` where it is another job's, or nothing shows that it is ours.
    """
    staging.fetch()
    plan = staging.sealed_plan()
    if plan is None:
        rest = [n for n in staging.work.bucket.below(staging.work.key) if n != _LOCK]
        if JOURNAL in rest and not staging.journal.is_ours():
            raise OutputExistsError(
                "an unfinished run lies here, and nothing shows that this user wrote it with this "
                "version of streamconv",
                where=str(staging.work),
                hint="go on with the version and the key that began it (STREAMCONV_KEY), or delete "
                f"{staging.work} and what it had written",
            )
        staging.discard()
        staging.clear_scratch()
        return None
    if goes_on(plan, root, job, run, plan_digest, where=staging.work):
        return plan
    plan.close()
    staging.discard()
    staging.clear_scratch()
    return None


@dataclass
class RemoteExecution(Execution):
    """A plan that is executed into a store."""

    def store(self) -> RemoteStaging:
        """Return the staging, which is that of a store."""
        assert isinstance(self.staging, RemoteStaging)  # noqa: S101 - made for it
        return self.staging

    def begin_in_store(self) -> None:
        """Write down in the store what is begun; take the former output out of the way."""
        staging = self.store()
        staging.guard.check()
        bucket, key = staging.address.bucket, staging.address.key
        below = bucket.below(key) if self.old or staging.journal.former() else {}
        if self.old:
            staging.journal.note_former({o.name: below[o.name].version for o in self.old})
            staging.keep(staging.root / FORMER)
            self.old = ()
        for name in (PLAN, JOURNAL):
            staging.keep(staging.root / name)
        former = staging.former_among(below)
        # No loader shall start with the one's index and the other's weights.
        former.sort(key=lambda n: (n != MANIFEST, not n.endswith(".index.json"), n not in CONFIGS))
        staging.journal.forget_former()
        bucket.delete(f"{key}/{name}" for name in (*former, f"{staging.work.name}/{FORMER}"))
        forget()

    def execute(self) -> Result:
        """Do it, and say what a run that was stopped before may have left where nobody sees it."""
        is_parted = any(o.nbytes > MIN_PART_BYTES for o in self.plan.outputs())
        result = super().execute()
        if not (self.store().was_begun and is_parted):
            return result
        notice = (
            f"the run that was stopped before may have left an unfinished upload below {self.dst}, "
            "which costs money until a lifecycle rule of the bucket aborts it (docs/remote.md)"
        )
        return replace(result, notices=(*result.notices, notice))

    def _begin(self) -> list[OutputFile]:
        return self.plan.outputs()

    def _uploads(self) -> tuple[int, int]:
        """Return how many parts of a file are on their way at once, and the memory that they take."""
        return upload_share(self.budget, max((o.nbytes for o in self.plan.outputs()), default=0))

    def _writing_bytes(self) -> int:
        return self._uploads()[1]

    def _check_finished(self, outputs: list[OutputFile]) -> int:
        good, journal = 0, self.staging.journal
        for output in outputs:
            if self.staging.is_finished(output.name):
                good += output.nbytes
            elif output.name in journal.notes:
                journal.forget(output.name)
        return good

    def check_disk(self) -> None:
        """Do nothing: a store is never full."""

    def _disk(self) -> tuple[int, int]:
        return self.plan.disk_bytes(), shutil.disk_usage(self.staging.root).free

    def _write(
        self,
        output: OutputFile,
        tensors: Iterable[PlannedTensor],
        stream: Stream,
        progress: Progressing,
    ) -> None:
        super()._write(output, tensors, stream, progress)
        staging = self.store()
        staging.guard.check()
        staging.keep(staging.journal.note_path(output.name))

    def _put(
        self,
        output: OutputFile,
        tensors: Iterable[PlannedTensor],
        stream: Stream,
        on_bytes: Callable[[int], None],
    ) -> tuple[FinishedFile, str]:
        staging = self.store()
        target = staging.address / output.name
        staging.guard.check()
        finished = write_output(
            output,
            tensors,
            target,
            stream.filler,
            stream.checks,
            sync=False,
            sha256=self.run.sha256,
            seed=staging.seed,
            uploads=self._uploads()[0],
            on_bytes=on_bytes,
            before_end=staging.guard.check,
        )
        found = target.bucket.look(target.key)
        if found.nbytes != output.nbytes:
            raise StreamconvError(
                "the store does not hold what was written",
                where=str(target),
                expected=f"{output.nbytes} bytes",
                found=f"{found.nbytes} bytes",
            )
        return finished, found.version

    def _publish(self, outputs: list[OutputFile]) -> Path | None:
        """Upload what lies beside the weights; the index comes last but one, then the manifest."""
        staging = self.store()
        names = [p.relative_to(staging.files).as_posix() for p in _files(staging.files)]
        names.sort(key=lambda n: (n == MANIFEST, n.endswith(".index.json"), n in CONFIGS, n))
        strange = {
            n
            for n in staging.address.bucket.below(staging.address.key)
            if not n.startswith(f"{staging.work.name}/")
        } - {*names, *(o.name for o in outputs)}
        if strange:
            raise OutputExistsError(
                "something has appeared in the output folder meanwhile",
                where=str(staging.address),
                found=min(strange),
                hint="move it away and run the same command again: it goes on where it was",
            )
        for name in names:
            staging.guard.check()
            put_file(staging.address / name, staging.files / name)
        self._discard()
        return None


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path


def refuse_overlap(dst: Address, *sources: Path | None) -> None:
    """Raise :class:`UsageError` for an output that contains, or lies in, what it is made of."""
    for source in sources:
        if isinstance(source, Address) and source.is_relative_to(dst):
            raise UsageError(
                "the output folder contains the source",
                where=str(dst),
                hint="choose another folder",
            )
