"""Sources that were rewritten: never "nothing to do", whether or not checksums stand for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from scripts.makers.dcp import save_alone
from streamconv.conversion.job import run_plan
from streamconv.errors import OutputExistsError, SourceChangedError
from streamconv.formats import find_model
from streamconv.formats.huggingface.base import identify as identify_base
from streamconv.options import RunOptions

Write = Callable[[Path, float], Path]


def fsdp(folder: Path, value: float, *, crc: bool) -> Path:
    folder.mkdir(exist_ok=True)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(crc)
    try:
        state = {"w": torch.full((64, 1024), value), "same": torch.zeros(3)}
        torch.save(state, folder / "model_world_size_1_rank_0.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    return folder


def fsdp_with_crc(folder: Path, value: float) -> Path:
    return fsdp(folder, value, crc=True)


def fsdp_without_crc(folder: Path, value: float) -> Path:
    return fsdp(folder, value, crc=False)


def ranks_without_crc(folder: Path, value: float) -> Path:
    rank = folder / "mp_rank_00"
    rank.mkdir(parents=True, exist_ok=True)
    fsdp(rank, value, crc=False)
    (rank / "model_world_size_1_rank_0.pt").rename(rank / "model.pt")
    return folder


def torch_dist_under_the_first_index(folder: Path, value: float) -> Path:
    dcp_under_the_first_index(folder, value)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def dcp_under_the_first_index(folder: Path, value: float) -> Path:
    """The files of a second save, copied over those of the first without its index."""
    new = save_alone(folder.with_name(f"{folder.name}-{value}"), {"w": torch.full((4, 8), value)})
    if not folder.exists():
        return Path(shutil.copytree(new, folder))
    shutil.copyfile(new / "__0_0.distcp", folder / "__0_0.distcp")
    return folder


WRITERS = [fsdp_with_crc, fsdp_without_crc, dcp_under_the_first_index]


@pytest.mark.parametrize("write", WRITERS)
def test_written_anew(write: Write, tmp_path: Path) -> None:
    source = write(tmp_path / "src", 1.0)
    out = tmp_path / "out"

    def convert(**options: bool) -> str:
        return streamconv.convert(source, out, layout="memory", sync=False, **options).status

    assert convert() == "done"
    assert convert() == "nothing-to-do"
    write(source, 2.0)
    with pytest.raises(OutputExistsError, match=r"before .* rewritten"):
        convert()
    assert load_file(out / "model.safetensors")["w"].unique().item() == 1.0
    assert convert(overwrite=True) == "done"
    assert load_file(out / "model.safetensors")["w"].unique().item() == 2.0


@pytest.mark.parametrize("write", [*WRITERS, ranks_without_crc, torch_dist_under_the_first_index])
def test_written_anew_with_the_old_times(write: Write, tmp_path: Path) -> None:
    """As on a file system with coarse times, or after a copy that set them."""
    source = write(tmp_path / "src", 1.0)
    files = sorted(f for f in source.rglob("*") if f.is_file())
    times = [f.stat().st_mtime_ns for f in files]
    before = find_model(source).identify()
    write(source, 2.0)
    for file, ns in zip(files, times, strict=True):
        os.utime(file, ns=(ns, ns))
    assert find_model(source).identify() != before


def test_times_count_only_where_no_checksum_does(tmp_path: Path) -> None:
    for write, counts in ((fsdp_with_crc, False), (fsdp_without_crc, True)):
        source = write(tmp_path / write.__name__, 1.0)
        out = tmp_path / f"{write.__name__}-out"
        streamconv.convert(source, out, sync=False)
        os.utime(source / "model_world_size_1_rank_0.pt", ns=(1, 1))
        if counts:
            with pytest.raises(OutputExistsError, match="copied without their times"):
                streamconv.convert(source, out, sync=False)
        else:
            assert streamconv.convert(source, out, sync=False).status == "nothing-to-do"


def test_what_is_read_is_what_was_identified(tmp_path: Path) -> None:
    """The identity that needs no reading is the same as that of the reader."""
    for write in WRITERS:
        location = find_model(write(tmp_path / write.__name__, 1.0))
        assert [(f.path, f.nbytes, f.directory_hash, f.evidence) for f in location.identify()] == [
            (f.path, f.nbytes, f.directory_hash, f.evidence) for f in location.read().files
        ]


def test_a_base_model_written_anew(tmp_path: Path) -> None:
    found = []
    for value in (1.0, 2.0):
        save_file({"w": torch.full((64, 1024), value)}, tmp_path / "model.safetensors")
        os.utime(tmp_path / "model.safetensors", ns=(1, 1))
        found.append(identify_base(tmp_path))
    assert found[0] != found[1]


def test_an_index_that_is_older_than_its_files(tmp_path: Path) -> None:
    source = dcp_under_the_first_index(tmp_path / "src", 1.0)
    os.utime(source / ".metadata", ns=(3 * 10**18, 3 * 10**18))
    assert find_model(source).read().notices == ()
    os.utime(source / ".metadata", ns=(10**18, 10**18))
    (notice,) = find_model(source).read().notices
    assert "__0_0.distcp" in notice
    assert "newer than .metadata" in notice


def test_the_version_of_fsdp_is_part_of_the_job(tmp_path: Path) -> None:
    """It decides the order of the pieces of torch 2.4."""
    source = fsdp_with_crc(tmp_path / "src", 1.0)
    digests = set()
    for version in (1, 2):
        (source / "fsdp_config.json").write_text(f'{{"FSDP_version": {version}, "world_size": 1}}')
        digests.add(
            streamconv.conversion.job.identify(source, streamconv.options.JobOptions()).digest
        )
    assert len(digests) == 2


@pytest.mark.parametrize("write", WRITERS)
def test_written_anew_after_it_was_planned(write: Write, tmp_path: Path) -> None:
    """What was planned is gone: that is no damage."""
    source = write(tmp_path / "src", 1.0)
    streamconv.plan(source, output=tmp_path / "plan", layout="memory")
    write(source, 2.0)
    with pytest.raises(SourceChangedError, match="planned"):
        run_plan(tmp_path / "plan", tmp_path / "out", RunOptions(sync=False))
