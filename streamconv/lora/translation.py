"""An adapter on a trainer's own modules becomes one on HuggingFace's, which merging and PEFT go by.

What a family does to a weight it does to the product of two factors as well: where a rule only takes
rows (query heads of a fused ``linear_qkv``, the gate of ``linear_fc1``, one expert, rows in another
order), it takes them of B, and A stays as it is, shared by all that the rule makes. The rules are those
of the weights.
"""

from __future__ import annotations

from streamconv.errors import BadInputError
from streamconv.families.engine import apply, joined, targets
from streamconv.families.rules import Dims, Family
from streamconv.ir.boxes import contiguous_strides
from streamconv.ir.pieces import keeps_columns, matrix_of, stored_view
from streamconv.ir.recipe import Recipe, SourceRef, View
from streamconv.ir.source import GlobalTensor
from streamconv.lora.adapters import Target


class Translation:
    """Collects the factors of a trainer's modules, and makes those of HuggingFace's of them.

    ``whose`` are the modules' names.
    """

    def __init__(self, family: Family, dims: Dims, whose: str) -> None:
        self.targets: dict[str, Target] = {}
        self.tensors: dict[str, GlobalTensor] = {}
        self.family = family
        self.dims = dims
        self._whose = whose
        self._factors: dict[str, tuple[GlobalTensor, GlobalTensor]] = {}

    def take(self, weight: str, a: GlobalTensor, b: GlobalTensor) -> None:
        """Take in the factors of a module, by the name of its weight."""
        self._factors[weight] = a, b

    def made_of(self, weight: str) -> tuple[str, ...]:
        """Return which of HuggingFace's modules a rule makes of one weight, of nothing else.

        Raises :class:`BadInputError` where it is a parameter of HuggingFace's that is not a module.
        """
        made = targets(self.family, weight)
        for name in made:
            if not name.endswith(".weight"):
                raise no_module(weight, name)
        return tuple(name.removesuffix(".weight") for name in made)

    def finish(self) -> None:
        """Let the family's rules say what becomes of the modules that were taken in."""
        for name in self._factors:
            if (made := joined(self.family, name)) is not None:
                raise _more_than_rows(name, made)
        headers = {name: (b.shape, b.dtype) for name, (_, b) in self._factors.items()}
        for recipe in apply(self.family, self.dims, headers, self._whose):
            (name,) = recipe.view.sources()
            self._add(recipe, name, *self._factors[name])

    def _add(self, recipe: Recipe, name: str, a: GlobalTensor, b: GlobalTensor) -> None:
        if not recipe.name.endswith(".weight"):
            raise no_module(name, recipe.name)
        module = recipe.name.removesuffix(".weight")
        number = matrix_of(recipe.view, b.shape) if len(b.shape) == 3 else 0
        if number is None or recipe.view.ops or not keeps_columns(recipe.view, b.shape):
            raise _more_than_rows(name, recipe.name)
        if len(a.shape) == 3:
            shape = a.shape[1:]
            view = View(
                SourceRef(a.fqn, a.shape),
                shape,
                contiguous_strides(shape),
                number * shape[0] * shape[1],
            )
            a = self.own(f"{a.fqn} of expert {number}", view, a)
        # The rule saw B under its weight's name.
        view = recipe.view.map_sources({name: b.fqn})
        whole = view.whole is not None and len(b.shape) == 2
        b = b if whole else self.own(f"{b.fqn} of {module}", view, b)
        self.adapt(module, a, b)

    def own(self, name: str, view: View, tensor: GlobalTensor) -> GlobalTensor:
        """Return what a view takes of a tensor as one of its own."""
        found = self.tensors.get(name)
        return stored_view(name, view, {tensor.fqn: tensor}) if found is None else found

    def adapt(self, module: str, a: GlobalTensor, b: GlobalTensor) -> None:
        """Give one of HuggingFace's modules its factors."""
        if module in self.targets:
            raise BadInputError("two adapters are for one module", where=module)
        self.tensors |= {a.fqn: a, b.fqn: b}
        self.targets[module] = Target(module, {"lora_A": a.fqn, "lora_B": b.fqn})


def _more_than_rows(name: str, made: str) -> BadInputError:
    return BadInputError(
        "this module of the trainer's is not rows of HuggingFace's, and neither is its adapter",
        where=name,
        expected=f"{made} to be some of its rows, and nothing else",
        hint="let the trainer merge the adapter into the model",
    )


def no_module(name: str, parameter: str) -> BadInputError:
    """Return the error for an adapter of what HuggingFace keeps in a parameter among others."""
    return BadInputError(
        "this adapter changes a parameter that is not a module of its own in HuggingFace's model",
        where=name,
        found=parameter,
        hint="let the trainer merge the adapter into the model",
    )
