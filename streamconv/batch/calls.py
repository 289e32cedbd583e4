"""Whole runs from Python: ``streamconv.convert_run`` and ``streamconv.status``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypedDict, Unpack

from streamconv.errors import UsageError
from streamconv.options import JobKeywords
from streamconv.storage.address import Address, StrPath, place

if TYPE_CHECKING:
    from streamconv.batch.round import Round
    from streamconv.batch.state import Record


class BatchKeywords(TypedDict, total=False):
    """The options of ``streamconv batch`` beside those of a conversion."""

    max_mem: str | None
    part: str | None
    nodes: str | None
    jobs: int
    every: int | None
    steps: str | None
    last: int | None
    name: str | None
    settle: str
    pin: bool
    retries: int
    verify: bool
    keep_last: int | None
    keep_every: int | None
    delete_sources: bool
    apply: bool
    on_done: str | None
    on_error: str | None
    hook_limit: str
    prometheus: StrPath | None
    report: StrPath | None
    overwrite: bool
    no_sync: bool
    direct: bool
    no_source_crc: bool
    checksum: str | None
    io_threads: int
    no_cache: bool


class RunKeywords(BatchKeywords, JobKeywords, total=False):
    """All keywords of :func:`convert_run`."""


def convert_run(
    root: StrPath,
    dst: StrPath | None = None,
    *,
    dry_run: bool = False,
    on_record: Callable[[str, Record], None] = lambda _what, _record: None,
    **options: Unpack[RunKeywords],
) -> Round:
    """Convert every checkpoint of the training run ``root`` that is whole and not converted yet.

    One round of ``streamconv batch ROOT DST``; ``root`` may be a ``jobs.toml``, which names its
    outputs itself. ``on_record`` gets what happens to each output (``queued``, ``started``,
    ``progress``, ``done``, ``failed``, ``gone``, …) and its record. The round that is returned
    counts outputs by how they ended and has an ``exit_code``; the errors of single checkpoints are
    in its ``records`` and raise nothing. With ``dry_run`` its ``tasks`` say what would be
    converted, and nothing is written.
    Raises :class:`UsageError` for options that do not make sense.
    """
    from streamconv.batch.cycle import Batch
    from streamconv.batch.settings import load, of_one_run

    where = place(root)
    said = {k: v for k, v in options.items() if v is not None}
    if not isinstance(where, Address) and where.is_file():
        made = load(where, said)
    elif dst is None:
        raise UsageError("a run needs an output folder", where=str(where))
    else:
        made = of_one_run(where, place(dst), said)
    batch = Batch(made, lambda what, task, _text: on_record(what, task.record))
    return batch.preview() if dry_run else batch.round()


def status(dst: StrPath) -> list[Record]:
    """Return how the conversions of a batch into ``dst`` stand, by run and step.

    The list is empty where no batch has worked on the folder.
    """
    from streamconv.batch.state import read_records

    return read_records(place(dst))
