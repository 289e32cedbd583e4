"""Checks a model that transformers has no class for: layers of a kind hold the same tensors.

What the rules make of them has no shapes to be compared with, so that what one layer lacks, or has of
another size, only the others tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from streamconv.errors import BadInputError
from streamconv.families.rules import Dims
from streamconv.ir.boxes import Shape

_LAYER = re.compile(r"((?:.+?\.)?(?:layers?|blocks|lightning_indexers)\.)([0-9]+)\.(.+)", re.ASCII)
_AROUND = re.compile(
    r"(?:language_model\.)?(embedding\.word_embeddings|output_layer|decoder\.final_(?:layer)?norm)\.weight"
)
_LATENT = tuple(f"self_attention.linear_kv_{x}_proj." for x in ("down", "up"))

Tensors = dict[str, Shape]


def check_alike(shapes: Mapping[str, Shape], dims: Dims, own: tuple[str, ...] = ()) -> None:
    """Raise :class:`BadInputError` that names what a layer lacks, or has of another shape.

    All layers have the same attention, or one of two kinds of it where one is latent, and those with
    experts the same experts; what begins with one of
    ``own`` all have or lack together. Sizes may differ where config.json calls layers by other kinds.
    """
    for name, shape in shapes.items():
        if _AROUND.fullmatch(name) and shape[-1:] != (dims.hidden,):
            raise _another_shape(name, f"[…, {dims.hidden}], as config.json says", shape)
    seen = {found[1] for name in shapes if (found := _AROUND.fullmatch(name))}
    _check_around(seen, dims)
    layers: dict[tuple[str, int], Tensors] = {}
    for name, shape in shapes.items():
        if match := _LAYER.fullmatch(name):
            layers.setdefault((match[1], int(match[2])), {})[match[3]] = shape
    first: dict[object, tuple[str, Tensors]] = {}
    sizes: dict[object, tuple[str, Tensors]] = {}
    kinds = dims.get("layer_types", "compress_ratios")
    for (block, number), layer in layers.items():
        kind = kinds[number] if isinstance(kinds, list) and number < len(kinds) else None
        prefix = f"{block}{number}"
        for name, tensors in _parts(block, layer, own):
            part = (block, name)
            _compare_names(prefix, tensors, *first.setdefault(part, (prefix, tensors)))
            _compare_shapes(prefix, tensors, *sizes.setdefault((kind, part), (prefix, tensors)))


def _check_around(seen: set[str], dims: Dims) -> None:
    missing = [
        part
        for part in ("embedding.word_embeddings", "output_layer")
        if part not in seen and not (part == "output_layer" and dims.get("tie_word_embeddings"))
    ]
    if not any("final_" in part for part in seen):
        missing.append("decoder.final_layernorm")
    if missing:
        raise _missing([f"{part}.weight" for part in missing], "what every model has")


def _parts(block: str, layer: Tensors, own: tuple[str, ...]) -> Iterator[tuple[str, Tensors]]:
    for prefix in own:
        part = {n: s for n, s in layer.items() if n.startswith(prefix)}
        layer = {n: s for n, s in layer.items() if n not in part}
        if part:
            yield prefix, part
    if not block.endswith("decoder.layers."):
        yield "all", layer
        return
    experts = any(n.startswith(("mlp.experts.", "mlp.router.")) for n in layer)
    mlp = {n: s for n, s in layer.items() if n.startswith(("mlp.", "pre_mlp_layernorm."))}
    attention = {n: s for n, s in layer.items() if n not in mlp}
    latent = any(n.startswith(_LATENT) for n in attention)
    yield "latent attention" if latent else "attention", attention
    yield "experts" if experts else "mlp", mlp


def _compare_names(prefix: str, tensors: Tensors, other: str, others: Tensors) -> None:
    for one, ones, than, thans in (
        (prefix, tensors, other, others),
        (other, others, prefix, tensors),
    ):
        missing = [f"{one}.{n}" for n in thans if n not in ones]
        if missing:
            raise _missing(missing, f"all that {than} has")


def _compare_shapes(prefix: str, tensors: Tensors, other: str, others: Tensors) -> None:
    for name, shape in tensors.items():
        if others[name] != shape:
            raise _another_shape(f"{prefix}.{name}", f"{list(others[name])}, as {other} has", shape)


def _missing(names: list[str], expected: str) -> BadInputError:
    return BadInputError(
        f"{len(names)} tensors of a layer like the others are not in the checkpoint",
        where=", ".join(names[:12]),
        expected=expected,
        hint="the checkpoint is incomplete",
    )


def _another_shape(name: str, expected: str, found: Shape) -> BadInputError:
    return BadInputError(
        "a tensor of a layer has another shape than those of layers like it",
        where=name,
        expected=expected,
        found=str(list(found)),
    )
