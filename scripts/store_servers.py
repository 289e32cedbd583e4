"""Stores of other people's make, started on loopback for the tests: moto (S3) and Azurite (Azure).

Each is a context manager that yields where to put things and the environment in which that is reached,
and raises :class:`MissingError` with the reason where it is not installed.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import importlib.util
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

_START_SECONDS = 60
_BUCKET = "streamconv-test"
# Azurite's own, which it prints for everybody.
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class MissingError(Exception):
    """A server is not installed here."""


@contextlib.contextmanager
def moto() -> Iterator[tuple[str, dict[str, str]]]:
    """Serve S3 by moto; no credentials are looked at."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        raise MissingError("moto is not installed: pip install 'moto[server]'")
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    address = f"http://127.0.0.1:{port}"
    with _running(command, port):
        _ask(urllib.request.Request(f"{address}/{_BUCKET}", method="PUT"))
        yield (
            f"s3://{_BUCKET}",
            {
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "not-to-be-seen",
                "AWS_REGION": "us-east-1",
            },
        )


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Serve Azure's blobs by Azurite, which keeps them in ``folder``."""
    own = Path(sys.prefix) / "node_modules" / ".bin" / "azurite-blob"
    program = str(own) if own.exists() else shutil.which("azurite-blob")
    if program is None or shutil.which("node") is None:
        raise MissingError(f"Azurite is not installed: npm install --prefix {sys.prefix} azurite")
    port = _free_port()
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent"]
    command += ["--location", str(folder), "--skipApiVersionCheck", "--disableTelemetry"]
    address = f"http://127.0.0.1:{port}"
    with _running(command, port):
        _make_container(address)
        yield (
            f"az://{_BUCKET}",
            {
                "AZURE_STORAGE_USE_EMULATOR": "true",
                "AZURITE_BLOB_STORAGE_URL": address,
                "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
                "AZURE_STORAGE_ACCOUNT_KEY": _KEY,
            },
        )


def _make_container(address: str) -> None:
    """Make the container; what lies in one the client can write, but not make it."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    lines = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
    resource = f"/{_ACCOUNT}/{_ACCOUNT}/{_BUCKET}\nrestype:container"
    text = f"PUT{chr(10) * 12}{lines}{resource}"
    digest = hmac.new(base64.b64decode(_KEY), text.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {_ACCOUNT}:{base64.b64encode(digest).decode()}"
    url = f"{address}/{_ACCOUNT}/{_BUCKET}?restype=container"
    _ask(urllib.request.Request(url, method="PUT", headers=headers))


def _ask(request: urllib.request.Request) -> None:
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.read()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    """Run a server until the block ends; it answers at ``port`` when the block begins."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not start")
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()
