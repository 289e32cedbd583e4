"""Uploading, against a stand-in for the Hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_double import Hub, asks_for_private, running

TOKEN = "hf_secret"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as made:
        yield made


def streamconv(
    hub: Hub,
    home: Path,
    *arguments: object,
    token: str | None = TOKEN,
    endpoint: str | None = None,
):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
    env |= {"HF_ENDPOINT": endpoint or hub.url, "HF_HOME": str(home)}
    env |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "streamconv", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    for secret in (TOKEN, hub.password.split(":")[1], hub.signature):
        assert secret not in done.stdout + done.stderr
    return done


def test_a_converted_model_is_uploaded_and_goes_on_after_an_interruption(
    hub, checkpoints, tmp_path
):
    source, out = checkpoints["fsdp2"].source, tmp_path / "out"
    arguments = [source, out, "--max-shard-size", "200kB", "--no-sync"]
    upload = ["--hf-upload-path", "me/model", "--private"]
    hub.refuse_put = 2
    failed = streamconv(hub, tmp_path, *arguments, *upload)
    assert failed.returncode == 1
    assert "the same command" in failed.stderr or "token" in failed.stderr
    assert hub.files == {}
    assert out.is_dir()
    first = set(hub.large)
    assert first

    hub.refuse_put = None
    hub.puts.clear()
    done = streamconv(hub, tmp_path, *arguments, *upload)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
    assert f"uploaded: {hub.url}/me/model" in done.stdout
    assert first.isdisjoint(hub.puts), "what is there is not sent again"
    assert asks_for_private(hub.repos[-1])
    assert hub.files == {p.name: p.read_bytes() for p in out.iterdir()}
    assert hub.unknown == []


def test_what_is_refused_before_and_instead_of_an_upload(hub, checkpoints, tmp_path):
    source, out = checkpoints["fsdp2"].source, tmp_path / "out"
    upload = ["--hf-upload-path", "me/model", "--private"]
    # No token: said before anything is converted.
    refused = streamconv(hub, tmp_path, source, out, *upload, token=None)
    assert refused.returncode == 2
    assert "no token" in refused.stderr
    assert not out.exists()
    assert streamconv(hub, tmp_path, source, out, "--hf-upload-path", "a/b/c").returncode == 2

    assert streamconv(hub, tmp_path, source, out, "--no-sync").returncode == 0
    refused = streamconv(hub, tmp_path, source, out, *upload, token="hf_other")
    assert refused.returncode == 1
    assert "HTTP 401" in refused.stderr
    hub.public = True
    refused = streamconv(hub, tmp_path, source, out, *upload)
    assert refused.returncode == 2
    assert "public" in refused.stderr
    hub.public = False
    # Bytes that are not what the manifest says stay here, though by their times they are.
    weights = out / "model.safetensors"
    before = weights.stat()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused = streamconv(hub, tmp_path, source, out, *upload)
    assert refused.returncode == 5
    assert "nothing was uploaded" in refused.stderr
    assert hub.files == {}
    assert hub.puts == []


def test_neither_a_password_nor_a_signed_url_shows_in_tracebacks_or_logs(
    hub, checkpoints, tmp_path
):
    source, out = checkpoints["fsdp2"].source, tmp_path / "out"
    assert streamconv(hub, tmp_path, source, out, "--no-sync").returncode == 0
    arguments = [source, out, "--hf-upload-path", "me/model", "--debug"]
    endpoint = hub.url.replace("//", f"//{hub.password}@")
    cases = [
        (endpoint.replace(hub.password, hub.password + "x"), "HTTP 401"),
        (endpoint.replace("@", "/@"), "was cut off"),  # no URL: who types it so sees no part of it
        (endpoint.rpartition(":")[0] + ":9", "was cut off"),
    ]
    for wrong, message in cases:
        failed = streamconv(hub, tmp_path, *arguments, endpoint=wrong)
        assert failed.returncode == 1
        assert "Traceback" in failed.stderr
        assert message in failed.stderr
    # The client logs what it tries again.
    hub.refuse_put, hub.refusal = 1, 503
    done = streamconv(hub, tmp_path, *arguments, endpoint=endpoint)
    assert done.returncode == 0, done.stderr
    assert len(hub.puts) == 2
    assert f"uploaded: {hub.url}/me/model" in done.stdout


OLDER = (
    "model.safetensors", "model-00001-of-00009.safetensors", "model.safetensors.index.json",
    "model.fp16.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.safetensors",
    "adapter_model.bin", "consolidated.safetensors", "consolidated.00.pth", "tf_model.h5",
    "flax_model.msgpack", "hf_quant_config.json",
)  # fmt: skip
KEPT = (
    "README.md", ".gitattributes", "images/a.png", "original/consolidated.00.pth", "training_args.bin",
    "model.gguf", "onnx/model.onnx", "tokenizer.model",
)  # fmt: skip


def test_older_weights_go_in_the_same_commit_after_they_were_named(hub, checkpoints, tmp_path):
    source, out = checkpoints["fsdp2"].source, tmp_path / "out"
    hub.files = dict.fromkeys((*OLDER, *KEPT), b"old")
    shards = [source, out, "--max-shard-size", "200kB", "--no-sync"]
    seen = []
    hub.rival = lambda: seen.append(sorted(hub.files))
    done = streamconv(hub, tmp_path, *shards, "--hf-upload-path", "me/model")
    assert done.returncode == 0, done.stderr
    assert (seen, hub.commits) == ([sorted((*OLDER, *KEPT))], 1)
    made = {p.name: p.read_bytes() for p in out.iterdir()}
    assert "model.safetensors" not in made
    assert hub.files == {**dict.fromkeys(KEPT, b"old"), **made}
    gone = sorted(set(OLDER) - made.keys())
    assert done.stderr.index(", ".join(gone)) > 0
    # As one file next: the shards and their index go.
    one = [source, tmp_path / "one", "--no-sync", "--json", "--hf-upload-path", "me/model"]
    done = streamconv(hub, tmp_path, *one)
    assert sorted(n for n in hub.files if "safetensors" in n) == ["model.safetensors"]
    *_, uploaded = map(json.loads, done.stdout.splitlines())
    assert uploaded["deleted"] == sorted(n for n in made if n.startswith("model"))
    # Nothing is left to delete or to name.
    done = streamconv(hub, tmp_path, *one)
    assert json.loads(done.stdout.splitlines()[-1])["deleted"] == []


def test_what_would_not_leave_the_model_there_is_refused(hub, checkpoints, tmp_path):
    source, out = checkpoints["fsdp2"].source, tmp_path / "out"
    command = [source, out, "--no-sync", "--hf-upload-path", "me/model"]
    hub.files = {"pytorch_model.bin": b"old"}

    def rival() -> None:
        hub.commits += 1

    hub.rival = rival
    refused = streamconv(hub, tmp_path, *command)
    assert (refused.returncode, hub.files) == (1, {"pytorch_model.bin": b"old"})
    assert "somebody else" in refused.stderr
    hub.rival = lambda: None
    hub.ignored = ("model.safetensors",)
    refused = streamconv(hub, tmp_path, *command)
    assert (refused.returncode, hub.files) == (2, {"pytorch_model.bin": b"old"})
    assert ".gitignore" in refused.stderr
