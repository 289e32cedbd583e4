"""Real checkpoints become HuggingFace folders, bit for bit, or are refused with a reason.

The truth is the unsharded model's own save_pretrained. Most tests plan in this process, which has
torch and transformers loaded already: the planning child gets tests of its own.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import streamconv
from scripts.makers.fsdp import RECIPES, Made
from scripts.outputs import (
    INDEX,
    MANIFEST,
    Stored,
    cast,
    differences,
    read_model,
    read_safetensors,
    read_truth,
)
from streamconv.errors import BadInputError, UsageError
from tests.hf_models import TINY

WITH_TRUTH = [n for n, r in RECIPES.items() if r.buffers != "complex128" and not r.lora]


def convert(src: Path, dst: Path, **options) -> streamconv.Result:
    result = streamconv.convert(src, dst, sync=False, **options)
    assert result.status == "done"
    assert sorted(p.name for p in dst.parent.iterdir() if p.name.startswith(f".{dst.name}")) == []
    return result


def copied(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.source, tmp_path / "copy"))


def edit_config(source: Path, **changes) -> None:
    path = source / "huggingface" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(tensors: dict[str, Stored], *names: str) -> dict[str, Stored]:
    return {n: t for n, t in tensors.items() if n not in names}


# --- bit for bit -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_TRUTH)
@pytest.mark.usefixtures("planned_here")
def test_every_recipe_equals_save_pretrained(name, checkpoints, tmp_path):
    made = checkpoints[name]
    convert(made.source, tmp_path / "out")
    assert differences(read_model(tmp_path / "out"), read_truth(made.truth_hf)) == []
    assert_side_files(tmp_path / "out", made)


def assert_side_files(out: Path, made: Made) -> None:
    """Every side file byte for byte; the configs but for what these weights and version 4 need."""
    side = made.source / "huggingface"
    expected = {p.name: p.read_bytes() for p in side.iterdir()}
    found = {p.name: p.read_bytes() for p in out.iterdir() if p.suffix != ".safetensors"}
    found.pop(MANIFEST)
    before, after = (json.loads(files.pop("config.json")) for files in (expected, found))
    if made.recipe.arch == "tied_differs":
        assert before.pop("tie_word_embeddings") is True
        assert after.pop("tie_word_embeddings") is False
    assert_config(before, after)
    name = "tokenizer_config.json"
    expected[name] = expected[name].replace(b"TokenizersBackend", b"PreTrainedTokenizerFast")
    assert json.loads(found.pop(name)) == json.loads(expected.pop(name))
    assert found == expected


def for_version_4(path: Path) -> bytes:
    """What comes out of a side file: the class that only version 5 knows has another name in 4."""
    return path.read_bytes().replace(b'"TokenizersBackend"', b'"PreTrainedTokenizerFast"')


def assert_config(before: dict, after: dict) -> None:
    """transformers 4 finds its old names beside the new ones, and nothing else has changed."""
    rope = before.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    added = {
        "num_experts": before.get("num_local_experts"),
        "rope_theta": full.get("rope_theta"),
        "rope_scaling": {k: v for k, v in full.items() if k != "rope_theta"},
        "rope_local_base_freq": rope.get("sliding_attention", {}).get("rope_theta"),
    }
    for key in after.keys() - before.keys():
        assert after.pop(key) == added[key]
    if "text_config" in before:
        tied = [c["text_config"].pop("tie_word_embeddings", None) for c in (before, after)]
        assert tied[1] in (tied[0], before.get("tie_word_embeddings"))
    for part in [k for k in before if k.endswith("_config") and isinstance(before[k], dict)]:
        assert_config(before.pop(part), after.pop(part))
    assert after == before


@pytest.mark.parametrize("name", ["fsdp2-moe", "fsdp1-tied"])
def test_planned_in_the_child_and_from_the_command_line(name, checkpoints, tmp_path):
    made = checkpoints[name]
    done = subprocess.run(
        [sys.executable, "-m", "streamconv", made.source, tmp_path / "out", "--no-sync"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert differences(read_model(tmp_path / "out"), read_truth(made.truth_hf)) == []
    assert_side_files(tmp_path / "out", made)


@pytest.mark.parametrize("name", ["fsdp2-moe", "fsdp2-mixtral", "fsdp2-gpt_oss", "fsdp2-tp"])
@pytest.mark.usefixtures("planned_here")
def test_memory_layout_is_the_state_dict(name, checkpoints, tmp_path):
    made = checkpoints[name]
    convert(made.source, tmp_path / "out", layout="memory")
    assert differences(read_model(tmp_path / "out"), read_truth(made.truth_state)) == []


@pytest.mark.usefixtures("planned_here")
def test_memory_layout_leaves_out_the_alias_of_a_tie(checkpoints, tmp_path):
    made = checkpoints["fsdp2-tied"]
    convert(made.source, tmp_path / "out", layout="memory")
    expected = without(read_truth(made.truth_state), "lm_head.weight")
    assert differences(read_model(tmp_path / "out"), expected) == []


SHARED = ["t24-fsdp1", "t26-fsdp1", "t28-fsdp2", "t28-fsdp2-tp", "t29-fsdp2", "t210-fsdp2"]


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.usefixtures("planned_here")
def test_files_of_older_torch(name, shared_checkpoints, tmp_path):
    source = shared_checkpoints / "fsdp" / name
    convert(source, tmp_path / "out")
    expected = read_truth(source / "truth" / "state.safetensors")
    assert differences(read_model(tmp_path / "out"), expected) == []


@pytest.mark.parametrize("name", ["verl-native-fsdp1", "verl-native-fsdp2"])
@pytest.mark.usefixtures("planned_here")
def test_files_that_verl_itself_wrote(name, shared_checkpoints, tmp_path):
    """Here the truth is what torch reads: Shard(0) pieces one after the other."""
    source = shared_checkpoints / "fsdp" / name
    convert(source, tmp_path / "out")
    ranks = [
        torch.load(source / f"model_world_size_4_rank_{r}.pt", "cpu", weights_only=False)
        for r in range(4)
    ]
    whole = {n: torch.cat([rank[n]._local_tensor for rank in ranks]) for n in ranks[0]}
    tied = json.loads((source / "huggingface" / "config.json").read_text())["tie_word_embeddings"]
    if tied:
        del whole["lm_head.weight"]
    found = read_model(tmp_path / "out")
    assert found.keys() == whole.keys()
    for tensor_name, tensor in whole.items():
        assert found[tensor_name].shape == tuple(tensor.shape)
        assert found[tensor_name].data == tensor.contiguous().view(torch.uint8).numpy().tobytes()
    for path in (source / "huggingface").glob("tokenizer*"):
        assert (tmp_path / "out" / path.name).read_bytes() == for_version_4(path)


# --- what transformers makes of it -----------------------------------------------------------


def assert_loads(out: Path, made: Made) -> None:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    truth = read_truth(made.truth_state)
    state = model.state_dict()
    assert state.keys() == truth.keys()
    for name, tensor in state.items():
        assert tensor.contiguous().view(torch.uint8).numpy().tobytes() == truth[name].data, name


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-tied", "fsdp1-tied-differs", "fsdp2-moe"])
@pytest.mark.usefixtures("planned_here")
def test_loads_in_transformers(name, checkpoints, tmp_path):
    convert(checkpoints[name].source, tmp_path / "out")
    assert_loads(tmp_path / "out", checkpoints[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("A rank file").input_ids) == "A rank file"


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-moe", "fsdp2-tied"])
@pytest.mark.usefixtures("planned_here")
def test_many_files_and_their_index(name, checkpoints, tmp_path):
    made, out = checkpoints[name], tmp_path / "out"
    convert(made.source, out, max_shard_size="64KB")
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 2
    count = len(files)
    assert files == [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    held = {f: read_safetensors(out / f)[1] for f in files}
    for tensors in held.values():  # only a tensor that is larger alone makes a larger file
        assert len(tensors) == 1 or sum(len(t.data) for t in tensors.values()) <= 64_000
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == {n: f for f, tensors in held.items() for n in tensors}

    whole = read_truth(made.truth_hf)
    assert differences(read_model(out), whole) == []
    assert index["metadata"] == {
        "total_parameters": sum(t.numel for t in whole.values()),
        "total_size": sum(len(t.data) for t in whole.values()),
    }
    # The library's own index, of the same model cut by the library.
    model = transformers.AutoModelForCausalLM.from_pretrained(made.truth_hf, dtype="auto")
    model.save_pretrained(tmp_path / "library", max_shard_size="64KB")
    theirs = json.loads((tmp_path / "library" / INDEX).read_text())
    assert index["metadata"] == theirs["metadata"]
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    assert_loads(out, made)


# --- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-moe", "fsdp1-buffers", "fsdp2-mixed"])
@pytest.mark.usefixtures("planned_here")
def test_dtype_casts_as_torch_does(name, dtype, checkpoints, tmp_path):
    made, target = checkpoints[name], getattr(torch, dtype)
    convert(made.source, tmp_path / "out", dtype=dtype)
    expected = {n: cast(t, target) for n, t in read_truth(made.truth_hf).items()}
    assert differences(read_model(tmp_path / "out"), expected) == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype


@pytest.mark.usefixtures("planned_here")
def test_dtype_auto_is_what_the_config_declares(checkpoints, tmp_path):
    made = checkpoints["fsdp2"]  # float32
    source = copied(made, tmp_path)
    edit_config(source, dtype="bfloat16")
    convert(source, tmp_path / "out", dtype="auto")
    expected = {n: cast(t, torch.bfloat16) for n, t in read_truth(made.truth_hf).items()}
    assert differences(read_model(tmp_path / "out"), expected) == []

    # Kept as they are, the weights contradict the config, which is corrected.
    result = convert(source, tmp_path / "kept")
    assert differences(read_model(tmp_path / "kept"), read_truth(made.truth_hf)) == []
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["dtype"] == "float32"
    assert any("bfloat16 became float32" in n for n in result.notices)


@pytest.mark.usefixtures("planned_here")
def test_dtype_auto_without_a_declared_dtype_is_refused(checkpoints, tmp_path):
    source = copied(checkpoints["fsdp2"], tmp_path)
    edit_config(source, dtype=None)
    with pytest.raises(UsageError, match="declares no dtype"):
        convert(source, tmp_path / "out", dtype="auto")


@pytest.mark.usefixtures("planned_here")
def test_keep_dtype_names_exceptions(checkpoints, tmp_path):
    made = checkpoints["fsdp2"]
    convert(
        made.source, tmp_path / "out", dtype="bfloat16", keep_dtype=["*norm*", "lm_head.weight"]
    )
    expected = {
        n: t if "norm" in n or n == "lm_head.weight" else cast(t, torch.bfloat16)
        for n, t in read_truth(made.truth_hf).items()
    }
    assert {t.dtype for t in expected.values()} == {"F32", "BF16"}
    assert differences(read_model(tmp_path / "out"), expected) == []


@pytest.mark.usefixtures("planned_here")
def test_a_cast_leaves_alone_what_transformers_keeps_in_float32(checkpoints, tmp_path):
    made = checkpoints["fsdp2-deepseek_v3"]
    convert(made.source, tmp_path / "out", dtype="bfloat16")
    found = read_model(tmp_path / "out")
    assert differences(found, read_truth(made.truth_hf)) == []
    kept = [n for n, t in found.items() if t.dtype == "F32"]
    assert kept == ["model.layers.1.mlp.gate.e_score_correction_bias"]


@pytest.mark.usefixtures("planned_here")
def test_complex128_is_refused_by_name(checkpoints, tmp_path):
    with pytest.raises(BadInputError, match="odd_complex128") as caught:
        convert(checkpoints["fsdp2-complex128"].source, tmp_path / "out")
    assert caught.value.exit_code == 5
    assert "safetensors cannot hold" in caught.value.what
    assert list(tmp_path.iterdir()) == []


# --- refused, decided or told ----------------------------------------------------------------


def test_an_error_of_the_planning_child_arrives_whole(checkpoints, tmp_path):
    with pytest.raises(BadInputError, match="magnitudes") as caught:
        convert(checkpoints["fsdp2-lora-dora"].source, tmp_path / "out")
    error = caught.value
    assert all((error.what, error.where, error.hint))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["fsdp2", "fsdp1", "fsdp1-sharded-tensor", "fsdp2-tp"])
@pytest.mark.usefixtures("planned_here")
def test_a_missing_rank_is_named_with_what_is_lost(name, checkpoints, tmp_path):
    source = copied(checkpoints[name], tmp_path)
    (source / "model_world_size_4_rank_1.pt").unlink()
    with pytest.raises(BadInputError) as caught:
        convert(source, tmp_path / "out")
    message = str(caught.value)
    assert "1 of 4 rank files are missing: model_world_size_4_rank_1.pt" in message
    assert "model.embed_tokens.weight" in message
    assert "of the shape [509, 56]" in message


@pytest.mark.parametrize(
    ("name", "gone"),
    [("fsdp2-hsdp", [0]), ("fsdp1-hsdp", [3]), ("fsdp2-hsdp", [0, 3]), ("fsdp2-hsdp-tp", [6])],
)
@pytest.mark.usefixtures("planned_here")
def test_a_missing_hybrid_rank_is_served_by_its_replica(name, gone, checkpoints, tmp_path):
    made = checkpoints[name]
    source = copied(made, tmp_path)
    for rank in gone:
        (source / f"model_world_size_{made.recipe.world}_rank_{rank}.pt").unlink()
    result = convert(source, tmp_path / "out")
    assert differences(read_model(tmp_path / "out"), read_truth(made.truth_hf)) == []
    assert any(f"rank_{gone[0]}.pt" in n and "replicas" in n for n in result.notices)


@pytest.mark.usefixtures("planned_here")
def test_both_hybrid_replicas_missing_is_an_error(checkpoints, tmp_path):
    source = copied(checkpoints["fsdp2-hsdp"], tmp_path)
    for rank in (0, 2):  # the same piece in both replicas
        (source / f"model_world_size_4_rank_{rank}.pt").unlink()
    with pytest.raises(BadInputError, match="2 of 4 rank files are missing"):
        convert(source, tmp_path / "out")


@pytest.mark.usefixtures("planned_here")
def test_plain_tensors_without_a_config_are_a_question(checkpoints, tmp_path):
    made = checkpoints["plain-whole"]
    source = copied(made, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    side = (source / "huggingface").rename(tmp_path / "elsewhere" / "huggingface")
    with pytest.raises(BadInputError, match="either pieces or whole copies") as caught:
        convert(source, tmp_path / "out")
    assert "--hf-config" in caught.value.hint
    assert "[1018, 56] as pieces along dim 0, or [509, 56] as copies" in caught.value.found

    convert(source, tmp_path / "out", hf_config=side)
    assert differences(read_model(tmp_path / "out"), read_truth(made.truth_hf)) == []
    assert_side_files(tmp_path / "out", dataclasses.replace(made, source=side.parent))


@pytest.mark.usefixtures("planned_here")
def test_no_huggingface_folder_is_a_notice(checkpoints, tmp_path):
    made = checkpoints["fsdp2"]
    source = copied(made, tmp_path)
    shutil.rmtree(source / "huggingface")
    result = convert(source, tmp_path / "out")
    assert differences(read_model(tmp_path / "out"), read_truth(made.truth_state)) == []
    assert any("no config.json" in n and "--hf-config" in n for n in result.notices)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", MANIFEST}


@pytest.mark.parametrize(
    "name",
    [
        "_fsdp_wrapped_module.lm_head.weight",
        "module.norm.weight",
        "model.l.0.mlp.experts.down_proj",
    ],
)
def test_names_that_may_be_none_on_the_hub_need_a_model(name, tmp_path):
    (tmp_path / "actor").mkdir()
    torch.save({name: torch.zeros(2, 3, 4)}, tmp_path / "actor/model_world_size_1_rank_0.pt")
    with pytest.raises(BadInputError, match="the Hub's names of these tensors are not known"):
        streamconv.convert(tmp_path / "actor", tmp_path / "out", sync=False)
    streamconv.convert(tmp_path / "actor", tmp_path / "out", layout="memory", sync=False)
    assert set(read_model(tmp_path / "out")) == {name}


@pytest.mark.usefixtures("planned_here")
def test_an_unknown_model_type_is_a_notice(checkpoints, tmp_path):
    made = checkpoints["fsdp2"]
    source = copied(made, tmp_path)
    edit_config(source, model_type="brand_new", architectures=["BrandNewForCausalLM"])
    (source / "huggingface" / "modeling_brand_new.py").write_text("raise SystemExit('was run')\n")
    result = convert(source, tmp_path / "out")
    assert differences(read_model(tmp_path / "out"), read_truth(made.truth_state)) == []
    assert any("'brand_new'" in n and "not checked" in n for n in result.notices)
    for path in (source / "huggingface").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == for_version_4(path)


@pytest.mark.usefixtures("planned_here")
def test_layers_that_the_config_does_not_count(checkpoints, tmp_path):
    for name in ("fsdp2", "fsdp2-moe"):
        (tmp_path / name).mkdir()
        source = copied(checkpoints[name], tmp_path / name)
        edit_config(source, num_hidden_layers=1, layer_types=None)
        with pytest.raises(BadInputError, match="has layers that") as caught:
            convert(source, tmp_path / "out")
        assert "model.layers.1" in caught.value.where
        assert "num_hidden_layers" in caught.value.hint


@pytest.mark.usefixtures("planned_here")
def test_a_class_of_another_model_type(checkpoints, tmp_path):
    made = checkpoints["fsdp2"]
    source = copied(made, tmp_path)
    right = json.loads((source / "huggingface" / "config.json").read_text())["architectures"]
    edit_config(source, architectures=["GemmaForCausalLM"])
    with pytest.raises(BadInputError, match="do not go together"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", config=(f"architectures={json.dumps(right)}",))
    assert differences(read_model(tmp_path / "out"), read_truth(made.truth_state)) == []


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point_numbers(dtype, tmp_path):
    config = transformers.Qwen2Config(**TINY, architectures=["Qwen2ForCausalLM"])
    state = transformers.Qwen2ForCausalLM(config).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].to(dtype)
    config.save_pretrained(tmp_path / "actor" / "huggingface")
    torch.save(state, tmp_path / "actor" / "model_world_size_1_rank_0.pt")
    with pytest.raises(BadInputError, match="1 weights are not of floating-point") as caught:
        streamconv.convert(tmp_path / "actor", tmp_path / "out", sync=False)
    assert caught.value.where == name
    assert str(dtype).removeprefix("torch.") in caught.value.found


@pytest.mark.usefixtures("planned_here")
def test_wrong_shapes_are_listed(checkpoints, tmp_path):
    source = copied(checkpoints["fsdp2"], tmp_path)
    edit_config(source, vocab_size=512)
    with pytest.raises(BadInputError, match="2 tensors do not have the shape") as caught:
        convert(source, tmp_path / "out")
    error = caught.value
    assert set(error.where.split(", ")) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert "[512, 56]" in error.expected
    assert "[509, 56]" in error.found


@pytest.mark.usefixtures("planned_here")
def test_missing_tensors_are_listed(checkpoints, tmp_path):
    source = copied(checkpoints["fsdp2"], tmp_path)
    edit_config(source, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(BadInputError, match="12 tensors that Qwen2ForCausalLM needs") as caught:
        convert(source, tmp_path / "out")
    listed = caught.value.where.split(", ")
    assert len(listed) == 12
    assert all(n.startswith("model.layers.2.") for n in listed)


@pytest.mark.usefixtures("planned_here")
def test_unknown_tensors_are_written_with_a_notice_or_refused_if_strict(checkpoints, tmp_path):
    made = checkpoints["fsdp2-value-head"]
    with pytest.raises(BadInputError, match="2 tensors are unknown") as caught:
        convert(made.source, tmp_path / "out", strict=True)
    assert set(caught.value.where.split(", ")) == {"v_head.summary.weight", "v_head.summary.bias"}
    assert list(tmp_path.iterdir()) == []

    result = convert(made.source, tmp_path / "out")
    assert "v_head.summary.weight" in read_model(tmp_path / "out")
    assert any("v_head.summary.weight" in n for n in result.notices)


@pytest.mark.usefixtures("planned_here")
def test_strict_accepts_a_model_that_is_known_whole(checkpoints, tmp_path):
    made = checkpoints["fsdp2-moe"]
    convert(made.source, tmp_path / "out", strict=True)
    assert differences(read_model(tmp_path / "out"), read_truth(made.truth_hf)) == []


@pytest.mark.usefixtures("planned_here")
def test_weights_without_checksums_are_converted_and_reported(checkpoints, tmp_path):
    result = convert(checkpoints["fsdp2-no-crc"].source, tmp_path / "out")
    assert result.unverifiable_bytes > 0
    assert any("checksums" in n for n in result.notices)


@pytest.mark.usefixtures("planned_here")
def test_the_manifest_accounts_for_every_file_and_skipped_tensor(checkpoints, tmp_path):
    import hashlib

    import xxhash

    out = tmp_path / "out"
    convert(checkpoints["fsdp2-tied"].source, out, checksum="sha256", max_shard_size="64KB")
    manifest = json.loads((out / MANIFEST).read_text())
    assert {f["name"] for f in manifest["files"]} == {p.name for p in out.iterdir()} - {MANIFEST}
    for file in manifest["files"]:
        data = (out / file["name"]).read_bytes()
        assert len(data) == file["nbytes"]
        assert xxhash.xxh3_128_hexdigest(data) == file["xxh3_128"]
        if file["name"].endswith(".safetensors"):
            assert hashlib.sha256(data).hexdigest() == file["sha256"]
    assert manifest["tensors"].keys() == read_model(out).keys()
    assert "lm_head.weight" in {name for name, _ in manifest["skipped"]}
