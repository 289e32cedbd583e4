"""LoRA adapters in a checkpoint: told from the base weights by name, merged into them or handed on.

PEFT's names, after ``base_model.model.``: ``M.base_layer.weight`` (the frozen weight of module M),
``M.lora_A.NAME.weight`` (rank x in), ``M.lora_B.NAME.weight`` (out x rank), for embeddings
``M.lora_embedding_A.NAME`` (rank x rows) and ``M.lora_embedding_B.NAME`` (width x rank), for DoRA
``M.lora_magnitude_vector.NAME.weight``; ``M.modules_to_save.NAME.…`` was trained whole, and
``M.original_module.…`` is what it was before. NAME is ``default``, or absent in an adapter's own file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from streamconv.errors import BadInputError
from streamconv.formats.tensor_bytes import is_finite, pieces
from streamconv.ir.boxes import contiguous_strides
from streamconv.ir.dtypes import F32
from streamconv.ir.pieces import stored_view
from streamconv.ir.recipe import AddProduct, Cast, Recipe, SourceRef, View
from streamconv.ir.source import Checkpoint, GlobalTensor, Skipped
from streamconv.lora.names import FOREIGN, ORIGINAL, PART, PARTS, SAVED, canonical
from streamconv.lora.settings import CONFIG, PREFIX, Settings

_MAGNITUDES = "lora_magnitude_vector"
BELOW = "base_layer"
"""The part of a target that is the base model's own weight, saved with the adapter."""


@dataclass(frozen=True, slots=True)
class Target:
    """An adapted module: its name in the base model, and the FQN of each part that is there."""

    module: str
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def embedding(self) -> bool:
        """Whether the module is an embedding, whose factors lie the other way around."""
        return "lora_embedding_A" in self.parts


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter consists of.

    ``targets`` by module; ``saved`` maps the base model's names of tensors that were trained whole to
    their tensors, and ``wrapped`` are the modules that were, which may have modules within; ``tensors``
    are the parts by FQN.
    """

    targets: Mapping[str, Target]
    saved: Mapping[str, GlobalTensor]
    wrapped: frozenset[str]
    tensors: Mapping[str, GlobalTensor]

    @property
    def dora(self) -> bool:
        """Whether the adapter has magnitudes."""
        return any(_MAGNITUDES in t.parts for t in self.targets.values())


def separate(checkpoint: Checkpoint) -> tuple[Checkpoint, Adapter]:
    """Return the base model's tensors under their own names, and the adapter.

    Raises :class:`BadInputError` for several adapters in one checkpoint, for half an adapter, and for
    tensors that can be read in two ways.
    """
    unclear = [n for n in checkpoint.undecided if PART.fullmatch(canonical(n))]
    if unclear:
        raise BadInputError(
            "the adapter's tensors are either pieces or whole copies, and nothing says which",
            where=unclear[0],
            found=f"{len(unclear)} plain tensors on several ranks",
        )
    base: dict[str, GlobalTensor] = {}
    saved: dict[str, GlobalTensor] = {}
    wrapped: set[str] = set()
    parts: dict[str, GlobalTensor] = {}
    targets: dict[str, Target] = {}
    _one_adapter(checkpoint)
    skipped: list[Skipped] = []
    for fqn, tensor in checkpoint.tensors.items():
        name = canonical(fqn)
        if match := PART.fullmatch(name):
            module, part, _, leaf = match.groups()
            key = f"{part}.bias" if leaf == "bias" else part
            _once(targets.setdefault(module, Target(module)).parts, key, fqn)
            parts[fqn] = tensor
        elif match := SAVED.fullmatch(name):
            _once(saved, f"{match[1]}.{match[3]}", tensor)
            wrapped.add(match[1])
        elif ORIGINAL.fullmatch(name):
            skipped.append(
                Skipped(fqn, "as it was before training (modules_to_save has the other)")
            )
        elif name.endswith("_magnitude"):
            raise _dora(fqn)
        elif FOREIGN.fullmatch(name):
            raise BadInputError(
                "this part of an adapter is not LoRA's, and leaving it out would give another model",
                where=fqn,
                expected=f"{', '.join(PARTS)} or modules_to_save",
                hint="merge it with PEFT",
            )
        else:
            _once(base, name.replace(".base_layer.", "."), tensor)
    for name, tensor in saved.items():
        _once(base, name, tensor)
    for name in [n for n in base if n.removesuffix(".magnitude") in targets]:
        tensor = base.pop(name)  # torchtune's DoRA
        parts[tensor.fqn] = tensor
        _once(targets[name.removesuffix(".magnitude")].parts, _MAGNITUDES, tensor.fqn)
    _refuse_adapted_parameters(targets, base)
    undecided = {
        canonical(n).replace(".base_layer.", "."): pair for n, pair in checkpoint.undecided.items()
    }
    found = dataclasses.replace(
        checkpoint,
        tensors=MappingProxyType({n: named(n, t) for n, t in base.items()}),
        undecided=MappingProxyType(
            {
                n: dataclasses.replace(u, pieces=named(n, u.pieces), copies=named(n, u.copies))
                for n, u in undecided.items()
            }
        ),
        skipped=(*checkpoint.skipped, *skipped),
    )
    return found, Adapter(targets, saved, frozenset(wrapped), parts)


def _dora(fqn: str) -> BadInputError:
    return BadInputError(
        "this adapter is of DoRA: its magnitudes are neither merged nor handed on under HuggingFace's "
        "names of the modules",
        where=fqn,
        expected="lora_A and lora_B (linear_in and linear_out) alone",
        hint="let the trainer merge the adapter into the model, and save that",
    )


def refuse_more(target: Target) -> None:
    """Raise :class:`BadInputError` for what an adapter on a trainer's own module has but factors."""
    if _MAGNITUDES in target.parts:
        raise _dora(target.parts[_MAGNITUDES])
    odd = [p for p in target.parts if p not in ("lora_A", "lora_B")]
    if odd:
        raise BadInputError(
            "this part of an adapter on a trainer's own module has no place in HuggingFace's",
            where=target.parts[odd[0]],
            expected="lora_A and lora_B (linear_in and linear_out) alone",
        )
    if len(target.parts) < 2:
        raise BadInputError(
            "incomplete adapter: only one of lora_A and lora_B is present",
            where=next(iter(target.parts.values())),
        )


