"""What a round does after the conversions: retention, and the deletion of sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamconv.batch.discover import Candidate, is_state
from streamconv.batch.retention import (
    Removal,
    Surroundings,
    damage,
    groups_of,
    remove_output,
    remove_source,
)
from streamconv.batch.settings import RunSettings
from streamconv.batch.state import Record, Store, is_intact, read_records
from streamconv.batch.survey import Survey
from streamconv.errors import BadInputError, UnsafeInputError
from streamconv.files.filesystems import real_path
from streamconv.storage.address import place


@dataclass(frozen=True, slots=True)
class Surveyed:
    """A run, the records of its outputs, and what was seen of it; None where it was not to be seen."""

    run: RunSettings
    store: Store
    survey: Survey | None


class Read:
    """The outputs that were read and found to be whole, as they look."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], str] = {}

    def damage(self, record: Record) -> str:
        """Return how an output differs from its manifest, having read it once."""
        key = (record.output, repr(record.evidence))
        if key not in self._found:
            self._found[key] = damage(place(record.output))
        return self._found[key]


def tidy(runs: Sequence[Surveyed], read: Read, *, apply: bool) -> list[Removal]:
    """Apply retention and delete sources, run by run; without ``apply`` say what would be done."""
    removals = []
    for one in runs:
        if one.survey is None:
            continue
        if one.survey.rule.active:
            removals += _outputs(one, one.survey, read, apply=apply)
        if one.run.delete_sources:
            removals += _sources(one, one.survey, runs, apply=apply)
    return removals


def _outputs(one: Surveyed, survey: Survey, read: Read, *, apply: bool) -> list[Removal]:
    """Remove outputs in favour of later ones, which are read before: a damaged one does not count."""
    kept, removals = survey.kept(), []
    surplus = survey.surplus(kept)
    while apply and surplus:
        damaged = [r for r in _in_favour_of(kept, surplus, survey) if read.damage(r)]
        if not damaged:
            break
        removals += [
            Removal(
                "output",
                place(r.output),
                r.write_bytes,
                refused=f"the output is damaged: {read.damage(r)}",
                damaged=True,
            )
            for r in damaged
        ]
        kept = [r for r in kept if r not in damaged]
        surplus = survey.surplus(kept)
    return removals + [
        remove_output(record, one.store, apply=apply, owns=survey.owns) for record in surplus
    ]


def _in_favour_of(
    kept: Sequence[Record], surplus: Sequence[Record], survey: Survey
) -> list[Record]:
    """Return the last outputs of each group that loses some."""
    found: list[Record] = []
    for group in groups_of(kept):
        staying = [r for r in group if r not in surplus and r.step is not None]
        if len(staying) < len(group):
            found += sorted(staying, key=lambda r: r.step or 0)[-(survey.rule.last or 1) :]
    return found


def _sources(
    one: Surveyed, survey: Survey, runs: Sequence[Surveyed], *, apply: bool
) -> list[Removal]:
    for training in survey.training.values():
        training.look_again()
    # As they are now, those of other batches too.
    known = [(other, read_records(other.store.output)) for other in runs]
    needed = [p for r in runs for p in (r.run.hf_config, r.run.base) if p is not None]
    around = Surroundings(
        job=one.run.job_options,
        training=lambda c, read: survey.training[c.run_dir].why_needed(
            c, lambda step: _unfit(step, known), read=read
        ),
        unfinished=lambda c, record: _unfinished(c, record, one, known),
        needed=tuple(needed),
    )
    done = {n: c for n, c in survey.candidates.items() if one.store.get(n).state == "done"}
    # In the order of their steps: the later ones are there as long as they are asked for.
    return [
        remove_source(one.store.get(name), one.store, c, around, apply=apply)
        for name, c in done.items()
    ]


_BAD_INPUT = (BadInputError.exit_code, UnsafeInputError.exit_code)
_Known = Sequence[tuple[Surveyed, Sequence[Record]]]


def _unfit(step: Path, known: _Known) -> str:
    """Return why training cannot go on from a step: what was deleted of it, or found to be damaged."""
    for record in (r for _, records in known for r in records):
        source = place(record.source)
        if not source.is_relative_to(step) or is_state(record.model):
            continue
        if record.state == "done" and not source.exists():
            return f"{source.name} was deleted"
        if record.state == "failed" and (record.error or {}).get("exit_code") in _BAD_INPUT:
            return f"{source.name} could not be converted: {record.reason}"
    return ""


def _unfinished(candidate: Candidate, record: Record, one: Surveyed, known: _Known) -> str:
    """Return another output that is to be made of a source, and is not there."""
    for other, records in known:
        if other.survey is None:
            if real_path(candidate.path).is_relative_to(real_path(other.run.root)):
                return (
                    f"another output is made of it, and {other.run.output} could not be looked at"
                )
            continue
        for found in records:
            if other.store is one.store and found.name == record.name:
                continue
            if place(found.source) != candidate.path or found.state == "pruned":
                continue
            if found.state != "done" or not is_intact(found):
                return f"another output that is made of it is not done: {found.output}"
    return ""
