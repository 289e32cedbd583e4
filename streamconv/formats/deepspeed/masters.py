"""The fp32 masters of one model-parallel rank, out of the optimizer files of its data-parallel ranks.

Stages 1 and 2: each parameter group of the optimizer is one vector, padded and cut evenly over the
ranks that share it; what was padded is mostly cut off again before saving. So no length is computed
here: the pieces are put together as they are stored, and what is left behind the last parameter must be
less than the padding may be. ``param_shapes`` has the order, of round robin too. With
``parameter_alignment`` there are gaps between parameters, which the files list.

Stage 3: each parameter is cut by itself, into ``ceil(numel / ranks)`` elements a rank, zeros behind
the end; a rank's vector is its pieces of all parameters, back to back.

deepspeed.moe: experts of expert rank e lie on the ranks e, e + ep, e + 2·ep, …; their names count from
0 on each expert rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamconv.errors import BadInputError
from streamconv.formats.deepspeed.flat import Cutter, Part, Run, Vector, common_dtype
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import DType
from streamconv.torchfile.rankfile import Stored
from streamconv.torchfile.zerofile import OptimizerFile, Shapes

_EXPERT = re.compile(r"(.*\bdeepspeed_experts\.)(\d+)(\..*)", re.ASCII)
# DeepSpeed's nccl_start_alignment_factor: a group is padded to so many elements a rank.
_ALIGNMENT = 2
_OTHER_RUN = "are all files of the same save of the same run?"


@dataclass(frozen=True, slots=True)
class Share:
    """One data-parallel rank's optimizer file, and its number among the checkpoint's files."""

    number: int
    file: OptimizerFile

    @property
    def path(self) -> Path:
        """Return where it lies."""
        return self.file.facts.path


def read_masters(
    shares: Sequence[Share], groups: Sequence[Shapes], cutter: Cutter
) -> dict[str, Part]:
    """Return the masters by name; ``shares`` are all ranks' in their order, ``groups`` the shapes.

    Raises :class:`BadInputError` where the files do not hold what the shapes say.
    """
    if shares[0].file.stage == 3:
        merged = {name: shape for group in groups for name, shape in group.items()}
        return dict(_cut_by_itself(shares, merged, cutter))
    return dict(_in_groups(shares, groups, cutter))


def _in_groups(
    shares: Sequence[Share], groups: Sequence[Shapes], cutter: Cutter
) -> Iterator[tuple[str, Part]]:
    first = shares[0]
    for share in shares:
        if len(share.file.groups) != len(groups):
            raise BadInputError(
                "an optimizer file and the model file disagree about the parameter groups",
                where=str(share.path),
                expected=f"{len(groups)} groups, as param_shapes of the model file has",
                found=str(len(share.file.groups)),
                hint=_OTHER_RUN,
            )
    counts = first.file.partition_count
    counts = counts * len(groups) if len(counts) == 1 else counts
    if len(counts) != len(groups):
        raise BadInputError(
            "an optimizer file with another number of groups than it says",
            where=str(first.path),
            expected=str(len(groups)),
            found=f"partition_count of {len(counts)}",
        )
    local = _local_experts(groups)
    for g, shapes in enumerate(groups):
        gaps = first.file.gaps[g] if g < len(first.file.gaps) else ()
        ranks = len(shares) // counts[g]
        if len(shares) % counts[g] or (ranks > 1 and not all(map(_EXPERT.fullmatch, shapes))):
            raise BadInputError(
                "a parameter group that is shared by some of the ranks, and holds more than experts",
                where=str(first.path),
                found=f"group {g}: partition_count {counts[g]} of {len(shares)} ranks",
            )
        for e in range(ranks):
            pieces = [(s.number, s.file.groups[g]) for s in shares[e::ranks]]
            for name, part in _cut_group(shapes, gaps, pieces, first.path, g, cutter):
                yield (_global_name(name, e, local) if ranks > 1 else name), part


def _cut_group(
    shapes: Shapes,
    gaps: Sequence[int],
    pieces: Sequence[tuple[int, Stored]],
    where: Path,
    number: int,
    cutter: Cutter,
) -> Iterator[tuple[str, Part]]:
    dtype = _dtype_of(pieces, where, number)
    vector = Vector(pieces)
    if gaps and len(gaps) != len(shapes):
        raise BadInputError(
            "the gaps of a parameter group are not those of its parameters",
            where=str(where),
            expected=f"{len(shapes)} in group {number}",
            found=str(len(gaps)),
        )
    needed = sum(map(math.prod, shapes.values())) + sum(gaps)
    if not 0 <= vector.numel - needed < _ALIGNMENT * len(pieces):
        raise BadInputError(
            f"the fp32 weights of parameter group {number} are not as long as its parameters",
            where=str(where),
            expected=f"{needed} elements in {len(pieces)} files, and less than "
            f"{_ALIGNMENT * len(pieces)} of padding",
            found=f"{vector.numel} elements",
            hint=_OTHER_RUN,
        )
    at = 0
    for k, (name, shape) in enumerate(shapes.items()):
        numel = math.prod(shape)
        yield name, cutter.part(dtype, shape, vector.cut(at, at + numel))
        at += numel + (gaps[k] if gaps else 0)


def _cut_by_itself(
    shares: Sequence[Share], shapes: Shapes, cutter: Cutter
) -> Iterator[tuple[str, Part]]:
    ranks = len(shares)
    vectors = []
    needed = sum(-(-math.prod(shape) // ranks) for shape in shapes.values())
    dtype = _dtype_of([(s.number, g) for s in shares for g in s.file.groups], shares[0].path, 0)
    for share in shares:
        vector = Vector((share.number, group) for group in share.file.groups)
        if vector.numel != needed:
            raise _too_short(
                share, vector.numel, needed, f"{len(shapes)} parameters on {ranks} ranks"
            )
        vectors.append(vector)
    at = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        each = -(-numel // ranks)
        runs = _one_after_the_other(vectors, at, each, numel)
        yield name, cutter.part(dtype, shape, runs)
        at += each


def _too_short(share: Share, found: int, needed: int, of: str) -> BadInputError:
    empty = not all(group.spec.shape[0] for group in share.file.groups)
    if empty:  # a sub-group that was swapped out
        return BadInputError(
            "the run kept its fp32 weights on NVMe, and they are not in the checkpoint",
            where=str(share.path),
            expected=f"{needed} elements of {of}",
            found=f"{found} elements, and empty groups",
            hint="load it where the NVMe folder is, with the optimizer offloaded to the CPU, and save "
            "it again",
        )
    return BadInputError(
        "the optimizer file does not hold as many fp32 weights as the parameters need",
        where=str(share.path),
        expected=f"{needed} elements, a rank's part of {of}",
        found=f"{found} elements",
        hint=_OTHER_RUN,
    )


def _one_after_the_other(
    vectors: Sequence[Vector], at: int, each: int, numel: int
) -> Iterator[Run]:
    for rank, vector in enumerate(vectors):
        size = min(each, numel - rank * each)
        if size <= 0:
            return
        yield from vector.cut(at, at + size)


def join_fragments(
    fragments: Sequence[tuple[int, Stored]], shape: Shape, where: str, cutter: Cutter
) -> Part:
    """Return a frozen parameter of stage 3 out of the equal pieces in all ranks' model files."""
    numel, ranks = math.prod(shape), len(fragments)
    each = -(-numel // ranks)
    vectors = [Vector([fragment]) for fragment in fragments]
    short = next((v for v in vectors if v.numel != each), None)
    dtype = common_dtype(fragments)
    if short is not None or dtype is None:
        raise BadInputError(
            "the pieces of a frozen parameter do not make it up",
            where=where,
            expected=f"{each} elements on each of {ranks} ranks, of one type",
            found=f"{short.numel} elements" if short is not None else "several types",
            hint=_OTHER_RUN,
        )
    return cutter.part(dtype, shape, _one_after_the_other(vectors, 0, each, numel))


def _dtype_of(pieces: Sequence[tuple[int, Stored]], where: Path, number: int) -> DType:
    dtype = common_dtype(pieces)
    if dtype is None:
        raise BadInputError(
            "ranks hold the fp32 weights of one parameter group in several types, or not at all",
            where=str(where),
            found=f"group {number}",
            hint=_OTHER_RUN,
        )
    return dtype


def _local_experts(groups: Sequence[Shapes]) -> Mapping[str, int]:
    """Return how many experts each rank has of each layer, by what their names begin with."""
    counts: dict[str, int] = {}
    for group in groups:
        for name in group:
            match = _EXPERT.fullmatch(name)
            if match:
                counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts


def _global_name(name: str, expert_rank: int, local: Mapping[str, int]) -> str:
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name
    number = int(match[2]) + expert_rank * local[match[1]]
    return f"{match[1]}{number}{match[3]}"
