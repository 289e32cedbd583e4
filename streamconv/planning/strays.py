"""What lies in a checkpoint beside the model: counters of the trainer, and other models.

An average of the weights (``ema.``), a reference or a teacher has the same names below a prefix of
its own. Written beside the model it doubles the output, and taken for it, it is another model: so who
converts is asked. The model that config.json describes knows its names below any prefix; where there
is none, words that trainers use for such copies tell, if what is below them is elsewhere, too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TypeVar

from streamconv.errors import UsageError
from streamconv.formats.megatron.names import QUANTIZER_RANGES
from streamconv.ir.boxes import Shape
from streamconv.ir.source import Checkpoint, GlobalTensor, Skipped
from streamconv.tracing.hf_names import prefixes

# Components of names, as a trainer calls a model that is not the one it trains, or the pair of it.
_COPIES = re.compile(
    r"(\w+_)?(ema|swa|ref|reference|teacher|target|shadow|average|averaged|polyak|old|frozen|critic|"
    r"reward|draft)(_(model|module|policy|actor|net|network|params|weights))?"
)
_COUNTERS = re.compile(
    r"(global_|num_|n_|ema_|total_|optimi[sz]ation_)*"
    r"(step|steps|update|updates|averaged|epoch|epochs|iteration|iterations|decay|initted)"
)
_RANDOM = re.compile(r"(\w+_)?rng(_\w+)?|(\w+_)?random_state")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_DEEPEST = 3
# So much of a model makes another one of it; the rest may be tied, or buffers that are not averaged.
_MUCH = 0.8
_MAIN = "main"
_MEASURED = (".input_global_scale", ".input_amax")  # a number for each linear layer
_PACKED = (".weight_packed", ".weight_scale", ".weight_scale_inv")
ANOTHERS = "another model's, not the one that --model names"
"""Why a tensor is skipped where the user has named one of several models in one checkpoint."""

Resolves = Callable[[str], bool]
T = TypeVar("T")


def trainer_state(name: str, shape: Shape, dtype: str) -> str | None:
    """Return what a tensor that the model does not know is to the trainer; None for all else."""
    leaf = name.rpartition(".")[2]
    if leaf == "_extra_state":
        return "extra state of a layer, no weight"
    ranges, reason = QUANTIZER_RANGES
    if ranges.search(name):
        return reason
    if _RANDOM.fullmatch(leaf) and dtype == "U8":
        return "state of a random number generator"
    if _COUNTERS.fullmatch(leaf) and shape in ((), (1,)):
        return "a counter of the trainer"
    return None


def models_in(names: Collection[str], resolves: Resolves | None) -> dict[str, list[str]]:
    """Return the names of each model in a checkpoint by the prefix that they have in common.

    ``resolves`` says whether the model that the config describes has a name; None where no model is
    known. Empty where there are not several.
    """
    # Layers and experts are alike: one name stands for all that differ in numbers only.
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_NUMBER.sub("0", name), []).append(name)
    weight = {found[0]: len(found) for found in alike.values()}
    if resolves is None:
        likely = _told_by_words(weight)
    elif all(map(resolves, weight)):
        return {}
    else:
        likely = _told_by_model(weight, resolves)

    def size(found: Iterable[str]) -> int:
        return sum(weight[n] for n in found)

    several: dict[str, list[str]] = {}
    claimed: set[str] = set()
    for prefix, found in sorted(likely.items(), key=lambda item: (-size(item[1]), len(item[0]))):
        if found and claimed.isdisjoint(found):
            several[prefix] = found
            claimed.update(found)
    if len(several) < 2:
        return {}
    members = {found[0]: found for found in alike.values()}
    return {prefix: [n for r in found for n in members[r]] for prefix, found in several.items()}


def _told_by_model(weight: Mapping[str, int], resolves: Resolves) -> dict[str, list[str]]:
    """Return what may be a model by its prefix: much of the largest, or a copy by its name, too."""
    known = {
        prefix: [n for n in weight if n.startswith(prefix) and resolves(n[len(prefix) :])]
        for prefix in ("", *prefixes(weight, _DEEPEST))
    }
    sizes = {prefix: sum(weight[n] for n in found) for prefix, found in known.items()}
    most = max(sizes.values())
    return {
        prefix: found
        for prefix, found in known.items()
        if sizes[prefix] >= max(2, _MUCH * most)
        or (_is_copy(prefix) and len(found) >= max(2, _MUCH * len(_below(prefix, weight))))
    }


def _told_by_words(names: Collection[str]) -> dict[str, list[str]]:
    """Return the copies by their prefix, and what they are copies of."""
    families = {prefix: _below(prefix, names) for prefix in ("", *prefixes(names, _DEEPEST))}
    copies = {prefix: below for prefix, below in families.items() if _is_copy(prefix)}
    found: dict[str, list[str]] = {}
    for copy, below in copies.items():
        inner = {n[len(copy) :] for n in below}
        for prefix, members in families.items():
            same = [n for n in members if n[len(prefix) :] in inner and not _is_copy(n)]
            if len(same) >= max(2, _MUCH * len(inner)):
                found |= {prefix: same, copy: below}
    return found


def _below(prefix: str, names: Collection[str]) -> list[str]:
    return [n for n in names if n.startswith(prefix)]


def _is_copy(prefix: str) -> bool:
    return any(_COPIES.fullmatch(part) for part in prefix.split(".")[:_DEEPEST])


def choose(
    checkpoint: Checkpoint,
    resolves: Resolves | None,
    wanted: str | None,
    *,
    keep_buffers: bool = False,
) -> tuple[Checkpoint, str]:
    """Return the checkpoint with one model in it and no counters, and the prefix of its names.

    ``wanted`` is the model that the user has named, where that is not the folder. Raises
    :class:`UsageError` where there are several, or not this one. ``keep_buffers``: what
    quantization-aware training measured stays.
    """
    tensors = {**{n: u.copies for n, u in checkpoint.undecided.items()}, **checkpoint.tensors}
    skipped = {} if checkpoint.modules else dict(_counters(tensors, resolves, keep_buffers))
    several = models_in([n for n in tensors if n not in skipped], resolves)
    labels = {prefix.rstrip(".") or _MAIN: prefix for prefix in several}
    if wanted is not None and wanted not in labels:
        raise UsageError(
            f"there is no model {wanted!r} in this checkpoint",
            where=str(checkpoint.root),
            found=", ".join(labels) or "no model in a folder of its own, and not several in one",
        )
    if several and wanted is None:
        raise UsageError(
            f"{len(several)} models to choose from, in one checkpoint",
            where=str(checkpoint.root),
            found=", ".join(f"{name} ({len(several[p])} tensors)" for name, p in labels.items()),
            hint=f"say which: --model {'|'.join(labels)}",
        )
    prefix = labels[wanted] if wanted is not None else ""
    others = {n: p for p, names in several.items() if p != prefix for n in names}
    for name in tensors:
        # What else is below another model's prefix goes with it.
        below = next((p for p in several if p != prefix and p and name.startswith(p)), None)
        if name in others or below or (prefix and not name.startswith(prefix)):
            skipped.setdefault(name, ANOTHERS)
    if not skipped:
        return checkpoint, prefix
    kept = dataclasses.replace(
        checkpoint,
        tensors=_without(checkpoint.tensors, skipped),
        undecided=_without(checkpoint.undecided, skipped),
        skipped=(*checkpoint.skipped, *(Skipped(n, r) for n, r in skipped.items())),
    )
    return kept, prefix


def stripped(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """Return the tensors whose names begin with ``prefix``, without it; the others are skipped.

    Raises :class:`UsageError` where there are none.
    """
    prefix = prefix if prefix.endswith(".") else f"{prefix}."
    names = [*checkpoint.tensors, *checkpoint.undecided]
    others = [n for n in names if not n.startswith(prefix)]
    if len(others) == len(names):
        raise UsageError(
            f"no tensor's name begins with {prefix!r}, which --strip-prefix names",
            where=str(checkpoint.root),
            found=", ".join(names[:5]),
        )

    def renamed(name: str, tensor: GlobalTensor) -> GlobalTensor:
        return dataclasses.replace(tensor, fqn=name.removeprefix(prefix))

    tensors = {
        t.fqn: t
        for t in (renamed(n, t) for n, t in checkpoint.tensors.items() if n.startswith(prefix))
    }
    undecided = {
        n.removeprefix(prefix): dataclasses.replace(
            u, pieces=renamed(n, u.pieces), copies=renamed(n, u.copies)
        )
        for n, u in checkpoint.undecided.items()
        if n.startswith(prefix)
    }
    left = Skipped(f"{len(others)} tensors", f"their names do not begin with {prefix}")
    return dataclasses.replace(
        checkpoint,
        tensors=MappingProxyType(tensors),
        undecided=MappingProxyType(undecided),
        skipped=(*checkpoint.skipped, *([left] if others else [])),
    )


def _counters(
    tensors: Mapping[str, GlobalTensor], resolves: Resolves | None, keep_buffers: bool
) -> Iterator[tuple[str, str]]:
    # Beside packed weights such a scale is a part of them.
    measured = not keep_buffers and not any(n.endswith(_PACKED) for n in tensors)
    for name, tensor in tensors.items():
        reason = trainer_state(name, tensor.shape, tensor.dtype.name)
        if measured and name.endswith(_MEASURED) and tensor.layout.shape in ((), (1,)):
            reason = "measured by quantization-aware training (--keep-buffers writes it)"
        if reason is not None and not (resolves is not None and resolves(name)):
            yield name, reason


def _without(items: Mapping[str, T], left_out: Collection[str]) -> Mapping[str, T]:
    return MappingProxyType({n: item for n, item in items.items() if n not in left_out})
