"""The executor, on source files written here byte by byte: any cut, any window, the same bytes."""

from __future__ import annotations

import io
import itertools
import json
import os
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from streamconv.errors import BadInputError, SourceChangedError
from streamconv.executor.pipeline import WindowFiller, write_output
from streamconv.executor.reader import SourceReader
from streamconv.executor.records import RecordChecks
from streamconv.executor.windows import Segment, Window, runs
from streamconv.files.durable import write_text
from streamconv.ir.boxes import Box, contiguous_strides
from streamconv.ir.dtypes import BF16, BY_NAME, F16, F32, DType
from streamconv.ir.finished import FinishedFile
from streamconv.ir.identity import job_identity
from streamconv.ir.planfile import Plan
from streamconv.ir.planned import PlanHead, TextFile, Totals, WrittenFile
from streamconv.ir.planwriter import PlanWriter
from streamconv.ir.recipe import AddScalar, Cast, Recipe, SourceRef, View
from streamconv.ir.source import GlobalTensor, ShardLayout, ShardTable, SourceFile
from streamconv.options import JobOptions
from streamconv.planning import checks as planner
from streamconv.planning import placing


class Source:
    """Writes pieces of tensors into raw files, and says where they lie as a format would."""

    def __init__(self, root: Path, files: int) -> None:
        self.root = root
        self.data = [bytearray(b"\xee" * 5) for _ in range(files)]
        self.tensors: dict[str, GlobalTensor] = {}

    def add(
        self, fqn: str, array: np.ndarray, dtype: DType, cuts: list[list[int]], pad: int = 0
    ) -> None:
        boxes = [Box((), ())]
        for size, points in zip(array.shape, cuts, strict=True):
            edges = sorted({0, size, *(p for p in points if p < size)})
            boxes = [
                Box((*b.offsets, lo), (*b.sizes, hi - lo))
                for b in boxes
                for lo, hi in itertools.pairwise(edges)
            ]
        table = ShardTable()
        for j, b in enumerate(boxes):
            piece = array[tuple(slice(o, e) for o, e in zip(b.offsets, b.ends, strict=True))]
            raw = np.ascontiguousarray(piece).tobytes() + b"\xaa" * pad
            file = self.data[j % len(self.data)]
            file += b"\xee" * (j * 7 % 11)
            table.append(j % len(self.data), j, len(file), len(raw), zlib.crc32(raw), 0)
            file += raw
        layout = ShardLayout(
            array.shape,
            tuple(boxes),
            tuple(contiguous_strides(b.sizes) for b in boxes),
            (0,) * len(boxes),
        )
        self.tensors[fqn] = GlobalTensor(fqn, dtype, layout, table)

    def files(self) -> tuple[SourceFile, ...]:
        found = []
        for k, data in enumerate(self.data):
            path = self.root / f"rank{k}.bin"
            path.write_bytes(data)
            found.append(SourceFile(path.name, len(data), path.stat().st_mtime_ns, ""))
        return tuple(found)


JOB = job_identity("fsdp", (), (), JobOptions()).to_json()


def make_plan(source: Source, recipes: list[Recipe], max_shard_bytes: int = 1 << 40) -> Plan:
    placed = placing.shard(recipes, planner.Ties({}, {}, {}), max_shard_bytes)
    stream = io.StringIO()
    writer = PlanWriter(stream)
    totals = Totals(0, 0, 0, 0, 0, {}, {})
    writer.head(PlanHead(str(source.root), JOB, totals, (), (), source.files(), (), ()), ())
    placing.write_sections(writer, placed, source.tensors)
    writer.end()
    path = source.root / "plan.jsonl"
    path.write_text(stream.getvalue(), encoding="utf-8")
    return Plan(path)


def test_a_plan_holds_long_files_in_short_lines(tmp_path: Path) -> None:
    texts = [
        TextFile("empty.json", ""),
        TextFile("index.json", "".join(f'"weight {k} \u00fc": "\\n",\r\n' for k in range(20_000))),
        TextFile("piece.json", '{"piece": 1}'),
    ]
    written = tuple(WrittenFile(t.name, len(t.content.encode())) for t in texts)
    path = tmp_path / "plan.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        writer = PlanWriter(stream)
        totals = Totals(0, 0, 0, 0, 0, {}, {})
        writer.head(PlanHead("/", JOB, totals, (), (), (), (), written), texts)
        writer.end()
    plan = Plan(path)
    assert plan.head.written == written
    assert plan.disk_bytes() > sum(w.nbytes for w in written) > 300_000
    assert [len(list(plan.content(t.name))) for t in texts] == [0, 8, 1]
    for text in texts:
        write_text(tmp_path / text.name, plan.content(text.name), sync=False)
        assert (tmp_path / text.name).read_bytes() == text.content.encode()
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) < 200_000


