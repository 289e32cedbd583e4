"""verl FSDP folders become the whole tensors: against the unsharded model's own state dict.

The bytes are read here with a few lines of numpy from what the checkpoint says of boxes, strides
and records, so that nothing of the executor can hide a mistake of the reader.
"""

from __future__ import annotations

import contextlib
import json
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import streamconv
from scripts.makers.fsdp import RECIPES, Made
from streamconv import formats
from streamconv.errors import BadInputError, UnsafeInputError, UsageError
from streamconv.ir.source import Checkpoint, GlobalTensor
from streamconv.torchfile.zipdir import check_local_header

_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def gather(checkpoint: Checkpoint, tensor: GlobalTensor) -> np.ndarray:
    """Return the tensor's elements as raw integers; every element must be written once."""
    raw = np.dtype(_RAW[tensor.dtype.itemsize])
    out = np.zeros(tensor.shape, raw)
    written = np.zeros(tensor.shape, np.uint8)
    layout = tensor.layout
    for box, strides, offset, record in zip(
        layout.boxes, layout.strides, layout.storage_offsets, tensor.shards, strict=True
    ):
        path = checkpoint.root / checkpoint.files[record.file].path
        storage = np.fromfile(path, raw, record.nbytes // raw.itemsize, offset=record.start)
        piece = np.lib.stride_tricks.as_strided(
            storage[offset:], box.sizes, [s * raw.itemsize for s in strides]
        )
        where = tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))
        out[where] = piece
        written[where] += 1
    assert (written == 1).all()
    return out


def raw_of(tensor: torch.Tensor) -> np.ndarray:
    kind = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64, 16: None}
    view = kind[tensor.element_size()]
    flat = tensor.contiguous().reshape(-1)
    return (flat if view is None else flat.view(view)).reshape(tensor.shape).numpy()


def truth_of(path: Path | None) -> dict[str, torch.Tensor]:
    assert path is not None
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_equal(checkpoint: Checkpoint, truth: dict[str, torch.Tensor]) -> None:
    assert not checkpoint.undecided
    for name, expected in truth.items():
        tensor = checkpoint.tensors[name]
        assert tensor.dtype.torch == str(expected.dtype).removeprefix("torch.")
        assert np.array_equal(gather(checkpoint, tensor), raw_of(expected)), name


# --- every recipe, every old release -------------------------------------------------------------

SHARED = ("t24-fsdp1", "t26-fsdp1", "t28-fsdp2", "t28-fsdp2-tp", "t29-fsdp2", "t210-fsdp2")


@pytest.mark.parametrize("name", SHARED)
def test_older_torch(name: str, shared_checkpoints: Path) -> None:
    folder = shared_checkpoints / "fsdp" / name
    check_equal(formats.find_model(folder).read(), truth_of(folder / "truth" / "state.safetensors"))


@pytest.mark.parametrize("name", ["verl-native-fsdp1", "verl-native-fsdp2"])
def test_verl_itself(name: str, shared_checkpoints: Path) -> None:
    checkpoint = formats.find_model(shared_checkpoints / "fsdp" / name).read()
    assert checkpoint.side_dir is not None
    assert {s.reason for s in checkpoint.skipped} == {"optimizer or trainer state"}
    assert checkpoint.facts["world_size"] == 4


def test_written_by(shared_checkpoints: Path) -> None:
    facts = {n: formats.find_model(shared_checkpoints / "fsdp" / n).read().facts for n in SHARED}
    assert [facts[n]["torch"] for n in SHARED] == [
        "up to 2.4",
        *["2.2 to 2.9"] * 4,
        "2.10 to 2.12",
    ]
    assert [facts[n]["strategy"] for n in SHARED] == [
        "FSDP1",
        "FSDP1",
        "FSDP2",
        "FSDP2 + tp",
        "FSDP2",
        "FSDP2",
    ]


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if not n.startswith("plain-")])
def test_recipe(name: str, checkpoints: dict[str, Made]) -> None:
    made = checkpoints[name]
    checkpoint = formats.find_model(made.source).read()
    assert checkpoint.tensors.keys() == made.oracle.keys()
    if made.truth_state is None:  # complex128, which no safetensors file can hold
        names = {str(t.dtype) for t in checkpoint.tensors.values()}
        assert "complex128" in names
        for tensor in checkpoint.tensors.values():
            gather(checkpoint, tensor)
    else:
        check_equal(checkpoint, truth_of(made.truth_state))
    facts = checkpoint.facts
    assert facts["world_size"] == made.recipe.world
    if any(dim == "ddp" for dim, _ in made.recipe.mesh or ()):
        assert facts["replicas_dropped"]
    elif len(made.recipe.mesh or ()) < 2 and all(
        entry["kind"] != "Tensor" for entry in made.oracle.values()
    ):
        assert not facts["replicas_dropped"]
    json.dumps(dict(facts))


