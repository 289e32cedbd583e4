"""Decide for each group of tensors whether a checkpoint holds it as in memory or as on the Hub.

Names decide. Where a group has the same names either way (experts that are only transposed), shapes
do; where they are the same too, the rest of the checkpoint does, and last of all the release of
transformers that wrote the config: before version 5 it held in memory what it stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from streamconv.errors import BadInputError
from streamconv.ir.boxes import Shape
from streamconv.tracing.hf_convert import Group

Layout = Literal["hub", "memory"]


def decide(
    groups: Sequence[Group],
    held: Sequence[Mapping[str, Shape]],
    memory_shapes: Mapping[str, Shape],
    hub_shapes: Mapping[str, Shape],
    version: object,
) -> tuple[list[Layout], tuple[str, ...]]:
    """Return the layout of each of ``groups``, and what is worth telling.

    ``held`` are the tensors of each group that the checkpoint has, at least one.
    Raises :class:`BadInputError` where a checkpoint holds a group in both layouts.
    """
    votes = [
        _vote(group, given, memory_shapes, hub_shapes)
        for group, given in zip(groups, held, strict=True)
    ]
    counted = Counter(vote for vote in votes if vote is not None)
    undecided = [g for g, vote in zip(groups, votes, strict=True) if vote is None and g.converted]
    fallback: Layout = "hub" if counted["hub"] > counted["memory"] else "memory"
    notices: tuple[str, ...] = ()
    if undecided and counted["hub"] == counted["memory"]:
        fallback = "hub" if _before_v5(version) else "memory"
        told = (
            f"neither names nor shapes tell how {len(undecided)} groups of tensors (such as "
            f"{undecided[0].memory[0]}) are laid out: they are taken as transformers "
            f"{version or 5} has them in memory"
        )
        notices = (told,)
    return [vote or fallback for vote in votes], notices


def _vote(
    group: Group,
    given: Mapping[str, Shape],
    memory_shapes: Mapping[str, Shape],
    hub_shapes: Mapping[str, Shape],
) -> Layout | None:
    both = set(group.memory) & set(group.hub)
    in_memory = [n for n in group.memory if n in given and n not in both]
    on_hub = [n for n in group.hub if n in given and n not in both]
    if in_memory and on_hub:
        raise BadInputError(
            "the checkpoint holds the same weights twice, fused and as the Hub has them",
            found=f"{in_memory[0]} and {on_hub[0]}",
        )
    if in_memory or on_hub:
        return "memory" if in_memory else "hub"
    present = [n for n in group.memory if n in given and n in both]
    as_memory = all(given[n] == memory_shapes[n] for n in present)
    as_hub = all(given[n] == hub_shapes[n] for n in present)
    if as_memory != as_hub:
        return "memory" if as_memory else "hub"
    return None


def _before_v5(version: object) -> bool:
    major = version.partition(".")[0] if isinstance(version, str) else ""
    return major.isdigit() and int(major) < 5
