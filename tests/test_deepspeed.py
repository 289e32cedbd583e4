"""DeepSpeed's checkpoints, made by DeepSpeed itself, bit for bit against the engine's own weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streamconv

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