@pytest.mark.parametrize("name", ["plain-whole", "plain-parameters", "plain-pieces"])
def test_plain_tensors_stay_undecided(name: str, checkpoints: dict[str, Made]) -> None:
    made = checkpoints[name]
    checkpoint = formats.find_model(made.source).read()
    truth = truth_of(made.truth_state)
    assert checkpoint.tensors.keys() | checkpoint.undecided.keys() == truth.keys()
    for fqn, expected in truth.items():
        pair = checkpoint.undecided.get(fqn)
        readings = (pair.pieces, pair.copies) if pair else (checkpoint.tensors[fqn],)
        (right,) = {t.layout: t for t in readings if t.shape == tuple(expected.shape)}.values()
        assert np.array_equal(gather(checkpoint, right), raw_of(expected))


# --- missing, extra, mixed -----------------------------------------------------------------------


@pytest.fixture
def copy(checkpoints: dict[str, Made], tmp_path: Path) -> Callable[[str], Path]:
    def copy_of(name: str) -> Path:
        target = tmp_path / name
        shutil.copytree(checkpoints[name].source, target)
        return target

    return copy_of


def test_missing_rank_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("fsdp2")
    (folder / "model_world_size_4_rank_2.pt").unlink()
    with pytest.raises(BadInputError) as caught:
        formats.find_model(folder).read()
    assert "model_world_size_4_rank_2.pt" in str(caught.value)
    assert "have holes" in str(caught.value)


@pytest.mark.parametrize("name", ["fsdp2-hsdp", "fsdp1-hsdp", "fsdp2-hsdp-w8"])
def test_replicas_step_in(
    name: str, copy: Callable[[str], Path], checkpoints: dict[str, Made]
) -> None:
    folder = copy(name)
    world = checkpoints[name].recipe.world
    (folder / f"model_world_size_{world}_rank_0.pt").unlink()
    checkpoint = formats.find_model(folder).read()
    check_equal(checkpoint, truth_of(checkpoints[name].truth_state))
    assert any("missing" in n for n in checkpoint.notices)


def test_both_replicas_missing(copy: Callable[[str], Path]) -> None:
    folder = copy("fsdp2-hsdp")
    for rank in (1, 3):
        (folder / f"model_world_size_4_rank_{rank}.pt").unlink()
    with pytest.raises(BadInputError, match="2 of 4 rank files are missing"):
        formats.find_model(folder).read()


@pytest.mark.parametrize("name", ["plain-whole", "plain-pieces"])
def test_missing_rank_of_plain_tensors(
    name: str, copy: Callable[[str], Path], checkpoints: dict[str, Made]
) -> None:
    folder = copy(name)
    (folder / f"model_world_size_{checkpoints[name].recipe.world}_rank_1.pt").unlink()
    with pytest.raises(BadInputError, match="rank files are missing"):
        formats.find_model(folder).read()


def test_two_world_sizes(copy: Callable[[str], Path]) -> None:
    folder = copy("fsdp2")
    file = folder / "model_world_size_4_rank_0.pt"
    shutil.copy(file, folder / "model_world_size_8_rank_0.pt")
    with pytest.raises(BadInputError, match="several world sizes"):
        formats.find_model(folder).read()


