"""Which outputs are kept, and what is removed of the others and of sources.

Here the facts are gathered, from what is there now; :mod:`deletions` decides, :mod:`removal` carries
out. Nothing is removed unless asked to apply.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from streamconv.batch.deletions import OutputFacts, SourceFacts, why_keep_output, why_keep_source
from streamconv.batch.discover import Candidate, checkpoint_inside
from streamconv.batch.hooks import awaits_hook, forget_hook
from streamconv.batch.places import output_inside
from streamconv.batch.ready import CLOCK_DOUBT_SECONDS, Tracker, look_at
from streamconv.batch.removal import (
    Outcome,
    aside_of,
    asides_below,
    is_aside,
    is_remainder,
    listing,
    noted,
    place_of,
    remove,
    resume,
)
from streamconv.batch.state import Record, Store, file_name, is_intact
from streamconv.conversion.job import identify
from streamconv.errors import LockedError, StreamconvError
from streamconv.files.filesystems import real_path
from streamconv.files.names import MANIFEST
from streamconv.formats.steps import step_kind, step_number
from streamconv.options import NO_CONFIG, JobOptions
from streamconv.output.manifest import read_manifest
from streamconv.storage.address import Address, place
from streamconv.units import format_size
from streamconv.verification.folder import verify_output

_NOTES = "removals"
_PRUNED = "removed by retention"


@dataclass(frozen=True, slots=True)
class Rule:
    """Keep the ``last`` steps and those that ``every`` divides; both None keeps everything."""

    last: int | None = None
    every: int | None = None

    @property
    def active(self) -> bool:
        """Whether anything is ever removed."""
        return self.last is not None or self.every is not None

    def kept(self, steps: Iterable[int]) -> set[int]:
        """Return the steps to keep."""
        steps = set(steps)
        if not self.active:
            return steps
        last = set(sorted(steps)[-self.last :]) if self.last else set()
        return last | ({s for s in steps if s % self.every == 0} if self.every else set())

    def surplus(
        self,
        records: Iterable[Record],
        tracker: Callable[[Record], Tracker | None] = lambda _: None,
    ) -> list[Record]:
        """Return the records that are not kept; one without a step always is.

        Training that went back to an earlier step has abandoned the later ones: they are not among the
        last by number any more. Those written last are kept in any case, and where it is not certain,
        the last by number, too.
        """
        surplus = []
        for group in groups_of(records):
            steps = {r.step for r in group if r.step is not None}
            certain = {r.step for r in group if _is_abandoned(r, group, tracker(r), surely=True)}
            perhaps = {r.step for r in group if _is_abandoned(r, group, tracker(r), surely=False)}
            live = steps - certain
            kept = self.kept(live) | self.kept(live - perhaps) | self.kept_for_every(steps)
            told = [r for r in group if not _is_behind(r, tracker(r), CLOCK_DOUBT_SECONDS)]
            kept |= self._last_written(told)
            if self.last is not None and len(live) < self.last:
                # The rest are of what was abandoned: again the last by number, and the last written.
                kept |= set(sorted(steps - live)[len(live) - self.last :])
                kept |= self._last_written(group)
            surplus += [r for r in group if r.step is not None and r.step not in kept]
        return surplus

    def _last_written(self, group: Iterable[Record]) -> set[int]:
        """Return the steps that were written last, as we saw them appear and by their own times.

        The two differ where a later look was the first to see an earlier step whole.
        """
        if not self.last:
            return set()
        dated = [(r.generation, r.written_ns, r.step) for r in group if r.step is not None]
        seen = sorted(dated)[-self.last :]
        written = sorted((time, look, step) for look, time, step in dated)[-self.last :]
        return {step for _, _, step in (*seen, *written)}

    def kept_for_every(self, steps: Iterable[int]) -> set[int]:
        """Return the steps that ``every`` divides."""
        return Rule(None, self.every).kept(steps) if self.every else set()


def groups_of(records: Iterable[Record]) -> list[list[Record]]:
    """Return records in groups that are counted apart: by run, model and kind of step."""
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.run, record.model, _kind(record)].append(record)
    return list(groups.values())


def _kind(record: Record) -> str:
    names = reversed(Path(record.relative or record.source).parts)
    return step_kind(next((n for n in names if step_number(n) is not None), ""))


def _is_abandoned(
    record: Record, group: Iterable[Record], tracker: Tracker | None, *, surely: bool
) -> bool:
    """Whether training went back to a step before this one, after it was written.

    It did where we saw an earlier step's content appear after this one's, or the tracker says so long
    after. Times of files alone may come from a copy that was made in any order; and of a record that
    the disk did not take, nobody knows when its content appeared.
    """
    if record.step is None or (surely and not (record.generation and record.written_ns)):
        return False
    if _is_behind(record, tracker, CLOCK_DOUBT_SECONDS if surely else 0.0):
        return True
    for other in group:
        if other.step is not None and other.step < record.step:
            seen_later = other.generation > record.generation
            written_later = other.written_ns > record.written_ns
            if seen_later and other.written_ns >= record.written_ns:
                return True
            if not surely and (seen_later or written_later):
                return True
    return False


def _is_behind(record: Record, tracker: Tracker | None, doubt_seconds: float) -> bool:
    """Whether the tracker names an earlier step, so long after this one was written."""
    return (
        tracker is not None
        and record.step is not None
        and record.written_ns > 0
        and tracker.step < record.step
        and tracker.mtime_ns > record.written_ns + doubt_seconds * 1e9
    )


@dataclass(frozen=True, slots=True)
class Removal:
    """A folder that was removed, or would be; ``refused`` says why it must not.

    ``left`` names what stayed of it, as nobody had listed it; ``damaged`` says that an output is not
    what its manifest says, ``partly`` that the system refused the rest of a removal that was begun.
    """

    kind: str  # "output" or "source"
    path: Path
    nbytes: int
    applied: bool = False
    refused: str = ""
    left: tuple[str, ...] = ()
    damaged: bool = False
    partly: bool = False

    def __str__(self) -> str:
        if self.refused:
            return f"kept {self.kind} {self.path}: {self.refused}"
        did = "removed" if self.applied else "would remove"
        left = f"; left what came meanwhile: {', '.join(self.left[:5])}" if self.left else ""
        return f"{did} {self.kind} {self.path} ({format_size(self.nbytes)}){left}"


def _removal(kind: str, path: Path, nbytes: int, outcome: Outcome) -> Removal:
    refused = outcome.refused
    if refused and aside_of(path).is_dir():
        refused += f"; it is in {aside_of(path)}"
    return Removal(
        kind, path, nbytes, not refused, refused=refused, left=outcome.left, partly=outcome.partly
    )


def remove_output(
    record: Record, store: Store, *, apply: bool, owns: Callable[[Record], bool] = lambda _: True
) -> Removal:
    """Remove a finished output that the rule does not keep, or say what would be removed.

    ``owns`` tells whether it is this run's.
    """
    path = place(record.output)
    try:
        with store.holding(record.name):
            record = store.reload(record.name)
            refused = why_keep_output(_output_facts(record, store, owns))
            if refused or not apply:
                return Removal("output", path, record.write_bytes, refused=refused)
            listed = listing(path)
            refused = damage(path)
            if refused:
                return Removal(
                    "output", path, record.write_bytes, refused=f"it was edited: {refused}"
                )
            outcome = remove(
                path,
                listed,
                _note(store, "output", record),
                recheck=lambda: why_keep_output(_output_facts(record, store, owns)),
            )
            if outcome.refused:
                return _removal("output", path, record.write_bytes, outcome)
            for parent in path.parents:
                if parent == store.output:
                    break
                with contextlib.suppress(OSError):  # not empty: another's
                    parent.rmdir()
            record.state, record.reason, record.evidence = "pruned", _PRUNED, []
            store.save(record)
            forget_hook(record)
    except LockedError as error:
        return Removal("output", path, record.write_bytes, refused=error.what)
    except OSError as error:
        return Removal("output", path, record.write_bytes, refused=str(error.strerror))
    return Removal("output", path, record.write_bytes, applied=True, left=outcome.left)


def _output_facts(record: Record, store: Store, owns: Callable[[Record], bool]) -> OutputFacts:
    path = place(record.output)
    misplaced, edited = _why_not_output(path, store.output), ""
    if not misplaced:
        manifest = read_manifest(path, entries=False)
        listed = {MANIFEST, *(f["name"] for f in (manifest or {"files": ()})["files"])}
        strange = sorted(listing(path).keys() - listed)
        edited = f"it holds what its manifest does not list: {strange[0]}" if strange else ""
    intact = record.state == "done" and is_intact(record)
    return OutputFacts(owns(record), misplaced, edited, intact, awaits_hook(record))


def _why_not_output(path: Path, root: Path) -> str:
    if path.is_symlink() or not path.is_dir():
        return "it is not a folder"
    if not real_path(path).is_relative_to(real_path(root)) or real_path(path) == real_path(root):
        return "it lies outside the output folder"
    try:
        manifest = read_manifest(path, entries=False)
    except StreamconvError as error:
        return error.what
    return "it has no manifest of ours" if manifest is None else ""


def damage(output: Path) -> str:
    """Read every byte of an output; return how it differs from its manifest."""
    try:
        report = verify_output(output)
    except (StreamconvError, OSError) as error:
        return str(error).splitlines()[0]
    return report.problems[0] if report.problems else ""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What decides about sources and does not belong to them.

    ``job`` returns how one is converted, ``training`` why training still needs it, having read the
    later step if told to, ``unfinished`` which other output made of it is not there. ``needed`` are
    folders that conversions read: config and base.
    """

    job: Callable[[Candidate], JobOptions]
    training: Callable[[Candidate, bool], str]
    unfinished: Callable[[Candidate, Record], str] = lambda _, __: ""
    needed: tuple[Path, ...] = ()


