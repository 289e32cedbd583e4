"""Quantized weights have scales and a config.json that says so, or are refused; no others have one.

The checkpoints are one rank file with a config beside it, the answers what was put into them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from scripts.outputs import read_model
from streamconv.errors import BadInputError
from streamconv.files.durable import hash_file
from streamconv.quantization import scales

State = dict[str, torch.Tensor]

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [16, 16],
}
CHANNELS = {"quant_method": "compressed-tensors", "format": "float-quantized"}
MXFP4 = {"quant_method": "mxfp4"}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    f"{LAYER}input_layernorm.weight": (32,),
    f"{LAYER}post_attention_layernorm.weight": (32,),
    f"{LAYER}self_attn.q_proj.weight": (32, 32),
    f"{LAYER}self_attn.k_proj.weight": (16, 32),
    f"{LAYER}self_attn.v_proj.weight": (16, 32),
    f"{LAYER}self_attn.o_proj.weight": (32, 32),
    f"{LAYER}mlp.gate_proj.weight": (40, 32),
    f"{LAYER}mlp.up_proj.weight": (40, 32),
    f"{LAYER}mlp.down_proj.weight": (32, 40),
    "model.norm.weight": (32,),
    "lm_head.weight": (64, 32),
}
DOWN = f"{LAYER}mlp.down_proj.weight"

pytestmark = pytest.mark.usefixtures("planned_here")


def bf16() -> State:
    torch.manual_seed(3)
    return {n: torch.randn(s).bfloat16() for n, s in SHAPES.items()}


def fp8(scale: str = "_scale_inv") -> State:
    """The matrices of the layer in blocks of 16 rows and columns, or with a scale for each row."""
    state = bf16()
    for name in [n for n, s in SHAPES.items() if "proj" in n and len(s) == 2]:
        rows, columns = SHAPES[name]
        state[name] = state[name].to(torch.float8_e4m3fn)
        grid = (-(-rows // 16), -(-columns // 16)) if scale == "_scale_inv" else (rows, 1)
        state[name + scale] = torch.rand(grid) + 0.5
    return state


def checkpoint(folder: Path, state: State, **config: Any) -> Path:
    (folder / "huggingface").mkdir(parents=True)
    torch.save(state, folder / "model_world_size_1_rank_0.pt")
    (folder / "huggingface" / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def released(folder: Path, state: State, **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def convert(src: Path, dst: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Convert and check; return config.json and the notices."""
    streamconv.convert(src, dst, sync=False, **options)
    assert streamconv.verify(dst).passed
    manifest = json.loads((dst / "streamconv.json").read_text())
    return json.loads((dst / "config.json").read_text()), manifest["notices"]


def assert_same(dst: Path, state: Mapping[str, torch.Tensor]) -> None:
    found = {n: t.data for n, t in read_model(dst).items()}
    assert found == {n: t.view(torch.uint8).numpy().tobytes() for n, t in state.items()}


# --- what is right stays ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "declared"), [("_scale_inv", FP8), ("_scale", CHANNELS)], ids=["blocks", "channels"]
)
def test_quantized_weights_keep_scales_and_config(
    tmp_path: Path, scale: str, declared: Any
) -> None:
    state = fp8(scale)
    src = checkpoint(tmp_path / "actor", state, quantization_config=declared)
    config, notices = convert(src, tmp_path / "out", strict=True)
    assert config["quantization_config"] == declared
    assert config["dtype"] == "bfloat16"
    assert_same(tmp_path / "out", state)
    assert not any("unknown" in n for n in notices)


@pytest.mark.slow
def test_verify_source_agrees_with_them(tmp_path: Path) -> None:
    src = checkpoint(tmp_path / "actor", fp8(), quantization_config=FP8)
    convert(src, tmp_path / "out")
    assert streamconv.verify(tmp_path / "out", source=src).passed


def test_a_dtype_does_not_touch_them_and_says_so(tmp_path: Path) -> None:
    state = fp8()
    src = checkpoint(tmp_path / "actor", state, quantization_config=FP8)
    _, notices = convert(src, tmp_path / "out", dtype="float32")
    assert any("--dtype float32 does not touch 7 quantized weights" in n for n in notices)
    found = {n: t.dtype for n, t in read_model(tmp_path / "out").items()}
    assert found[DOWN] == "F8_E4M3"
    assert found["lm_head.weight"] == "F32"


