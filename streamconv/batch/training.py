"""The steps of a run as training sees them: which came last, and from which it can go on.

Whoever deletes a source must leave a later step that is whole: weights, optimizer, critic, whatever the
trainer wrote. What that is, the steps themselves say: the later one must have all that the earlier has,
and every file of it must be whole.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import xxhash

from streamconv import formats
from streamconv.batch.discover import Candidate, checkpoints_in
from streamconv.batch.leases import boot_clock
from streamconv.batch.readings import TORCH_SUFFIXES, ZIP, ZIP_END, ZIP_END_BYTES, Readings
from streamconv.batch.ready import Tracker, lies_still, read_tracker
from streamconv.batch.removal import is_aside
from streamconv.batch.walk import Entry, walk
from streamconv.errors import StreamconvError
from streamconv.files.inputs import LocalFile
from streamconv.files.jsonfile import read_json
from streamconv.formats.safetensors_file import read_header
from streamconv.formats.steps import step_kind, step_number
from streamconv.torchfile.window import FileWindow
from streamconv.torchfile.zipdir import hash_directory

_MAX_JSON_BYTES = 4 << 20
_PICKLE = b"\x80"
_WEIGHTS = re.compile(r"model_world_size_\d+_rank_\d+\.pt|\.metadata", re.ASCII)
_SETS = (
    re.compile(r"(?P<of>.*world_size_(?P<count>\d+)_rank_)(?P<at>\d+)(?P<rest>.*)", re.ASCII),
    re.compile(r"(?P<of>.*-)(?P<at>\d+)(?P<rest>-of-(?P<count>\d+).*)", re.ASCII),
)


@dataclass(frozen=True, slots=True)
class Step:
    """One step's folder as it was at one moment: ``files`` are (bytes, time) by name.

    ``changed_ns`` is the latest time in it, those of folders included: of its own only where it is
    empty, for a deletion changes that as well. ``links`` are the names of those files that are links.
    """

    path: Path
    kind: str
    number: int
    files: Mapping[str, tuple[int, int]]
    changed_ns: int
    links: tuple[str, ...] = ()

    @property
    def written_ns(self) -> int:
        """Return when a file of it was written last; a deletion does not count."""
        return max((time for _, time in self.files.values()), default=0)

    @property
    def digest(self) -> str:
        """Return what changes with every file."""
        text = "\n".join(f"{name}\0{size}\0{t}" for name, (size, t) in sorted(self.files.items()))
        return xxhash.xxh3_64_hexdigest(text.encode(errors="surrogateescape"))


def look_at_step(path: Path) -> Step:
    """Return how a step's folder looks now; raises ``OSError`` where it goes meanwhile."""
    created = path.stat().st_mtime_ns
    met = list(walk(path, skip=is_aside))
    changed = max((entry.status.st_mtime_ns for entry in met), default=0)
    files = {e.name: (_size(e), e.status.st_mtime_ns) for e in met if not e.is_folder}
    links = tuple(e.name for e in met if e.is_link)
    kind, number = step_kind(path.name), step_number(path.name) or 0
    return Step(path, kind, number, files, changed or created, links)


def _size(entry: Entry) -> int:
    try:
        return Path(entry.path).stat().st_size if entry.is_link else entry.status.st_size
    except OSError:
        return -1  # a link that leads nowhere


def leads_into(link: Path, source: Path, step_dir: Path) -> bool:
    """Whether a link leads to ``source``, into it, or to its step, of which it is a part."""
    target, real = Path(os.path.realpath(link)), Path(os.path.realpath(source))
    if not target.is_relative_to(os.path.realpath(step_dir)):
        return False
    return target.is_relative_to(real) or real.is_relative_to(target)


def steps_in(run_dir: Path) -> list[Step]:
    """Return the steps of a run; one that goes this moment is left out."""
    found = []
    for path in sorted(run_dir.iterdir()) if run_dir.is_dir() else []:
        if step_number(path.name) is None or path.is_symlink() or not path.is_dir():
            continue
        try:
            found.append(look_at_step(path))
        except FileNotFoundError:
            continue
    return found


def is_later(a: Step, b: Step) -> bool:
    """Whether ``a`` certainly came after ``b``: both number and time say so.

    Numbers of unlike kinds (epochs and steps) cannot be compared: there the time alone decides.
    """
    if a.kind != b.kind:
        return a.written_ns > b.written_ns
    return a.number > b.number and a.written_ns >= b.written_ns