def _refuse_adapted_parameters(targets: Mapping[str, Target], base: Iterable[str]) -> None:
    """Refuse PEFT's target_parameters: its factors look like a module's, but mean something else."""
    held: dict[str, set[str]] = {}
    for name in base:
        module, _, leaf = name.rpartition(".")
        held.setdefault(module, set()).add(leaf)
    for module, target in targets.items():
        others = held.get(module, set()) - {"bias"}
        if module.endswith(".base_layer") or (others and "weight" not in others):
            raise BadInputError(
                "this adapter changes parameters, such as those of fused experts, and not a module",
                where=next(iter(target.parts.values())),
                expected="adapters of modules that have a weight",
                hint="merge it with PEFT",
            )


def _one_adapter(checkpoint: Checkpoint) -> None:
    names = {canonical(n) for n in checkpoint.tensors}
    adapters = {m[3] or "" for n in names if (m := PART.fullmatch(n))}
    adapters |= {m[2] for n in names if (m := SAVED.fullmatch(n))}
    if len(adapters) > 1:
        raise BadInputError(
            f"{len(adapters)} adapters in one checkpoint",
            where=str(checkpoint.root),
            found=", ".join(sorted(a or "(no name)" for a in adapters)),
            hint="merge all but one of them with PEFT before saving",
        )


def named(name: str, tensor: GlobalTensor) -> GlobalTensor:
    """Return a tensor under another name."""
    return tensor if tensor.fqn == name else dataclasses.replace(tensor, fqn=name)


def _once(table: dict[str, Any], key: str, value: object) -> None:
    if key in table:
        raise BadInputError("two tensors of the checkpoint have one name in the model", where=key)
    table[key] = value


