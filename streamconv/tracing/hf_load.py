"""Ask transformers what it would load from tensors of given names and shapes, on meta tensors.

``from_pretrained`` renames what a file holds, joins what belongs together, and fills the model's
state dict with it; what it has no name for it ignores, and what it finds no tensor for it fills with
random numbers, both with exit code 0. The same steps with the same functions here, without weights:
so names are right or wrong by the judgement of whoever loads them, whatever made them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import DType
from streamconv.tracing.model import Loaded


def load(
    model: Any, state: Mapping[str, Shape], tensors: Mapping[str, tuple[Shape, DType]]
) -> Loaded:
    """Return what loading ``tensors`` into ``model`` comes to; ``state``: its state dict's shapes."""
    unexpected: list[str] = []
    plain: dict[str, str] = {}
    clashing: list[tuple[str, str]] = []
    joined: dict[str, list[tuple[str, list[str]]]] = {}
    renamer = _Renamer(model, state)
    for names in _alike(tensors):
        for target, pattern, found in renamer.places(names):
            if target not in state:
                unexpected += found
            elif pattern is not None:
                joined.setdefault(target, []).append((pattern, found))
            else:
                first = plain.setdefault(target, found[0])
                clashing += [(first, name) for name in found if name != first]
    filled: dict[str, Shape] = {target: tensors[name][0] for target, name in plain.items()}
    failed: list[tuple[str, str]] = []
    joiner = _Joiner(model, renamer.by_pattern, tensors)
    for target, sources in joined.items():
        if target in plain:
            clashing.append((plain[target], sources[0][1][0]))
            continue
        try:
            filled |= joiner.join(target, sources)
        except Exception as error:  # noqa: BLE001 - whatever an operation of the library raises
            failed.append((target, f"{type(error).__name__}: {error}"))
            filled[target] = state[target]
    return Loaded(
        missing=tuple(n for n in state if n not in filled),
        unexpected=(*unexpected, *(n for n in filled if n not in state)),
        clashing=tuple(clashing),
        misshapen=tuple(
            (n, state[n], shape) for n, shape in filled.items() if n in state and state[n] != shape
        ),
        failed=tuple(failed),
    )


def _alike(names: Iterable[str]) -> Iterator[list[str]]:
    """Yield the names by groups that differ in their last number alone (experts, else layers).

    Groups, and names in them, come in the order of transformers' loader, by numbers' values: some
    renamings wait for a name that has to come first.
    """
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in names:
        parts = name.split(".")
        at = next((k for k in reversed(range(len(parts))) if parts[k].isdecimal()), None)
        if at is None:
            groups[name, ""] = [(0, name)]
        else:
            key = ".".join(parts[:at]), ".".join(parts[at + 1 :])
            groups.setdefault(key, []).append((int(parts[at]), name))
    for group in groups.values():
        group.sort()
    for group in sorted(groups.values(), key=lambda group: _natural(group[0][1])):
        yield [name for _, name in group]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in name.split(".")]


class _Renamer:
    """The names of a file as the state dict has them. Good for one load: mappings remember names."""

    def __init__(self, model: Any, state: Mapping[str, Shape]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self._renamings = [c for c in mapping if isinstance(c, WeightRenaming)]
        self._converters = [c for c in mapping if isinstance(c, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._state = state
        self.by_pattern = {p: c for c in self._converters for p in c.source_patterns}

    def places(self, names: list[str]) -> Iterator[tuple[str, str | None, list[str]]]:
        """Yield (name in the state dict, pattern of what converts it or None, names that go there)."""
        target, pattern = self._place(names[0])
        if pattern is not None and "*" in pattern:
            # The pattern swallows their number: all of a list of experts.
            yield target, pattern, names
            return
        yield target, pattern, names[:1]
        for name in names[1:]:
            yield (*self._place(name), [name])

    def _place(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix, state = self._prefix, self._state
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        return target, pattern


class _Joiner:
    """Runs the library's conversions on meta tensors; layers that are alike share what came of one."""

    def __init__(
        self,
        model: Any,
        by_pattern: Mapping[str, Any],
        tensors: Mapping[str, tuple[Shape, DType]],
    ) -> None:
        self._model = model
        self._by_pattern = by_pattern
        self._tensors = tensors
        self._made: dict[object, dict[str, Shape]] = {}
        self._stand_ins: dict[tuple[Shape, DType], torch.Tensor] = {}

    def join(self, target: str, sources: Sequence[tuple[str, list[str]]]) -> dict[str, Shape]:
        """Return the tensors, by their names in the state dict, that are made of ``sources``."""
        headers = tuple((p, tuple(map(self._tensors.__getitem__, names))) for p, names in sources)
        bare, numbers = _without_numbers(target)
        key = bare, headers
        known = self._made.get(key)
        if known is None:
            made = self._convert(target, sources)
            known = {_without_numbers(n)[0]: shape for n, shape in made.items()}
            if any(_without_numbers(n)[1] != numbers for n in made):
                return made
            self._made[key] = known
        return {n.format(*numbers): shape for n, shape in known.items()}

    def _convert(self, target: str, sources: Sequence[tuple[str, list[str]]]) -> dict[str, Shape]:
        converter = copy.deepcopy(self._by_pattern[sources[0][0]])
        for pattern, names in sources:
            for name in names:
                converter.add_tensor(target, name, pattern, self._stand_in(name))
        with torch.no_grad():
            made = converter.convert(target, model=self._model, config=self._model.config)
        single = {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
        return {n: tuple(t.shape) for n, t in single.items()}

    def _stand_in(self, name: str) -> torch.Tensor:
        """Return a meta tensor; one does for all of a shape and dtype, as no one writes into it."""
        header = shape, dtype = self._tensors[name]
        made = self._stand_ins.get(header)
        if made is None:
            made = torch.empty(shape, dtype=getattr(torch, dtype.torch), device="meta")
            self._stand_ins[header] = made
        return made


def _without_numbers(name: str) -> tuple[str, tuple[str, ...]]:
    """Return a name with a place for each of its numbers, and the numbers."""
    parts = name.replace("{", "{{").replace("}", "}}").split(".")
    bare = ".".join("{}" if p.isdecimal() else p for p in parts)
    return bare, tuple(p for p in parts if p.isdecimal())
