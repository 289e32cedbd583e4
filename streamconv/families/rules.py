"""What a family is made of: rules that name Megatron's tensors and HuggingFace's, and a little torch.

A rule's patterns have named captures. In a source ``{rest}`` is any text and every other capture a
number: ``decoder.layers.{layer}.mlp.linear_fc2.weight``. A target uses the captures of its source, and
``{expert}`` where the source has none: then the made tensor's first axis counts the experts and each
becomes a tensor of its own. ``{mtp_layer}`` is the number of ordinary layers plus ``{mtp}``: where
several HuggingFace families keep the layers for multi-token prediction. Where each of those is several
layers in HuggingFace's numbers, ``{inner_layer}`` is that of the ``{inner}`` one, ``{inner_first}`` and
``{inner_last}`` those of the first and the last.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamconv.errors import BadInputError

if TYPE_CHECKING:
    import torch

How = Callable[..., "torch.Tensor | tuple[torch.Tensor | None, ...]"]
"""``how(dims, *sources)`` returns one tensor a target, None for one that the model has not there.

It sees shapes and dtypes, never data.
"""

Applies = Callable[[Mapping[str, Any]], bool]
"""Whether a family is that of a parsed config.json of one of its model types."""


def _always(_: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Rule:
    """How the tensors that match ``sources`` become those called ``targets``.

    All ``sources`` of one match are given to ``how``; the first one finds the match.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    how: How


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Models that Megatron names alike and HuggingFace names alike.

    ``model_types`` are those of config.json, ``when`` tells families of one model type apart.
    ``extras`` are patterns (as a rule's targets) of
    tensors that the released models have and transformers' class has not, such as layers for
    multi-token prediction. ``reference`` turns the config into one that transformers knows, for a
    model whose class is not part of it, and ``lacks`` are patterns of what that model has and this one
    has not. ``zero_centred_norms`` says that HuggingFace's class adds 1 to the weights of its norms.
    ``hybrid`` says that HuggingFace's model, too, has layers of single blocks (attention, MLP, Mamba).
    ``untrained`` are patterns of HuggingFace's tensors, one for each part of the model that a run may
    leave out as a whole: they are the released model's then. ``parts`` are prefixes, within a layer, of
    what not all layers of a model have that transformers has no class for.
    ``signs`` are for tensors of one name and shape that trainers fill in different ways: for each way a
    regular expression, found in names that only such checkpoints have; ``Dims.signs`` has those that
    were seen. ``dropped`` are patterns of tensors that are left out, because HuggingFace's model has no
    such thing, each with the reason.
    """

    name: str
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    extras: tuple[str, ...] = ()
    reference: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    lacks: tuple[str, ...] = ()
    zero_centred_norms: bool = False
    when: Applies = _always
    hybrid: bool = False
    untrained: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    signs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dropped: tuple[tuple[str, str], ...] = ()


def borrowing(
    classes: Mapping[str, tuple[str, str]], renamed_settings: Mapping[str, str] | None = None
) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Return a family's ``reference``: models whose code is on the Hub borrow a known model's class.

    ``classes`` are the known (model type, class) by the model type that borrows; ``renamed_settings``
    tell what the known config calls a setting.
    """

    def reference(config: Mapping[str, Any]) -> Mapping[str, Any]:
        found = classes.get(str(config.get("model_type")))
        if found is None:
            return config
        model_type, architecture = found
        names = renamed_settings or {}
        settings = {names.get(k, k): v for k, v in config.items() if k != "auto_map"}
        return settings | {"model_type": model_type, "architectures": [architecture]}

    return reference


def without_class(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A ``reference`` that no class of transformers stands for: what it saves has other names.

    The names are those of the released files, which it reads.
    """
    return {**config, "model_type": f"{config.get('model_type')} as released"}


def rule(sources: str | tuple[str, ...], targets: str | tuple[str, ...], how: How) -> Rule:
    """Return a rule; a single name needs no tuple."""
    return Rule(_tuple(sources), _tuple(targets), how)


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def renamed(
    rules: Iterable[Rule],
    *,
    sources: Mapping[str, str] | None = None,
    targets: Mapping[str, str] | None = None,
) -> tuple[Rule, ...]:
    """Return ``rules`` with parts of their names replaced: another prefix, another word for a module.

    Every key must occur in some rule, so that a table that changes below does not go unnoticed.
    """
    missed = {*(sources or {}), *(targets or {})}

    def replace(name: str, table: Mapping[str, str]) -> str:
        for old, new in table.items():
            if old in name:
                missed.discard(old)
                name = name.replace(old, new)
        return name

    made = tuple(
        dataclasses.replace(
            r,
            sources=tuple(replace(n, sources or {}) for n in r.sources),
            targets=tuple(replace(n, targets or {}) for n in r.targets),
        )
        for r in rules
    )
    if missed:
        raise ValueError(f"no rule has {', '.join(sorted(missed))} in its names")
    return made


def moved(
    source: str, target: str, names: Mapping[str, str], how: How, kinds: Iterable[str] = ("weight",)
) -> tuple[Rule, ...]:
    """Return a rule for each of ``names`` (module to module) and each kind of its parameters.

    ``source`` and ``target`` are the prefixes of both sides.
    """
    return tuple(
        rule(f"{source}{old}.{kind}", f"{target}{new}.{kind}", how)
        for old, new in names.items()
        for kind in kinds
    )


def prefixed(rules: Iterable[Rule], *, sources: str = "", targets: str = "") -> tuple[Rule, ...]:
    """Return ``rules`` with a prefix before the names of their sources and targets."""
    return tuple(
        dataclasses.replace(
            r,
            sources=tuple(sources + n for n in r.sources),
            targets=tuple(targets + n for n in r.targets),
        )
        for r in rules
    )


def replaced(rules: Iterable[Rule], how: How) -> tuple[Rule, ...]:
    """Return ``rules`` with another body."""
    return tuple(dataclasses.replace(r, how=how) for r in rules)


def compiled(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern with named captures."""
    text = ""
    for k, part in enumerate(re.split(r"\{(\w+)\}", pattern)):
        if k % 2:
            seen = f"(?P<{part}>" in text
            text += (
                f"(?P={part})" if seen else f"(?P<{part}>{'.+' if part == 'rest' else '[0-9]+'})"
            )
        else:
            text += re.escape(part)
    return re.compile(text)


class Dims:
    """The sizes of a model, from its config.json with transformers' defaults filled in.

    ``megatron`` holds what the checkpoint itself says of the run (arguments of Megatron's config, by
    these names also where another trainer says it),
    ``vision`` are the sizes of a vision tower, without settings where there is none. ``signs`` tell
    whose ways the checkpoint has (:class:`Family`).
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        megatron: Mapping[str, Any],
        vision: Mapping[str, Any] | None = None,
        signs: frozenset[str] = frozenset(),
    ) -> None:
        self._settings = settings
        self.signs = signs
        self.kind: str | None = None
        """What config.json calls the layer that a rule is for, None for another."""
        self.reuses_keys = False
        """Whether that layer has no keys and values of its own, but those of one before."""
        self._vision = vision
        self.megatron = megatron

    @property
    def vision(self) -> Dims:
        """Return the sizes of the vision tower."""
        return Dims(self._vision or {}, self.megatron)

    @property
    def traits(self) -> tuple[object, ...]:
        """Return what else than shapes makes a layer another than the one before."""
        sizes = ("head_dim", "num_key_value_heads", "num_attention_heads")
        return (self.kind, self.reuses_keys, *map(self.get, sizes))

    def of_layer(self, captures: Mapping[str, str]) -> Dims:
        """Return the sizes with the kind of the layer that a rule's captures tell."""
        kinds, own = self.get("layer_types"), self.get("per_layer_config")
        found, number = copy.copy(self), int(captures.get("layer", -1))
        if isinstance(kinds, list) and 0 <= number < len(kinds):
            found.kind = str(kinds[number])
            shared = self.get("num_kv_shared_layers")
            found.reuses_keys = type(shared) is int and number >= self.layers - shared
        elif "mtp" in captures:
            kinds, place = self.get("mtp_layer_types"), int(captures["mtp"])
            known = isinstance(kinds, list) and place < len(kinds)
            found.kind = str(kinds[place]) if known else "mtp"
        if isinstance(own, Mapping):
            changed = own.get(str(number), own.get(number))
            if isinstance(changed, Mapping):
                found._settings = {**self._settings, **changed}
        return found

    def get(self, *names: str) -> Any:
        """Return the first of the settings ``names`` that the config has, or None."""
        return next((v for n in names if (v := self._settings.get(n)) is not None), None)

    def number(self, *names: str) -> int:
        """Return a setting that must be there and be a whole number."""
        value = self.get(*names)
        if type(value) is not int or value < 0:
            raise BadInputError(
                f"config.json gives no {names[0]}",
                where="config.json",
                expected="a whole number",
                found=str(value)[:80],
            )
        return value

    @property
    def hidden(self) -> int:
        """Return the width of the residual stream."""
        return self.number("hidden_size")

    @property
    def layers(self) -> int:
        """Return the number of layers, those for multi-token prediction not counted."""
        kinds = self.get("layers_block_type")
        if self.get("num_hidden_layers") is None and isinstance(kinds, list):
            return len(kinds)
        return self.number("num_hidden_layers")

    @property
    def inner_layers(self) -> int:
        """Return of how many single blocks a layer for multi-token prediction consists."""
        kinds = self.get("mtp_layers_block_type", "mtp_hybrid_override_pattern")
        return len(kinds) if isinstance(kinds, list | str) else 1

    @property
    def heads(self) -> int:
        """Return the number of query heads."""
        return self.number("num_attention_heads")

    @property
    def groups(self) -> int:
        """Return the number of query groups: of key and value heads."""
        return (
            self.heads
            if self.get("num_key_value_heads") is None
            else self.number("num_key_value_heads")
        )

    @property
    def head_dim(self) -> int:
        """Return the width of a head, which need not be ``hidden / heads``."""
        given = self.get("head_dim")
        return self.number("head_dim") if given is not None else self.hidden // self.heads

    @property
    def vocab(self) -> int:
        """Return the number of tokens, without padding."""
        return self.number("vocab_size")

    @property
    def experts(self) -> int:
        """Return the number of routed experts, 0 for a dense model."""
        names = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
        return 0 if self.get(*names) is None else self.number(*names)

    def check_heads(self) -> None:
        """Compare the heads with those of the run, where the checkpoint tells them.

        Other numbers of heads can make up the same rows, so that no shape would show it.
        """
        run = self.megatron
        # Without grouped queries Megatron-LM leaves its default here, which is 1.
        grouped = run.get("group_query_attention") is not False
        groups = run.get("num_query_groups" if grouped else "num_attention_heads")
        for what, ours, theirs in (
            ("the number of query heads", self.heads, run.get("num_attention_heads")),
            ("the number of query groups", self.groups, groups),
            ("the width of a head", self.head_dim, run.get("kv_channels")),
        ):
            if type(theirs) is int:
                self.expect(what, ours, theirs)

    def expect(self, what: str, expected: object, found: object) -> None:
        """Raise :class:`BadInputError` where config.json and a tensor contradict each other."""
        if expected != found:
            raise BadInputError(
                f"config.json and the checkpoint contradict each other: {what}",
                expected=f"{expected} by config.json",
                found=f"{found} in the checkpoint",
                hint="name the config of the model that was trained: --hf-config DIR",
            )
