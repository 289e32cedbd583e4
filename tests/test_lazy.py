"""A checkpoint as lazy tensors: the slices of the truth, and no more read than they need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamconv
from streamconv import planning
from streamconv.lazy import LazyCheckpoint
from tests.makers.fsdp import Made
from tests.outputs import Stored, read_truth

NUMPY = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8,
    "I64": np.int64,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


def as_numpy(tensor: Stored) -> np.ndarray:
    return np.frombuffer(tensor.data, NUMPY[tensor.dtype]).reshape(tensor.shape)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes()


@contextlib.contextmanager
def opened(source: Path, **options) -> Iterator[LazyCheckpoint]:
    """Open with the planning task run in this process, which has torch loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            planning, "_ask", lambda request, **_: planning._TASKS[request["task"]](request)
        )
        patch.setattr(planning, "_limited_memory", contextlib.nullcontext)
        checkpoint = streamconv.open(source, **options)
    with checkpoint:
        yield checkpoint


NAMES = ["fsdp2", "fsdp2-moe", "fsdp2-gpt_oss", "fsdp2-tp", "fsdp2-placement", "fsdp1-buffers"]


@pytest.mark.parametrize("name", NAMES)
def test_names_shapes_and_values_are_the_truths(name: str, checkpoints: dict[str, Made]) -> None:
    made = checkpoints[name]
    truth = read_truth(made.truth_hf)
    with opened(made.source) as checkpoint:
        assert set(checkpoint) == truth.keys()
        assert len(checkpoint) == len(truth)
        for tensor_name, tensor in checkpoint.items():
            expected = truth[tensor_name]
            assert (tensor.name, tensor.shape) == (tensor_name, expected.shape)
            assert tensor.dtype.name == expected.dtype
            assert tensor.nbytes == len(expected.data)
            assert same_bits(tensor.numpy(), as_numpy(expected)), tensor_name
        with pytest.raises(KeyError):
            checkpoint["no.such.tensor"]


@st.composite
def indices(draw: st.DrawFn, shape: tuple[int, ...]) -> object:
    """An index as people write them: integers, slices, an ellipsis, fewer than there are dims."""
    head = draw(st.integers(0, len(shape)))
    tail = draw(st.integers(head, len(shape)))
    items: list[object] = [draw(items_of(size)) for size in shape[:head]]
    if not items or draw(st.booleans()):
        items += [..., *(draw(items_of(size)) for size in shape[tail:])]
    return tuple(items) if len(items) > 1 or draw(st.booleans()) else items[0]


@st.composite
def items_of(draw: st.DrawFn, size: int) -> object:
    if size and draw(st.booleans()):
        return draw(st.integers(-size, size - 1))
    edge = st.none() | st.integers(-size - 2, size + 2)
    return slice(draw(edge), draw(edge), draw(st.none() | st.integers(1, 4)))


@pytest.mark.parametrize("name", ["fsdp2-bf16", "fsdp2-moe", "fsdp2-mixtral", "fsdp2-hsdp-tp"])
def test_any_index_is_numpys(name: str, checkpoints: dict[str, Made]) -> None:
    made = checkpoints[name]
    truth = {n: as_numpy(t) for n, t in read_truth(made.truth_hf).items()}
    with opened(made.source) as checkpoint:

        @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(st.data())
        def check(data: st.DataObject) -> None:
            tensor = data.draw(st.sampled_from(sorted(truth)))
            index = data.draw(indices(truth[tensor].shape))
            assert same_bits(np.asarray(checkpoint[tensor][index]), truth[tensor][index])

        check()


def test_odd_buffers_scalars_and_empty_tensors(checkpoints: dict[str, Made]) -> None:
    with opened(checkpoints["fsdp1-buffers"].source) as checkpoint:
        odd = {n.rpartition(".")[2]: t for n, t in checkpoint.items() if "odd_" in n}
        assert odd["odd_scalar"].shape == ()
        assert odd["odd_scalar"][()] == np.float32(-1.5)
        assert odd["odd_scalar"].torch().item() == -1.5
        assert odd["odd_empty"][:, 1:].shape == (0, 2)
        assert odd["odd_empty"].torch().shape == (0, 3)
        assert odd["odd_one"][0] == np.float32(0.5)
        assert odd["odd_bool"][1:4].tolist() == [False, True, True]
        assert odd["odd_int64"][-1] == 6 << 40
        assert odd["odd_float8"].torch().dtype == torch.float8_e4m3fn
        assert odd["odd_complex64"][2] == np.complex64(2 - 2j)


def test_torch_tensors_have_torchs_dtype(checkpoints: dict[str, Made]) -> None:
    made = checkpoints["fsdp2-bf16"]
    name = "model.embed_tokens.weight"
    truth = read_truth(made.truth_hf)[name]
    whole = torch.frombuffer(bytearray(truth.data), dtype=torch.bfloat16).reshape(truth.shape)
    with opened(made.source) as checkpoint:
        lazy = checkpoint[name]
        assert repr(lazy) == f"LazyTensor('{name}', shape=[509, 56], dtype=bfloat16)"
        for index in (slice(None), slice(100, 300), (slice(None), 7), 508, (3, slice(0, 50, 7))):
            tensor = lazy.torch(index)
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor.view(torch.int16), whole[index].view(torch.int16))


def test_options_apply(checkpoints: dict[str, Made]) -> None:
    made = checkpoints["fsdp2-moe"]
    state = read_truth(made.truth_state)
    with opened(made.source, layout="memory", dtype="bfloat16") as checkpoint:
        assert set(checkpoint) == state.keys()
        name = next(n for n in state if n.endswith("experts.down_proj"))
        expected = as_numpy(state[name])[2:4].astype(ml_dtypes.bfloat16)
        assert same_bits(checkpoint[name][2:4], expected)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-moe", "fsdp2-tp"])
def test_rows_are_read_and_nothing_else(name: str, checkpoints: dict[str, Made]) -> None:
    with opened(checkpoints[name].source) as checkpoint:
        reader = checkpoint._reader
        assert reader.read_bytes == 0  # opening reads no weight
        lazy = checkpoint["model.embed_tokens.weight"]
        assert reader.read_bytes == 0
        before = reader.read_bytes
        rows = lazy[10:14]
        assert rows.shape == (4, 56)
        # The rows, what the cheapest reads take along, and a header of each record.
        assert rows.nbytes <= reader.read_bytes - before < 4 * rows.nbytes


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ((0, 0, 0), "3 indices for 2 dimensions"),
        (509, "out of bounds"),
        (-510, "out of bounds"),
        (slice(None, None, -1), "negative steps"),
        ((..., ...), "single ellipsis"),
    ],
)
def test_wrong_indices(index: object, error: str, checkpoints: dict[str, Made]) -> None:
    with (
        opened(checkpoints["fsdp2"].source) as checkpoint,
        pytest.raises(IndexError, match=error),
    ):
        checkpoint["model.embed_tokens.weight"][index]


def test_planned_in_the_child(checkpoints: dict[str, Made]) -> None:
    made = checkpoints["fsdp2-tied"]
    truth = read_truth(made.truth_hf)
    with streamconv.open(made.source) as checkpoint:
        assert set(checkpoint) == truth.keys()
        name = "model.embed_tokens.weight"
        assert same_bits(checkpoint[name][100:200, 3], as_numpy(truth[name])[100:200, 3])