def test_rank_beyond_the_world(copy: Callable[[str], Path]) -> None:
    folder = copy("fsdp2")
    file = folder / "model_world_size_4_rank_0.pt"
    shutil.copy(file, folder / "model_world_size_4_rank_4.pt")
    with pytest.raises(BadInputError, match="a world of 4"):
        formats.find_model(folder).read()


def test_file_under_another_rank(copy: Callable[[str], Path]) -> None:
    folder = copy("fsdp2")
    shutil.copy(folder / "model_world_size_4_rank_0.pt", folder / "model_world_size_4_rank_1.pt")
    with pytest.raises(BadInputError, match="another rank than its name says") as caught:
        formats.find_model(folder).read()
    assert "model_world_size_4_rank_1.pt" in str(caught.value)


def test_config_of_another_world(copy: Callable[[str], Path]) -> None:
    folder = copy("fsdp2")
    (folder / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 8}')
    with pytest.raises(BadInputError, match="disagree about the world size"):
        formats.find_model(folder).read()


def test_broken_config_is_only_a_notice(copy: Callable[[str], Path]) -> None:
    folder = copy("fsdp2")
    (folder / "fsdp_config.json").write_text("{" * 100_000)
    assert any("fsdp_config.json" in n for n in formats.find_model(folder).read().notices)


def test_files_of_two_runs(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder, other = copy("fsdp2"), copy("fsdp2-critic")
    name = "model_world_size_4_rank_3.pt"
    shutil.copy(other / name, folder / name)
    with pytest.raises(BadInputError, match=r"rank \d has no tensor|disagree"):
        formats.find_model(folder).read()


def test_truncated_file(copy: Callable[[str], Path]) -> None:
    folder = copy("fsdp2")
    file = folder / "model_world_size_4_rank_1.pt"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(BadInputError, match="truncated") as caught:
        formats.find_model(folder).read()
    assert file.name in str(caught.value)


# --- which model ---------------------------------------------------------------------------------


def test_a_rank_file_means_its_folder(copy: Callable[[str], Path]) -> None:
    folder = copy("fsdp2")
    assert formats.find_model(folder / "model_world_size_4_rank_0.pt").root == folder


def test_step_with_one_model(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("fsdp2")
    step = tmp_path / "global_step_7"
    step.mkdir()
    folder.rename(step / "actor")
    assert formats.find_model(step).root == step / "actor"


def test_actor_and_critic(copy: Callable[[str], Path], tmp_path: Path) -> None:
    step = tmp_path / "global_step_7"
    step.mkdir()
    copy("fsdp2").rename(step / "actor")
    copy("fsdp2-critic").rename(step / "critic")
    with pytest.raises(UsageError) as caught:
        formats.find_model(step)
    assert "actor, critic" in str(caught.value)
    assert formats.find_model(step, "critic").root == step / "critic"
    with pytest.raises(UsageError, match="no model 'ref'"):
        formats.find_model(step, "ref")


def test_run_names_its_steps(copy: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "global_step_9").mkdir(parents=True)
    copy("fsdp2").rename(run / "global_step_9" / "actor")
    (run / "latest_checkpointed_iteration.txt").write_text("10")
    assert formats.find_model(run).root == run / "global_step_9" / "actor"
    shutil.copytree(run / "global_step_9", run / "global_step_10")
    with pytest.raises(UsageError) as caught:
        formats.find_model(run)
    assert "global_step_9, global_step_10" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "meaning"),
    [
        ([], "an empty folder"),
        (["a.safetensors", "b.safetensors", "config.json"], "no model.safetensors.index.json"),
        (["metadata.json"], "no index (.metadata)"),
        (["optim_world_size_2_rank_0.pt"], "optimizer state without"),
        (["notes.txt"], "notes.txt"),
    ],
)
def test_no_checkpoint(files: list[str], meaning: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(BadInputError) as caught:
        formats.find_model(tmp_path)
    assert meaning in str(caught.value)
    assert "model_world_size" in str(caught.value)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such checkpoint"):
        formats.find_model(tmp_path / "nothing")


# --- state dicts made for one thing --------------------------------------------------------------


def save(folder: Path, *states: object) -> Path:
    for rank, state in enumerate(states):
        torch.save(state, folder / f"model_world_size_{len(states)}_rank_{rank}.pt")
    return folder


def test_views_and_scalars(tmp_path: Path) -> None:
    base = torch.arange(60).reshape(6, 10)
    state = {
        "view": base[2:5, 1:9:2],
        "transposed": base.t(),
        "expanded": torch.tensor([[1], [2]]).expand(2, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "shared": base[1],
    }
    checkpoint = formats.find_model(save(tmp_path, state)).read()
    check_equal(checkpoint, state)
    assert checkpoint.tensors["view"].layout.storage_offsets == (21,)


def test_wrapped_state_dict(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2)}, "step": 7}
    checkpoint = formats.find_model(save(tmp_path, state)).read()
    assert list(checkpoint.tensors) == ["w"]
    assert any("'model'" in n for n in checkpoint.notices)


