"""Experts in Megatron's rank files: four ways to keep them, one tensor of all experts a layer to make.

============================  ==============================================================
``mlp.experts.``              what it is
============================  ==============================================================
``linear_fc1.weight<e>``      Transformer Engine's grouped linear: one tensor an expert
``linear_fc1.weight``         the same with ``moe_single_grouped_weight`` (0.19): all of a rank's
                              experts in one tensor, ``[experts, out, in]`` or ``[experts·out, in]``
``local_experts.<e>.linear…`` one module an expert
``weight1``, ``weight2``      the older grouped GEMM: all of a rank's experts in one tensor,
                              ``[hidden, experts·width]`` in memory ``[experts, hidden, width]``,
                              and ``[experts·width, hidden]``; transposed against a linear layer
============================  ==============================================================

``<e>`` counts the rank's own experts; rank ``ep`` of expert parallelism holds those from
``ep · experts / ranks`` on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from streamconv.errors import BadInputError
from streamconv.formats.assembly import Stored as Piece
from streamconv.formats.replicas import Local
from streamconv.ir.boxes import Box, Shape

_GROUPED = re.compile(r"(.*\.mlp\.experts\.)(linear_fc[12]\.(?:weight|bias))(\d*)", re.ASCII)
_SEQUENTIAL = re.compile(
    r"(.*\.mlp\.experts\.)local_experts\.(\d+)\.(linear_fc[12]\.(?:weight|bias))", re.ASCII
)
_LEGACY = re.compile(r"(.*\.mlp\.experts\.)weight([12])", re.ASCII)

_STACKED, _TRANSPOSED = -1, -2


class ExpertKey(NamedTuple):
    """The canonical name of a parameter of all experts, and the rank's own number of one of them.

    ``number`` is below 0 where a tensor holds all the rank's experts, and says how.
    """

    name: str
    number: int


def expert_key(name: str) -> ExpertKey | None:
    """Return what expert parameter ``name`` is, None where it is none."""
    if ".mlp.experts." not in name:
        return None
    if match := _GROUPED.fullmatch(name):
        return ExpertKey(f"{match[1]}experts.{match[2]}", int(match[3] or _STACKED))
    if match := _SEQUENTIAL.fullmatch(name):
        return ExpertKey(f"{match[1]}experts.{match[3]}", int(match[2]))
    if match := _LEGACY.fullmatch(name):
        return ExpertKey(f"{match[1]}experts.linear_fc{match[2]}.weight", _TRANSPOSED)
    return None


def split_experts(
    held: Mapping[ExpertKey, Local], shapes: Mapping[str, Shape], ranks: int
) -> Iterator[tuple[str, list[Local]]]:
    """Yield (canonical name, the rank's experts in order) of one rank's expert parameters.

    ``shapes`` are those of the stage's other parameters, ``ranks`` the expert-parallel ones.
    """
    indexed: dict[str, dict[int, Local]] = {}
    for (name, number), local in held.items():
        if number == _STACKED:
            yield name, _split_stacked(name, local, shapes, ranks)
        elif number == _TRANSPOSED:
            yield name, _split_legacy(name, local, shapes, ranks)
        else:
            indexed.setdefault(name, {})[number] = local
    for name, experts in indexed.items():
        missing = [e for e in range(max(experts) + 1) if e not in experts]
        if missing:
            raise BadInputError(
                "a rank lacks some of its experts",
                where=name,
                expected=f"{max(experts) + 1} of them",
                found=f"none with the number {missing[0]}",
            )
        yield name, [experts[e] for e in range(len(experts))]


def _share(name: str, local: Local, shapes: Mapping[str, Shape], ranks: int) -> tuple[int, int]:
    """Return how many experts a rank holds, and the width of the model, as the router says."""
    router = shapes.get(name.partition(".experts.")[0] + ".router.weight")
    if router is None or router[0] % ranks:
        raise _odd(name, local, "a router beside it, whose experts the ranks share evenly")
    return router[0] // ranks, router[1]


def _split_stacked(name: str, local: Local, shapes: Mapping[str, Shape], ranks: int) -> list[Local]:
    """Return each expert's weight or bias: an index of the first axis, or its share of the rows."""
    experts, _ = _share(name, local, shapes, ranks)
    axes = 2 if name.endswith(".weight") else 1
    rows = 1
    shape, strides = local.shape[1:], local.strides[1:]
    if len(local.shape) == axes:
        rows, rest = divmod(local.shape[0], experts)
        if rest:
            raise _odd(name, local, f"the rows of {experts} experts")
        shape, strides = (rows, *shape), local.strides
    elif len(local.shape) != axes + 1 or local.shape[0] != experts:
        raise _odd(name, local, f"{experts} experts, one after the other")
    return [
        dataclasses.replace(
            local,
            shape=shape,
            strides=strides,
            storage_offset=local.storage_offset + e * rows * local.strides[0],
        )
        for e in range(experts)
    ]


def _split_legacy(name: str, local: Local, shapes: Mapping[str, Shape], ranks: int) -> list[Local]:
    """Return each expert's weight ``[out, in]`` as a view of the tensor that holds them all."""
    experts, hidden = _share(name, local, shapes, ranks)
    if len(local.shape) != 2:
        raise _odd(name, local, f"{experts} experts in one matrix")
    first = ".linear_fc1." in name
    rows, columns = local.shape
    width, rest = divmod(columns if first else rows, experts)
    if rest or (rows if first else columns) != hidden or local.strides != (columns, 1):
        raise _odd(name, local, f"{experts} experts of a model {hidden} wide, stored row by row")
    # In memory [expert, hidden, width] for the first layer and [expert, width, hidden] for the second.
    shape, strides = ((width, hidden), (1, width)) if first else ((hidden, width), (1, hidden))
    return [
        dataclasses.replace(
            local,
            shape=shape,
            strides=strides,
            storage_offset=local.storage_offset + e * hidden * width,
        )
        for e in range(experts)
    ]


def _odd(name: str, local: Local, expected: str) -> BadInputError:
    return BadInputError(
        "cannot determine the layout of grouped experts",
        where=name,
        expected=expected,
        found=str(list(local.shape)),
    )


def lift(piece: Piece, expert: int) -> Piece:
    """Return a piece of one expert's tensor as a piece of that of all experts."""
    box = Box((expert, *piece.box.offsets), (1, *piece.box.sizes))
    return dataclasses.replace(piece, box=box, strides=(0, *piece.strides))
