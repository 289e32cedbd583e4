"""A conversion in parts: begun once, written by any number of processes, finished once.

The parts take no lock, need not know of each other and may run on other machines, at the same time,
twice, or again after they were killed: the unit is one output file, which appears whole under its name,
with a note of its own (see :mod:`streamconv.output.journal`). What they share is the staging folder.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import xxhash

from streamconv.conversion.execution import Execution
from streamconv.conversion.finished import missing_files, nothing_to_do
from streamconv.conversion.job import budget_bytes, held, prepared, prepared_plan, refuse_others
from streamconv.conversion.remote import RemoteExecution, RemoteStaging, begun_in_store
from streamconv.errors import BadInputError, OutputExistsError, UnfinishedError, UsageError
from streamconv.files.durable import full_disk_told
from streamconv.files.filesystems import real_path
from streamconv.files.userkey import state_folder
from streamconv.ir.identity import JobIdentity
from streamconv.ir.planfile import Plan, is_plan
from streamconv.ir.planned import OutputFile
from streamconv.options import JobOptions, Result, RunOptions
from streamconv.output import publication
from streamconv.output.former import some
from streamconv.output.journal import Choices
from streamconv.output.manifest import read_manifest
from streamconv.output.publication import OldFile
from streamconv.output.staging import PLAN, Staging, staging_path
from streamconv.storage.address import Address, place
from streamconv.storage.buckets import forget
from streamconv.system import memory

_SHARE = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class Share:
    """Part ``index`` of ``count``; parts are counted from 1."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise UsageError(
                "there is no such part",
                expected=f"1/{self.count} to {self.count}/{self.count}, counted from 1",
                found=f"{self.index}/{self.count}",
                hint="`--part auto` takes Slurm's and Kubernetes' numbers from the environment",
            )

    @property
    def text(self) -> str:
        """Return the share as :meth:`parse` takes it."""
        return f"{self.index}/{self.count}"

    @staticmethod
    def parse(text: str, environment: Mapping[str, str]) -> Share:
        """Return the share that ``I/N`` means; ``auto`` takes it from a cluster's variables.

        Those are Slurm's for a job array and, with ``auto/N``, Kubernetes' for an indexed job.
        """
        found = _SHARE.fullmatch(text)
        if found:
            return Share(int(found[1]), int(found[2]))
        word, _, count = text.partition("/")
        if word != "auto" or (count and not count.isdigit()):
            raise UsageError("--part takes I/N, auto or auto/N", found=repr(text))
        try:
            task = environment.get("SLURM_ARRAY_TASK_ID")
            if task is not None:
                first = int(environment["SLURM_ARRAY_TASK_MIN"])
                step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
                index = (int(task) - first) // step + 1
                return Share(index, int(count or environment["SLURM_ARRAY_TASK_COUNT"]))
            index = int(environment["JOB_COMPLETION_INDEX"]) + 1
        except (KeyError, ValueError) as error:
            raise UsageError(
                "--part auto finds no number of this part in the environment",
                expected="SLURM_ARRAY_TASK_ID, _MIN and _COUNT, or JOB_COMPLETION_INDEX",
                hint="say it: --part 1/8",
            ) from error
        if not count:
            raise UsageError(
                "Kubernetes does not tell how many parts there are", hint="say it: --part auto/8"
            )
        return Share(index, int(count))

    def has(self, name: str) -> bool:
        """Whether what is called ``name`` belongs to this part, where sizes are not known."""
        return xxhash.xxh3_64_intdigest(os.fsencode(name)) % self.count == self.index - 1

    def of(self, outputs: Sequence[OutputFile]) -> list[OutputFile]:
        """Return this part's files: the largest goes first, to whichever part has the fewest bytes."""
        loads = [(0, k) for k in range(self.count)]
        mine = []
        for output in sorted(outputs, key=lambda o: (-o.nbytes, o.name)):
            nbytes, k = min(loads)
            loads[k] = nbytes + output.nbytes, k
            if k == self.index - 1:
                mine.append(output)
        return mine


