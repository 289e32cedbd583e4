"""``verify`` of what is decoded, added up or quantized: torch computes it anew, by itself."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streamconv
from streamconv.executor import codes, kernels
from streamconv.formats.safetensors_file import read_folder
from streamconv.verification import source, torch_check, torch_files
from streamconv.verification.folder import _check_quantization
from streamconv.verification.report import Report
from tests import test_quantization as quantized
from tests.test_quantization import State


@pytest.fixture(autouse=True)
def in_this_process(planned_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children's work is done here."""
    monkeypatch.setattr(torch_files, "limited_memory", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(source, "ask", lambda module, request, doing: torch_check._check(request))


def by_torch_alone(out: Path, *sources: Path) -> None:
    """Verify, and see that nothing was left to the converter's own reader."""
    report = streamconv.verify(out, source=sources)
    assert report.passed, report.problems
    assert any("decoded, added up or quantized by torch" in line for line in report.checked)
    assert not any("by streamconv alone" in line for line in report.checked), report.checked


QUANTIZE = (
    {"dequantize": True},
    {"dequantize": True, "dtype": "float32"},
    *({"quantize": rule} for rule in ("fp8-block", "fp8-block:ue8m0", "fp8-channel")),
)


@pytest.mark.parametrize("options", QUANTIZE, ids=str)
@pytest.mark.parametrize("finished", [False, True])
def test_torch_decodes_and_quantizes_by_itself(
    finished: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    make = quantized.released if finished else quantized.checkpoint
    src = make(tmp_path / "src", quantized.fp8(), quantization_config=quantized.FP8)
    streamconv.convert(src, tmp_path / "out", sync=False, **options)
    by_torch_alone(tmp_path / "out", src)


def test_torch_adds_up_by_itself(tmp_path: Path) -> None:
    sources = [
        quantized.checkpoint(tmp_path / "a", quantized.fp8(), quantization_config=quantized.FP8),
        quantized.released(tmp_path / "b", quantized.bf16(), quantization_config=quantized.FP8),
    ]
    for k, options in enumerate(({}, {"dtype": "float32"}, {"quantize": "fp8-block"})):
        out = tmp_path / str(k)
        streamconv.average(sources, out, weights=[0.3, 0.7], dequantize=True, sync=False, **options)
        by_torch_alone(out, *sources)


def test_arithmetic_of_ours_that_is_wrong_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = quantized.checkpoint(tmp_path / "a", quantized.fp8(), quantization_config=quantized.FP8)
    right = codes.decoding("e4m3")
    wrong = right.copy()
    wrong[0x38] *= 1.0625
    monkeypatch.setattr(kernels, "decoding", lambda code: wrong if code == "e4m3" else right)
    streamconv.convert(src, tmp_path / "out", dequantize=True, sync=False)
    report = streamconv.verify(tmp_path / "out", source=src)
    assert any("though not as streamconv does" in p for p in report.problems), report.problems


@pytest.mark.parametrize("rule", ["fp8-block", "fp8-block:ue8m0", "fp8-channel"])
def test_codes_that_no_rule_makes_are_seen_without_a_source(rule: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    state = {n: torch.randn(s) for n, s in quantized.SHAPES.items()}
    src = quantized.checkpoint(tmp_path / "src", state)
    streamconv.convert(src, tmp_path / "out", quantize=rule, sync=False)
    report = streamconv.verify(tmp_path / "out")
    assert report.passed, report.problems
    assert any(f"({rule})" in line for line in report.checked)
    scale = "_scale" if rule == "fp8-channel" else "_scale_inv"
    name = quantized.DOWN

    def problems(change: Callable[[State], None]) -> str:
        """Return what is found where a file and its manifest were both changed."""
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(tmp_path / "out", bad)
        held = load_file(bad / "model.safetensors")
        change(held)
        with (bad / "model.safetensors").open("r+b") as stream:
            for tensor in read_folder(bad).values():
                stream.seek(tensor.begin)
                stream.write(held[tensor.name].contiguous().view(torch.uint8).numpy().tobytes())
        found = Report()
        tensors = read_folder(bad)
        _check_quantization(bad, tensors, rule, found)
        return " ".join(found.problems)

    def with_nan(state: State) -> None:
        state[name].view(torch.uint8)[1, 2] = 0x7F

    def too_small(state: State) -> None:
        state[name].view(torch.uint8)[:] = 0x30

    def negative(state: State) -> None:
        state[name + scale][0, 0] = -1.0

    def no_power(state: State) -> None:
        state[name + scale][0, 0] = 3.0

    assert "NaN" in problems(with_nan)
    assert "no code of a block" in problems(too_small)
    assert "not a positive number" in problems(negative)
    assert ("power of two" in problems(no_power)) == rule.endswith("ue8m0")
