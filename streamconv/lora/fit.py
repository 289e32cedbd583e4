"""An adapter against the model that it belongs to: the names there, and the shapes.

PEFT loads an adapter whose names it does not know without a word, and its layers are dead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from streamconv.errors import BadInputError, listed
from streamconv.ir.boxes import Shape
from streamconv.ir.source import Checkpoint
from streamconv.lora.adapters import Adapter, Target
from streamconv.lora.settings import PREFIX
from streamconv.tracing.model import Model


def called(adapter: Adapter, model: Model | None) -> dict[str, str]:
    """Return what the model calls the weights that are adapted, and those that were trained whole."""
    if model is None:
        return {}
    from streamconv.tracing.hf_names import called

    return called(
        _weights(adapter),
        model.state_shapes.__contains__,
        lambda name: name in model.hub_shapes or model.hub_name(name) is not None,
    )


def called_in(adapter: Adapter, names: Collection[str]) -> dict[str, str]:
    """Return what a folder that holds the weights ``names`` calls those of the adapter."""
    from streamconv.tracing.hf_names import called

    return called(_weights(adapter), names.__contains__, names.__contains__)


def _weights(adapter: Adapter) -> list[str]:
    return [*(f"{module}.weight" for module in adapter.targets), *adapter.saved]


def renamed(adapter: Adapter, called: Mapping[str, str]) -> Adapter:
    """Return the adapter with the names that ``called`` has for its weights."""
    if all(name == new for name, new in called.items()):
        return adapter
    targets: dict[str, Target] = {}
    for module, target in adapter.targets.items():
        name = called.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight")
        targets[name] = Target(name, target.parts)
    saved = {called.get(name, name): tensor for name, tensor in adapter.saved.items()}
    if (len(targets), len(saved)) != (len(adapter.targets), len(adapter.saved)):
        raise BadInputError("two modules of the adapter have one name in the model")
    wrapped = {_renamed_module(module, called) for module in adapter.wrapped}
    return dataclasses.replace(adapter, targets=targets, saved=saved, wrapped=frozenset(wrapped))


def _renamed_module(module: str, called: Mapping[str, str]) -> str:
    for name, new in called.items():
        leaf = name.removeprefix(f"{module}.")
        if leaf != name and new.endswith(f".{leaf}"):
            return new.removesuffix(f".{leaf}")
    return module


def check(
    adapter: Adapter, called: Mapping[str, str], model: Model, *, merged: bool = False
) -> None:
    """Raise :class:`BadInputError` for modules that the model lacks, and for shapes that do not fit.

    What is ``merged`` may be in layers that the library passes over: those for multi-token prediction.
    """
    weights = {m: called.get(f"{m}.weight", f"{m}.weight") for m in adapter.targets}
    shapes = {m: _shape(w, model) for m, w in weights.items()}
    strange = [
        m
        for m, w in weights.items()
        if shapes[m] is None
        and not _is_known(w, model)
        and not (merged and model.is_optional_unexpected(w))
    ]
    strange += [
        name
        for name in adapter.saved
        if not _is_known(new := called.get(name, name), model)
        and not model.is_optional_unexpected(new)
        # trl's value head does not belong to the model that it is put on.
        and "v_head" not in new.split(".")
    ]
    if strange:
        raise BadInputError(
            f"{len(strange)} modules of the adapter are not in {model.architecture}: PEFT would pass "
            "over them",
            where=listed(strange),
            expected=f"names such as {next(iter(model.state_shapes), '')}",
            hint="check that config.json belongs to this checkpoint (--hf-config DIR names another)",
        )
    for module, shape in shapes.items():
        if shape is not None:
            turned = bool(model.holds_transposed(weights[module].removesuffix(".weight")))
            _check_shape(adapter, adapter.targets[module], shape[::-1] if turned else shape)


def _shape(name: str, model: Model) -> Shape | None:
    return model.state_shapes.get(name) or model.hub_shapes.get(name)


def _is_known(name: str, model: Model) -> bool:
    return _shape(name, model) is not None or model.hub_name(name) is not None


def _check_shape(adapter: Adapter, target: Target, shape: Shape) -> None:
    kinds = ("lora_embedding_A", "lora_embedding_B") if target.embedding else ("lora_A", "lora_B")
    first, second = (adapter.tensors[target.parts[k]] for k in kinds)
    # Those of grouped and transposed convolutions have other shapes.
    if len(shape) != 2 or len(first.shape) != 2 or len(second.shape) != 2:
        return
    straight = (second.shape[0], first.shape[1])
    found = straight[::-1] if target.embedding else straight
    if found != shape:
        raise BadInputError(
            "the adapter does not fit the model",
            where=target.parts[kinds[1]],
            expected=f"factors of a weight of {list(shape)}",
            found=f"A {list(first.shape)}, B {list(second.shape)}: a weight of {list(found)}",
            hint="check that config.json belongs to this checkpoint (--hf-config DIR names another)",
        )


def refuse_doubtful(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Refuse names that may be a trainer's where no model tells."""
    from streamconv.tracing.hf_names import doubtful

    strange = doubtful(_weights(adapter))
    if checkpoint.naming == "trainer" and not strange:
        fqns = [*adapter.tensors, *(t.fqn for t in adapter.saved.values())]
        strange = [n for n in fqns if PREFIX not in n]
    if strange:
        raise BadInputError(
            "the model's names of these modules are not known: the names may be the trainer's",
            where=listed(strange),
            expected=f"{PREFIX} before the names of a model's modules, or config.json",
            hint="name the folder of the model that was trained: --hf-config DIR or --base DIR",
        )
