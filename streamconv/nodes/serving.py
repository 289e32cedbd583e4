"""The files of a checkpoint that lie on this machine's own disk, served to the other machines of a run.

What is served was listed before: nothing is opened but by its number in that list, and only while it is
the file that was listed. Every request must bring the run's token.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import re
import secrets
import socket
import stat
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from streamconv.errors import BadInputError
from streamconv.files.durable import hash_stream
from streamconv.files.inputs import LocalFile, open_input, opened, reading
from streamconv.formats.side_folder import SIDE_FOLDERS
from streamconv.output.former import some
from streamconv.planning.sidefiles import SIDE_NAMES
from streamconv.storage.scattered import CATALOGUE, Catalogue, Served, setting
from streamconv.units import format_size

_IDLE_SECONDS = 300
# Above a checkpoint: side files, custom code, and what trainers say of the model or the latest step.
_ABOVE = (*SIDE_NAMES, "*.py", "params.json", "model_config.yaml", "latest*")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Mark:
    """A file as it was listed: its absolute path without the first slash, size and time of change."""

    key: str
    nbytes: int
    mtime_ns: int


class Shelf:
    """The files that one machine has of a checkpoint; ``root`` is where its / is.

    In the order of its methods: they are listed, compared where others have them, and served.
    """

    def __init__(self, root: str = "/") -> None:
        self._root = Path(root)
        self.marks: list[Mark] = []
        self._server: Server | None = None

    def listing(self, path: str) -> list[Mark]:
        """Return what lies in the folder (or is the file) ``path``, nothing where it is not here.

        With what a config may need of the folder above. Raises :class:`BadInputError` for what cannot
        be read.
        """
        top = self._file(path)
        self.marks = []
        with reading(top):
            files = [top] if top.is_file() else _files(top)
            for file in (*files, *_beside(top)) if files else ():
                status = file.stat()
                if stat.S_ISREG(status.st_mode):
                    key = file.relative_to(self._root).as_posix()
                    self.marks.append(Mark(key, status.st_size, status.st_mtime_ns))
        return self.marks

    def contents(self, keys: Sequence[str]) -> dict[str, str]:
        """Return what tells the bytes of files from others; reads all of them."""
        return {key: _content(self._file(key)) for key in keys}

    def start(self, host: str, token: str) -> str:
        """Begin to serve at an address of this machine; return the name of the server."""
        self._server = Server(self, host, token)
        return self._server.name

    def publish(self, catalogue: Catalogue) -> None:
        """Serve the catalogue, and what in it is this machine's."""
        if self._server is not None:
            self._server.publish(catalogue)

    def keep(self, keys: Sequence[str]) -> None:
        """Serve of what was published nothing but these."""
        if self._server is not None:
            self._server.keep(keys)

    def close(self) -> None:
        """Serve no more."""
        if self._server is not None:
            self._server.close()

    def open(self, number: int) -> tuple[LocalFile, Mark] | None:
        """Open a file that was listed; None where it is not the one that was."""
        mark = self.marks[number]
        try:
            file = LocalFile(open_input(self._file(mark.key)), mark.key)
        except (BadInputError, OSError):
            return None
        status = file.status
        if (status.st_size, status.st_mtime_ns) == (mark.nbytes, mark.mtime_ns):
            return file, mark
        file.close()
        return None

    def _file(self, key: str) -> Path:
        return self._root / key.lstrip("/")


def _files(top: Path) -> list[Path]:
    """Return the files below a folder, also behind links, but for one that leads back up."""
    found = []

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, names, files in os.walk(top, onerror=fail, followlinks=True):
        here = Path(folder)
        if here != top and here.parent.resolve().is_relative_to(here.resolve()):
            names.clear()
            continue
        found += [path for name in files if (path := here / name).exists()]
    return sorted(found)


def _beside(top: Path) -> list[Path]:
    """Return what formats and planning look for in the folder above a checkpoint."""
    above = top.parent
    names = {p for pattern in _ABOVE for p in above.glob(pattern) if p.is_file()}
    inner = [p for name in SIDE_FOLDERS if (above / name) != top for p in _files(above / name)]
    return sorted(names - {top}) + inner


def _content(path: Path) -> str:
    """Return the hash of a whole file: not every kind has checksums at its end that stand for it."""
    with opened(path) as file, file.stream() as stream:
        return hash_stream(stream)[0]


def replicas(listings: Mapping[str, Sequence[Mark]]) -> dict[str, dict[str, Mark]]:
    """Return for each file what the machines that have it listed."""
    found: dict[str, dict[str, Mark]] = {}
    for host, marks in listings.items():
        for mark in marks:
            found.setdefault(mark.key, {})[host] = mark
    return dict(sorted(found.items()))


def conflict(key: str, marks: Mapping[str, Mark], contents: Mapping[str, Mapping[str, str]]) -> str:
    """Return in words which machines have different files of one name; nothing where all are equal.

    ``contents`` has what :meth:`Shelf.contents` says, of each machine, where sizes are equal.
    """
    first, *others = sorted(marks)
    size = {host: format_size(mark.nbytes) for host, mark in marks.items()}
    for other in others:
        if marks[first].nbytes != marks[other].nbytes:
            return f"{size[first]} on {first}, {size[other]} on {other}"
    for other in others:
        if contents[first][key] != contents[other][key]:
            return f"{size[first]} on {first} and on {other}, with different bytes"
    return ""


# Calls a method of the shelves of some machines, each with its arguments, and returns what they say.
Ask = Callable[[str, Mapping[str, tuple[Any, ...]]], Mapping[str, Any]]