def test_scales_are_renamed_with_their_weights(tmp_path: Path) -> None:
    """The names of another release are known of weights alone."""
    weight = DOWN.removeprefix("model.")
    state = {(n.removeprefix("model.") if weight in n else n): t for n, t in fp8().items()}
    assert {weight, weight + "_scale_inv"} <= state.keys()
    src = checkpoint(tmp_path / "actor", state, quantization_config=FP8)
    convert(src, tmp_path / "out", strict=True)
    assert_same(tmp_path / "out", fp8())


# --- bfloat16 weights, and the config of the quantized release ---------------------------------------


@pytest.mark.parametrize(
    ("declared", "dtype"), [(FP8, "keep"), (MXFP4, "float32"), ({}, "keep"), ("fp8", "auto")]
)
def test_weights_that_are_not_quantized_lose_the_key(
    tmp_path: Path, declared: Any, dtype: str
) -> None:
    src = checkpoint(tmp_path / "actor", bf16())
    folder = released(tmp_path / "released", fp8(), quantization_config=declared)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    out = tmp_path / "out"
    streamconv.convert(src, out, hf_config=folder, dtype=dtype, sync=False)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert not (out / "hf_quant_config.json").exists()
    manifest = json.loads((out / "streamconv.json").read_text())
    assert any("quantization_config" in n and "not quantized" in n for n in manifest["notices"])
    assert ["hf_quant_config.json", "the weights are not quantized"] in manifest["skipped"]
    assert streamconv.verify(out).passed


def test_the_config_of_a_part_loses_it_too() -> None:
    """Kimi's lies in text_config."""
    config = {"text_config": {"quantization_config": FP8, "hidden_size": 8}, "model_type": "m"}
    nothing = scales.find({}, {})
    changed, notices = scales.following(config, nothing)
    assert changed == {"text_config": {"hidden_size": 8}, "model_type": "m"}
    assert notices == [
        "config.json: text_config.quantization_config removed, the weights are not quantized"
    ]


def test_a_file_of_its_own_may_say_how_weights_are_quantized(tmp_path: Path) -> None:
    """ModelOpt writes hf_quant_config.json, and older releases of it nothing in config.json."""
    src = checkpoint(tmp_path / "actor", fp8("_scale"))
    said = '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}'
    (src / "huggingface" / "hf_quant_config.json").write_text(said)
    config, _ = convert(src, tmp_path / "out")
    assert "quantization_config" not in config
    assert (tmp_path / "out" / "hf_quant_config.json").read_text() == said


# --- what contradicts itself is refused -------------------------------------------------------------


def refused(src: Path, dst: Path, **options: Any) -> BadInputError:
    with pytest.raises(BadInputError) as caught:
        streamconv.convert(src, dst, sync=False, **options)
    assert not dst.exists()
    return caught.value


def test_lost_scales(tmp_path: Path) -> None:
    state = fp8()
    every = {n: t for n, t in state.items() if not n.endswith("_scale_inv")}
    src = checkpoint(tmp_path / "actor", every, quantization_config=FP8)
    error = refused(src, tmp_path / "out")
    assert error.what == "7 quantized weights have no scale, without which they mean nothing"
    del state[DOWN + "_scale_inv"]
    src = checkpoint(tmp_path / "one", state, quantization_config=FP8)
    error = refused(src, tmp_path / "out")
    assert error.what.startswith("1 of 7 quantized weights have no scale")
    assert error.where == DOWN


def test_a_norm_that_became_codes(tmp_path: Path) -> None:
    state = fp8()
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.float8_e4m3fn)
    src = checkpoint(tmp_path / "actor", state, quantization_config=FP8)
    with pytest.raises(BadInputError, match="have no scale") as caught:
        convert(src, tmp_path / "out")
    assert "model.norm.weight" in str(caught.value.where)


def test_scales_of_nothing(tmp_path: Path) -> None:
    state = fp8()
    state[DOWN] = state[DOWN].bfloat16()
    src = checkpoint(tmp_path / "actor", state, quantization_config=FP8)
    error = refused(src, tmp_path / "out")
    assert error.what == "1 scales have no quantized weight that they belong to"
    assert error.found == f"{DOWN}: bfloat16"


@pytest.mark.parametrize("key", [None, {}])
def test_a_config_that_says_nothing_of_them(tmp_path: Path, key: Any) -> None:
    src = checkpoint(tmp_path / "actor", fp8(), quantization_config=key)
    error = refused(src, tmp_path / "out")
    assert error.what == "7 weights are quantized, and config.json does not say so"
    assert "--hf-config" in (error.hint or "")


