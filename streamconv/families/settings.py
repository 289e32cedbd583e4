"""Compares settings that no tensor shows: the run's own arguments against config.json.

A base of the rotary embedding, an epsilon or a number of chosen experts changes no shape, but what the
model computes. Where the run tells another value than config.json, the model that is written would not
be the trained one. An argument may be nobody's word, though: trainers that build their models from
HuggingFace's config leave Megatron-LM's arguments at their defaults. So a default that differs is told,
and any other value is an error. A copy of the model's own config (verl's, Megatron-Bridge's,
NeMo's) is taken at its word: a default in it is an error, too, unless trainers are known to leave the
setting as it is and have modules of their own do what config.json says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.errors import BadInputError
from streamconv.families import layer_settings as of_layers
from streamconv.families.layer_settings import model_type
from streamconv.families.rules import Dims, Family
from streamconv.formats.megatron.facts import OF_MODEL


def _same(one: object, other: object) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


_LISTED = 16


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting under its names in Megatron, and how HuggingFace's values are found.

    ``defaults`` are Megatron-Core's, of any of its versions. ``ours`` returns the values of config.json
    that mean the same, by the name under which they are told; none where it has no such setting.
    ``same`` compares the run's value with one of them. ``often_unset`` says that the default never
    contradicts: trainers' own modules may do it whatever the setting says. ``fixed`` is what no
    config.json can say otherwise, so that no other one would help: it is told.
    """

    names: tuple[str, ...]
    defaults: tuple[object, ...]
    ours: Callable[[Dims], Mapping[str, object]]
    same: Callable[[Any, Any], bool] = _same
    often_unset: bool = False
    fixed: bool = False

    def agrees(self, run: object, ours: Sequence[object]) -> bool:
        """Whether the run's value is one of ``ours``; of a list for kinds of layers, each number."""
        each = isinstance(run, list) and self.same is _same and type(ours[0]) is not list
        values = run if isinstance(run, list) and each else [run]
        return all(any(self.same(value, own) for own in ours) for value in values)


def check_settings(dims: Dims, family: Family, whose: str = "Megatron") -> tuple[str, ...]:
    """Compare what the run tells of itself with config.json and the family; return what to tell.

    ``whose`` the defaults are. Raises :class:`BadInputError` that lists the contradictions.
    """
    wrong: list[tuple[str, str]] = []
    notices: list[str] = []
    for setting in (*_SETTINGS, *_traits(family)):
        name = next((n for n in setting.names if n in dims.megatron), None)
        ours = setting.ours(dims)
        if name is None or not ours:
            continue
        run = dims.megatron[name]
        if setting.agrees(run, [*ours.values()]):
            continue
        told = " or ".join(f"{key} {_shown(value)}" for key, value in ours.items())
        default = any(_same(run, value) for value in setting.defaults)
        if default and (setting.often_unset or not dims.megatron.get(OF_MODEL)):
            notices.append(
                f"the checkpoint's arguments say {name} {_shown(run)}, which is {whose}'s default, and "
                f"{_owner(setting, family)} says {told}: the model is right only if that was trained"
            )
        elif setting.fixed:
            notices.append(
                f"the checkpoint's arguments say {name} {_shown(run)}, and transformers' class always "
                f"has {told}: it computes something else than was trained"
            )
        else:
            wrong.append((told, f"{name} {_shown(run)}"))
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


def _shown(value: object) -> str:
    """Return ``value`` as it is told; of a list with one number a layer, the beginning."""
    if isinstance(value, list) and len(value) > _LISTED:
        return f"[{', '.join(map(str, value[:_LISTED]))}, … {len(value)} in all]"
    return "null" if value is None else str(value)


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
    """Megatron's yarn with a factor of 1 does not scale."""
    if dims.get("kv_lora_rank") is None or dims.megatron.get("rotary_scaling_factor") == 1:
        return {}
    return {"rope_type": "yarn" if any(_kind(r) == "yarn" for r in _ropes(dims)) else "rope"}


def _llama3(dims: Dims) -> Mapping[str, object]:
    return {"rope scaling of Llama 3": any(_kind(r) == "llama3" for r in _ropes(dims))}


def _llama3_factor(dims: Dims) -> Mapping[str, object]:
    scaled = dims.megatron.get("use_rope_scaling") or dims.megatron.get("rope_scaling")
    return _rope("factor", kind="llama3")(dims) if scaled else {}


_MAY_INTERLEAVE = frozenset(
    {"cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe", "glm", "glm4", "glm4v"}
    | {"glm_ocr", "helium", "llama4"}
)


def _interleaved(dims: Dims) -> Mapping[str, object]:
    """Latent attention has its own order, which Megatron's code knows without being told."""
    if dims.get("kv_lora_rank") is not None:
        return {}
    return {"interleaved rotary positions": model_type(dims) in _MAY_INTERLEAVE}


def _linear_factor(dims: Dims) -> Mapping[str, object]:
    factors = [r.get("factor", 1) if _kind(r) == "linear" else 1 for r in _ropes(dims)] or [1]
    ways = dict.fromkeys(factors)
    return {f"linear rope factor{f' ({n})' if n else ''}": f for n, f in enumerate(ways)}


def _same_factor(run: Any, ours: Any) -> bool:
    return _same(1 if run is None else run, ours)


def _positions(dims: Dims) -> Mapping[str, object]:
    """A model whose config speaks of no rotary embedding, or of layers without one, is not compared."""
    hybrid = dims.get("hybrid_override_pattern", "layers_block_type") is not None
    if hybrid or (not _ropes(dims) and dims.get("rope_theta") is None):
        return {}
    latent, run = dims.get("kv_lora_rank") is not None, dims.megatron.get("position_embedding_type")
    yarn = any(_kind(r) == "yarn" for r in _ropes(dims))
    if latent:  # its kind is rope_type's
        return {"positions by": run if run in ("rope", "yarn") else "rope"}
    return {"positions by": "yarn" if yarn else "rope"}


