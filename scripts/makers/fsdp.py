"""Makes checkpoint folders with real torch.distributed on gloo, as verl's manager does.

``python -m scripts.makers.fsdp OUT [NAME...]`` makes the recipes (default: all of them), each as

    OUT/NAME/actor/                   what a converter is given
        model_world_size_N_rank_R.pt
        fsdp_config.json
        huggingface/                  config, generation config, tokenizer, chat template
    OUT/NAME/truth/state.safetensors  the unsharded model's own state dict, names as in memory
    OUT/NAME/truth/hf/                the unsharded model's save_pretrained, names as on the Hub
    OUT/NAME/dcp/                     the same by torch.distributed.checkpoint, of some recipes
    OUT/NAME/oracle.json              what torch itself said of each tensor, see ``check``

The truth is written from the unsharded model before anything is sharded, and the ranks read their
own files back with torch.load and gather every tensor: a checkpoint that does not give the truth
in torch's own hands fails while it is made.

One process imports torch and transformers, builds the models and forks the ranks of each world
size, so that the whole matrix costs seconds. ``make_all`` starts that process anew, because
forking one that runs threads (pytest-xdist, OpenMP) can deadlock.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

REPOSITORY = Path(__file__).resolve().parents[2]

LORA_RANK, LORA_ALPHA = 4, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one checkpoint is made."""

    name: str
    world: int
    shard: Literal["fsdp1", "fsdp1-sharded-tensor", "fsdp2", "whole", "pieces"]
    arch: str = "dense"
    dtype: str = "float32"
    mesh: tuple[tuple[str, int], ...] = ()
    """Names and sizes of the mesh dimensions; by default one of the whole world, "fsdp"."""
    use_orig_params: bool = True
    placement: bool = False
    """Shard by verl's shard_placement_fn: the first dimension that the world divides."""
    norms: Literal["outside", "replicated"] = "outside"
    """Whether the tensor parallel plan leaves norms out or holds them as replicated."""
    buffers: Literal["", "odd", "complex128"] = ""
    frozen_norms: bool = False
    """FSDP2's ignored_params: these stay plain tensors on every rank."""
    parameters: bool = False
    """Save nn.Parameter objects (``state_dict(keep_vars=True)``), not bare tensors."""
    lora: Literal["", "all", "only"] = ""
    """Adapters beside the base model's weights, or the adapters' weights alone."""
    adapter: Literal["", "dora", "saved", "rslora", "embedding"] = ""
    """DoRA; lm_head trained whole (modules_to_save); rsLoRA's scale; the embedding adapted, too."""
    cuda: Literal["", "mesh", "all"] = ""
    """Files as GPUs write them: verl's FSDP1 offloads first, so only its mesh says cuda; FSDP2
    says it everywhere, and so does a ShardedTensor that was not offloaded."""
    crc: bool = True
    dcp: bool = False
    """Also the same state dict, below a trainer's key and beside an optimizer, as torch's DCP."""
    trainer_files: bool = False
    """Also optim_ and extra_state_ files, which hold no weights."""
    fsdp_config: bool = True
    """Old checkpoints have no fsdp_config.json."""

    @property
    def mesh_dims(self) -> dict[str, int]:
        """The mesh dimensions in order."""
        return dict(self.mesh) or {"fsdp": self.world}

    @property
    def model_key(self) -> str:
        """What tells apart the unsharded models that recipes start from."""
        lora = self.lora and f"lora{self.adapter}"
        return "-".join(filter(None, (self.arch, self.dtype, self.buffers, lora)))


@dataclass(frozen=True, slots=True)
class Made:
    """A checkpoint made by a recipe, and its truth (None where no truth can be written)."""

    recipe: Recipe
    source: Path
    dcp: Path | None
    truth_state: Path | None
    """state.safetensors with the names in memory."""
    truth_hf: Path | None
    """A save_pretrained folder; of the merged model where there are adapters."""
    truth_adapter: Path | None
    """A save_pretrained folder of the adapter alone."""
    oracle: dict[str, dict[str, Any]] = field(repr=False)
    """For each tensor what torch said of it: ``kind``, and of a DTensor its mesh, placements
    and the shape of the piece on each rank."""


