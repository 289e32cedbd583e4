"""``streamconv families``: the Megatron families, who writes them, and what is checked of each."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from streamconv.cli.app import Json, app
from streamconv.cli.command import Command
from streamconv.cli.output import columns, say, say_json


@app.command(
    cls=Command,
    epilog="streamconv families\nstreamconv families qwen3_5     # the family of a model type",
)
def families(
    model_type: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A family or a model type of config.json."),
    ] = None,
    json: Json = False,
) -> None:
    """Show the families of Megatron models: model types, trainers, and what was tried."""
    from streamconv.errors import UsageError
    from streamconv.families.known import known

    found = [k for k in known() if model_type in (None, k.name, *k.model_types)]
    if not found:
        raise UsageError(
            f"no family has the name or the model type {model_type!r}",
            hint="`streamconv families` lists all of them",
        )
    if json:
        say_json({"families": [dataclasses.asdict(k) for k in found]}, indent=2)
    elif model_type is None:
        say(columns([(k.name, ", ".join(k.model_types)) for k in found]))
        say("\n`streamconv families NAME` says who writes one, and what it was tried with")
    else:
        for k in found:
            say(f"family: {k.name}\nmodel types: {', '.join(k.model_types)}")
            say(f"written by: {', '.join(k.trainers)}\ntried with: {k.tried}")
            say(f"not checked: {k.unchecked}")