def remove_source(
    record: Record, store: Store, candidate: Candidate, around: Surroundings, *, apply: bool
) -> Removal:
    """Remove the source of a verified output, or say what would be removed."""
    path = candidate.path
    if path.is_file():
        nbytes = path.stat().st_size
        return Removal(
            "source", path, nbytes, refused="it is one file, and only folders are deleted"
        )
    try:
        with store.holding(record.name):
            record = store.reload(record.name)
            listed = listing(path)
            nbytes = sum(size for size, _, _ in listed.values())
            wrong = _manifest_damage(record)
            if not wrong:
                refused = why_keep_source(_source_facts(record, candidate, around))
                if apply and not refused:  # nothing cheaper is in the way
                    refused = around.training(candidate, True)
                if refused or not apply:
                    return Removal("source", path, nbytes, refused=refused)
                wrong = damage(place(record.output))
            if wrong:
                record.verified, record.reason = False, f"the output is damaged: {wrong}"
                store.save(record)
                return Removal("source", path, nbytes, refused=record.reason, damaged=True)
            outcome = remove(
                path,
                listed,
                _note(store, "source", record),
                recheck=lambda: (
                    why_keep_source(_source_facts(record, candidate, around))
                    or around.training(candidate, True)
                ),
            )
    except LockedError as error:
        return Removal("source", path, 0, refused=error.what)
    except OSError as error:
        return Removal("source", path, 0, refused=str(error.strerror))
    return _removal("source", path, nbytes, outcome)


