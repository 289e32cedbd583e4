"""One file of a DeepSpeed checkpoint: what it says of the weights, and where its tensors lie.

A model file (``…model_states.pt``) is a dict whose ``module`` is the state dict, beside shapes,
counters and whatever the trainer keeps (``client_state``). An optimizer file (``…optim_states.pt``) has
the fp32 masters in its ``optimizer_state_dict``, flat. Layer and expert files are state dicts. Only
what is needed here is looked into; every other global becomes an inert record.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamconv.errors import BadInputError, UnsafeInputError
from streamconv.ir.boxes import Shape
from streamconv.torchfile.inert import Inert, InertDict, InertSize
from streamconv.torchfile.opened import opened
from streamconv.torchfile.rankfile import Contents, RankReader, Stored
from streamconv.torchfile.values import name_of
from streamconv.torchfile.zipdir import ZipDirectory

_MAX_PICKLE_NBYTES = 256 << 20  # the optimizer's tree and the trainer's own state are in there too
_MAX_RANK = 64
_WHOSE = "DeepSpeed's files"
_MAX_NUMBER_NBYTES = 64

# What DeepSpeed itself writes into a model file; all else is the trainer's.
_OWN_KEYS = frozenset(
    (
        *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
        *("frozen_param_fragments", "shared_params", "lr_scheduler", "data_sampler"),
        *("random_ltd", "sparse_tensor_module_names", "skipped_steps", "global_steps"),
        *("global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version"),
        *("num_experts", "ds_autoep_layers", "universal_checkpoint_info"),
        *("checkpoint_parallel_dimensions", "csr_tensor_module_names"),
    )
)

Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What identifies a file that was read."""

    path: Path
    nbytes: int
    mtime_ns: int
    prefix: str
    directory_hash: str
    checksums: bool


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a model file holds; no byte of a weight has been read.

    ``module`` is the state dict, ``shapes`` the shapes of the optimizer's parameters, a dict a flat
    group in the order of the group; None where the run had no flat groups. ``frozen`` are the
    fragments of parameters that are not trained. ``shared`` maps names that are not stored to those
    that are. ``masters`` are the fp32 weights that stage 0 keeps here: groups of shaped tensors, or of
    one flat tensor each. ``skipped`` are (name, reason) of what is not a tensor, ``others`` the keys
    that the trainer added. ``shards`` is what universal_checkpoint_info says of tensor parallelism,
    ``degrees`` of the sizes of the run, ``experts`` how many each MoE layer has; ``expert_parallel``
    says that AutoEP has cut them under stage 3.
    """

    facts: FileFacts
    module: Mapping[str, Stored]
    buffers: frozenset[str]
    shapes: tuple[Shapes, ...] | None
    frozen_shapes: Shapes
    frozen: Mapping[str, Stored]
    shared: Mapping[str, str]
    masters: tuple[tuple[Stored, ...], ...]
    flat_masters: bool
    skipped: tuple[tuple[str, str], ...]
    others: tuple[str, ...]
    said: Mapping[str, int | str]
    shards: Mapping[str, Any] = field(default_factory=dict)
    degrees: Mapping[str, int] = field(default_factory=dict)
    experts: tuple[int, ...] = ()
    expert_parallel: bool = False


@dataclass(frozen=True, slots=True)
class OptimizerFile:
    """What an optimizer file holds: ``groups`` are this rank's pieces of the flat fp32 masters.

    ``stage`` is 3, or 2 for stages 1 and 2, whose groups are alike. ``partition_count`` has the
    number of ranks that share each group (one number for all in stage 3), ``gaps`` how many elements
    of padding follow each parameter of each group. ``shapes`` are those of DeepSpeed before 0.6, which
    kept them here.
    """

    facts: FileFacts
    stage: int
    groups: tuple[Stored, ...]
    partition_count: tuple[int, ...]
    gaps: tuple[tuple[int, ...], ...]
    said: Mapping[str, int | str]
    shapes: tuple[Shapes, ...] | None = None


def read_model_file(reader: RankReader, path: Path, *, module: bool = True) -> ModelFile:
    """Read a model file; without ``module`` its state dict is passed over.

    Raises :class:`BadInputError` and :class:`UnsafeInputError`, with the file and the name.
    """
    where = str(path)
    with _opened(path) as (facts, directory, root):
        root = _dict(root, "file", where)
        if "module" not in root:
            raise BadInputError(
                "the file holds no model of DeepSpeed's",
                where=where,
                expected="a dict with 'module'",
                found=", ".join(str(k)[:40] for k in list(root)[:8]) or "an empty dict",
            )
        state: Any = root["module"] if module else {}
        contents = Contents(reader, directory, 0)
        for name, value in _dict(state, "module", where, or_none=True).items():
            contents.add(name, value)
        frozen = Contents(reader, directory, 0)
        for name, value in _dict(
            root.get("frozen_param_fragments"), "fragments", where, True
        ).items():
            frozen.add(name, value)
        frozen.refuse_others()
        optimizer: Any = root.get("optimizer")
        masters, flat = _stage_0(reader, directory, optimizer)
        shapes = root.get("param_shapes")
        return ModelFile(
            facts,
            contents.plain(_WHOSE),
            frozenset(_names(root.get("buffer_names"), where)),
            _shape_groups(shapes, where),
            _shapes(root.get("frozen_param_shapes"), where),
            frozen.plain(_WHOSE),
            _shared(root.get("shared_params"), where),
            masters,
            flat,
            tuple(contents.skipped),
            tuple(str(k) for k in root if k not in _OWN_KEYS),
            _said(root),
            _as_dict(root.get("universal_checkpoint_info")),
            _numbers(root.get("checkpoint_parallel_dimensions")),
            _counts(root.get("num_experts")),
            "zero3_partitioned" in repr(as_plain(root.get("ds_autoep_layers"))),
        )


def read_optimizer_file(reader: RankReader, path: Path) -> OptimizerFile:
    """Read an optimizer file of ZeRO; raises as :func:`read_model_file` does."""
    where = str(path)
    with _opened(path) as (facts, directory, root):
        root = _dict(root, "file", where)
        state = _dict(root.get("optimizer_state_dict"), "optimizer_state_dict", where)
        stage = 3 if "fp32_flat_groups" in state else 2
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        if key not in state:
            raise _no_masters(state, where)
        groups = state[key]
        if type(groups) is not list:
            raise BadInputError("flat groups that are not a list", where=where, found=key)
        contents = Contents(reader, directory, 0)
        for number, value in enumerate(groups):
            contents.add(f"{key}[{number}]", value)
        contents.refuse_others()
        stored = tuple(contents.plain(_WHOSE).values())
        for name, s in contents.tensors.items():
            spec = s.spec
            if len(spec.shape) != 1 or (spec.shape[0] > 1 and spec.strides != (1,)):
                raise BadInputError(
                    "a flat group that is not flat",
                    where=f"{where}, {name}",
                    found=f"shape {list(spec.shape)}, strides {list(spec.strides)}",
                )
        counts = state.get("partition_count")
        counts = [counts] if type(counts) is int else counts
        if type(counts) is not list or not counts or not all(_positive(n) for n in counts):
            raise BadInputError("an optimizer file without its number of ranks", where=where)
        return OptimizerFile(
            facts,
            stage,
            stored,
            tuple(counts),
            _gaps(state.get("param_alignment_paddings"), where),
            _said(root) | _said(state) | _optimizer_step(reader, directory, state),
            _shape_groups(root.get("param_shapes"), where),
        )


def read_tensor_file(
    reader: RankReader, path: Path
) -> tuple[FileFacts, Mapping[str, Stored], tuple[tuple[str, str], ...]]:
    """Read a file that is a state dict: a layer's, or an expert's.

    Returns what identifies it, its tensors, and (name, reason) of what is none.
    """
    with _opened(path) as (facts, directory, root):
        contents = Contents(reader, directory, 0)
        for name, value in _dict(root, "file", str(path)).items():
            contents.add(name, value)
        return facts, contents.plain(_WHOSE), tuple(contents.skipped)


def read_masters_file(
    reader: RankReader, path: Path
) -> tuple[FileFacts, tuple[tuple[Stored, ...], ...], bool]:
    """Read an expert-parallel rank's optimizer file of stage 0.

    Returns what identifies it, its groups of fp32 masters, and whether these are one flat tensor each.
    """
    with _opened(path) as (facts, directory, root):
        optimizer = _dict(root, "file", str(path)).get("optimizer")
        return facts, *_stage_0(reader, directory, optimizer)


def read_parameter_file(reader: RankReader, path: Path) -> tuple[FileFacts, Stored]:
    """Read ``fp32.pt`` of a universal checkpoint: one tensor, flat, or whole in a dict as ``param``."""
    with _opened(path) as (facts, directory, root):
        contents = Contents(reader, directory, 0)
        contents.add("param", root.get("param") if type(root) in (dict, InertDict) else root)
        contents.refuse_others()
        return facts, contents.plain(_WHOSE)["param"]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[FileFacts, ZipDirectory, Any]]:
    with opened(path, max_pickle_nbytes=_MAX_PICKLE_NBYTES) as (status, directory, root):
        yield _facts(path, status, directory), directory, root


def _facts(path: Path, status: os.stat_result, directory: ZipDirectory) -> FileFacts:
    return FileFacts(
        path,
        status.st_size,
        status.st_mtime_ns,
        directory.prefix,
        directory.directory_hash,
        directory.checksums,
    )


def _no_masters(state: Mapping[Any, Any], where: str) -> BadInputError:
    if any(str(k).startswith("local_sub_partitions") for k in state):
        return BadInputError(
            "optimizer states of stage 1 as DeepSpeed wrote them before 0.4, which are not supported",
            where=where,
            hint="load the checkpoint with that release and save it with a newer one",
        )
    return BadInputError(
        "the optimizer file holds no fp32 weights",
        where=where,
        expected="fp32_flat_groups (stage 3) or single_partition_of_fp32_groups (stages 1 and 2)",
        found=", ".join(str(k)[:40] for k in list(state)[:8]),
    )


def _stage_0(
    reader: RankReader, directory: ZipDirectory, optimizer: Any
) -> tuple[tuple[tuple[Stored, ...], ...], bool]:
    """Return the groups of fp32 weights that a run without ZeRO keeps in its model file."""
    if type(optimizer) not in (dict, InertDict):
        return (), False
    groups: Any = optimizer.get("fp32_groups")
    flat: Any = optimizer.get("fp32_groups_flat")
    if groups is None and type(flat) is list:
        groups = [[f] for f in flat]
    if type(groups) is not list or not all(type(g) in (list, tuple) for g in groups):
        return (), False
    found = []
    for number, group in enumerate(groups):
        contents = Contents(reader, directory, 0)
        for k, value in enumerate(group):
            contents.add(f"fp32_groups[{number}][{k}]", value)
        contents.refuse_others()
        found.append(tuple(contents.plain(_WHOSE).values()))
    return tuple(found), optimizer.get("fp32_groups") is None


def _dict(value: Any, what: str, where: str, or_none: bool = False) -> dict[Any, Any]:
    if value is None and or_none:
        return {}
    if type(value) not in (dict, InertDict):
        raise BadInputError(
            "a part of the file that should be a dict is something else",
            where=where,
            expected=f"{what}: a dict",
            found=name_of(value),
        )
    found: dict[Any, Any] = value
    return found


def _names(value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if type(value) is not list or not all(type(n) is str for n in value):
        raise BadInputError("buffer_names is not a list of names", where=where)
    names: list[str] = value
    return names


def _shapes(value: Any, where: str) -> dict[str, Shape]:
    """Return a dict of shapes, each checked; old releases write tuples, and lists."""
    shapes = {}
    for name, shape in _dict(value, "shapes", where, or_none=True).items():
        if type(name) is not str or type(shape) not in (tuple, list, InertSize):
            raise BadInputError("a shape that is none", where=f"{where}, {str(name)[:200]}")
        sizes = tuple(shape)
        if len(sizes) > _MAX_RANK or not all(type(n) is int and 0 <= n < 1 << 62 for n in sizes):
            raise UnsafeInputError(
                "a shape of sizes that are not numbers, or of too many",
                where=f"{where}, {name[:200]}",
            )
        shapes[name] = sizes
    return shapes


def _shape_groups(value: Any, where: str) -> tuple[dict[str, Shape], ...] | None:
    if value is None:
        return None
    groups = value if type(value) is list else [value]
    return tuple(_shapes(g, where) for g in groups)


def _shared(value: Any, where: str) -> dict[str, str]:
    shared = _dict(value, "shared_params", where, or_none=True)
    if not all(type(k) is str and type(v) is str for k, v in shared.items()):
        raise BadInputError("shared_params holds something other than names", where=where)
    return dict(shared)


def _gaps(value: Any, where: str) -> tuple[tuple[int, ...], ...]:
    if value is None:
        return ()
    if type(value) is not list or not all(
        type(g) is list and all(type(n) is int and n >= 0 for n in g) for g in value
    ):
        raise BadInputError("param_alignment_paddings are not lists of numbers", where=where)
    return tuple(map(tuple, value))


def _positive(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _said(root: Mapping[Any, Any]) -> dict[str, int | str]:
    """Return the numbers and texts on which files of one checkpoint agree."""
    said: dict[str, int | str] = {}
    for key in ("ds_version", "global_steps", "dp_world_size", "mp_world_size"):
        value = root.get(key)
        if type(value) is int or (type(value) is str and len(value) < 200):
            said[key] = value
    stage: Any = root.get("zero_stage")
    if isinstance(stage, Inert) and len(stage.args) == 1:
        stage = stage.args[0]
    if type(stage) is int:
        said["zero_stage"] = stage
    return said


def _as_dict(value: Any) -> dict[Any, Any]:
    found = as_plain(value)
    return found if type(found) is dict else {}


def _numbers(value: Any) -> dict[str, int]:
    return {k: v for k, v in _as_dict(value).items() if type(k) is str and _positive(v)}


def _counts(value: Any) -> tuple[int, ...]:
    values = value if type(value) is list else [value]
    return tuple(values) if all(map(_positive, values)) else ()


def _optimizer_step(
    reader: RankReader, directory: ZipDirectory, state: Mapping[Any, Any]
) -> dict[str, int | str]:
    """Return how often the optimizer has stepped, where it says so: files of one save agree."""
    inner: Any = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    if type(inner) is list and inner:
        inner = inner[0]
    states: Any = inner.get("state") if type(inner) in (dict, InertDict) else None
    held: Any = next(iter(states.values()), None) if type(states) in (dict, InertDict) else None
    step: Any = held.get("step") if type(held) in (dict, InertDict) else None
    if isinstance(step, Inert) and directory.checksums:
        contents = Contents(reader, directory, 0)
        contents.add("step", step)
        step = _number(directory, contents.tensors.get("step"))
    return {"optimizer_step": step} if type(step) is int else {}


def _number(directory: ZipDirectory, stored: Stored | None) -> int | None:
    if stored is None or stored.spec.shape or stored.nbytes > _MAX_NUMBER_NBYTES:
        return None
    data = directory.read_entry(f"data/{stored.key}", max_nbytes=_MAX_NUMBER_NBYTES)
    form = {"F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}.get(stored.spec.dtype.name)
    at = stored.spec.storage_offset * stored.spec.dtype.itemsize
    value = struct.unpack_from(form, data, at)[0] if form else math.nan
    return int(value) if math.isfinite(value) else None


def as_plain(value: Any, depth: int = 16) -> Any:
    """Return dicts, lists, tuples, numbers and texts as they are, None in the place of all else."""
    if depth == 0:
        return None
    if type(value) in (dict, InertDict):
        return {k: as_plain(v, depth - 1) for k, v in value.items()}
    if type(value) in (list, tuple, InertSize):
        made: Sequence[Any] = [as_plain(v, depth - 1) for v in value]
        return made
    return value if type(value) in (int, float, bool, str) else None
