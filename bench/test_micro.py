"""Micro-benchmarks: ``pytest bench/test_micro.py`` (with the extra ``bench``); no part of the tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from scripts.makers.large import make_large
from scripts.makers.zips import BufferWindow
from streamconv.executor.kernels import run
from streamconv.formats.fsdp import rank_files
from streamconv.ir.dtypes import BF16, F16, F32, DType
from streamconv.ir.lowering import Dim
from streamconv.ir.recipe import Cast
from streamconv.options import JobOptions
from streamconv.torchfile.crc import crc32, crc32_combine
from streamconv.torchfile.rankfile import RankReader
from streamconv.torchfile.unpickle import load_inert
from streamconv.torchfile.zipdir import read_directory

_NBYTES = 2 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_large(tmp_path_factory.mktemp("large"), 20_000_000, world=8).source


@pytest.fixture(scope="module")
def rank_file(source: Path) -> Path:
    return source / "model_world_size_8_rank_3.pt"


def test_zip_directory(benchmark, rank_file: Path) -> None:
    data = rank_file.read_bytes()
    assert benchmark(lambda: read_directory(BufferWindow(data, "rank 3"))).entries


def test_unpickler(benchmark, rank_file: Path) -> None:
    directory = read_directory(BufferWindow(rank_file.read_bytes(), "rank 3"))
    pickle = directory.read_entry("data.pkl", max_nbytes=1 << 26)
    assert benchmark(load_inert, pickle, "rank 3")


def test_rank_file(benchmark, rank_file: Path) -> None:
    assert benchmark(lambda: RankReader().read(rank_file, 3)).tensors


def test_planner_without_transformers(benchmark, source: Path) -> None:
    from streamconv.planning.build import build_plan

    checkpoint = rank_files.read(source)

    def plan() -> int:
        stream = io.StringIO()
        build_plan(checkpoint, JobOptions(layout="memory"), stream)
        return len(stream.getvalue())

    assert benchmark(plan) > 0


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_cast(benchmark, dtype: DType) -> None:
    data = np.random.default_rng(0).standard_normal(_NBYTES // 4, np.float32)
    out = memoryview(bytearray(_NBYTES // 2))
    view, dims = memoryview(data).cast("B"), (Dim(data.size, 1, 1),)
    benchmark(lambda: run(out, dtype, view, F32, dims, (Cast(dtype),), what="t"))


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_interleave_of_columns(benchmark, ranks: int) -> None:
    """One rank's columns of a row block go into the whole rows."""
    columns, rows = 4096 // ranks, _NBYTES // 4 // 4096
    data = np.random.default_rng(0).standard_normal(rows * columns, np.float32)
    out = memoryview(bytearray(_NBYTES))
    view = memoryview(data).cast("B")
    dims = (Dim(rows, 4096, columns), Dim(columns, 1, 1))
    benchmark(lambda: run(out, F32, view, F32, dims, (), what="t"))


def test_crc(benchmark) -> None:
    data = memoryview(bytes(_NBYTES))
    assert benchmark(crc32, data)


def test_crc_combine(benchmark) -> None:
    assert benchmark(crc32_combine, 1, 2, _NBYTES)