def _manifest_damage(record: Record) -> str:
    """Return why the manifest of a verified output, which looks as it did then, cannot be read."""
    if record.state != "done" or record.verified is not True or not is_intact(record):
        return ""
    try:
        read_manifest(place(record.output), entries=False)
    except StreamconvError as error:
        return error.what
    return ""


def _source_facts(record: Record, candidate: Candidate, around: Surroundings) -> SourceFacts:
    is_step = candidate.step is not None and candidate.relative != Path()
    verified = record.state == "done" and record.verified is True
    cheap = is_step and verified and not candidate.finished
    return SourceFacts(
        is_step=is_step,
        finished=candidate.finished,
        verified=verified,
        intact=is_intact(record),
        loads=NO_CONFIG not in record.notices,
        unchanged=look_at(candidate).digest == record.snapshot,
        other_job=_other_job(record, candidate, around.job(candidate)) if cheap else "",
        inside=_inside(candidate.path, around.needed) if cheap else "",
        unfinished=around.unfinished(candidate, record) if cheap else "",
        training=around.training(candidate, False) if cheap else "",
    )


def _other_job(record: Record, candidate: Candidate, job: JobOptions) -> str:
    """Return whether what is in the source now is not what the output was made of, or more."""
    if job.model is not None:
        return f"it may hold other models than {job.model}"
    try:
        manifest = read_manifest(place(record.output), entries=False)
        digest = identify(candidate.path, job).digest
    except StreamconvError as error:
        return error.what
    made_of = manifest["job"]["digest"] if manifest is not None else ""
    return "" if made_of == digest else "its output was made of something else, says its manifest"


