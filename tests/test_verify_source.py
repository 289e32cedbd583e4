"""``verify --source``: an independent reader, which finds what the converter would do wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamconv
from scripts.makers.fsdp import Made
from scripts.measured import run
from scripts.outputs import large_checkpoint
from streamconv.errors import BadInputError, StreamconvError, UsageError
from streamconv.executor import kernels, pipeline
from streamconv.formats.fsdp import merge
from streamconv.formats.safetensors_file import read_folder
from streamconv.ir.recipe import Recipe
from streamconv.planning import placing
from streamconv.torchfile import rankfile
from streamconv.tracing import hf_convert
from streamconv.verification import by_plan, evaluation, source, torch_check, torch_files
from streamconv.verification.report import Report
from streamconv.verification.source import verify_source
from tests.test_budget import LARGE_BYTES


@pytest.fixture(autouse=True)
def in_this_process(planned_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children's work is done here: what is patched is patched for them, too."""
    monkeypatch.setattr(torch_files, "limited_memory", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(source, "ask", lambda module, request, doing: torch_check._check(request))


def convert(made: Made, out: Path, **options: Any) -> Path:
    streamconv.convert(made.source, out, sync=False, **options)
    return out


def ways(report: Report) -> str:
    return "\n".join(c for c in report.checked if "source" in c)


READ_BY_TORCH = ["fsdp1-flat", "fsdp1-hsdp", "fsdp1-tied", "fsdp2-w3", "fsdp2-cuda"]
READ_BY_TORCH += ["fsdp2-buffers", "fsdp2-parameters", "fsdp2-placement", "fsdp2-frozen"]
READ_BY_TORCH += ["fsdp2-tp-2x3", "fsdp2-hsdp-tp", "fsdp2-gpt_oss", "fsdp2-gemma3", "fsdp1-w1"]


@pytest.mark.parametrize("name", READ_BY_TORCH)
def test_torch_itself_reads_the_source(
    name: str, checkpoints: dict[str, Made], tmp_path: Path
) -> None:
    made = checkpoints[name]
    report = verify_source(convert(made, tmp_path / "out"), made.source)
    assert report.problems == []
    assert "read by torch.load" in ways(report)
    assert "streamconv alone" not in ways(report)


@pytest.mark.parametrize(
    ("name", "converted"),
    [("fsdp2-moe", 36), ("fsdp2-mixtral", 36), ("fsdp2-deepseek_v3", 18), ("fsdp1-moe", 36)],
)
def test_transformers_itself_converts_the_real_tensors(
    name: str, converted: int, checkpoints: dict[str, Made], tmp_path: Path
) -> None:
    made = checkpoints[name]
    out = convert(made, tmp_path / "out", dtype="bfloat16")
    report = verify_source(out, made.source)
    assert report.problems == []
    assert f"({converted} through transformers' own conversion)" in ways(report)


def test_what_exceeds_the_budget_is_compared_in_slices(
    checkpoints: dict[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoints["fsdp2-moe"]
    out = convert(made, tmp_path / "out", dtype="float16")
    monkeypatch.setattr(torch_check, "_free_bytes", lambda _: 6 * 4096)
    report = verify_source(out, made.source)
    assert report.problems == []
    assert "(36 in slices, through the traced conversion)" in ways(report)
    path = next(iter(read_folder(out).values())).path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert len(verify_source(out, made.source).problems) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fsdp1-sharded-tensor", "cannot load it"),
        ("plain-pieces", "plain tensors on several ranks"),
        ("plain-whole", "plain tensors on several ranks"),
    ],
)
def test_what_torch_cannot_read_is_read_by_the_other_reader_and_said(
    name: str, reason: str, checkpoints: dict[str, Made], tmp_path: Path
) -> None:
    made = checkpoints[name]
    report = verify_source(convert(made, tmp_path / "out"), made.source)
    assert report.problems == []
    assert "read by streamconv alone" in ways(report)
    assert reason in ways(report)


def test_too_small_a_budget_for_torch_is_said(
    checkpoints: dict[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoints["fsdp2"]
    out = convert(made, tmp_path / "out")
    monkeypatch.setattr(torch_check, "_MARGIN_BYTES", 1 << 40)
    report = verify_source(out, made.source)
    assert report.problems == []
    assert "torch's reader needs --max-mem" in ways(report)


@pytest.mark.parametrize(
    "name",
    ["t24-fsdp1", "t26-fsdp1", "t28-fsdp2-tp", "t210-fsdp2", "verl-native-fsdp2"],
)
def test_files_of_other_torch_releases(name: str, shared_checkpoints: Path, tmp_path: Path) -> None:
    src = shared_checkpoints / "fsdp" / name
    out = tmp_path / "out"
    streamconv.convert(src, out, sync=False)
    report = verify_source(out, src)
    assert report.problems == []
    assert ("streamconv alone" in ways(report)) == (name == "t24-fsdp1")


@pytest.mark.slow
@pytest.mark.memory
def test_a_source_larger_than_the_budget_is_read_by_torch_within_it(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    large, limit = large_checkpoint(base, LARGE_BYTES, 8), 540 * 10**6
    out = tmp_path / "out"
    assert run("convert", large.source, out, "--no-sync").code == 0
    done = run("verify", out, "--source", large.source, "--max-mem", "540MB", "--json")
    assert done.code == 0, done.err
    checked = "\n".join(json.loads(done.out)["checked"])
    assert f"{len(large.shapes)} tensors against the source, byte by byte, read by torch" in checked
    assert "streamconv alone" not in checked
    assert done.peak_bytes <= limit


# --- bugs of the converter, injected ----------------------------------------------------------

Patch = pytest.MonkeyPatch


def wrong_offsets(patch: Patch) -> None:
    """The zip directory says that records begin 64 bytes later than they do."""
    real = rankfile.Contents._store

    def store(self: Any, spec: Any, storage: Any) -> Any:
        stored = real(self, spec, storage)
        if stored.nbytes <= 4096:
            return stored
        return stored._replace(start=stored.start + 64, header_nbytes=0)  # 0: no header to check

    patch.setattr(rankfile.Contents, "_store", store)


def swapped_shards(patch: Patch) -> None:
    """The box arithmetic gives rank 0 the rows of rank 1."""
    real = merge._cut

    def cut(specs: Any, pieces: Any, placement: str) -> Any:
        made = real(specs, pieces, placement)
        boxes = made.layout.boxes
        if len(boxes) < 2 or boxes[0].sizes != boxes[1].sizes:
            return made
        rows = (made.rows[1], made.rows[0], *made.rows[2:])
        return dataclasses.replace(made, rows=rows)

    patch.setattr(merge, "_cut", cut)


def wrong_lowering(patch: Patch) -> None:
    """Moves out of a fused tensor take the elements one row off."""
    real = placing.lower

    def lower(view: Any, *rest: Any) -> Iterator[Any]:
        shifted = view.offset if view.offset == 0 else view.offset - view.shape[-1]
        return real(dataclasses.replace(view, offset=shifted), *rest)

    patch.setattr(placing, "lower", lower)


def wrong_tracer(patch: Patch) -> None:
    """The trace says that gate and up projections lie the other way round."""
    real = hf_convert.revert

    def revert(model: Any, tensors: Any) -> dict[str, Recipe]:
        made = real(model, tensors)
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        swapped = {}
        for name, recipe in made.items():
            parts = [other.get(p, p) if "experts" in name else p for p in name.split(".")]
            swapped[name] = dataclasses.replace(recipe, view=made[".".join(parts)].view)
        return swapped

    patch.setattr(hf_convert, "revert", revert)


def broken_kernel(patch: Patch) -> None:
    """The cast to bfloat16 cuts off instead of rounding."""

    def kernel(dst: Any, dst_type: Any, src: Any, src_type: Any, *rest: Any, what: str) -> None:
        real(dst, dst_type, src, src_type, *rest, what=what)
        if (src_type.name, dst_type.name) == ("F32", "BF16"):
            n = min(len(src) // 4, len(dst) // 2, 256)
            wide = np.frombuffer(src[: 4 * n], np.uint32)
            np.frombuffer(dst[: 2 * n], np.uint16)[:] = (wide >> 16).astype(np.uint16)

    real = kernels.run
    patch.setattr(kernels, "run", kernel)


BUGS: list[tuple[Callable[[Patch], None], str, dict[str, Any], str]] = [
    (wrong_offsets, "fsdp2", {}, "embed_tokens"),
    (swapped_shards, "fsdp2", {}, "embed_tokens"),
    (swapped_shards, "fsdp2-tp", {}, "q_proj"),
    (wrong_lowering, "fsdp2-moe", {}, "experts.1"),
    (wrong_tracer, "fsdp2-moe", {}, "gate_proj"),
    (broken_kernel, "fsdp2", {"dtype": "bfloat16"}, "embed_tokens"),
]


@pytest.mark.parametrize(("bug", "name", "options", "named"), BUGS)
def test_a_bug_of_the_converter_is_found_even_where_verify_has_it_too(
    bug: Callable[[Patch], None],
    name: str,
    options: dict[str, Any],
    named: str,
    checkpoints: dict[str, Made],
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    made = checkpoints[name]
    # What it reads from the wrong place has another checksum; this shows what catches it then.
    monkeypatch.setattr(
        by_plan, "RecordChecks", lambda reader, **_: pipeline.RecordChecks(reader, check_crc=False)
    )
    bug(monkeypatch)
    out = convert(made, tmp_path / "out", source_crc=False, **options)
    assert streamconv.verify(out).passed  # the manifest holds what was written
    problems = verify_source(out, made.source).problems
    assert any(named in p and "differs from the source as torch reads it" in p for p in problems)
    monkeypatch.undo()


def test_an_honest_reader_agrees_that_such_an_output_is_wrong(
    checkpoints: dict[str, Made], tmp_path: Path, monkeypatch: Patch
) -> None:
    made = checkpoints["fsdp2"]
    with pytest.MonkeyPatch.context() as patch:
        swapped_shards(patch)
        out = convert(made, tmp_path / "out", source_crc=False)
    problems = verify_source(out, made.source).problems
    assert problems
    assert all(p.endswith(": differs from the source") for p in problems)


def test_a_damaged_source_record_is_named(checkpoints: dict[str, Made], tmp_path: Path) -> None:
    made = checkpoints["fsdp2"]
    out = convert(made, tmp_path / "out")
    other = Path(shutil.copytree(made.source, tmp_path / "actor"))
    victim = other / "model_world_size_4_rank_1.pt"
    data = bytearray(victim.read_bytes())
    data[data.index(b"data/0") + 4096] ^= 1
    victim.write_bytes(data)
    with pytest.raises(BadInputError, match="do not match their CRC-32"):
        verify_source(out, other)


# --- the options that made the output ---------------------------------------------------------


def test_an_output_that_goes_away_meanwhile_is_named(
    checkpoints: dict[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the source, nor one of its tensors by an error of Python's."""
    made = checkpoints["fsdp2-w3"]
    out = convert(made, tmp_path / "out")

    def ask(module: str, request: dict[str, Any], doing: str) -> dict[str, Any]:
        out.rename(tmp_path / "moved")
        return torch_check._check(request)

    monkeypatch.setattr(source, "ask", ask)
    with pytest.raises(StreamconvError, match="went away while it was compared") as raised:
        verify_source(out, made.source)
    assert raised.value.where == str(out)


def test_the_config_folder_of_the_conversion_is_used_again(
    checkpoints: dict[str, Made], tmp_path: Path
) -> None:
    made = checkpoints["fsdp2-moe"]
    src = Path(shutil.copytree(made.source, tmp_path / "actor"))
    config = (src / "huggingface").rename(tmp_path / "config")
    out = tmp_path / "out"
    streamconv.convert(src, out, sync=False, hf_config=config)
    report = verify_source(out, src)
    assert report.problems == []
    assert "transformers' own conversion" in ways(report)

    moved = config.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="config came from is gone") as caught:
        verify_source(out, src)
    assert "--hf-config" in (caught.value.hint or "")
    assert verify_source(out, src, hf_config=moved).problems == []


def test_the_model_of_the_conversion_is_used_again(
    checkpoints: dict[str, Made], tmp_path: Path
) -> None:
    step = tmp_path / "global_step_1"
    shutil.copytree(checkpoints["fsdp2"].source, step / "actor")
    shutil.copytree(checkpoints["fsdp2-critic"].source, step / "critic")
    out = tmp_path / "out"
    streamconv.convert(step, out, sync=False, model="critic")
    given = json.loads((out / "streamconv.json").read_text())["job"]["given"]
    assert given == {"hf_config": None, "model": "critic"}
    assert verify_source(out, step).problems == []
    assert verify_source(out, step / "critic").problems == []
    assert verify_source(out, step / "actor").problems != []


# --- the pieces ---------------------------------------------------------------------------------


def test_tiles_cover_a_shape_in_memory_order() -> None:
    for shape in [(), (7,), (3, 5), (2, 3, 4), (4, 0, 2), (2, 1, 9)]:
        whole = torch.arange(int(np.prod(shape))).reshape(shape)
        for most in (1, 2, 5, 12, 100):
            seen = []
            for at, lo, sizes in evaluation.tiles(shape, most):
                box = whole[tuple(slice(a, a + n) for a, n in zip(lo, sizes, strict=True))]
                assert box.numel() <= most
                assert int(box.reshape(-1)[0]) == at
                seen += box.reshape(-1).tolist()
            assert seen == list(range(whole.numel()))


def test_pieces_that_overlap_or_leave_a_hole_are_no_tensor() -> None:
    span = torch_files.Span
    pages = torch_files.MappedFile(())
    for cuts in (((0, 2), (3, 1)), ((0, 3), (2, 2))):
        whole = torch_files.GlobalPieces((4,), torch.float32)
        for start, size in cuts:
            whole.add(torch.zeros(size), ((span(start, 0, size),),), pages)
        with pytest.raises(ValueError, match="do not make up the whole"):
            torch_files._check_tiling("w", whole)