def _recipes() -> Iterator[Recipe]:
    yield Recipe(name="fsdp1-w1", world=1, shard="fsdp1")
    yield Recipe(name="fsdp2-w1", world=1, shard="fsdp2")

    yield Recipe(name="fsdp2-w2", world=2, shard="fsdp2", dcp=True, trainer_files=True)
    yield Recipe(name="fsdp1-w2", world=2, shard="fsdp1", dtype="float16", fsdp_config=False)
    yield Recipe(name="plain-whole", world=2, shard="whole", fsdp_config=False)
    yield Recipe(name="plain-parameters", world=2, shard="whole", parameters=True)
    for arch in ("llama", "qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "gemma3"):
        yield Recipe(name=f"fsdp2-{arch}", world=2, shard="fsdp2", arch=arch, dtype="bfloat16")

    for arch in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"):
        yield Recipe(name=f"fsdp2-{arch}", world=2, shard="fsdp2", arch=arch, dtype="bfloat16")
    yield Recipe(name="fsdp1-qwen2_5_vl", world=2, shard="fsdp1", arch="qwen2_5_vl")

    yield Recipe(name="fsdp2-w3", world=3, shard="fsdp2", dcp=True)

    yield Recipe(name="fsdp1", world=4, shard="fsdp1", dcp=True, trainer_files=True)
    yield Recipe(name="fsdp1-flat", world=4, shard="fsdp1", use_orig_params=False)
    yield Recipe(name="fsdp1-bf16", world=4, shard="fsdp1", dtype="bfloat16")
    yield Recipe(name="fsdp1-tied", world=4, shard="fsdp1", arch="tied")
    yield Recipe(name="fsdp1-tied-differs", world=4, shard="fsdp1", arch="tied_differs")
    yield Recipe(name="fsdp1-moe", world=4, shard="fsdp1", arch="moe")
    yield Recipe(name="fsdp1-cuda", world=4, shard="fsdp1", cuda="mesh")
    yield Recipe(name="fsdp1-buffers", world=4, shard="fsdp1", buffers="odd")
    sharded: Literal["fsdp1-sharded-tensor"] = "fsdp1-sharded-tensor"
    yield Recipe(name=sharded, world=4, shard=sharded, dcp=True, fsdp_config=False)
    # The score head has one row: ranks 1 to 3 hold no shard of it.
    yield Recipe(name="fsdp1-sharded-tensor-critic", world=4, shard=sharded, arch="critic")
    yield Recipe(name="fsdp1-sharded-tensor-cuda", world=4, shard=sharded, cuda="all")

    ddp2_fsdp2 = (("ddp", 2), ("fsdp", 2))
    fsdp2_tp2 = (("fsdp", 2), ("tp", 2))
    yield Recipe(name="fsdp1-hsdp", world=4, shard="fsdp1", mesh=ddp2_fsdp2)
    yield Recipe(name="fsdp2-hsdp", world=4, shard="fsdp2", dcp=True, mesh=ddp2_fsdp2)
    yield Recipe(name="fsdp2-hsdp-flat", world=4, shard="fsdp2", mesh=(("ddp", 4), ("fsdp", 1)))
    yield Recipe(name="fsdp1-tp", world=4, shard="fsdp1", mesh=fsdp2_tp2)
    yield Recipe(name="fsdp2-tp", world=4, shard="fsdp2", dcp=True, mesh=fsdp2_tp2)
    yield Recipe(name="fsdp2-tp-norms", world=4, shard="fsdp2", mesh=fsdp2_tp2, norms="replicated")

    yield Recipe(name="fsdp2", world=4, shard="fsdp2", trainer_files=True)
    yield Recipe(name="fsdp2-bf16", world=4, shard="fsdp2", dtype="bfloat16")
    yield Recipe(name="fsdp2-mixed", world=4, shard="fsdp2", dcp=True, dtype="mixed")
    yield Recipe(name="fsdp2-tied", world=4, shard="fsdp2", dcp=True, arch="tied")
    yield Recipe(name="fsdp2-moe", world=4, shard="fsdp2", arch="moe")
    yield Recipe(name="fsdp2-placement", world=4, shard="fsdp2", placement=True)
    yield Recipe(name="fsdp2-moe-placement", world=4, shard="fsdp2", arch="moe", placement=True)
    yield Recipe(name="fsdp2-buffers", world=4, shard="fsdp2", buffers="odd")
    yield Recipe(name="fsdp2-complex128", world=4, shard="fsdp2", buffers="complex128")
    yield Recipe(name="fsdp2-frozen", world=4, shard="fsdp2", frozen_norms=True)
    yield Recipe(name="fsdp2-parameters", world=4, shard="fsdp2", parameters=True)
    yield Recipe(name="fsdp2-cuda", world=4, shard="fsdp2", dtype="bfloat16", cuda="all")
    yield Recipe(name="fsdp2-no-crc", world=4, shard="fsdp2", crc=False)
    yield Recipe(name="fsdp2-critic", world=4, shard="fsdp2", arch="critic")
    yield Recipe(name="fsdp2-value-head", world=4, shard="fsdp2", arch="value_head")
    yield Recipe(name="fsdp2-lora", world=4, shard="fsdp2", lora="all")
    yield Recipe(name="fsdp2-lora-bf16", world=4, shard="fsdp2", dtype="bfloat16", lora="all")
    yield Recipe(name="fsdp2-lora-only", world=4, shard="fsdp2", lora="only")
    yield Recipe(name="fsdp1-lora", world=2, shard="fsdp1", lora="all")
    yield Recipe(name="fsdp1-lora-only", world=2, shard="fsdp1", lora="only")
    yield Recipe(
        name="fsdp2-lora-tied",
        world=2,
        shard="fsdp2",
        arch="tied",
        lora="all",
        adapter="embedding",
    )
    for adapter in ("dora", "saved", "rslora", "embedding"):
        yield Recipe(
            name=f"fsdp2-lora-{adapter}", world=2, shard="fsdp2", lora="all", adapter=adapter
        )
    yield Recipe(name="fsdp2-lora-conv1d", world=2, shard="fsdp2", arch="gpt2", lora="all")
    yield Recipe(name="plain-pieces", world=4, shard="pieces", fsdp_config=False)

    yield Recipe(name="fsdp2-tp-2x3", world=6, shard="fsdp2", mesh=(("fsdp", 2), ("tp", 3)))

    yield Recipe(name="fsdp1-w8", world=8, shard="fsdp1")
    yield Recipe(name="fsdp1-sharded-tensor-w8", world=8, shard=sharded, dtype="bfloat16")
    yield Recipe(name="fsdp2-w8", world=8, shard="fsdp2", dtype="bfloat16")
    yield Recipe(name="fsdp2-moe-w8", world=8, shard="fsdp2", arch="moe", dtype="bfloat16")
    yield Recipe(name="fsdp2-hsdp-w8", world=8, shard="fsdp2", mesh=(("ddp", 2), ("fsdp", 4)))
    yield Recipe(name="fsdp2-tp-4x2", world=8, shard="fsdp2", mesh=(("fsdp", 4), ("tp", 2)))
    yield Recipe(name="fsdp2-tp-2x4", world=8, shard="fsdp2", mesh=(("fsdp", 2), ("tp", 4)))
    cube = (("ddp", 2), ("fsdp", 2), ("tp", 2))
    yield Recipe(name="fsdp2-hsdp-tp", world=8, shard="fsdp2", mesh=cube)


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _recipes()}


