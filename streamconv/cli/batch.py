"""``streamconv batch`` and ``streamconv status``: whole runs, and how they stand."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from streamconv.cli.app import Json, MaxMem, Quiet, Report, app
from streamconv.cli.command import HOOKS, KEEP, WHICH, Command
from streamconv.cli.job_options import NONE, JobOptions, given, with_job_options
from streamconv.cli.output import say, say_json, tell, told_when_stopped
from streamconv.cli.run_options import RunOptions, with_run_options
from streamconv.errors import BadInputError, UsageError, shown
from streamconv.files.inputs import local_path
from streamconv.storage.address import Address, place

_STOPPED = (
    "stopped: outputs that are done stay, and what running conversions finished is kept; the same "
    "command goes on"
)


def _option(flag: str, text: str, metavar: str | None = None, group: str | None = None) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, rich_help_panel=group)


@app.command(
    cls=Command,
    epilog="streamconv batch runs/grpo models/grpo --model actor --max-mem 64GB\n"
    "streamconv batch runs/grpo models/grpo --watch 10m --keep-last 3 --apply\n"
    "streamconv batch jobs.toml --dry-run",
)
@with_job_options
@with_run_options()
def batch(
    context: typer.Context,
    root: Annotated[
        Path,
        typer.Argument(parser=place, metavar="ROOT|JOBS", help="A training run, or a jobs.toml."),
    ],
    dst: Annotated[
        Path | None,
        typer.Argument(parser=place, metavar="DST", help="The folder for all outputs."),
    ] = None,
    max_mem: MaxMem = None,
    part: Annotated[
        str | None,
        _option(
            "--part", "Only part I of N of the conversions; auto: see `part`.", "I/N", group=WHICH
        ),
    ] = None,
    nodes: Annotated[
        str | None,
        _option(
            "--nodes",
            "Let a Ray cluster do the conversions, --jobs at once: ray, or ray://HOST. --max-mem is "
            "each one's then.",
            "CLUSTER",
        ),
    ] = None,
    jobs: Annotated[
        int | None, _option("--jobs", "Conversions at once, within one --max-mem.", "N")
    ] = None,
    every: Annotated[
        str | None, _option("--every", "Only steps that N divides.", "N", group=WHICH)
    ] = None,
    steps: Annotated[
        str | None,
        _option("--steps", "Only these steps: 100:900, 500: or 100,200.", "RANGE", group=WHICH),
    ] = None,
    last: Annotated[
        int | None, _option("--last", "Only the N latest of these.", "N", group=WHICH)
    ] = None,
    name: Annotated[
        str | None,
        _option(
            "--name",
            "What outputs are called, such as {run}/{step}; fields: run, step, step_dir, model, path, "
            "format. Default: as below ROOT.",
            "TEMPLATE",
            group=WHICH,
        ),
    ] = None,
    settle: Annotated[
        str | None,
        _option(
            "--settle",
            "Without a tracker file, a checkpoint is whole when unchanged for so long (5m).",
            "TIME",
            group=WHICH,
        ),
    ] = None,
    pin: Annotated[
        bool,
        _option(
            "--pin", "Hard-link sources meanwhile, so that rotation cannot take them.", group=WHICH
        ),
    ] = False,
    watch: Annotated[
        str | None,
        _option("--watch", "Again and again: 10m, or a cron expression '*/10 * * * *'.", "WHEN"),
    ] = None,
    dry_run: Annotated[
        bool, _option("--dry-run", "Show what would be converted and deleted; write nothing.")
    ] = False,
    retries: Annotated[
        int | None, _option("--retries", "How often a passing I/O error is tried again (3).", "N")
    ] = None,
    verify: Annotated[
        bool, _option("--verify", "Compare each output with its source, tensor by tensor.")
    ] = False,
    keep_last: Annotated[
        int | None,
        _option(
            "--keep-last",
            "Convert and keep the N latest steps alone.",
            "N",
            group=KEEP,
        ),
    ] = None,
    keep_every: Annotated[
        int | None,
        _option(
            "--keep-every",
            "Convert and keep steps that N divides, too.",
            "N",
            group=KEEP,
        ),
    ] = None,
    delete_sources: Annotated[
        bool,
        _option(
            "--delete-sources",
            "With --verify: delete sources whose outputs agree with them, never the newest step.",
            group=KEEP,
        ),
    ] = False,
    apply: Annotated[
        bool,
        _option("--apply", "Actually delete. Without it, deletions are only listed.", group=KEEP),
    ] = False,
    on_done: Annotated[
        str | None,
        _option(
            "--on-done", "Run this for each output; facts are in $STREAMCONV_….", "CMD", group=HOOKS
        ),
    ] = None,
    on_error: Annotated[
        str | None,
        _option("--on-error", "Run this for each that failed or is gone.", "CMD", group=HOOKS),
    ] = None,
    hook_limit: Annotated[
        str | None,
        _option("--hook-limit", "How long such a command may take (1h).", "TIME", group=HOOKS),
    ] = None,
    prometheus: Annotated[
        Path | None,
        typer.Option(
            "--prometheus",
            parser=local_path,
            metavar="FILE",
            help="Keep metrics in this text file.",
            rich_help_panel=HOOKS,
        ),
    ] = None,
    report: Report = None,
    job: JobOptions = NONE,
    run: RunOptions = NONE,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert every checkpoint of a run that is whole and not converted yet."""
    own = {**locals(), **run}
    for key in ("context", "root", "dst", "job", "run", "dry_run", "json", "quiet"):
        del own[key]
    from streamconv.batch.cycle import Batch
    from streamconv.batch.cycle import watch as keep_watching
    from streamconv.batch.round import Round
    from streamconv.batch.runner import What
    from streamconv.batch.tasks import Task
    from streamconv.cli.batch_report import (
        BatchLines,
        LiveView,
        json_lines,
        preview_json,
        render_preview,
        render_round,
        round_json,
    )
    from streamconv.conversion.parts import Share

    if part is not None:
        own["part"] = Share.parse(part, os.environ).text
    settings = _settings(root, dst, {**given(context, own), **job})
    live = not (json or quiet) and sys.stderr.isatty()
    view: LiveView | None = None
    lines = json_lines if json else BatchLines(quiet=quiet, progress=not live)

    def listener(what: What, task: Task, text: str) -> None:
        if view is not None:
            view.hear(what, task)
        lines(what, task, text)

    work = Batch(settings, listener)
    view = LiveView(work.budget_bytes) if live else None
    if dry_run:
        preview = work.preview()
        if json:
            say_json(preview_json(preview))
        else:
            for problem in preview.problems:
                tell(f"error: {problem}")
            say(render_preview(preview))
        if preview.problems:
            raise typer.Exit(3)
        return

    def show(made: Round, following: str | None) -> None:
        if json:
            say_json({"event": "round", **round_json(made), "next": following})
            return
        for record in made.lost:
            tell(f"error: {shown(record.name)}: lost: {record.reason}")
        for problem in made.problems:
            tell(f"error: {problem}")
        if not quiet:
            for notice in made.notices:
                tell(f"notice: {notice}")
            following = "" if following is None else f"next round: {following}"
            if following and made.is_idle:
                say(f"{render_round(made, applied=settings.apply)}; {following}")
            else:
                say(render_round(made, applied=settings.apply))
                say(following) if following else None
        sys.stdout.flush()

    if settings.schedule is not None:
        schedule = settings.schedule
        with view or nullcontext(), told_when_stopped(lambda: _STOPPED):
            keep_watching(work, schedule, lambda made, at: show(made, f"{at:%Y-%m-%d %H:%M:%S}"))
    with view or nullcontext(), told_when_stopped(lambda: _STOPPED):
        made = work.round()
    if made.problems and not made.counts and not json:
        raise made.problems[0]
    show(made, None)
    if made.exit_code:
        raise typer.Exit(made.exit_code)


