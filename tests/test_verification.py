"""``verify`` finds what differs: from the manifest, from the source, from another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import streamconv
from scripts.makers.fsdp import Made
from streamconv.cli.report import render_verification
from streamconv.errors import BadInputError, SourceChangedError, UnsafeInputError
from streamconv.formats.safetensors_file import read_header
from streamconv.verification.folder import verify_output
from streamconv.verification.reference import verify_reference


@pytest.fixture(scope="module")
def converted(
    checkpoints: dict[str, Made], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Made]:
    made = checkpoints["fsdp2-moe"]
    out = tmp_path_factory.mktemp("converted") / "model"
    streamconv.convert(made.source, out, max_shard_size="60kB", sync=False)
    return out, made


@pytest.fixture
def folder(converted: tuple[Path, Made], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(converted[0], tmp_path / "model"))


def test_a_fresh_output_agrees_with_everything(converted: tuple[Path, Made]) -> None:
    out, made = converted
    assert made.truth_hf is not None
    report = streamconv.verify(out, source=made.source, reference=made.truth_hf)
    assert report.problems == []
    assert any("against the source, byte by byte" in c for c in report.checked)


def test_an_adapter_alone_agrees_with_its_manifest(
    checkpoints: dict[str, Made], tmp_path: Path
) -> None:
    """The source's config.json is a model's: beside an adapter it would be wrong."""
    source = checkpoints["fsdp2-lora"].source
    streamconv.convert(source, tmp_path / "out", lora="adapter", sync=False)
    assert not (tmp_path / "out" / "config.json").exists()
    report = streamconv.verify(tmp_path / "out", source=source)
    assert report.problems == []


def test_an_unfinished_conversion_is_told_from_a_strange_folder(tmp_path: Path) -> None:
    for target in (tmp_path / "beside", tmp_path / "inside"):
        target.mkdir()
        with pytest.raises(BadInputError, match="was not made by streamconv") as caught:
            verify_output(target)
        assert "streamconv diff A B" in (caught.value.hint or "")
    (tmp_path / "inside" / ".streamconv").mkdir()
    (tmp_path / "gone" / "x").mkdir(parents=True)
    (tmp_path / ".gone.streamconv").mkdir()
    for name in ("inside", "gone"):
        with pytest.raises(BadInputError, match="is not finished"):
            verify_output(tmp_path / name)
    with pytest.raises(BadInputError, match="no such folder"):
        verify_output(tmp_path / "nowhere")


def test_a_config_that_changed_in_the_source_is_told(
    checkpoints: dict[str, Made], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoints["fsdp2"].source, tmp_path / "actor"))
    streamconv.convert(source, tmp_path / "out", sync=False)
    path = source / "huggingface" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    report = streamconv.verify(tmp_path / "out", source=source)
    assert report.problems == ["config.json: the source has another one than it was made of"]


def test_an_output_without_a_config_is_told(checkpoints: dict[str, Made], tmp_path: Path) -> None:
    source = tmp_path / "actor"
    shutil.copytree(checkpoints["fsdp2"].source, source)
    shutil.rmtree(source / "huggingface")
    streamconv.convert(source, tmp_path / "out", sync=False)
    report = verify_output(tmp_path / "out")
    assert report.passed
    assert any("no config.json" in c for c in report.checked)


@pytest.mark.parametrize("at", ["first", "last"])
def test_a_flipped_bit_in_the_output_is_found(folder: Path, at: str) -> None:
    path = next(folder.glob("model-00001-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1 if at == "last" else 8] ^= 1
    path.write_bytes(data)
    problems = verify_output(folder).problems
    assert any(p.startswith(f"{path.name}: xxh3_128") for p in problems)
    assert all(path.name in p for p in problems)


def test_stray_missing_and_short_files_are_named(folder: Path) -> None:
    (folder / "model-old.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text("{}")
    problems = "\n".join(verify_output(folder).problems)
    assert "model-old.safetensors: not in the manifest" in problems
    assert "tokenizer.json: missing" in problems
    assert "config.json: 2 bytes" in problems


def test_an_index_that_names_the_wrong_file_is_found(folder: Path) -> None:
    from streamconv.files.durable import hash_file

    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "model-99999-of-00001.safetensors"
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))
    # A manifest that was rewritten to match: the index is still held against the files.
    manifest_path = folder / "streamconv.json"
    manifest = json.loads(manifest_path.read_text())
    for entry in manifest["files"]:
        if entry["name"] == path.name:
            entry |= {"nbytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    manifest_path.write_text(json.dumps(manifest))
    problems = "\n".join(verify_output(folder).problems)
    assert f"{name} is not where it says" in problems
    assert "total_size" in problems


def test_a_source_that_differs_is_named(converted: tuple[Path, Made], tmp_path: Path) -> None:
    out, made = converted
    other = Path(shutil.copytree(made.source, tmp_path / "actor"))
    victim = other / "model_world_size_4_rank_1.pt"
    data = bytearray(victim.read_bytes())
    middle = data.index(b"data/0") + 4096
    data[middle] ^= 1
    victim.write_bytes(data)
    with pytest.raises(BadInputError, match="do not match their CRC-32"):
        streamconv.verify(out, source=other)


def test_another_step_is_not_the_source(
    converted: tuple[Path, Made], checkpoints: dict[str, Made]
) -> None:
    report = streamconv.verify(converted[0], source=checkpoints["fsdp2-moe-w8"].source)
    same = streamconv.verify(
        converted[0], reference=checkpoints["fsdp2-moe-w8"].truth_hf or converted[0]
    )
    # Equal weights cut for eight ranks are the same model; other weights would not be.
    assert report.passed == same.passed


def test_a_reference_is_compared_exactly_or_within_a_tolerance(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for path, change in ((a, 0.0), (b, 1e-3)):
        path.mkdir()
        x = np.linspace(-1, 1, 300_000, dtype=np.float32).reshape(3, -1)
        x[1, 7] += change
        save_file({"x": x, "y": np.ones(3, np.float16)}, path / "model.safetensors")
    report = verify_reference(a, b)
    assert [r["name"] for r in report.rows] == ["x"]
    assert report.rows[0]["max_abs"] == pytest.approx(1e-3, rel=1e-3)
    assert "1 elements differ" in report.problems[0]
    assert verify_reference(a, b, atol=2e-3).passed
    assert not verify_reference(a, b, atol=1e-4).passed


def test_equal_numbers_with_other_bits_differ_exactly_and_not_within_a_tolerance(
    tmp_path: Path,
) -> None:
    for name, zero in (("a", 0.0), ("b", -0.0)):
        (tmp_path / name).mkdir()
        save_file({"x": np.array([zero, 1], np.float32)}, tmp_path / name / "model.safetensors")
    assert not verify_reference(tmp_path / "a", tmp_path / "b").passed
    assert verify_reference(tmp_path / "a", tmp_path / "b", atol=1e-9).passed


def test_a_folder_of_somebody_else_has_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="not made by streamconv"):
        verify_output(tmp_path)


def _file(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "cut off"),
        (_file(b'{"a":'), ""),
        (_file(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"1234"), "end at byte"),
        (
            _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"12345678"),
            "begins at",
        ),
        (
            _file(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', b"12345678"),
            "8 bytes for",
        ),
        (_file(b'{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}}', b"1234"), "Q9"),
        (
            _file(
                b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
                b"1",
            ),
            "occurs twice",
        ),
        (_file(b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,-1]}}'), "not counts"),
    ],
)
def test_a_broken_safetensors_file_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInputError) as caught:
        read_header(path)
    assert found in (caught.value.found or "")


def test_an_oversized_header_is_unsafe(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little"))
    with pytest.raises(UnsafeInputError):
        read_header(path)


def test_headers_agree_with_the_library(converted: tuple[Path, Made]) -> None:
    for path in converted[0].glob("*.safetensors"):
        truth = load_file(path)
        found = read_header(path)
        assert found.keys() == truth.keys()
        for name, tensor in found.items():
            raw = path.read_bytes()[tensor.begin : tensor.end]
            assert raw == truth[name].tobytes()


def test_a_source_that_vanished_is_an_error(converted: tuple[Path, Made], tmp_path: Path) -> None:
    with pytest.raises((BadInputError, SourceChangedError)):
        streamconv.verify(converted[0], source=tmp_path / "gone")


def test_a_comparison_lists_the_first_and_says_how_many_more(tmp_path: Path) -> None:
    """Values of different types are not compared unless a tolerance is given: there is no distance."""
    for name, dtype in (("a", np.float32), ("b", np.float16)):
        (tmp_path / name).mkdir()
        tensors = {f"t{k}": np.ones(2, dtype) for k in range(25)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    text = render_verification(streamconv.diff(tmp_path / "a", tmp_path / "b"))
    assert "inf" not in text
    assert "-  t0  float32, there float16" in text
    assert "and 5 more" in text
