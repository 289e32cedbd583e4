"""The made checkpoints are what their recipes say, and torch agrees with their truth.

While a checkpoint is made, every rank already gathers each tensor from the files and compares it
with the unsharded model (``scripts.makers.fsdp.check``). Here the files are read once more, from
outside: no process group, weights only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Shard

from scripts.makers import models
from scripts.makers.fsdp import RECIPES, Made, Recipe, same_bits
from scripts.makers.large import make_large

Oracle = dict[str, dict[str, Any]]


@pytest.fixture
def made(request: pytest.FixtureRequest, checkpoints: dict[str, Made]) -> Made:
    return checkpoints[request.param]


def recipes(*, where: Callable[[Recipe], bool] = lambda recipe: True) -> pytest.MarkDecorator:
    """Parametrize ``made`` by the recipes for which ``where`` is true."""
    names = [name for name, recipe in RECIPES.items() if where(recipe)]
    return pytest.mark.parametrize("made", names, indirect=True)


def rank_files(made: Made) -> list[Path]:
    world = made.recipe.world
    return [made.source / f"model_world_size_{world}_rank_{rank}.pt" for rank in range(world)]


def load(path: Path) -> dict[str, torch.Tensor]:
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)  # no process groups
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    assert isinstance(loaded, dict)
    return loaded


def data_pkl(path: Path) -> bytes:
    # Not zipfile: it refuses files without CRCs.
    pickled = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    assert isinstance(pickled, bytes)
    return pickled


@recipes()
def test_folder(made: Made) -> None:
    recipe = made.recipe
    files = {path.name for path in made.source.iterdir()}
    expected = {path.name for path in rank_files(made)} | {"huggingface"}
    if recipe.fsdp_config:
        expected.add("fsdp_config.json")
    if recipe.trainer_files:
        for kind in ("optim", "extra_state"):
            expected |= {path.name.replace("model", kind) for path in rank_files(made)}
    if recipe.lora:
        expected.add("lora_train_meta.json")
    if recipe.adapter:
        expected.add("lora_adapter")
    assert files == expected
    config = json.loads((made.source / "huggingface" / "config.json").read_text())
    assert config["architectures"]
    assert "tokenizer.json" in {path.name for path in (made.source / "huggingface").iterdir()}
    assert not set(made.source.rglob("*.safetensors")), "the truth is not among the inputs"


def readable_alone(recipe: Recipe) -> bool:
    # torch loads a ShardedTensor only inside a process group of its own size, and safetensors
    # holds no complex128 to compare with.
    return recipe.shard != "fsdp1-sharded-tensor" and recipe.buffers != "complex128"


@recipes(where=readable_alone)
def test_torch_reads_the_files_and_they_give_the_truth(made: Made) -> None:
    assert made.truth_state is not None
    truth = load_file(made.truth_state)
    ranks = [load(path) for path in rank_files(made)]
    assert set(made.oracle) == set(truth)
    for name, entry in made.oracle.items():
        pieces = [rank[name] for rank in ranks]
        if entry["kind"] == "DTensor":
            sharded = [piece for piece in pieces if isinstance(piece, DTensor)]
            local = [piece._local_tensor for piece in sharded]
            assert [list(piece.shape) for piece in local] == entry["shapes"]
            assert [repr(placement) for placement in sharded[0].placements] == entry["placements"]
            assert sharded[0].shape == truth[name].shape
            if list(made.recipe.mesh_dims) == ["fsdp"]:  # other meshes: only ``check`` can gather
                (placement,) = sharded[0].placements
                assert isinstance(placement, Shard)
                assert same_bits(torch.cat(local, placement.dim), truth[name]), name
        elif made.recipe.shard == "pieces":
            assert same_bits(torch.cat(pieces), truth[name]), name
        else:
            assert all(same_bits(piece, truth[name]) for piece in pieces), name


def placements(oracle: Oracle) -> set[tuple[str, ...]]:
    return {tuple(entry["placements"]) for entry in oracle.values() if "placements" in entry}


S0, S1, R = "Shard(dim=0)", "Shard(dim=1)", "Replicate()"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fsdp1", {(S0,)}),
        ("fsdp1-flat", {(S0,)}),
        ("fsdp2", {(S0,)}),
        ("fsdp1-hsdp", {(R, S0)}),
        ("fsdp2-hsdp", {(R, S0)}),
        ("fsdp2-placement", {(S0,), (S1,)}),
        ("fsdp2-moe-placement", {(S0,), (S1,)}),
        ("fsdp2-tp", {("_StridedShard(dim=0, sf=2)", S0), (S0, S1), (S0,)}),
        ("fsdp2-tp-norms", {("_StridedShard(dim=0, sf=2)", S0), (S0, S1), (S0, R)}),
        ("fsdp2-tp-2x4", {("_StridedShard(dim=0, sf=4)", S0), (S0, S1), (S0,)}),
        ("fsdp2-hsdp-tp", {(R, "_StridedShard(dim=0, sf=2)", S0), (R, S0, S1), (R, S0)}),
        ("fsdp1-tp", {(S0, S0), (S0, S1), (S0, R)}),
    ],
)
def test_placements(
    checkpoints: dict[str, Made], name: str, expected: set[tuple[str, ...]]
) -> None:
    assert placements(checkpoints[name].oracle) == expected


def test_fsdp2_pads_storages_and_fsdp1_does_not(checkpoints: dict[str, Made]) -> None:
    def score(name: str) -> dict[str, Any]:
        entry = checkpoints[name].oracle["model.layers.0.self_attn.k_proj.weight"]
        assert [shape[0] for shape in entry["shapes"]] == [4, 4, 4, 4, 4, 4, 4, 0]
        return entry

    assert score("fsdp1-w8")["padding_bytes"] == [0] * 8
    assert score("fsdp2-w8")["padding_bytes"] == [0] * 7 + [4 * 56 * 2]


def test_critic_leaves_ranks_empty(checkpoints: dict[str, Made]) -> None:
    entry = checkpoints["fsdp2-critic"].oracle["score.weight"]
    assert entry["shapes"] == [[1, 56], [0, 56], [0, 56], [0, 56]]
    entry = checkpoints["fsdp1-sharded-tensor-critic"].oracle["score.weight"]
    assert entry["shapes"] == [[1, 56], [0], [0], [0]]


def test_experts_are_fused_and_sharded_by_expert(checkpoints: dict[str, Made]) -> None:
    entry = checkpoints["fsdp2-moe"].oracle["model.layers.0.mlp.experts.gate_up_proj"]
    assert [shape[0] for shape in entry["shapes"]] == [2, 2, 2, 0]


def test_fsdp2_shares_tied_storages_and_fsdp1_does_not(checkpoints: dict[str, Made]) -> None:
    def tied(name: str) -> bool:
        state = load(rank_files(checkpoints[name])[0])
        embedding, head = state["model.embed_tokens.weight"], state["lm_head.weight"]
        assert isinstance(embedding, DTensor)
        assert isinstance(head, DTensor)
        return embedding._local_tensor.data_ptr() == head._local_tensor.data_ptr()

    assert tied("fsdp2-tied")
    assert not tied("fsdp1-tied")


def test_world_of_one_fsdp1_is_plain(checkpoints: dict[str, Made]) -> None:
    assert {entry["kind"] for entry in checkpoints["fsdp1-w1"].oracle.values()} == {"Tensor"}
    assert b"_rebuild_from_type_v2" in data_pkl(rank_files(checkpoints["fsdp1-w1"])[0])


def test_cuda_strings(checkpoints: dict[str, Made]) -> None:
    for name, tag in [("fsdp2-cuda", True), ("fsdp1-cuda", False)]:
        for rank, path in enumerate(rank_files(checkpoints[name])):
            pickled = data_pkl(path)
            assert b"cuda" in pickled
            assert (f"cuda:{rank}".encode() in pickled) == tag
    assert b"cuda" not in data_pkl(rank_files(checkpoints["fsdp2"])[0])


def test_sharded_tensor_needs_getattr(checkpoints: dict[str, Made]) -> None:
    assert b"c__builtin__\ngetattr\n" in data_pkl(
        rank_files(checkpoints["fsdp1-sharded-tensor"])[0]
    )


def test_crc(checkpoints: dict[str, Made]) -> None:
    import zipfile

    def crcs(name: str) -> set[int]:
        with zipfile.ZipFile(rank_files(checkpoints[name])[0]) as archive:
            return {info.CRC for info in archive.infolist() if info.file_size}

    assert crcs("fsdp2-no-crc") == {0}
    assert 0 not in crcs("fsdp2")


def test_buffers_keep_their_dtypes(checkpoints: dict[str, Made]) -> None:
    for name in ("fsdp1-buffers", "fsdp2-buffers"):
        state = load(rank_files(checkpoints[name])[3])
        for buffer, make in models.ODD_BUFFERS.items():
            assert same_bits(state[f"model.{buffer}"], make())
    assert checkpoints["fsdp2-complex128"].truth_state is None
    state = load(rank_files(checkpoints["fsdp2-complex128"])[0])
    assert state["model.odd_complex128"].dtype == torch.complex128
    router = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert load(rank_files(checkpoints["fsdp2-deepseek_v3"])[0])[router].dtype == torch.float32


def loadable(recipe: Recipe) -> bool:
    # transformers alone knows no value heads, adapters and extra buffers, and it casts all weights
    # to one dtype.
    odd = recipe.lora or recipe.buffers or recipe.dtype == "mixed"
    return not odd and recipe.shard == "fsdp2" and recipe.arch != "value_head"


@recipes(where=loadable)
def test_the_truth_in_hub_names_loads_as_the_truth_in_memory(made: Made) -> None:
    assert made.truth_hf is not None
    assert made.truth_state is not None
    _, model_class, _ = models.ARCHITECTURES[made.recipe.arch]
    model = getattr(transformers, model_class).from_pretrained(made.truth_hf, dtype="auto")
    loaded = model.state_dict()
    truth = load_file(made.truth_state)
    assert set(loaded) == set(truth)
    # Releases differ in what they widen on loading: 5.24 does it to DeepSeek's router, too.
    wide = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    for key, value in truth.items():
        widened = loaded[key].dtype != value.dtype and any(part in key for part in wide)
        assert same_bits(loaded[key], value.float() if widened else value), key


def test_lora_truth_is_the_merged_model(checkpoints: dict[str, Made]) -> None:
    made = checkpoints["fsdp2-lora"]
    assert made.truth_hf is not None
    assert made.truth_state is not None
    merged = load_file(made.truth_hf / "model.safetensors")
    state = load_file(made.truth_state)
    meta = json.loads((made.source / "lora_train_meta.json").read_text())
    prefix, name = "base_model.model.", "model.layers.1.self_attn.q_proj"
    lora_a = state[f"{prefix}{name}.lora_A.default.weight"]
    lora_b = state[f"{prefix}{name}.lora_B.default.weight"]
    base = state[f"{prefix}{name}.base_layer.weight"]
    delta = meta["lora_alpha"] / meta["r"] * (lora_b @ lora_a)
    assert delta.abs().max() > 0.01
    torch.testing.assert_close(merged[f"{name}.weight"], base + delta)

    only = checkpoints["fsdp2-lora-only"]
    assert all("lora_" in name for name in only.oracle)
    assert only.truth_hf is None
    assert only.truth_adapter is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large(tmp_path: Path, dtype: torch.dtype) -> None:
    made = make_large(tmp_path, 12_000_000, world=3, dtype=dtype)
    ranks = [load(path) for path in sorted(made.source.glob("*.pt"))]
    total = 0
    for name, shape in made.shapes.items():
        local = [rank[name]._local_tensor for rank in ranks]  # type: ignore[attr-defined]
        whole = made.expected(name)
        assert whole.shape == shape
        assert same_bits(torch.cat(local), whole), name
        assert same_bits(made.expected(name, 2, 5), whole[2:5])
        total += whole.nbytes
    assert total == pytest.approx(12_000_000, rel=0.2)
    embedding, head = made.expected("model.embed_tokens.weight"), made.expected("lm_head.weight")
    assert not torch.equal(embedding, head)
    assert not torch.equal(embedding[0], embedding[1])
