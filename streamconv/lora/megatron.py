"""An adapter on Megatron's modules becomes one on HuggingFace's.

How, :mod:`streamconv.lora.translation` says. Beyond that:

* Factors of one adapter for many experts (Megatron-Bridge) stand for each of them.
* CanonicalLoRA has a pair of factors for each of q, k, v, gate and up, whose rows are HuggingFace's.
* ms-swift gives B of ``linear_fc1`` no two halves when it saves, as it does the weight: its rows are
  gate and up of the first tensor-parallel rank, of the second, … Megatron-Bridge cuts the B of
  CanonicalLoRA's gate and up in halves that they do not have: rows of the same kind, the other way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from streamconv.errors import BadInputError
from streamconv.families.convert import Described
from streamconv.families.engine import apply, targets
from streamconv.ir.boxes import Box, Shape
from streamconv.ir.dtypes import DType
from streamconv.ir.pieces import spread, stored_view
from streamconv.ir.recipe import Gather, Part, SourceRef, View
from streamconv.ir.source import Checkpoint, GlobalTensor
from streamconv.lora.adapters import Adapter, Target, rank_of, refuse_more
from streamconv.lora.names import PART_OF_FUSED, fused
from streamconv.lora.translation import Translation

_SEVERAL = {"q": (3, 0), "k": (3, 1), "v": (3, 2), "gate": (2, 0), "up": (2, 1)}
"""How many tensors a family makes of the fused weight, and which of them an adapter is for."""


def weights(adapter: Adapter) -> dict[str, tuple[Shape, DType]]:
    """Return the weights that an adapter on Megatron's modules is for, as if B were their values."""
    found = {}
    for module, target in adapter.targets.items():
        part = adapter.tensors[target.parts.get("lora_B") or next(iter(target.parts.values()))]
        found[f"{fused(module)}.weight"] = (part.shape, part.dtype)
    return found | {n: (t.shape, t.dtype) for n, t in adapter.saved.items()}


def translated(adapter: Adapter, checkpoint: Checkpoint, described: Described) -> Adapter:
    """Return the adapter under the names of HuggingFace's modules.

    Raises :class:`BadInputError` for modules that no rule knows, that are none of HuggingFace's, or
    whose rule does more than take rows.
    """
    made = _Translation(checkpoint, described)
    for module, target in adapter.targets.items():
        made.add(module, target, adapter)
    made.finish()
    saved = made.saved(adapter.saved)
    wrapped = frozenset(n.rpartition(".")[0] for n in saved)
    return Adapter(made.targets, saved, wrapped, made.tensors)


