"""Which of the checkpoints that were found are wanted, and what their outputs are called."""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from streamconv.batch.discover import Candidate
from streamconv.errors import UsageError

_FIELDS = ("run", "step", "step_dir", "model", "path", "format")


@dataclass(frozen=True, slots=True)
class Steps:
    """Inclusive ranges of steps: ``100``, ``100:900``, ``:900``, ``100:``, and lists of these."""

    ranges: tuple[tuple[int | None, int | None], ...]

    def __contains__(self, step: int) -> bool:
        return any(
            (low is None or low <= step) and (high is None or step <= high)
            for low, high in self.ranges
        )


def parse_steps(text: str) -> Steps:
    """Return the steps that ``text`` names; raises :class:`UsageError`."""
    ranges = []
    for item in text.split(","):
        low, colon, high = (part.strip() for part in item.partition(":"))
        ends = (low, high if colon else low)
        if not any(ends) or not all(end == "" or end.isdecimal() for end in ends):
            raise UsageError(
                f"not a range of steps: {text!r}", expected="such as 100:900, 500: or 100,200"
            )
        begin, end = (int(e) if e else None for e in ends)
        if begin is not None and end is not None and begin > end:
            raise UsageError(f"not a range of steps: {item!r}", hint=f"{end}:{begin}")
        ranges.append((begin, end))
    return Steps(tuple(ranges))


@dataclass(frozen=True, slots=True)
class Filter:
    """What is wanted: one model of each step, steps that a number divides, a range, the last few."""

    model: str | None = None
    every: int | None = None
    steps: Steps | None = None
    last: int | None = None

    def choose(self, found: Iterable[Candidate]) -> list[Candidate]:
        """Return the candidates that pass; one without a step fails every filter of steps.

        A model that no folder is called after is looked for in checkpoints that are alone in a step.
        """
        found = list(found)
        if self.model is not None:
            alone = Counter(c.step_dir for c in found)
            named = [c for c in found if c.is_called(self.model)]
            found = named or [c for c in found if alone[c.step_dir] == 1]
        wanted = [c for c in found if self.passes(c)]
        return keep_last(wanted, self.last) if self.last is not None else wanted

    def passes(self, c: Candidate) -> bool:
        """Whether a candidate's step is wanted, not counting which are the last."""
        if c.step is None:
            return self.every is None and self.steps is None and self.last is None
        if self.every is not None and c.step % self.every:
            return False
        return self.steps is None or c.step in self.steps


def keep_last(candidates: Iterable[Candidate], count: int) -> list[Candidate]:
    """Return the ``count`` highest steps of each model of each run, in the order they came in."""
    by_model: dict[tuple[str, str], list[int]] = defaultdict(list)
    candidates = list(candidates)
    for c in candidates:
        if c.step is not None:
            by_model[c.run, c.model].append(c.step)
    last = {key: set(sorted(steps)[-count:]) for key, steps in by_model.items()}
    return [c for c in candidates if c.step in last.get((c.run, c.model), ())]


def namer(template: str | None, filtered_model: str | None) -> Callable[[Candidate], str]:
    """Return what names outputs, relative to the output folder.

    Without a template an output is called as its source is below the root; where one model of each
    step was asked for, as the step's folder.
    """
    if template is None:
        template = "{step_path}" if filtered_model else "{path}"
    else:
        _check_template(template)

    def name(c: Candidate) -> str:
        root = c.path if c.relative == Path() else c.path.parents[len(c.relative.parts) - 1]
        inside = c.step_dir.is_relative_to(root) and c.step_dir != root
        step_path = c.step_dir.relative_to(root) if inside else Path(c.step_dir.name)
        text = _filled(
            template,
            run=c.run,
            step="none" if c.step is None else c.step,
            step_dir=c.step_dir.name,
            model=c.model or "model",
            path=c.path.name if c.relative == Path() else c.place.as_posix(),
            step_path=step_path.as_posix(),
            format=c.format,
        )
        return _checked_name(text, c)

    return name


def _check_template(template: str) -> None:
    try:
        fields = [f for _, f, _, _ in string.Formatter().parse(template) if f is not None]
    except ValueError as error:
        raise UsageError(f"not a template: {template!r}", found=str(error)) from None
    for field in fields:
        if field not in _FIELDS:
            raise UsageError(
                f"unknown field in the template: {{{field}}}",
                expected=", ".join(f"{{{f}}}" for f in _FIELDS),
            )
    _filled(template, **dict.fromkeys(_FIELDS, "x") | {"step": 1})


def _filled(template: str, **facts: str | int) -> str:
    try:
        return template.format(**facts)
    except (ValueError, LookupError, MemoryError) as error:
        # A step that is none is a word, which {step:06d} cannot show.
        raise UsageError(f"not a template: {template!r}", found=str(error) or "too long") from None


def _checked_name(text: str, c: Candidate) -> str:
    name = PurePosixPath(text)
    if name.is_absolute() or not name.parts or any(p.startswith(".") for p in name.parts):
        raise UsageError(
            f"the template makes an output name that cannot be used: {text!r}",
            where=str(c.path),
            expected="a relative path without parts that begin with a dot",
        )
    return str(name)


def named(
    candidates: Iterable[Candidate], name: Callable[[Candidate], str]
) -> dict[str, Candidate]:
    """Return the candidates by output name; two of one name are an error.

    An output inside another's folder is one too: the outer one would be replaced as a whole.
    """
    outputs: dict[str, Candidate] = {}
    for c in candidates:
        chosen = name(c)
        if chosen in outputs:
            _refuse(chosen, [outputs[chosen], c])
        outputs[chosen] = c
    for chosen, c in outputs.items():
        for parent in PurePosixPath(chosen).parents:
            if str(parent) in outputs:
                _refuse(str(parent), [outputs[str(parent)], c])
    return outputs


def _refuse(name: str, sources: Sequence[Candidate]) -> None:
    raise UsageError(
        f"two checkpoints would be written to one output: {name}",
        found=", ".join(str(c.path) for c in sources),
        hint="tell them apart in the template with {run} or {model}, or pick one: --model actor",
    )