def with_trained(adapter: Adapter, others: Mapping[str, GlobalTensor]) -> Adapter:
    """Return an adapter that was saved alone, ``others`` beside its factors: they were trained whole.

    In its own file PEFT calls what ``modules_to_save`` names as the base model does. What belongs to an
    adapted module is the base model's own, which PEFT saves of an embedding that has grown, or that it
    adapts, and takes for the base model's when it loads the adapter. So is trl's value head, which no
    base model has.
    """
    saved = {
        name: tensor
        for name, tensor in others.items()
        if name not in adapter.saved
        and name.removesuffix(".weight") not in adapter.targets
        and "v_head" not in name.split(".")
    }
    wrapped = adapter.wrapped | {name.rpartition(".")[0] for name in saved}
    below = {m: t for m in adapter.targets if (t := others.get(f"{m}.weight")) is not None}
    targets = {
        m: Target(m, {**t.parts, BELOW: below[m].fqn}) if m in below else t
        for m, t in adapter.targets.items()
    }
    return dataclasses.replace(
        adapter,
        targets=targets,
        saved={**adapter.saved, **saved},
        wrapped=wrapped,
        tensors={**adapter.tensors, **{t.fqn: t for t in below.values()}},
    )


def refuse_biases(adapter: Adapter) -> None:
    """Raise :class:`BadInputError` for biases of adapted modules: PEFT's folder has no such place."""
    biases = [n for n in adapter.saved if n.removesuffix(".bias") in adapter.targets]
    if biases:
        raise BadInputError(
            "the model's biases were trained too, and an adapter's folder would lack them",
            where=biases[0],
            hint="merge it: --lora merge (and --base DIR where there are no base weights)",
        )


def settle(settings: Settings, adapter: Adapter) -> Settings:
    """Return the settings with what the tensors themselves show; raises where the two disagree."""
    for module, target in adapter.targets.items():
        rank = rank_of(target, adapter)
        said = settings.rank_of(module)
        if said is not None and said != rank:
            raise BadInputError(
                "the adapter's rank is not what its settings say",
                where=next(iter(target.parts.values())),
                expected=f"rank {said}",
                found=f"rank {rank} in the shape of its factors",
                hint="do the settings belong to this checkpoint? --lora-rank N overrules r, but not "
                f"rank_pattern in {CONFIG}",
            )
    plain = [t for t in adapter.targets.values() if _MAGNITUDES not in t.parts]
    if plain and (settings.dora or adapter.dora):
        raise BadInputError(
            "an adapter of DoRA lacks magnitudes: as plain LoRA it would be another model",
            where=next(iter(plain[0].parts.values())),
            expected=f"{plain[0].module}.lora_magnitude_vector, too",
        )
    if adapter.dora != settings.dora:
        settings = dataclasses.replace(settings, dora=adapter.dora)
    return settings


def rank_of(target: Target, adapter: Adapter) -> int:
    """Return the rank of a target; raises :class:`BadInputError` where its factors do not fit."""
    first, second = (
        ("lora_embedding_A", "lora_embedding_B") if target.embedding else ("lora_A", "lora_B")
    )
    missing = [p for p in (first, second) if p not in target.parts]
    if missing:
        raise BadInputError(
            "incomplete adapter: only one of lora_A and lora_B is present",
            where=next(iter(target.parts.values())),
            expected=f"{target.module}.{missing[0]}, too",
        )
    a, b = (adapter.tensors[target.parts[p]] for p in (first, second))
    # Those of a convolution have more dimensions.
    axes = {len(a.shape), len(b.shape)}
    if len(axes) > 1 or min(axes) < 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise BadInputError(
            "the factors of an adapter do not fit together",
            where=target.module,
            expected="A of (rank, in) and B of (out, rank)",
            found=f"A {list(a.shape)}, B {list(b.shape)}",
        )
    return a.shape[0]


