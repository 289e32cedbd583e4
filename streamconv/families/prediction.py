"""Checks the layers for multi-token prediction, of which transformers' classes know nothing.

Megatron builds such a layer as it built the last ordinary one (``get_gpt_mtp_block_spec``), with two
norms and a projection before it and a norm behind it. A checkpoint has all of it or none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamconv.errors import BadInputError
from streamconv.families.rules import Dims
from streamconv.ir.boxes import Shape


@dataclass(frozen=True, slots=True)
class PredictionNames:
    """Where a trainer keeps such layers: prefixes of names that a number follows, but ``inner``.

    ``inner`` is the prefix, within such a layer, of what an ordinary one has, or of several layers like
    any ordinary ones where it ends in ``layers.``. ``final`` is the norm
    behind the last ordinary layer, ``behind`` the one of such a layer.
    """

    layers: str
    predicting: str
    inner: str
    final: str
    behind: str

    def number(self, name: str) -> tuple[str, int] | None:
        """Return what a name begins with and the number of the layer, None for another's."""
        found = re.fullmatch(rf"(.*?){re.escape(self.predicting)}([0-9]+)\..+", name)
        return (found[1], int(found[2])) if found else None


MEGATRON = PredictionNames(
    layers="decoder.layers.",
    predicting="mtp.layers.",
    inner="transformer_layer.",
    final="decoder.final_layernorm.weight",
    behind="final_layernorm.weight",
)

HYBRID = PredictionNames(
    layers="decoder.layers.",
    predicting="mtp.layers.",
    inner="transformer_layer.layers.",
    final="decoder.final_norm.weight",
    behind="final_layernorm.weight",
)


def check_prediction(
    shapes: Mapping[str, Shape],
    dims: Dims,
    names: PredictionNames = MEGATRON,
    parts: Sequence[str] = (),
) -> tuple[str, ...]:
    """Compare every layer for multi-token prediction with the last of the ordinary ones.

    ``parts`` are prefixes within a layer of what not every one has (:class:`Family`). Returns what the
    user should know. Raises :class:`BadInputError` that lists what is missing or of
    another shape.
    """
    shapes = {n: s for n, s in shapes.items() if not any(f".{part}" in n for part in parts)}
    found = {at for name in shapes if (at := names.number(name))}
    for prefix, number in sorted(found):
        expected = _expected(shapes, names, prefix, number, dims.layers)
        missing = [name for name in expected if name not in shapes]
        if missing:
            raise BadInputError(
                f"{len(missing)} tensors of a layer for multi-token prediction are not in the "
                "checkpoint",
                where=", ".join(missing[:12]),
                expected="all that an ordinary layer has, or no such layer",
                hint="the checkpoint is incomplete",
            )
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise BadInputError(
                    "a tensor of a layer for multi-token prediction has another shape",
                    where=name,
                    expected=str(list(shape)),
                    found=str(list(shapes[name])),
                )
    return _told(len(found), dims)


def _told(found: int, dims: Dims) -> tuple[str, ...]:
    trained, configured = dims.megatron.get("mtp_num_layers"), dims.get("num_nextn_predict_layers")
    if type(trained) is int and trained and not found:
        raise BadInputError(
            "the layers for multi-token prediction are not in the checkpoint",
            expected=f"{trained}, as the arguments of the run say",
            found="none",
            hint="the checkpoint is incomplete",
        )
    if type(configured) is not int or configured == found:
        return ()
    notice = (
        f"config.json counts {configured} layers for multi-token prediction, the checkpoint has "
        f"{found or 'none'}: to use them, num_nextn_predict_layers has to be right"
    )
    return (notice,)


def _expected(
    shapes: Mapping[str, Shape], names: PredictionNames, prefix: str, number: int, layers: int
) -> dict[str, Shape]:
    mtp = f"{prefix}{names.predicting}{number}."
    ordinary = [_below(shapes, f"{prefix}{names.layers}{n}.") for n in range(layers)]
    if names.inner.endswith("layers."):
        inner = _like_any(shapes, f"{mtp}{names.inner}", ordinary)
    else:
        inner = _like(shapes, mtp + names.inner, ordinary)
    norm = shapes.get(prefix + names.final)
    if norm is None:  # whose absence is another check's to tell
        return inner
    projections = {f"{mtp}eh_proj.weight": (norm[0], 2 * norm[0])}
    if f"{mtp}e_proj.weight" in shapes:  # DeepSeek-V4 projects embedding and hidden state apart
        projections = {f"{mtp}{x}_proj.weight": (norm[0], norm[0]) for x in "eh"}
    return {
        f"{mtp}enorm.weight": norm,
        f"{mtp}hnorm.weight": norm,
        f"{mtp}{names.behind}": norm,
        **projections,
        **inner,
    }


def _below(shapes: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    return {n.removeprefix(prefix): shape for n, shape in shapes.items() if n.startswith(prefix)}


def _like_any(
    shapes: Mapping[str, Shape], prefix: str, ordinary: list[dict[str, Shape]]
) -> dict[str, Shape]:
    """Return what the layers below ``prefix`` should have: all of the most similar ordinary one."""
    numbers = {int(rest.partition(".")[0]) for rest in _below(shapes, prefix)}
    expected: dict[str, Shape] = {}
    for number in range(max(numbers, default=0) + 1):
        expected |= _like(shapes, f"{prefix}{number}.", ordinary)
    return expected


def _like(
    shapes: Mapping[str, Shape], prefix: str, ordinary: list[dict[str, Shape]]
) -> dict[str, Shape]:
    """Return what a layer should have: the attention and the MLP of the most similar ordinary ones.

    Where several are, the last.
    """
    found = _below(shapes, prefix)
    expected: dict[str, Shape] = {}
    for mlp in (False, True):
        parts = [
            {n: s for n, s in layer.items() if n.startswith(("mlp.", "pre_mlp_")) is mlp}
            for layer in (*reversed(ordinary), found)
        ]
        own = parts.pop()
        # A block of a hybrid has one of the two, as others of its kind.
        alike = [(len(p.items() & own.items()), -len(p.keys() ^ own.keys())) for p in parts]
        expected |= parts[alike.index(max(alike))]
    return {prefix + rest: shape for rest, shape in expected.items()}
