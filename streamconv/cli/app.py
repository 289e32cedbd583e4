"""The commands and their options. Bodies import what they need, so that ``--help`` is instant."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from streamconv._version import __version__
from streamconv.cli.command import OUTPUT, SPEED, Command, Group
from streamconv.cli.job_options import NONE, JobOptions, Model, with_job_options
from streamconv.cli.output import columns, say, say_json, told_when_stopped
from streamconv.cli.run_options import RunOptions, keywords, with_run_options
from streamconv.cli.verl import app as verl_app
from streamconv.errors import shown
from streamconv.files.inputs import local_path
from streamconv.storage.address import place


class _Root(Group):
    usage = ("streamconv SRC DST [--max-mem 32GB] [OPTIONS]", "streamconv COMMAND [ARGS]...")
    main_options = ("--max-mem", "--dtype", "--max-shard-size", "--hf-config", "--model", "--lora")


app = typer.Typer(
    cls=_Root,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Convert distributed training checkpoints (verl, FSDP, Megatron, DeepSpeed, torch DCP) to "
    "Hugging Face models on a CPU, within a memory limit you choose.\n\n"
    "`streamconv SRC DST` is short for `streamconv convert SRC DST`.",
    epilog="streamconv global_step_100/actor my-model --max-mem 32GB\n"
    "streamconv plan global_step_100/actor\n"
    "streamconv batch runs/grpo models/grpo --model actor --watch 10m",
)

Source = Annotated[
    Path,
    typer.Argument(
        parser=place,
        metavar="SRC",
        help="The checkpoint: a folder of rank files, an actor folder, a step folder, or where "
        "one lies in a store (s3://, gs://, az://, https://).",
    ),
]
TargetPlace = Annotated[
    Path,
    typer.Argument(
        parser=place, metavar="DST", help="The output folder, or its address (s3://, gs://, az://)."
    ),
]
MaxMem = Annotated[
    str | None,
    typer.Option(
        "--max-mem",
        metavar="SIZE",
        envvar="STREAMCONV_MAX_MEM",
        show_envvar=True,
        help="Memory for the whole process tree: 32GB, 32GiB, 80%. Default: what the machine can give.",
    ),
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
Json = Annotated[
    bool, typer.Option("--json", help="JSON on stdout, for programs.", rich_help_panel=OUTPUT)
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print nothing but errors.", rich_help_panel=OUTPUT),
]

AdapterBase = Annotated[
    Path | None,
    typer.Option(
        "--base", parser=local_path, metavar="DIR", help="The model that an adapter belongs to."
    ),
]
Atol = Annotated[float, typer.Option("--atol", help="Tolerated absolute difference.")]
Rtol = Annotated[float, typer.Option("--rtol", help="Tolerated relative difference.")]
Prompt = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="What to run the model on.")
]
TokenIds = Annotated[
    str | None,
    typer.Option("--token-ids", metavar="IDS", help="What to run it on as ids: 1,2,3."),
]
LogitsAtol = Annotated[
    float | None,
    typer.Option(
        "--logits-atol",
        help="Tolerated difference of logits. Default: 1e-5 of the largest; other dtypes: 0.05.",
    ),
]


def _version(value: bool) -> None:
    if value:
        say(f"streamconv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", is_eager=True, callback=_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command(
    cls=Command,
    epilog="streamconv global_step_100/actor my-model --max-mem 32GB\n"
    "streamconv global_step_100/actor my-model --dtype bf16 --report report.html\n"
    "streamconv iter_0000500 my-model --hf-config Qwen3-30B-A3B      # Megatron-LM\n"
    "streamconv global_step_100/actor my-model --lora adapter        # for PEFT and vLLM",
)
@with_job_options
@with_run_options()
def convert(
    context: typer.Context,
    src: Source,
    dst: TargetPlace,
    max_mem: MaxMem = None,
    job: JobOptions = NONE,
    run: RunOptions = NONE,
    nodes: Annotated[
        str | None,
        typer.Option(
            "--nodes",
            metavar="CLUSTER",
            help="Let a Ray cluster do it: ray, or ray://HOST. --max-mem is each worker's then.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    scattered: Annotated[
        bool,
        typer.Option(
            "--scattered",
            help="With --nodes: each machine has a part of SRC on its own disk, and serves it to the "
            "others.",
            rich_help_panel=SPEED,
        ),
    ] = False,
    report: Report = None,
    hf_upload_path: UploadPath = None,
    private: Private = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert the checkpoint SRC into the HuggingFace folder DST."""
    from streamconv.cli.conversion import convert as run_conversion

    options = {
        **job,
        **keywords(run),
        "max_mem": max_mem,
        "report": report,
        "nodes": nodes,
        "scattered": scattered,
    }
    run_conversion(
        src, dst, options, json=json, quiet=quiet, upload_to=hf_upload_path, private=private
    )