def updates(
    adapter: Adapter,
    settings: Settings,
    base: Mapping[str, GlobalTensor],
    find: Callable[[str], str | None],
    is_turned: Callable[[str], bool | None],
    folder: Path | None = None,
) -> dict[str, AddProduct]:
    """Return what is to be added to which tensor of ``base``.

    ``find`` returns the name in ``base`` of a weight that is called so in memory, ``is_turned`` whether
    a module holds its weight as (in, out), None where only its shape can tell. Raises
    :class:`BadInputError` for what cannot be merged: no weight to merge into, or one that is no
    matrix of floats of the right shape; DoRA; biases of adapters.
    """
    made: dict[str, AddProduct] = {}
    shown: list[bool] = []
    unclear: list[str] = []
    for module, target in adapter.targets.items():
        extra = sorted(p for p in target.parts if p.endswith(".bias") or "magnitude" in p)
        if extra:
            what = "DoRA's magnitudes" if "magnitude" in extra[0] else "a bias of an adapter"
            raise BadInputError(
                f"{what} cannot be merged",
                where=target.parts[extra[0]],
                hint="take the adapter by itself with --lora adapter and merge it with PEFT",
            )
        name = find(f"{module}.weight")
        if name is None:
            raise no_weight(module, folder)
        turned = is_turned(module)
        made[name] = _update(adapter, target, settings, base[name], bool(turned))
        if turned is None and not target.embedding:
            rows, columns = base[name].shape
            if rows == columns:
                unclear.append(name)
            else:
                shown.append(rows != adapter.tensors[target.parts["lora_B"]].shape[0])
    if unclear and any(shown):
        raise BadInputError(
            "the model holds weights as (in, out), and a square one does not show whether it is one",
            where=unclear[0],
            hint="name the folder of its config.json: --hf-config DIR",
        )
    return made


def no_weight(module: str, folder: Path | None = None) -> BadInputError:
    """Return the error for a module whose weight is nowhere, the base model's folder included."""
    if folder is not None:
        return BadInputError(
            "the base model does not have a weight that the adapter changes",
            where=f"{module}.weight",
            expected=f"it in {folder}",
            hint="name the folder of the model that the adapter was trained on (--base DIR)",
        )
    return BadInputError(
        "the checkpoint does not hold the weight that an adapter belongs to",
        where=f"{module}.weight",
        hint="name a folder with the base model (--base DIR), or take the adapter by itself "
        "(--lora adapter)",
    )


def _update(
    adapter: Adapter, target: Target, settings: Settings, weight: GlobalTensor, turned: bool
) -> AddProduct:
    scale = settings.scale(target.module, rank_of(target, adapter))
    if target.embedding:
        a = adapter.tensors[target.parts["lora_embedding_A"]]
        b = adapter.tensors[target.parts["lora_embedding_B"]]
    else:
        a, b = (adapter.tensors[target.parts[p]] for p in ("lora_A", "lora_B"))
    if len(a.shape) != 2:
        raise BadInputError(
            "the adapter of a convolution cannot be merged",
            where=weight.fqn,
            expected="A of (rank, in) and B of (out, rank)",
            found=f"A {list(a.shape)}, B {list(b.shape)}",
            hint="take the adapter by itself with --lora adapter and merge it with PEFT",
        )
    straight = (b.shape[0], a.shape[1])
    turned = turned or target.embedding or weight.shape == straight[::-1] != straight
    expected = straight[::-1] if turned else straight
    if weight.shape != expected or not weight.dtype.castable:
        raise BadInputError(
            "an adapter cannot be merged into this weight",
            where=weight.fqn,
            expected=f"floats of shape {list(expected)}",
            found=f"{weight.dtype} {list(weight.shape)}",
            hint="take the adapter by itself: --lora adapter"
            + ("" if weight.dtype.castable else "; --dequantize merges it into a quantized model"),
        )
    left, right = (_view(a, turned=True), _view(b, turned=True)) if turned else (_view(b), _view(a))
    return AddProduct(left, right, scale)


def _view(tensor: GlobalTensor, *, turned: bool = False) -> View:
    """Return a factor as float32, transposed where it stands on the other side of the product."""
    strides = contiguous_strides(tensor.shape)
    shape = tensor.shape
    if turned:
        shape, strides = shape[::-1], strides[::-1]
    ops = () if tensor.dtype is F32 else (Cast(F32),)
    return View(SourceRef(tensor.fqn, tensor.shape), shape, strides, 0, ops)


