"""The commands and their options. Bodies import what they need, so that ``--help`` is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamconv._version import __version__
from streamconv.cli.job_options import NONE, JobOptions, Model, with_job_options
from streamconv.cli.output import columns, say, say_json
from streamconv.cli.verl import app as verl_app
from streamconv.errors import shown
from streamconv.files.inputs import local_path

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Convert distributed training checkpoints to HuggingFace models, in bounded memory.\n\n"
    "`streamconv SRC DST` is short for `streamconv convert SRC DST`.",
)

Source = Annotated[
    Path,
    typer.Argument(
        parser=local_path,
        metavar="SRC",
        help="The checkpoint: a folder of rank files, an actor folder, a step folder.",
    ),
]
Target = Annotated[
    Path, typer.Argument(parser=local_path, metavar="DST", help="The output folder.")
]
MaxMem = Annotated[
    str | None,
    typer.Option(
        "--max-mem",
        metavar="SIZE",
        help="Memory for the whole process tree: 32GB, 32GiB, 80%. Default: what the machine can give.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another job's output.")]
NoSync = Annotated[
    bool, typer.Option("--no-sync", help="Faster, but a power cut may lose the output.")
]
Direct = Annotated[
    bool, typer.Option("--direct", help="Write past the page cache where the file system can.")
]
NoSourceCrc = Annotated[
    bool, typer.Option("--no-source-crc", help="Do not check the checksums of the source.")
]
Checksum = Annotated[
    str | None,
    typer.Option("--checksum", metavar="KIND", help="sha256: add such digests to the manifest."),
]
IoThreads = Annotated[
    int, typer.Option("--io-threads", metavar="N", help="Readers at work at once.")
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report", parser=local_path, metavar="FILE", help="Write an HTML page about it."
    ),
]
UploadPath = Annotated[
    str | None,
    typer.Option(
        "--hf-upload-path",
        metavar="ORG/NAME",
        help="Upload the output to the HuggingFace Hub, once it is verified.",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Upload into a private repository only.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def _version(value: bool) -> None:
    if value:
        say(f"streamconv {__version__}")
        raise typer.Exit


app.add_typer(verl_app, name="verl")


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
@with_job_options
def convert(
    context: typer.Context,
    src: Source,
    dst: Target,
    max_mem: MaxMem = None,
    job: JobOptions = NONE,
    overwrite: Overwrite = False,
    no_sync: NoSync = False,
    direct: Direct = False,
    no_source_crc: NoSourceCrc = False,
    checksum: Checksum = None,
    io_threads: IoThreads = 1,
    report: Report = None,
    hf_upload_path: UploadPath = None,
    private: Private = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert the checkpoint SRC into the HuggingFace folder DST."""
    from streamconv.cli.conversion import convert as run_conversion

    options = {
        **job,
        "max_mem": max_mem,
        "overwrite": overwrite,
        "sync": not no_sync,
        "direct": direct,
        "source_crc": not no_source_crc,
        "checksum": checksum,
        "io_threads": io_threads,
        "report": report,
    }
    run_conversion(
        src, dst, options, json=json, quiet=quiet, upload_to=hf_upload_path, private=private
    )