def execute(plan: Plan, out: Path, window: int, io_threads: int = 1) -> dict[str, FinishedFile]:
    done = {}
    with SourceReader(Path(plan.head.root), plan.head.files, max_open=2) as reader:
        checks = RecordChecks(reader)
        filler = WindowFiller(reader, checks, max_bytes=window, io_threads=io_threads)
        for output, tensors in plan.sections():
            done[output.name] = write_output(
                output,
                tensors,
                out / output.name,
                filler,
                checks,
                sync=False,
                sha256=False,
                on_bytes=lambda _: None,
            )
        filler.close()
        reader.check_unchanged()
    return done


def whole(fqn: str, array: np.ndarray, dtype: DType) -> Recipe:
    return Recipe(
        fqn, dtype, View(SourceRef(fqn, array.shape), array.shape, contiguous_strides(array.shape))
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_cut_any_window_gives_the_same_bytes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("run")
    source = Source(root, data.draw(st.integers(1, 5)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    arrays, recipes = {}, []
    for k in range(data.draw(st.integers(1, 5))):
        dtype = data.draw(st.sampled_from(["F32", "BF16", "I8", "I64", "BOOL"]))
        shape = tuple(data.draw(st.lists(st.integers(0, 24), max_size=3)))
        item = BY_NAME[dtype].to_numpy()
        array = (
            rng.integers(0, 2, shape) if dtype == "BOOL" else rng.integers(0, 100, shape)
        ).astype(item)
        name = f"t{k}"
        cuts = [data.draw(st.lists(st.integers(1, 20), max_size=3)) for _ in shape]
        source.add(name, array, BY_NAME[dtype], cuts, pad=data.draw(st.integers(0, 3)))
        if data.draw(st.booleans()) and len(shape) >= 2:
            view = array.swapaxes(0, -1)
            strides = contiguous_strides(shape)
            flipped = (strides[-1], *strides[1:-1], strides[0])
            recipes.append(
                Recipe(name, BY_NAME[dtype], View(SourceRef(name, shape), view.shape, flipped))
            )
            arrays[name] = np.ascontiguousarray(view)
        else:
            recipes.append(whole(name, array, BY_NAME[dtype]))
            arrays[name] = array
    plan = make_plan(source, recipes, max_shard_bytes=data.draw(st.sampled_from([200, 1 << 30])))
    digests = set()
    for window, threads in ((16, 1), (data.draw(st.integers(17, 3000)), 2), (1 << 20, 1)):
        done = execute(plan, root, window, threads)
        digests.add(json.dumps({k: (f.xxh3, f.tensors) for k, f in done.items()}))
    assert len(digests) == 1
    found = {n: t for f in done for n, t in load_file(root / f).items()}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()


def test_the_file_is_laid_out_as_safetensors_says(tmp_path: Path) -> None:
    source = Source(tmp_path, 1)
    a, b = np.arange(3, dtype=np.uint8), np.arange(2, dtype=np.float32)
    source.add("a", a, BY_NAME["U8"], [[]])
    source.add("b", b, F32, [[]])
    plan = make_plan(source, [whole("a", a, BY_NAME["U8"]), whole("b", b, F32)])
    execute(plan, tmp_path, 1 << 20)
    header = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}'
    )
    header += b" " * (-len(header) % 8)
    expected = len(header).to_bytes(8, "little") + header + b.tobytes() + a.tobytes()
    assert (tmp_path / "model.safetensors").read_bytes() == expected


def test_a_transpose_in_narrow_windows_is_few_copies(tmp_path: Path) -> None:
    """Rows whose gaps are read over anyway are one copy, and rows that lie far apart are read alone."""
    for width, copies in ((1000, 1), (20_000, 50)):
        folder = tmp_path / str(width)
        folder.mkdir()
        source = Source(folder, 1)
        source.add("w", np.zeros((50, width), np.float32), F32, [[], []])
        view = View(SourceRef("w", (50, width)), (width, 50), (1, width))
        _, tensors = next(make_plan(source, [Recipe("w", F32, view)]).sections())
        (tensor,) = tensors
        window = Window(4 * 200, (Segment(tensor, 0, 200, 0),))
        reads = runs(window, 1 << 20)
        assert (sum(len(r.fills) for r in reads), len(reads)) == (copies, copies)


@pytest.mark.parametrize("window", [64, 1 << 20])
def test_casts_equal_torch(tmp_path: Path, window: int) -> None:
    import torch

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 4096, dtype=np.uint32)
    bits[:4] = [0x7F800000, 0xFF800000, 0x7FC00001, 0xFF800001]  # inf, -inf, NaN, -NaN
    values = bits.view(np.float32)
    values = np.where(np.abs(values) > 60000, np.float32(1.5), values)  # fits float16, too
    values[:4] = bits.view(np.float32)[:4]
    source = Source(tmp_path, 3)
    source.add("w", values.reshape(64, 64), F32, [[20, 40], [7]])
    base = View(SourceRef("w", (64, 64)), (64, 64), (64, 1))
    recipes = [
        Recipe(n, d, View(base.base, base.shape, base.strides, 0, (Cast(d),)))
        for n, d in (("bf", BF16), ("half", F16), ("double", BY_NAME["F64"]))
    ]
    execute(make_plan(source, recipes), tmp_path, window)
    found = load_file(tmp_path / "model.safetensors")
    truth = torch.from_numpy(values.reshape(64, 64).copy())
    nan = np.isnan(values.reshape(64, 64))
    for name, dtype in (("bf", torch.bfloat16), ("half", torch.float16)):
        ours = np.asarray(found[name]).view(np.uint16)
        theirs = truth.to(dtype).view(torch.uint16).numpy()
        assert (ours[~nan] == theirs[~nan]).all()
        assert set(ours[nan]) == {0x7FC0 if name == "bf" else 0x7E00}
    double = np.asarray(found["double"])
    assert (double[~nan] == values.reshape(64, 64)[~nan]).all()