def _same_positions(run: Any, ours: Any) -> bool:
    """The rotary embedding of several axes is the plain one for texts."""
    return bool(run == ours or (run == "mrope" and ours == "rope"))


def _yarn(name: str) -> Callable[[Dims], Mapping[str, object]]:
    """Return what finds a setting of yarn outside of latent attention."""
    found = _rope(name, kind="yarn")
    return lambda d: found(d) if d.megatron.get("position_embedding_type") == "yarn" else {}


def _sinks(dims: Dims) -> Mapping[str, object]:
    learnable = (model_type(dims) or "").startswith(("gpt_oss", "mimo_v2"))
    return {"softmax of the kind": "learnable" if learnable else "vanilla"}


def _l2_norm(dims: Dims) -> Mapping[str, object]:
    llama4 = model_type(dims) == "llama4"
    return {"L2 norms of queries and keys": bool(llama4 and dims.get("use_qk_norm"))}


def _chosen_only(dims: Dims) -> Mapping[str, object]:
    """A softmax over the chosen experts alone is one over all of them, normalised over the chosen."""
    sigmoid = "sigmoid" in (
        dims.get("scoring_func"),
        dims.megatron.get("moe_router_score_function"),
    )
    normalised = dims.get("norm_topk_prob")
    by_groups = dims.get("topk_method") == "noaux_tc"
    if sigmoid or by_groups or type(normalised) is not bool or not dims.experts:
        return {}
    return {"norm_topk_prob": normalised}


def _always_chosen_only(dims: Dims) -> Mapping[str, object]:
    always = model_type(dims) in ("mixtral", "gpt_oss")
    return {"the chosen experts' weights normalised:": True} if always else {}


def _opposite(run: Any, ours: Any) -> bool:
    return run is (not ours)


def _partial(dims: Dims) -> Mapping[str, object]:
    return {} if dims.get("kv_lora_rank") is not None else _rope("partial_rotary_factor")(dims)


_SETTINGS = (
    Setting(
        ("layernorm_epsilon", "norm_epsilon"),
        (1e-5,),
        _named("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon"),
    ),
    Setting(("rotary_base",), (10000,), _rope("rope_theta", "rope_local_base_freq")),
    Setting(("rotary_percent",), (1,), _partial),
    Setting(("use_rope_scaling",), (False,), _llama3),
    # Bridge's name. Its older providers for Llama 3.1 scale by settings of their own.
    Setting(("rope_scaling",), (False,), _llama3, often_unset=True),
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
    Setting(
        ("moe_router_topk_scaling_factor",),
        (),
        _named("routed_scaling_factor", "moe_router_scaling_factor"),
    ),
    Setting(("moe_router_score_function",), ("softmax",), _named("scoring_func")),
    Setting(("moe_router_num_groups",), (), _named("n_group")),
    Setting(("moe_router_group_topk",), (), _named("topk_group")),
    Setting(("moe_router_pre_softmax",), (False,), _chosen_only, _opposite),
    Setting(("moe_router_pre_softmax",), (), _always_chosen_only, _opposite, fixed=True),
    Setting(
        ("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor"),
        (None, 1),
        _linear_factor,
        _same_factor,
        often_unset=True,
    ),
    Setting(("rotary_interleaved",), (False,), _interleaved, often_unset=True),
    # Learned positions that were trained are a tensor, which no rule knows.
    Setting(
        ("position_embedding_type",),
        ("learned_absolute",),
        _positions,
        _same_positions,
        often_unset=True,
    ),
    *(
        Setting((f"yarn_{name}",), (), _yarn(ours))
        for name, ours in (
            ("rotary_scaling_factor", "factor"),
            ("beta_fast", "beta_fast"),
            ("beta_slow", "beta_slow"),
            ("original_max_position_embeddings", "original_max_position_embeddings"),
        )
    ),
    # Bridge's defaults for Qwen2.5-VL and Qwen3-VL.
    Setting(
        ("mrope_section",),
        ([16, 24, 24], [24, 20, 20]),
        _rope("mrope_section"),
        often_unset=True,
    ),
    Setting(("window_size",), (None,), of_layers.window, of_layers.same_window, often_unset=True),
    Setting(
        ("window_attn_skip_freq",),
        (None,),
        of_layers.windowed,
        of_layers.same_windowed,
        often_unset=True,
    ),
    Setting(
        ("no_rope_freq",),
        (None,),
        of_layers.without_positions,
        of_layers.same_without_positions,
        often_unset=True,
    ),
    Setting(("softmax_type",), ("vanilla",), _sinks, often_unset=True),
    Setting(("qk_l2_norm",), (False,), _l2_norm, often_unset=True),
    Setting(("activation_func_clamp_value",), (), _named("swiglu_limit")),
    *(
        Setting((name,), (), _named(name))
        for name in (
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "query_pre_attn_scalar",
        )
    ),
    *(
        Setting((name,), (default,), _named(*ours))
        for name, default, ours in (
            ("mamba_num_heads", None, ("mamba_num_heads", "mamba_n_heads")),
            ("mamba_head_dim", 64, ("mamba_head_dim", "mamba_d_head")),
            ("mamba_num_groups", 8, ("n_groups", "mamba_n_groups")),
            ("mamba_state_dim", 128, ("ssm_state_size", "mamba_d_state")),
        )
    ),
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