def serve(path: str, addresses: Mapping[str, str], ask: Ask) -> str:
    """Let all machines that have files of the checkpoint ``path`` serve them.

    ``addresses`` has each machine's own. Equal files of two machines are replicas, of which one is
    served; reading one of which they have different ones is an error. Returns what
    :data:`streamconv.storage.scattered.SERVERS` must be for who is to read; raises
    :class:`BadInputError` where no machine has any.
    """
    listings = ask("listing", dict.fromkeys(addresses, (path,)))
    found = replicas(listings)
    if not found:
        raise BadInputError(
            "no machine of the cluster has files of this checkpoint",
            where=path,
            expected=f"a folder on one of {some(sorted(addresses))}",
            hint="its path must be the same on all machines that have a part of it",
        )
    twice: dict[str, list[str]] = {}
    for key, marks in found.items():
        if len(marks) > 1 and len({mark.nbytes for mark in marks.values()}) == 1:
            for host in marks:
                twice.setdefault(host, []).append(key)
    contents = ask("contents", {host: (keys,) for host, keys in twice.items()})
    token = secrets.token_urlsafe(32)
    servers = ask("start", {h: (addresses[h], token) for h, marks in listings.items() if marks})
    numbers = {h: {m.key: n for n, m in enumerate(listings[h])} for h in servers}
    load: Counter[str] = Counter()
    files = {}
    for key, marks in found.items():
        host = min(marks, key=lambda host: (load[host], host))
        load[host] += marks[host].nbytes
        # What it is known as must not depend on who serves it this time.
        mark = min(marks.values(), key=lambda mark: mark.mtime_ns)
        version = f'"{mark.nbytes}-{mark.mtime_ns}"'
        differ = conflict(key, marks, contents)
        server = "" if differ else servers[host]
        files[key] = Served(server, numbers[host][key], mark.nbytes, mark.mtime_ns, version, differ)
    ask("publish", {host: (Catalogue(files),) for host in servers})
    return setting(token, min(servers.values()))


class Server(ThreadingHTTPServer):
    """Serves a shelf at an address of this machine, to whoever has the token, until it is closed."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, shelf: Shelf, host: str, token: str) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, 0), _Handler)
        self.shelf = shelf
        self.token = f"Bearer {token}".encode()
        self.catalogue = b""
        self.is_closed = False
        self.versions: dict[int, str] = {}
        self.name = f"[{host}]:{self.server_port}" if ":" in host else f"{host}:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def publish(self, catalogue: Catalogue) -> None:
        """Serve what of the catalogue is here, and the catalogue."""
        mine = {f.number: f.version for f in catalogue.files.values() if f.server == self.name}
        self.versions = mine
        self.catalogue = json.dumps(catalogue.to_json()).encode()

    def keep(self, keys: Sequence[str]) -> None:
        """Serve of what was published nothing but these."""
        kept, marks = set(keys), self.shelf.marks
        self.versions = {n: v for n, v in self.versions.items() if marks[n].key in kept}

    def close(self) -> None:
        """Serve no more, also where a connection is open."""
        self.is_closed = True
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: who asked sees that the answer broke off, and asks again."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = _IDLE_SECONDS
    server: Server

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        if self.server.is_closed:
            self.close_connection = True
            return
        # In bytes: compare_digest takes no text beyond ASCII.
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, self.server.token):
            self._say(HTTPStatus.UNAUTHORIZED)
        elif self.path == f"/{CATALOGUE}":
            self._say(HTTPStatus.OK, len(self.server.catalogue))
            if body:
                self.wfile.write(self.server.catalogue)
        else:
            self._file(body=body)

    def _file(self, *, body: bool) -> None:
        name = self.path.removeprefix("/")
        number = int(name) if re.fullmatch("[0-9]{1,9}", name) else -1
        version = self.server.versions.get(number)
        if version is None:
            self._say(HTTPStatus.NOT_FOUND)
            return
        found = self.server.shelf.open(number)
        if found is None or self.headers.get("If-Match", version) != version:
            if found is not None:
                found[0].close()
            self._say(HTTPStatus.PRECONDITION_FAILED)
            return
        file, mark = found
        with contextlib.closing(file):
            facts = {
                "ETag": version,
                "Last-Modified": formatdate(mark.mtime_ns // 10**9, usegmt=True),
                "Accept-Ranges": "bytes",
            }
            asked = self.headers.get("Range")
            if asked is None:
                self._say(HTTPStatus.OK, mark.nbytes, facts)
                lo, hi = 0, mark.nbytes
            else:
                match = _RANGE.fullmatch(asked)
                lo, hi = (int(match[1]), int(match[2]) + 1) if match else (0, 0)
                hi = min(hi, mark.nbytes)
                if lo >= hi:
                    self._say(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                    return
                facts["Content-Range"] = f"bytes {lo}-{hi - 1}/{mark.nbytes}"
                self._say(HTTPStatus.PARTIAL_CONTENT, hi - lo, facts)
            if body:
                self._send(file, lo, hi)

    def _send(self, file: LocalFile, lo: int, hi: int) -> None:
        with file.stream() as stream:
            self.wfile.flush()
            # By the kernel: no byte of a file comes into this process.
            sent = self.connection.sendfile(stream, lo, hi - lo)
        if sent < hi - lo:
            self.close_connection = True

    def _say(
        self, status: HTTPStatus, nbytes: int = 0, facts: Mapping[str, str] | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in (facts or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(nbytes))
        self.end_headers()
