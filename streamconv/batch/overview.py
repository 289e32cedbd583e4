"""Watches the conversions of a round, for the report of the batch and the pages of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from streamconv.batch.round import Round
from streamconv.batch.runner import What
from streamconv.batch.state import Store, order
from streamconv.batch.tasks import Task
from streamconv.report.charts import Span
from streamconv.report.overview import write_overview
from streamconv.report.timeline import Timeline


class Overview:
    """The pages of a batch: ``path``, and one for each output in a folder beside it."""

    def __init__(self, path: Path, stores: Sequence[Store]) -> None:
        self._path = path.absolute()
        self._stores = stores
        self._timeline: Timeline | None = None
        self._begun: dict[str, float] = {}
        self._done: dict[str, int] = {}
        self._spans: list[Span] = []

    def page_of(self, store: Store, name: str) -> Path:
        """Return where the page of an output is."""
        place = store.output.name
        if len(self._stores) > 1:
            place = f"{self._stores.index(store) + 1}-{place}"
        pages = self._path.with_suffix("")
        if pages == self._path:  # which has no suffix to leave out
            pages = self._path.with_name(f"{self._path.name}.pages")
        return pages / place / f"{name}.html"

    def __enter__(self) -> Overview:
        self._timeline = Timeline()
        self._timeline.__enter__()
        self._begun, self._done, self._spans = {}, {}, []
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timeline is not None:
            self._timeline.__exit__(kind, error, trace)

    def listen(self, what: What, task: Task, _text: str) -> None:
        """Hear what happens to an output."""
        if self._timeline is None:
            return
        now = self._timeline.seconds
        if what == "started":
            self._begun[task.key] = now
            task.report = self.page_of(task.store, task.record.name)
        elif what == "progress" or what == "done":
            self._done[task.key] = task.record.done_bytes
            self._timeline.note(sum(self._done.values()))
        begun = None if what in ("started", "progress") else self._begun.pop(task.key, None)
        if begun is not None:
            self._spans.append(Span(begun, now, task.record.name, what))

    def write(self, made: Round, next_round: str = "") -> None:
        """Write the page of the batch after a round."""
        links = {}
        for store in self._stores:
            for record in store:
                page = self.page_of(store, record.name)
                if page.is_file():
                    links[record.output] = quote(page.relative_to(self._path.parent).as_posix())
        write_overview(
            self._path,
            outputs=[str(store.output) for store in self._stores],
            records=[record.to_json() for record in sorted(made.records, key=order)],
            spans=self._spans,
            timeline=self._timeline,
            budget_bytes=made.budget_bytes,
            peak_bytes=made.peak_bytes,
            seconds=made.seconds,
            problems=[str(problem) for problem in made.problems],
            removals=[str(removal) for removal in made.removals],
            links=links,
            next_round=next_round,
        )
        self._timeline, self._spans = None, []
