"""Folders as DeepSpeed writes them, made without DeepSpeed: its arithmetic in a few lines, for tests.

What is written is known by real files (DeepSpeed 0.12 to 0.19); here only the cutting is modelled, so
that any shapes, ranks and groups can be tried. Nothing of streamconv is used.
"""

from __future__ import annotations

import enum
import math
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TAG = "global_step3"
Tensors = Mapping[str, torch.Tensor]


@dataclass
class Run:
    """What is saved: ``groups`` of fp32 masters, one for each parameter group of the optimizer.

    ``frozen`` and ``buffers`` have no masters; ``shared`` maps other names to stored ones. ``aligned``
    leaves gaps between parameters (``parameter_alignment``), ``kept_padding`` is BF16_Optimizer's way,
    ``sub_group`` the most elements of a sub-group of stage 3, ``flat`` FP16_Optimizer's masters of
    stage 0. ``client`` is the trainer's own state.
    """

    groups: Sequence[Tensors]
    stage: int = 2
    ranks: int = 2
    dtype: torch.dtype = torch.bfloat16
    frozen: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    aligned: bool = False
    kept_padding: bool = False
    sub_group: int = 1 << 40
    flat: bool = False
    client: Mapping[str, Any] = field(default_factory=dict)
    version: str = "0.19.8"
    steps: int = 3
    legacy: bool = False

    @property
    def truth(self) -> dict[str, torch.Tensor]:
        """Return what must come out."""
        found = {n: t for g in self.groups for n, t in g.items()}
        found |= {**self.frozen, **self.buffers}
        return found | {alias: found[name] for alias, name in self.shared.items()}


def write(run: Run, root: Path) -> Path:
    """Write the checkpoint into ``root`` and return the folder of its tag."""
    folder = root / TAG
    folder.mkdir(parents=True)
    for rank in range(run.ranks):
        if run.stage == 3 or rank == 0:
            name = f"zero_pp_rank_{rank}_" if run.stage == 3 else ""
            save(_model(run, rank), folder / f"{name}mp_rank_00_model_states.pt", run.legacy)
        if run.stage:
            path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            save(_optimizer(run, rank), path, run.legacy)
    (root / "latest").write_text(TAG)
    return folder


EXPERTS = "deepspeed_moe.experts.deepspeed_experts"


