"""A batch: rounds of looking, converting and tidying up, once or on a schedule."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv.api import memory_bytes
from streamconv.batch import metrics
from streamconv.batch.hooks import Hooks
from streamconv.batch.leases import Lease
from streamconv.batch.ledger import EachItsOwn, Ledger
from streamconv.batch.pins import Holder
from streamconv.batch.places import (
    MisplacedError,
    refuse_inside_checkpoint,
    refuse_inside_output,
)
from streamconv.batch.retention import Rule, resume_removals
from streamconv.batch.round import Round
from streamconv.batch.rules import claim_rule
from streamconv.batch.runner import Listener, Runner, What, backoff_seconds
from streamconv.batch.schedule import Schedule, local_now
from streamconv.batch.settings import BatchSettings, RunSettings
from streamconv.batch.state import Store, status_path
from streamconv.batch.survey import Survey, scene
from streamconv.batch.tasks import Task
from streamconv.batch.tidy import Read, Surveyed, tidy
from streamconv.batch.training import Stillness
from streamconv.errors import BadInputError, StreamconvError, VerificationError
from streamconv.executor import budget as budgets
from streamconv.files import askedfile
from streamconv.files.durable import no_space
from streamconv.nodes.tasks import DEFAULT_BUDGET_BYTES
from streamconv.storage.buckets import forget
from streamconv.system import memory
from streamconv.system.signals import how_it_ended
from streamconv.units import parse_duration

if TYPE_CHECKING:
    from streamconv.batch.overview import Overview

# Trying the same bytes again ends the same: bad input, unsafe input, another job's output.
_FOR_GOOD = frozenset({5, 6, 8})


class Batch:
    """Converts runs as the settings say. ``command`` is what starts a worker."""

    def __init__(
        self,
        settings: BatchSettings,
        listener: Listener,
        *,
        command: Sequence[str] | None = None,
        backoff: Callable[[int], float] = backoff_seconds,
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._command = command
        if command is None and settings.nodes is not None:
            from streamconv.batch import relay  # and with it all that a cluster takes

            self._command = relay.command(settings.nodes)
        self._backoff = backoff
        self._hopeless: dict[str, str] = {}
        self._noticed: set[str] = set()
        self._pins = Holder()
        self._stillness = Stillness()
        self._read = Read()
        self._rules: dict[Path, Lease | None] = {}
        self._stores = [Store(run.output.absolute()) for run in settings.run]
        self._began = time.time()
        self._round_ended = 0.0
        self._overview: Overview | None = None
        self._trouble: OSError | StreamconvError | None = None
        self._refuse_places()
        if settings.report is not None:
            from streamconv.batch.overview import Overview

            self._overview = Overview(settings.report, self._stores)
        self.budget_bytes = memory_bytes(settings.max_mem) or (
            memory.available_bytes()[0] if settings.nodes is None else DEFAULT_BUDGET_BYTES
        )

    def _refuse_places(self) -> None:
        """Refuse a report or metrics in a checkpoint, or where what is not ours lies."""
        s = self._settings
        for path, kind in ((s.report, askedfile.PAGE), (s.prometheus, askedfile.METRICS)):
            if path is not None:
                askedfile.checked(path, kind)
                for run in s.run:
                    refuse_inside_checkpoint(path, run.root, f"the {kind.word}")
                refuse_inside_output(path, f"the {kind.word}")

    def round(self) -> Round:
        """Look at every run once, convert what is ready, apply retention."""
        started = time.monotonic()
        self._trouble = None
        forget()
        made = Round(budget_bytes=self.budget_bytes)
        runs = [
            Surveyed(run, store, self._look(run, store, made))
            for run, store in zip(self._settings.run, self._stores, strict=True)
        ]
        misplaced = [p for p in made.problems if isinstance(p, MisplacedError)]
        if misplaced:
            return Round(problems=[*misplaced])  # before anything is written in that place
        surveys = [one.survey for one in runs if one.survey is not None]
        s = self._settings
        hooks = Hooks(s.on_done, s.on_error, parse_duration(s.hook_limit))
        try:
            hooks.resume(record for one in runs if one.survey for record in one.store)
            for record in [record for survey in surveys for record in survey.gone]:
                hooks.add(record)
            made.lost += [record for survey in surveys for record in survey.gone]
            self._convert(made, surveys, hooks)
            hooks.finish()
            made.removals += tidy(runs, self._read, apply=s.apply)
            made.problems += [
                (VerificationError if r.damaged else StreamconvError)(r.refused, where=str(r.path))
                for r in made.removals
                if r.damaged or r.partly
            ]
            self._tell_readings(made, surveys)
        except StreamconvError as error:
            made.problems.append(error)
        except OSError as error:
            made.problems.append(_refused(error))
        finally:
            hooks.stop()
        made.problems += [StreamconvError(text) for text in hooks.problems]
        made.seconds = time.monotonic() - started
        self._round_ended = time.time()
        self.publish()
        made.records = [record for store in self._stores for record in store]
        if self._overview is not None:
            with self._minding():
                self._overview.write(made, self._next_round())
        troubles = [*(store.trouble for store in self._stores), self._trouble]
        made.problems += [_refused(trouble) for trouble in troubles if trouble is not None]
        return made

    def _next_round(self) -> str:
        schedule = self._settings.schedule
        return "" if schedule is None else f"{schedule.next_after(local_now()):%Y-%m-%d %H:%M:%S}"

    def preview(self) -> Round:
        """Return what a round would do: ``tasks``, ``removals``. Nothing is written or deleted."""
        made = Round(budget_bytes=self.budget_bytes)
        with tempfile.TemporaryDirectory(prefix="streamconv-") as scratch:
            runs = []
            for number, (run, known) in enumerate(
                zip(self._settings.run, self._stores, strict=True)
            ):
                # Of its own, with a copy of what is remembered: no look may leave a trace.
                store = Store(known.output, Path(scratch) / str(number))
                with suppress(FileNotFoundError):
                    shutil.copytree(known.folder / "jobs", store.folder / "jobs")
                runs.append(Surveyed(run, store, self._look(run, store, made, dry=True)))
            surveys = [one.survey for one in runs if one.survey is not None]
            made.tasks += [task for survey in surveys for task in survey.next_tasks()]
            made.counts += _left_out(surveys)
            try:
                made.removals += tidy(runs, self._read, apply=False)
            except StreamconvError as error:
                made.problems.append(error)
        return made

    def _tell_readings(self, made: Round, surveys: Sequence[Survey]) -> None:
        """Tell what reading the later steps, in favour of which sources go, came to."""
        for readings in (t.readings for survey in surveys for t in survey.training.values()):
            made.problems += [
                BadInputError(f"no step to train on: {damage}", where=str(step))
                for step, damage in readings.damaged.items()
            ]
            for step, names in readings.unchecked.items():
                shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
                notice = (
                    f"{step}: {len(names)} files without checksums were judged by their ends, not by "
                    f"their bytes, as the step to train on: {shown}"
                )
                if notice not in self._noticed:
                    self._noticed.add(notice)
                    made.notices.append(notice)

    @contextmanager
    def _minding(self) -> Iterator[None]:
        """Keep what the system refused to those who look on: that ends no conversion."""
        try:
            yield
        except (OSError, StreamconvError) as error:
            self._trouble = error

    def _look(
        self, run: RunSettings, store: Store, made: Round, *, dry: bool = False
    ) -> Survey | None:
        s = self._settings
        options = {
            "sync": not s.no_sync,
            "direct": s.direct,
            "source_crc": not s.no_source_crc,
            "sha256": s.checksum == "sha256",
            "io_threads": s.io_threads,
            "cache": not s.no_cache,
        }
        try:
            refuse_inside_checkpoint(run.output, run.root, "the output folder")
            askedfile.checked(status_path(run.output), askedfile.STATUS)
            store.begin()
            rule = Rule(run.keep_last, run.keep_every)
            if rule.active and not dry and store.folder not in self._rules:
                self._rules[store.folder] = claim_rule(store.folder, rule)
            if not dry:
                made.removals += resume_removals(store, run.root.absolute(), apply=s.apply)
            survey = Survey(
                run,
                store,
                options,
                self._hopeless,
                outputs=[other.output for other in self._settings.run],
                own_files=lambda name: self._own_files(store, name),
                pin_folder=self._pins.folder,
                stillness=self._stillness,
                dry=dry,
                share=self._settings.share,
            )
            survey.look()
        except StreamconvError as error:
            made.problems.append(error)
            return None
        except OSError as error:
            made.problems.append(_refused(error, run.output))
            return None
        made.counts += survey.counts
        made.problems += survey.problems
        made.notices += [n for n in survey.notices if n not in self._noticed]
        self._noticed.update(survey.notices)
        if store.newer:
            made.problems.append(
                StreamconvError(
                    f"{store.newer} records are a newer streamconv's: left alone, with their outputs",
                    where=str(store.folder),
                    hint="update streamconv here",
                )
            )
        return survey

    def _own_files(self, store: Store, name: str) -> dict[Path, str]:
        s = self._settings
        found = {status_path(store.output): "status"}
        if s.prometheus is not None:
            found[s.prometheus] = "metrics"
        if s.report is not None and self._overview is not None:
            found |= {self._overview.page_of(store, name): "pages", s.report: "report"}
        return found

    def _convert(self, made: Round, surveys: Sequence[Survey], hooks: Hooks) -> None:
        """Convert what there is to do; and, where one fails, what retention keeps in its place."""
        tasks = [task for survey in surveys for task in survey.next_tasks()]
        if not tasks:
            made.counts += _left_out(surveys)
            return
        s = self._settings
        ledger = self._ledger()
        self.publish()
        with memory.PeakMeter() as meter, self._overview or nullcontext():
            while tasks:
                made.tasks += tasks
                runner = Runner(
                    ledger,
                    hooks,
                    self._remembering,
                    pins=self._pins,
                    retries=s.retries,
                    command=self._command,
                    every=self.publish,
                    backoff=self._backoff,
                )
                runner.run(tasks)
                renamed = {"done": "converted"}
                made.counts += Counter({renamed.get(k, k): n for k, n in runner.outcomes.items()})
                tasks = [task for survey in surveys for task in survey.next_tasks()]
        made.peak_bytes = meter.peak_bytes
        made.counts += _left_out(surveys)

    def _ledger(self) -> Ledger:
        s = self._settings
        if s.nodes is not None:
            return EachItsOwn(self.budget_bytes, s.jobs)
        return Ledger(
            self.budget_bytes,
            memory.resident_bytes(),
            budgets.PLANNING_FLOOR_BYTES,
            s.jobs,
            known_floor_bytes=None if s.no_cache else budgets.REMEMBERED_FLOOR_BYTES,
        )

    def _remembering(self, what: What, task: Task, text: str) -> None:
        error = task.record.error
        if what == "failed" and error is not None and _ends_the_same(error):
            self._hopeless[task.record.output] = scene(task.record)
        if self._overview is not None:
            self._overview.listen(what, task, text)
        self._listener(what, task, text)

    def publish(self, **more: Any) -> None:
        """Write ``status.json`` of every output folder, and the metrics."""
        facts = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "began_at": self._began,
            "budget_bytes": self.budget_bytes,
            "jobs": self._settings.jobs,
            "watch": self._settings.watch,
            **more,
        }
        for store in self._stores:
            if store.folder.is_dir():
                store.publish(facts)
        if self._settings.prometheus is not None:
            records = [record for store in self._stores for record in store]
            with self._minding():
                metrics.write(self._settings.prometheus, records, self._round_ended)


def _ends_the_same(error: dict[str, Any]) -> bool:
    """Whether trying again is of no use: not where what read a file was killed, but may read it yet."""
    return error.get("exit_code") in _FOR_GOOD and error.get("found") != how_it_ended(
        -signal.SIGKILL
    )


def _left_out(surveys: Sequence[Survey]) -> Counter[str]:
    return Counter(
        pruned=sum(survey.left_out for survey in surveys),
        elsewhere=sum(survey.of_others for survey in surveys),
    )


def _refused(error: OSError | StreamconvError, where: Path | None = None) -> StreamconvError:
    if isinstance(error, StreamconvError):
        return error
    told = StreamconvError.of_system(error)
    told.where = told.where or (None if where is None else str(where))
    full = no_space(error, Path())
    if full is not None:
        full.where = told.where
    return full or told


def watch(
    batch: Batch,
    schedule: Schedule,
    on_round: Callable[[Round, datetime], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], datetime] = local_now,
) -> None:
    """Do round after round until a signal ends the process; an error ends none but its round.

    ``on_round`` is told what each came to and when the next one is.
    """
    while True:
        try:
            made = batch.round()
        except Exception as error:  # noqa: BLE001 - the next round may well succeed
            made = Round(problems=[StreamconvError(f"{type(error).__name__}: {error}")])
        following = schedule.next_after(now())
        on_round(made, following)
        sleep(max(0.0, following.timestamp() - now().timestamp()))