def may_be_later(a: Step, b: Step) -> bool:
    """Whether ``a`` may have come after ``b``: its number says so, or where there is none, its time."""
    return a.number > b.number if a.kind == b.kind else a.written_ns >= b.written_ns


class Stillness:
    """For how long this process has seen folders as they are."""

    def __init__(self) -> None:
        self._since: dict[Path, tuple[str, float]] = {}

    def seconds(self, path: Path, digest: str) -> float:
        """Note how a folder looks now; return since when."""
        now = boot_clock()[1]
        known, since = self._since.get(path, ("", now))
        if known != digest:
            self._since[path] = digest, now
            return 0.0
        return now - since


class Training:
    """The steps of one run in one round, looked at when it began and when sources are to be deleted.

    ``readings`` are what was read of them.
    """

    def __init__(
        self,
        run_dir: Path,
        settle_seconds: float,
        stillness: Stillness,
        now_ns: int,
        readings: Readings,
    ) -> None:
        self.readings = readings
        self._run_dir = run_dir
        self._settle = settle_seconds
        self._stillness = stillness
        self._now_ns = now_ns
        self._broken: dict[tuple[Path, str], str] = {}
        self._steps = steps_in(run_dir)
        self._first = {s.path: s.digest for s in self._steps}
        for step in self._steps:
            stillness.seconds(step.path, step.digest)

    def look_again(self) -> None:
        """Look at all steps as they are now."""
        self._steps = steps_in(self._run_dir)

    def why_needed(
        self, candidate: Candidate, unfit: Callable[[Path], str], *, read: bool = False
    ) -> str:
        """Return why training still needs a source, empty where a later step will do.

        ``unfit`` returns why a step is none to go on from, as far as that is known. With ``read`` every
        record of the later step is read, unless that was done before.
        """
        tracker = read_tracker(self._run_dir)
        if tracker is not None and tracker.step == candidate.step:
            return "training goes on from it"
        mine = look_at_step(candidate.step_dir)
        others = [s for s in self._steps if s.path != mine.path]
        source, step_dir = candidate.path, candidate.step_dir
        links = (p for p in self._links([mine, *others]) if not p.is_relative_to(source))
        link = next((p for p in links if leads_into(p, source, step_dir)), None)
        if link is not None:
            return f"a link leads to what lies in it: {link}"
        for step in others:
            if may_be_later(step, mine) and not self._lies_still(step, tracker):
                return (
                    f"{step.path.name} may still be written: it has not lain still for long enough"
                )
        reasons = []
        later = [s for s in others if is_later(s, mine)]
        for step in sorted(later, key=lambda s: (s.written_ns, s.number), reverse=True):
            now = look_at_step(step.path)
            if now.digest != step.digest:
                return f"{step.path.name} is being written"
            reason = (
                unfit(step.path)
                or self._why_not_whole(now, mine, others)
                or self.readings.damage(step.path, now.files, read=read)
            )
            if not reason:
                return ""
            reasons.append(f"{step.path.name} will not do: {reason}")
        return "; ".join(["training goes on from it", *reasons[:1]])

    def _links(self, steps: Iterable[Step]) -> Iterator[Path]:
        """Yield the links in the run's folder and in ``steps``."""
        yield from (path for path in self._run_dir.iterdir() if path.is_symlink())
        yield from (step.path / name for step in steps for name in step.links)

    def _lies_still(self, step: Step, tracker: Tracker | None) -> bool:
        if self._first.get(step.path) != step.digest:
            return False
        if (
            tracker is not None
            and step.number <= tracker.step
            and step.written_ns <= tracker.mtime_ns
        ):
            return True
        return lies_still(
            step.changed_ns,
            self._settle,
            still_seconds=self._stillness.seconds(step.path, step.digest),
            now_ns=self._now_ns,
        )

    def _why_not_whole(self, step: Step, mine: Step, others: Iterable[Step]) -> str:
        lacking = next(lacks(step, mine), "") or next(lacks_part(step, others), "")
        if lacking:
            return lacking
        key = (step.path, step.digest)
        if key not in self._broken:
            self._broken[key] = next(broken(step), "")
        return self._broken[key]


