"""The options of a run, which change no byte of the output: declared once, as those of the job are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from streamconv.cli.command import SPEED
from streamconv.cli.job_options import in_place_of

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another job's output.")]
NoSync = Annotated[
    bool,
    typer.Option(
        "--no-sync",
        envvar="STREAMCONV_NO_SYNC",
        show_envvar=True,
        help="Faster, but a power cut may lose the output.",
        rich_help_panel=SPEED,
    ),
]
Direct = Annotated[
    bool,
    typer.Option(
        "--direct",
        envvar="STREAMCONV_DIRECT",
        show_envvar=True,
        help="Write past the page cache where the file system can.",
        rich_help_panel=SPEED,
    ),
]
NoSourceCrc = Annotated[
    bool,
    typer.Option(
        "--no-source-crc",
        help="Do not check the checksums of the source.",
        rich_help_panel=SPEED,
    ),
]
Checksum = Annotated[
    str | None,
    typer.Option(
        "--checksum",
        metavar="KIND",
        envvar="STREAMCONV_CHECKSUM",
        show_envvar=True,
        help="sha256: add such digests to the manifest.",
        rich_help_panel=SPEED,
    ),
]
IoThreads = Annotated[
    int,
    typer.Option(
        "--io-threads",
        metavar="N",
        envvar="STREAMCONV_IO_THREADS",
        show_envvar=True,
        help="Readers at work at once.",
        rich_help_panel=SPEED,
    ),
]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache",
        envvar="STREAMCONV_NO_CACHE",
        show_envvar=True,
        help="Ask transformers again what it said of such a model before, and remember nothing.",
        rich_help_panel=SPEED,
    ),
]

_RUN: Mapping[str, tuple[Any, Any]] = {
    "overwrite": (Overwrite, False),
    "no_sync": (NoSync, False),
    "direct": (Direct, False),
    "no_source_crc": (NoSourceCrc, False),
    "checksum": (Checksum, None),
    "io_threads": (IoThreads, 1),
    "no_cache": (NoCache, False),
}
RunOptions = Mapping[str, Any]


def with_run_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that puts these options (all without names) in place of a parameter ``run``.

    The command gets them by the names of their flags; :func:`keywords` says them as Python does.
    """
    options = {name: _RUN[name] for name in names or _RUN}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        return in_place_of("run", options, command, lambda _context, values: values)

    return decorate


def keywords(run: RunOptions) -> dict[str, Any]:
    """Return the options of a run as keyword arguments: ``--no-sync`` is ``sync=False``."""
    return {
        name.removeprefix("no_"): not value if name.startswith("no_") else value
        for name, value in run.items()
    }
