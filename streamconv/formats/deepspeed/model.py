"""Puts the model-parallel ranks of a DeepSpeed run together: tensor, pipeline and expert parallelism.

* ``mp_rank`` is pipeline stage × tensor-parallel ranks + tensor-parallel rank.
* Pipeline: ``module`` of a model file is None; layer files hold the weights in 16 bits, named within
  the layer, masters are named ``L.name``. A tied layer (``tied_modules.KEY.…``) is on every stage that
  owns it, with equal masters, and has one layer file.
* A universal checkpoint (ds_to_universal) has a file for each parameter, whole whatever the ranks were,
  beside copies of the model files.
* deepspeed.moe: expert files hold the experts in 16 bits under global numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from streamconv.errors import BadInputError
from streamconv.formats.deepspeed.flat import Part
from streamconv.formats.deepspeed.ranks import Reader, Weights
from streamconv.formats.deepspeed.tensor_parallel import ShardMap
from streamconv.ir.boxes import Shape

_TIED = re.compile(r"(tied_modules\.[^.]+)\.(.+)", re.ASCII)
_NOT_COPIED = "copy the missing files; the checkpoint cannot be converted without them"


def read_model(reader: Reader) -> Weights:
    """Return the weights of the whole model; raises :class:`BadInputError` for missing ranks."""
    files = reader.files
    found = files.ranks()
    if not found:
        raise BadInputError(
            "the model files are missing",
            where=str(files.folder),
            expected="mp_rank_00_model_states.pt",
            hint=_NOT_COPIED,
        )
    first = reader.weights(found[0])
    size = _world(reader, first, found)
    without = [m for m in range(size) if not files.optimizers_of(m)]
    if 0 < len(without) < size:
        raise BadInputError(
            f"the optimizer files of {len(without)} model-parallel ranks are missing",
            where=str(files.folder),
            expected=f"zero_pp_rank_0_mp_rank_{without[0]:02}_optim_states.pt and so on",
            found=f"those of {size - len(without)} ranks",
            hint=_NOT_COPIED,
        )
    ranks = [first, *(reader.weights(rank) for rank in range(1, size))]
    _add_experts(reader, ranks)
    tp = _tensor_parallel(reader, first, size)
    if files.layers:
        _add_layers(reader, ranks, tp)
    weights = first if size == 1 else _joined(reader, ranks, tp)
    if files.universal:
        _add_universal(reader, weights, {n: s for w in ranks for n, s in w.shapes.items()}, tp)
    return weights


def _add_universal(reader: Reader, weights: Weights, shapes: Mapping[str, Shape], tp: int) -> None:
    """Take the masters of a universal checkpoint.

    It holds frozen weights and the other names of shared ones as well, cast up: these are as they were.
    """
    missing = [n for n in shapes if n not in reader.files.universal]
    if missing:
        raise BadInputError(
            f"{len(missing)} parameters are missing in the universal checkpoint",
            where=str(reader.files.folder / "zero"),
            expected=", ".join(missing[:5]),
            hint=_NOT_COPIED,
        )
    for name in reader.files.universal:
        if name not in shapes and (name in weights.rest or name in weights.aliases):
            continue
        part = reader.parameter(name, shapes.get(name) if tp == 1 else None)
        weights.masters[name] = part
        if name in weights.rest:
            weights.halves[name] = weights.rest.pop(name)


def _world(reader: Reader, first: Weights, found: Sequence[int]) -> int:
    """Return how many model-parallel ranks there are."""
    size = first.said.get("mp_world_size", len(found))
    folder = reader.files.folder
    if type(size) is not int or not 0 < size <= 1 << 20:
        raise BadInputError("mp_world_size is not a number of ranks", where=str(folder))
    missing = [m for m in range(size) if m not in found]
    if missing:
        raise BadInputError(
            f"the files of {len(missing)} model-parallel ranks are missing",
            where=str(folder),
            expected=f"mp_rank_00 to mp_rank_{size - 1:02}, as mp_world_size says",
            found=", ".join(f"mp_rank_{m:02}" for m in found[:8]),
            hint=_NOT_COPIED,
        )
    if len(found) > size:
        reader.notices.append(
            f"the files of {len(found) - size} model-parallel ranks (mp_rank_{found[size]:02} and on) "
            f"are left over from another save, which had more than this one's {size}, and not used"
        )
    return size


def _tensor_parallel(reader: Reader, first: Weights, size: int) -> int:
    """Return how many tensor-parallel ranks share each pipeline stage."""
    degree = first.degrees.get("tp_degree")
    if degree is None:
        degree = len({t for _, t in reader.files.layers}) if reader.files.layers else size
    if size % degree:
        raise BadInputError(
            "the model-parallel ranks do not make up whole pipeline stages",
            where=str(reader.files.folder),
            found=f"{size} ranks, {degree} of them to a stage",
        )
    return degree


def _add_experts(reader: Reader, ranks: Sequence[Weights]) -> None:
    """Add what expert files hold, and check that there is every expert."""
    experts: dict[int, dict[int, dict[str, Part]]] = {}
    for (layer, expert, rank), path in sorted(reader.files.experts.items()):
        if rank < len(ranks):
            held = dict(reader.tensors(path))
            experts.setdefault(layer, {}).setdefault(expert, {}).update(held)
            for name, part in held.items():
                _add(ranks[rank], name, part)
    expected = ranks[0].experts
    for number, layer in enumerate(sorted(experts)):
        held_here = experts[layer].keys()
        total = expected[number] if len(expected) == len(experts) else max(held_here) + 1
        lost = total - sum(e < total for e in held_here)
        if lost:
            first = next(e for e in range(total) if e not in held_here)
            raise BadInputError(
                f"the files of {lost} experts are missing",
                where=str(reader.files.folder),
                expected=f"layer_{layer}_expert_{first}_mp_rank_00_model_states.pt",
                found=f"{len(held_here)} of {total} experts of this layer",
                hint=_NOT_COPIED,
            )
    if reader.files.expert_optimizers:
        _name_expert_masters(reader, ranks, experts)


def _name_expert_masters(
    reader: Reader,
    ranks: Sequence[Weights],
    experts: Mapping[int, Mapping[int, Mapping[str, Part]]],
) -> None:
    """Stage 0: each expert-parallel rank has the masters of its experts and of all else."""
    files = {x: path for (_, x), path in sorted(reader.files.expert_optimizers.items())}
    even = all(len(layer) % len(files) == 0 for layer in experts.values())
    if len(ranks) > 1 or not even or sorted(files) != list(range(len(files))):
        reader.notices.append(
            "which fp32 master of stage 0 is whose is not known with several model-parallel ranks: the "
            "weights are taken as the run computed with them"
        )
        return
    (weights,) = ranks
    of_experts = {n for layer in experts.values() for held in layer.values() for n in held}
    dense = {n: p for n, p in weights.rest.items() if n not in of_experts}
    for x, path in files.items():
        own = {
            name: part
            for _, layer in sorted(experts.items())
            for expert, held in sorted(layer.items())
            if expert // (len(layer) // len(files)) == x
            for name, part in held.items()
        }
        found = reader.expert_masters(path, {**dense, **own})
        weights.masters |= {n: p for n, p in found.items() if n not in weights.masters}
    weights.halves |= {n: weights.rest.pop(n) for n in weights.masters if n in weights.rest}


def _add(weights: Weights, name: str, part: Part) -> None:
    target = weights.halves if name in weights.masters else weights.rest
    target.setdefault(name, part)


def _add_layers(reader: Reader, ranks: Sequence[Weights], tp: int) -> None:
    """Add what the layer files of a pipeline hold, to the stage that has the layer."""
    layers = sorted({layer for layer, _ in reader.files.layers})
    held = {(layer, t): _layer(reader, layer, t) for layer in layers for t in range(tp)}
    for number, weights in enumerate(ranks):
        if weights.unnamed is not None:
            # Which layers a stage has, no file says: those whose weights its masters are. That of the
            # last may be tied to the first one's.
            known = {
                f"{layer}.{name}": part
                for layer in layers
                for name, part in held[layer, number % tp].items()
            }
            weights.masters = reader.named(weights.unnamed, known, rounds=2)
    for (layer, t), parts in held.items():
        weights = ranks[_stage_of(layer, ranks, tp) * tp + t]
        prefix = _prefix(layer, parts, weights)
        for name, part in parts.items():
            _add(weights, f"{prefix}.{name}", part)
    trained = {n for w in ranks for n in w.masters}
    numbers = {int(n.partition(".")[0]) for n in trained if n.partition(".")[0].isdecimal()}
    lost = sorted(numbers - set(layers))
    if lost and not all(w.masters for w in ranks):
        raise BadInputError(
            f"{len(lost)} layer files are missing",
            where=str(reader.files.folder),
            expected=f"layer_{lost[0]:02}-model_states.pt",
            hint=_NOT_COPIED,
        )


def _layer(reader: Reader, layer: int, rank: int) -> dict[str, Part]:
    """Return what a tensor-parallel rank's file of a pipeline's layer holds."""
    path = reader.files.layers.get((layer, rank))
    if path is None:
        raise BadInputError(
            "a layer file of a tensor-parallel rank is missing",
            where=str(reader.files.folder),
            expected=f"layer_{layer:02}-model_{rank:02}-model_states.pt",
            hint=_NOT_COPIED,
        )
    return dict(reader.tensors(path))


def _stage_of(layer: int, ranks: Sequence[Weights], tp: int) -> int:
    """Return the first stage whose masters name the layer; where none does, any is as good."""
    for stage in range(len(ranks) // tp):
        if any(n.startswith(f"{layer}.") for n in ranks[stage * tp].masters):
            return stage
    return 0


def _prefix(layer: int, held: Mapping[str, Part], weights: Weights) -> str:
    """Return what the names of a layer begin with: its number, or the key of a tied layer."""
    if any(f"{layer}.{name}" in weights.masters for name in held):
        return str(layer)
    shapes = {name: part.shape for name, part in held.items()}
    tied: dict[str, dict[str, Shape]] = {}
    for name, part in weights.masters.items():
        match = _TIED.fullmatch(name)
        if match:
            tied.setdefault(match[1], {})[match[2]] = part.shape
    fits = [key for key, names in tied.items() if names == shapes]
    return fits[0] if len(fits) == 1 else str(layer)


def _joined(reader: Reader, ranks: Sequence[Weights], tp: int) -> Weights:
    """Return one model of all ranks."""
    made = Weights(
        0, stage=ranks[0].stage, ranks=ranks[0].ranks, said=ranks[0].said, degrees=ranks[0].degrees
    )
    order: dict[str, None] = {}
    for stage in range(len(ranks) // tp):
        members = ranks[stage * tp : (stage + 1) * tp]
        shards = ShardMap(members[0].shards, tp, _where(reader))
        for target, tables in (
            (made.masters, [m.masters for m in members]),
            (made.halves, [m.halves for m in members]),
            (made.rest, [m.rest for m in members]),
        ):
            for name, parts in _together(tables, reader):
                if name not in target:  # a tied layer is on several stages
                    target[name] = shards.join(name, parts)
        made.aliases |= members[0].aliases
        order |= dict.fromkeys(members[0].order)
    made.order = tuple(order)
    return made


def _together(
    tables: Sequence[Mapping[str, Part]], reader: Reader
) -> Iterator[tuple[str, list[Part]]]:
    for name in tables[0]:
        absent = next((t for t, table in enumerate(tables) if name not in table), None)
        if absent is not None:
            raise BadInputError(
                "tensor-parallel ranks hold different parameters",
                where=f"{_where(reader)}, {name}",
                found=f"none on tensor-parallel rank {absent}",
                hint="are all files of the same save of the same run?",
            )
        yield name, [table[name] for table in tables]


def _where(reader: Reader) -> Path:
    return next(iter(reader.files.models.values()), reader.files.folder)