@app.command()
@with_job_options
def plan(
    context: typer.Context,
    src: Source,
    dst: Annotated[
        Path | None, typer.Argument(parser=local_path, metavar="DST", help="Whose disk to look at.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=local_path,
            metavar="PLAN",
            help="Keep the plan, for `streamconv run`.",
        ),
    ] = None,
    max_mem: MaxMem = None,
    job: JobOptions = NONE,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what converting SRC would do: tensors, files, disk, memory, and with DST the time."""
    from streamconv import api
    from streamconv.cli.report import plan_report, render_plan

    made = api.plan(src, max_mem=max_mem, output=output, **job)
    report = plan_report(made, dst, api.memory_bytes(max_mem))
    if json:
        say_json(report, indent=2)
    elif not quiet:
        say(render_plan(report))
        if output is not None:
            place = shown(str(output))
            say(f"\nthe plan is in {place}: `streamconv run {place} DST` executes it")
    if dst is not None:
        api.check_disk(made, dst)


@app.command()
def run(
    plan: Annotated[
        Path,
        typer.Argument(parser=local_path, metavar="PLAN", help="What `streamconv plan -o` wrote."),
    ],
    dst: Target,
    max_mem: MaxMem = None,
    overwrite: Overwrite = False,
    no_sync: NoSync = False,
    direct: Direct = False,
    no_source_crc: NoSourceCrc = False,
    checksum: Checksum = None,
    io_threads: IoThreads = 1,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Execute a plan made before: needs far less memory than planning does."""
    from streamconv import api
    from streamconv.cli.progress import listen, summarize
    from streamconv.conversion.job import run_plan
    from streamconv.files.inputs import reading

    with listen(json=json, quiet=quiet) as on_event:
        options = api.run_options(
            max_mem,
            overwrite,
            not no_sync,
            direct,
            not no_source_crc,
            checksum,
            io_threads,
            on_event,
        )
        with reading(plan, but=dst):
            result = run_plan(plan, dst, options)
    summarize(result, json=json, quiet=quiet)


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(parser=local_path, metavar="DST", help="What streamconv wrote.")
    ],
    source: Annotated[
        Path | None,
        typer.Option(
            "--source",
            parser=local_path,
            metavar="SRC",
            help="Compare every tensor with the checkpoint.",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            parser=local_path,
            metavar="DIR",
            help="Compare with another model folder.",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base", parser=local_path, metavar="DIR", help="The model that an adapter belongs to."
        ),
    ] = None,
    atol: Annotated[float, typer.Option("--atol", help="Tolerated absolute difference.")] = 0.0,
    rtol: Annotated[float, typer.Option("--rtol", help="Tolerated relative difference.")] = 0.0,
    forward: Annotated[
        bool,
        typer.Option(
            "--forward", help="Run the model; with --reference, compare logits and not tensors."
        ),
    ] = False,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="What to run the model on.")
    ] = None,
    token_ids: Annotated[
        str | None,
        typer.Option("--token-ids", metavar="IDS", help="What to run it on as ids: 1,2,3."),
    ] = None,
    logits_atol: Annotated[
        float | None,
        typer.Option(
            "--logits-atol",
            help="Tolerated difference of logits. Default: 1e-5 of the largest; other dtypes: 0.05.",
        ),
    ] = None,
    hf_config: Annotated[
        Path | None,
        typer.Option(
            "--hf-config",
            parser=local_path,
            metavar="DIR",
            help="With --source: where the folder is now that DST's config came from.",
        ),
    ] = None,
    max_mem: MaxMem = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check DST against its manifest, its source or another model; run it with --forward."""
    from streamconv import api
    from streamconv.cli.report import render_verification

    report = api.verify(
        folder,
        source=source,
        reference=reference,
        base=base,
        atol=atol,
        rtol=rtol,
        forward=forward,
        prompt=prompt,
        token_ids=_ids(token_ids),
        logits_atol=logits_atol,
        hf_config=hf_config,
        max_mem=max_mem,
    )
    if json:
        say_json(report.to_json(), indent=2)
    elif not (quiet and report.passed):
        say(render_verification(report))
    if not report.passed:
        raise typer.Exit(5)


def _ids(text: str | None) -> list[int] | None:
    from streamconv.errors import UsageError

    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError("not a list of token ids", found=text, expected="such as 1,2,3") from error


@app.command()
def inspect(src: Source, model: Model = None, json: Json = False, debug: Debug = False) -> None:
    """Show what is in SRC: format, who wrote it, mesh, placements, tensors."""
    from streamconv import api
    from streamconv.cli.report import render_inspection

    found = api.inspect(src, model=model)
    if json:
        say_json(found, indent=2)
    else:
        say(render_inspection(found))


@app.command()
def doctor(
    src: Annotated[
        Path | None,
        typer.Argument(parser=local_path, metavar="SRC", help="A checkpoint to try reading."),
    ] = None,
    dst: Annotated[
        Path | None,
        typer.Argument(parser=local_path, metavar="DST", help="A folder to try writing to."),
    ] = None,
    model: Model = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show versions, memory, limits and disks, and whether SRC can be read here."""
    from streamconv.environment.doctor import examine, rows
    from streamconv.files.inputs import reading

    with reading(src, but=dst):
        found = examine(src, model, dst)
    if json:
        say_json(found, indent=2)
    else:
        say(columns([(label, shown(value)) for label, value in rows(found)]))
    if found["problems"]:
        raise typer.Exit(found["exit_code"])
