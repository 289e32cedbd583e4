"""What ``convert`` and ``verl merge`` do: choose the model, convert, upload."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from streamconv.cli.output import say, say_json, tell
from streamconv.cli.progress import listen, summarize
from streamconv.errors import shown
from streamconv.options import Event, Notice

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
    model = options.pop("model", None) or _choose(src, ask=not (json or quiet))
    with listen(json=json, quiet=quiet) as on_event:
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


def _choose(src: Path, *, ask: bool) -> str | None:
    """Ask on a terminal which of several models is meant; None leaves the question to the error."""
    from streamconv.files.inputs import reading
    from streamconv.formats import model_names

    if not (ask and sys.stdin.isatty() and sys.stderr.isatty()):
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
