"""Turn a model's in-memory names into Hub names, by tracing transformers' own reverse conversion.

transformers v5 fuses weights while it loads them (all experts of a layer become one tensor) and
unfuses them while it saves. ``revert_weight_conversion`` is that second half: here it runs on
traced meta tensors. It is not idempotent, so it is only ever given in-memory tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from streamconv.errors import BadInputError
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import DType
from streamconv.ir.recipe import Recipe
from streamconv.tracing.tracer import trace

MAX_TENSORS = 2_000_000
_MEMORY_HINT = "--layout memory writes the tensors as the state dict has them"


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that are converted together: in-memory names, and the Hub names made of them.

    ``converted`` is False for a tensor that keeps its elements in place, whatever its name.
    """

    memory: tuple[str, ...]
    hub: tuple[str, ...]
    converted: bool


def transposed_by_shape(model: Any) -> list[str]:
    """Return patterns of the tensors that the library transposes while loading where that fits."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return [
        pattern
        for conversion in get_model_conversion_mapping(model, add_legacy=False)
        if any(getattr(op, "check_dims", False) for op in getattr(conversion, "operations", ()))
        for pattern in conversion.target_patterns
    ]


def attach_conversions(model: Any) -> None:
    """Give ``model`` the conversions that a model loaded from the Hub would have.

    Two corrections of what ``save_pretrained`` does with a model built from scratch:

    * It drops every ``PrefixChange``, since it cannot know whether the files it came from had the
      prefix. Those of a submodel are brought back: the Hub's Gemma3 files say
      ``vision_tower.vision_model.``. Those of the root are not: they lead out of the namespace of
      the very class that config.json names (a text-only Qwen3.5 into the multimodal one).
    * ``Transpose(check_dims=True)`` (Qwen3-VL-MoE experts) transposes while loading but not while
      saving, and so writes a layout that vLLM and SGLang cannot read. Here it is undone.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [
        _without_check(conversion)
        for conversion in conversions
        if not hasattr(conversion, "prefix_to_remove") or _is_nested(conversion, model)
    ]


def _is_nested(prefix_change: Any, model: Any) -> bool:
    """Whether a PrefixChange belongs to a model of another family that ``model`` has inside.

    Not to ``model`` itself nor to its base model: one of a class of its own (Qwen2.5-Omni's thinker)
    has the scope "", and what leads its files into a larger model leads these out of their own. Nor to
    a part of the same family: classes took the inside of their own tower (CLIP's for images), and
    their files have no name of what is around it.
    """
    if not hasattr(prefix_change, "scope_prefix"):
        # Releases without scopes (5.8) write the submodel's path into the prefix.
        return prefix_change.model_prefix not in ("", model.base_model_prefix)
    scope, base = prefix_change.scope_prefix, model.base_model_prefix
    for path in filter(None, (scope, f"{base}.{scope}")) if scope else ():
        try:
            part = model.get_submodule(path)
        except AttributeError:
            continue
        return _package(part) != _package(model)
    return False


def _package(model: Any) -> str:
    return type(model).__module__.rpartition(".")[0]


def _without_check(conversion: Any) -> Any:
    operations: list[Any] = getattr(conversion, "operations", [])
    for position, operation in enumerate(operations):
        if getattr(operation, "check_dims", False):
            always = copy.copy(operation)
            always.check_dims = False
            operations[position] = always
    return conversion


def revert(model: Any, tensors: Mapping[str, tuple[Shape, DType]]) -> dict[str, Recipe]:
    """Return the Hub tensors that transformers makes of these in-memory tensors.

    Raises :class:`BadInputError` where the conversion refuses them, or would make more tensors than
    any model has.
    """
    from transformers.core_model_loading import revert_weight_conversion

    _check_amount(model, tensors)

    def body(given: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        made: Mapping[str, torch.Tensor] = revert_weight_conversion(model, given)
        return made

    try:
        return trace(tensors, body)
    except BadInputError as error:
        error.hint = "; ".join(filter(None, (error.hint, _MEMORY_HINT)))
        raise
    except Exception as error:
        raise BadInputError(
            "transformers cannot turn these tensors into Hub tensors",
            found=f"{type(error).__name__}: {error}",
            hint="compare the shapes with config.json",
        ) from error


def convert(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the Hub tensors that transformers makes of these in-memory tensors, not traced."""
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad():
        made: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    return made


def _check_amount(model: Any, tensors: Mapping[str, tuple[Shape, DType]]) -> None:
    """Bound the number of tensors before they are made: a list of experts is as long as it says."""
    amount = len(tensors)
    reverse = [c.reverse_transform() for c in model._weight_conversions if hasattr(c, "operations")]
    lists = [c for c in reverse if any("*" in target for target in c.target_patterns)]
    for name, (shape, _) in tensors.items():
        for conversion in lists:
            if shape and conversion.compiled_sources.search(name):
                amount += shape[0] * len(conversion.target_patterns)
    if amount > MAX_TENSORS:
        raise BadInputError(
            "config.json describes a model of more tensors than any has",
            expected=f"at most {MAX_TENSORS}",
            found=f"about {amount}",
        )


def groups(recipes: Mapping[str, Recipe], memory: Iterable[str]) -> tuple[Group, ...]:
    """Return the smallest sets of tensors that are converted together, ordered as ``memory``."""
    parent = {name: name for name in memory}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first: dict[str, str] = {}
    for name, recipe in recipes.items():
        used = recipe.view.sources()
        first[name] = used[0]
        for other in used[1:]:
            parent[root(other)] = root(used[0])
    members: dict[str, tuple[list[str], list[str]]] = {}
    for name in parent:
        members.setdefault(root(name), ([], []))[0].append(name)
    for name, source in first.items():
        members[root(source)][1].append(name)
    return tuple(
        Group(tuple(m), tuple(h), not (len(m) == len(h) == 1 and recipes[h[0]].is_identity))
        for m, h in members.values()
    )
