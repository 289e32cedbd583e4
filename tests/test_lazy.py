"""A checkpoint as lazy tensors: the slices of the truth, and no more read than they need."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamconv
from scripts.makers.fsdp import Made
from scripts.outputs import Stored, read_truth
from streamconv.conversion.lazy import LazyCheckpoint
from streamconv.errors import ClosedError, UnsafeInputError
from streamconv.planning import child

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
        patch.setattr(child, "_ask", lambda request, **_: child._TASKS[request["task"]](request))
        patch.setattr(child, "_limited_memory", contextlib.nullcontext)
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
    if draw(st.booleans()):
        items.insert(draw(st.integers(0, len(items))), None)
    return tuple(items) if len(items) > 1 or draw(st.booleans()) else items[0]


@st.composite
def items_of(draw: st.DrawFn, size: int) -> object:
    if size and draw(st.booleans()):
        return draw(st.sampled_from((int, np.int64)))(draw(st.integers(-size, size - 1)))
    edge = st.none() | st.integers(-size - 2, size + 2)
    step = st.none() | st.integers(-4, -1) | st.integers(1, 4)
    return slice(draw(edge), draw(edge), draw(step))


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
            found, expected = checkpoint[tensor][index], truth[tensor][index]
            assert same_bits(np.asarray(found), np.asarray(expected))
            in_torch = checkpoint[tensor].torch(index)
            assert tuple(in_torch.shape) == expected.shape
            assert in_torch.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == (
                expected.tobytes()
            )

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
        (5.9, "only integers"),
        ("5", "only integers"),
        (True, "only integers, .* not bool"),
        (np.bool_(False), "only integers"),
        (np.float32(5), "only integers"),
        ([1, 2], "only integers"),
        (np.array([1, 2]), "only integers"),
        ((0, True), "only integers"),
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


# --- a checkpoint without a model: planned in a moment ------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    state = {
        "a.scalar": torch.tensor(1.5),
        "a.matrix": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
        "a.empty": torch.empty(0, 3),
    }
    torch.save(state, tmp_path / "model_world_size_1_rank_0.pt")
    return tmp_path


def test_numpy_takes_a_lazy_tensor_for_an_array(plain: Path) -> None:
    with opened(plain) as checkpoint:
        matrix, scalar = checkpoint["a.matrix"], checkpoint["a.scalar"]
        assert (matrix.ndim, matrix.size, len(matrix)) == (2, 12, 3)
        expected = np.arange(12).reshape(3, 4)
        assert np.asarray(matrix).dtype == ml_dtypes.bfloat16
        assert np.array_equal(np.asarray(matrix, dtype=np.float64), expected)
        assert np.array_equal(np.array(matrix, copy=True), expected)
        assert np.array_equal(np.stack(list(matrix)), expected)
        assert np.asarray(scalar).shape == ()
        with pytest.raises(ValueError, match="without a copy"):
            np.array(matrix, copy=False)
        for odd in (lambda: len(scalar), lambda: list(scalar), lambda: bool(matrix)):
            with pytest.raises(TypeError):
                odd()


def test_what_has_no_dimension_has_none_in_torch(plain: Path) -> None:
    with opened(plain) as checkpoint:
        for tensor, index in (("a.scalar", ...), ("a.scalar", ()), ("a.matrix", (1, 2))):
            assert checkpoint[tensor].torch(index).shape == ()
        assert checkpoint["a.matrix"].torch((1, None, -1)).shape == (1,)
        assert checkpoint["a.empty"].torch().shape == (0, 3)


def descriptors(path: Path) -> int:
    links = Path("/proc/self/fd")
    names = [str(link.readlink()) for link in links.iterdir() if link.is_symlink()]
    return sum(name.startswith(str(path)) for name in names)


def test_a_closed_checkpoint_is_not_read(plain: Path) -> None:
    with opened(plain) as checkpoint:
        matrix = checkpoint["a.matrix"]
        assert matrix[1, 1] == 5
        assert descriptors(plain) == 1
    assert descriptors(plain) == 0
    for read in (lambda: matrix[0], matrix.numpy, matrix.torch, lambda: matrix[0:0]):
        with pytest.raises(ClosedError, match="closed"):
            read()
    with pytest.raises(ValueError, match="closed"), checkpoint:
        pass
    checkpoint.close()
    assert descriptors(plain) == 0


def test_a_checkpoint_that_is_let_go_keeps_no_file_open(plain: Path) -> None:
    checkpoint = streamconv.open(plain)
    assert checkpoint["a.scalar"][()] == 1.5
    del checkpoint
    gc.collect()
    assert descriptors(plain) == 0


def test_closing_waits_for_a_read_in_another_thread(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its descriptor could be another file's by the time it reads."""
    reading, closed, seen = threading.Event(), threading.Event(), []
    pread = os.preadv

    def slow(fd: int, *arguments):
        reading.set()
        assert closed.wait(10)
        seen.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        return pread(fd, *arguments)

    with opened(plain) as checkpoint:
        monkeypatch.setattr(os, "preadv", slow)
        found: list[object] = []

        def read() -> None:
            try:
                found.append(checkpoint["a.matrix"][...].astype(int).tolist())
            except ClosedError as error:
                found.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        assert reading.wait(10)
        checkpoint.close()
        closed.set()
        thread.join(10)
    assert len(found) == 1
    assert all(name.startswith(str(plain)) for name in seen)
    assert descriptors(plain) == 0


def test_a_damaged_record_is_refused_each_time(plain: Path) -> None:
    path = plain / "model_world_size_1_rank_0.pt"
    raw = bytearray(path.read_bytes())
    at = raw.index(b"model_world_size_1_rank_0/data/1")
    raw[at + 5] ^= 1  # the name in the local header, which no one has read before
    path.write_bytes(raw)
    with opened(plain) as checkpoint:
        for _ in range(2):
            with pytest.raises(UnsafeInputError, match="contradicts"):
                checkpoint["a.matrix"].numpy()