# --- outside: start the process that forks, and read what it made ---------------------------


def make_all(root: Path, names: Iterable[str] | None = None) -> dict[str, Made]:
    """Make the named recipes (all of them by default) under ``root``."""
    command = [sys.executable, "-m", "scripts.makers.fsdp", str(root.resolve()), *(names or ())]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return collect(root)


def collect(root: Path) -> dict[str, Made]:
    """What an earlier ``make_all`` left under ``root``."""
    return {
        name: _made(root, recipe)
        for name, recipe in RECIPES.items()
        if (root / name / "oracle.json").exists()
    }


def _made(root: Path, recipe: Recipe) -> Made:
    folder = root / recipe.name

    def where_there(path: Path) -> Path | None:
        return path if path.exists() else None

    return Made(
        recipe=recipe,
        source=folder / "actor",
        dcp=where_there(folder / "dcp"),
        truth_state=where_there(folder / "truth" / "state.safetensors"),
        truth_hf=where_there(folder / "truth" / "hf"),
        truth_adapter=where_there(folder / "truth" / "adapter"),
        oracle=json.loads((folder / "oracle.json").read_text()),
    )


# --- inside, before the fork: unsharded models and their truth -------------------------------


def main(argv: list[str] | None = None) -> None:
    """Make checkpoints in this process and its forks."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.names) - set(RECIPES)
    if unknown:
        parser.error(f"no such recipe: {', '.join(sorted(unknown))}")
    make_here(arguments.out, [RECIPES[name] for name in arguments.names or RECIPES])


def make_here(root: Path, recipes: list[Recipe]) -> None:
    """Make ``recipes``; the calling process must run no other threads, for it forks."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool does not survive a fork
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo resolves the host's name
    _import_before_fork()
    with tempfile.TemporaryDirectory() as scratch:
        models = {}
        for recipe in recipes:
            prepared = Path(scratch, recipe.model_key)
            if recipe.model_key not in models:
                models[recipe.model_key] = _prepare(recipe, prepared)
            folder = root / recipe.name
            shutil.copytree(prepared / "truth", folder / "truth")
            shutil.copytree(prepared / "actor", folder / "actor")
            if recipe.lora == "only":
                _keep_adapters_only(folder / "truth")
        for world in sorted({recipe.world for recipe in recipes}):
            of_world = [recipe for recipe in recipes if recipe.world == world]
            _fork_world(world, root, of_world, models, Path(scratch, f"store-{world}"))


