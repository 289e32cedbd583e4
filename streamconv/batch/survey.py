"""Looks at one run: what is done, what must wait, and the tasks that are left."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from streamconv.batch import pins
from streamconv.batch.discover import Candidate, discover
from streamconv.batch.places import refuse_own_files
from streamconv.batch.ready import Snapshot, Tracker, judge, look_at, read_tracker, snapshot
from streamconv.batch.retention import Rule
from streamconv.batch.selection import named, namer
from streamconv.batch.settings import RunSettings
from streamconv.batch.state import FOLDER, Record, Store, file_name, is_intact
from streamconv.batch.tasks import UNCOMPARED, Task, take_over_finished
from streamconv.convert_job import finished_output, identify, refuse_others
from streamconv.errors import LockedError, StreamconvError, UsageError
from streamconv.identity import chosen_options


class Survey:
    """One look at one run.

    ``tasks`` is what there is to do, ``counts`` how many outputs are in which state,
    ``candidates`` all that were chosen, by output name, ``problems`` what could not be looked at.
    ``outputs`` are the output folders of all runs, which are not looked into; ``own_files`` returns
    what the batch writes on account of an output, and what each file is.
    ``hopeless`` are outputs whose conversion failed for good in this process, with what :func:`scene`
    said then: nothing is gained by trying the same again.
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
    ) -> None:
        self._run = run
        self._store = store
        self._run_options = {**run_options, "overwrite": run.overwrite}
        self._hopeless = hopeless
        self._outputs = {run.output, *outputs}
        self._own_files = own_files
        self._job = run.job_options()
        self._options = _options_digest(run)
        self._trackers: dict[Path, Tracker | None] = {}
        self.rule = Rule(run.keep_last, run.keep_every)
        self.tasks: list[Task] = []
        self.counts: Counter[str] = Counter()
        self.candidates: dict[str, Candidate] = {}
        self.problems: list[StreamconvError] = []

    def look(self) -> None:
        """Find the checkpoints and decide about each."""
        run = self._run
        if run.hf_config is not None and not run.hf_config.is_dir():
            raise UsageError("--hf-config names no folder", where=str(run.hf_config))
        for place in (self._store.folder, run.root / FOLDER):
            pins.remove_left_behind(place)
        # Absolute: records and hooks are read from other working folders.
        all_found = discover(
            run.root.absolute(), avoid=self._outputs, on_problem=self.problems.append
        )
        found = run.filter.choose(all_found)
        self.candidates = named(found, namer(run.name, run.model))
        own = {
            path: what for name in self.candidates for path, what in self._own_files(name).items()
        }
        refuse_own_files(self._store.output, self.candidates, own)
        for name, candidate in self.candidates.items():
            self._consider(name, candidate)
        if self.rule.active:
            self._drop_surplus()
        self._note_vanished()

    def _consider(self, name: str, c: Candidate) -> None:
        record = self._store.get(name)
        try:
            seen = look_at(c)
        except FileNotFoundError:
            return  # it went this moment
        except OSError as error:
            what = f"a checkpoint cannot be looked at: {error.strerror}"
            self.problems.append(StreamconvError(what, where=str(c.path)))
            return
        known = (record.snapshot, record.options) == (seen.digest, self._options)
        if known and self._is_done(record):
            self.counts["done"] += 1
            return
        if (
            known
            and record.state == "failed"
            and self._hopeless.get(record.output) == scene(record)
        ):
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

    def _is_done(self, record: Record) -> bool:
        verified = record.verified is True or not self._run.verify
        return record.state == "done" and verified and is_intact(record)

    def _decide(self, record: Record, c: Candidate, seen: Snapshot) -> None:
        """Decide about one output while its lock is held, and save what was decided."""
        now = time.time()
        if record.snapshot != seen.digest:
            record.snapshot, record.seen_at, record.verified = seen.digest, now, None
        elif self._is_done(record) and record.options == self._options:
            self.counts["done"] += 1  # by another batch, a moment ago
            return
        if record.options != self._options:
            record.options, record.verified = self._options, None
        record.source, record.run, record.step = str(c.path), c.run, c.step
        record.model, record.format = c.model, c.format
        jobs: list[Mapping[str, Any]] = []
        verdict = judge(
            c,
            seen,
            self._tracker(c.run_dir),
            settle_seconds=self._run.settle_seconds,
            still_seconds=now - record.seen_at,
            now_ns=time.time_ns(),
            check_whole=lambda: jobs.append(identify(c.path, self._job).identity),
        )
        record.job = jobs[0]["digest"] if jobs else ""
        if not verdict.ready:
            record.state, record.reason = "waiting", verdict.reason
            self.counts["waiting"] += 1
        elif jobs and self._adopt(record, record.job):
            self.counts["done"] += 1
        else:
            record.state, record.reason = "queued", verdict.reason
            task = self._task(record, c)
            if jobs:
                task.refused = self._refusal(record, jobs[0])
            self.tasks.append(task)
        self._store.save(record)

    def _refusal(self, record: Record, job: Mapping[str, Any]) -> StreamconvError | None:
        """Return why the output is in the way: that needs no process to be found out."""
        output = Path(record.output)
        try:
            if finished_output(output, job["digest"]) is None:
                refuse_others(output, job, overwrite=self._run.overwrite)
        except StreamconvError as error:
            return error
        return None

    def _adopt(self, record: Record, digest: str) -> bool:
        """Take an output for done whose record was lost, or whose source only looks different."""
        wanting = self._run.verify and record.verified is not True
        return not wanting and take_over_finished(record, digest)

    def _task(self, record: Record, c: Candidate) -> Task:
        root = self._run.root.absolute()
        places = [pins.folder(place) for place in (self._store.folder, root / FOLDER)]
        return Task(
            candidate=c,
            record=record,
            store=self._store,
            job=self._job,
            run_options=dict(self._run_options),
            verify=self._run.verify,
            pin=self._run.pin,
            pin_places=tuple(p / file_name(record.name) for p in places),
        )

    def _tracker(self, run_dir: Path) -> Tracker | None:
        if run_dir not in self._trackers:
            self._trackers[run_dir] = read_tracker(run_dir)
        return self._trackers[run_dir]

    def _drop_surplus(self) -> None:
        """Leave out what retention would remove as soon as it is there."""
        done = [r for r in self._store if r.state == "done"]
        surplus = {r.name for r in self.rule.surplus([*done, *(t.record for t in self.tasks)])}
        for task in self.tasks:
            record = task.record
            if record.name not in surplus:
                continue
            self.counts["pruned"] += 1
            if record.state != "pruned":
                record.state, record.reason = "pruned", "not converted: retention does not keep it"
                with suppress(LockedError), self._store.holding(record.name):
                    self._store.save(record)
        self.tasks = [t for t in self.tasks if t.record.name not in surplus]

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
                    self._store.save(record)

    def _has_vanished(self, record: Record) -> bool:
        return (
            record.state in ("waiting", "queued", "failed")
            and record.name not in self.candidates
            and not Path(record.source).exists()
        )


def scene(record: Record) -> str:
    """Return what a conversion meets: how its source looks, and what is where its output goes."""
    try:
        return f"{record.snapshot} {Path(record.output).lstat().st_mtime_ns}"
    except OSError:
        return record.snapshot


def _options_digest(run: RunSettings) -> str:
    """Return the digest of all that decides an output apart from its source."""
    options = chosen_options(run.job_options())
    if run.hf_config is not None:
        options["hf_config"] = snapshot(run.hf_config).digest if run.hf_config.is_dir() else ""
    return xxhash.xxh3_64_hexdigest(json.dumps(options, sort_keys=True).encode())
