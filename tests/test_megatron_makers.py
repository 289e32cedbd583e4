"""The oracle of the Megatron families against checkpoints that Megatron itself wrote.

Torch's own reader loads them, with stand-ins for megatron-core's two class names. The oracle makes
the same tensors of the HuggingFace model that the checkpoint came from.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from scripts.makers import megatron
from scripts.makers.megatron_inverse import invert
from scripts.makers.tiny_families import FAMILIES, State, make

MODULE = "megatron.core.dist_checkpointing.strategies.torch"


@pytest.fixture
def _megatron_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch unpickle the metadata of megatron-core before 0.16."""
    parts = MODULE.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, base in {"MCoreMetadata": Metadata, "MCoreSavePlan": SavePlan}.items():
        setattr(sys.modules[MODULE], name, type(name, (base,), {"__module__": MODULE}))


def read_dcp(folder: Path) -> State:
    """Return the weights of a DCP folder, read by torch."""
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
    }
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def differences(found: State, expected: State) -> Iterator[str]:
    for key in sorted(found.keys() ^ expected.keys()):
        yield f"{key}: only in {'the folder' if key in found else 'the oracle'}"
    for key in sorted(found.keys() & expected.keys()):
        a, b = found[key], expected[key]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{key}: {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
        elif not torch.equal(a, b):
            yield f"{key}: other values"


# folder below ../shared/checkpoints, answer, DCP folder, flavour
REAL = [
    ("megatron/llama_tp2pp2", "hf_answer", "global_step_1/actor/dist_ckpt", "stacked"),
    ("megatron/llama_tp2pp2", "hf_answer", "mlm_dist/iter_0000001", "stacked"),
    ("megatron/qwen2_tp2pp2_tied", "hf_answer", "global_step_1/actor/dist_ckpt", "stacked"),
    ("megatron/qwen3_moe_tp2ep2", "hf_answer", "global_step_1/actor/dist_ckpt", "stacked"),
    ("megatron/v0122_deepseek", "hf_answer", "global_step_1/actor/dist_ckpt", "per layer"),
    ("megatron/v0192_llama", "hf_answer", "global_step_1/actor/dist_ckpt", "stacked"),
    ("families/gemma2", "hf", "mg/iter_0000000", "stacked"),
    ("families/gpt_oss", "hf", "mg/iter_0000000", "stacked"),
    ("families/qwen2_5_vl", "hf", "mg/iter_0000000", "stacked"),
]


@pytest.mark.usefixtures("_megatron_names")
@pytest.mark.parametrize(("folder", "answer", "written", "flavour"), REAL)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_the_oracle_makes_what_megatron_wrote(
    shared_checkpoints: Path, folder: str, answer: str, written: str, flavour: megatron.Flavour
) -> None:
    root = shared_checkpoints / folder
    config = json.loads((root / answer / "config.json").read_text())
    state = load_file(root / answer / "model.safetensors")
    options = {}
    if config["model_type"] == "qwen2_5_vl":
        options["megatron_tower"] = False
        # Megatron-Bridge imported without naming a dtype: float32 of the same values.
        state = {name: tensor.float() for name, tensor in state.items()}
    expected = megatron.flavoured(invert(config, state, **options), flavour)
    assert list(differences(read_dcp(root / written), expected)) == []


@pytest.mark.parametrize("flavour", megatron.FLAVOURS)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3_mtp", "qwen3_next"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_torch_reads_the_folders_we_write(
    tmp_path: Path, name: str, flavour: megatron.Flavour
) -> None:
    model = make(name)
    walk = invert(model.config, model.state)
    if flavour == "stacked" and name == "qwen3_next":
        with pytest.raises(megatron.NotStackable):
            megatron.flavoured(walk, flavour)
        return
    expected = megatron.flavoured(walk, flavour)
    actor = megatron.save(tmp_path, model.config, walk, megatron.Options(flavour))
    assert list(differences(read_dcp(actor / "dist_ckpt"), expected)) == []
    assert len(list((actor / "dist_ckpt").glob("*.distcp"))) == 8  # four ranks, two threads each


def test_every_family_is_made_and_inverted() -> None:
    for name in FAMILIES:
        model = make(name)
        assert model.config["architectures"]
        walk = invert(model.config, model.state)  # takes every tensor, or fails
        assert {t.dtype for k, t in walk.made.items() if "expert_bias" not in k} == {torch.bfloat16}
        assert {t.dtype for k, t in walk.made.items() if "expert_bias" in k} <= {
            torch.float32,
            torch.bfloat16,
        }
