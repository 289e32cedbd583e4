"""Replicas are equal element for element, whatever their records and strides; others are refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore

from streamconv import formats
from streamconv.errors import BadInputError
from streamconv.formats.replicas import Local, Replicas
from streamconv.planning import checks
from streamconv.torchfile.rankfile import RankReader

Make = Callable[[int], torch.Tensor]


@pytest.fixture(params=[True, False], ids=["crc", "no-crc"])
def crc(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def save(path: Path, state: dict[str, torch.Tensor], *, crc: bool = True) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(crc)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(before)


def replicated(folder: Path, make: Make, *, crc: bool) -> Path:
    """A world of two ranks with a replicated DTensor and, beside it, a plain tensor."""
    for rank in range(2):
        dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        try:
            mesh = DeviceMesh("cpu", torch.arange(2), mesh_dim_names=("fsdp",))
            local = make(rank)
            # Torch cannot save a DTensor whose local tensor begins inside of its storage.
            whole = local if make(1).storage_offset() == 0 else torch.ones(2)
            state = {
                "w": DTensor.from_local(whole, mesh, [Replicate()], run_check=False),
                "plain": local,
            }
            save(folder / f"model_world_size_2_rank_{rank}.pt", state, crc=crc)
        finally:
            dist.destroy_process_group()
    return folder


SQUARE = torch.arange(16.0).reshape(4, 4)
ROWS = torch.cat([SQUARE, SQUARE + 9])
COLUMNS = torch.cat([SQUARE, SQUARE + 9], 1)

EQUAL: dict[str, Make] = {
    "bytes": lambda _: SQUARE.clone(),
    "transposed": lambda rank: SQUARE.t().contiguous().t() if rank else SQUARE.clone(),
    "slice": lambda rank: ROWS[:4] if rank else SQUARE.clone(),
    "columns": lambda rank: torch.cat([SQUARE, SQUARE + rank], 1)[:, :4],
}
DIFFERENT: dict[str, Make] = {
    "bytes": lambda rank: SQUARE + rank,
    "strides": lambda rank: SQUARE.clone().t() if rank else SQUARE.clone(),
    "offset": lambda rank: ROWS[4 * rank : 4 * rank + 4],
    "columns": lambda rank: COLUMNS[:, 4 * rank : 4 * rank + 4],
    "one-element": lambda rank: torch.where(SQUARE == 15, SQUARE + rank, SQUARE),
    "negative-zero": lambda rank: torch.zeros(4, 4) * (-1 if rank else 1),
}


@pytest.mark.parametrize("make", EQUAL.values(), ids=EQUAL)
def test_equal(make: Make, crc: bool, tmp_path: Path) -> None:
    checkpoint = formats.find_model(replicated(tmp_path, make, crc=crc)).read()
    assert checkpoint.facts["replicas_dropped"] == 2
    (tmp_path / "model_world_size_2_rank_0.pt").unlink()
    assert set(formats.find_model(tmp_path).read().tensors) == {"w", "plain"}


@pytest.mark.parametrize("make", DIFFERENT.values(), ids=DIFFERENT)
def test_different(make: Make, crc: bool, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="replicas of a tensor differ") as caught:
        formats.find_model(replicated(tmp_path, make, crc=crc)).read()
    told = str(caught.value)
    for part in ("rank_1.pt, ", "rank 0 (model_world_size_2_rank_0.pt)", "rank 1 (model"):
        assert part in told


@pytest.mark.parametrize(
    "case", ["plain_beside_crcoff", "plain_beside_off", "rep_crcoff", "rep_stride"]
)
def test_cases_from_outside(case: str, shared_checkpoints: Path) -> None:
    with pytest.raises(BadInputError, match="replicas of a tensor differ"):
        formats.find_model(shared_checkpoints / "faults" / "replicas" / case).read()


def test_any_two_views(tmp_path: Path) -> None:
    """Torch says whether two views of different strides are equal; some are too large for one read."""
    torch.manual_seed(0)
    values = torch.randint(0, 255, (3, 700, 1100), dtype=torch.uint8)
    other = values.clone()
    other[2, 699, 1099] += 1
    views = [
        view
        for whole in (values, other)
        for view in (
            whole,
            whole.permute(2, 1, 0).contiguous().permute(2, 1, 0),
            whole.transpose(1, 2).contiguous().transpose(1, 2),
            torch.cat([whole, whole], 2)[:, :, 1100:],
        )
    ]
    files = [tmp_path / f"{k}.pt" for k in range(len(views))]
    for view, file in zip(views, files, strict=True):
        save(file, {"w": view}, crc=False)
    replicas = Replicas(files)
    held = [Local.of(k, RankReader().read(f, 0).tensors["w"]) for k, f in enumerate(files)]
    for (k, one), (j, two) in itertools.combinations(enumerate(held), 2):
        assert replicas.same(one, two) == torch.equal(views[k], views[j]), (k, j)


# --- plain tensors on every rank -----------------------------------------------------------------


class ModelOf:
    """A model that knows the shape of one tensor."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.state_shapes = {"w": shape}
        self.hub_shapes: dict[str, tuple[int, ...]] = {}


def plain(folder: Path, *tensors: torch.Tensor, crc: bool = True) -> Path:
    for rank, tensor in enumerate(tensors):
        save(folder / f"model_world_size_{len(tensors)}_rank_{rank}.pt", {"w": tensor}, crc=crc)
    return folder


def test_plain_tensors_that_differ_are_asked_about(crc: bool, tmp_path: Path) -> None:
    checkpoint = formats.find_model(plain(tmp_path, SQUARE, SQUARE + 1, crc=crc)).read()
    with pytest.raises(BadInputError, match="nothing says which") as caught:
        checks.decide_plain(checkpoint, None)
    told = str(caught.value)
    assert "[8, 4] as pieces along dim 0, or [4, 4] as copies of ranks that have diverged" in told
    assert "rank 0 (model_world_size_2_rank_0.pt) and rank 1" in told
    assert "--hf-config" in told


def test_the_model_tells_pieces_from_diverged_copies(crc: bool, tmp_path: Path) -> None:
    checkpoint = formats.find_model(plain(tmp_path, SQUARE, SQUARE + 1, crc=crc)).read()
    pieces = checks.decide_plain(checkpoint, ModelOf((8, 4)))  # type: ignore[arg-type]
    assert pieces["w"].shape == (8, 4)
    with pytest.raises(BadInputError, match="have diverged") as caught:
        checks.decide_plain(checkpoint, ModelOf((4, 4)))  # type: ignore[arg-type]
    assert "rank 1 (model_world_size_2_rank_1.pt)" in str(caught.value)


def test_plain_copies_with_other_strides(crc: bool, tmp_path: Path) -> None:
    copies = (SQUARE, SQUARE.t().contiguous().t())
    checkpoint = formats.find_model(plain(tmp_path, *copies, crc=crc)).read()
    assert not checkpoint.undecided["w"].differing


def test_pieces_that_no_chunking_makes(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot be put together"):
        formats.find_model(plain(tmp_path, torch.ones(2, 3), torch.ones(5, 3))).read()


def test_plain_diverged_from_outside(shared_checkpoints: Path) -> None:
    checkpoint = formats.find_model(
        shared_checkpoints / "faults" / "plain_diverged_no_config"
    ).read()
    with pytest.raises(BadInputError, match="nothing says which"):
        checks.decide_plain(checkpoint, None)