def lacks(step: Step, like: Step) -> Iterator[str]:
    """Yield what ``step`` has not, and ``like`` has."""
    has, wanted = _by_pattern(step), _by_pattern(like)
    for pattern, names in wanted.items():
        if pattern not in has:
            yield f"it has no {names[0]}"
        elif len(has[pattern]) < len(names) and _set_of(names[0]) is None:
            yield f"it has {len(has[pattern])} files such as {names[0]}, not {len(names)}"
    for pattern, names in has.items():
        for name in names:
            if step.files[name][0] == 0 and any(like.files[n][0] for n in wanted.get(pattern, ())):
                yield f"{name} is empty"


def lacks_part(step: Step, others: Iterable[Step]) -> Iterator[str]:
    """Yield models (actor, critic) that ``step`` has not, and some other step has."""
    for other in others:
        for part in sorted(_parts(other) - _parts(step)):
            yield f"it has no {part}, as {other.path.name} has"


def _parts(step: Step) -> set[str]:
    found = (PurePosixPath(name) for name in step.files)
    return {str(p.parent) for p in found if _WEIGHTS.fullmatch(p.name)}


def broken(step: Step) -> Iterator[str]:
    """Yield what is not whole in ``step``, as far as its names and the ends of its files tell."""
    yield from _incomplete_sets(step)
    yield from _unlike_folders(step)
    for name, (size, _) in step.files.items():
        yield from _broken(step.path / name, size)
    for path in checkpoints_in(step.path):
        try:
            location = formats.detect(path)
            if location is not None:
                location.identify()
        except (StreamconvError, OSError) as error:
            yield str(error).splitlines()[0]


def _by_pattern(step: Step) -> dict[str, list[str]]:
    """Return the names of files by what they are with all numbers alike."""
    found = defaultdict(list)
    for name in sorted(step.files):
        found[re.sub(r"\d+", "#", name)].append(name)
    return found


def _set_of(name: str) -> re.Match[str] | None:
    return next((m for s in _SETS if (m := s.fullmatch(name))), None)


def _incomplete_sets(step: Step) -> Iterator[str]:
    """Yield what is missing of files that say of how many they are one."""
    sets: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    for name in step.files:
        match = _set_of(name)
        if match is not None:
            sets[match["of"], match["rest"], int(match["count"])].add(int(match["at"]))
    for (of, rest, count), numbers in sets.items():
        if len(numbers) < count:
            yield f"it has {len(numbers)} of {count} files {of}*{rest}"


def _unlike_folders(step: Step) -> Iterator[str]:
    """Yield folders of one kind (``mp_rank_00``, ``mp_rank_01``) that lack what another has."""
    inside: dict[str, Counter[str]] = defaultdict(Counter)
    for name in step.files:
        path = PurePosixPath(name)
        inside[str(path.parent)][re.sub(r"\d+", "#", path.name)] += 1
    kinds = defaultdict(list)
    for folder in inside:
        kinds[re.sub(r"\d+", "#", folder)].append(folder)
    for folders in kinds.values():
        for lacking in folders:
            other = next((f for f in folders if inside[f].keys() - inside[lacking].keys()), None)
            if other is not None:
                lost = min(inside[other].keys() - inside[lacking].keys())
                yield f"{lacking} has no {lost}, as {other} has"


def _broken(path: Path, size: int) -> Iterator[str]:
    """Yield what is wrong with a file, as far as its ends tell."""
    if size < 0:
        yield f"{path} is a link that leads nowhere"
        return
    try:
        if path.suffix == ".safetensors":
            read_header(path)
        elif path.suffix == ".json" and size <= _MAX_JSON_BYTES:
            read_json(path, most_bytes=_MAX_JSON_BYTES)
        elif path.suffix in TORCH_SUFFIXES:
            yield from _broken_torch_file(path, size)
    except (StreamconvError, OSError) as error:
        yield str(error).splitlines()[0]


def _broken_torch_file(path: Path, size: int) -> Iterator[str]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        begin = os.pread(fd, len(ZIP), 0)
        if path.suffix == ".distcp":  # torch.save's zips, one after the other
            end = os.pread(fd, len(ZIP_END), max(0, size - ZIP_END_BYTES))
            if size and (begin != ZIP or end != ZIP_END):
                yield f"{path} is not whole"
        elif begin == ZIP:
            hash_directory(FileWindow(LocalFile(fd, str(path)), 0, size))
        elif path.suffix in {".pt", ".pth"} and begin[:1] != _PICKLE:
            yield f"{path} is not a file of torch's"
    finally:
        os.close(fd)