def _settings(root: Path, dst: Path | None, options: Mapping[str, Any]) -> Any:
    """Return the settings that a command line amounts to, or a job file with some of it on top."""
    from streamconv.batch.settings import SHARED, load, of_one_run

    every = options.get("every")
    if every is not None and not every.isdecimal():
        raise UsageError(
            f"--every takes a number of steps, not {every!r}",
            hint=f"--watch {every!r} repeats the batch on a schedule",
        )
    if not isinstance(root, Address) and root.is_file():
        if dst is not None:
            raise UsageError("a job file names its outputs itself", found=str(dst))
        wrong = sorted(f"--{k.replace('_', '-')}" for k in options if k not in SHARED)
        if wrong:
            raise UsageError(
                "options of a single run beside a job file",
                found=", ".join(wrong),
                hint=f"say them in a [[run]] of {root}",
            )
        return load(root, options)
    if dst is None and root.suffix == ".toml":
        raise BadInputError("there is no such job file", where=str(root))
    if dst is None:
        raise UsageError(
            "where to? a run needs an output folder", hint=f"streamconv batch {root} DST"
        )
    return of_one_run(root, dst, options)


@app.command(
    cls=Command,
    epilog="streamconv status models/grpo --watch 5s",
)
def status(
    dst: Annotated[
        Path, typer.Argument(parser=place, metavar="DST", help="The output folder of a batch.")
    ],
    watch: Annotated[
        str | None, _option("--watch", "Show it again and again: 5s, 1m.", "TIME")
    ] = None,
    last: Annotated[int, _option("--last", "Show the N latest outputs; 0: all.", "N")] = 20,
    json: Json = False,
) -> None:
    """Show how the conversions of a batch stand."""
    from streamconv.batch.state import batch_folder, read_records
    from streamconv.cli.batch_report import print_status, status_json

    if not batch_folder(dst).is_dir():
        raise BadInputError(
            "no batch has worked on this folder",
            where=str(dst),
            hint="`streamconv batch ROOT DST` converts a run into it",
        )
    from streamconv.units import parse_duration

    pause = None if watch is None else parse_duration(watch)
    while True:
        records = read_records(dst)
        if json:
            say_json(status_json(records), indent=2 if pause is None else None)
        else:
            print_status(records, last, clear=pause is not None)
        if pause is None:
            return
        time.sleep(max(1.0, pause))