@app.command(
    cls=Command,
    epilog="streamconv plan global_step_100/actor my-model    # how long, how much memory and disk\n"
    "streamconv plan global_step_100/actor -o plan.jsonl && streamconv run plan.jsonl my-model",
)
@with_job_options
@with_run_options("no_cache")
def plan(
    context: typer.Context,
    src: Source,
    dst: Annotated[
        Path | None, typer.Argument(parser=place, metavar="DST", help="Whose disk to look at.")
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
    run: RunOptions = NONE,
    job: JobOptions = NONE,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what converting SRC would do: tensors, files, disk, memory, and with DST the time."""
    from streamconv import api
    from streamconv.cli.progress import working
    from streamconv.cli.report import plan_report, render_plan

    with working("planning", json=json, quiet=quiet):
        made = api.plan(src, max_mem=max_mem, output=output, **keywords(run), **job)
        report = plan_report(made, dst, api.memory_bytes(max_mem))
    if json:
        say_json(report, indent=2)
    elif not quiet:
        say(render_plan(report))
        if output is not None:
            command = shown(shlex.join(["streamconv", "run", str(output), "DST"]))
            say(f"\nthe plan is in {shown(str(output))}: `{command}` executes it")
    if dst is not None:
        api.check_disk(made, dst)


@app.command(
    cls=Command,
    epilog="streamconv plan global_step_100/actor -o plan.jsonl\n"
    "streamconv run plan.jsonl my-model --max-mem 64MB",
)
@with_run_options("overwrite", "no_sync", "direct", "no_source_crc", "checksum", "io_threads")
def run(
    plan: Annotated[
        Path,
        typer.Argument(parser=local_path, metavar="PLAN", help="What `streamconv plan -o` wrote."),
    ],
    dst: TargetPlace,
    max_mem: MaxMem = None,
    run: RunOptions = NONE,
    report: Report = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Execute a plan made before: needs far less memory than planning does."""
    from streamconv import api
    from streamconv.cli.conversion import what_is_kept
    from streamconv.cli.progress import listen, summarize

    with listen(json=json, quiet=quiet) as on_event, told_when_stopped(lambda: what_is_kept(dst)):
        result = api.run(
            plan,
            dst,
            max_mem=max_mem,
            on_event=on_event,
            report=report,
            **keywords(run),
        )
    summarize(result, json=json, quiet=quiet)


@app.command(
    cls=Command,
    epilog="streamconv verify my-model                                   # against its manifest\n"
    "streamconv verify my-model --source global_step_100/actor    # every tensor\n"
    "streamconv verify my-model --forward --prompt 'Once upon'    # run it",
)
def verify(
    folder: Annotated[
        Path, typer.Argument(parser=place, metavar="DST", help="What streamconv wrote.")
    ],
    source: Annotated[
        list[Path] | None,
        typer.Option(
            "--source",
            parser=place,
            metavar="SRC",
            help="Compare every tensor with the checkpoint; once for each that an average is of.",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            parser=place,
            metavar="DIR",
            help="Compare with another model folder.",
        ),
    ] = None,
    base: AdapterBase = None,
    atol: Atol = 0.0,
    rtol: Rtol = 0.0,
    forward: Annotated[
        bool,
        typer.Option(
            "--forward", help="Run the model; with --reference, compare logits and not tensors."
        ),
    ] = False,
    prompt: Prompt = None,
    token_ids: TokenIds = None,
    logits_atol: LogitsAtol = None,
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
    report: Report = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check DST against its manifest, its source or another model; run it with --forward."""
    _verify(
        folder,
        source=source,
        reference=reference,
        base=base,
        atol=atol,
        rtol=rtol,
        forward=forward,
        prompt=prompt,
        token_ids=token_ids,
        logits_atol=logits_atol,
        hf_config=hf_config,
        max_mem=max_mem,
        report=report,
        json=json,
        quiet=quiet,
    )


@app.command(
    cls=Command,
    epilog="streamconv diff my-model other-model\n"
    "streamconv diff my-model other-model --atol 1e-3    # a tolerance\n"
    "streamconv diff my-model other-model --forward      # the logits that both give",
)
def diff(
    one: Annotated[Path, typer.Argument(parser=place, metavar="A", help="A model folder.")],
    other: Annotated[
        Path,
        typer.Argument(parser=place, metavar="B", help="The model folder to compare it with."),
    ],
    atol: Atol = 0.0,
    rtol: Rtol = 0.0,
    forward: Annotated[
        bool,
        typer.Option("--forward", help="Run both and compare their logits, not their tensors."),
    ] = False,
    prompt: Prompt = None,
    token_ids: TokenIds = None,
    logits_atol: LogitsAtol = None,
    base: AdapterBase = None,
    max_mem: MaxMem = None,
    report: Report = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two model folders tensor by tensor, or by what they answer; exit code 5: they differ."""
    _verify(
        one,
        reference=other,
        base=base,
        atol=atol,
        rtol=rtol,
        forward=forward,
        prompt=prompt,
        token_ids=token_ids,
        logits_atol=logits_atol,
        max_mem=max_mem,
        report=report,
        json=json,
        quiet=quiet,
    )


def _verify(
    folder: Path, *, token_ids: str | None, report: Path | None, json: bool, quiet: bool, **how: Any
) -> None:
    from streamconv import api
    from streamconv.cli.progress import working
    from streamconv.cli.report import render_verification

    with working("verifying", json=json, quiet=quiet):
        found = api.verify(folder, token_ids=_ids(token_ids), report=report, **how)
    if json:
        say_json(found.to_json(), indent=2)
    elif not (quiet and found.passed):
        say(render_verification(found))
    if not found.passed:
        raise typer.Exit(5)


def _ids(text: str | None) -> list[int] | None:
    from streamconv.errors import UsageError

    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError("not a list of token ids", found=text, expected="such as 1,2,3") from error


@app.command(
    cls=Command,
    epilog="streamconv inspect global_step_100/actor --summary\n"
    "streamconv inspect global_step_100/actor --json | jq '.tensors | length'",
)
def inspect(
    src: Source,
    model: Model = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="The facts alone, without the list of tensors.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what is in SRC: format, who wrote it, mesh, placements, tensors."""
    from streamconv import api
    from streamconv.cli.progress import working
    from streamconv.cli.report import render_inspection

    with working("reading", json=json):
        found = api.inspect(src, model=model)
    if summary:
        del found["tensors"]
    if json:
        say_json(found, indent=2)
    else:
        say(render_inspection(found))


@app.command(
    cls=Command,
    epilog="streamconv doctor global_step_100/actor /models",
)
def doctor(
    src: Annotated[
        Path | None,
        typer.Argument(parser=place, metavar="SRC", help="A checkpoint to try reading."),
    ] = None,
    dst: Annotated[
        Path | None,
        typer.Argument(parser=place, metavar="DST", help="A folder to try writing to."),
    ] = None,
    model: Model = None,
    json: Json = False,
) -> None:
    """Show versions, memory, limits and disks, and whether SRC can be read here."""
    from streamconv import api
    from streamconv.cli.progress import working
    from streamconv.environment.doctor import rows, verdict

    with working("measuring", json=json):
        found = api.doctor(src, dst, model=model)
    if json:
        say_json(found, indent=2)
    else:
        say(columns([(label, shown(value)) for label, value in rows(found)]))
        say("\n" + verdict(found))
    if found["problems"]:
        raise typer.Exit(found["exit_code"])


app.add_typer(verl_app, name="verl")


@app.command("help", cls=Command)
def help_(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[COMMAND]", help="Which command.")
    ] = None,
) -> None:
    """Show the commands, or how to use one of them."""
    # `help COMMAND` has become `COMMAND --help` before it gets here (cli.default).