def _inside(path: Path, needed: Iterable[Path]) -> str:
    output = output_inside(path)
    if output is not None:
        return f"an output lies in it: {output}"
    other = checkpoint_inside(path)
    if other is not None:
        return f"a checkpoint lies in it that is not converted with it: {other}"
    real = real_path(path)
    config = next((p for p in needed if real_path(p).is_relative_to(real)), None)
    return f"conversions read what lies in it: {config}" if config is not None else ""


def _note(store: Store, kind: str, record: Record) -> Path:
    return store.folder / _NOTES / f"{kind}-{file_name(record.name)}.json"


def resume_removals(store: Store, root: Path, *, apply: bool) -> list[Removal]:
    """Settle what a batch that was killed had put aside to remove, beside outputs or below ``root``.

    It is put back where all of it is there; what was removed in part goes, with ``apply``.
    """
    records = {file_name(record.name): record for record in store}
    settled = []
    for note in sorted((store.folder / _NOTES).glob("*.json")):
        kind, _, name = note.stem.partition("-")
        record = records.get(name)
        if record is None or kind not in ("source", "output"):
            continue
        path = place(record.output if kind == "output" else record.source)
        try:
            with store.holding(record.name):
                # The run is walked through only where the folder is not found without.
                elsewhere = chain(asides_of(store), asides_below(root))
                found = _place_of(note, path, elsewhere)
                if found is None:
                    continue
                path = found
                why_not = "" if apply else "--apply goes on removing it"
                if apply and kind == "source":
                    why_not = damage(place(record.output))
                outcome = resume(note, path, why_not)
                if outcome is None:
                    continue
                done = not outcome.refused and not path.exists()
                if kind == "output" and done and path == place(record.output):
                    record = store.reload(record.name)
                    record.state, record.reason, record.evidence = "pruned", _PRUNED, []
                    store.save(record)
        except LockedError:
            continue
        except OSError as error:
            outcome = Outcome(str(error.strerror))
        settled.append(_removal(kind, path, 0, outcome))
    return settled


def _place_of(note: Path, path: Path, asides: Iterable[Path]) -> Path | None:
    """Return which folder the removal was of that a note tells of; None where nothing is put aside.

    That is ``path``, unless it was moved meanwhile: ``asides`` are looked at for its files.
    """
    found = noted(note)
    places = [aside_of(path)] if found is None or found[0] == path else []
    moved = (aside for aside in asides if found is not None and is_remainder(aside, found[1]))
    aside = next((p for p in chain(places, moved) if p.is_dir() and not p.is_symlink()), None)
    if aside is not None:
        return place_of(aside)
    # A folder that was moved away may come into sight again, by the root of another run.
    if found is None or found[0].parent.is_dir():
        note.unlink(missing_ok=True)
    return None


def asides_of(store: Store) -> list[Path]:
    """Return what was put aside beside the outputs of a folder."""
    places = sorted({store.output, *(place(record.output).parent for record in store)})
    if isinstance(store.output, Address):
        return []  # nothing is put aside in a store
    found = [path for folder in places for path in folder.glob(".*") if is_aside(path.name)]
    return [path for path in found if path.is_dir() and not path.is_symlink()]
