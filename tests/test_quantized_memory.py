"""What is computed takes no more memory than what is moved: models of eight times the budget and more.

Whole processes, measured from outside, and every value against torch's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from scripts.makers.large import LargeMade, make_large
from scripts.measured import run
from streamconv.options import AverageOptions
from tests.test_dequantize import E2M1, spread
from tests.test_quantization import CONFIG, LAYER, SHAPES
from tests.test_quantize import by_torch

pytestmark = [pytest.mark.slow, pytest.mark.memory]

LIMIT = 64 * 10**6
# The smallest with room for a band of blocks in float32; sums in float64 need 67 MB.
COMPUTING_LIMIT = 72 * 10**6
BLOCK = 128
ROWS, COLUMNS = 3750, 8000  # the last block is cut both ways
KINDS = (
    "fp8-block", "fp8-block-ue8m0", "fp8-channel", "fp8-tensor", "mxfp8",
    "fp4", "mxfp4", "gpt-oss", "nvfp4", "modelopt-nvfp4",
)  # fmt: skip
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}


def within(
    source: Path, *, out: Path, limit: int = LIMIT, **options: Any
) -> dict[str, torch.Tensor]:
    """Plan here and run within ``limit``; return the tensors that were written."""
    plan = out.with_suffix(".jsonl")
    streamconv.plan(source, output=plan, **options)
    done = run("run", plan, out, "--max-mem", f"{limit // 10**6}MB", "--no-sync")
    assert done.code == 0, done.err
    assert done.peak_bytes <= limit
    return load_file(out / "model.safetensors")


def fp8_codes(rows: int, columns: int) -> torch.Tensor:
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0
    return codes.view(torch.float8_e4m3fn)


def e2m1(held: torch.Tensor) -> torch.Tensor:
    byte = torch.arange(256)
    return torch.stack([E2M1[byte & 15], E2M1[byte >> 4]], dim=1)[held.int()].flatten(-2)


def stored(kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what ``kind`` stores of a weight called as it is, and the weight."""
    torch.manual_seed(len(kind))
    name = f"{kind}.weight"
    grid = -(-ROWS // BLOCK), -(-COLUMNS // BLOCK)
    exponents = torch.randint(110, 140, (ROWS, COLUMNS // 32), dtype=torch.uint8)
    powers = torch.exp2(exponents.float() - 127)
    if kind.startswith(("fp8", "mxfp8")):
        codes = fp8_codes(ROWS, COLUMNS)
        high, wide = {
            "fp8-channel": (1, COLUMNS),
            "fp8-tensor": (ROWS, COLUMNS),
            "mxfp8": (1, 32),
        }.get(kind, (BLOCK, BLOCK))
        if kind == "fp8-block":
            scale = factor = torch.rand(grid)
        elif kind == "fp8-block-ue8m0":
            factor = torch.exp2(torch.randint(-20, 20, grid).float())
            scale = factor.to(torch.float8_e8m0fnu)
        elif kind == "fp8-channel":
            scale = torch.rand(ROWS, 1).bfloat16()
            factor = scale.float()
        elif kind == "fp8-tensor":
            scale = torch.rand(())
            factor = scale.reshape(1, 1)
        else:
            scale, factor = exponents, powers
        leaf = "_scale" if kind in ("fp8-channel", "fp8-tensor") else "_scale_inv"
        value = codes.float() * spread(factor, high, wide, (ROWS, COLUMNS))
        return {name: codes, name + leaf: scale}, value
    held = torch.randint(0, 256, (ROWS, COLUMNS // 2), dtype=torch.uint8)
    values = e2m1(held)
    if kind == "gpt-oss":
        value = (values * spread(powers, 1, 32, (ROWS, COLUMNS))).unflatten(0, (2, -1))
        blocks = held.reshape(2, ROWS // 2, COLUMNS // 32, 16)
        scales = exponents.reshape(2, ROWS // 2, -1)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}, value.transpose(1, 2)
    if kind == "fp4":
        parts = {name: held.view(torch.int8), f"{kind}.scale": powers.to(torch.float8_e8m0fnu)}
        return parts, values * spread(powers, 1, 32, (ROWS, COLUMNS))
    if kind == "mxfp4":
        parts = {f"{name}_packed": held, f"{name}_scale": exponents}
        return parts, values * spread(powers, 1, 32, (ROWS, COLUMNS))
    scale = torch.rand(ROWS, COLUMNS // 16).mul(200).to(torch.float8_e4m3fn)
    outer = torch.rand(1) + 0.5
    if kind == "nvfp4":
        parts = {f"{name}_packed": held, f"{name}_scale": scale, f"{name}_global_scale": outer}
        factor = scale.float() / outer
    else:
        parts = {name: held, f"{name}_scale": scale, f"{name}_scale_2": outer[0]}
        factor = scale.float() * outer
    return parts, values * spread(factor, 1, 16, (ROWS, COLUMNS))


def save(folder: Path, state: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "own", **config}))
    return folder


def test_every_kind_of_code_is_decoded_within_64_mb(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    index, truth = {}, {}
    for kind in KINDS:
        parts, value = stored(kind)
        save_file(parts, source / f"model-{kind}.safetensors")
        index |= dict.fromkeys(parts, f"model-{kind}.safetensors")
        truth[f"{kind}.weight"] = value.bfloat16()
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {"model_type": "own", "quantization_config": FP8}
    (source / "config.json").write_text(json.dumps(config))
    assert sum(t.nbytes for t in truth.values()) > 8 * LIMIT
    found = within(source, out=tmp_path / "out", dequantize=True)
    assert found.keys() == truth.keys()
    assert [n for n, t in truth.items() if not torch.equal(found[n], t)] == []


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> LargeMade:
    made = make_large(
        tmp_path_factory.mktemp("large"), 600_000_000, 8, dtype=torch.bfloat16, hidden_size=2048
    )
    assert sum(p.stat().st_size for p in made.source.glob("*.pt")) > 8 * COMPUTING_LIMIT
    return made


@pytest.mark.parametrize("rule", ["fp8-block", "fp8-block:ue8m0", "fp8-channel"])
def test_weights_are_quantized_within_72_mb(rule: str, large: LargeMade, tmp_path: Path) -> None:
    found = within(large.source, out=tmp_path / "out", limit=COMPUTING_LIMIT, quantize=rule)
    suffix = "_scale" if rule == "fp8-channel" else "_scale_inv"
    assert sum(n.endswith(suffix) for n in found) == len(found) - len(large.shapes)
    for name in large.shapes:
        expected = large.expected(name)
        if name + suffix in found:
            block = (1, expected.shape[1]) if rule == "fp8-channel" else (BLOCK, BLOCK)
            codes, scale = by_torch(expected, *block, rule)
            assert torch.equal(found[name + suffix], scale), name
            assert torch.equal(found[name].view(torch.uint8), codes.view(torch.uint8)), name
        else:
            assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("weights", [(0.25, 0.5), (1.0, -1.0)], ids=["average", "difference"])
def test_sums_are_made_within_72_mb(
    weights: tuple[float, float], large: LargeMade, tmp_path: Path
) -> None:
    average = AverageOptions((large.source,), weights)
    found = within(large.source, out=tmp_path / "out", limit=COMPUTING_LIMIT, average=average)
    assert found.keys() == large.shapes.keys()
    for name, tensor in found.items():
        expected = large.expected(name).double() * sum(weights)
        assert torch.equal(tensor, expected.to(tensor.dtype)), name


def test_an_adapter_is_merged_into_a_quantized_base_within_64_mb(tmp_path: Path) -> None:
    torch.manual_seed(6)
    hidden, inner, layers = 2048, 5700, 6
    sizes = {32: hidden, 40: inner, 16: hidden // 2}
    state, truth, adapter = {}, {}, {}
    for layer in range(layers):
        for name, shape in SHAPES.items():
            if name.startswith(LAYER) or not layer:
                key = name.replace(".0.", f".{layer}.")
                rows, columns = (sizes.get(n, n) for n in (*shape, 1)[:2])
                if "proj" not in name:
                    truth[key] = state[key] = torch.randn(
                        [sizes.get(n, n) for n in shape]
                    ).bfloat16()
                    continue
                codes = state[key] = fp8_codes(rows, columns)
                scale = torch.rand(-(-rows // BLOCK), -(-columns // BLOCK))
                state[f"{key}_scale_inv"] = scale
                value = codes.float() * spread(scale, BLOCK, BLOCK, (rows, columns))
                if "down_proj" in name:
                    a, b = torch.randn(1, columns), torch.randn(rows, 1)
                    module = "base_model.model." + key.removesuffix(".weight")
                    adapter |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
                    value += b * a * 2
                truth[key] = value.bfloat16()
    assert sum(t.nbytes for t in truth.values()) > 8 * LIMIT
    config = {
        **CONFIG,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
    }
    base = save(tmp_path / "base", state, **config, quantization_config=FP8)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    found = within(folder, out=tmp_path / "out", base=base, dequantize=True)
    assert found.keys() == truth.keys()
    assert [n for n, t in truth.items() if not torch.equal(found[n], t)] == []
