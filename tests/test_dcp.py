"""torch's distributed checkpoints: real ones on gloo, damaged ones, and what their index may not do."""

from __future__ import annotations

import dataclasses
import io
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from scripts.makers.dcp import Pieces, save_alone
from scripts.makers.fsdp import RECIPES, Made
from scripts.outputs import differences, read_model, read_truth
from streamconv.conversion.job import run_plan
from streamconv.errors import BadInputError, SourceChangedError, UnsafeInputError
from streamconv.formats import find_model
from streamconv.formats.dcp import plain_dcp as format_dcp
from streamconv.formats.dcp.folder import read_index
from streamconv.options import RunOptions
from streamconv.torchfile.dcp import DcpIndex
from streamconv.tracing.hf_names import read_names
from tests.stored import stored

NAMES = [name for name, recipe in RECIPES.items() if recipe.dcp]


@pytest.mark.parametrize("name", NAMES)
def test_reads_what_torch_wrote(name: str, checkpoints: dict[str, Made]) -> None:
    made = checkpoints[name]
    assert made.dcp is not None
    checkpoint = format_dcp.read(made.dcp)
    truth = read_truth(made.truth_state)
    found = stored(checkpoint)
    assert set(found) == {f"model.{n}" for n in truth}
    for fqn, tensor in found.items():
        expected = truth[fqn.removeprefix("model.")]
        assert (list(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()) == (
            list(expected.shape),
            expected.data,
        ), fqn
    assert {s.reason for s in checkpoint.skipped} == {"optimizer or trainer state", "no tensors"}
    assert checkpoint.facts["ranks"] == made.recipe.world


def test_converts_like_the_model_itself(checkpoints: dict[str, Made], tmp_path: Path) -> None:
    made = checkpoints["fsdp2-w3"]
    assert made.dcp is not None
    assert made.truth_hf is not None
    streamconv.convert(
        made.dcp, tmp_path / "out", hf_config=made.source / "huggingface", sync=False
    )
    assert differences(read_model(tmp_path / "out"), read_model(made.truth_hf)) == []


@pytest.mark.parametrize("place", [".", "..", "huggingface", "../huggingface"])
@pytest.mark.usefixtures("planned_here")
def test_the_config_is_found_in_the_folder_above_it_or_beside(
    place: str, checkpoints: dict[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what a trainer keeps there only what belongs to a model is copied."""
    made = checkpoints["fsdp2-w3"]
    assert made.dcp is not None
    assert made.truth_hf is not None
    weights = Path(shutil.copytree(made.dcp, tmp_path / "step" / "pytorch_model_fsdp_0"))
    side = weights / place
    shutil.copytree(made.source / "huggingface", side, dirs_exist_ok=True)
    if not place.endswith("huggingface"):
        (side / "trainer_state.json").write_text("{}")
        (side / "training_args.bin").write_bytes(b"x")
        (side / "logs.jinja").mkdir()
        (side / "elsewhere").symlink_to("/etc")
    monkeypatch.chdir(weights)
    out = tmp_path / "step" / "hf"
    streamconv.convert(Path(), out, sync=False)
    assert differences(read_model(out), read_model(made.truth_hf)) == []
    assert _names(out) >= _names(made.source / "huggingface")
    assert not {"trainer_state.json", "training_args.bin", "elsewhere"} & _names(out)
    assert streamconv.convert(weights, out, sync=False).status == "nothing-to-do"


def _names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("config", [None, '{"learning_rate": 1}', '{"model_type": "nobodys"}'])
@pytest.mark.usefixtures("planned_here")
def test_names_that_no_model_vouches_for_are_refused(
    config: str | None, save: Callable[..., Path], tmp_path: Path
) -> None:
    """Whoever saved a state dict chose its keys; a folder of such names loads nowhere."""
    folder = save(**{"model.lm_head.weight": torch.zeros(4, 3)})
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(
        BadInputError, match="the Hub's names of these tensors are not known"
    ) as why:
        streamconv.convert(folder, tmp_path / "out", sync=False)
    assert "--hf-config DIR" in str(why.value.hint)
    assert not (tmp_path / "out").exists()
    streamconv.convert(folder, tmp_path / "out", layout="memory", sync=False)
    assert set(read_model(tmp_path / "out")) == {"model.lm_head.weight"}


def test_a_config_that_cannot_be_read_is_an_error(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save()
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInputError, match="not valid JSON"):
        streamconv.convert(folder, tmp_path / "out", sync=False)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def run(name: str = "plain", /, **state: Any) -> Path:
        return save_alone(tmp_path / name, state or {"a": torch.arange(12.0).reshape(3, 4)})

    return run


def test_strides_are_those_of_the_record(save: Callable[..., Path]) -> None:
    """torch saves a dense tensor in the order of its storage, which need not be C's."""
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = {"t": torch.arange(6.0).reshape(2, 3).T, "image": image, "scalar": torch.tensor(3)}
    state |= {"none": torch.empty(0, 4), "part": torch.arange(100.0)[10:20]}
    found = stored(format_dcp.read(save(**state)))
    assert set(found) == set(state)
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def test_dtypes(save: Callable[..., Path]) -> None:
    kinds = ("bfloat16", "float16", "float64", "int8", "uint8", "int64", "bool", "float8_e4m3fn")
    state = {k: torch.arange(4).to(getattr(torch, k)) for k in (*kinds, "uint16")}
    checkpoint = format_dcp.read(save(**state))
    assert {n: t.dtype.torch for n, t in checkpoint.tensors.items()} == {k: k for k in state}


def test_pieces_as_megatron_fsdp_lists_them(save: Callable[..., Path]) -> None:
    """Its DTensors are cut where parameters end, and its own code describes them, by plain tuples."""
    whole = torch.randn(11, 4)
    folder = save(a=Pieces(whole, [((0, 0), (5, 4)), ((5, 0), (6, 4))]))
    index = folder / ".metadata"
    changed = pickle.loads(index.read_bytes())
    for piece in changed.state_dict_metadata["a"].chunks:
        piece.offsets, piece.sizes = tuple(piece.offsets), tuple(piece.sizes)
    index.write_bytes(pickle.dumps(changed, protocol=4))
    assert torch.equal(stored(format_dcp.read(folder))["a"], whole)


def test_the_optimizer_beside_it_is_no_second_model(save: Callable[..., Path]) -> None:
    """Accelerate writes two folders."""
    weights, optimizer = save("pytorch_model_fsdp_0"), save("optimizer_0")
    assert find_model(weights.parent).root == weights
    assert format_dcp.detect(optimizer) is None


def test_the_size_of_the_index_is_known_before_it_is_read(save: Callable[..., Path]) -> None:
    """What reading it may take of the memory follows from it."""
    location = find_model(save())
    assert location.index_nbytes == (location.root / ".metadata").stat().st_size > 100


def test_identity(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save()
    before = format_dcp.identify(folder)
    assert before == format_dcp.read(folder).files
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)  # with its times
    assert [f.directory_hash for f in format_dcp.identify(copy)] == [
        f.directory_hash for f in before
    ]
    shutil.rmtree(folder)
    again = format_dcp.identify(save())
    assert [f.directory_hash for f in again] != [f.directory_hash for f in before]


def test_another_index_after_planning_is_noticed(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save()
    streamconv.plan(folder, output=tmp_path / "plan", layout="memory")
    index = folder / ".metadata"
    index.write_bytes(index.read_bytes().replace(b"1.0.0", b"1.0.1"))
    with pytest.raises(SourceChangedError, match="not the one that was planned"):
        run_plan(tmp_path / "plan", tmp_path / "out", RunOptions(sync=False))


# --- damage --------------------------------------------------------------------------------------


def test_a_missing_file(save: Callable[..., Path]) -> None:
    folder = save()
    (folder / "__0_0.distcp").rename(folder / "__1_0.distcp")
    with pytest.raises(BadInputError, match="file of records is missing") as caught:
        format_dcp.read(folder)
    assert str(caught.value.where).endswith("__0_0.distcp")


def test_a_truncated_file(save: Callable[..., Path]) -> None:
    folder = save()
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInputError, match="points outside itself") as caught:
        format_dcp.read(folder)
    assert "copy the whole folder again" in str(caught.value.hint)


def test_a_missing_piece(tmp_path: Path) -> None:
    state = {"a": Pieces(torch.zeros(4, 2), [((0, 0), (2, 2))])}
    save_alone(tmp_path / "x", state)
    with pytest.raises(BadInputError, match="do not make it up") as caught:
        format_dcp.read(tmp_path / "x")
    assert "no piece holds" in str(caught.value.found)


def test_pieces_that_overlap(tmp_path: Path) -> None:
    pieces = Pieces(torch.zeros(4, 2), [((0, 0), (2, 2)), ((2, 0), (2, 2))])
    index = save_alone(tmp_path / "x", {"a": pieces}) / ".metadata"
    changed = pickle.loads(index.read_bytes())
    moved = torch.Size((1, 0))
    changed.state_dict_metadata["a"].chunks[1].offsets = moved
    second = next(k for k in changed.storage_data if k.offset == torch.Size((2, 0)))
    place = changed.storage_data.pop(second)
    changed.storage_data[dataclasses.replace(second, offset=moved)] = place
    index.write_bytes(pickle.dumps(changed, protocol=4))
    with pytest.raises(BadInputError, match="do not make it up") as caught:
        format_dcp.read(tmp_path / "x")
    assert "overlap" in str(caught.value.found)


def test_a_record_of_another_tensor(save: Callable[..., Path]) -> None:
    folder, other = save(a=torch.zeros(3, 4)), save("other", a=torch.zeros(4, 3))
    shutil.copy(other / "__0_0.distcp", folder / "__0_0.distcp")
    with pytest.raises(BadInputError, match="another tensor than the index says"):
        format_dcp.read(folder)


def test_a_damaged_byte_is_found_by_its_checksum(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save(a=torch.zeros(1000))
    record = format_dcp.read(folder).tensors["a"].shards[0]
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[record.start + 17] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInputError, match="do not match their CRC-32") as caught:
        streamconv.convert(folder, tmp_path / "out", layout="memory", sync=False)
    assert "__0_0.distcp, a, record archive/data/0" in str(caught.value.where)


def test_compressed_records_are_refused(save: Callable[..., Path]) -> None:
    folder = save()
    index = folder / ".metadata"
    changed = pickle.loads(index.read_bytes())
    for info in changed.storage_data.values():
        info.transform_descriptors = ["zstd"]
    index.write_bytes(pickle.dumps(changed, protocol=4))
    with pytest.raises(BadInputError, match="compressed or encrypted"):
        format_dcp.read(folder)


def test_safetensors_pieces_are_named(save: Callable[..., Path]) -> None:
    folder = save()
    (folder / "__0_0.distcp").rename(folder / "shard-00001-model.safetensors")
    with pytest.raises(BadInputError, match="torch's HuggingFace writer"):
        format_dcp.read(folder)


# --- hostile indexes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["../__0_0.distcp", "/etc/passwd", "sub/__0_0.distcp", ".metadata", ""]
)
def test_a_file_outside_the_folder(path: str, save: Callable[..., Path]) -> None:
    folder = save()
    index = folder / ".metadata"
    changed = pickle.loads(index.read_bytes())
    for info in changed.storage_data.values():
        info.relative_path = path
    index.write_bytes(pickle.dumps(changed, protocol=4))
    with pytest.raises(UnsafeInputError, match="outside the checkpoint's folder"):
        format_dcp.read(folder)


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit(3)",)


def test_nothing_of_an_index_is_run(save: Callable[..., Path]) -> None:
    folder = save()
    index = folder / ".metadata"
    changed = pickle.loads(index.read_bytes())
    changed.planner_data = Evil()
    index.write_bytes(pickle.dumps(changed, protocol=4))
    with pytest.raises(UnsafeInputError, match=re.escape("the global builtins.exec")):
        read_index(folder)


def _pickled(write: Callable[[io.BytesIO], None]) -> bytes:
    stream = io.BytesIO(b"\x80\x04")
    stream.seek(2)
    write(stream)
    stream.write(b".")
    return stream.getvalue()


def _index(stream: io.BytesIO) -> None:
    stream.write(b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)\x81")


def test_an_index_key_without_a_state_has_no_hash() -> None:
    def write(stream: io.BytesIO) -> None:
        stream.write(b"}")
        _index(stream)
        stream.write(b"Ns")

    with pytest.raises(UnsafeInputError, match="without a state"):
        DcpIndex(_pickled(write), "x")


def test_an_index_key_cannot_change() -> None:
    def write(stream: io.BytesIO) -> None:
        _index(stream)
        stream.write(b"}X\x03\x00\x00\x00fqnX\x01\x00\x00\x00asb" * 2)

    with pytest.raises(UnsafeInputError, match="a state of another form"):
        DcpIndex(_pickled(write), "x")


@pytest.mark.parametrize("value", [3, [1], {"a": 1}])
def test_no_index_at_all(value: object) -> None:
    with pytest.raises(BadInputError, match="no index of a torch distributed checkpoint"):
        DcpIndex(pickle.dumps(value, protocol=4), "x")


def test_the_prefix_of_torchs_tutorial_is_no_part_of_the_names() -> None:
    known = {"lm_head.weight", "model.norm.weight"}
    stored = [f"app.model.{name}" for name in sorted(known)]
    names = read_names(stored, known.__contains__, lambda name: name)
    assert list(names.canonical.values()) == sorted(known)
