"""Quantized weights become floats: what torch's own float8 and plain arithmetic make of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from scripts.makers.dcp import save_alone
from streamconv.errors import BadInputError, UnfitValuesError
from streamconv.executor.codes import decoding
from streamconv.ir.boxes import contiguous_strides
from streamconv.ir.dtypes import BF16, BY_NAME, F32
from streamconv.ir.recipe import AddProduct, Cast, Decode, MulScale, Recipe, SourceRef, View
from tests.test_executor import Source, execute, make_plan
from tests.test_quantization import CONFIG, FP8, SHAPES, State, bf16, checkpoint, fp8, released

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
MATRICES = [n for n, s in SHAPES.items() if "proj" in n and len(s) == 2]


# --- one element at a time -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "dtype"),
    [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2), ("exp2", torch.float8_e8m0fnu)],
)
def test_codes_are_what_torch_reads(code: Any, dtype: torch.dtype) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    found = decoding(code)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    there = ~np.isnan(expected)
    assert found[there].tobytes() == expected[there].tobytes()


def test_halves_of_bytes_are_e2m1() -> None:
    byte = np.arange(256)
    for code, half in (("low4", byte & 15), ("high4", byte >> 4)):
        assert decoding(code).tobytes() == E2M1[half].numpy().tobytes()
        expected = half.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        assert decoding(code).tobytes() == expected.tobytes()


def test_the_bytes_depend_on_neither_cuts_windows_nor_readers(tmp_path: Path) -> None:
    """Blocks of 5 x 7, which neither the shards nor the windows know of, with an update on top."""
    rng = np.random.default_rng(5)
    rows, columns, block = 43, 50, (5, 7)
    codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    codes[codes & 127 == 127] = 0
    scale = rng.standard_normal((-(-rows // 5), -(-columns // 7)), dtype=np.float32)
    left, right = (rng.standard_normal(s, dtype=np.float32) for s in ((rows, 2), (2, columns)))
    spread = np.repeat(np.repeat(scale, 5, 0), 7, 1)[:rows, :columns]
    decoded = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy() * spread
    update = (left[:, :1] * right[:1] + left[:, 1:] * right[1:]) * np.float32(0.5)
    expected = {
        "plain": torch.from_numpy(decoded),
        "turned": torch.from_numpy(decoded.T.copy()),
        "merged": torch.from_numpy(decoded + update),
    }

    def whole(fqn: str, array: np.ndarray) -> View:
        return View(SourceRef(fqn, array.shape), array.shape, contiguous_strides(array.shape))

    found = set()
    for k, cuts in enumerate(([[], []], [[3, 17, 30], []], [[6], [11, 20]])):
        folder = tmp_path / str(k)
        folder.mkdir()
        source = Source(folder, 2)
        source.add("w", codes, BY_NAME["F8_E4M3"], cuts)
        source.add("s", scale, F32, [[4], []])
        source.add("l", left, F32, [[], []])
        source.add("r", right, F32, [[], []])
        times = MulScale(whole("s", scale), block)
        plus = AddProduct(whole("l", left), whole("r", right), 0.5)
        at = SourceRef("w", (rows, columns))
        ops = (Decode("e4m3"), times)
        recipes = [
            Recipe("plain", BF16, View(at, at.shape, (columns, 1), 0, (*ops, Cast(BF16)))),
            Recipe("turned", BF16, View(at, (columns, rows), (1, columns), 0, (*ops, Cast(BF16)))),
            Recipe("merged", F32, View(at, at.shape, (columns, 1), 0, (*ops, plus, Cast(F32)))),
        ]
        plan = make_plan(source, recipes)
        for window, threads in itertools.product((97, 512, 1 << 16), (1, 3)):
            out = folder / f"{window}-{threads}"
            out.mkdir()
            execute(plan, out, window, threads)
            made = load_file(out / "model.safetensors")
            found.add((out / "model.safetensors").read_bytes())
            for name, tensor in expected.items():
                assert torch.equal(made[name], tensor.to(made[name].dtype)), (cuts, window, name)
    assert len(found) == 1


# --- the formats, each as its programs write it ---------------------------------------------------


def fp8_codes(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape).mul(40).to(torch.float8_e4m3fn)


def spread(scale: torch.Tensor, high: int, wide: int, shape: tuple[int, ...]) -> torch.Tensor:
    made = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    return made[: shape[0], : shape[1]]


def packed(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random bytes of two elements each, and their values, the lower half the even column."""
    held = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8)
    values = E2M1[torch.stack([held & 15, held >> 4], dim=2).long()].reshape(shape)
    return held, values


