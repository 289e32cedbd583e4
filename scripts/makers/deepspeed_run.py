"""Trains a small model under DeepSpeed on CPUs and saves it: ``PYTHON deepspeed_run.py OUT KIND``.

KIND is a stage of ZeRO, ``init`` (stage 3 of a model that zero.Init cut while it was made) or ``mics``
(cut within groups of two of four ranks; up to DeepSpeed 0.16). PYTHON is an interpreter with torch and
deepspeed (any from 0.14 on), for streamconv needs neither.
OUT/checkpoint is what DeepSpeed wrote, OUT/truth.pt the weights as the engine itself gave them out
before that: fp32 masters of what was trained, everything else as it was.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

STEPS = 2
SHARING = 2


class Model(nn.Module):
    """Odd shapes, a shared and a frozen parameter, buffers of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 13)
        self.b = nn.Linear(13, 7, bias=False)
        self.c = nn.Linear(7, 13)
        self.c.weight = self.a.weight
        self.still = nn.Linear(7, 7)
        self.still.requires_grad_(requires_grad=False)
        self.norm = nn.LayerNorm(7)
        self.register_buffer("count", torch.tensor(12345678901))
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a loss."""
        h = self.b(torch.tanh(self.a(x))) + self.b(torch.tanh(self.c(x)))
        return self.norm(h + self.still(x)).float().pow(3).mean()


def import_deepspeed() -> Any:
    """Import deepspeed, for which newer releases of torch lack two names; nothing is compiled."""
    import torch.distributed.elastic.agent.server.api as api

    for name in ("log", "_get_socket_with_port"):
        if not hasattr(api, name):
            setattr(api, name, logging.getLogger("elastic"))
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    importlib.import_module("deepspeed.comm.torch")
    backend: Any = sys.modules["deepspeed.comm.torch"]  # its package has a torch of another kind
    if hasattr(backend, "build_shm_op"):
        backend.build_shm_op = lambda: None
    backend.TorchBackend.all_gather_coalesced = _gather_one_by_one
    type(get_accelerator()).communication_backend_name = lambda _: "gloo"
    return deepspeed


class _Done:
    def wait(self) -> None:
        """Do nothing."""


def _gather_one_by_one(
    _: Any, whole: list[torch.Tensor], parts: list[torch.Tensor], group: Any = None, **__: Any
) -> _Done:
    """Do what MiCS does in one call, which gloo has not."""
    for output, part in zip(whole, parts, strict=True):
        torch.distributed.all_gather_into_tensor(output, part, group=group)
    return _Done()


def work(rank: int, out: str, kind: str, ranks: int, port: int) -> None:
    """Be one rank."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    deepspeed = import_deepspeed()
    deepspeed.init_distributed("gloo")
    stage = int(kind) if kind.isdecimal() else 3
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "steps_per_print": 1000,
    }
    made: Any = contextlib.nullcontext()
    if kind == "mics":
        config["zero_optimization"]["mics_shard_size"] = SHARING
        made = deepspeed.zero.MiCS_Init(config_dict_or_path=config)
    elif kind == "init":
        made = deepspeed.zero.Init(config_dict_or_path=config)
    torch.manual_seed(3)
    with made:
        model = Model()
    with torch.no_grad():
        for parameter in model.parameters() if kind.isdecimal() else ():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim > 1) == two]} for two in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    torch.manual_seed(rank)
    for _ in range(STEPS):
        engine.backward(engine(torch.randn(2, 7).bfloat16()))
        engine.step()
    truth = weights(deepspeed, engine, stage)
    engine.save_checkpoint(f"{out}/checkpoint")
    if rank == 0:
        torch.save(truth, f"{out}/truth.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def weights(deepspeed: Any, engine: Any, stage: int) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer by all its names, masters in fp32."""
    from deepspeed.utils import safe_get_full_fp32_param

    found: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        gathered = (
            deepspeed.zero.GatheredParameters([parameter])
            if stage == 3
            else contextlib.nullcontext()
        )
        with gathered:
            value = parameter.detach().clone()
        master = None
        if parameter.requires_grad:
            master = safe_get_full_fp32_param(parameter) if stage else unsharded(engine, parameter)
        found[name] = value if master is None else master.detach().clone().reshape(value.shape)
    return found | {n: b.detach().clone() for n, b in engine.module.named_buffers()}


def unsharded(engine: Any, parameter: torch.Tensor) -> torch.Tensor | None:
    """Return the master of a parameter in stage 0."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups"):
        from deepspeed.utils import safe_get_full_fp32_param

        found: torch.Tensor | None = safe_get_full_fp32_param(parameter)
        return found
    pairs = (
        zip(narrow, wide, strict=True)
        for narrow, wide in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    )
    return next((w for group in pairs for n, w in group if n is parameter), None)


def main() -> None:
    """Start the ranks."""
    out, kind = sys.argv[1:]
    ranks = 2 * SHARING if kind == "mics" else SHARING
    Path(out).mkdir(parents=True, exist_ok=True)
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    torch.multiprocessing.start_processes(
        work, args=(out, kind, ranks, port), nprocs=ranks, start_method="spawn"
    )


if __name__ == "__main__":
    main()