def _import_before_fork() -> None:
    # Each of these costs a rank half a second or more when it is the one to import it first;
    # nobody calls torch._dynamo, but FSDP2's hooks import it.
    for name in ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"):
        importlib.import_module(name)
    import transformers

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _prepare(recipe: Recipe, out: Path) -> nn.Module:
    """Build the unsharded model; write its truth and the files that are not weights."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    from scripts.makers import models

    buffers = {
        "": None,
        "odd": models.ODD_BUFFERS,
        "complex128": models.COMPLEX128_BUFFERS,
    }[recipe.buffers]
    model = models.build(recipe.arch, dtype=recipe.dtype, buffers=buffers)
    trained: nn.Module = model
    truth, actor = out / "truth", out / "actor"
    truth.mkdir(parents=True)
    if recipe.lora:
        trained = _add_lora(model, recipe)
        _write_lora_truth(trained, truth, actor, recipe)
    elif recipe.buffers != "complex128":  # safetensors has no such dtype
        model.save_pretrained(truth / "hf")
    if recipe.buffers != "complex128":
        # Cloned, because safetensors refuses tensors that share memory.
        state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
        save_file(state, truth / "state.safetensors", {"format": "pt"})

    huggingface = actor / "huggingface"
    model.config.save_pretrained(huggingface)
    if recipe.arch != "critic":
        GenerationConfig(temperature=0.6, top_p=0.95, do_sample=True).save_pretrained(huggingface)
    models.tokenizer().save_pretrained(huggingface)
    return trained


def _add_lora(model: nn.Module, recipe: Recipe) -> nn.Module:
    import peft

    from scripts.makers import models

    targets = ["q_proj", "v_proj", "o_proj", "up_proj"]
    if recipe.arch == "gpt2":  # its Conv1D layers hold their weights transposed
        targets = ["c_attn", "c_proj"]
    settings = peft.LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        target_modules=[*targets, *(["embed_tokens"] if recipe.adapter == "embedding" else [])],
        modules_to_save=["lm_head"] if recipe.adapter == "saved" else None,
        use_dora=recipe.adapter == "dora",
        use_rslora=recipe.adapter == "rslora",
        fan_in_fan_out=recipe.arch == "gpt2",
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, settings)
    dtype = next(model.parameters()).dtype
    adapted.to(dtype)  # peft makes adapters of bf16 models in fp32
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_magnitude" in name:  # norms of rows: positive
                tensor.copy_(tensor * 1.25)
            elif "lora_" in name:  # a fresh lora_B is zero: merging it would prove nothing
                tensor.copy_(models.values(name, tensor.shape, dtype) * 0.05)
            elif "modules_to_save" in name:
                tensor.copy_(models.values(name, tensor.shape, dtype))
    assert isinstance(adapted, nn.Module)
    return adapted


def _write_lora_truth(adapted: Any, truth: Path, actor: Path, recipe: Recipe) -> None:
    adapted.save_pretrained(truth / "adapter")
    copy.deepcopy(adapted).merge_and_unload().save_pretrained(truth / "hf")
    actor.mkdir(parents=True, exist_ok=True)
    meta = {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "task_type": "CAUSAL_LM"}
    (actor / "lora_train_meta.json").write_text(json.dumps(meta))
    if recipe.adapter:  # as verl saves the adapter beside the rank files
        folder = actor / "lora_adapter"
        folder.mkdir()
        shutil.copy(truth / "adapter" / "adapter_config.json", folder)


def _keep_adapters_only(truth: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(truth / "state.safetensors")
    adapters = {name: tensor for name, tensor in state.items() if "lora_" in name}
    save_file(adapters, truth / "state.safetensors", {"format": "pt"})
    shutil.rmtree(truth / "hf")


# --- the ranks -------------------------------------------------------------------------------


def _fork_world(
    world: int, root: Path, recipes: list[Recipe], models: dict[str, nn.Module], store: Path
) -> None:
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=_run_rank, args=(rank, world, root, recipes, models, store))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    running = list(ranks)
    try:
        while running:
            multiprocessing.connection.wait([process.sentinel for process in running])
            for process in [p for p in running if not p.is_alive()]:
                running.remove(process)
                if process.exitcode:
                    raise SystemExit(f"a rank of world {world} failed, see its traceback above")
    finally:
        for process in running:  # they wait for the failed one in a collective
            process.kill()


def _run_rank(
    rank: int,
    world: int,
    root: Path,
    recipes: list[Recipe],
    models: dict[str, nn.Module],
    store: Path,
) -> None:
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # "suboptimal"
    warnings.simplefilter("ignore")  # that FSDP1 and ShardedTensor are deprecated is their point
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=2),
    )
    meshes: dict[tuple[tuple[str, int], ...], DeviceMesh] = {}
    for recipe in recipes:
        dims = tuple(recipe.mesh_dims.items())
        if dims not in meshes:
            names, sizes = zip(*dims, strict=True)
            meshes[dims] = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        try:
            _make_one(recipe, meshes[dims], rank, root / recipe.name, models[recipe.model_key])
        except BaseException:
            print(f"recipe {recipe.name}, rank {rank}:", file=sys.stderr)
            raise
    dist.destroy_process_group()


def _make_one(recipe: Recipe, mesh: DeviceMesh, rank: int, folder: Path, model: nn.Module) -> None:
    truth = model.state_dict(keep_vars=False)
    state = SHARDERS[recipe.shard](copy.deepcopy(model), mesh, recipe)
    if recipe.lora == "only":
        state = {name: value for name, value in state.items() if "lora_" in name}
        truth = {name: value for name, value in truth.items() if "lora_" in name}

    source = folder / "actor"
    path = source / f"model_world_size_{recipe.world}_rank_{rank}.pt"
    if recipe.dcp:
        _save_dcp(state, folder / "dcp")
    torch.serialization.set_crc32_options(recipe.crc)
    if recipe.cuda:
        _save_as_cuda(state, path, mesh, rank, everything=recipe.cuda == "all")
    else:
        torch.save(state, path)
    torch.serialization.set_crc32_options(True)
    if recipe.trainer_files:
        suffix = f"world_size_{recipe.world}_rank_{rank}.pt"
        torch.save({"state": {}, "param_groups": []}, source / f"optim_{suffix}")
        extra_state = {"lr_scheduler": {}, "rng": torch.get_rng_state()}
        torch.save(extra_state, source / f"extra_state_{suffix}")

    report = check(path, truth, recipe)
    if rank == 0:
        (folder / "oracle.json").write_text(json.dumps(report, indent=1))
        if recipe.fsdp_config:
            version = 1 if recipe.shard.startswith("fsdp1") else 2
            (source / "fsdp_config.json").write_text(
                json.dumps({"FSDP_version": version, "world_size": recipe.world}, indent=4)
            )


State = dict[str, Any]


def _save_dcp(state: State, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    moments = {name: {"exp_avg": value} for name, value in list(state.items())[:2]}
    dcp.save(
        {"model": state, "optimizer": {"state": moments, "step": 3}, "epoch": 1},
        checkpoint_id=folder,
    )


def _fsdp1(model: nn.Module, mesh: DeviceMesh, recipe: Recipe) -> State:
    from torch.distributed.fsdp import (
        FullyShardedDataParallel,
        ShardedStateDictConfig,
        ShardingStrategy,
        StateDictType,
    )
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    hybrid = "ddp" in recipe.mesh_dims
    if "tp" in recipe.mesh_dims:
        _tensor_parallel(model, mesh["tp"], recipe)
        mesh = mesh["fsdp"]
    sharded = FullyShardedDataParallel(
        model,
        device_mesh=None if recipe.shard == "fsdp1-sharded-tensor" else mesh,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD if hybrid else ShardingStrategy.FULL_SHARD,
        auto_wrap_policy=ModuleWrapPolicy({type(layer) for layer in _layers(model)}),
        use_orig_params=recipe.use_orig_params,
        device_id=torch.device("cpu"),  # else torch 2.13 insists on an accelerator
    )
    with FullyShardedDataParallel.state_dict_type(
        sharded, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)
    ):
        return sharded.state_dict()


def _fsdp2(model: nn.Module, mesh: DeviceMesh, recipe: Recipe) -> State:
    from torch.distributed.fsdp import fully_shard

    if "tp" in recipe.mesh_dims:
        _tensor_parallel(model, mesh["tp"], recipe)
        mesh = mesh[tuple(name for name in recipe.mesh_dims if name != "tp")]
    options: dict[str, Any] = {"mesh": mesh}
    if recipe.placement:
        options["shard_placement_fn"] = lambda parameter: _placement(parameter, recipe.world)
    if recipe.frozen_norms:
        options["ignored_params"] = {p for name, p in model.named_parameters() if "norm" in name}
    for layer in _layers(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model.state_dict(keep_vars=recipe.parameters)


def _whole(model: nn.Module, mesh: DeviceMesh, recipe: Recipe) -> State:
    return model.state_dict(keep_vars=recipe.parameters)


def _pieces(model: nn.Module, mesh: DeviceMesh, recipe: Recipe) -> State:
    return {
        name: value.to_local() if isinstance(value, DTensor) else value
        for name, value in _fsdp1(model, mesh, recipe).items()
    }


SHARDERS: dict[str, Callable[[nn.Module, DeviceMesh, Recipe], State]] = {
    "fsdp1": _fsdp1,
    "fsdp1-sharded-tensor": _fsdp1,
    "fsdp2": _fsdp2,
    "whole": _whole,
    "pieces": _pieces,
}


def _layers(model: nn.Module) -> list[nn.Module]:
    """The transformer's blocks, which verl wraps one by one."""
    ends = ("DecoderLayer", "GPT2Block")
    return [module for module in model.modules() if type(module).__name__.endswith(ends)]


