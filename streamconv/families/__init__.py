"""Model families: how Megatron's tensors become HuggingFace's, one small file a family.

A file lists its families in ``FAMILIES`` and stands in ``_MODULES``; that is all there is to adding one
(CONTRIBUTING.md has a page on it).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from streamconv.errors import BadInputError, UsageError
from streamconv.families.rules import Family

_MODULES = (
    "llama",
    "moe",
    "deepseek",
    "glm",
    "mimo",
    "minimax",
    "ernie",
    "nemotron",
    "mamba",
    "gemma",
    "gemma4",
    "gpt_oss",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_next",
    "multimodal",
    "internvl",
    "step",
)


def families() -> Iterator[Family]:
    """Yield every family."""
    for name in _MODULES:
        module = importlib.import_module(f"{__name__}.{name}")
        yield from module.FAMILIES


def choose(
    config: Mapping[str, Any],
    override: str | None,
    known: Sequence[Family] | None = None,
    whose: str = "Megatron",
    names: Collection[str] = (),
) -> Family:
    """Return the family of the model that a parsed config.json describes.

    ``override`` is the name of a family that the user chose, ``known`` are those to choose from
    (Megatron's, where nothing is said), ``whose`` their names, and ``names`` those of the tensors, by
    which the nearest family is told. Raises :class:`UsageError` for a name
    that is none, :class:`BadInputError` where no family has the config's model type.
    """
    known = list(families()) if known is None else known
    if override is not None:
        for family in known:
            if family.name == override:
                return family
        raise UsageError(
            f"there is no family {override!r}",
            expected="one of " + ", ".join(sorted(f.name for f in known)),
        )
    model_type = config.get("model_type")
    for family in known:
        if model_type in family.model_types and family.when(config):
            return family
    if model_type is None:
        raise BadInputError(
            "config.json is not that of a HuggingFace model: it has no model_type",
            where="config.json",
            hint="--hf-config DIR names a folder that has the one of the model that was trained",
        )
    raise BadInputError(
        f"no family is known for {whose} checkpoints of model type {model_type!r}",
        where="config.json",
        expected="one that `streamconv families` lists"
        if names
        else "one of " + ", ".join(sorted(t for f in known for t in f.model_types)),
        found=_nearest(known, names) if names else None,
        hint="--family NAME takes the rules of another one; CONTRIBUTING.md, 'Adding a family', "
        "says how to add rules",
    )


def _nearest(known: Sequence[Family], names: Collection[str]) -> str:
    """Return in words which families know the most of the tensors."""
    from streamconv.families.engine import knows

    kinds = {re.sub(r"(?<=\.)\d+(?=\.)", "0", name) for name in names}
    counts = {family.name: knows(family, kinds) for family in known}
    most = max(counts.values())
    if not most:
        return "no family knows any of its names"
    rules = {family.name: len(family.rules) for family in known}
    best = sorted((n for n, count in counts.items() if count == most), key=lambda n: rules[n])
    return f"{most} of {len(kinds)} kinds of names are those of the family {' or '.join(best[:3])}"
