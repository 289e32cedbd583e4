"""Casts give torch's bits. Every one of the 2**32 floats: ``python -m tests.test_casts``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import streamconv
from streamconv.errors import BadInputError
from streamconv.executor import kernels
from streamconv.executor.kernels import run
from streamconv.ir.dtypes import BF16, BY_NAME, F16, F32, DType
from streamconv.ir.lowering import Dim, MoveOp
from streamconv.ir.recipe import AddScalar, Cast

F64 = BY_NAME["F64"]

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16}
# The first magnitude that rounds to infinity; NaNs begin one above infinity's pattern.
TOO_LARGE = {"F16": 0x477FF000, "BF16": 0x7F7F8000}
LARGEST = {"F16": 0x7BFF, "BF16": 0x7F7F}
QUIET_NAN = {"F16": 0x7E00, "BF16": 0x7FC0}
INFINITY = 0x7F800000


def cast(bits: np.ndarray, dtype: DType) -> np.ndarray:
    """Cast floats, given as their bits, with our kernel; return the result's bits."""
    out = bytearray(2 * bits.size)
    dims = (Dim(bits.size, 1, 1),)
    run(memoryview(out), dtype, memoryview(bits).cast("B"), F32, dims, (Cast(dtype),), what="t")
    return np.frombuffer(out, np.uint16)


def differences(bits: np.ndarray, dtype: DType) -> int:
    """Count the floats, of those that the kernel takes, whose cast differs from torch's.

    NaNs are one quiet NaN with us (torch writes one of two, by the path it takes).
    """
    magnitude = bits & 0x7FFFFFFF
    bits = bits[(magnitude < TOO_LARGE[dtype.name]) | (magnitude >= INFINITY)]
    if not bits.size:
        return 0
    expected = torch.from_numpy(bits.view(np.float32)).to(TORCH[dtype.name]).view(torch.int16)
    expected = expected.numpy().view(np.uint16)
    nan = (bits & 0x7FFFFFFF) > INFINITY
    return int((cast(bits, dtype) != np.where(nan, QUIET_NAN[dtype.name], expected)).sum())


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_every_exponent_and_every_way_to_round(dtype: DType) -> None:
    ends = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x2FFF, 0x3000, 0x3001, 0x5A5A]
    ends += [0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFF, *(1 << k for k in range(16))]
    bits = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | np.array(ends, np.uint32)
    assert differences(bits.reshape(-1), dtype) == 0


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("sign", [0, 1 << 31], ids=["positive", "negative"])
def test_the_first_value_that_would_become_infinite_is_refused(dtype: DType, sign: int) -> None:
    bits = np.zeros(1000, np.uint32)
    bits[500] = sign | (TOO_LARGE[dtype.name] - 1)
    assert cast(bits, dtype)[500] & 0x7FFF == LARGEST[dtype.name]
    bits[500] += 1
    with pytest.raises(BadInputError, match="does not fit"):
        cast(bits, dtype)


def moved(values: np.ndarray, source: DType, target: DType, *ops: MoveOp) -> np.ndarray:
    """Return what our kernel makes of ``values``, which are raw bits."""
    out = bytearray(target.itemsize * values.size)
    dims = (Dim(values.size, 1, 1),)
    data = memoryview(np.ascontiguousarray(values)).cast("B")
    run(memoryview(out), target, data, source, dims, ops, what="a.weight")
    return np.frombuffer(out, f"u{target.itemsize}")


def of_torch(values: np.ndarray, dtype: DType) -> torch.Tensor:
    signed = values.view(f"i{values.dtype.itemsize}").copy()
    return torch.from_numpy(signed).view(getattr(torch, dtype.torch))