def test_a_finite_value_never_becomes_infinite(tmp_path: Path) -> None:
    source = Source(tmp_path, 1)
    array = np.array([1.0, 65536.0], dtype=np.float32)
    source.add("w", array, F32, [[]])
    view = View(SourceRef("w", (2,)), (2,), (1,), 0, (Cast(F16),))
    with pytest.raises(BadInputError, match="does not fit into float16"):
        execute(make_plan(source, [Recipe("w", F16, view)]), tmp_path, 1 << 20)


def test_add_scalar_rounds_once(tmp_path: Path) -> None:
    import torch

    source = Source(tmp_path, 1)
    array = np.linspace(-0.9, 0.9, 101).astype(ml_dtypes.bfloat16)
    source.add("w", array, BF16, [[]])
    view = View(SourceRef("w", (101,)), (101,), (1,), 0, (AddScalar(1.0),))
    execute(make_plan(source, [Recipe("w", BF16, view)]), tmp_path, 1 << 20)
    found = np.asarray(load_file(tmp_path / "model.safetensors")["w"]).view(np.uint16)
    truth = torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16) + 1.0
    assert (found == truth.view(torch.uint16).numpy()).all()


@pytest.mark.parametrize("where", ["wanted", "padding"])
def test_one_flipped_bit_is_found(tmp_path: Path, where: str) -> None:
    source = Source(tmp_path, 1)
    array = np.arange(4096, dtype=np.float32)
    source.add("w", array, F32, [[1000]], pad=12)
    plan = make_plan(source, [whole("w", array, F32)])
    record = source.tensors["w"].shards[1]
    path = tmp_path / "rank0.bin"
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[record.start + (100 if where == "wanted" else record.nbytes - 1)] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # a newer file would be another one
    with pytest.raises(BadInputError, match="do not match their CRC-32") as caught:
        execute(plan, tmp_path, 2048)
    assert "rank0.bin, w, record" in str(caught.value.where)


def test_a_file_that_shrinks_is_a_changed_source(tmp_path: Path) -> None:
    source = Source(tmp_path, 1)
    array = np.arange(4096, dtype=np.float32)
    source.add("w", array, F32, [[]])
    plan = make_plan(source, [whole("w", array, F32)])
    (tmp_path / "rank0.bin").write_bytes(b"short")
    with pytest.raises(SourceChangedError):
        execute(plan, tmp_path, 2048)