def test_two_wrapped_state_dicts(tmp_path: Path) -> None:
    save(tmp_path, {"model": {"w": torch.ones(2)}, "ema": {"w": torch.ones(2)}})
    with pytest.raises(BadInputError, match="which is the model"):
        formats.find_model(tmp_path).read()


def test_a_state_dict_beside_tensors(tmp_path: Path) -> None:
    """Neither may be dropped for the other; extra states of layers hold what they like."""
    save(tmp_path, {"model": {"w": torch.ones(2)}, "b": torch.ones(3)})
    with pytest.raises(BadInputError, match="which is the model") as caught:
        formats.find_model(tmp_path).read()
    assert "b, and below model" in str(caught.value)


def test_an_extra_state_of_tensors(tmp_path: Path) -> None:
    state = {"up.weight": torch.ones(3), "up._extra_state": {"scale": torch.ones(2)}}
    checkpoint = formats.find_model(save(tmp_path, state)).read()
    assert list(checkpoint.tensors) == ["up.weight"]
    assert [s.name for s in checkpoint.skipped] == ["up._extra_state"]


def test_other_values_are_skipped(tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "step": 3, "nothing": None, "inner": {"x": 1}, "name": "a"}
    checkpoint = formats.find_model(save(tmp_path, state)).read()
    assert {s.name: s.reason for s in checkpoint.skipped} == {
        "step": "a value of type int, not a tensor",
        "nothing": "None, not a tensor",
        "inner": "a nested dict, not a tensor",
        "name": "a value of type str, not a tensor",
    }


def test_lazy_conjugate_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.tensor([1 + 2j]).conj()})
    with pytest.raises(BadInputError, match="lazy view"):
        formats.find_model(tmp_path).read()


def test_meta_tensor_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.empty(3, device="meta")})
    with pytest.raises(BadInputError, match="meta tensor"):
        formats.find_model(tmp_path).read()


def test_unknown_global_is_named(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(2), "path": Path("x")})
    with pytest.raises(UnsafeInputError, match=r"pathlib\."):
        formats.find_model(tmp_path).read()


def test_plain_pieces_of_different_sizes(tmp_path: Path) -> None:
    whole = torch.arange(10.0).reshape(5, 2)
    save(tmp_path, {"w": whole[:3].clone()}, {"w": whole[3:].clone()})
    check_equal(formats.find_model(tmp_path).read(), {"w": whole})


def test_plain_scalars_that_differ(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)})
    with pytest.raises(BadInputError, match="cannot be put together"):
        formats.find_model(tmp_path).read()


def test_no_tensors(tmp_path: Path) -> None:
    save(tmp_path, {"step": 1})
    with pytest.raises(BadInputError, match="no tensors"):
        formats.find_model(tmp_path).read()


def test_no_state_dict(tmp_path: Path) -> None:
    save(tmp_path, [torch.ones(1)])
    with pytest.raises(BadInputError, match="no state dict"):
        formats.find_model(tmp_path).read()


