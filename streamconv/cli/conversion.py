"""What ``convert`` and ``verl merge`` do: choose the model, convert, upload."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from streamconv.cli.output import harmless, say, say_json, tell, told_when_stopped
from streamconv.cli.progress import listen, summarize
from streamconv.errors import UsageError, shown
from streamconv.options import Event, Notice
from streamconv.units import format_size

ALL = "all"


def convert(
    src: Path,
    dst: Path,
    options: dict[str, Any],
    *,
    json: bool,
    quiet: bool,
    upload_to: str | None,
    private: bool,
) -> None:
    """Convert one model or all of them; upload the result where ``upload_to`` names a repository.

    ``options`` are those of ``api.convert``. Several models are uploaded as ``upload_to``-actor, ….
    """
    from streamconv import api
    from streamconv.conversion.hub import check_upload

    if upload_to is not None:
        check_upload(upload_to)
    # A cluster's paths may not be this machine's.
    here = options.get("nodes") is None or src.exists()
    ask = here and not (json or quiet) and sys.stdin.isatty() and sys.stderr.isatty()
    _check_place(src, dst, ask=ask)
    model = options.pop("model", None) or _choose(src, ask=ask)
    with listen(json=json, quiet=quiet) as on_event, told_when_stopped(lambda: what_is_kept(dst)):
        if model == ALL:
            results = api.convert_all(src, dst, **options, on_event=on_event)
        else:
            results = {"": api.convert(src, dst, **options, model=model, on_event=on_event)}
    for name, result in results.items():
        summarize(result, json=json, quiet=quiet)
        if upload_to is not None:
            repo = f"{upload_to}-{name}" if name else upload_to
            if not quiet:
                tell(f"uploading to {repo}")
            deleted: list[str] = []

            def heed(event: Event, deleted: list[str] = deleted) -> None:
                if not isinstance(event, Notice):
                    return
                deleted += event.deleted
                if json:
                    say_json(event.to_json())
                elif not quiet:
                    tell(f"notice: {event.text}")

            url = api.upload(result.output, repo, private=private, on_event=heed)
            if json:
                say_json({"event": "uploaded", "url": url, "deleted": deleted})
            elif not quiet:
                say(f"uploaded: {url}")


def _check_place(src: Path, dst: Path, *, ask: bool) -> None:
    """Refuse an output place that is surely a slip, and ask about one that may be one."""
    if str(dst) == "-":
        raise UsageError(
            "the output is a folder: it cannot be written to stdout",
            found="-",
            hint="name a folder; one that is called - is ./-",
        )
    if not ask or dst.exists():
        return
    missing = [p for p in dst.absolute().parents if not p.exists()]
    run = _run_of(src)
    if len(missing) > 1:
        question = f"{missing[-1]} does not exist: make {len(missing)} folders for the output?"
    elif run is not None and dst.resolve().is_relative_to(run):
        question = f"{dst} lies in the training run {run}, which may rotate it away: go on?"
    else:
        return
    sys.stderr.write(f"{harmless(question)} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was done", where=str(dst), hint="choose another output folder")


def _run_of(src: Path) -> Path | None:
    """Return the folder of the training run that ``src`` is a step of, or lies in a step of."""
    from streamconv.formats.steps import step_number

    place = src.resolve()
    steps = (p for p in (place, *place.parents) if step_number(p.name) is not None)
    step = next(steps, None)
    return None if step is None else step.parent


def what_is_kept(dst: Path) -> str:
    """Return what a conversion that was stopped has left, and how to go on."""
    from streamconv.output.staging import staging_path

    staged = staging_path(dst)
    finished = [p for p in (staged / "files").rglob("*.safetensors") if p.is_file()]
    again = "the same command goes on from there"
    if not staged.is_dir():
        return "stopped: nothing was written"
    if not finished:
        return f"stopped before the first file was finished: {again}, without planning again"
    size = format_size(sum(p.stat().st_size for p in finished))
    count = "1 file is" if len(finished) == 1 else f"{len(finished)} files are"
    return (
        f"stopped: {count} finished ({size}) and kept in {shown(str(staged))}; {again} "
        "(the file that was being written is begun anew)"
    )


def _choose(src: Path, *, ask: bool) -> str | None:
    """Ask on a terminal which of several models is meant; None leaves the question to the error."""
    from streamconv.files.inputs import reading
    from streamconv.formats import model_names

    if not ask:
        return None
    with reading(src):
        names = model_names(src)
    if len(names) < 2:
        return None
    tell(f"{shown(str(src))} holds {len(names)} models: {', '.join(map(shown, names))}")
    while True:
        sys.stderr.write(f"which one? [{'/'.join((*names, ALL))}] ")
        sys.stderr.flush()
        answer = sys.stdin.readline().strip()
        if answer in (*names, ALL):
            return answer
        if not answer:
            return None
