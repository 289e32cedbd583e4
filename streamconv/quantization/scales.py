"""Quantized weights among a model's tensors: which they are, their scales, and config.json about them.

A quantized weight means nothing without its scale, and neither is read right unless config.json has a
``quantization_config`` of their kind; where it has one, programs expect such weights. Which tensors are
quantized is decided by their types, names and shapes, and never by the config.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from streamconv.errors import BadInputError, listed
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import DType
from streamconv.ir.recipe import Recipe, SourceRef

Headers = Mapping[str, tuple[Shape, DType]]

_KEYS = ("quantization_config", "compression_config")
_LISTED = 6

# What follows the name of a weight in the names of the tensors that belong to it.
_SUFFIXES = (
    "_scale_inv",
    "_scale_2",
    "_global_scale",
    "_scale",
    "_scales",
    "_zero_point",
    "_shape",
    "_g_idx",
)
# The last part of a name, where another part of it stands for the weight.
_LEAVES = {
    "scale": "weight",
    "qscale_weight": "weight",
    "SCB": "weight",
    "scales": "qweight",
    "qzeros": "qweight",
    "g_idx": "qweight",
}
# Tensors that can be nothing but the scale of a quantized weight.
_PLAIN_SCALES = ("_scale_inv", ".weight_scale", ".qscale_weight", ".weight_scale_2")
# Of activations, beside a quantized weight.
OF_ACTIVATIONS = frozenset(
    {
        "input_scale",
        "input_scale_inv",
        "input_global_scale",
        "input_zero_point",
        "output_scale",
        "activation_scale",
        "qscale_act",
    }
)
# Of the cache of keys and values, which may be quantized where no weight is.
OF_CACHE = frozenset({"k_scale", "v_scale", "q_scale", "kv_scale", "prob_output_scale"})

# Kinds that keep several elements in a byte, and what to call them.
_PACKED = {
    "mxfp4": "mxfp4 (blocks and scales, as gpt-oss is released)",
    "packed": "packed by compressed-tensors",
    "gptq": "packed as GPTQ and AWQ do",
    "bitsandbytes": "packed by bitsandbytes, as QLoRA holds its base",
    "fp4": "packed, two elements or more in a byte",
}
# The kinds that each quant_method is for; one that is not here may be for any.
_METHODS: dict[str, frozenset[str]] = {
    "fp8": frozenset({"fp8", "fp4"}),
    "fbgemm_fp8": frozenset({"fp8"}),
    "compressed-tensors": frozenset({"fp8", "int8", "packed"}),
    "modelopt": frozenset({"fp8", "int8", "fp4", "packed"}),
    "mxfp4": frozenset({"mxfp4"}),
    "gptq": frozenset({"gptq"}),
    "awq": frozenset({"gptq"}),
    "bitsandbytes": frozenset({"bitsandbytes", "int8"}),
}


@dataclass(frozen=True, slots=True)
class Quantized:
    """The quantized weights of a model and what belongs to them.

    ``weights`` tells the kind of each, ``scales`` the weight of each tensor that says how to read one
    (nothing for the scale of a cache). ``grids`` are the shapes of fp8 weights and their block scales.
    """

    weights: Mapping[str, str]
    scales: Mapping[str, str]
    grids: Mapping[str, tuple[Shape, Shape]]

    def __contains__(self, name: object) -> bool:
        return name in self.weights or name in self.scales

    def __bool__(self) -> bool:
        return bool(self.weights or self.scales)


def with_names_of_weights(recipes: Sequence[Recipe], expected: Collection[str]) -> list[Recipe]:
    """Return the recipes with each scale named after its weight.

    A model knows the names that its weights had in other releases, but not those of their scales.
    ``expected`` are the tensors of the model, whose names are right.
    """
    names = {r.view.base.fqn: r.name for r in recipes if isinstance(r.view.base, SourceRef)}
    taken = {r.name for r in recipes}

    def named(r: Recipe) -> Recipe:
        if r.name in expected or not isinstance(r.view.base, SourceRef):
            return r
        source = r.view.base.fqn
        weight = next((w for w in _owners(source) if w in names), None)
        name = _beside(source, weight, names[weight]) if weight is not None else r.name
        return r if name in taken else replace(r, name=name)

    return [named(r) for r in recipes]


def find(outputs: Headers, expected: Mapping[str, Shape]) -> Quantized:
    """Return what is quantized among the tensors of a model.

    ``expected`` are the shapes of the model that config.json describes, empty where none is known.
    Raises :class:`BadInputError` for weights that are packed, so that they are none that the model
    has, for quantized weights without a scale, and for scales without such a weight.
    """
    kinds = {n: kind for n in outputs if (kind := _kind(n, outputs, expected.get(n)))}
    scales: dict[str, str] = {}
    for name in outputs:
        if name in expected or name in kinds:
            continue
        leaf = name.rpartition(".")[2]
        owner = next((w for w in _owners(name) if w in kinds), None)
        if owner is not None:
            scales[name] = owner
        elif leaf in OF_CACHE or (leaf in OF_ACTIVATIONS and kinds):
            scales[name] = ""
    if expected:
        _refuse_packed(kinds, outputs, expected)
    _refuse_without_scales(kinds, scales, outputs)
    if expected or kinds:
        _refuse_lone_scales(outputs, expected, scales)
    grids = {
        weight: (outputs[weight][0], outputs[name][0])
        for name, weight in scales.items()
        if kinds.get(weight) == "fp8" and name.endswith(("_scale_inv", ".scale"))
    }
    return Quantized(kinds, scales, grids)


def _kind(name: str, outputs: Headers, expected: Shape | None) -> str | None:
    """Return how a tensor is quantized, None for one that is not, or is a scale."""
    shape, dtype = outputs[name]
    leaf = name.rpartition(".")[2]
    if leaf == "weight_packed":
        return "packed"
    if leaf == "qweight":
        return "gptq"
    if expected is None and name.endswith("_blocks") and dtype.name == "U8":
        return "mxfp4"
    if dtype.name.startswith("F8"):
        scaled = any(name + suffix in outputs for suffix in _SUFFIXES)
        a_weight = leaf == "weight" or expected is not None or scaled
        return "fp8" if a_weight and dtype.name != "F8_E8M0" else None
    if leaf != "weight" or len(shape) < 2 or not (dtype.castable or dtype.name in ("I8", "U8")):
        return None
    half = expected is not None and math.prod(shape) * dtype.itemsize * 2 == math.prod(expected)
    if shape[1] == 1 and shape != expected and (half or dtype.name in ("I8", "U8")):
        return "bitsandbytes"  # which stores floats of four bits as elements of any type
    if dtype.castable:
        return None
    return "int8" if dtype.name == "I8" and shape == (expected or shape) else "fp4"


def _owners(name: str) -> Iterator[str]:
    """Yield the names of the weights that a tensor called ``name`` may be the scale of."""
    module, _, leaf = name.rpartition(".")
    if leaf in _LEAVES:
        yield f"{module}.{_LEAVES[leaf]}"
    if ".weight." in name:
        yield name[: name.rindex(".weight.")] + ".weight"  # bitsandbytes
    for suffix in _SUFFIXES:
        if name.endswith(suffix):
            stem = name.removesuffix(suffix)
            yield from (stem, f"{stem}_packed", f"{stem}_blocks")


def _beside(scale: str, weight: str, renamed: str) -> str:
    """Return what the scale of ``weight`` is called where that is called ``renamed``."""
    if scale.startswith(weight):
        return renamed + scale[len(weight) :]
    return f"{renamed.rpartition('.')[0]}.{scale.rpartition('.')[2]}"


def _refuse_packed(
    kinds: Mapping[str, str], outputs: Headers, expected: Mapping[str, Shape]
) -> None:
    packed = [n for n, k in kinds.items() if k in _PACKED and expected.get(n) != outputs[n][0]]
    if packed:
        shape, dtype = outputs[packed[0]]
        raise BadInputError(
            f"{len(packed)} weights are {_PACKED[kinds[packed[0]]]}, which is not supported",
            where=listed(packed, _LISTED),
            expected="weights of the shapes that the model has",
            found=f"{packed[0]}: {dtype} {list(shape)}",
            hint="--dequantize makes floats of fp4, mxfp4 and nvfp4; save others as bfloat16 "
            "first. An adapter can be taken by itself "
            "(--lora adapter) or merged into a bfloat16 model (--base DIR)",
        )


def _refuse_without_scales(
    kinds: Mapping[str, str], scales: Mapping[str, str], outputs: Headers
) -> None:
    scaled = set(scales.values())
    lost = [n for n, k in kinds.items() if n not in scaled and k != "bitsandbytes"]
    if lost:
        some = f" of {len(kinds)}" if len(lost) < len(kinds) else ""
        raise BadInputError(
            f"{len(lost)}{some} quantized weights have no scale, without which they mean nothing",
            where=listed(lost, _LISTED),
            expected=f"{lost[0]}_scale_inv, {lost[0]}_scale or the like",
            found=f"{outputs[lost[0]][1]}, and none",
            hint="the scales were not saved with the weights: save them as well, or save the "
            "weights as bfloat16",
        )


def _refuse_lone_scales(
    outputs: Headers, expected: Mapping[str, Shape], scales: Mapping[str, str]
) -> None:
    lone = [
        n
        for n, (_, dtype) in outputs.items()
        if n not in scales
        and n not in expected
        and (n.endswith(_PLAIN_SCALES) or (dtype.name == "F8_E8M0" and n.endswith("scale")))
    ]
    if lone:
        weight = next((w for w in _owners(lone[0]) if w in outputs), None)
        raise BadInputError(
            f"{len(lone)} scales have no quantized weight that they belong to",
            where=listed(lone, _LISTED),
            found=f"{weight}: {outputs[weight][1]}" if weight else "no such weight",
            hint="weights that were made bfloat16 must not keep their scales: remove them from the "
            "checkpoint"
            if weight
            else "the checkpoint is incomplete, or these are of another model",
        )


# --- what config.json has to say ------------------------------------------------------------------


def declared(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return what a config says of quantization, at the top or in the configs of its parts."""
    return tuple(
        part[key] if isinstance(part[key], Mapping) else {}
        for part in _parts(config)
        for key in _KEYS
        if part.get(key)
    )


