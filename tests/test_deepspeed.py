"""DeepSpeed's checkpoints, made by DeepSpeed itself, bit for bit against the engine's own weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streamconv
from streamconv import formats
from streamconv.errors import BadInputError
from tests.stored import stored

CASES = (
    "dsmoe_s2_ep2_w2",
    "hft_s2_llama_bf16_w2",
    "hft_s3_qwen3_bf16_w2",
    "s0_llama_bf16_w2",
    "s1_frozen_bf16_w2",
    "pipe_pp2_bf16",
    "s1_odd_fp16_w2",
    "s2_qwen3moe_bf16_w2",
    "s3_frozen_fp16_w2",
    "s3_qwen2tied_bf16_w3",
    "tp2_s1_bf16",
    "universal_s3_qwen2tied",
    "v0145_s3_frozen_bf16_w3",
)
HALVES = (
    "dsmoe_s2_ep2_w2",
    "pipe_pp2_bf16",
    "tp2_s1_bf16",
    "hft_s2_llama_bf16_w2",
    "s0_llama_bf16_w2",
    "s1_frozen_bf16_w2",
    "s1_odd_fp16_w2",
    "s2_qwen3moe_bf16_w2",
)


@pytest.fixture
def cases(shared_checkpoints: Path) -> Path:
    """Return the folder of the cases that DeepSpeed has made."""
    return shared_checkpoints / "deepspeed"


def options_for(case: Path) -> dict[str, Any]:
    return {} if (case / "config.json").exists() else {"layout": "memory"}


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor
    return tensor.dtype, tuple(tensor.shape), data.numpy().tobytes() if tensor.numel() else b""


def converted(src: Path, dst: Path, **options: Any) -> dict[str, torch.Tensor]:
    streamconv.convert(src, dst, sync=False, **options)
    return {n: t for f in sorted(dst.glob("*.safetensors")) for n, t in load_file(f).items()}


def assert_same(made: dict[str, torch.Tensor], case: Path, truth: str = "model") -> None:
    expected = load_file(case / "truth" / f"{truth}.safetensors")
    aliases: dict[str, str] = json.loads((case / "how.json").read_text()).get("alias", {})
    expected |= {a: expected[n] for a, n in aliases.items() if a in made}
    assert made.keys() == expected.keys()
    assert [n for n in made if bits(made[n]) != bits(expected[n])] == []


@pytest.mark.parametrize("name", CASES)
def test_masters_are_those_of_the_engine(cases: Path, tmp_path: Path, name: str) -> None:
    case = cases / name
    assert_same(converted(case, tmp_path / "out", **options_for(case)), case)


@pytest.mark.parametrize("name", HALVES)
def test_masters_no_takes_the_16_bit_weights(cases: Path, tmp_path: Path, name: str) -> None:
    case = cases / name
    made = converted(case, tmp_path / "out", masters="no", **options_for(case))
    assert_same(made, case, "half")


def test_an_adapter_is_merged_and_handed_on(cases: Path, tmp_path: Path) -> None:
    case = cases / "s2_lora_bf16_w2"
    made = converted(case, tmp_path / "merged", lora_alpha=6, dtype="float32")
    merged = load_file(case / "truth" / "merged_fp32.safetensors")
    assert made.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(made[name], tensor.float(), rtol=0, atol=1e-6)
    base = load_file(case / "truth" / "model.safetensors")
    untouched = [n for n in base if merged[n].dtype == torch.bfloat16]
    assert len(untouched) == 15
    assert all(torch.equal(made[n], base[n].float()) for n in untouched)
    adapter = converted(case, tmp_path / "adapter", lora_alpha=6, lora="adapter")
    expected = load_file(case / "truth" / "adapter.safetensors")
    assert adapter.keys() == expected.keys()
    assert [n for n in adapter if bits(adapter[n]) != bits(expected[n])] == []


@pytest.mark.parametrize(
    ("name", "lost", "told"),
    [
        ("dsmoe_s2_ep2_w2", "layer_1_expert_3_mp_rank_00_model_states.pt", "1 experts are missing"),
        ("dsmoe_s2_ep2_w2", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "optimizer files"),
        ("pipe_pp2_bf16", "mp_rank_01_model_states.pt", "model file is missing"),
        ("pipe_pp2_bf16", "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt", "optimizer files"),
        ("tp2_s1_bf16", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "optimizer files"),
        ("tp2_s1_bf16", "mp_rank_00_model_states.pt", "model file is missing"),
        ("s3_frozen_fp16_w2", "zero_pp_rank_1_mp_rank_00_model_states.pt", "frozen"),
    ],
)
def test_a_missing_file_is_refused(
    cases: Path, tmp_path: Path, name: str, lost: str, told: str
) -> None:
    copy = tmp_path / name
    shutil.copytree(cases / name, copy)
    (copy / "global_step3" / lost).unlink()
    with pytest.raises(BadInputError, match=told):
        formats.find_model(copy).read()


def test_all_files_of_the_last_model_parallel_rank_are_missed(cases: Path, tmp_path: Path) -> None:
    for name in ("pipe_pp2_bf16", "tp2_s1_bf16"):
        copy = tmp_path / name
        shutil.copytree(cases / name, copy)
        for path in (copy / "global_step3").glob("*mp_rank_01*"):
            path.unlink()
        with pytest.raises(BadInputError, match="1 model-parallel ranks are missing"):
            formats.find_model(copy).read()


def test_a_universal_folder_misses_a_parameter(cases: Path, tmp_path: Path) -> None:
    copy = tmp_path / "universal"
    shutil.copytree(cases / "universal_s3_qwen2tied", copy)
    (copy / "global_step3_universal/zero/model.norm.weight/fp32.pt").unlink()
    with pytest.raises(BadInputError, match="1 parameters are missing"):
        formats.find_model(copy).read()


@pytest.mark.parametrize(
    "name", ["hft_s2_llama_bf16_w2", "hft_s3_qwen3_bf16_w2", "s1_frozen_bf16_w2"]
)
def test_torch_reads_the_same_a_second_time(cases: Path, tmp_path: Path, name: str) -> None:
    streamconv.convert(cases / name, tmp_path / "out", dtype="bfloat16", sync=False)
    report = streamconv.verify(tmp_path / "out", source=cases / name)
    assert report.problems == []
    assert any("byte by byte, read by torch.load" in line for line in report.checked)
    assert not any("streamconv alone" in line for line in report.checked)


@pytest.mark.parametrize("name", ["tp2_s1_bf16", "s3_qwen2tied_bf16_w3"])
def test_lazy_tensors_are_slices_of_the_masters(cases: Path, name: str) -> None:
    expected = load_file(cases / name / "truth" / "model.safetensors")
    with streamconv.open(cases / name) as opened:
        for tensor in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
            rows = opened[tensor].torch(slice(3, 7))
            assert torch.equal(rows, expected[tensor][3:7])


def with_tensor_parallel_info(
    case: Path, copy: Path, change: Callable[[dict[str, Any]], Any]
) -> Path:
    """Return a copy of a case whose model files say something else of tensor parallelism."""
    shutil.copytree(case, copy)
    for path in (copy / "global_step3").glob("mp_rank_*_model_states.pt"):
        held = torch.load(path, weights_only=False)
        held["universal_checkpoint_info"] = change(held["universal_checkpoint_info"])
        torch.save(held, path)
    return copy


def test_patterns_tell_the_cuts_where_there_is_no_map(cases: Path, tmp_path: Path) -> None:
    case = cases / "tp2_s1_bf16"
    copy = with_tensor_parallel_info(
        case, tmp_path / "case", lambda info: {**info, "affine_map": None}
    )
    expected = load_file(case / "truth" / "model.safetensors")
    made = stored(formats.find_model(copy).read())
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[n], expected[n]) for n in expected)


ROWS = "parameter_with_row_parallelism_patterns"
REPLICATED = "tp_replicated_parameter_patterns"


def by_patterns(rows: list[str], replicated: list[str], **more: Any) -> dict[str, Any]:
    return {ROWS: rows, REPLICATED: replicated, "original_vocab_size": 131, **more}


def test_patterns_of_megatrons_kind_have_numbers_of_layers(cases: Path, tmp_path: Path) -> None:
    case = cases / "tp2_s1_bf16"
    rows = [r"model.layers.\d+.mlp.down_proj.weight", r"model.layers.\d+.self_attn.o_proj.weight"]
    replicated = [r"model.layers.\d+.input_layernorm", r"model.layers.\d+.post_attention_layernorm"]
    replicated += ["model.embed_tokens.weight", "model.norm"]
    copy = with_tensor_parallel_info(
        case, tmp_path / "case", lambda info: by_patterns(rows, replicated)
    )
    assert_same(stored(formats.find_model(copy).read()), case)


NAME = r"^model\.layers\.0\.mlp\.down_proj\.weight$"


def changed(info: dict[str, Any], **values: Any) -> dict[str, Any]:
    entry = info["affine_map"]["params"][NAME]
    piece = entry["ranks"][0]["pieces"][0]
    entry.update({k: v for k, v in values.items() if k in entry})
    piece.update({k: v for k, v in values.items() if k in piece or k == "scale"})
    return info


@pytest.mark.parametrize(
    "change",
    [
        lambda info: None,
        lambda info: {
            "universal_checkpoint_version": 0.4
        },  # ds_to_universal --inject_missing_state
        lambda info: {**info, "affine_map": {**info["affine_map"], "version": 2}},
        lambda info: changed(info, scale=0.5),
        lambda info: {**info, "affine_map": None, REPLICATED: [r"^model\.layers\.0.*"]},
        lambda info: {**info, "affine_map": None, REPLICATED: [r"(\d+)+x"]},
        lambda info: {**info, "affine_map": None, "parameter_to_average_patterns": ["model.norm"]},
        lambda info: {
            **info,
            "affine_map": None,
            "parameter_with_2_sub_params_cat_dim_0": [r"model.layers.\d+.mlp.gate_proj"],
        },
        lambda info: {
            **info,
            "affine_map": None,
            "parameter_with_sub_params": [{"patterns": [NAME], "shape": [3, -1]}],
        },
        lambda info: {**info, "affine_map": None, "parameter_with_sub_params": [{"patterns": "x"}]},
        lambda info: {
            **info,
            "affine_map": None,
            "autotp_unsupported_parameter_patterns": {NAME: "why"},
        },
        lambda info: changed(info, logical_shape=[48]),
        lambda info: changed(info, logical_shape=[48, 87]),
        lambda info: changed(info, logical_shape="48"),
        lambda info: changed(info, ranks={}),
        lambda info: changed(info, source=[7, [88, 1]]),
        lambda info: changed(info, source=[0, [1, 48]]),
        lambda info: changed(info, source=[-1, [88, 1]]),
        lambda info: changed(info, dest=[1 << 70, [44, 1]]),
        lambda info: changed(info, shape=[48, 43]),
        lambda info: changed(info, shape=[48, 1 << 70]),
    ],
)
def test_cuts_that_are_not_known_are_refused(
    cases: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    copy = with_tensor_parallel_info(cases / "tp2_s1_bf16", tmp_path / "case", change)
    with pytest.raises(BadInputError):
        formats.find_model(copy).read()
