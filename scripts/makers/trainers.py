"""Checkpoints by the trainers' own saving functions: ``PYTHON -m scripts.makers.trainers OUT NAME…``.

PYTHON is an interpreter with the library of each NAME, for streamconv needs none of them. OUT/NAME is
what the library wrote of a tiny model, OUT/truth and OUT/truth_moe the models as transformers saves
them. What the interpreter lacks is passed over. Where ranks write, two processes on gloo do.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import StateDictType, fully_shard

from scripts.makers.layouts import tiny_llama, tiny_moe

RANKS = 2
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}

Maker = Callable[[Path], None]


def _cut(model: Any) -> Any:
    """Cut a model among the ranks as trainers do with FSDP2."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("dp",))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _torch_writer(out: Path) -> None:
    writer = HuggingFaceStorageWriter(str(out), save_distributed=True)
    dcp.save(get_model_state_dict(_cut(tiny_llama())), storage_writer=writer)


def _torch_consolidated(out: Path) -> None:
    writer = HuggingFaceStorageWriter(str(out), save_distributed=True, enable_consolidation=True)
    dcp.save(get_model_state_dict(_cut(tiny_llama())), storage_writer=writer)


def _torch_dcp(out: Path) -> None:
    dcp.save({"app": {"model": get_model_state_dict(_cut(tiny_llama()))}}, checkpoint_id=out)


def _transformers_distributed(out: Path) -> None:
    # What save_pretrained(distributed_checkpoint=True) comes to, for a model that from_pretrained cut.
    from transformers.distributed.checkpoint import _save_model_checkpoint_distributed

    model = tiny_moe()
    model.config.save_pretrained(out)
    _save_model_checkpoint_distributed(_cut(model), out)


def _accelerate(kind: StateDictType, **options: Any) -> Maker:
    def make(out: Path) -> None:
        from accelerate import PartialState
        from accelerate.utils.fsdp_utils import save_fsdp_model

        PartialState(cpu=True)
        model = tiny_llama()
        if options.get("adapter_only"):
            model = _adapted(model)
        plugin = SimpleNamespace(
            fsdp_version=2, state_dict_type=kind, state_dict_config=SimpleNamespace()
        )
        accelerator = SimpleNamespace(
            num_processes=RANKS,
            process_index=dist.get_rank(),
            is_main_process=dist.get_rank() == 0,
            wait_for_everyone=dist.barrier,
        )
        save_fsdp_model(plugin, accelerator, _cut(model), str(out), **options)

    return make


def _adapted(model: Any) -> Any:
    import peft

    torch.manual_seed(2)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return adapted


def _peft(out: Path) -> None:
    _adapted(tiny_llama()).save_pretrained(out)


def _transformers_bin(out: Path) -> None:
    out.mkdir(parents=True)
    torch.save(tiny_llama().state_dict(), out / "pytorch_model.bin")


def _lightning(out: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.llm = tiny_llama()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.llm(batch).logits.float().sum() * 0.0

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.llm.parameters(), lr=0.0, weight_decay=0.0)

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=2,
        default_root_dir=out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(out, save_last=True)],
    )
    ids = torch.zeros(2, 3, dtype=torch.long)
    trainer.fit(Module(), torch.utils.data.DataLoader(list(ids), batch_size=1))


def _lightning_fabric(out: Path) -> None:
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = tiny_llama()
    fabric.save(out / "step-2.ckpt", {"model": model, "step": 2})


ALONE: Mapping[str, tuple[str, Maker]] = {
    "lightning": ("lightning", _lightning),
    "lightning_fabric": ("lightning", _lightning_fabric),
    "peft": ("peft", _peft),
    "transformers_bin": ("transformers", _transformers_bin),
}
"""What one process makes: the module that it needs, and how."""

TOGETHER: Mapping[str, tuple[str, Maker]] = {
    "accelerate_dcp": ("accelerate", _accelerate(StateDictType.SHARDED_STATE_DICT)),
    "accelerate_full": ("accelerate", _accelerate(StateDictType.FULL_STATE_DICT)),
    "accelerate_peft": (
        "accelerate",
        _accelerate(StateDictType.SHARDED_STATE_DICT, adapter_only=True),
    ),
    "accelerate_ranks": (
        "accelerate",
        _accelerate(StateDictType.SHARDED_STATE_DICT, use_dcp=False),
    ),
    "torch_consolidated": ("torch", _torch_consolidated),
    "torch_dcp": ("torch", _torch_dcp),
    "torch_writer": ("torch", _torch_writer),
    "transformers_distributed": ("transformers", _transformers_distributed),
}
"""What two ranks make."""

MAKERS = {**ALONE, **TOGETHER}


def can(name: str) -> bool:
    """Whether this interpreter has the library of a maker."""
    return find_spec(MAKERS[name][0]) is not None


def make(out: Path, names: Iterable[str]) -> None:
    """Make each of ``names`` in a folder of its own below ``out``."""
    warnings.simplefilter("ignore")
    for name in sorted(set(names) & ALONE.keys()):
        ALONE[name][1](out / name)
    together = sorted(set(names) & TOGETHER.keys())
    if together:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(_rank, args=(port, out, together), nprocs=RANKS)


def _rank(rank: int, port: int, out: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    dist.init_process_group("gloo")
    for name in names:
        TOGETHER[name][1](out / name)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Make what the command line names, all without names, as far as it can be made here."""
    out, names = Path(sys.argv[1]), sys.argv[2:]
    names = [n for n in names or MAKERS if can(n)]
    out.mkdir(parents=True, exist_ok=True)
    tiny_llama().save_pretrained(out / "truth")
    tiny_moe().save_pretrained(out / "truth_moe")
    make(out, names)


if __name__ == "__main__":
    main()
