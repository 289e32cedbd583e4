"""A stand-in for the HuggingFace Hub: as much of its API as an upload needs, over plain HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What was uploaded, and how the hub behaves.

    ``large`` are contents by sha256, ``files`` those of the last commit by path, ``puts`` the sha256
    of each large upload in order. ``refuse_put`` answers that many-th upload with ``refusal``,
    ``public`` says that the repository exists and is public, ``token`` is the only one that is let in,
    but for who names ``password`` in the URL. Large files go to URLs that end in ``signature``.
    ``commits`` counts the commits, ``rival`` is called before each is looked at, ``ignored`` are what
    its .gitignore names.
    """

    url: str = ""
    token: str = "hf_secret"
    password: str = "me:hidden"
    signature: str = "signed-by-the-hub"
    public: bool = False
    refuse_put: int | None = None
    refusal: int = 403
    repos: list[dict[str, Any]] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    commits: int = 0
    rival: Callable[[], None] = lambda: None
    ignored: tuple[str, ...] = ()

    @property
    def sha(self) -> str:
        """What the last commit is called."""
        return f"{self.commits:040x}"


@contextmanager
def running() -> Iterator[Hub]:
    """Serve a hub on a free port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self._answer()

        do_GET = do_PUT = do_HEAD = do_POST

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            basic = base64.b64encode(hub.password.encode()).decode()
            allowed = self.path.endswith(f"?{hub.signature}") or self.headers.get(
                "Authorization"
            ) in (f"Bearer {hub.token}", f"Basic {basic}")
            status, data = _respond(hub, self.command, path, body) if allowed else (401, {})
            raw = data if isinstance(data, bytes) else json.dumps(data).encode()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if wanted and isinstance(data, bytes):
                raw, status = data[int(wanted[1]) : int(wanted[2]) + 1], 206
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def asks_for_private(asked: dict[str, Any]) -> bool:
    """Whether a request for a repository wants it private, in the words of old clients or new."""
    return asked.get("visibility") == "private" or asked.get("private") is True


def _respond(hub: Hub, method: str, path: str, body: bytes) -> tuple[int, Any]:
    if found := re.fullmatch(r"/api/models/[^/]+/[^/]+/tree/[0-9a-f]{40}/?", path):
        return 200, [
            {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
            for n, d in hub.files.items()
        ]
    if found := re.fullmatch(r"/[^/]+/[^/]+/resolve/[0-9a-f]{40}/(.+)", path):
        return (200, hub.files[found[1]]) if found[1] in hub.files else (404, {})
    if path == "/api/repos/create":
        asked = json.loads(body)
        hub.repos.append(asked)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        # The hub's own address, also where a client came through another one.
        return 200, {"url": f"https://huggingface.co/{name}", "name": name, "id": name}
    if method == "GET" and (
        found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.*)?", path)
    ):
        private = not hub.public and bool(hub.repos) and asks_for_private(hub.repos[-1])
        siblings = [{"rfilename": name} for name in hub.files]
        return 200, {"id": found[1], "private": private, "siblings": siblings, "sha": hub.sha}
    if re.fullmatch(r"/api/models/.*/preupload/main", path):
        return 200, {
            "files": [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": f["path"] in hub.ignored,
                }
                for f in json.loads(body)["files"]
            ]
        }
    if path.endswith(".git/info/lfs/objects/batch"):
        objects = []
        for o in json.loads(body)["objects"]:
            entry: dict[str, Any] = {"oid": o["oid"], "size": o["size"]}
            if o["oid"] not in hub.large:
                entry["actions"] = {"upload": {"href": f"{hub.url}/put/{o['oid']}?{hub.signature}"}}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}
    if method == "PUT" and path.startswith("/put/"):
        oid = path.removeprefix("/put/")
        hub.puts.append(oid)
        if len(hub.puts) == hub.refuse_put:
            return hub.refusal, {"error": "the connection is gone"}
        assert hashlib.sha256(body).hexdigest() == oid
        hub.large[oid] = body
        return 200, {}
    if re.fullmatch(r"/api/models/.*/commit/main", path):
        lines = [json.loads(line) for line in body.splitlines()]
        hub.rival()
        if lines[0]["value"].get("parentCommit", hub.sha) != hub.sha:
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        hub.commits += 1
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del hub.files[value["path"]]
            elif line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.large[value["oid"]]
        url = f"{hub.url}/me/model/commit/abc"
        return 200, {"commitUrl": url, "commitOid": "a" * 40, "success": True}
    hub.unknown.append(f"{method} {path}")
    return 404, {}
