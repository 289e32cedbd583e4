"""Uploading, against a stand-in for the Hub on this machine."""

from __future__ import annotations

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
    # Bytes that are not what the manifest says stay here.
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
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