@dataclass(frozen=True, slots=True)
class Begun:
    """A conversion that is begun: the sizes of its output files, and which are finished already.

    ``sources`` are the files that the plan reads, beside the weights, too.
    """

    status: Literal["begun", "nothing-to-do"]
    output: Path
    sizes: Mapping[str, int] = field(default_factory=dict)
    finished: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Return the names of all output files that hold weights."""
        return tuple(self.sizes)

    @property
    def write_bytes(self) -> int:
        """Return the bytes of all of them."""
        return sum(self.sizes.values())

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "status": self.status,
            "output": str(self.output),
            "sizes": dict(self.sizes),
            "finished": list(self.finished),
        }


@dataclass(frozen=True, slots=True)
class Part:
    """What a part did: ``files`` it wrote, sizes in bytes.

    ``published``: the whole output is in its place already, by what others did.
    """

    status: Literal["written", "nothing-to-do", "published"]
    output: Path
    files: tuple[str, ...] = ()
    read_bytes: int = 0
    write_bytes: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "output": str(self.output)}


def begin(src: Path, dst: Path, job: JobOptions, run: RunOptions) -> Begun:
    """Begin the conversion of ``src``, a checkpoint or a plan of one, into the folder ``dst``.

    Begun again, it goes on: what is finished stays. ``run`` holds for all parts but for memory and
    readers, which each part is told for itself. Raises as :func:`streamconv.conversion.job.convert`.
    """
    planned = not isinstance(src, Address) and is_plan(src)
    if planned and job != JobOptions():
        raise UsageError(
            "options that decide the output have no place here: the plan has them", where=str(src)
        )
    with prepared_plan(src, dst, run) if planned else prepared(src, dst, job, run) as ready:
        if isinstance(ready, Result):
            return Begun("nothing-to-do", ready.output)
        ready.check_disk()
        ready.staging.choose(Choices.of(run))
        outputs, head = ready.plan.outputs(), ready.plan.head
        root = place(head.root)
        sources = [root / file.path for file in head.files]
        sources += [place(side.path) for side in head.side]
        ready.plan.close()
        return Begun(
            "begun",
            ready.dst,
            {o.name: o.nbytes for o in outputs},
            tuple(o.name for o in outputs if o.name in ready.staging.journal.notes),
            tuple(sources),
        )


def write_part(dst: Path, which: Share | Collection[str], run: RunOptions) -> Part:
    """Write a part of the output files of a conversion that was begun, or those of the given names.

    Files that are finished are passed over. Raises :class:`UsageError` for a name that the output does
    not have, :class:`BadInputError` where nothing was begun, and what converting raises.
    """
    dst = real_path(dst.absolute())
    with full_disk_told(dst), _begun(dst) as staging, memory.PeakMeter() as meter:
        plan = staging.sealed_plan()
        if plan is None:
            _without_plan(staging, dst)
            return Part("published", dst)
        own = replace(run, **asdict(staging.journal.choices))
        execution = _execution(plan, dst, own, staging, meter)
        try:
            todo = [
                output for output in _chosen(plan, which) if not staging.is_finished(output.name)
            ]
            if not todo:
                return Part("nothing-to-do", dst)
            if _moved(staging, dst, plan):
                return Part("published", dst)
            read_bytes = execution.write_files(todo)
        except FileNotFoundError as error:
            # A part that came late, or twice: whoever finishes it has moved what it worked in.
            if _moved(staging, dst, plan) or (_published(dst) and not staging.exists()):
                return Part("published", dst)
            raise BadInputError(
                "what this part was writing is gone: another command works on this output",
                where=str(error.filename or staging_path(dst)),
                hint="run the part again, and only `part` commands until `finish`",
            ) from error
        return Part(
            "written",
            dst,
            tuple(o.name for o in todo),
            read_bytes,
            sum(o.nbytes for o in todo),
            time.monotonic() - execution.started,
            meter.peak_bytes,
        )


def finish(dst: Path, run: RunOptions) -> Result:
    """Publish a conversion whose parts are all written.

    Raises :class:`UnfinishedError` for those that are not, naming them, and loses nothing then; where
    it is finished already, there is nothing to do.
    """
    dst = real_path(dst.absolute())
    with full_disk_told(dst), _ending(dst, run) as staging, memory.PeakMeter() as meter:
        plan = staging.sealed_plan()
        if plan is None:
            published = _without_plan(staging, dst)
            if staging.journal.is_ours():  # the rest of what was being removed
                staging.discard()
            return nothing_to_do(dst, published)
        own = replace(run, **asdict(staging.journal.choices))
        outputs = plan.outputs()
        missing = [o for o in outputs if not staging.is_finished(o.name)]
        moved = _moved(staging, dst, plan) if missing else None
        if moved:  # a finish that was killed had come so far
            plan.close()
            staging.discard()
            return nothing_to_do(dst, moved)
        if missing:
            raise UnfinishedError(
                f"{len(missing)} of {len(outputs)} output files are not written yet",
                where=str(dst),
                found=some([o.name for o in missing]),
                hint=f"write them: `streamconv part {dst} --file {missing[0].name}`, or the part again "
                "that they belong to",
            )
        old: tuple[OldFile, ...] = ()
        if not isinstance(dst, Address):  # where its files are in their places by now
            job = JobIdentity.from_json(plan.head.job)
            old = refuse_others(dst, job, overwrite=own.overwrite)
        return _execution(plan, dst, own, staging, meter, old).publish_parts()


def _begun(dst: Path) -> AbstractContextManager[Staging]:
    if isinstance(dst, Address):
        return begun_in_store(dst, lock=False)
    return nullcontext(Staging(dst, sync=True))


@contextmanager
def _ending(dst: Path, run: RunOptions) -> Iterator[Staging]:
    """Hold the lock of an output whose parts are written."""
    if isinstance(dst, Address):
        with begun_in_store(dst, lock=True) as staging:
            yield staging
        return
    with held(dst):
        publication.finish(staging_path(dst), dst, sync=run.sync)
        yield Staging(dst, sync=True)


def _execution(
    plan: Plan,
    dst: Path,
    run: RunOptions,
    staging: Staging,
    meter: memory.PeakMeter,
    old: tuple[OldFile, ...] = (),
) -> Execution:
    kind = RemoteExecution if isinstance(staging, RemoteStaging) else Execution
    return kind(plan, dst, run, budget_bytes(run), staging, meter, old)


def _chosen(plan: Plan, which: Share | Collection[str]) -> list[OutputFile]:
    outputs = plan.outputs()
    if isinstance(which, Share):
        return which.of(outputs)
    unknown = sorted(set(which) - {o.name for o in outputs})
    if unknown:
        raise UsageError(
            "the output has no such file",
            found=unknown[0],
            expected=some([o.name for o in outputs]),
        )
    return [o for o in outputs if o.name in which]


def _published(dst: Path) -> dict[str, Any] | None:
    """Return the manifest of the whole output that is in its place; None without one."""
    forget()
    manifest = read_manifest(dst, entries=False) if dst.is_dir() else None
    return manifest if manifest is not None and not missing_files(dst, manifest) else None


def _moved(staging: Staging, dst: Path, plan: Plan) -> dict[str, Any] | None:
    """Return the manifest of the output that what is staged has become.

    None where that is still to come. An older output of the same plan does not count: what is staged
    for this one has not been moved then; in a store, that one is noted until it is deleted.
    """
    in_store = isinstance(staging, RemoteStaging)
    is_before = staging.journal.former() if in_store else staging.files.exists()
    manifest = None if is_before else _published(dst)
    return manifest if manifest and manifest["plan_digest"] == plan.digest else None


def _without_plan(staging: Staging, dst: Path) -> dict[str, Any]:
    """Return the manifest of what is published; raise where nothing was begun, or not by this user."""
    # Of what is begun there is a plan until the output is in its place: then it is removed.
    if not (staging.root / PLAN).exists():
        published = _published(dst)
        if published is not None:
            return published
    if not staging.exists():
        raise BadInputError(
            "no conversion into this folder has been begun",
            where=str(dst),
            hint="begin it: `streamconv begin PLAN DST`; DST is a path that all machines share",
        )
    raise OutputExistsError(
        "nothing shows that this user, with this version of streamconv, has begun what is staged here",
        where=str(staging_path(dst)),
        hint="all parts need the same version and the same key: let the machines share "
        f"{state_folder() or 'the state folder'} (XDG_STATE_HOME says where it is), or give them the "
        "same STREAMCONV_KEY",
    )