def _placement(parameter: nn.Parameter, world: int) -> Shard:
    """verl ≤ 0.8: the first dimension that divides evenly, so that nothing need be padded."""
    even = (dim for dim, size in enumerate(parameter.shape) if size % world == 0)
    return Shard(next(even, 0))


def _tensor_parallel(model: nn.Module, mesh: DeviceMesh, recipe: Recipe) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan: dict[str, ParallelStyle] = {
        "model.layers.*.self_attn.q_proj": ColwiseParallel(),
        "model.layers.*.self_attn.k_proj": ColwiseParallel(),
        "model.layers.*.self_attn.v_proj": ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": RowwiseParallel(),
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
    }
    if recipe.shard == "fsdp2":
        # FSDP1 cannot save what tensor parallelism cuts unevenly, such as 509 rows: it takes
        # rank 0's piece times the ranks for the shape, and its collectives disagree.
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    if recipe.norms == "replicated":
        plan["model.layers.*.input_layernorm"] = SequenceParallel()
        plan["model.layers.*.post_attention_layernorm"] = SequenceParallel()
        plan["model.norm"] = SequenceParallel()
    parallelize_module(model, mesh, plan)


# --- files as GPUs write them ----------------------------------------------------------------


Storage = torch.storage.UntypedStorage | torch.storage.TypedStorage | torch.types.Storage


