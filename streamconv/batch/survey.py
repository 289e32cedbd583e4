"""Looks at one run: what is done, what must wait, and the tasks that are left."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import xxhash

from streamconv.batch import pins
from streamconv.batch.discover import Candidate, candidate_at, discover, models_of
from streamconv.batch.hooks import forget_hook
from streamconv.batch.leases import boot_clock
from streamconv.batch.places import refusal_into_another, refuse_own_files
from streamconv.batch.readings import Readings
from streamconv.batch.ready import (
    Snapshot,
    Tracker,
    Verdict,
    file_clock_ns,
    judge,
    look_at,
    read_tracker,
)
from streamconv.batch.removal import put_aside
from streamconv.batch.retention import Rule, asides_of
from streamconv.batch.selection import named, namer
from streamconv.batch.settings import RunSettings
from streamconv.batch.state import FOLDER, Record, Store, file_name, is_intact
from streamconv.batch.tasks import UNCOMPARED, Task, take_over_finished
from streamconv.batch.training import Stillness, Training
from streamconv.conversion.finished import finished_output
from streamconv.conversion.job import IdentifiedJob, identify, refuse_others
from streamconv.conversion.parts import Share
from streamconv.errors import LockedError, StreamconvError, UsageError
from streamconv.files.filesystems import real_path
from streamconv.files.inputs import cannot_read
from streamconv.ir.identity import JobIdentity, chosen_options
from streamconv.options import JobOptions
from streamconv.planning.inputs import base_inputs
from streamconv.planning.sidefiles import list_side_files
from streamconv.storage.address import Address, place

_STEPS_TO_KNOW_AN_INTERVAL = 3


class Survey:
    """One look at one run.

    ``tasks`` is what there is to do, of which :meth:`next_tasks` says what retention keeps,
    ``left_out`` how many it does not, ``of_others`` how many are others' share; ``counts`` how many
    outputs are in which state,
    ``candidates`` all that were chosen, by output name, ``problems`` what could not be looked at.
    ``gone`` are the records of those whose source went away, ``notices`` says what was left out.
    ``outputs`` are the output folders of all runs, which are not looked into; ``own_files`` returns
    what the batch writes on account of an output, and what each file is; ``pin_folder`` where it keeps
    pins below a place. ``training`` are the steps of each run in it, where sources are to be deleted.
    ``hopeless`` are outputs whose conversion failed for good in this process, with what :func:`scene`
    said then: nothing is gained by trying the same again. ``dry``: nothing is tidied up on the way.
    """

    def __init__(
        self,
        run: RunSettings,
        store: Store,
        run_options: Mapping[str, Any],
        hopeless: Mapping[str, str],
        *,
        outputs: Collection[Path] = (),
        own_files: Callable[[str], Mapping[Path, str]] = lambda _: {},
        pin_folder: Callable[[Path], Path] = lambda place: place,
        stillness: Stillness | None = None,
        share: Share | None = None,
        dry: bool = False,
    ) -> None:
        self._run = run
        self._dry = dry
        self._store = store
        self._run_options = {**run_options, "overwrite": run.overwrite}
        self._hopeless = hopeless
        self._outputs = {run.output, *outputs}
        self._own_files = own_files
        self._pin_folder = pin_folder
        self._stillness = stillness or Stillness()
        self._share = share
        self._name = namer(run.name, run.model)
        self._given: set[str] = set()
        self._root = real_path(run.root)
        self._boot, self._now_seconds = boot_clock()
        self._now_ns = time.time_ns()
        self._generation = 0
        self._options: dict[str | None, str] = {}
        self._trackers: dict[Path, Tracker | None] = {}
        self.rule = Rule(run.keep_last, run.keep_every)
        self.tasks: list[Task] = []
        self.counts: Counter[str] = Counter()
        self.candidates: dict[str, Candidate] = {}
        self.problems: list[StreamconvError] = []
        self.notices: list[str] = []
        self.gone: list[Record] = []
        self.left_out = 0
        self.of_others = 0
        self.training: dict[Path, Training] = {}

    def look(self) -> None:
        """Find the checkpoints and decide about each."""
        run = self._run
        if run.hf_config is not None and not run.hf_config.is_dir():
            raise UsageError("--hf-config names no folder", where=str(run.hf_config))
        if not self._dry:
            for folder in (self._store.folder, run.root / FOLDER):
                if not isinstance(folder, Address):  # where nothing is linked
                    pins.remove_left_behind(folder)
        # Absolute: records and hooks are read from other working folders.
        all_found = discover(
            run.root.absolute(),
            avoid=self._outputs,
            on_problem=self.problems.append,
            on_notice=self.notices.append,
        )
        if not self._dry:
            self.notices += [put_aside(path) for path in asides_of(self._store)]
        found = run.filter.choose(models_of(all_found, run.model, self.notices.append))
        self.candidates = named(found, self._name)
        self._note_unseen()
        own = {
            path: what for name in self.candidates for path, what in self._own_files(name).items()
        }
        refuse_own_files(self._store.output, self.candidates, own)
        self._now_ns = file_clock_ns(self._store.folder)
        self._generation = 1 + max((r.generation for r in self._store), default=0)
        for name, candidate in self.candidates.items():
            self._consider(name, candidate)
        self._note_vanished()
        if run.delete_sources:
            for run_dir in {c.run_dir for c in self.candidates.values()}:
                self.training[run_dir] = Training(
                    run_dir,
                    run.settle_seconds,
                    self._stillness,
                    self._now_ns,
                    Readings(self._store.folder, file_name(str(run_dir))),
                )

    def _note_unseen(self) -> None:
        """Say which steps must have come and gone since the last look, where intervals are even."""
        seen: dict[str, set[int]] = defaultdict(set)
        for record in self._store:
            if record.step is not None and record.root == str(self._root):
                seen[record.run].add(record.step)
        for run, steps in seen.items():
            new = {c.step for c in self.candidates.values() if c.run == run and c.step is not None}
            last = max(steps)
            later = {s for s in new if s > last}
            known = sorted(steps)
            intervals = {b - a for a, b in pairwise(known)}
            if len(known) < _STEPS_TO_KNOW_AN_INTERVAL or len(intervals) != 1 or not later:
                continue
            (interval,) = intervals
            missed = [s for s in range(last + interval, max(later), interval) if s not in later]
            if missed:
                listed = ", ".join(map(str, missed[:5])) + (", …" if len(missed) > 5 else "")
                self.notices.append(
                    f"{run}: step {listed} came and went between two rounds and was never seen: look "
                    "more often (--watch), or keep more steps in training"
                )

    def _consider(self, name: str, c: Candidate) -> None:
        record = self._store.get(name)
        try:
            seen = look_at(c)
        except FileNotFoundError:
            return  # it went this moment
        except OSError as error:
            self.problems.append(cannot_read(error, error.filename or c.path))
            return
        known = (record.root, record.relative, record.snapshot, record.marks, record.options) == (
            str(self._root),
            c.relative.as_posix(),
            seen.digest,
            seen.marks,
            self._options_of(c),
        )
        if known and self._is_done(record):
            self.counts["done"] += 1
            return
        if known and self._is_hopeless(record):
            self.counts["failed"] += 1
            return
        if known and record.state == "pruned":
            self.tasks.append(self._task(record, c))  # unless retention still does not want it
            return
        try:
            with self._store.holding(name):
                self._decide(self._store.reload(name), c, seen)
        except LockedError:
            self.counts["elsewhere"] += 1

    def _options_of(self, c: Candidate) -> str:
        job = self._run.job_options(c)
        if job.model not in self._options:
            self._options[job.model] = _options_digest(self._run, job)
        return self._options[job.model]

    def _is_hopeless(self, record: Record) -> bool:
        return record.state == "failed" and self._hopeless.get(record.output) == scene(record)

    def _is_done(self, record: Record) -> bool:
        verified = record.verified is True or not self._run.verify
        return record.state == "done" and verified and is_intact(record)

    def _decide(self, record: Record, c: Candidate, seen: Snapshot) -> None:
        """Decide about one output while its lock is held, and save what was decided."""
        same = self._is_same(record, c, seen)
        if not same:
            record.seen = {}
            self._tell_of_namesake(record)
        unchanged = same and record.options == self._options_of(c)
        failed = unchanged and self._is_hopeless(record)
        if not unchanged or (record.evidence and not is_intact(record)):
            record.verified = None
        record.root, record.relative = str(self._root), c.relative.as_posix()
        record.snapshot, record.marks, record.options = seen.digest, seen.marks, self._options_of(c)
        record.source, record.run, record.step = str(c.path), c.run, c.step
        record.model, record.format = c.model, c.format
        if unchanged and self._is_done(record):
            self.counts["done"] += 1  # by another batch, a moment ago
            self._store.save(record)
            return
        since = record.seen.setdefault(self._boot, self._now_seconds)
        found: list[IdentifiedJob] = []
        verdict = judge(
            c,
            seen,
            self._tracker(c.run_dir),
            settle_seconds=self._run.settle_seconds,
            still_seconds=self._now_seconds - since,
            now_ns=self._now_ns,
            check_whole=lambda: found.append(identify(c.path, self._run.job_options(c))),
        )
        if verdict.ready and look_at(c).digest != seen.digest:
            verdict = Verdict(False, "it changed while it was looked at")
        digest = record.job = found[0].digest if found else ""
        if found and verdict.ready and record.content != (content := content_of(found[0])):
            failed = False
            record.content, record.generation = content, self._generation
            record.written_ns = max(0, seen.written_ns)
        if not verdict.ready:
            record.state, record.reason = "waiting", verdict.reason
            self.counts["waiting"] += 1
        elif digest and self._adopt(record, digest):
            self.counts["done"] += 1
        elif digest and failed:
            self.counts["failed"] += 1  # links to it came or went, and it is what it was
        else:
            record.state, record.reason = "queued", verdict.reason
            task = self._task(record, c)
            if found:
                task.refused = self._refusal(record, found[0].identity)
            self.tasks.append(task)
        self._store.save(record)

    def _tell_of_namesake(self, record: Record) -> None:
        """Say that a record of another run is replaced, which had the same name in this folder."""
        if record.root not in ("", str(self._root)) and record.state in ("done", "failed"):
            self.notices.append(
                f"{record.name} of {record.root} ({record.state}) has the name of one of this run: its "
                "record is replaced; --name '{run}/{step}' keeps outputs of several runs apart"
            )

    def _is_same(self, record: Record, c: Candidate, seen: Snapshot) -> bool:
        """Whether a source is the one that the record speaks of.

        Only what is in it tells where names, sizes and times are the same: those of another run may be.
        """
        if (record.relative, record.snapshot) != (c.relative.as_posix(), seen.digest):
            return False
        if record.marks == seen.marks and record.root == str(self._root):
            return True
        if record.state != "done":
            return record.root == str(self._root)
        try:
            return record.content == content_of(identify(c.path, self._run.job_options(c)))
        except (StreamconvError, OSError):
            return False

    def _refusal(self, record: Record, job: JobIdentity) -> StreamconvError | None:
        """Return why the output is in the way: that needs no process to be found out."""
        output = place(record.output)
        refused = refusal_into_another(output, self._store.output)
        if refused is not None:
            return refused
        try:
            if finished_output(output, job.digest) is None:
                refuse_others(output, job, overwrite=self._run.overwrite)
        except StreamconvError as error:
            return error
        return None

    def _adopt(self, record: Record, digest: str) -> bool:
        """Take an output for done whose record was lost, or whose source only looks different.

        One that nothing proves to be ours is a task: its conversion compares it with the source.
        """
        wanting = self._run.verify and record.verified is not True
        return not wanting and take_over_finished(record, digest, sealed=True)

    def _task(self, record: Record, c: Candidate) -> Task:
        root = self._run.root.absolute()
        places = [self._pin_folder(place) for place in (self._store.folder, root / FOLDER)]
        return Task(
            candidate=c,
            record=record,
            store=self._store,
            job=self._run.job_options(c),
            run_options=dict(self._run_options),
            verify=self._run.verify,
            pin=self._run.pin,
            pin_places=tuple(p / file_name(record.name) for p in places),
        )

    def _tracker(self, run_dir: Path) -> Tracker | None:
        if run_dir not in self._trackers:
            self._trackers[run_dir] = read_tracker(run_dir)
        return self._trackers[run_dir]

    def owns(self, record: Record) -> bool:
        """Whether an output is one that this run makes, as it is told to now."""
        known = self.candidates.get(record.name)
        if known is None and record.root != str(self._root):
            return False
        c = known or self._candidate_of(record)
        if record.options != self._options_of(c):
            return False
        if known is not None:
            return record.relative == c.relative.as_posix()
        try:
            return self._run.filter.passes(c) and self._name(c) == record.name
        except UsageError:
            return False

    def _candidate_of(self, record: Record) -> Candidate:
        root = self._run.root.absolute()
        return candidate_at(root, root / record.relative, record.format)

    def _tracker_of(self, record: Record) -> Tracker | None:
        return self._tracker(self._candidate_of(record).run_dir)

    def kept(self) -> list[Record]:
        """Return this run's outputs that are there and whole."""
        return [r for r in self._store if r.state == "done" and self.owns(r) and is_intact(r)]

    def surplus(self, kept: Iterable[Record]) -> list[Record]:
        """Return those of outputs that retention does not keep."""
        return self.rule.surplus(kept, self._tracker_of)

    def next_tasks(self) -> list[Task]:
        """Return what is to be converted next: what retention will keep, if that succeeds.

        What failed is not counted the next time, so that the one before it has its turn.
        """
        pending = [t for t in self.tasks if t.record.name not in self._given]
        wanted = pending
        if self.rule.active:
            begun = [t.record for t in self.tasks if t.record.name in self._given]
            begun = [r for r in begun if r.state in ("queued", "running")]  # by another batch
            running = [r for r in self._store if r.state == "running" and self.owns(r)]
            held = {r.name: r for r in [*self.kept(), *running, *begun]}
            held |= {t.record.name: t.record for t in pending}
            surplus = {r.name for r in self.surplus(held.values())}
            wanted = [t for t in pending if t.record.name not in surplus]
            if not wanted:
                self._leave_out(pending)
        self._given.update(t.record.name for t in wanted)
        mine = [t for t in wanted if self._share is None or self._share.has(t.record.name)]
        self.of_others += len(wanted) - len(mine)
        return mine

    def _leave_out(self, tasks: Collection[Task]) -> None:
        """Note what retention would remove as soon as it is there; what is there, it will remove."""
        self.left_out = len(tasks)
        for name in [task.record.name for task in tasks if task.record.state != "pruned"]:
            with suppress(LockedError), self._store.holding(name):
                record = self._store.reload(name)
                if record.state == "done" and is_intact(record):
                    continue  # by another batch, meanwhile
                if not take_over_finished(record, record.job, record.reason):
                    record.state = "pruned"
                    record.reason = "not converted: retention does not keep it"
                    forget_hook(record)
                self._store.save(record)

    def _note_vanished(self) -> None:
        """Say of what was to be done, but has no source any more, that it is gone."""
        for name in [r.name for r in self._store if self._has_vanished(r)]:
            # Another batch may be at it, or have done it meanwhile.
            with suppress(LockedError), self._store.holding(name):
                record = self._store.reload(name)
                if self._has_vanished(record):
                    why = UNCOMPARED if self._run.verify else ""
                    if not take_over_finished(record, record.job, why):
                        record.state = "gone"
                        record.reason = "the source went away before it was converted"
                        self.counts["gone"] += 1
                        self.gone.append(record)
                    self._store.save(record)

    def _has_vanished(self, record: Record) -> bool:
        return (
            record.state in ("waiting", "queued", "failed")
            and record.root in ("", str(self._root))
            and record.name not in self.candidates
            and not place(record.source).exists()
        )


def scene(record: Record) -> str:
    """Return what a conversion meets: how its source looks, and what is where its output goes."""
    try:
        return f"{record.snapshot} {place(record.output).lstat().st_mtime_ns}"
    except OSError:
        return record.snapshot


def content_of(source: IdentifiedJob) -> str:
    """Return what stands for what is in a source, whatever is to be made of it."""
    text = json.dumps([source.identity.format, source.identity.source])
    return xxhash.xxh3_128_hexdigest(text.encode())


def _options_digest(run: RunSettings, job: JobOptions) -> str:
    """Return the digest of all that decides an output apart from its source, by content."""
    options = chosen_options(job)
    if job.model is not None:
        options["model"] = job.model
    if run.hf_config is not None and run.hf_config.is_dir():
        side = list_side_files(run.hf_config, root=run.root, named=True)
        options["hf_config"] = [(f.name, f.xxh3) for f in side]
    if run.base is not None:
        options["base"] = base_inputs(run.base)
    return xxhash.xxh3_64_hexdigest(json.dumps(options, sort_keys=True).encode())
