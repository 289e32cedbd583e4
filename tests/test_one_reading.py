"""A file has one reading: what torch.load and our reader both take, both take for the same."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch.distributed as dist

from scripts.makers import readings
from scripts.makers.readings import CRAFTED, REFUSED_BY_TORCH, Source, crafted_file
from streamconv.errors import BadInputError, StreamconvError


@pytest.fixture(scope="module")
def genuine() -> dict[str, Source]:
    found = {source.name: source for source in readings.genuine()}
    yield found
    dist.destroy_process_group()


def test_genuine_files(genuine: dict[str, Source], tmp_path: Path) -> None:
    for name, source in genuine.items():
        expected = readings.read_torch(source.file())
        assert readings.read_ours(source.file(), tmp_path / "a.pt") == expected, name
        assert expected


@pytest.mark.parametrize("name", CRAFTED)
def test_what_torch_reads_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(StreamconvError) as caught:
        readings.read_ours(crafted_file(CRAFTED[name]), tmp_path / "a.pt")
    assert caught.value.exit_code in (5, 6)


def test_most_of_them_are_taken_by_torch() -> None:
    """Else they would show nothing."""
    plain = {n: (v[-1]) for n, v in readings.read_torch(crafted_file(readings.GOOD)).items()}
    taken = 0
    for data in CRAFTED.values():
        try:
            found = readings.read_torch(crafted_file(data))
        except (RuntimeError, TypeError, pickle.UnpicklingError):
            continue
        taken += found["w"][-1] != plain["w"]
    assert taken >= 9


@pytest.mark.parametrize("name", REFUSED_BY_TORCH)
def test_what_torch_refuses_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(StreamconvError):
        readings.read_ours(crafted_file(REFUSED_BY_TORCH[name]), tmp_path / "a.pt")


def test_states_that_are_changed_after_their_use(
    genuine: dict[str, Source], tmp_path: Path
) -> None:
    """Torch has copied them by then, and so have we."""
    source = genuine["dtensors"]
    before = readings.read_torch(source.file())
    for name, data in readings.changed_later(source).items():
        assert readings.read_torch(source.file(data)) == before, name
        assert readings.read_ours(source.file(data), tmp_path / "a.pt") == before, name


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"constants_pkl": b"\x80\x02]."}, "TorchScript"),
        ({"version": b"11\n"}, "unknown file format"),
        ({"version": b"0"}, "unknown file format"),
        ({"version": b"x"}, "unknown file format"),
        ({"_data/version": b"12"}, "unknown file format"),
        ({"byteorder": b"big"}, "big-endian"),
    ],
)
def test_archives_that_torch_reads_otherwise(
    records: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match=message):
        readings.read_ours(crafted_file(readings.GOOD, **records), tmp_path / "a.pt")


def test_an_archive_without_a_version(tmp_path: Path) -> None:
    source = Source("x", readings.GOOD, {"byteorder": b"little", "data/0": bytes(16)})
    with pytest.raises(RuntimeError):
        readings.read_torch(source.file())
    with pytest.raises(BadInputError, match="no such record"):
        readings.read_ours(source.file(), tmp_path / "a.pt")