NAN = {"F16": 0x7E00, "BF16": 0x7FC0, "F32": 0x7FC00000, "F64": 0x7FF8 << 48}
ALL_16 = np.arange(1 << 16, dtype=np.uint16)
# Around every power of two of float64: what rounds once, what rounds twice, subnormals, both zeros.
_TOPS = np.arange(1 << 12, dtype=np.uint64) << np.uint64(52)
_ENDS = [0, 1, 1 << 28, 1 << 29, (1 << 29) + 1, 1 << 41, (1 << 41) + 1, (1 << 44) - 1, 1 << 44]
_ENDS += [(1 << 44) + 1, (1 << 45) + (1 << 44) - 1, 0x5A5A5A5A5A5A5, (1 << 52) - 1]
SOME_64 = (_TOPS[:, None] | np.array(_ENDS, np.uint64)).reshape(-1)
SOME_32 = (
    ALL_16.astype(np.uint32)[:, None] << 16 | np.array([0, 1, 0x7FFF, 0x8000, 0xFFFF], np.uint32)
).reshape(-1)
PAIRS = [
    (F64, F32, SOME_64),
    (F64, F16, SOME_64),
    (F64, BF16, SOME_64),
    (F32, F16, SOME_32),
    (F32, BF16, SOME_32),
    (F32, F64, SOME_32),
    (BF16, F16, ALL_16),
    (F16, BF16, ALL_16),
    (F16, F32, ALL_16),
    (BF16, F32, ALL_16),
]


@pytest.mark.parametrize(("source", "target", "values"), PAIRS, ids=str)
@pytest.mark.parametrize("op", ["cast", "add"])
def test_every_pair_of_types_gives_torchs_bits_or_is_refused(
    source: DType, target: DType, values: np.ndarray, op: str
) -> None:
    """Also what torch rounds to infinity: of a finite value it is refused, each one on its own."""
    ops = (Cast(target),) if op == "cast" else (AddScalar(1.0), Cast(target))
    tensor = of_torch(values, source)
    wanted = (tensor if op == "cast" else tensor + 1.0).to(getattr(torch, target.torch))
    lost = (wanted.isinf() & tensor.isfinite()).numpy()
    bits = wanted.view(getattr(torch, f"int{8 * target.itemsize}")).numpy()
    expected = bits.view(f"u{target.itemsize}").copy()
    expected[wanted.isnan().numpy()] = NAN[target.name]
    assert np.array_equal(moved(values[~lost], source, target, *ops), expected[~lost])
    assert lost.any() == (
        (source, target) not in [(F32, F64), (F16, BF16), (F16, F32), (BF16, F32)]
    )
    for value in values[lost][:: max(1, lost.sum() // 50)]:
        with pytest.raises(BadInputError, match="does not fit") as caught:
            moved(np.array([value]), source, target, *ops)
        assert caught.value.where == "a.weight"
        assert "--keep-dtype a.weight" in str(caught.value.hint)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_a_sum_that_leaves_its_type_is_refused(dtype: DType) -> None:
    largest = np.array([torch.finfo(getattr(torch, dtype.torch)).max], np.float64)
    bits = torch.from_numpy(largest).to(getattr(torch, dtype.torch))
    raw = bits.view(torch.uint8).numpy().view(f"u{dtype.itemsize}")
    with pytest.raises(BadInputError, match="does not fit"):
        moved(raw, dtype, dtype, AddScalar(float(largest[0])))


def test_without_a_cast_a_nan_keeps_its_bits() -> None:
    assert np.array_equal(moved(ALL_16, F16, F16), ALL_16)
    assert np.array_equal(moved(ALL_16, BF16, BF16), ALL_16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [1e300, -1e39])
def test_a_float64_that_leaves_the_type_is_refused_by_conversion_and_verification(
    dtype: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = tmp_path / "actor"
    actor.mkdir()
    state = {"a.weight": torch.tensor([1.0, value, 2.0], dtype=torch.float64)}
    torch.save(state, actor / "model_world_size_1_rank_0.pt")
    with pytest.raises(BadInputError, match="does not fit") as caught:
        streamconv.convert(actor, tmp_path / "out", dtype=dtype)
    assert caught.value.where == "a.weight"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["actor"]
    # What a release without the check wrote, with a manifest that fits.
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "check_finite", lambda *_: None)
        streamconv.convert(actor, tmp_path / "out", dtype=dtype)
    report = streamconv.verify(tmp_path / "out", source=actor)
    assert any("a.weight" in p and "infinite" in p for p in report.problems), report.problems


def main() -> int:
    """Compare all 2**32 floats."""
    step = 1 << 24
    total = 0
    for dtype in (F16, BF16):
        found = 0
        for lo in range(0, 1 << 32, step):
            found += differences(np.arange(lo, lo + step, dtype=np.uint64).astype(np.uint32), dtype)
        print(f"{dtype}: {found} of {1 << 32} differ", flush=True)
        total += found
    return bool(total)


if __name__ == "__main__":
    sys.exit(main())
