"""Names of what a trainer saves beside a model: optimizer states, schedulers, counters."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

STATE = "optimizer or trainer state"
"""Why it is left out."""

_BY_COMPONENT = re.compile(
    r"(^|\.)(optim|optimizers?|optimizer_states?|optimizer_state_dict|optim_state_dict|"
    r"lr_schedulers?|schedulers?|dataloader|train_state|rng_state|extra_state)(\.|$)"
    r"|^(optim|optimizer)_\d+\.|^(callbacks|loops)\.",  # Lightning's
    re.ASCII,
)
# What optimizers keep of a weight. "step" may be a weight's name, hence only beside another of these.
_OF_A_WEIGHT = re.compile(
    r"(?P<weight>.+)\.(exp_avg|exp_avg_sq|exp_inf|max_exp_avg_sq|momentum_buffer|master_param|"
    r"square_avg|acc_delta|sum)"
)


def is_state(name: str) -> bool:
    """Whether a name tells that a tensor is a trainer's."""
    return _BY_COMPONENT.search(name) is not None


def states(names: Collection[str]) -> set[str]:
    """Return the names of tensors that are a trainer's."""
    return {n for n in names if is_state(n)} | {*states_of_weights(names)}


def states_of_weights(names: Collection[str]) -> Iterator[str]:
    """Yield the names of tensors that an optimizer keeps of weights that are there, too.

    ``optimizer_0.state.norm.weight.exp_avg`` belongs to ``model.norm.weight``, whatever stands before
    what both have in common; so does its ``step``.
    """
    kept = {m["weight"] for n in names if (m := _OF_A_WEIGHT.fullmatch(n)) is not None}
    others = [n for n in names if _OF_A_WEIGHT.fullmatch(n) is None and not n.endswith(".step")]
    weights = {end for n in others for end in _ends(n)} if kept else set()
    of_weights = {k for k in kept if not weights.isdisjoint(_ends(k))}
    for name in names:
        match = _OF_A_WEIGHT.fullmatch(name)
        weight = match["weight"] if match else name.removesuffix(".step")
        if weight != name and weight in of_weights:
            yield name


def _ends(name: str) -> Iterator[str]:
    """Yield what a name ends with, of two components (``norm.weight``) and more."""
    parts = name.split(".")
    yield name
    for k in range(1, len(parts) - 1):
        yield ".".join(parts[k:])
