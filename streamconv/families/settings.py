"""Compares settings that no tensor shows: the run's own arguments against config.json.

A base of the rotary embedding, an epsilon or a number of chosen experts changes no shape, but what the
model computes. Where the run tells another value than config.json, the model that is written would not
be the trained one. An argument may be nobody's word, though: trainers that build their models from
HuggingFace's config leave Megatron-LM's arguments at their defaults. So a default that differs is told,
and any other value is an error. verl's copy of the model's own config is always taken at its word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.errors import BadInputError
from streamconv.families.rules import Dims, Family
from streamconv.formats.mcore_facts import OF_MODEL


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting under its names in Megatron, and how HuggingFace's values are found.

    ``defaults`` are Megatron-Core's, of any of its versions. ``ours`` returns the values of config.json
    that mean the same, by the name under which they are told; none where it has no such setting.
    """

    names: tuple[str, ...]
    defaults: tuple[object, ...]
    ours: Callable[[Dims], Mapping[str, object]]


def check_settings(dims: Dims, family: Family) -> tuple[str, ...]:
    """Compare what the run tells of itself with config.json and the family; return what to tell.

    Raises :class:`BadInputError` that lists the contradictions.
    """
    wrong: list[tuple[str, str]] = []
    notices: list[str] = []
    for setting in (*_SETTINGS, *_traits(family)):
        name = next((n for n in setting.names if n in dims.megatron), None)
        ours = setting.ours(dims)
        if name is None or not ours:
            continue
        run = dims.megatron[name]
        if any(_same(run, value) for value in ours.values()):
            continue
        told = " or ".join(f"{key} {value}" for key, value in ours.items())
        default = any(_same(run, value) for value in setting.defaults)
        if default and not dims.megatron.get(OF_MODEL):
            notices.append(
                f"the checkpoint's arguments say {name} {run}, which is Megatron's default, and "
                f"{_owner(setting, family)} says {told}: the model is right only if that was trained"
            )
        else:
            wrong.append((told, f"{name} {run}"))
    if wrong:
        raise BadInputError(
            "config.json and the arguments of the run contradict each other",
            expected=", ".join(told for told, _ in wrong) + " by config.json",
            found=", ".join(run for _, run in wrong) + " in the checkpoint",
            hint="name the config of the model that was trained (--hf-config DIR); what is to differ "
            "can be changed in the config.json of the output",
        )
    return tuple(notices)


def _owner(setting: Setting, family: Family) -> str:
    return "config.json" if setting in _SETTINGS else f"the family {family.name}"


def _same(one: object, other: object) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _named(*names: str) -> Callable[[Dims], Mapping[str, object]]:
    """Return what finds the first of the settings ``names``."""

    def ours(dims: Dims) -> Mapping[str, object]:
        return next(({n: v} for n in names if (v := dims.get(n)) is not None), {})

    return ours


def _ropes(dims: Dims) -> Sequence[Mapping[str, Any]]:
    """Return the settings of the rotary embedding, of each kind of layer where they differ."""
    found = dims.get("rope_parameters", "rope_scaling")
    if not isinstance(found, dict):
        return []
    inner = [v for v in found.values() if isinstance(v, dict)]
    return inner or [found]


def _rope(*names: str, kind: str | None = None) -> Callable[[Dims], Mapping[str, object]]:
    """Return what finds settings of the rotary embedding, of the ``kind`` alone where it is given."""

    def values(dims: Dims) -> Iterable[tuple[str, object]]:
        for rope in _ropes(dims):
            if kind is None or _kind(rope) == kind:
                yield from ((n, rope[n]) for n in names if rope.get(n) is not None)
        if kind is None:
            yield from ((n, v) for n in names if (v := dims.get(n)) is not None)

    def ours(dims: Dims) -> Mapping[str, object]:
        found: dict[str, object] = {}
        for name, value in values(dims):
            if value not in found.values():
                found[name if name not in found else f"{name} ({len(found) + 1})"] = value
        return found

    return ours


def _kind(rope: Mapping[str, Any]) -> object:
    return rope.get("rope_type") or rope.get("type") or "default"


def _latent_only(
    ours: Callable[[Dims], Mapping[str, object]],
) -> Callable[[Dims], Mapping[str, object]]:
    """These arguments are the rotary embedding's of latent attention; others have them unused."""

    def limited(dims: Dims) -> Mapping[str, object]:
        latent, kind = dims.get("kv_lora_rank") is not None, dims.megatron.get("rope_type")
        return ours(dims) if latent and kind != "rope" else {}

    return limited


def _latent_kind(dims: Dims) -> Mapping[str, object]:
    """Megatron's yarn with a factor of 1 is no scaling."""
    if dims.get("kv_lora_rank") is None or dims.megatron.get("rotary_scaling_factor") == 1:
        return {}
    return {"rope_type": "yarn" if any(_kind(r) == "yarn" for r in _ropes(dims)) else "rope"}


def _llama3(dims: Dims) -> Mapping[str, object]:
    return {"rope scaling of Llama 3": any(_kind(r) == "llama3" for r in _ropes(dims))}


def _llama3_factor(dims: Dims) -> Mapping[str, object]:
    return _rope("factor", kind="llama3")(dims) if dims.megatron.get("use_rope_scaling") else {}


def _partial(dims: Dims) -> Mapping[str, object]:
    return {} if dims.get("kv_lora_rank") is not None else _rope("partial_rotary_factor")(dims)


_SETTINGS = (
    Setting(
        ("layernorm_epsilon", "norm_epsilon"),
        (1e-5,),
        _named("rms_norm_eps", "layer_norm_eps", "norm_eps"),
    ),
    Setting(("rotary_base",), (10000,), _rope("rope_theta", "rope_local_base_freq")),
    Setting(("rotary_percent",), (1,), _partial),
    Setting(("use_rope_scaling",), (False,), _llama3),
    Setting(("rope_scaling_factor",), (8,), _llama3_factor),
    Setting(("rope_type",), ("yarn",), _latent_kind),
    *(
        Setting((name,), defaults, _latent_only(_rope(ours, kind="yarn")))
        for name, ours, defaults in (
            ("rotary_scaling_factor", "factor", (40,)),
            ("mscale", "mscale", (0.707, 1)),
            ("mscale_all_dim", "mscale_all_dim", (0.707, 0)),
            ("beta_fast", "beta_fast", (32,)),
            ("beta_slow", "beta_slow", (1,)),
            (
                "original_max_position_embeddings",
                "original_max_position_embeddings",
                (4096,),
            ),
        )
    ),
    Setting(("moe_router_topk",), (2,), _named("num_experts_per_tok", "moe_k")),
    Setting(("moe_router_topk_scaling_factor",), (), _named("routed_scaling_factor")),
    Setting(("moe_router_score_function",), ("softmax",), _named("scoring_func")),
    Setting(("moe_router_num_groups",), (), _named("n_group")),
    Setting(("moe_router_group_topk",), (), _named("topk_group")),
    *(
        Setting((name,), (default,), _named(name))
        for name, default in (
            ("linear_num_key_heads", 16),
            ("linear_num_value_heads", 32),
            ("linear_key_head_dim", 128),
            ("linear_value_head_dim", 128),
        )
    ),
)


def _traits(family: Family) -> tuple[Setting, ...]:
    """Return what the weights of a family are made for, whatever its config.json says."""
    return (
        Setting(
            ("layernorm_zero_centered_gamma", "apply_layernorm_1p"),
            (False,),
            lambda _: {"zero-centred norms": family.zero_centred_norms},
        ),
    )
