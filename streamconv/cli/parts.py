"""``streamconv begin``, ``part`` and ``finish``: one conversion by many processes, on many machines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from streamconv.cli.app import Json, MaxMem, Quiet, TargetPlace, app
from streamconv.cli.command import Command
from streamconv.cli.job_options import NONE, JobOptions, with_job_options
from streamconv.cli.output import say, say_json
from streamconv.cli.progress import listen, summarize
from streamconv.cli.run_options import RunOptions, keywords, with_run_options
from streamconv.errors import UsageError, shown
from streamconv.storage.address import place
from streamconv.units import counted, format_size


@app.command(cls=Command)
@with_job_options
@with_run_options("overwrite", "no_sync", "no_source_crc", "checksum")
def begin(
    context: typer.Context,
    src: Annotated[
        Path,
        typer.Argument(
            parser=place, metavar="PLAN|SRC", help="A plan, or a checkpoint to plan first."
        ),
    ],
    dst: TargetPlace,
    max_mem: MaxMem = None,
    job: JobOptions = NONE,
    run: RunOptions = NONE,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Begin a conversion that several processes do: see `part` and `finish`."""
    from streamconv import api

    with listen(json=json, quiet=quiet) as on_event:
        begun = api.begin(
            src,
            dst,
            max_mem=max_mem,
            on_event=on_event,
            **keywords(run),
            **job,
        )
    if json:
        say_json({"event": "result", **begun.to_json()})
    elif not quiet:
        place = shown(str(begun.output))
        if begun.status == "nothing-to-do":
            say(f"nothing to do: {place} is already the complete output of this job")
            return
        done = f", {len(begun.finished)} of them written before" if begun.finished else ""
        files = counted(len(begun.files), "file")
        say(f"begun: {place} ({files}, {format_size(begun.write_bytes)}{done})")
        say(f"next: `streamconv part {place} --part I/N` for each I from 1 to N, on any machine,")
        say(f"      then `streamconv finish {place}`")


@app.command(cls=Command)
@with_run_options("direct", "io_threads")
def part(
    dst: TargetPlace,
    share: Annotated[
        str | None,
        typer.Option(
            "--part",
            metavar="I/N",
            help="Part I of N, counted from 1. auto: Slurm's array task; auto/N: Kubernetes' index.",
        ),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", metavar="NAME", help="This output file; may be given again."),
    ] = None,
    max_mem: MaxMem = None,
    run: RunOptions = NONE,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a part of the output files of a conversion that was begun."""
    from streamconv import api

    if (share is None) == (not file):
        raise UsageError("a part is given by --part or by --file", hint="--part 1/8")
    with listen(json=json, quiet=quiet) as on_event:
        done = api.part(
            dst,
            share,
            files=file or (),
            max_mem=max_mem,
            environment=os.environ,
            on_event=on_event,
            **keywords(run),
        )
    if json:
        say_json({"event": "result", **done.to_json()})
    elif not quiet:
        say(
            {
                "written": f"written: {counted(len(done.files), 'file')}, "
                f"{format_size(done.write_bytes)} in {done.seconds:.1f} s; "
                f"peak memory {format_size(done.peak_bytes)}",
                "nothing-to-do": "nothing to do: all files of this part are written",
                "published": f"nothing to do: {shown(str(done.output))} is published",
            }[done.status]
        )


@app.command(cls=Command)
def finish(
    dst: TargetPlace,
    max_mem: MaxMem = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that all parts are written, and publish the output."""
    from streamconv import api

    with listen(json=json, quiet=quiet) as on_event:
        result = api.finish(dst, max_mem=max_mem, on_event=on_event)
    summarize(result, json=json, quiet=quiet)
