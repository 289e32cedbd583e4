"""Every kind of damage to an output is named, and so is every way to differ from another model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

import streamconv
from scripts.makers.fsdp import Made
from streamconv.errors import BadInputError
from streamconv.formats.safetensors_file import read_folder, read_header
from streamconv.verification.folder import verify_output
from streamconv.verification.reference import verify_reference

FIRST, SECOND = "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"


@pytest.fixture(scope="module")
def converted(checkpoints: dict[str, Made], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    streamconv.convert(
        checkpoints["fsdp2"].source, out, max_shard_size="150kB", checksum="sha256", sync=False
    )
    assert [p.name for p in sorted(out.glob("*.safetensors"))][:2] == [FIRST, SECOND]
    return out


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def one_bit(folder: Path) -> list[str]:
    tensor = list(read_header(folder / FIRST).values())[1]
    flip(folder / FIRST, tensor.begin + 5)
    return [f"{FIRST}: xxh3_128", "(1 of its", f"{tensor.name}: its bytes in {FIRST}"]


def other_header(folder: Path) -> list[str]:
    """A name spelled otherwise: the bytes of all tensors are as they were."""
    path = folder / FIRST
    name = next(iter(read_header(path)))
    path.write_bytes(path.read_bytes().replace(name.encode(), name[:-1].encode() + b"X", 1))
    return [
        f"{FIRST}: xxh3_128",
        "(none of its",
        f"{name}: in the manifest, in no file",
        f"{name[:-1]}X: in {FIRST}, not in the manifest",
    ]


def broken_header(folder: Path) -> list[str]:
    flip(folder / FIRST, 8)
    return [f"{FIRST}: not a valid safetensors file", f"{FIRST}: xxh3_128"]


def cut_off(folder: Path) -> list[str]:
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-1])
    return [f"{SECOND}: not a valid safetensors file", f"{SECOND}: ", "the manifest says"]


def swapped_files(folder: Path) -> list[str]:
    (folder / FIRST).rename(folder / "aside")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "aside").rename(folder / SECOND)
    name = next(iter(read_header(folder / SECOND)))
    return [f"in {SECOND}, the manifest says", f"{name}: ", "model.safetensors.index.json: "]


def a_tensor_twice(folder: Path) -> list[str]:
    name, data = next(iter(load_file(folder / FIRST).items()))
    save_file({**load_file(folder / SECOND), name: data}, folder / SECOND)
    return [f"{name}: in {SECOND} and in {FIRST}"]


def no_index(folder: Path) -> list[str]:
    (folder / "model.safetensors.index.json").unlink()
    return ["model.safetensors.index.json: missing"]


def no_config(folder: Path) -> list[str]:
    (folder / "config.json").unlink()
    return ["config.json: missing"]


def broken_tokenizer(folder: Path) -> list[str]:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    return ["tokenizer.json: xxh3_128", "tokenizer.json: no valid JSON"]


def a_stray_file_in_a_subfolder(folder: Path) -> list[str]:
    (folder / "old").mkdir()
    (folder / "old" / "model.safetensors").write_bytes(b"")
    return ["old/model.safetensors: not in the manifest"]


def other_sha256(folder: Path) -> list[str]:
    path = folder / "streamconv.json"
    manifest = json.loads(path.read_text())
    entry = next(f for f in manifest["files"] if f["name"] == FIRST)
    entry["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    return [f"{FIRST}: sha256"]


def a_stray_folder_and_links(folder: Path) -> list[str]:
    (folder / "empty" / "deep").mkdir(parents=True)
    (folder / "elsewhere").symlink_to(folder.parent)
    (folder / "nowhere").symlink_to(folder / "gone")
    return [f"{name}: not in the manifest" for name in ("empty/deep/", "elsewhere", "nowhere")]


def a_file_that_loaders_take_in_place_of_the_index(folder: Path) -> list[str]:
    shutil.copy(folder / FIRST, folder / "model.safetensors")
    return [
        "model.safetensors: not in the manifest",
        "model.safetensors.index.json: beside model.safetensors, which loaders take",
    ]


DAMAGE = [one_bit, other_header, broken_header, cut_off, swapped_files, a_tensor_twice, no_index]
DAMAGE += [no_config, broken_tokenizer, a_stray_file_in_a_subfolder, other_sha256]
DAMAGE += [a_stray_folder_and_links, a_file_that_loaders_take_in_place_of_the_index]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: Callable[[Path], list[str]], folder: Path) -> None:
    assert verify_output(folder).problems == []
    expected = damage(folder)
    problems = "\n".join(verify_output(folder).problems)
    for text in expected:
        assert text in problems


@pytest.mark.parametrize(
    "content", ['{"files": []}', "[]", '{"files": 3, "tensors": {}, "job": 1}']
)
def test_a_manifest_that_is_none_is_refused(content: str, folder: Path) -> None:
    (folder / "streamconv.json").write_text(content)
    with pytest.raises(BadInputError, match=r"manifest|not made by streamconv"):
        verify_output(folder)


# --- against another model --------------------------------------------------------------------


def test_how_the_reference_is_cut_into_files_does_not_matter(
    folder: Path, checkpoints: dict[str, Made], tmp_path: Path
) -> None:
    truth = checkpoints["fsdp2"].truth_hf
    assert truth is not None
    assert verify_reference(folder, truth).problems == []
    reference = Path(shutil.copytree(folder, tmp_path / "reference"))
    # What the index does not name is another layout of the same model, as Mistral's folders have.
    shutil.copy(folder / FIRST, reference / "consolidated.safetensors")
    assert verify_reference(truth, reference).problems == []
    (reference / SECOND).unlink()
    with pytest.raises(BadInputError, match="a file that is not there"):
        verify_reference(folder, reference)


def test_of_a_single_file_and_an_index_a_loader_takes_the_file(
    folder: Path, tmp_path: Path
) -> None:
    reference = Path(shutil.copytree(folder, tmp_path / "reference"))
    save_file({"other": np.zeros(3, np.float32)}, reference / "model.safetensors")
    assert "other: missing here" in verify_reference(folder, reference).problems


def save(folder: Path, tensors: dict[str, np.ndarray], **config: object) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_dtypes_may_differ_within_a_tolerance(tmp_path: Path) -> None:
    x = np.linspace(-3, 3, 1000, dtype=np.float32)
    ours = save(tmp_path / "ours", {"x": x.astype(bfloat16)})
    theirs = save(tmp_path / "theirs", {"x": x})
    assert verify_reference(ours, theirs).problems == ["x: bfloat16, there float32"]
    assert verify_reference(ours, theirs, rtol=2**-8).problems == []
    assert "differ" in verify_reference(ours, theirs, rtol=2**-12).problems[0]


def test_integers_are_equal_or_they_are_not(tmp_path: Path) -> None:
    x = np.array([1, 2**53, -5], np.int64)
    theirs = save(tmp_path / "theirs", {"x": x})
    for name, other in (("near", x + 1), ("narrow", x.astype(np.float64))):
        ours = save(tmp_path / name, {"x": other})
        assert len(verify_reference(ours, theirs, atol=10.0).problems) == 1
    assert verify_reference(theirs, theirs, atol=10.0).problems == []


def test_a_tied_weight_may_be_left_out_of_one(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    both = {"embed.weight": x, "lm_head.weight": x, "other": x + 1}
    one = {"embed.weight": x, "other": x + 1}
    ours = save(tmp_path / "ours", one, tie_word_embeddings=True)
    theirs = save(tmp_path / "theirs", both, tie_word_embeddings=True)
    for a, b in ((ours, theirs), (theirs, ours)):
        report = verify_reference(a, b)
        assert report.problems == []
        assert any("lm_head.weight" in c and "tied to embed.weight" in c for c in report.checked)
    # Nobody would fill it where the config does not tie, or where the bytes are others.
    untied = save(tmp_path / "untied", one, tie_word_embeddings=False)
    assert verify_reference(untied, theirs).problems == ["lm_head.weight: missing here"]
    differs = save(
        tmp_path / "differs", {**both, "lm_head.weight": x + 2}, tie_word_embeddings=True
    )
    assert verify_reference(ours, differs).problems == ["lm_head.weight: missing here"]


def test_a_missing_norm_is_no_tied_weight(tmp_path: Path) -> None:
    ones = np.ones(4, np.float32)
    norms = {f"model.layers.{k}.input_layernorm.weight": ones for k in range(2)}
    square = np.zeros((4, 4), np.float32)
    norms |= {f"model.layers.{k}.o_proj.weight": square for k in range(2)}
    theirs = save(tmp_path / "theirs", norms, tie_word_embeddings=True)
    for name in list(norms)[1::2]:
        rest = {n: t for n, t in norms.items() if n != name}
        ours = save(tmp_path / name, rest, tie_word_embeddings=True)
        assert verify_reference(ours, theirs).problems == [f"{name}: missing here"]


def test_infinities_and_nans_agree_with_themselves_only(tmp_path: Path) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 1], np.float32)
    ours = save(tmp_path / "ours", {"x": x})
    same = save(tmp_path / "same", {"x": x + np.float32(0)})
    assert verify_reference(ours, same, atol=1e-3).problems == []
    assert verify_reference(ours, same).problems == []
    for k, value in enumerate([1.0, np.inf, 0.0]):
        y = x.copy()
        y[k] = value
        other = save(tmp_path / f"other{k}", {"x": y})
        report = verify_reference(other, ours, atol=1e-3, rtol=1e-3)
        assert report.problems == ["x: 1 elements differ, by inf at most"]
        assert report.to_json()["rows"][0]["max_abs"] is None  # JSON has no infinity


def test_a_reference_of_pickled_weights_is_refused_with_the_way_out(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadInputError, match="no safetensors files") as caught:
        verify_reference(folder, tmp_path / "old")
    assert "save_pretrained" in (caught.value.hint or "")
    with pytest.raises(BadInputError, match="no such model folder"):
        verify_reference(folder, tmp_path / "gone")


def test_the_worst_tensors_come_first(folder: Path, tmp_path: Path) -> None:
    reference = Path(shutil.copytree(folder, tmp_path / "reference"))
    names = sorted(n for n, t in read_folder(reference).items() if t.path.name == FIRST)[:3]
    tensors = {k: np.array(v) for k, v in load_file(reference / FIRST).items()}
    for name, change in zip(names, (1.0, 4.0, 2.0), strict=True):
        tensors[name].reshape(-1)[0] += change
    save_file(tensors, reference / FIRST)
    rows = verify_reference(folder, reference).rows
    assert [r["name"] for r in rows] == [names[1], names[2], names[0]]
    assert [r["max_abs"] for r in rows] == pytest.approx([4, 2, 1], rel=1e-2)
