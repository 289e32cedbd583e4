"""Writes torch_dist checkpoint folders, as Megatron-LM and verl do, with torch's own DCP writer.

    OUT/global_step_1/actor/dist_ckpt/     .metadata, __R_T.distcp, metadata.json, common.pt
    OUT/global_step_1/actor/huggingface/   config.json, no weights

The ranks of a real run write in one process here, one plan after the other: the planner, the
records and the metadata are torch's, only the process group is missing. Beside the weights go the
records that a converter must leave alone: extra states, random states, an optimizer.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from scripts.makers.megatron_inverse import Walk, invert
from scripts.makers.tiny_families import State, TinyModel

Flavour = Literal["stacked", "per layer", "singleton"]
FLAVOURS: tuple[Flavour, ...] = ("stacked", "per layer", "singleton")

NUMBERED = re.compile(r"^(.*?\b(?:(?:decoder|mtp)\.layers|deepstack_merger_list)\.)(\d+)\.(.*)$")
EXPERTS = ".mlp.experts.experts."


class NotStackable(ValueError):
    """The layers differ, so that Megatron itself would write them one by one."""


# Flavours


def flavoured(walk: Walk, flavour: Flavour) -> State:
    """Return the tensors under the keys of a flavour; ``walk.made`` is the per-layer one."""
    if flavour == "stacked":
        return stacked(walk.made)
    if flavour == "singleton":
        return dict(singleton(walk))
    return dict(walk.made)


def stacked(per_layer: State) -> State:
    """Stack the layers of each block on a new first axis.

    A block whose layers differ stays as it is, as in megatron-core; NotStackable if all do, and for the
    blocks of a HybridModel.
    """
    if "decoder.final_norm.weight" in per_layer:
        raise NotStackable("each layer of a HybridModel is a block of its own")
    blocks: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for key, tensor in per_layer.items():
        if match := NUMBERED.match(key):
            block, index, rest = match.groups()
            blocks.setdefault(block, {}).setdefault(rest, {})[int(index)] = tensor
    alike = {block for block, keys in blocks.items() if _alike(list(keys.values()))}
    if not alike:
        raise NotStackable(f"the layers differ in {sorted(blocks)}")
    result: State = {}
    for key, tensor in per_layer.items():
        match = NUMBERED.match(key)
        if match is None or match[1] not in alike:
            result[key] = tensor
        elif match[1] + match[3] not in result:
            layers = blocks[match[1]][match[3]]
            result[match[1] + match[3]] = torch.stack([layers[i] for i in sorted(layers)])
    return result


def _alike(keys: list[dict[int, torch.Tensor]]) -> bool:
    return all(
        layers.keys() == keys[0].keys() and len({t.shape for t in layers.values()}) == 1
        for layers in keys
    )


def singleton(walk: Walk) -> Iterator[tuple[str, torch.Tensor]]:
    """Every expert under a key of its own, gate and up rows under ``_w`` and ``_v``."""
    for key, tensor in walk.made.items():
        pieces = {key: tensor}
        if EXPERTS in key:
            front, back = key.split(EXPERTS)
            pieces = {f"{front}{EXPERTS}{e}.{back}": t for e, t in enumerate(tensor)}
        for name, piece in pieces.items():
            if key in walk.gated:
                gate, up = piece.chunk(2)
                yield name + "_w", gate
                yield name + "_v", up
            else:
                yield name, piece


# How a run of several ranks cuts the tensors

COLUMN = re.compile(
    r"(linear_qkv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj|linear_fc1|in_proj"
    r"|word_embeddings|output_layer|eh_proj)\.(weight|bias)"
)
ROW = re.compile(r"(linear_proj|linear_fc2|out_proj)\.weight$")


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor and the rank that writes it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    rank: int


@dataclass(frozen=True, slots=True)
class Parallel:
    """Sizes of the run. Expert parallel ranks are tensor parallel ranks too."""

    tensor: int = 2
    pipeline: int = 2

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline

    def cut(self, key: str, shape: tuple[int, ...], *, gated: bool) -> list[Piece]:
        """Return the boxes of a tensor: layers and experts singly, rows or columns over ranks."""
        numbered = bool(re.search(r"\b(layers|deepstack_merger_list)\.\d", key))
        lead = [] if numbered or not re.search(r"\b(layers|merger_list)\.", key) else [shape[0]]
        if EXPERTS in key and not re.search(r"experts\.experts\.\d", key):
            lead.append(shape[len(lead)])
        body = shape[len(lead) :]
        axis = None
        if COLUMN.search(key):
            axis = 0
        elif ROW.search(key):
            axis = 1
        pieces = []
        for outer in _indices(lead):
            for begin, size, rank in self._spans(body, axis, gated=gated):
                offsets, sizes = [0] * len(body), list(body)
                if axis is not None:
                    offsets[axis], sizes[axis] = begin, size
                pieces.append(
                    Piece(
                        (*outer, *offsets),
                        (*(1 for _ in outer), *sizes),
                        (sum(outer) % self.pipeline) * self.tensor + rank,
                    )
                )
        return pieces

    def _spans(
        self, body: tuple[int, ...], axis: int | None, *, gated: bool
    ) -> Iterator[tuple[int, int, int]]:
        """Begin, length and rank of each stretch of the cut axis."""
        if axis is None:
            yield 0, 0, 0
            return
        halves = 2 if gated else 1
        length = body[axis] // halves
        ranks = self.tensor if length % self.tensor == 0 else 1
        size = length // ranks
        for half in range(halves):
            for rank in range(ranks):
                yield half * length + rank * size, size, rank


def _indices(lead: list[int]) -> Iterator[tuple[int, ...]]:
    if not lead:
        yield ()
        return
    for first in range(lead[0]):
        for rest in _indices(lead[1:]):
            yield (first, *rest)


# Writing


def tensor_item(key: str, tensor: torch.Tensor, piece: Piece) -> WriteItem:
    offsets, sizes = torch.Size(piece.offsets), torch.Size(piece.sizes)
    return WriteItem(
        index=MetadataIndex(key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties.create_from_tensor(tensor),
            size=tensor.shape,
        ),
    )


class Resolver:
    """The part of a SavePlanner that the writer asks for the bytes of an item."""

    def __init__(self, tensors: State, objects: dict[str, Any]) -> None:
        self.tensors = tensors
        self.objects = objects

    def resolve_data(self, item: WriteItem) -> torch.Tensor | io.BytesIO:
        key = item.index.fqn
        if item.tensor_data is None:
            buffer = io.BytesIO()
            torch.save([self.objects[key]], buffer)
            return buffer
        chunk = item.tensor_data.chunk
        box = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        return self.tensors[key][box].contiguous().clone()


def write_dcp(
    folder: Path,
    tensors: State,
    cuts: dict[str, list[Piece]],
    objects: dict[str, Any],
    *,
    world: int,
    threads: int = 2,
) -> None:
    """Write a DCP folder; ``cuts`` says the boxes of each tensor and who writes them."""
    items: list[list[WriteItem]] = [[] for _ in range(world)]
    for key, tensor in tensors.items():
        for piece in cuts[key]:
            items[piece.rank].append(tensor_item(key, tensor, piece))
    for number, key in enumerate(objects):
        item = WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO)
        items[number % world].append(item)
    writer = FileSystemWriter(folder, thread_count=threads, sync_files=False)
    plans = [writer.prepare_local_plan(SavePlan(rank_items)) for rank_items in items]
    plans, metadata = create_default_global_save_plan(plans)
    metadata.all_local_plans = plans  # type: ignore[attr-defined]  # as megatron-core has it
    plans = writer.prepare_global_plan(plans)
    resolver = cast("SavePlanner", Resolver(tensors, objects))
    results = [writer.write_data(plan, resolver).wait() for plan in plans]
    metadata.storage_meta = writer.storage_meta()
    writer.finish(metadata, results)


@dataclass
class Options:
    """How a checkpoint is written; tests change tensors between inverse and folder."""

    flavour: Flavour = "per layer"
    parallel: Parallel = field(default_factory=Parallel)
    common: Literal["file", "record"] = "file"
    """Where the state that is no tensor lies: common.pt, or from megatron-core 0.19 in the folder."""
    noise: bool = True


def save(
    root: Path, config: dict[str, Any], walk: Walk, options: Options, tensors: State | None = None
) -> Path:
    """Write the checkpoint in verl's layout and return ``global_step_1/actor``.

    ``tensors`` are written instead of the walk's own.
    """
    if tensors is None:
        tensors = flavoured(walk, options.flavour)
    gated = walk.gated | {NUMBERED.sub(r"\1\3", key) for key in walk.gated}
    cuts = {
        key: options.parallel.cut(key, tuple(tensor.shape), gated=key in gated)
        for key, tensor in tensors.items()
    }
    objects: dict[str, Any] = {}
    if options.noise:
        tensors, objects = noisy(tensors)
        cuts |= {
            key: [Piece((0,) * t.ndim, tuple(t.shape), 0)]
            for key, t in tensors.items()
            if key not in cuts
        }
    common = {"iteration": 1, "checkpoint_version": 3.0, "optimizer": {"param_groups": []}}
    if options.common == "record":
        objects["common_state/shard_0_1"] = common
    actor = root / "global_step_1" / "actor"
    folder = actor / "dist_ckpt"
    folder.mkdir(parents=True)
    write_dcp(folder, tensors, cuts, objects, world=options.parallel.world)
    words: dict[str, Any] = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    if options.common == "file":
        torch.save(common, folder / "common.pt")
        words |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(words))
    (actor / "huggingface").mkdir()
    (actor / "huggingface" / "config.json").write_text(json.dumps(config, indent=2))
    (root / "latest_checkpointed_iteration.txt").write_text("1")
    return actor


def noisy(tensors: State) -> tuple[State, dict[str, Any]]:
    """Return the tensors with an optimizer's beside them, and objects that are no weights."""
    weights = [key for key in tensors if key.endswith("weight")][:3]
    more = {
        f"optimizer.state.{state}.{key}": tensors[key].float() + 1
        for key in weights
        for state in ("fp32_param", "exp_avg")
    }
    bucket = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32)"
    more[f"{bucket}.bucket_idx_0.param"] = torch.zeros(12)
    objects = {
        "rng_state/shard_0.0_1.1": torch.zeros(4, dtype=torch.uint8),
        "decoder.layers.self_attention.core_attention._extra_state/shard_0_2": io.BytesIO(),
        "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_0.1_2.5": None,
        "output_layer._extra_state/shard_0_1": torch.empty(0, dtype=torch.uint8),
        "optimizer.distributed.dp_group_idx_0.per_bucket_numel/shard_0_1": [{"a": [12]}],
    }
    return tensors | more, objects


def save_family(root: Path, model: TinyModel, options: Options, **inverse: Any) -> Path:
    """Invert a tiny model and write it; raises NotStackable for layers that differ."""
    return save(root, model.config, invert(model.config, model.state, **inverse), options)