def test_replicas_that_differ(copy: Callable[[str], Path]) -> None:
    """One byte of one replica is changed, and its CRC with it: a mixed-step checkpoint."""
    folder = copy("fsdp2-hsdp")
    file = folder / "model_world_size_4_rank_3.pt"
    state = torch.load(file, weights_only=True, map_location="cpu")
    name = next(n for n, t in state.items() if t._local_tensor.numel())
    with torch.no_grad():
        state[name]._local_tensor.view(-1)[0] += 1
    torch.save(state, file)
    with pytest.raises(BadInputError, match="replicas of a tensor differ") as caught:
        formats.find_model(folder).read()
    assert name in str(caught.value)
    assert "rank 1" in str(caught.value)
    assert "rank 3" in str(caught.value)


def test_buffers_that_differ(copy: Callable[[str], Path]) -> None:
    folder = copy("fsdp2-buffers")
    file = folder / "model_world_size_4_rank_2.pt"
    state = torch.load(file, weights_only=True, map_location="cpu")
    name = next(n for n, t in state.items() if type(t) is torch.Tensor and t.dtype == torch.int64)
    state[name] = state[name] + 1
    torch.save(state, file)
    with pytest.raises(BadInputError, match="replicas of a tensor differ") as caught:
        formats.find_model(folder).read()
    assert name in str(caught.value)


def test_no_crcs_are_told(checkpoints: dict[str, Made]) -> None:
    checkpoint = formats.find_model(checkpoints["fsdp2-no-crc"].source).read()
    assert any("cannot be verified" in n for n in checkpoint.notices)
    assert checkpoint.facts["records_without_crc"]


def test_padding_is_told(checkpoints: dict[str, Made]) -> None:
    assert (
        formats.find_model(checkpoints["fsdp2-w3"].source).read().facts["padded_storages"] is True
    )
    assert formats.find_model(checkpoints["fsdp1"].source).read().facts["padded_storages"] is False


# --- the trap of torch 2.4 -----------------------------------------------------------------------


def as_torch_2_4(folder: Path, placements_of: str, *more: tuple[str, str]) -> None:
    """Rewrite rank files as torch 2.4 would have named them: its module path, plain Shards."""
    import io
    import zipfile

    for file in folder.glob("model_*.pt"):
        out = io.BytesIO()
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w") as new:
            for info in old.infolist():
                data = old.read(info)
                if info.filename.endswith("/data.pkl"):
                    data = data.replace(
                        b"ctorch.distributed.tensor\nDTensor\n",
                        b"ctorch.distributed._tensor.api\nDTensor\n",
                    )
                    data = data.replace(placements_of.encode(), b"Shard\n")
                    data = without_split_factors(data)
                    for before, after in more:
                        data = data.replace(before.encode(), after.encode())
                new.writestr(info.filename, data)
        file.write_bytes(out.getvalue())


def without_split_factors(pickled: bytes) -> bytes:
    """Take out of every state the field that plain Shards do not have: its name and its number."""
    ops = list(pickletools.genops(pickled))
    ends = [*(at for _, _, at in ops[1:]), len(pickled)]
    memo, dropped = None, set()
    for i, (op, argument, _) in enumerate(ops):
        if argument == "split_factor":  # followed by what remembers it, and by the number
            memo = ops[i + 1][1]
            dropped |= {i, i + 1, i + 2}
        elif op.name.endswith("BINGET") and argument == memo:
            dropped |= {i, i + 1}
    spans = enumerate(zip(ops, ends, strict=True))
    return b"".join(pickled[at:end] for i, ((_, _, at), end) in spans if i not in dropped)


def test_torch_2_4_fsdp2_tp(shared_checkpoints: Path, tmp_path: Path) -> None:
    """A 2.8 file holds _StridedShard; under 2.4's names the order must be found out again."""
    source = shared_checkpoints / "fsdp" / "t28-fsdp2-tp"
    folder = tmp_path / "a"
    shutil.copytree(source, folder)
    as_torch_2_4(folder, "_StridedShard\n")
    check_equal(
        formats.find_model(folder).read(), truth_of(source / "truth" / "state.safetensors")
    )  # FSDP2 by its module names
    (folder / "fsdp_config.json").write_text('{"FSDP_version": 2}')
    check_equal(formats.find_model(folder).read(), truth_of(source / "truth" / "state.safetensors"))