def _save_as_cuda(state: State, path: Path, mesh: DeviceMesh, rank: int, everything: bool) -> None:
    """torch.save on this machine, with the strings that it writes on one with GPUs.

    The mesh names its device type; with ``everything``, storages also carry ``cuda:N`` tags and
    tensors cuda devices. The mesh's own rank map stays on the CPU there as well. (Of a
    ShardedTensor real files give every rank's device; here all are the writer's own.)
    """
    meshes = {id(m): m for v in state.values() if isinstance(v, DTensor) for m in [v.device_mesh]}
    for named in meshes.values():
        named._device_type = "cuda"
    rank_maps = {m._rank_map.untyped_storage().data_ptr() for m in meshes.values()}

    class CudaPickler(pickle.Pickler):
        def reducer_override(self, obj: object) -> Any:
            if isinstance(obj, torch.device):
                return torch.device, ("cuda", rank)
            return NotImplemented

    class CudaPickle:
        Pickler = CudaPickler
        __name__ = "pickle"

    def tag(storage: Storage) -> str | None:
        return None if storage.data_ptr() in rank_maps else f"cuda:{rank}"

    try:
        if everything:
            with _location_tagger(tag):
                torch.save(state, path, pickle_module=CudaPickle())
        else:
            torch.save(state, path)
    finally:
        for named in meshes.values():
            named._device_type = "cpu"


