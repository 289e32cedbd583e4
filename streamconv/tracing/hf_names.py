"""Match the names of a checkpoint against those a model may have, and say how they differ.

Names are compared by their dotted components, never by substrings. Three things stand between a
checkpoint's names and the model's: markers that wrappers leave inside a name, prefixes that they
leave in front, and names that another release of transformers uses in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from streamconv.tracing.wrappers import without_markers


@dataclass(frozen=True, slots=True)
class Names:
    """How the checkpoint's names are read: ``canonical[name]`` is what the model would call it."""

    canonical: Mapping[str, str]
    notices: tuple[str, ...]


def read_names(
    names: Iterable[str], known: Callable[[str], bool], rename: Callable[[str], str]
) -> Names:
    """Return the canonical name of each of ``names``.

    ``known`` tells whether the model has a name; ``rename`` returns what transformers calls a name
    of another release or of a part of the model. A rewriting that would give two tensors one name
    is not made.
    """
    renamed = cache(rename)
    notices: list[str] = []
    canonical = {name: name for name in names}
    canonical = _apply(canonical, without_markers, "markers of wrapper modules", notices)
    # A name that is the model's own below a prefix is not looked for among those of other releases.
    prefix = _wrapper_prefix(canonical.values(), known)
    if not all(known(n.removeprefix(prefix)) for n in canonical.values()):
        prefix = _wrapper_prefix(canonical.values(), lambda n: known(n) or known(renamed(n)))
    if prefix:
        canonical = _apply(
            canonical, lambda n: n.removeprefix(prefix), f"the wrapper prefix {prefix!r}", notices
        )
    canonical = _renamed(canonical, known, renamed, notices)
    return Names(canonical, tuple(notices))


def called(
    names: Iterable[str], known: Callable[[str], bool], renamed: Callable[[str], bool]
) -> dict[str, str]:
    """Return what the model calls each of ``names``, which are some of its tensors at most.

    ``known`` tells whether the model has a name, ``renamed`` whether another release or the Hub has. A
    name that is neither, however much is taken away, stays as it is.
    """
    names = list(names)
    prefix = _wrapper_prefix(names, known) or _wrapper_prefix(names, renamed)

    def call(name: str) -> str:
        bare = name.removeprefix(prefix)
        # DDP and the like may wrap a single layer, too.
        inner = ".".join(part for part in bare.split(".") if part != "module")
        tried = (bare, inner, name)
        return next((n for has in (known, renamed) for n in tried if has(n)), name)

    return {name: call(name) for name in names}


def doubtful(names: Iterable[str]) -> list[str]:
    """Return the names that are none on the Hub, or not of every model there.

    Wrappers made them, or they are of experts as transformers 5 holds them, one tensor for all: on
    the Hub most models have one for each.
    """
    return [
        name
        for name in names
        if name != without_markers(name)
        or name.startswith(("module.", "app.", "model.model."))
        or name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
    ]


def _apply(
    canonical: dict[str, str], change: Callable[[str], str], what: str, notices: list[str]
) -> dict[str, str]:
    changed = {name: change(current) for name, current in canonical.items()}
    amount = sum(changed[name] != current for name, current in canonical.items())
    if amount == 0:
        return canonical
    if len(set(changed.values())) != len(changed):
        notices.append(f"{what} kept in {amount} names: without it two tensors have one name")
        return canonical
    notices.append(f"{what} removed from {amount} names")
    return changed


def _wrapper_prefix(names: Iterable[str], resolves: Callable[[str], bool]) -> str:
    """Return the prefix whose removal makes more names resolve than any other does, or nothing."""
    # Layers and experts resolve alike: one name stands for all that differ in numbers only.
    names = list(names)
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        pattern = tuple("" if part.isdigit() else part for part in name.split("."))
        alike.setdefault(pattern, []).append(name)
    samples = [(found[0], len(found)) for found in alike.values()]

    def resolved(prefix: str) -> int:
        return sum(amount for name, amount in samples if resolves(name.removeprefix(prefix)))

    best, most = "", resolved("")
    total = sum(amount for _, amount in samples)
    for prefix in prefixes(names):
        if most == total:
            break
        if resolved(prefix) > most:
            best, most = prefix, resolved(prefix)
    return best


def prefixes(names: Iterable[str], deepest: int | None = None) -> list[str]:
    """Return what names begin with, of at most ``deepest`` components, shortest first.

    Not all names need have it: a trainer's own tensors stand beside the model's. A number is one of
    layers, and ends it, unless all names have the same one there (``models.0.``).

    >>> prefixes(["models.0.a.0.w", "models.0.a.1.w", "b.w"])
    ['b.', 'models.', 'models.0.', 'models.0.a.']
    """
    split = [name.split(".")[:-1] for name in names]
    numbers: dict[str, set[str]] = {}
    for parts in split:
        for k, part in enumerate(parts[:deepest]):
            if part.isdigit():
                numbers.setdefault(".".join(parts[:k]), set()).add(part)
    found: set[str] = set()
    for parts in split:
        for k, part in enumerate(parts[:deepest]):
            if part.isdigit() and len(numbers[".".join(parts[:k])]) > 1:
                break
            found.add(".".join((*parts[: k + 1], "")))
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def _renamed(
    canonical: dict[str, str],
    known: Callable[[str], bool],
    rename: Callable[[str], str],
    notices: list[str],
) -> dict[str, str]:
    taken = set(canonical.values())
    changed: dict[str, str] = {}
    for name, current in canonical.items():
        if known(current):
            continue
        target = rename(current)
        if target not in taken and known(target):
            changed[name] = target
            taken.add(target)
    if changed:
        example = next(iter(changed))
        notices.append(
            f"{len(changed)} tensors are named as another release of transformers or a part of "
            f"the model has them (such as {example}, here {changed[example]})"
        )
    return canonical | changed