def test_torch_2_4_undecidable(shared_checkpoints: Path, tmp_path: Path) -> None:
    """Without module names and fsdp_config.json nothing tells FSDP2 from FSDP1: refused."""
    source = shared_checkpoints / "fsdp" / "t28-fsdp2-tp"
    folder = tmp_path / "a"
    shutil.copytree(source, folder)
    as_torch_2_4(folder, "_StridedShard\n", ("_metadata", "_metadatX"))
    with pytest.raises(BadInputError, match="cannot determine") as caught:
        formats.find_model(folder).read()
    assert '{"FSDP_version": 2}' in str(caught.value)
    truth = truth_of(source / "truth" / "state.safetensors")
    (folder / "fsdp_config.json").write_text('{"FSDP_version": 2}')
    check_equal(formats.find_model(folder).read(), truth)
    (folder / "fsdp_config.json").write_text('{"FSDP_version": 1}')
    left_to_right = formats.find_model(folder).read()
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = gather(left_to_right, left_to_right.tensors[name]).reshape(4, 4, 16)
    assert np.array_equal(rows[[0, 2, 1, 3]].reshape(16, 16), raw_of(truth[name]))


def test_torch_2_4_that_contradicts_itself(shared_checkpoints: Path, tmp_path: Path) -> None:
    """FSDP1's module names beside a config of FSDP2: one of them is wrong, and it matters."""
    folder = tmp_path / "a"
    shutil.copytree(shared_checkpoints / "fsdp" / "t28-fsdp2-tp", folder)
    as_torch_2_4(
        folder, "_StridedShard\n", ("model.layers.1.mlp.gate_proj", "_fsdp_wrapped_module.x.y.zzz")
    )
    check = (folder / "model_world_size_4_rank_0.pt").read_bytes()
    assert b"_fsdp_wrapped_module" in check
    (folder / "fsdp_config.json").write_text('{"FSDP_version": 2}')
    with pytest.raises(BadInputError, match="module names in the rank files are FSDP1's"):
        formats.find_model(folder).read()


def test_padding_of_replicas_may_differ(
    copy: Callable[[str], Path], checkpoints: dict[str, Made]
) -> None:
    """A CRC covers FSDP2's padding too; only the bytes that are shown must agree."""
    folder = copy("fsdp2-hsdp")
    file = folder / "model_world_size_4_rank_3.pt"
    state = torch.load(file, weights_only=True, map_location="cpu")
    padded = [
        t._local_tensor
        for t in state.values()
        if t._local_tensor.untyped_storage().nbytes() > t._local_tensor.nbytes > 0
    ]
    assert padded
    for local in padded:
        storage = local.untyped_storage()
        storage[storage.nbytes() - 1] ^= 1
    torch.save(state, file)
    check_equal(formats.find_model(folder).read(), truth_of(checkpoints["fsdp2-hsdp"].truth_state))


# --- mutants -------------------------------------------------------------------------------------


def places(checkpoint: Checkpoint) -> dict[str, tuple[object, ...]]:
    """What decides which bytes end up where: everything but the CRCs, which the executor checks."""
    return {
        name: (t.dtype, t.layout, [(r.start, r.nbytes, r.header_nbytes) for r in t.shards])
        for name, t in checkpoint.tensors.items()
    }


def check_headers(checkpoint: Checkpoint) -> None:
    """Check every record's local header, as the executor does when it reads the record."""
    for tensor in checkpoint.tensors.values():
        for record in tensor.shards:
            source = checkpoint.files[record.file]
            with (checkpoint.root / source.path).open("rb") as file:
                file.seek(record.start - record.header_nbytes)
                header = file.read(record.header_nbytes)
            check_local_header(header, f"{source.entry_prefix}/data/{record.key}", source.path)


