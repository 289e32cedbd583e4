"""Applies a family's rules to the tensors of a checkpoint: recipes out, and nothing left over.

Layers are alike: a rule is traced once for each set of shapes it meets, and the recipe is given other
names for every other layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from streamconv.errors import BadInputError, StreamconvError, listed
from streamconv.families import causes
from streamconv.families.rules import Dims, Family, Rule, compiled
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import DType
from streamconv.ir.recipe import Recipe
from streamconv.tracing.tracer import trace

Headers = Mapping[str, tuple[Shape, DType]]

_LISTED = 8


def apply(family: Family, dims: Dims, tensors: Headers, whose: str = "Megatron") -> list[Recipe]:
    """Return how the HuggingFace tensors of ``family`` are made of ``tensors``.

    ``whose`` are the names of the tensors. Raises :class:`BadInputError` for tensors that no rule
    knows, for two that would make the same output, and for sizes that contradict config.json.
    """
    matcher = _Matcher(family.rules)
    tracer = _Tracer(dims)
    recipes: dict[str, Recipe] = {}
    origin: dict[str, str] = {}
    used: set[str] = set()
    unknown: list[str] = []
    for name in tensors:
        match = matcher.find(name)
        if match is None:
            unknown.append(name)
            continue
        rule, position, captures = match
        used.add(name)
        if position:  # the rule's first source finds the match
            first = _format(rule.sources[0], captures)
            if first not in tensors:
                raise _lacks(rule, captures, name, tensors)
            continue
        sources = [_format(s, captures) for s in rule.sources]
        if not all(s in tensors for s in sources):
            raise _lacks(rule, captures, name, tensors)
        for recipe in tracer.recipes(rule, sources, captures, tensors):
            if recipe.name in recipes:
                raise BadInputError(
                    f"two tensors of the checkpoint would both be written as {recipe.name}",
                    found=f"{origin[recipe.name]} and {name}",
                )
            recipes[recipe.name] = recipe
            origin[recipe.name] = name
    if unknown:
        raise causes.of_unknown(unknown, len(used)) or _unknown(family, unknown, whose)
    return list(recipes.values())


def targets(family: Family, name: str) -> tuple[str, ...]:
    """Return what the rule for the one tensor ``name`` makes of it; nothing where there is none.

    Raises :class:`BadInputError` where a rule needs others beside it.
    """
    match = _Matcher(family.rules).find(name)
    if match is None:
        return ()
    rule, _, captures = match
    if len(rule.sources) > 1:
        raise _lacks(rule, captures, name, {})
    return tuple(_format(t, captures) for t in rule.targets)


def joined(family: Family, name: str) -> str | None:
    """Return what a rule makes of ``name`` and other tensors together; None for no such rule."""
    match = _Matcher(family.rules).find(name)
    if match is None or len(match[0].sources) == 1:
        return None
    return _format(match[0].targets[0], match[2])


def knows(family: Family, names: Iterable[str]) -> int:
    """Return how many of ``names`` a rule of the family knows."""
    matcher = _Matcher(family.rules)
    return sum(matcher.find(name) is not None for name in names)


def _unknown(family: Family, names: Sequence[str], whose: str) -> BadInputError:
    alike: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\.\d+\.", ".{n}.", name)
        alike[pattern] = alike.get(pattern, 0) + 1
    shown = [f"{p} ({n} tensors)" if n > 1 else p for p, n in alike.items()]
    return BadInputError(
        f"the family {family.name} knows no rule for {len(names)} tensors of this {whose} checkpoint",
        where=listed(shown, _LISTED),
        hint="is it another family (--family NAME)? CONTRIBUTING.md, 'Adding a family', "
        "says how to add rules",
    )


def _lacks(rule: Rule, captures: Mapping[str, str], name: str, tensors: Headers) -> BadInputError:
    missing = [s for s in (_format(s, captures) for s in rule.sources) if s not in tensors]
    return BadInputError(
        "tensors that belong together are not all there",
        where=name,
        expected=", ".join(missing),
        found="not in the checkpoint",
    )


def _format(pattern: str, captures: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda m: captures[m[1]], pattern)


class _Matcher:
    """Finds the rule of a name; names that differ in numbers only share a shape of words."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rows = [
            (compiled(source), rule, position)
            for rule in rules
            for position, source in enumerate(rule.sources)
        ]

    def find(self, name: str) -> tuple[Rule, int, dict[str, str]] | None:
        """Return (rule, which of its sources, captures) for the first rule that matches."""
        for pattern, rule, position in self._rows:
            found = pattern.fullmatch(name)
            if found:
                return rule, position, found.groupdict()
        return None


class _Tracer:
    """Traces rules, each once for every set of shapes."""

    def __init__(self, dims: Dims) -> None:
        self._dims = dims
        self._traced: dict[object, list[tuple[int, int | None, Recipe]]] = {}

    def recipes(
        self, rule: Rule, sources: Sequence[str], captures: Mapping[str, str], tensors: Headers
    ) -> Iterator[Recipe]:
        """Yield the recipes of what ``rule`` makes of ``sources``."""
        headers = tuple(tensors[s] for s in sources)
        dims = self._dims.of_layer(captures)
        key = (id(rule), headers, dims.traits)
        if key not in self._traced:
            try:
                self._traced[key] = list(self._trace(rule, headers, dims))
            except StreamconvError as error:
                error.where = error.where or sources[0]
                raise
            except (RuntimeError, ValueError, IndexError) as error:
                raise BadInputError(
                    "a tensor does not have the shape that its rule needs",
                    where=sources[0],
                    expected=f"what {', '.join(rule.targets)} can be made of",
                    found=f"{list(headers[0][0])}: {str(error).splitlines()[0]}",
                ) from error
        captures = dict(captures)
        if "mtp" in captures:
            number, inner = int(captures["mtp"]), self._dims.inner_layers
            captures["mtp_layer"] = str(self._dims.layers + number)
            captures["inner_first"] = str(number * inner)
            captures["inner_last"] = str((number + 1) * inner - 1)
            captures["inner_layer"] = str(number * inner + int(captures.get("inner", "0")))
        names = {str(k): s for k, s in enumerate(sources)}
        for target, expert, recipe in self._traced[key]:
            if expert is not None:
                captures["expert"] = str(expert)
            name = _format(rule.targets[target], captures)
            yield Recipe(name, recipe.dtype, recipe.view.map_sources(names))

    def _trace(
        self, rule: Rule, headers: Sequence[tuple[Shape, DType]], dims: Dims
    ) -> Iterator[tuple[int, int | None, Recipe]]:
        per_expert = [
            "{expert}" in t and not any("{expert}" in s for s in rule.sources) for t in rule.targets
        ]
        order: list[tuple[int, int | None]] = []

        def body(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            made = rule.how(dims, *given.values())
            made = (made,) if isinstance(made, torch.Tensor) else made
            if len(made) != len(rule.targets):
                raise TypeError(f"{rule.how} makes {len(made)} tensors of {len(rule.targets)}")
            result = {}
            for k, tensor in enumerate(made):
                if tensor is None:
                    continue
                if per_expert[k]:
                    for e, one in enumerate(tensor.unbind(0)):
                        order.append((k, e))
                        result[f"{k}.{e}"] = one
                else:
                    order.append((k, None))
                    result[str(k)] = tensor
            return result

        traced = trace({str(k): h for k, h in enumerate(headers)}, body)
        for (k, expert), recipe in zip(order, traced.values(), strict=True):
            yield k, expert, recipe