def attach(recipes: Iterable[Recipe], made: Mapping[str, AddProduct]) -> list[Recipe]:
    """Return the recipes with the updates on the tensors they draw from.

    Raises :class:`BadInputError` for an update that no output would hold.
    """
    used: set[str] = set()

    def updated(base: SourceRef, view: View) -> View:
        if base.fqn not in made:
            return view
        used.add(base.fqn)
        return dataclasses.replace(view, ops=(made[base.fqn], *view.ops))

    result = [dataclasses.replace(r, view=r.view.with_leaves(updated)) for r in recipes]
    lost = [name for name in made if name not in used]
    if lost:
        raise BadInputError(
            f"{len(lost)} weights that an adapter changes are in no output", where=lost[0]
        )
    return result


def in_pieces(
    recipes: list[Recipe], tensors: Mapping[str, GlobalTensor], names: Collection[str]
) -> tuple[list[Recipe], dict[str, GlobalTensor]]:
    """Return recipes and tensors in which those called ``names`` are made of a tensor of their own.

    So each is a whole matrix, to which a product can be added. What is stored of them is no longer a
    source under its old name, unless others draw from it.
    """
    result = []
    own: dict[str, GlobalTensor] = {}
    for recipe in recipes:
        if recipe.name in names:
            try:
                own[recipe.name] = stored_view(recipe.name, recipe.view, tensors)
            except ValueError as error:
                raise BadInputError(
                    "an adapter cannot be merged into this weight",
                    where=recipe.name,
                    found=str(error),
                    hint="take the adapter by itself: --lora adapter",
                ) from error
            shape = recipe.view.shape
            recipe = Recipe.identity(recipe.name, recipe.name, shape, recipe.dtype)
        result.append(recipe)
    before = {fqn for r in recipes for fqn in r.view.sources()}
    after = {fqn for r in result for fqn in r.view.sources()}
    kept = {n: t for n, t in tensors.items() if n not in before - after}
    return result, {**kept, **own}


def recipes(adapter: Adapter) -> list[Recipe]:
    """Return the adapter's tensors as PEFT saves them: without the adapter's name in theirs."""
    made = []
    for module, target in adapter.targets.items():
        for part, fqn in target.parts.items():
            bare = "embedding" in part or "magnitude" in part
            leaf = "" if bare else ".bias" if part.endswith(".bias") else ".weight"
            made.append(
                (f"{PREFIX}{module}.{part.removesuffix('.bias')}{leaf}", adapter.tensors[fqn])
            )
    made += [(PREFIX + name, tensor) for name, tensor in adapter.saved.items()]
    return [
        Recipe(name, t.dtype, View(SourceRef(t.fqn, t.shape), t.shape, contiguous_strides(t.shape)))
        for name, t in made
    ]


def changes_nothing(adapter: Adapter, paths: Sequence[Path]) -> bool:
    """Whether every B is zero, as before the first step of training; reads them, the first as a rule.

    ``paths`` are the source files by number. What was trained whole counts as a change.
    """
    if adapter.saved:
        return False
    # The sign of a zero is not a change either, but PEFT's zeros have none.
    return not any(
        piece.count(0) != len(piece)
        for tensor in _second_factors(adapter)
        for piece in _stored(tensor, paths)
    )


def not_finite(adapter: Adapter, paths: Sequence[Path]) -> list[str]:
    """Return the names of every B that holds NaN or an infinity; reads them all."""
    return [
        tensor.fqn
        for tensor in _second_factors(adapter)
        if tensor.dtype.castable and not is_finite(tensor.dtype, _stored(tensor, paths))
    ]


def _second_factors(adapter: Adapter) -> list[GlobalTensor]:
    return [
        adapter.tensors[fqn]
        for target in adapter.targets.values()
        for part, fqn in target.parts.items()
        if part in ("lora_B", "lora_embedding_B")
    ]


def _stored(tensor: GlobalTensor, paths: Sequence[Path]) -> Iterator[bytes]:
    """Yield the stored bytes of a tensor, some elements at a time."""
    layout = tensor.layout
    walk = zip(layout.boxes, layout.strides, layout.storage_offsets, tensor.shards, strict=True)
    for box, strides, offset, record in walk:
        if not box.numel:
            continue
        last = sum((n - 1) * s for n, s in zip(box.sizes, strides, strict=True))
        itemsize = tensor.dtype.itemsize
        yield from pieces(
            paths[record.file], record.start + offset * itemsize, (last + 1) * itemsize
        )
