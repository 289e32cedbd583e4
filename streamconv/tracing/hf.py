"""What a HuggingFace model should consist of, and how a checkpoint's tensors become its tensors.

Everything is computed from the parsed config.json and the names and shapes of the checkpoint. The
rule that matters: transformers' reverse conversion is not idempotent, so it is decided for each
group of tensors whether the checkpoint holds it as transformers has it in memory (convert it) or as
the Hub has it (hand it on). Names decide; where both have the same names, shapes do.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import starmap
from typing import TYPE_CHECKING, Any

from streamconv.errors import BadInputError
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import BF16, DType
from streamconv.ir.recipe import Cast, Recipe, View
from streamconv.tracing import hf_build, hf_convert, hf_load
from streamconv.tracing.hf_convert import Group
from streamconv.tracing.hf_layout import Layout, decide
from streamconv.tracing.hf_names import read_names
from streamconv.tracing.model import Headers, Loaded
from streamconv.tracing.wrappers import without_markers

if TYPE_CHECKING:
    import torch


def build_meta(
    config: Mapping[str, Any], names: Collection[str] = (), layout: Layout = "hub"
) -> MetaModel | None:
    """Return the model that a parsed config.json describes, or None where transformers has none.

    ``names`` are the checkpoint's: verl keeps the base model's config for a critic, whose score
    head only its names betray. With the ``layout`` of the state dict, the way to
    the Hub's names need not be one that can be streamed. None means an unknown model type or custom
    code: such a checkpoint is converted by names alone. Raises :class:`BadInputError` where
    transformers refuses the config.
    """
    resolved = hf_build.resolve(config, names)
    if resolved is None:
        return None
    architecture, known = resolved
    if not (architecture or known):
        return None
    version = config.get("transformers_version")
    with hf_build.refusing(architecture or known[0]):
        model = hf_build.build(config, architecture or known[0])
        try:
            return MetaModel(model, certain=bool(architecture), version=version)
        except BadInputError:
            if layout != "memory":
                raise
            return MetaModel(model, certain=bool(architecture), version=version, revert=False)


class MetaModel:
    """A transformers model without weights.

    ``architecture`` is the class it was built as. ``certain`` is False where config.json names a
    class that transformers does not have, so that another one of its model type stands in: then
    what is missing proves nothing. Without ``revert``, the Hub's tensors are those of the state
    dict.
    """

    def __init__(self, model: Any, *, certain: bool, version: object, revert: bool = True) -> None:
        self._model = model
        self._version = version
        self.architecture: str = type(model).__name__
        self.certain = certain
        self.state_shapes: dict[str, Shape] = {
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if hasattr(tensor, "shape")
        }
        hf_convert.attach_conversions(model)
        if not revert:
            model._weight_conversions = []
        # The dtype does not matter here, as every conversion keeps it.
        self._recipes = hf_convert.revert(
            model, {name: (shape, BF16) for name, shape in self.state_shapes.items()}
        )
        self._groups = hf_convert.groups(self._recipes, self.state_shapes)

        self.hub_shapes: dict[str, Shape] = {
            name: recipe.view.shape for name, recipe in self._recipes.items()
        }
        self._by_memory = {n: k for k, g in enumerate(self._groups) for n in g.memory}
        self._by_hub = {n: k for k, g in enumerate(self._groups) for n in g.hub}
        self.tied: tuple[tuple[str, str], ...] = tuple(self._tied())
        self._forgone: set[str] = set()

    def forgo(self, patterns: Iterable[re.Pattern[str]]) -> None:
        """Expect no Hub tensors with names of these ``patterns``: the class only stands in."""
        found = [n for n in self.hub_shapes if any(p.fullmatch(n) for p in patterns)]
        for name in found:
            self._forgone.update(self._memory_names(name))
            del self.hub_shapes[name]

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Return the config of the (text) model with the library's defaults filled in."""
        config = self._model.config.get_text_config()
        aliases = {a: getattr(config, a, None) for a in config.attribute_map}
        return {**aliases, **config.to_dict()}

    @cached_property
    def vision_settings(self) -> Mapping[str, Any]:
        """Return the config of the vision tower likewise, empty where there is none."""
        config = getattr(self._model.config, "vision_config", None)
        return config.to_dict() if config is not None else {}

    def reads_alike(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether transformers reads all that ``one`` says from the config ``other``, too."""
        return hf_build.reads_alike(one, other)

    @property
    def module(self) -> Any:
        """Return the model itself, a module on the meta device."""
        return self._model

    @property
    def fused(self) -> frozenset[str]:
        """Return the in-memory names of what the library makes of several Hub tensors, or reshapes."""
        return frozenset(n for g in self._groups if g.converted for n in g.memory)

    # --- what may be missing, superfluous or must not be cast -------------------------------------

    @cached_property
    def optional(self) -> frozenset[str]:
        """Return the Hub names that a complete model may lack.

        Tied aliases, and what transformers neither saves nor misses.
        """
        return frozenset(alias for alias, _ in self.tied) | {
            name for name in self.hub_shapes if all(map(self._may_miss, self._memory_names(name)))
        }

    @cached_property
    def _may_miss(self) -> Callable[[str], bool]:
        missing = _any_of(self._model._keys_to_ignore_on_load_missing)
        unsaved = set(self._model._keys_to_ignore_on_save or ())
        return lambda name: name in unsaved or name in self._forgone or missing(name)

    def is_optional_unexpected(self, name: str) -> bool:
        """Whether transformers ignores a tensor of this name that the model does not have."""
        return self._ignored(name)

    @cached_property
    def _ignored(self) -> Callable[[str], bool]:
        patterns = set(self._model._keys_to_ignore_on_load_unexpected or ())
        buffers = [name for name, _ in self._model.named_buffers()]
        # Weights of older releases, computed today: ignored where the model still has them.
        if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
            patterns.add(r"rotary_emb\.inv_freq")
        if any(name.endswith("position_ids") for name in buffers):
            patterns.add(r"(^|\.)position_ids$")
        return _any_of(patterns)

    def load(self, tensors: Headers) -> Loaded:
        """Return what transformers makes of files that hold ``tensors``, in Hub names.

        What it passes over by rule is neither missing nor unexpected.
        """
        loaded = hf_load.load(self._model, self.state_shapes, tensors)
        missing = set(loaded.missing)
        tied: Mapping[str, str] = self._model.all_tied_weights_keys
        for alias, kept in tied.items():
            if not {alias, kept} <= set(loaded.missing):  # one is made of the other
                missing -= {alias, kept}
        return dataclasses.replace(
            loaded,
            missing=tuple(n for n in loaded.missing if n in missing and not self._may_miss(n)),
            unexpected=tuple(n for n in loaded.unexpected if not self._ignored(n)),
        )

    def kept_fp32(self, names: Collection[str], target: DType) -> frozenset[str]:
        """Return the Hub tensors that transformers keeps in float32 when loading as ``target``.

        The lists name in-memory modules; some count for float16 only.
        """
        if target.name not in ("F16", "BF16"):
            return frozenset()
        kept = self._kept[target.name]
        return frozenset(n for n in names if any(map(kept, self._memory_names(n) or (n,))))

    def hold_fractions(self, names: Collection[str]) -> frozenset[str]:
        """Return the tensors of ``names`` that hold floating-point numbers in the model."""
        state = self._model.state_dict()
        held = {n for n, tensor in state.items() if tensor.is_floating_point()}
        return frozenset(n for n in names if held.intersection(self._memory_names(n) or (n,)))

    @cached_property
    def _kept(self) -> dict[str, Callable[[str], bool]]:
        strict = set(self._model._keep_in_fp32_modules_strict or ())
        lenient = set(self._model._keep_in_fp32_modules or ())
        # A star stands for anything, as in transformers' own lists.
        patterns = {
            "BF16": {p.replace("*", ".*") for p in strict},
            "F16": {p.replace("*", ".*") for p in strict | lenient},
        }
        return {dtype: _any_of(found) for dtype, found in patterns.items()}

    def _memory_names(self, hub_name: str) -> tuple[str, ...]:
        recipe = self._recipes.get(hub_name)
        return tuple(recipe.view.sources()) if recipe else ()

    def _tied(self) -> Iterable[tuple[str, str]]:
        """Yield (alias, kept) in Hub names; transformers knows some only where the config ties."""
        hub = {g.memory[0]: g.hub[0] for g in self._groups if len(g.memory) == len(g.hub) == 1}
        for alias, kept in self._model.all_tied_weights_keys.items():
            if alias in hub and kept in hub:
                yield hub[alias], hub[kept]

    def hub_name(self, name: str) -> str | None:
        """Return what the Hub calls the tensor that is ``name`` in memory, in this release or another.

        None for a tensor that the model does not have, or that is converted and not merely renamed.
        """
        for candidate in (name, self._rename(name)):
            group = (
                self._groups[self._by_memory[candidate]] if candidate in self._by_memory else None
            )
            if group is not None and not group.converted:
                return group.hub[0]
        return None

    def holds_transposed(self, module: str) -> bool | None:
        """Whether a module's weight is (in, out), as GPT-2's are; None where there is none."""
        try:
            return type(self._model.get_submodule(module)).__name__ == "Conv1D"
        except AttributeError:
            return None

    # --- recipes ------------------------------------------------------------------------------

    def recipes(
        self, tensors: Headers, layout: Layout = "hub"
    ) -> tuple[tuple[Recipe, ...], tuple[str, ...]]:
        """Return how the output tensors are made of ``tensors``, and what is worth telling.

        The outputs stand where their sources stand, the experts of a fused tensor in expert order.
        Tensors that the model does not know are handed on by name. Nothing is reported as missing
        here: compare the outputs with :attr:`hub_shapes`. Raises :class:`BadInputError` where two
        sources would make one output.
        """
        names = read_names(tensors, self._knows, self._rename)
        notices = list(names.notices)
        given = {names.canonical[name]: tensors[name] for name in tensors}
        original = {names.canonical[name]: name for name in tensors}
        if layout == "memory":
            made = [Recipe.identity(n, n, *given[n]) for n in given]
        else:
            made = self._hub_recipes(given, notices)
        made = [Recipe(r.name, r.dtype, r.view.map_sources(original)) for r in made]
        _refuse_duplicates(made)
        if layout == "hub":
            notices += self._told_of_squares(made)
        return _in_source_order(made, list(tensors)), tuple(notices)

    def converter(
        self, names: Collection[str]
    ) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """Return what makes Hub tensors of real tensors, as transformers does when it saves.

        ``names`` are all of the checkpoint's; the function takes any of them that are converted
        together. Nothing of it is traced: ``verify --source`` holds the recipes against it.
        """
        canonical = read_names(names, self._knows, self._rename).canonical

        def convert(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return hf_convert.convert(self._model, {canonical[n]: t for n, t in given.items()})

        return convert

    def _told_of_squares(self, made: Sequence[Recipe]) -> Iterator[str]:
        """Tell of tensors that transformers transposes or not by their shape, and that are square."""
        by_shape = hf_convert.transposed_by_shape(self._model)
        square = [
            r.name
            for r in made
            if len(set(r.view.shape[-2:])) == 1 and any(re.search(p, r.name) for p in by_shape)
        ]
        if square:
            yield (
                f"{len(square)} tensors (such as {square[0]}) are square, and transformers 5 goes by "
                "the shape when it transposes them: it will not, and compute something else than was "
                "trained (vLLM, SGLang and transformers 4 read them right; verify --forward "
                "--reference tells)"
            )

    def _hub_recipes(self, given: Headers, notices: list[str]) -> list[Recipe]:
        group_of = self._group_of(given)
        unknown = [name for name in given if name not in group_of]
        made = [Recipe.identity(name, name, *given[name]) for name in unknown]
        held: dict[int, dict[str, tuple[Shape, DType]]] = {}
        for name, header in given.items():
            if name in group_of:
                held.setdefault(group_of[name], {})[name] = header
        groups = [self._groups[k] for k in held]
        shapes = [{n: shape for n, (shape, _) in found.items()} for found in held.values()]
        layouts, told = decide(groups, shapes, self.state_shapes, self.hub_shapes, self._version)
        notices.extend(told)
        fused: list[tuple[Group, Headers]] = []
        for group, found, layout in zip(groups, held.values(), layouts, strict=True):
            if layout == "hub":
                made.extend(Recipe.identity(n, n, *header) for n, header in found.items())
            elif not group.converted:
                # Handed on whatever its shape: a resized vocabulary does not concern conversion.
                name = group.memory[0]
                made.append(Recipe.identity(group.hub[0], name, *found[name]))
            else:
                fused.append((group, found))
        made.extend(self._converted(fused))
        return made

    def _group_of(self, names: Collection[str]) -> Mapping[str, int]:
        """Return the group of each name, read as in memory if all can be, else as on the Hub.

        One name may mean one tensor in memory and another on the Hub.
        """
        known = [name for name in names if self._knows(name)]
        for table in (self._by_memory, self._by_hub):
            if all(name in table for name in known):
                return table
        return self._by_hub | self._by_memory

    def has(self, name: str) -> bool:
        """Whether a tensor of this name is the model's, in memory, on the Hub or in another release."""
        name = without_markers(name)
        return self._knows(name) or self._knows(self._rename(name))

    def _knows(self, name: str) -> bool:
        return name in self._by_memory or name in self._by_hub

    def _converted(self, fused: Sequence[tuple[Group, Headers]]) -> Iterator[Recipe]:
        """Yield the Hub tensors of groups that are held as in memory and have to be converted.

        A tensor that is absent is traced with the shape it should have, and what would be made of
        it is left out: so a checkpoint with a hole converts as far as it goes.
        """
        found = {name: header for _, headers in fused for name, header in headers.items()}
        recipes = self._recipes
        retraced = not all(starmap(self._as_expected, fused))
        if retraced:
            dtype = next(iter(found.values()))[1]
            expected = {n: (shape, dtype) for n, shape in self.state_shapes.items()}
            recipes = hf_convert.revert(self._model, expected | found)
        for recipe in recipes.values():
            used = set(recipe.view.sources())
            if used <= found.keys():
                dtype = recipe.dtype if retraced else found[min(used)][1]
                yield Recipe(recipe.name, dtype, recipe.view)

    def _as_expected(self, group: Group, found: Headers) -> bool:
        """Whether the trace made of config.json alone holds for this group of the checkpoint."""
        return (
            all(shape == self.state_shapes[n] for n, (shape, _) in found.items())
            and len({dtype for _, dtype in found.values()}) == 1
            and not any(_casts(self._recipes[n].view) for n in group.hub)
        )

    def _rename(self, name: str) -> str:
        """Return what transformers would load a tensor called ``name`` as, or ``name`` itself."""
        from transformers.core_model_loading import rename_source_key

        forward, backward = self._renamings
        prefix = self._model.base_model_prefix
        found, _ = rename_source_key(name, forward, [], prefix, self.state_shapes)
        if self._knows(found):
            return str(found)
        # Per-expert names exist on the Hub only: rename into today's namespace and back out of it.
        for candidate in (str(found), f"{prefix}.{found}"):
            for renaming in backward:
                candidate, _ = renaming.rename_source_key(candidate)
            if self._knows(candidate):
                return candidate
        return name

    @cached_property
    def _renamings(self) -> tuple[list[Any], list[Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        forward = get_model_conversion_mapping(self._model)
        backward = [c.reverse_transform() for c in reversed(self._model._weight_conversions)]
        return (
            [c for c in forward if isinstance(c, WeightRenaming)],
            [c for c in backward if isinstance(c, WeightRenaming)],
        )


def _any_of(patterns: Iterable[str] | None) -> Callable[[str], bool]:
    """Return whether a name matches any of transformers' own patterns, which it searches for."""
    found = sorted(patterns or ())
    if not found:
        return lambda _: False
    compiled = re.compile("|".join(f"(?:{p})" for p in found))
    return lambda name: compiled.search(name) is not None


def _refuse_duplicates(recipes: Iterable[Recipe]) -> None:
    first: dict[str, Recipe] = {}
    for recipe in recipes:
        other = first.setdefault(recipe.name, recipe)
        if other is not recipe:
            raise BadInputError(
                f"two tensors of the checkpoint would both be written as {recipe.name}",
                found=" and ".join(r.view.sources()[0] for r in (other, recipe)),
            )


def _in_source_order(recipes: Iterable[Recipe], names: Sequence[str]) -> tuple[Recipe, ...]:
    position = {name: k for k, name in enumerate(names)}

    def start(recipe: Recipe) -> tuple[int, int]:
        places = ((position[source.fqn], view.offset) for source, view in recipe.view.leaves())
        return min(places, default=(len(position), 0))

    return tuple(sorted(recipes, key=start))


def _casts(view: View) -> bool:
    """Whether a cast takes part anywhere in ``view``."""
    return any(isinstance(op, Cast) for part in view.walk() for op in part.ops)
