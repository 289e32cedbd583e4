"""``average`` and ``difference``: several checkpoints, and one model that is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from streamconv.cli.app import Json, MaxMem, Quiet, Report, TargetPlace, app
from streamconv.cli.command import Command
from streamconv.cli.job_options import NONE, JobOptions, with_job_options
from streamconv.cli.output import told_when_stopped
from streamconv.cli.run_options import RunOptions, keywords, with_run_options
from streamconv.errors import UsageError
from streamconv.files.inputs import local_path

Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="W,W,…",
        help="What each checkpoint is multiplied by, taken as it is: 0.2,0.3,0.5. Default: the mean.",
    ),
]
Ema = Annotated[
    float | None,
    typer.Option(
        "--ema",
        metavar="DECAY",
        help="The moving average that begins with the first checkpoint, such as 0.9.",
    ),
]


def _argument(metavar: str, text: str) -> Any:
    return typer.Argument(parser=local_path, metavar=metavar, help=text)


@app.command(
    cls=Command,
    epilog="streamconv average step_10 step_20 step_30 my-model\n"
    "streamconv average step_10/actor step_20/actor my-model --weights 0.3,0.7\n"
    "streamconv average step_10 step_20 step_30 my-model --ema 0.9 --dtype bf16",
)
@with_job_options
@with_run_options()
def average(
    context: typer.Context,  # noqa: ARG001 - what was said is read from it
    sources: Annotated[list[Path], _argument("SRC...", "The checkpoints, the oldest first.")],
    dst: TargetPlace,
    weights: Weights = None,
    ema: Ema = None,
    max_mem: MaxMem = None,
    job: JobOptions = NONE,
    run: RunOptions = NONE,
    report: Report = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert the average of several checkpoints: mean, weighted, or moving.

    They may be of different formats and meshes. Terms are added up in float64, divided once and rounded
    once; config and tokenizer are those of the first.
    """
    how = {"weights": _numbers(weights), "ema": ema, "max_mem": max_mem, "report": report}
    _average(sources, dst, {**job, **keywords(run), **how}, json=json, quiet=quiet)


@app.command(
    cls=Command,
    epilog="streamconv difference step_200/actor step_100/actor what-changed",
)
@with_job_options
@with_run_options()
def difference(
    context: typer.Context,  # noqa: ARG001 - what was said is read from it
    one: Annotated[Path, _argument("A", "The checkpoint that is subtracted from.")],
    other: Annotated[Path, _argument("B", "The checkpoint that is subtracted.")],
    dst: TargetPlace,
    max_mem: MaxMem = None,
    job: JobOptions = NONE,
    run: RunOptions = NONE,
    report: Report = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write A - B, tensor by tensor, in float32: exact for 16-bit weights."""
    how = {"weights": [1.0, -1.0], "max_mem": max_mem, "report": report}
    options = {"dtype": "float32", **job, **keywords(run), **how}
    _average([one, other], dst, options, json=json, quiet=quiet)


def _average(
    sources: Sequence[Path], dst: Path, options: Mapping[str, Any], *, json: bool, quiet: bool
) -> None:
    from streamconv import api
    from streamconv.cli.conversion import what_is_kept
    from streamconv.cli.progress import listen, summarize

    with listen(json=json, quiet=quiet) as on_event, told_when_stopped(lambda: what_is_kept(dst)):
        result = api.average(sources, dst, **options, on_event=on_event)
    summarize(result, json=json, quiet=quiet)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            "not a list of weights", found=text, expected="such as 0.2,0.3,0.5"
        ) from error