def without(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a config that says nothing of quantization, and what was removed."""
    removed: list[str] = []

    def cleaned(part: Mapping[str, Any], where: str) -> dict[str, Any]:
        kept = {}
        for key, value in part.items():
            if key in _KEYS or (key == "expert_dtype" and value in ("fp4", "fp8")):
                removed.append(where + key)
            else:
                kept[key] = cleaned(value, f"{where}{key}.") if isinstance(value, dict) else value
        return kept

    return cleaned(config, ""), removed


def following(
    config: Mapping[str, Any],
    quantized: Quantized,
    *,
    base: Mapping[str, Any] | None = None,
    elsewhere: bool = False,
) -> tuple[Mapping[str, Any], list[str]]:
    """Return ``config`` with what these weights need, and what was changed.

    ``base`` is the config of the model that quantized weights are taken from; ``elsewhere`` says that
    a file of its own declares them. Raises :class:`BadInputError` where the config says nothing of
    quantized weights, or something that is not true of them.
    """
    if not quantized:
        changed, removed = without(config)
        what = f"{', '.join(removed)} removed, the weights are not quantized"
        return (changed, [f"config.json: {what}"]) if removed else (config, [])
    told = []
    if (
        base is not None
        and quantized.weights
        and declared(base)
        and declared(base) != declared(config)
    ):
        config = _with_that_of(config, base)
        told.append(
            "config.json: quantization_config is that of the base model, as its weights are"
        )
    check(config, quantized, elsewhere=elsewhere)
    return config, told


def check(config: Mapping[str, Any], quantized: Quantized, *, elsewhere: bool = False) -> None:
    """Raise :class:`BadInputError` where a config does not fit the weights, quantized or not."""
    found = declared(config)
    if not quantized:
        if found:
            raise BadInputError("config.json has a quantization_config, but no weight is quantized")
        return
    if not quantized.weights:
        return
    kinds = Counter(quantized.weights.values())
    example = next(iter(quantized.weights))
    if not found:
        if elsewhere:
            return
        raise BadInputError(
            f"{len(quantized.weights)} weights are quantized, and config.json does not say so",
            where=listed(quantized.weights, _LISTED),
            expected="quantization_config in config.json",
            found="none: the model would be read as if it were not quantized",
            hint="--hf-config DIR names the folder of the quantized model that was trained",
        )
    methods = [str(f.get("quant_method", "")) for f in found]
    fits = [m for m in methods if kinds.keys() <= _METHODS.get(m, kinds.keys())]
    inverse = any(n.endswith("_scale_inv") for n in quantized.scales)
    if not fits or (inverse and fits == ["compressed-tensors"]):
        raise BadInputError(
            "config.json has a quantization_config of another kind than the weights",
            where=example,
            expected=f"one for {', '.join(kinds)} weights"
            + (" with weight_scale_inv" if inverse else ""),
            found=f"quant_method {methods[0]!r}",
            hint="--hf-config DIR names the folder of the quantized model that was trained",
        )
    block = next((f["weight_block_size"] for f in found if f.get("weight_block_size")), None)
    if block is not None and "fp8" in fits:
        _check_grids(block, quantized)


def _check_grids(block: Any, quantized: Quantized) -> None:
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise BadInputError(
            "config.json: weight_block_size is not two positive numbers", found=repr(block)[:80]
        )
    for weight, (shape, grid) in quantized.grids.items():
        wanted = (*shape[:-2], *(-(-n // b) for n, b in zip(shape[-2:], sizes, strict=True)))
        if grid != wanted:
            raise BadInputError(
                "the scales of a weight do not fit the weight_block_size of config.json",
                where=weight,
                expected=f"{list(wanted)} scales for {list(shape)} in blocks of {block}",
                found=f"{list(grid)}",
                hint="--hf-config DIR names the folder of the quantized model that was trained",
            )


def _with_that_of(config: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the keys of ``base``, each where the base has it."""
    changed, _ = without(config)
    for key in (*_KEYS, "expert_dtype"):
        if key in base:
            changed[key] = base[key]
    for name, part in base.items():
        if isinstance(part, Mapping) and name not in _KEYS and declared(part):
            own = changed.get(name)
            if isinstance(own, Mapping):
                changed[name] = _with_that_of(own, part)
            else:
                changed |= {key: part[key] for key in _KEYS if key in part}
    return changed


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in _KEYS:
            yield from _parts(value)