def quantized(kind: str) -> tuple[State, State, dict[str, Any]]:
    """Return a small model as ``kind`` stores it, what it means, and its quantization_config."""
    torch.manual_seed(11)
    state, truth = bf16(), {}
    config: dict[str, Any] = {"quant_method": "compressed-tensors"}
    for name in MATRICES:
        shape = rows, columns = SHAPES[name]
        del state[name]
        if kind == "blocks":
            config = FP8
            codes = state[name] = fp8_codes(shape)
            scale = state[f"{name}_scale_inv"] = torch.rand(-(-rows // 16), -(-columns // 16))
            value = codes.float() * spread(scale, 16, 16, shape)
        elif kind == "rows":
            codes = state[name] = fp8_codes(shape)
            scale = state[f"{name}_scale"] = torch.rand(rows, 1).bfloat16()
            value = codes.float() * scale.float()
        elif kind == "tensor":
            config = {"quant_method": "modelopt", "quant_algo": "FP8"}
            codes = state[name] = fp8_codes(shape)
            scale = state[f"{name}_scale"] = torch.rand(())
            state[name.replace(".weight", ".input_scale")] = torch.rand(())
            value = codes.float() * scale
        elif kind == "mistral":
            config = {**FP8, "weight_block_size": None}
            codes = state[name] = fp8_codes(shape)
            scale = state[name.replace(".weight", ".qscale_weight")] = torch.rand(())
            value = codes.float() * scale
        elif kind == "mxfp4":
            wide = columns if columns % 32 == 0 else 64
            held, values = packed((rows, wide))
            held, values = held[:, : columns // 2].contiguous(), values[:, :columns]
            state[f"{name}_packed"] = held
            exponent = torch.randint(110, 140, (rows, -(-columns // 32)), dtype=torch.uint8)
            state[f"{name}_scale"] = exponent
            value = values * spread(torch.exp2(exponent.float() - 127), 1, 32, shape)
        else:
            groups = -(-columns // 16)
            held, values = packed((rows, groups * 16))
            held, values = held[:, : columns // 2].contiguous(), values[:, :columns]
            scale = torch.rand(rows, groups).mul(200).to(torch.float8_e4m3fn)
            outer = torch.rand(1) * 3000 + 1
            state[f"{name}_scale"] = scale
            if kind == "nvfp4":
                state[f"{name}_packed"] = held
                state[f"{name}_global_scale"] = outer
                factor = scale.float() / outer
            else:
                config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
                state[name] = held
                state[f"{name}_scale_2"] = outer[0] / 1e6
                factor = scale.float() * state[f"{name}_scale_2"]
            value = values * spread(factor, 1, 16, shape)
        truth[name] = value
    return state, truth, config


KINDS = ("blocks", "rows", "tensor", "mistral", "mxfp4", "nvfp4", "modelopt-nvfp4")


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize("kind", KINDS)
def test_each_format_is_what_it_means(kind: str, tmp_path: Path) -> None:
    state, truth, config = quantized(kind)
    src = checkpoint(tmp_path / "actor", state, quantization_config=config)
    for dtype, torch_dtype in (("keep", torch.bfloat16), ("float32", torch.float32)):
        out = tmp_path / dtype
        streamconv.convert(src, out, dequantize=True, dtype=dtype, strict=True, sync=False)
        assert streamconv.verify(out).passed
        found = load_file(out / "model.safetensors")
        assert found.keys() == SHAPES.keys()
        for name, value in truth.items():
            assert torch.equal(found[name], value.to(torch_dtype)), name
        said = json.loads((out / "config.json").read_text())
        assert "quantization_config" not in said
        assert said["dtype"] == str(torch_dtype).removeprefix("torch.")


@pytest.mark.usefixtures("planned_here")
def test_shards_and_finished_folders_give_the_same(tmp_path: Path) -> None:
    state, _, config = quantized("blocks")
    src = checkpoint(tmp_path / "actor", state, quantization_config=config)
    folder = released(tmp_path / "model", state, quantization_config=config)
    weights = []
    for k, source in enumerate((src, folder)):
        streamconv.convert(source, tmp_path / f"{k}", dequantize=True, sync=False)
        weights.append(load_file(tmp_path / f"{k}" / "model.safetensors"))
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in SHAPES)


@pytest.mark.usefixtures("planned_here")
def test_what_has_no_meaning_is_refused(tmp_path: Path) -> None:
    state, _, config = quantized("blocks")
    name, norm = MATRICES[0], "model.norm.weight"
    cases: list[tuple[State, dict[str, Any], str]] = [
        ({n: t for n, t in state.items() if n != f"{name}_scale_inv"}, config, "has no scale"),
        (state, {**config, "weight_block_size": None}, "do not fit"),
        (state, {**config, "weight_block_size": [64, 64]}, "do not fit"),
        ({**state, f"{name}_scale_inv": torch.full((2, 2), torch.nan)}, config, "not finite"),
        # A scale of one block, where there are four, is not one of all.
        ({**state, f"{name}_scale_inv": torch.ones(1, 1)}, config, "do not fit"),
        ({**state, f"{name}_scale_inv": torch.ones(())}, config, "do not fit"),
        ({**state, f"{name}_scale_inv": torch.ones(32, 1)}, config, "do not fit"),
        ({**state, f"{name}_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, config, "cannot be"),
        ({**state, norm: state[norm].to(torch.float8_e4m3fn)}, config, "has no scale"),
    ]
    for k, (changed, said, message) in enumerate(cases):
        src = checkpoint(tmp_path / f"a{k}", changed, quantization_config=said)
        with pytest.raises((BadInputError, UnfitValuesError), match=message):
            streamconv.convert(src, tmp_path / f"o{k}", dequantize=True, sync=False)
        assert not (tmp_path / f"o{k}").exists()


@pytest.mark.usefixtures("planned_here")
def test_without_effect_it_says_so(tmp_path: Path) -> None:
    src = checkpoint(tmp_path / "actor", bf16())
    streamconv.convert(src, tmp_path / "out", dequantize=True, sync=False)
    notices = json.loads((tmp_path / "out" / "streamconv.json").read_text())["notices"]
    assert any("--dequantize is without effect" in n for n in notices)


# --- experts in one tensor -------------------------------------------------------------------------


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize("rows", [32, 24], ids=["whole blocks", "blocks that end with each expert"])
def test_fused_experts(rows: int, tmp_path: Path) -> None:
    torch.manual_seed(2)
    codes = torch.randn(3, rows, 40).mul(40).to(torch.float8_e4m3fn)
    scale = torch.rand(3, -(-rows // 16), 3)
    src = released(tmp_path / "m", {"w": codes, "w_scale_inv": scale}, quantization_config=FP8)
    (src / "config.json").write_text(json.dumps({"model_type": "own", "quantization_config": FP8}))
    streamconv.convert(src, tmp_path / "out", dequantize=True, sync=False)
    found = load_file(tmp_path / "out" / "model.safetensors")["w"]
    expected = [
        (c.float() * spread(s, 16, 16, (rows, 40))).bfloat16()
        for c, s in zip(codes, scale, strict=True)
    ]
    assert torch.equal(found, torch.stack(expected))


# --- an adapter on top -----------------------------------------------------------------------------


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize("kind", ["blocks", "mxfp4", "nvfp4"])
def test_an_adapter_is_merged_and_the_sum_rounded_once(kind: str, tmp_path: Path) -> None:
    state, truth, config = quantized(kind)
    base = released(tmp_path / "base", state, quantization_config=config)
    name = MATRICES[-1]
    rows, columns = SHAPES[name]
    a, b = torch.randn(2, columns), torch.randn(rows, 2)
    folder = tmp_path / "adapter"
    folder.mkdir()
    key = "base_model.model." + name.removesuffix(".weight")
    save_file(
        {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadInputError):
        streamconv.convert(folder, tmp_path / "out", base=base, sync=False)
    streamconv.convert(folder, tmp_path / "out", base=base, dequantize=True, sync=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    update = (b[:, :1] * a[:1] + b[:, 1:] * a[1:]) * 0.5
    assert torch.equal(found[name], (truth[name] + update).bfloat16())
    assert all(torch.equal(found[n], t.bfloat16()) for n, t in truth.items() if n != name)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["model_type"] == CONFIG["model_type"]
    assert "quantization_config" not in said


@pytest.mark.usefixtures("planned_here")
def test_quantized_weights_of_a_dcp_folder_are_decoded(tmp_path: Path) -> None:
    state = fp8()
    config = {**CONFIG, "quantization_config": FP8}
    src = save_alone(tmp_path / "dcp", state)
    (src / "config.json").write_text(json.dumps(config))
    plain = checkpoint(tmp_path / "ranks", state, quantization_config=FP8)
    for name, path in (("dcp", src), ("ranks", plain)):
        streamconv.convert(path, tmp_path / f"{name}_out", dequantize=True, sync=False)
    found = [load_file(tmp_path / f"{n}_out/model.safetensors") for n in ("dcp", "ranks")]
    assert found[0].keys() == SHAPES.keys()
    assert all(torch.equal(found[0][n], t) for n, t in found[1].items())
    assert streamconv.verify(tmp_path / "dcp_out", source=src).passed