@pytest.mark.parametrize(
    ("scale", "declared"),
    [("_scale_inv", MXFP4), ("_scale_inv", CHANNELS), ("_scale", {"quant_method": "gptq"})],
)
def test_a_config_of_another_kind(tmp_path: Path, scale: str, declared: Any) -> None:
    src = checkpoint(tmp_path / "actor", fp8(scale), quantization_config=declared)
    error = refused(src, tmp_path / "out")
    assert error.what == "config.json has a quantization_config of another kind than the weights"
    assert declared["quant_method"] in (error.found or "")


def test_blocks_of_another_size(tmp_path: Path) -> None:
    declared = {**FP8, "weight_block_size": [32, 16]}
    src = checkpoint(tmp_path / "actor", fp8(), quantization_config=declared)
    error = refused(src, tmp_path / "out")
    assert "weight_block_size" in error.what
    assert error.found == "[2, 2]"


def packed(kind: str) -> State:
    state = bf16()
    rows, columns = SHAPES[DOWN]
    half = torch.zeros(rows, columns // 2, dtype=torch.uint8)
    if kind == "weight_packed":
        del state[DOWN]
        state |= {DOWN + "_packed": half, DOWN + "_scale": torch.zeros(rows, 2, dtype=torch.uint8)}
    elif kind == "blocks":
        del state[DOWN]
        state |= {
            DOWN + "_blocks": half.reshape(rows, 2, 10),
            DOWN + "_scales": half[:, :2].clone(),
        }
    elif kind == "nvfp4":
        state |= {DOWN: half, DOWN + "_scale": torch.zeros(rows, 2).to(torch.float8_e4m3fn)}
    elif kind == "deepseek_v4":
        scale = torch.ones(rows, 2).to(torch.float8_e8m0fnu)
        state |= {DOWN: half.view(torch.int8), DOWN.replace("weight", "scale"): scale}
    elif kind == "bitsandbytes":
        state[DOWN] = half.reshape(-1, 1)
    elif kind == "qlora":
        state[DOWN] = half.reshape(-1).view(torch.bfloat16).reshape(-1, 1)
    return state


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("weight_packed", "packed by compressed-tensors"),
        ("blocks", "mxfp4"),
        ("nvfp4", "two elements or more in a byte"),
        ("deepseek_v4", "two elements or more in a byte"),
        ("bitsandbytes", "packed by bitsandbytes"),
        ("qlora", "packed by bitsandbytes"),
    ],
)
def test_packed_weights_are_refused_as_what_they_are(tmp_path: Path, kind: str, words: str) -> None:
    src = checkpoint(tmp_path / "actor", packed(kind), quantization_config={"quant_method": "any"})
    error = refused(src, tmp_path / "out")
    assert words in error.what
    assert (error.where or "").startswith(DOWN)
    assert error.hint


# --- an adapter and its quantized base --------------------------------------------------------------


def adapter(folder: Path, module: str, rows: int, columns: int, **config: Any) -> Path:
    name = f"base_model.model.{module}"
    state = {
        f"{name}.lora_A.default.weight": torch.randn(2, columns),
        f"{name}.lora_B.default.weight": torch.randn(rows, 2),
    }
    checkpoint(folder, state, **config)
    (folder / "lora_train_meta.json").write_text('{"r": 2, "lora_alpha": 4}')
    return folder


def test_a_merged_model_is_quantized_as_its_base(tmp_path: Path) -> None:
    base = released(tmp_path / "base", fp8(), quantization_config=FP8)
    (base / "hf_quant_config.json").write_text('{"quantization": {}}')
    src = adapter(tmp_path / "actor", "lm_head", 64, 32)
    config, notices = convert(src, tmp_path / "out", base=base)
    assert config["quantization_config"] == FP8
    assert any("that of the base model" in n for n in notices)
    assert (tmp_path / "out" / "hf_quant_config.json").is_file()
    found, was = read_model(tmp_path / "out"), load_file(base / "model.safetensors")
    assert found.keys() == was.keys()
    assert found[DOWN].data == was[DOWN].view(torch.uint8).numpy().tobytes()
    assert found["lm_head.weight"].data != was["lm_head.weight"].view(torch.uint8).numpy().tobytes()


