"""Every input format answers what all are asked, and fails as all fail: a new one comes here first."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv import formats
from streamconv.errors import StreamconvError
from streamconv.formats import FORMATS, Location, find_model
from streamconv.ir.identity import identified

# A real checkpoint of each, and what its conversion needs.
SAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp": ("layouts/verl_veomni_ep2/src/global_step_5/actor", {}),
    "megatron_adapter": (
        "megatron_cases/lora_bridge/verl_global_step_1/actor",
        {"lora": "adapter", "lora_alpha": 16},
    ),
    "torch_dist": ("families/gemma2/mg/iter_0000000", {"hf_config": "families/gemma2/hf"}),
    "huggingface_pieces": ("layouts/hf_writer_pieces/src", {}),
    "dcp": ("layouts/composer_sharded/src", {}),
    "megatron_ranks": ("megatron/qwen2_tp2pp2_tied/verl_ranks/global_step_1/actor", {}),
    "deepspeed": ("deepspeed/hft_s3_qwen3_bf16_w2/global_step3", {}),
    "peft": (
        "layouts/verl_megatron_lora/src/global_step_5/actor/model/huggingface/adapter",
        {"lora": "adapter"},
    ),
    "meta": ("layouts/meta_consolidated/src", {}),
    "huggingface": ("layouts/hf_bin_sharded_legacy/src", {}),
    "torch_file": ("layouts/accelerate_full/src", {}),
}


@pytest.fixture(params=SAMPLES)
def sample(request: pytest.FixtureRequest, shared_checkpoints: Path, tmp_path: Path) -> Location:
    """Return a copy of a checkpoint: tests may damage it."""
    path = shared_checkpoints / SAMPLES[request.param][0]
    # With what lies above, where the config may be.
    top = shared_checkpoints / Path(*Path(SAMPLES[request.param][0]).parts[:2])
    shutil.copytree(top, tmp_path / "case")
    found = find_model(tmp_path / "case" / path.relative_to(top))
    assert found.format == request.param
    return found


def options(sample: Location, shared: Path) -> dict[str, object]:
    given = SAMPLES[sample.format][1]
    return {k: shared / v if k == "hf_config" else v for k, v in given.items()}


def test_every_format_has_a_sample() -> None:
    assert {*SAMPLES} == {f.NAME for f in FORMATS}


def test_it_is_known_by_its_files_and_by_nothing_else(sample: Location, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "empty", tmp_path / "file", tmp_path / "nothing"):
        assert sample.kind.detect(place) is None
    assert sample.kind.detect(sample.path)


def test_what_identifies_it_is_what_is_read(sample: Location) -> None:
    files, checkpoint = sample.identify(), sample.read()
    assert files
    assert [*map(identified, files)] == [*map(identified, checkpoint.files)]
    assert (checkpoint.format, checkpoint.root) == (sample.format, sample.root)
    assert checkpoint.side_dir == sample.side_dir
    assert all((sample.root / f.path).stat().st_size == f.nbytes for f in files)


def test_every_piece_lies_in_a_file(sample: Location) -> None:
    checkpoint = sample.read()
    tensors = [*checkpoint.tensors.values(), *(u.pieces for u in checkpoint.undecided.values())]
    assert tensors
    for tensor in tensors:
        for record in tensor.shards:
            file = checkpoint.files[record.file]
            assert record.start - record.header_nbytes >= 0
            assert record.start + record.nbytes <= file.nbytes


def test_it_is_the_same_wherever_it_lies(sample: Location, tmp_path: Path) -> None:
    before = [*map(identified, sample.identify())]
    (tmp_path / "case").rename(tmp_path / "moved")
    there = find_model(tmp_path / "moved" / sample.path.relative_to(tmp_path / "case"))
    assert [*map(identified, there.identify())] == before


def test_a_plan_is_the_same_each_time(
    sample: Location, shared_checkpoints: Path, tmp_path: Path
) -> None:
    given = options(sample, shared_checkpoints)
    plans = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for plan in plans:
        streamconv.plan(sample.path, output=plan, **given)
    assert plans[0].read_bytes() == plans[1].read_bytes()


def test_its_output_is_verified_against_it(
    sample: Location, shared_checkpoints: Path, tmp_path: Path
) -> None:
    streamconv.convert(
        sample.path, tmp_path / "out", sync=False, **options(sample, shared_checkpoints)
    )
    report = streamconv.verify(tmp_path / "out", source=sample.path)
    assert not report.problems, report.problems


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "pipe", "noise"])
def test_a_damaged_file_is_an_error_and_no_accident(damage: str, sample: Location) -> None:
    """Of the first file and of the last; what replicas make up for may be read."""
    for file in {sample.identify()[0], sample.identify()[-1]}:
        path = sample.root / (file.index or file.path)
        data = path.read_bytes()
        path.unlink()
        if damage == "pipe":
            os.mkfifo(path)
        elif damage != "missing":
            path.write_bytes(
                {"cut": data[: len(data) // 2], "empty": b"", "noise": b"\x80\x02" * 500}[damage]
            )
        with contextlib.suppress(StreamconvError):
            found = formats.detect(sample.path)
            if found is not None:
                found.identify()
                found.read()
        path.unlink(missing_ok=True)
        path.write_bytes(data)