def write_experts(
    root: Path, dense: Tensors, layers: Sequence[Sequence[Tensors]], ranks: int, ep: int
) -> dict[str, torch.Tensor]:
    """Write a run of deepspeed.moe in stage 2, and return what must come out.

    ``layers`` has for each MoE layer all experts, of which each of ``ep`` expert ranks has as many.
    """
    folder = root / TAG
    folder.mkdir(parents=True)
    run = Run([dense], ranks=ranks)
    local = [
        {
            f"moe{k}.{EXPERTS}.{j}.{name}": tensor
            for k, experts in enumerate(layers)
            for j, expert in enumerate(experts[e * len(experts) // ep :][: len(experts) // ep])
            for name, tensor in expert.items()
        }
        for e in range(ep)
    ]
    model = _model(run, 0)
    model["param_shapes"].append(OrderedDict((n, tuple(t.shape)) for n, t in local[0].items()))
    model["num_experts"] = [len(experts) for experts in layers]
    save(model, folder / "mp_rank_00_model_states.pt")
    truth = dict(dense)
    for k, experts in enumerate(layers):
        for number, expert in enumerate(experts):
            named = {f"moe{k}.{EXPERTS}.{number}.{n}": t for n, t in expert.items()}
            truth |= named
            halves = OrderedDict((n, t.to(run.dtype)) for n, t in named.items())
            save(halves, folder / f"layer_{k}_expert_{number}_mp_rank_00_model_states.pt")
    sharing = Run([], ranks=ranks // ep)
    for rank in range(ranks):
        held = _optimizer(run, rank)
        state = held["optimizer_state_dict"]
        piece, _ = _cut(sharing, local[rank % ep], rank // ep)
        state["single_partition_of_fp32_groups"].append(piece)
        state["partition_count"].append(ranks // ep)
        save(held, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return truth


def save(value: object, path: Path, legacy: bool = False) -> None:
    """Write a file as torch.save does; ``legacy`` without a zip."""
    with deepspeed_names():
        torch.save(value, path, _use_new_zipfile_serialization=not legacy)


def _model(run: Run, rank: int) -> dict[str, Any]:
    whole = {n: t.to(run.dtype) for g in run.groups for n, t in g.items()}
    module: OrderedDict[str, torch.Tensor] = OrderedDict()
    if run.stage == 3:
        module |= {n: torch.empty(0, dtype=run.dtype) for n in {**whole, **run.frozen}}
    else:
        module |= {**_in_one_storage(whole), **run.frozen}
        module |= {alias: module[name] for alias, name in run.shared.items() if name in module}
    module |= run.buffers
    model: dict[str, Any] = {
        "module": module,
        "buffer_names": list(run.buffers),
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "shared_params": None,
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": run.steps,
        "dp_world_size": run.ranks,
        "mp_world_size": 1,
        "ds_config": {"steps_per_print": math.inf},
        "ds_version": run.version,
        **run.client,
    }
    if run.stage:
        groups = _sub_groups(run) if run.stage == 3 else run.groups
        model["param_shapes"] = [OrderedDict((n, t.shape) for n, t in g.items()) for g in groups]
        model["shared_params"] = dict(run.shared) if rank == 0 else {}
    else:
        groups = [[*g.values()] for g in run.groups]
        joined = [torch.cat([t.reshape(-1) for t in g]) for g in groups]
        key = "fp32_groups_flat" if run.flat else "fp32_groups"
        model["optimizer"] = {key: joined if run.flat else groups}
    if run.stage >= 2:
        shapes = OrderedDict((n, t.shape) for n, t in run.frozen.items())
        cut = {n: _share(t, rank, run.ranks) for n, t in run.frozen.items()}
        model["frozen_param_shapes"] = shapes
        model["frozen_param_fragments"] = OrderedDict(cut if run.stage == 3 else run.frozen)
    return model


def _in_one_storage(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors as views of one flat storage, which is larger than they are."""
    flat = torch.cat([*(t.reshape(-1) for t in tensors.values()), torch.zeros(7)])
    flat = flat.to(next(iter(tensors.values())).dtype) if tensors else flat
    made, at = {}, 0
    for name, tensor in tensors.items():
        made[name] = flat[at : at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()
    return made


def _optimizer(run: Run, rank: int) -> dict[str, Any]:
    state: dict[str, Any] = {"overflow": False, "loss_scaler": LossScaler(1.0)}
    if run.stage == 3:
        state["fp32_flat_groups"] = [
            torch.cat([_share(t, rank, run.ranks) for t in g.values()]) for g in _sub_groups(run)
        ]
        state["partition_count"] = run.ranks
        state["zero_stage"] = ZeroStageEnum(3)
    else:
        cut = [_cut(run, g, rank) for g in run.groups]
        state["single_partition_of_fp32_groups"] = [piece for piece, _ in cut]
        state["partition_count"] = [run.ranks] * len(run.groups)
        if run.aligned:
            state["param_alignment_paddings"] = [gaps for _, gaps in cut]
        if not run.kept_padding:
            state["zero_stage"] = ZeroStageEnum(run.stage)
    # Moments, so that the masters are not the first record of the file.
    moments = {"step": torch.tensor(float(run.steps)), "exp_avg": torch.zeros(3)}
    key = "optimizer_state_dict" if run.stage == 3 else "base_optimizer_state"
    state[key] = {"state": {0: moments}, "param_groups": []}
    return {"optimizer_state_dict": state, "ds_config": {}, "ds_version": run.version}


def _share(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """Stage 3: a rank's part of one parameter, zeros behind the end."""
    each = math.ceil(tensor.numel() / ranks)
    padded = torch.zeros(each * ranks, dtype=tensor.dtype)
    padded[: tensor.numel()] = tensor.reshape(-1)
    return padded[rank * each : (rank + 1) * each].clone()


def _cut(run: Run, group: Tensors, rank: int) -> tuple[torch.Tensor, list[int]]:
    """Stages 1 and 2: a rank's part of a group, and the gaps behind each parameter."""
    pieces: list[torch.Tensor] = []
    gaps: list[int] = []
    offset = 0
    every = 16 // math.gcd(16, run.dtype.itemsize)
    for k, tensor in enumerate(group.values()):
        offset += tensor.numel()
        gap = -offset % every if run.aligned and k + 1 < len(group) else 0
        offset += gap
        gaps.append(gap)
        pieces += [tensor.reshape(-1), torch.full((gap,), 7.0)]
    total = math.ceil(offset / (2 * run.ranks)) * 2 * run.ranks
    flat = torch.cat([*pieces, torch.zeros(total - offset)])
    each = total // run.ranks
    end = total if run.kept_padding else offset
    return flat[rank * each : max(rank * each, min((rank + 1) * each, end))].clone(), gaps


def _sub_groups(run: Run) -> list[dict[str, torch.Tensor]]:
    made: list[dict[str, torch.Tensor]] = []
    for group in run.groups:
        size = run.sub_group
        for name, tensor in group.items():
            if size >= run.sub_group:
                made.append({})
                size = 0
            made[-1][name] = tensor
            size += tensor.numel()
    return made


class LossScaler:
    """DeepSpeed's, by its name in the files."""

    def __init__(self, scale: float) -> None:
        self.cur_scale = scale


class ZeroStageEnum(int, enum.Enum):
    """DeepSpeed's, by its name in the files."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


_NAMES = {
    LossScaler: "deepspeed.runtime.fp16.loss_scaler",
    ZeroStageEnum: "deepspeed.runtime.zero.config",
}


@contextmanager
def deepspeed_names() -> Iterator[None]:
    """Let the classes here be pickled as DeepSpeed's own."""
    before = {kind: kind.__module__ for kind in _NAMES}
    added = []
    try:
        for kind, module in _NAMES.items():
            kind.__module__ = module
            parts = module.split(".")
            for name in (".".join(parts[:k]) for k in range(1, len(parts) + 1)):
                if name not in sys.modules:
                    sys.modules[name] = types.ModuleType(name)
                    added.append(name)
            setattr(sys.modules[module], kind.__name__, kind)
        yield
    finally:
        for kind, module in before.items():
            kind.__module__ = module
        for module in added:
            del sys.modules[module]
