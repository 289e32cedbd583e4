"""Tensor parallelism (AutoTP): how the shards of one parameter go together.

DeepSpeed 0.19 writes ``universal_checkpoint_info`` into the model files. Its ``affine_map`` has, for
each parameter (a regular expression that is its name) and rank, the pieces of the shard as affine
walks: ``source`` over the whole parameter, ``dest`` over the shard, both (offset, strides) in elements
of a C-contiguous tensor. Cuts may be uneven. A parameter that the map lacks is told by lists of
patterns: replicated, cut along dimension 1 (row parallel), along 0 if none matches. AutoTP's patterns
are names, ``^…$``; those of models that cut their layers themselves (Megatron-DeepSpeed) have numbers,
``\\d+``. Releases before wrote nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.errors import BadInputError
from streamconv.formats.assembly import Stored as Piece
from streamconv.formats.deepspeed.flat import Part
from streamconv.ir.boxes import Box, Shape, contiguous_strides

_ROWS = "parameter_with_row_parallelism_patterns"
_REPLICATED = "tp_replicated_parameter_patterns"
# What cannot be put together by moving boxes, or not by what is written.
_OTHERS = (
    "autotp_unsupported_parameter_patterns",
    "parameter_to_average_patterns",
    "parameter_with_2_sub_params_cat_dim_0",
    "parameter_with_sub_params",
)
_MAP_VERSION = 1


@dataclass(frozen=True, slots=True)
class _Piece:
    """A box of a shard, and the offsets of the same elements in the whole."""

    shard: Box
    whole: Shape


class ShardMap:
    """What the model files of a run say of its tensor parallel shards; ``where`` is one of them."""

    def __init__(self, info: Mapping[str, Any], ranks: int, where: Path) -> None:
        self._ranks = ranks
        self._where = where
        affine = info.get("affine_map")
        params = affine.get("params") if isinstance(affine, dict) else None
        self._params = {_unescaped(k): v for k, v in (params or {}).items() if isinstance(v, dict)}
        self._newer = isinstance(affine, dict) and affine.get("version", 1) != _MAP_VERSION
        self._said = _ROWS in info or _REPLICATED in info
        self._rows = _patterns(info.get(_ROWS))
        self._replicated = _patterns(info.get(_REPLICATED))
        self._others = {key: _patterns(info.get(key)) for key in _OTHERS}

    def join(self, name: str, parts: Sequence[Part]) -> Part:
        """Return the parameter that ``parts`` of all ranks, in their order, are shards of."""
        if self._ranks == 1:
            return parts[0]
        dtypes = {p.dtype for p in parts}
        if len(dtypes) > 1 or len(parts) != self._ranks:
            raise self._bad(name, f"{len(parts)} of {self._ranks} ranks, {len(dtypes)} types")
        shape, pieces = self._cuts(name, [p.shape for p in parts])
        seen: set[tuple[Shape, Shape]] = set()
        made: list[Piece] = []
        for part, cuts in zip(parts, pieces, strict=True):
            for cut in cuts:
                key = (cut.whole, cut.shard.sizes)
                if key in seen:
                    continue  # a replica
                seen.add(key)
                made += _placed(part, cut)
        return Part(parts[0].dtype, shape, tuple(made))

    def _cuts(self, name: str, shapes: Sequence[Shape]) -> tuple[Shape, list[list[_Piece]]]:
        entry = self._params.get(name)
        if entry is not None:
            try:
                return self._by_map(entry, shapes)
            except (KeyError, TypeError, ValueError, IndexError):
                raise self._bad(name, "an affine map of a form that is not known") from None
        if not self._said:
            raise self._bad(name, "no word of how it is cut")
        if any(None in p for p in (self._rows, self._replicated, *self._others.values())):
            raise self._bad(
                name, "patterns of names that are more than names and numbers of layers"
            )
        for key, patterns in self._others.items():
            if _matches(patterns, name):
                raise self._bad(name, key)
        if _matches(self._replicated, name):
            if len(set(shapes)) > 1:
                raise self._bad(name, f"{_REPLICATED}, and shards of several shapes")
            return shapes[0], [[_Piece(Box.whole(s), (0,) * len(s))] for s in shapes]
        dim = 1 if _matches(self._rows, name) else 0
        others = {(*s[:dim], *s[dim + 1 :]) for s in shapes}
        if any(len(s) <= dim for s in shapes) or len(others) > 1:
            raise self._bad(name, f"shards that cannot be joined along dimension {dim}")
        sizes = [s[dim] for s in shapes]
        whole = (*shapes[0][:dim], sum(sizes), *shapes[0][dim + 1 :])
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        return whole, [
            [_Piece(Box.whole(s), tuple(start if d == dim else 0 for d in range(len(s))))]
            for s, start in zip(shapes, starts, strict=True)
        ]

    def _by_map(
        self, entry: Mapping[str, Any], shapes: Sequence[Shape]
    ) -> tuple[Shape, list[list[_Piece]]]:
        whole = _sizes(entry["logical_shape"])
        if self._newer:
            raise ValueError("another version")
        made = []
        for rank, shape in enumerate(shapes):
            said = entry["ranks"][rank]
            if _sizes(said["shard_shape"]) != shape:
                raise ValueError("another shard")
            pieces = []
            for p in said["pieces"]:
                if p.get("scale", 1) != 1:
                    raise ValueError("what the shard holds is a multiple")
                box = Box(_start(p["dest"], shape), _sizes(p["shape"]))
                if not box.inside(shape):
                    raise ValueError("a piece outside its shard")
                pieces.append(_Piece(box, _start(p["source"], whole)))
            made.append(pieces)
        return whole, made

    def _bad(self, name: str, found: str) -> BadInputError:
        return BadInputError(
            "cannot determine how the shards of tensor-parallel ranks fit together",
            where=f"{self._where}, {name[:200]}",
            expected="universal_checkpoint_info that tells, as AutoTP writes it since DeepSpeed 0.19",
            found=found,
            hint="if AutoTP cut the model, load the checkpoint with DeepSpeed 0.19 or newer, with the "
            "same tensor_parallel settings, and save it again; else save it unsharded with its trainer",
        )


def _placed(part: Part, cut: _Piece) -> Iterator[Piece]:
    for piece in part.pieces:
        shared = piece.box.intersect(cut.shard)
        if shared is None:
            continue
        ahead = sum(
            (a - b) * s
            for a, b, s in zip(shared.offsets, piece.box.offsets, piece.strides, strict=True)
        )
        offsets = tuple(
            a - b + c for a, b, c in zip(shared.offsets, cut.shard.offsets, cut.whole, strict=True)
        )
        yield Piece(
            Box(offsets, shared.sizes), piece.strides, piece.storage_offset + ahead, piece.record
        )


def _start(walk: Sequence[Any], shape: Shape) -> Shape:
    """Return the index at which an affine walk begins, which must be a box of ``shape``."""
    offset, strides = walk
    steps = contiguous_strides(shape)
    if _sizes(strides) != steps or type(offset) is not int or not 0 <= offset < math.prod(shape):
        raise ValueError("no box")
    index = []
    for step in steps:
        first, offset = divmod(offset, step)
        index.append(first)
    return tuple(index)


def _sizes(values: Sequence[Any]) -> Shape:
    if not all(type(v) is int and v >= 0 for v in values):
        raise ValueError("no sizes")
    return tuple(values)


def _patterns(value: object) -> list[re.Pattern[str] | None]:
    """Return the patterns of a list; None for one that is more than names and numbers of layers.

    Any other could take for ever to match.
    """
    if isinstance(value, Mapping):
        value = [*value]
    made: list[re.Pattern[str] | None] = []
    for entry in value if isinstance(value, (list, tuple)) else () if value is None else (value,):
        texts = entry.get("patterns") if isinstance(entry, Mapping) else (entry,)
        made += map(_pattern, texts if isinstance(texts, (list, tuple)) else (None,))
    return made


_TOKEN = re.compile(r"(\\d\+)(?![0-9]|\\d|$)|(\.)|\\([^\w\s])|([\w-])", re.ASCII)


def _pattern(text: object) -> re.Pattern[str] | None:
    """Return a pattern of DeepSpeed's, which are matched from the beginning of a name."""
    if not isinstance(text, str):
        return None
    body = text.removeprefix("^")
    end = "$" if body.endswith("$") and not body.endswith("\\$") else ""
    body = body.removesuffix(end)
    made, at = "", 0
    while at < len(body):
        token = _TOKEN.match(body, at)
        if token is None:
            return None
        digits, anything, escaped, plain = token.groups()
        # Any character but a digit, so that where a number ends is never tried twice.
        made += "[0-9]+" if digits else "[^0-9]" if anything else re.escape(escaped or plain)
        at = token.end()
    return re.compile(made + end)


def _matches(patterns: Sequence[re.Pattern[str] | None], name: str) -> bool:
    return any(p is not None and p.match(name) for p in patterns)


def _unescaped(pattern: object) -> str:
    """Return the name that a pattern ``^…$`` of one name matches."""
    text = str(pattern)
    return re.sub(r"\\(.)", r"\1", text.removeprefix("^").removesuffix("$"))