@pytest.mark.parametrize("seed", range(5))
def test_flipped_bits_are_refused_or_change_nothing(
    seed: int, shared_checkpoints: Path, tmp_path: Path
) -> None:
    """No flipped byte of the metadata leads to other bytes being taken for a tensor."""
    folder = tmp_path / "a"
    shutil.copytree(shared_checkpoints / "fsdp" / "t28-fsdp2-tp", folder)
    file = folder / "model_world_size_4_rank_1.pt"
    original = file.read_bytes()
    expected = places(formats.find_model(folder).read())
    draw = np.random.default_rng(seed)
    refused = 0
    for _ in range(120):
        broken = bytearray(original)
        at = int(draw.integers(len(original) - 4000, len(original)))  # directory and end records
        if draw.random() < 0.5:
            at = int(draw.integers(0, 6000))  # the pickle and its local header
        broken[at] ^= 1 << int(draw.integers(8))
        file.write_bytes(broken)
        try:
            checkpoint = formats.find_model(folder).read()
            check_headers(checkpoint)
        except (BadInputError, UnsafeInputError):
            refused += 1
        else:
            assert places(checkpoint) == expected, at
    assert refused > 60


@pytest.mark.parametrize("seed", range(3))
def test_mutated_pickles_end_in_our_errors(seed: int, tmp_path: Path) -> None:
    """With the CRC made right again, a changed pickle is read or refused, never a traceback."""
    import pickletools
    import zipfile

    state = torch.nn.Linear(3, 4).state_dict()
    source = save(tmp_path, state) / "model_world_size_1_rank_0.pt"
    with zipfile.ZipFile(source) as old:
        records = {i.filename: old.read(i) for i in old.infolist()}
    (name,) = (n for n in records if n.endswith("/data.pkl"))
    draw = np.random.default_rng(seed)
    for _ in range(200):
        data = bytearray(records[name])
        for at in draw.integers(2, len(data), size=int(draw.integers(1, 4))):
            data[at] = int(draw.integers(256))
        try:
            opcodes = list(pickletools.genops(bytes(data)))
        except Exception:  # noqa: BLE001 - pickletools fails in many ways
            opcodes = []
        if any(o.name == "LONG_BINPUT" for o, _, _ in opcodes) or not opcodes:
            continue  # may ask for gigabytes: see the bombs in test_unpickle.py
        with zipfile.ZipFile(source, "w") as new:
            for record, content in records.items():
                new.writestr(record, bytes(data) if record == name else content)
        with contextlib.suppress(BadInputError, UnsafeInputError):
            formats.find_model(tmp_path).read()


def test_a_file_of_a_checkpoint_stands_for_its_folder_and_no_other_file_does(
    lone_rank_file: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(lone_rank_file.parent, tmp_path / "actor")
    for name in ("notes.txt", "plot.png", "config.json", "extra_state_world_size_1_rank_0.pt"):
        (folder / name).write_text("{}")
    for name in (lone_rank_file.name, "config.json"):
        assert formats.find_model(folder / name).root == folder
    for name in ("notes.txt", "plot.png"):
        with pytest.raises(BadInputError, match="not a file of a checkpoint") as caught:
            formats.find_model(folder / name)
        assert str(folder) in str(caught.value.hint)


def test_the_folder_with_the_config_alone_says_where_the_weights_are(
    lone_rank_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(lone_rank_file.parent, tmp_path / "actor")
    (folder / "huggingface").mkdir(exist_ok=True)
    (folder / "huggingface" / "config.json").write_text("{}")
    monkeypatch.chdir(folder / "huggingface")
    for path in (folder / "huggingface", Path()):
        with pytest.raises(BadInputError, match="no checkpoint of a known format") as caught:
            formats.find_model(path)
        assert str(folder) in str(caught.value.hint)


def test_a_path_that_goes_up_is_a_path(lone_rank_file: Path, tmp_path: Path) -> None:
    """Plans take none such: what they name must be what it seems to be."""
    folder = shutil.copytree(lone_rank_file.parent, tmp_path / "run" / "actor")
    (folder / "huggingface").mkdir(exist_ok=True)
    (folder / "huggingface" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "here").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(tmp_path / "run" / "actor")
    for at in (tmp_path / "here/../run/actor", elsewhere / ".." / "actor"):
        result = streamconv.convert(at, tmp_path / "here/../out", overwrite=True)
        assert result.output == tmp_path / "out"
        assert (tmp_path / "out" / "tokenizer_config.json").is_file()