@contextmanager
def _location_tagger(tag: Callable[[Storage], str | None]) -> Iterator[None]:
    registry = torch.serialization._package_registry
    before = list(registry)
    torch.serialization.register_package(0, tag, lambda storage, location: None)
    try:
        yield
    finally:
        registry[:] = before


# --- torch's own view of what was written ----------------------------------------------------


def check(path: Path, truth: State, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Read this rank's file with torch and compare every gathered tensor with the truth.

    Returns, the same on every rank, what torch said of each tensor.
    """
    loaded = torch.load(path, map_location="cpu", weights_only=False)
    if set(loaded) != set(truth):
        raise AssertionError(f"names differ: {sorted(set(loaded) ^ set(truth))}")
    report: dict[str, dict[str, Any]] = {}
    mine: dict[str, tuple[list[int], int]] = {}
    for name, value in loaded.items():
        if isinstance(value, DTensor):
            mesh = value.device_mesh
            mesh._device_type = "cpu"  # where the file says cuda
            whole = value.full_tensor()
            local = value.to_local()
            entry = {
                "kind": "DTensor",
                "mesh": dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)),
                "placements": [repr(placement) for placement in value.placements],
            }
        elif isinstance(value, ShardedTensor):
            whole = torch.empty(value.size(), dtype=value.dtype)
            value.gather(0, whole if dist.get_rank() == 0 else None)
            if dist.get_rank() != 0:
                whole = truth[name]
            shards = value.local_shards()
            local = shards[0].tensor if shards else torch.empty(0)
            entry = {"kind": "ShardedTensor"}
        else:
            local = whole = value
            entry = {"kind": "Tensor"}
            if recipe.shard == "pieces":
                whole = torch.cat(_gather(local))
        if not same_bits(whole, truth[name]):
            raise AssertionError(f"{path.name}: {name} read back differs from the truth")
        mine[name] = list(local.shape), local.untyped_storage().nbytes() - local.nbytes
        report[name] = entry
    everyone = _gather(mine)
    for name, entry in report.items():
        entry["shapes"] = [pieces[name][0] for pieces in everyone]
        entry["padding_bytes"] = [pieces[name][1] for pieces in everyone]
    return report


def _gather(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes: torch.equal says −0.0 = 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*flat)


if __name__ == "__main__":
    main()
