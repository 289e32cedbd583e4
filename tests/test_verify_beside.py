"""``verify --source`` holds every file of an output against the source, whatever the manifest says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

import streamconv
from streamconv.errors import BadInputError
from streamconv.formats.safetensors_file import read_folder
from streamconv.ir.planfile import Plan
from streamconv.verification.beside import file_problems
from streamconv.verification.folder import verify_output

CONFIG = {"model_type": "no-such-model", "rope_theta": 10000.0, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def dressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Plan]:
    """A checkpoint with config, tokenizer and code, its output, and the plan of it made anew."""
    root = tmp_path_factory.mktemp("dressed")
    side = root / "actor" / "huggingface"
    side.mkdir(parents=True)
    weights = {f"model.layers.{k}.a.weight": torch.full((8, 8), float(k)) for k in range(4)}
    torch.save(weights, side.parent / "model_world_size_1_rank_0.pt")
    texts = {
        "config.json": json.dumps(CONFIG),
        "generation_config.json": '{"temperature": 0.7}',
        "tokenizer.json": '{"added_tokens": []}',
        "chat_template.jinja": "{{ messages }}",
        "modeling_x.py": "print('theirs')\n",
    }
    for name, text in texts.items():
        (side / name).write_text(text)
    streamconv.convert(side.parent, root / "out", max_shard_size="600", sync=False)
    plan = streamconv.plan(side.parent, output=root / "plan.jsonl", max_shard_size="600")
    return side.parent, root / "out", plan


def changed(name: str, *pairs: tuple[str, str]) -> Callable[[Path], str]:
    def change(out: Path) -> str:
        text = (out / name).read_text()
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new)
        (out / name).write_text(text)
        return name

    return change


def added(name: str, text: str = "x") -> Callable[[Path], str]:
    def add(out: Path) -> str:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
        return name

    return add


def removed(name: str) -> Callable[[Path], str]:
    def remove(out: Path) -> str:
        (out / name).unlink()
        return name

    return remove


def other_metadata(out: Path) -> str:
    """The same tensors, said to be another framework's."""
    path = min(out.glob("model-*.safetensors"))
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"format":"pt"', b'"format":"tf"'))
    assert path.read_bytes() != raw
    return path.name


def more_weights(out: Path) -> str:
    save_file({"model.layers.9.a.weight": torch.zeros(2)}, out / "adapter_model.safetensors")
    return "adapter_model.safetensors"


ALTERED = [
    changed("config.json", ("10000.0", "500.0")),
    changed("config.json", ('"num_attention_heads": 4', '"num_attention_heads": 2')),
    changed("generation_config.json", ("0.7", "2.0")),
    changed("tokenizer.json", ("[]", '["evil"]')),
    changed("chat_template.jinja", ("messages", "evil")),
    changed("modeling_x.py", ("theirs", "evil")),
    changed("model.safetensors.index.json", ('"total_size"', '"total_siz"')),
    added("modeling_y.py"),
    added("tokenizer_config.json", "{}"),
    added("custom_generate/generate.py"),
    added("pytorch_model.bin"),
    added(".hidden"),
    removed("tokenizer.json"),
    removed("modeling_x.py"),
    other_metadata,
    more_weights,
]


def fit_manifest(out: Path) -> None:
    """Make the manifest say of every file and tensor what is there now."""
    path = out / "streamconv.json"
    manifest = json.loads(path.read_text())
    files = sorted(p for p in out.rglob("*") if p.is_file() and p != path)
    manifest["files"] = [
        {
            "name": p.relative_to(out).as_posix(),
            "nbytes": p.stat().st_size,
            "xxh3_128": xxhash.xxh3_128_hexdigest(p.read_bytes()),
        }
        for p in files
    ]
    digests = {f["name"]: f["xxh3_128"] for f in manifest["files"]}
    side = {name: digest for name, digest in manifest["job"]["side"] if name in digests}
    manifest["job"]["side"] = sorted((side | {n: digests[n] for n in side}).items())
    for name, tensor in read_folder(out).items():
        raw = tensor.path.read_bytes()[tensor.begin : tensor.end]
        manifest["tensors"][name] = {
            "file": tensor.path.name,
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "xxh3_128": xxhash.xxh3_128_hexdigest(raw),
            "sources": [name],
        }
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("alter", ALTERED)
def test_a_file_that_the_source_does_not_give_is_named(
    alter: Callable[[Path], str], dressed: tuple[Path, Path, Plan], tmp_path: Path
) -> None:
    _, good, plan = dressed
    out = Path(shutil.copytree(good, tmp_path / "out"))
    assert list(file_problems(out, plan)) == []
    name = alter(out)
    assert [n for n, _ in file_problems(out, plan)] == [name]


def test_a_manifest_made_to_fit_hides_nothing(
    dressed: tuple[Path, Path, Plan], tmp_path: Path
) -> None:
    source, good, _ = dressed
    report = streamconv.verify(good, source=source)
    assert report.problems == []
    assert report
    out = Path(shutil.copytree(good, tmp_path / "out"))
    changed("config.json", ("10000.0", "500.0"))(out)
    changed("tokenizer.json", ("[]", '["evil"]'))(out)
    added("modeling_y.py")(out)
    fit_manifest(out)
    assert verify_output(out).passed, "the manifest fits"
    report = streamconv.verify(out, source=source)
    assert not report
    told = "\n".join(report.problems)
    assert "config.json: " in told
    assert "tokenizer.json: " in told
    assert "modeling_y.py: nothing in the source gives this file" in told
    # Nor may the output be its own witness.
    path = out / "streamconv.json"
    manifest = json.loads(path.read_text())
    manifest["job"]["given"] = {"hf_config": str(out), "model": None}
    path.write_text(json.dumps(manifest))
    with pytest.raises(BadInputError, match="made of itself"):
        streamconv.verify(out, source=source)
