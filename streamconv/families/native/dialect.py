"""What a dialect is: a trainer's own names, the families that know them, and how to tell them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from streamconv.families.prediction import PredictionNames
from streamconv.families.rules import Family
from streamconv.tracing.wrappers import without_markers

_CAPTURE = re.compile(r"\{\w+\}")
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


@dataclass(frozen=True)
class Dialect:
    """The names of one trainer.

    ``name`` is what to call it. ``marks`` are patterns of names that each of its checkpoints has and no
    model of HuggingFace's; the first has no number in it. ``dropped`` are patterns of tensors that are
    part of no model, with the reason why they are left out. ``prediction`` says where its layers for
    multi-token prediction are. ``refused`` says of model types why there are no rules for them.
    """

    name: str
    marks: tuple[str, ...]
    families: tuple[Family, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    prediction: PredictionNames | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def patterns(self) -> frozenset[str]:
        """Return all names that some family of it knows, a ``#`` for each number."""
        rules = (s for f in self.families for r in f.rules for s in r.sources)
        left_out = (self.dropped, *(f.dropped for f in self.families))
        dropped = (p for some in left_out for p, _ in some)
        return frozenset(map(_of_pattern, (*rules, *dropped)))

    def knows(self, config: Mapping[str, Any] | None) -> bool:
        """Whether there are rules for the model of a config.json."""
        kind = config.get("model_type") if config is not None else None
        return any(kind in f.model_types for f in self.families)

    def has(self, name: str) -> bool:
        """Whether some family of it knows a name, which has nothing in front."""
        return _alike(without_markers(name)) in self.patterns

    def prefix_of(self, names: Sequence[str]) -> str | None:
        """Return what all of ``names`` have in front, None where they are not all its names.

        They need not be a whole model: what a layer of its model is called is enough.
        """
        first = names[0] if names else ""
        starts = (first[:k] for k in (0, *(m.end() for m in re.finditer(r"\.", first))))
        for prefix in starts:
            own = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
            if (
                len(own) == len(names) > 0
                and all(map(self.has, own))
                and any(_NUMBER.search(n) for n in own)
            ):
                return prefix
        return None

    def prefix(self, names: Collection[str]) -> str | None:
        """Return what the names of its model have in front, None where they are not its names.

        Most of the names decide where several will do.
        """
        bare = [without_markers(name) for name in names]
        marks = [_of_pattern(m) for m in self.marks]
        best, most = None, 0
        for name in bare:
            prefix = name.removesuffix(marks[0])
            if prefix == name or prefix[-1:] not in ("", "."):
                continue
            below = Counter(_alike(n[len(prefix) :]) for n in bare if n.startswith(prefix))
            known = sum(amount for pattern, amount in below.items() if pattern in self.patterns)
            if known > most and all(mark in below for mark in marks):
                best, most = prefix, known
        return best


def _of_pattern(pattern: str) -> str:
    return _CAPTURE.sub("#", pattern)


def _alike(name: str) -> str:
    return _NUMBER.sub("#", name)
