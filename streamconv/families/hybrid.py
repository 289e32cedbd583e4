"""Numbers the layers of Megatron-Core's HybridModel as HuggingFace numbers those of a GPT.

From 0.19 on Megatron-Core builds any model as a HybridModel, where attention and MLP are layers of
their own: layer 2k of the pattern ``*-*-`` is the attention of HuggingFace's layer k, 2k + 1 its MLP.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from streamconv.errors import BadInputError

_FINAL = re.compile(r"((?:.*\.)?)decoder\.final_norm\.(weight|bias)")
_LAYER = re.compile(
    r"((?:.*\.)?decoder\.layers\.|mtp\.layers\.\d+\.transformer_layer\.layers\.)(\d+)\.(.+)"
)
_HALVES = ("attention", "MLP")


def _half(rest: str) -> int:
    return int(rest.startswith(("mlp.", "pre_mlp_layernorm.", "post_mlp_layernorm.")))


def as_gpt(names: Collection[str]) -> dict[str, str] | None:
    """Return what each tensor is called in a GPT, None where none is of a HybridModel.

    Raises :class:`BadInputError` where attention and MLP do not take turns.
    """
    blocks: dict[str, dict[int, set[int]]] = {}
    for name in names:
        if match := _LAYER.fullmatch(name):
            blocks.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(_half(match[3]))
    halves = [layer for layers in blocks.values() for layer in layers.values()]
    apart = all(len(h) == 1 for h in halves) and len(set(map(min, halves))) == 2
    if not apart and not any(map(_FINAL.fullmatch, names)):
        return None
    for prefix, layers in blocks.items():
        kinds = [sorted(layers[k]) for k in sorted(layers)]
        if kinds != [[k % 2] for k in range(len(kinds))] or len(kinds) % 2:
            raise BadInputError(
                "the layers of this HybridModel are not attention and MLP in turn",
                where=prefix,
                expected="attention, MLP, attention, MLP, … each in a layer of its own",
                found=", ".join(" and ".join(_HALVES[h] for h in kind) for kind in kinds[:8]),
                hint="either layers are missing, or transformers' model computes something else",
            )
    return {name: _renamed(name) for name in names}


def _renamed(name: str) -> str:
    if match := _FINAL.fullmatch(name):
        return f"{match[1]}decoder.final_layernorm.{match[2]}"
    if match := _LAYER.fullmatch(name):
        prefix, number, rest = match[1], int(match[2]), match[3]
        if "mtp." in prefix:  # one attention and one MLP make up its layer
            return f"{prefix.removesuffix('layers.')}{rest}"
        return f"{prefix}{number // 2}.{rest}"
    return name
