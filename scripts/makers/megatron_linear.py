"""Linear attention as slime and ms-swift write it, made of what Megatron-Core writes.

The forms of real files (``megatron_cases/qwen35_trainers``), and of mcore-bridge's and slime's code for
those that no file shows.
"""

from __future__ import annotations

import re

import torch

from scripts.makers.megatron_walk import Walk

_PARTS = ("query", "key", "value", "z", "beta", "alpha")


def _layers(w: Walk, what: str) -> list[str]:
    """Return the prefixes of the language model's attention that have the parameter ``what``."""
    end = "self_attention." + what
    return [k.removesuffix(what) for k in w.made if k.endswith(end) and "vision" not in k]


def _parts(w: Walk, prefix: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Take the projections' parts and the convolution's, ``[key heads, rows, …]`` each."""
    heads = w.config["linear_num_key_heads"]
    taken = [
        [w.made.pop(f"{prefix}{module}.weight.{x}").unflatten(0, (heads, -1)) for x in names]
        for module, names in (("in_proj", _PARTS), ("conv1d", _PARTS[:3]))
    ]
    return taken[0], taken[1]


def _flat(parts: list[torch.Tensor]) -> torch.Tensor:
    """Everything of the first key head, then of the second."""
    return torch.cat(parts, 1).flatten(0, 1)


def _one_after_the_other(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([p.flatten(0, 1) for p in parts])


def hf_module(w: Walk, inside: str, norm: str) -> None:
    """HuggingFace's module, under ``inside``; ``norm`` is what the norm before it is called."""
    split = "Qwen3_5" in w.config["architectures"][0]
    for prefix in _layers(w, "A_log"):
        projection, convolution = _parts(w, prefix)
        made = {"conv1d.weight": _one_after_the_other(convolution)}
        if split:
            made["in_proj_qkv.weight"] = _one_after_the_other(projection[:3])
            for x, part in zip("zba", projection[3:], strict=True):
                made[f"in_proj_{x}.weight"] = part.flatten(0, 1)
        else:
            made["in_proj_qkvz.weight"] = _flat(projection[:4])
            made["in_proj_ba.weight"] = _flat(projection[4:])
        made["norm.weight"] = w.made.pop(prefix + "out_norm.weight") + 1
        for name in ("A_log", "dt_bias", "out_proj.weight"):
            made[name] = w.made.pop(prefix + name)
        for name, tensor in made.items():
            w.put(prefix + inside + name, tensor)
        before = w.made.pop(prefix + "in_proj.layer_norm_weight")
        w.put(prefix.removesuffix("self_attention.") + norm, before)


def slime(w: Walk) -> None:
    hf_module(w, "linear_attn.", "self_attention.input_layernorm.weight")
    if any("in_proj_qkvz" in k for k in w.made):  # of Qwen3-Next alone
        for key in [k for k in w.made if k.endswith("eh_proj.weight")]:
            w.made[key] = torch.cat([*reversed(w.made[key].chunk(2, 1))], 1)


def slime_throughout(w: Walk) -> None:
    """Its other attention is HuggingFace's, too."""
    slime(w)
    heads, groups = w.config["num_attention_heads"], w.config["num_key_value_heads"]
    for prefix in _layers(w, "linear_qkv.weight"):
        rows = w.made.pop(prefix + "linear_qkv.weight").unflatten(
            0, (groups, 2 * heads // groups + 2, -1)
        )
        per = heads // groups
        query, gate = rows[:, :per].flatten(0, 1), rows[:, per : 2 * per].flatten(0, 1)
        inside = prefix + "self_attn."
        w.put(inside + "q_proj.weight", torch.cat([query, gate], 1).flatten(0, 1))
        w.put(inside + "k_proj.weight", rows[:, -2].flatten(0, 1))
        w.put(inside + "v_proj.weight", rows[:, -1].flatten(0, 1))
        for old, new in (
            ("linear_proj.weight", "self_attn.o_proj.weight"),
            ("q_layernorm.weight", "self_attn.q_norm.weight"),
            ("k_layernorm.weight", "self_attn.k_norm.weight"),
            ("linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ):
            w.put(prefix + new, w.made.pop(prefix + old))


def _pairs(w: Walk) -> None:
    """ms-swift's other attention: the gate of a query head right behind it."""
    heads, groups = w.config["num_attention_heads"], w.config["num_key_value_heads"]
    per = heads // groups
    for prefix in _layers(w, "linear_qkv.weight"):
        rows = w.made[prefix + "linear_qkv.weight"].unflatten(0, (groups, 2 * per + 2, -1))
        order = [x for h in range(per) for x in (h, per + h)]
        w.made[prefix + "linear_qkv.weight"] = rows[:, [*order, -2, -1]].flatten(0, 2)


def swift(w: Walk) -> None:
    _pairs(w)
    for prefix in _layers(w, "A_log"):
        projection, convolution = _parts(w, prefix)
        w.put(prefix + "in_proj.weight", _flat(projection))
        w.put(prefix + "conv1d.weight", _flat(convolution))
        w.made[prefix + "out_norm.weight"] += 1


def swift_decoupled(w: Walk) -> None:
    _pairs(w)
    for prefix in _layers(w, "A_log"):
        projection, convolution = _parts(w, prefix)
        w.put(prefix + "in_proj_qkvz.weight", _flat(projection[:4]))
        w.put(prefix + "in_proj_ba.weight", _flat(projection[4:]))
        w.put(prefix + "conv1d.weight", _flat(convolution))
        w.made[prefix + "out_norm.weight"] += 1
        norm = w.made.pop(prefix + "in_proj.layer_norm_weight")
        w.put(re.sub(r"self_attention\.$", "input_layernorm.weight", prefix), norm)


def swift_module(w: Walk) -> None:
    """USE_MCORE_GDN=0: no norm is fused in these layers."""
    _pairs(w)
    hf_module(w, "", "input_layernorm.weight")