@pytest.fixture(params=["uint8", "bfloat16"])
def qlora(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Return a rank file of PEFT's model on a base that bitsandbytes packed, and that base."""
    base = bf16()
    state: State = {}
    for name, weight in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if "proj" not in name:
            state[f"{module}.weight"] = weight
            continue
        packed = torch.randint(0, 255, (weight.numel() // 2,), dtype=torch.uint8)
        held = f"{module}.base_layer.weight"
        state[held] = packed.view(getattr(torch, request.param)).reshape(-1, 1)
        if request.param == "uint8":  # FSDP's way keeps these in the parameter, and saves none
            state |= {
                f"{held}.absmax": torch.zeros(8),
                f"{held}.quant_map": torch.zeros(16),
                f"{held}.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
            }
        state[f"{module}.lora_A.default.weight"] = torch.randn(2, weight.shape[1])
        state[f"{module}.lora_B.default.weight"] = torch.randn(weight.shape[0], 2)
    declared = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    src = checkpoint(tmp_path / "qlora", state, quantization_config=declared)
    (src / "lora_train_meta.json").write_text('{"r": 2, "lora_alpha": 4}')
    return src, released(tmp_path / "base", base)


def test_the_base_of_qlora_is_named_as_what_it_is(qlora: tuple[Path, Path], tmp_path: Path) -> None:
    error = refused(qlora[0], tmp_path / "out")
    assert "packed by bitsandbytes, as QLoRA holds its base" in error.what
    assert "--base DIR" in str(error.hint)
    assert "--lora adapter" in str(error.hint)


def test_the_adapter_of_qlora_by_itself(qlora: tuple[Path, Path], tmp_path: Path) -> None:
    streamconv.convert(qlora[0], tmp_path / "out", sync=False, lora="adapter")
    held = torch.load(qlora[0] / "model_world_size_1_rank_0.pt")
    trained = {n.replace(".default", ""): t for n, t in held.items() if "lora_" in n}
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[n], trained[n]) for n in trained)


def test_the_adapter_of_qlora_is_merged_into_the_base_as_it_was(
    qlora: tuple[Path, Path], tmp_path: Path
) -> None:
    config, _ = convert(qlora[0], tmp_path / "out", base=qlora[1])
    assert "quantization_config" not in config
    held = torch.load(qlora[0] / "model_world_size_1_rank_0.pt")
    found, was = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", qlora[1])
    )
    assert found.keys() == was.keys()
    for name, weight in was.items():
        a, b = (
            held.get(f"base_model.model.{name[:-7]}.lora_{part}.default.weight") for part in "AB"
        )
        merged = weight if a is None else (weight.float() + 2 * (b @ a)).bfloat16()
        assert torch.allclose(found[name].float(), merged.float(), rtol=2**-7, atol=1e-4), name


def test_a_base_that_is_not_quantized(tmp_path: Path) -> None:
    """The adapter's config is of the quantized model that it was trained on."""
    base = released(tmp_path / "base", bf16())
    src = adapter(tmp_path / "actor", "lm_head", 64, 32, quantization_config=FP8)
    config, _ = convert(src, tmp_path / "out", base=base)
    assert "quantization_config" not in config


def test_an_adapter_of_a_quantized_weight_is_refused(tmp_path: Path) -> None:
    base = released(tmp_path / "base", fp8(), quantization_config=FP8)
    src = adapter(tmp_path / "actor", DOWN.removesuffix(".weight"), 32, 40)
    assert "float8_e4m3fn" in str(refused(src, tmp_path / "out", base=base).found)


# --- verify, of what another release wrote ------------------------------------------------------------


@pytest.mark.parametrize("quantized", [True, False])
def test_verify_sees_what_contradicts_itself(tmp_path: Path, quantized: bool) -> None:
    """As earlier releases wrote them: the manifest agrees with the bytes."""
    state = fp8() if quantized else bf16()
    src = checkpoint(tmp_path / "actor", state, quantization_config=FP8)
    out = tmp_path / "out"
    streamconv.convert(src, out, sync=False)
    path = out / "config.json"
    config = json.loads(path.read_text())
    if quantized:
        del config["quantization_config"]
    else:
        config["quantization_config"] = FP8
    path.write_text(json.dumps(config))
    manifest = json.loads((out / "streamconv.json").read_text())
    entry = next(f for f in manifest["files"] if f["name"] == "config.json")
    entry |= {"nbytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    (out / "streamconv.json").write_text(json.dumps(manifest))
    report = streamconv.verify(out)
    assert not report.passed
    assert any("quantiz" in p for p in report.problems)
