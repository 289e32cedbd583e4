"""Floats become fp8, by torch's own cast and by arithmetic that is written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import streamconv
from streamconv.errors import UnfitValuesError, UsageError
from streamconv.executor.encoding import encoded
from streamconv.ir.boxes import contiguous_strides
from streamconv.ir.dtypes import BY_NAME, F32
from streamconv.ir.recipe import Encode, Recipe, SourceRef, View
from tests.test_dequantize import spread
from tests.test_executor import Source, execute, make_plan
from tests.test_quantization import SHAPES, State, bf16, checkpoint

MATRICES = [n for n, s in SHAPES.items() if "proj" in n and len(s) == 2]
RULES = ("fp8-block", "fp8-block:ue8m0", "fp8-channel")


def by_torch(weight: torch.Tensor, high: int, wide: int, rule: str) -> tuple[torch.Tensor, ...]:
    """Return codes and scales."""
    rows, columns = weight.shape
    whole = torch.nn.functional.pad(weight.float().abs(), (0, -columns % wide, 0, -rows % high))
    blocks = whole.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
    scale = torch.clamp(blocks.amax((1, 3)) / 448, min=1e-12)
    if rule.endswith("ue8m0"):
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    quotient = weight.float() / spread(scale, high, wide, (rows, columns))
    return quotient.clamp(-448, 448).to(torch.float8_e4m3fn), scale


def test_codes_are_the_nearest_as_torch_rounds() -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x8000, 0xFFFF):
        values = (upper | lower).view(np.float32)
        values = values[np.isfinite(values)]
        expected = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert encoded(values).tobytes() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("rule", RULES)
def test_the_bytes_depend_on_neither_cuts_windows_nor_readers(rule: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    weight = torch.randn(43, 52) * torch.logspace(-3, 3, 52)
    weight[16:32, 16:32] = 0
    high, wide = (1, 52) if rule == "fp8-channel" else (16, 16)
    codes, scale = by_torch(weight, high, wide, rule)
    found = set()
    for k, cuts in enumerate(([[], []], [[3, 17, 30], []], [[6], [11, 20]])):
        folder = tmp_path / str(k)
        folder.mkdir()
        source = Source(folder, 2)
        source.add("w", weight.numpy(), F32, cuts)
        view = View(SourceRef("w", (43, 52)), (43, 52), contiguous_strides((43, 52)))
        encode = Encode(rule, (high, wide), (43, 52), "codes")
        scales = Encode(rule, (high, wide), (43, 52), "scales")
        recipes = [
            Recipe("w", BY_NAME["F8_E4M3"], view, encode),
            Recipe("w_scale_inv", F32, view, scales),
        ]
        plan = make_plan(source, recipes)
        for window, threads in ((64, 1), (700, 3), (1 << 16, 1)):
            out = folder / str(window)
            out.mkdir()
            execute(plan, out, window, threads)
            made = load_file(out / "model.safetensors")
            assert torch.equal(made["w"].view(torch.uint8), codes.view(torch.uint8)), window
            assert torch.equal(made["w_scale_inv"], scale), window
            found.add((out / "model.safetensors").read_bytes())
    assert len(found) == 1


def wide_model() -> tuple[State, dict[str, Any]]:
    """Return the model of the other tests with matrices of more than a block."""
    torch.manual_seed(4)
    sizes = {"hidden_size": 160, "intermediate_size": 264, "head_dim": 16}
    shapes = {
        n: tuple({32: 160, 40: 264}.get(size, size) if "k_proj" not in n else size for size in s)
        for n, s in SHAPES.items()
    }
    for name, shape in {"q": (32, 160), "k": (16, 160), "v": (16, 160), "o": (160, 32)}.items():
        shapes[f"model.layers.0.self_attn.{name}_proj.weight"] = shape
    return {n: torch.randn(s) for n, s in shapes.items()}, sizes


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize("rule", RULES)
def test_projections_become_fp8_and_config_says_so(rule: str, tmp_path: Path) -> None:
    state, sizes = wide_model()
    src = checkpoint(tmp_path / "actor", state, **sizes)
    out = tmp_path / "out"
    streamconv.convert(src, out, quantize=rule, dtype="bfloat16", sync=False)
    assert streamconv.verify(out).passed
    found = load_file(out / "model.safetensors")
    suffix = "_scale" if rule == "fp8-channel" else "_scale_inv"
    for name in MATRICES:
        block = (1, state[name].shape[1]) if rule == "fp8-channel" else (128, 128)
        codes, scale = by_torch(state[name], *block, rule)
        assert torch.equal(found[name].view(torch.uint8), codes.view(torch.uint8)), name
        assert torch.equal(found[name + suffix], scale), name
    kept = state.keys() - {*MATRICES}
    assert found.keys() == state.keys() | {n + suffix for n in MATRICES}
    assert all(torch.equal(found[n], state[n].bfloat16()) for n in kept)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    stays = said.get("ignore", said.get("modules_to_not_convert"))
    assert sorted(stays) == ["lm_head", "model.embed_tokens"]
    assert ("scale_fmt" in said) == rule.endswith("ue8m0")
    again = tmp_path / "again"
    streamconv.convert(out, again, dequantize=True, dtype="float32", sync=False)
    back = load_file(again / "model.safetensors")
    for name in MATRICES:
        assert (back[name] - state[name]).abs().max() <= state[name].abs().max() / 448 * 33
    # Floats of fp8 are quantized to the fp8 that they were.
    third = tmp_path / "third"
    streamconv.convert(out, third, quantize=rule, sync=False)
    assert all(
        torch.equal(t.view(torch.uint8), found[n].view(torch.uint8))
        for n, t in load_file(third / "model.safetensors").items()
    )


@pytest.mark.usefixtures("planned_here")
def test_what_is_kept_is_kept_with_what_is_read_with_it(tmp_path: Path) -> None:
    src = checkpoint(tmp_path / "actor", bf16())
    out = tmp_path / "out"
    streamconv.convert(src, out, quantize="fp8-block", keep_dtype=["*.up_proj.*"], sync=False)
    found = load_file(out / "model.safetensors")
    floats = {n.split(".")[-2] for n in MATRICES if found[n].dtype == torch.bfloat16}
    assert floats == {"up_proj", "gate_proj"}


@pytest.mark.usefixtures("planned_here")
def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    state = bf16()
    state[MATRICES[0]][3, 5] = torch.inf
    src = checkpoint(tmp_path / "actor", state)
    with pytest.raises(UnfitValuesError, match="infinity"):
        streamconv.convert(src, tmp_path / "out", quantize="fp8-block", sync=False)
    with pytest.raises(UsageError, match="quantize"):
        streamconv.convert(src, tmp_path / "out", quantize="int3", sync=False)
    with pytest.raises(UsageError):
        streamconv.convert(src, tmp_path / "out", quantize="fp8-block", keep_dtype=["*"])