class _Translation(Translation):
    """Collects HuggingFace's modules."""

    def __init__(self, checkpoint: Checkpoint, described: Described) -> None:
        super().__init__(described.family, described.dims, "Megatron")
        # Only a folder of global tensors shows the order in which ranks were put together.
        self._sharded = checkpoint.format in ("torch_dist", "dcp")
        run = checkpoint.facts.get("megatron")
        size = run.get("tensor_model_parallel_size") if isinstance(run, Mapping) else None
        self._tp = size if type(size) is int and size > 0 else None

    def add(self, module: str, target: Target, adapter: Adapter) -> None:
        """Take in one of Megatron's modules."""
        refuse_more(target)
        several = PART_OF_FUSED.fullmatch(module)
        experts = ".mlp.experts." in module
        if not experts:
            rank_of(target, adapter)  # refuses factors that do not fit
        a, b = (adapter.tensors[target.parts[p]] for p in ("lora_A", "lora_B"))
        if several:
            self._add_one_of_several(several[1], several[2], a, b)
            return
        if experts:
            number = self.dims.experts
            try:
                a, b = spread(a, number), spread(b, number)
            except ValueError as error:
                raise BadInputError(
                    "the adapter of experts is for another number of them",
                    where=module,
                    expected=f"factors of one, or of {number} experts, as config.json says",
                    found=str(error),
                ) from error
        elif self._is_of_ranks(module, target):
            b = self._by_halves(b)
        self.take(f"{module}.weight", a, b)

    def _add_one_of_several(
        self, module: str, which: str, a: GlobalTensor, b: GlobalTensor
    ) -> None:
        """CanonicalLoRA: the rows of B are those of one of HuggingFace's modules already."""
        made = self.made_of(f"{module}.weight")
        number, index = _SEVERAL.get(which, (0, 0))
        if not made or len(made) != number:
            raise BadInputError(
                "an adapter of one part of a module that has no such part",
                where=b.fqn,
                found=f"a part {which!r}; the module becomes {', '.join(made) or 'nothing known'}",
            )
        if self._sharded and which in ("gate", "up"):
            b = self._without_halves(b)
        self.adapt(made[index], a, b)

    def _is_of_ranks(self, module: str, target: Target) -> bool:
        """Whether B is that of a gated module, and its rows are rank by rank."""
        by_peft = ".lora_B." in target.parts["lora_B"]
        return (
            self._sharded
            and by_peft
            and module.endswith(".linear_fc1")
            and len(targets(self.family, f"{module}.weight")) == 2
        )

    def _by_halves(self, b: GlobalTensor) -> GlobalTensor:
        """Gate and up of each rank in turn → all of the gate, all of up."""
        found = self._pieces(b)
        ranks = self._tp or (1 if found == 1 else 0)
        if found == 2 * ranks:  # in halves, as the weight
            return b
        if found != ranks:
            raise self._untold(b, found)
        return self._reordered(b, [2 * k + half for half in (0, 1) for k in range(ranks)])

    def _without_halves(self, b: GlobalTensor) -> GlobalTensor:
        """The first half of each rank's rows, the second half of each → rank by rank."""
        found = self._pieces(b)
        ranks = self._tp or (1 if found <= 2 else 0)
        if found == ranks:
            return b
        if found != 2 * ranks:
            raise self._untold(b, found)
        return self._reordered(b, [half * ranks + k for k in range(ranks) for half in (0, 1)])

    def _pieces(self, b: GlobalTensor) -> int:
        """Return in how many pieces of equal size the rows of B were written, 0 for others."""
        starts = sorted({box.offsets[0] for box in b.layout.boxes})
        size = b.shape[0] // len(starts)
        return len(starts) if starts == list(range(0, b.shape[0], size or 1)) else 0

    def _untold(self, b: GlobalTensor, found: int) -> BadInputError:
        run = f"tensor parallel size {self._tp}" if self._tp else "no tensor parallel size"
        return BadInputError(
            "cannot determine the order of the ranks' rows of an adapter",
            where=b.fqn,
            expected="as many pieces of equal size as tensor-parallel ranks, or twice as many",
            found=f"{found or 'uneven'} pieces, and {run} among the arguments of the run",
            hint="let the trainer export the adapter, or merge it",
        )

    def _reordered(self, b: GlobalTensor, order: list[int]) -> GlobalTensor:
        """Return B with blocks of its rows in another order: where each of the new ones is now."""
        if order == sorted(order):
            return b
        rows, rest = divmod(b.shape[0], len(order))
        if rest:
            raise BadInputError("the ranks' rows have no two halves", where=b.fqn)
        columns = b.shape[1]
        source = SourceRef(b.fqn, b.shape)
        parts = tuple(
            Part(
                Box((k * rows, 0), (rows, columns)),
                View(source, (rows, columns), (columns, 1), block * rows * columns),
            )
            for k, block in enumerate(order)
        )
        view = View(Gather(b.shape, parts), b.shape, (columns, 1))
        return dataclasses.replace(stored_view(b.fqn, view, {b.fqn: b}), placement=b.placement)

    def saved(self, held: Mapping[str, GlobalTensor]) -> dict[str, GlobalTensor]:
        """Return what was trained whole under HuggingFace's names."""
        headers = {name: (t.shape, t.dtype) for name, t in held.items()}
        result = {}
        for recipe in apply(self.family, self.dims, headers):
            try:
                result[recipe.name] = stored_view(recipe.name, recipe.view, held)
            except ValueError as error:
                raise BadInputError(
                    "what was trained beside an adapter is stored in another form",
                    where=recipe.name,
                    found=str(error),
                ) from error
        return result
