"""A small object store, for tests and benchmarks: slow, broken or strange as asked.

It speaks S3, the dialect of it that GCS speaks, and of WebDAV what lists a folder.

``python -m scripts.object_store [--latency SECONDS] [--cap BYTES] [FOLDER]`` prints its address
and serves until its standard input ends. Objects are kept in memory, but for the files of FOLDER, which
are objects of the bucket ``disk``. Credentials are not looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

_STEP_BYTES = 1 << 18


@dataclass
class Stored:
    """An object: its bytes, or the file that has them."""

    data: bytes | Path
    etag: str
    generation: int
    mtime: float = field(default_factory=time.time)

    def __len__(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else self.data.stat().st_size

    def read(self, lo: int, hi: int) -> Iterator[bytes]:
        """Yield the bytes ``[lo, hi)`` in pieces."""
        if isinstance(self.data, bytes):
            for at in range(lo, hi, _STEP_BYTES):
                yield self.data[at : min(at + _STEP_BYTES, hi)]
            return
        with self.data.open("rb") as stream:
            stream.seek(lo)
            for at in range(lo, hi, _STEP_BYTES):
                yield stream.read(min(_STEP_BYTES, hi - at))


@dataclass(frozen=True)
class Request:
    """What was asked: the method, bucket and key, the query, the range."""

    method: str
    bucket: str
    key: str
    query: dict[str, str]
    range: tuple[int, int] | None
    number: int


# What to do with a request: nothing (None), answer with a status, break off ("reset") after half of the
# answer, or do it and give no answer ("lost").
Fault = Callable[[Request], int | str | None]


class Store:
    """The objects and uploads of all buckets, and how the server behaves.

    ``latency`` is waited for before each answer, ``cap`` bounds the bytes per second of a connection.
    ``ignores`` names conditions that are taken no notice of: ``if-match``, ``if-none-match``.
    """

    def __init__(self, *, latency: float = 0, cap: float = 0) -> None:
        self.latency = latency
        self.cap = cap
        self.ignores: set[str] = set()
        self.objects: dict[tuple[str, str], Stored] = {}
        self.uploads: dict[str, tuple[str, str, dict[int, bytes]]] = {}
        self.requests: list[Request] = []
        self.fault: Fault = lambda _: None
        self.lock = threading.RLock()
        self._count = 1

    def put(self, bucket: str, key: str, data: bytes | Path, etag: str = "") -> str:
        """Store an object and return its ETag."""
        with self.lock:
            self._count += 1
            plain = hashlib.md5(data).hexdigest() if isinstance(data, bytes) else f"f{self._count}"
            made = Stored(data, f'"{etag or plain}"', self._count)
            self.objects[bucket, key] = made
            return made.etag

    def add_folder(self, bucket: str, folder: Path, prefix: str = "") -> None:
        """Store the files of a folder; they stay on the disk."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(bucket, prefix + path.relative_to(folder).as_posix(), path)

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Return the keys of a bucket that begin with ``prefix``."""
        with self.lock:
            return sorted(k for b, k in self.objects if b == bucket and k.startswith(prefix))

    def bytes_of(self, bucket: str, key: str) -> bytes:
        """Return an object's bytes."""
        stored = self.objects[bucket, key]
        return b"".join(stored.read(0, len(stored)))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_PROPFIND = do_GET  # noqa: N815 - http.server's names

    def _serve(self) -> None:
        store = self.store
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        wanted = (int(match[1]), int(match[2]) + 1) if match else None
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with store.lock:
            request = Request(self.command, bucket, key, query, wanted, len(store.requests))
            store.requests.append(request)
        if store.latency:
            time.sleep(store.latency)
        fault = store.fault(request)
        if isinstance(fault, int):
            self._answer(fault, b"<Error><Code>SlowDown</Code></Error>")
            return
        if fault == "lost":
            self.wfile, self.close_connection = io.BytesIO(), True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._do(request, body, reset=fault == "reset")

    def _do(self, r: Request, body: bytes, *, reset: bool) -> None:
        if r.method == "PROPFIND":
            self._propfind(r)
        elif r.method in ("GET", "HEAD") and not r.key:
            self._list_uploads(r) if "uploads" in r.query else self._list(r)
        elif r.method in ("GET", "HEAD"):
            self._get(r, reset=reset)
        elif r.method == "DELETE":
            with self.store.lock:
                if "uploadId" in r.query:
                    self.store.uploads.pop(r.query["uploadId"], None)
                else:
                    self.store.objects.pop((r.bucket, r.key), None)
            self._answer(204)
        elif r.method == "POST" and "delete" in r.query:
            keys = [unescape(k) for k in re.findall(r"<Key>(.*?)</Key>", body.decode())]
            with self.store.lock:
                for key in keys:
                    self.store.objects.pop((r.bucket, key), None)
            rows = (f"<Deleted><Key>{escape(k)}</Key></Deleted>" for k in keys)
            self._xml("DeleteResult", "".join(rows))
        elif "uploads" in r.query:
            number = os.urandom(8).hex()
            self.store.uploads[number] = (r.bucket, r.key, {})
            name = f"<UploadId>{number}</UploadId>"
            name = f"<Bucket>{r.bucket}</Bucket><Key>{escape(r.key)}</Key>{name}"
            self._xml("InitiateMultipartUploadResult", name)
        elif "partNumber" in r.query:
            upload = self.store.uploads.get(r.query["uploadId"])
            if upload is None:
                self._answer(404, b"<Error><Code>NoSuchUpload</Code></Error>")
                return
            upload[2][int(r.query["partNumber"])] = body
            self._answer(200, etag=f'"{hashlib.md5(body).hexdigest()}"')
        elif "uploadId" in r.query:
            self._complete(r)
        else:
            self._put(r, body)

    def _refused(self, r: Request) -> bool:
        """Whether a condition of the request does not hold; it is answered then."""
        found = self.store.objects.get((r.bucket, r.key))
        match, none = self.headers.get("If-Match"), self.headers.get("If-None-Match")
        ignores = self.store.ignores
        wrong = "if-match" not in ignores and match and (found is None or found.etag != match)
        wrong = wrong or ("if-none-match" not in ignores and none == "*" and found is not None)
        generation = self.headers.get("x-goog-if-generation-match")
        there = "0" if found is None else str(found.generation)
        kind = "if-none-match" if generation == "0" else "if-match"
        wrong = wrong or (generation is not None and kind not in ignores and generation != there)
        if wrong:
            self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        return bool(wrong)

    def _put(self, r: Request, body: bytes) -> None:
        with self.store.lock:
            if not self._refused(r):
                etag = self.store.put(r.bucket, r.key, body)
                generation = self.store.objects[r.bucket, r.key].generation
                self._answer(200, etag=etag, generation=generation)

    def _complete(self, r: Request) -> None:
        with self.store.lock:
            if self._refused(r):
                return
            upload = self.store.uploads.pop(r.query["uploadId"], None)
            if upload is None:
                self._answer(404, b"<Error><Code>NoSuchUpload</Code></Error>")
                return
            parts = [upload[2][n] for n in sorted(upload[2])]
            digest = hashlib.md5(b"".join(hashlib.md5(p).digest() for p in parts)).hexdigest()
            etag = self.store.put(r.bucket, r.key, b"".join(parts), f"{digest}-{len(parts)}")
        self._xml("CompleteMultipartUploadResult", f"<ETag>{escape(etag)}</ETag>")

    def _get(self, r: Request, *, reset: bool) -> None:
        with self.store.lock:
            found = self.store.objects.get((r.bucket, r.key))
            if found is None:
                self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
                return
            if self._refused(r):
                return
            size = len(found)
        lo, hi = r.range or (0, size)
        hi = min(hi, size)
        self.send_response(206 if r.range else 200)
        self.send_header("ETag", found.etag)
        self.send_header("x-goog-generation", str(found.generation))
        self.send_header("Last-Modified", formatdate(found.mtime, usegmt=True))
        self.send_header("Content-Length", str(hi - lo))
        if r.range:
            self.send_header("Content-Range", f"bytes {lo}-{hi - 1}/{size}")
        self.end_headers()
        if r.method == "HEAD":
            return
        sent = 0
        began = time.monotonic()
        for piece in found.read(lo, hi):
            if reset and sent + len(piece) > (hi - lo) // 2:
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.wfile.write(piece)
            sent += len(piece)
            if self.store.cap:
                time.sleep(max(0.0, sent / self.store.cap - (time.monotonic() - began)))

    def _list(self, r: Request) -> None:
        prefix, delimiter = r.query.get("prefix", ""), r.query.get("delimiter", "")
        rows, folders = [], dict[str, None]()
        with self.store.lock:
            for key in self.store.names(r.bucket, prefix):
                rest = key[len(prefix) :]
                if delimiter and delimiter in rest:
                    folders[prefix + rest.partition(delimiter)[0] + delimiter] = None
                    continue
                found = self.store.objects[r.bucket, key]
                when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(found.mtime))
                rows.append(
                    f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified>"
                    f"<ETag>{escape(found.etag)}</ETag><Size>{len(found)}</Size></Contents>"
                )
        rows += [f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in folders]
        head = f"<Name>{r.bucket}</Name><IsTruncated>false</IsTruncated>"
        self._xml("ListBucketResult", head + "".join(rows))

    def _propfind(self, r: Request) -> None:
        """List a folder, or describe an object, as WebDAV does."""
        prefix = f"{r.key.rstrip('/')}/" if r.key.strip("/") else ""
        rows = dict[str, str]()
        with self.store.lock:
            for key in self.store.names(r.bucket, prefix):
                name, slash, _ = key[len(prefix) :].partition("/")
                rows[prefix + name + slash] = self._described(r.bucket, prefix + name + slash)
            if not rows and (r.bucket, r.key) in self.store.objects:
                rows[r.key] = self._described(r.bucket, r.key)
        if not rows:
            self._answer(404)
            return
        if prefix and r.key not in rows:
            rows = {prefix: self._described(r.bucket, prefix), **rows}
        text = "".join(rows.values())
        body = f"<?xml version='1.0'?><D:multistatus xmlns:D='DAV:'>{text}</D:multistatus>"
        self._answer(207, body.encode())

    def _described(self, bucket: str, key: str) -> str:
        found = self.store.objects.get((bucket, key))
        when = formatdate(found.mtime if found else 0, usegmt=True)
        what = "<D:resourcetype><D:collection/></D:resourcetype>"
        if found is not None:
            what = (
                f"<D:resourcetype/><D:getcontentlength>{len(found)}</D:getcontentlength>"
                f"<D:getetag>{escape(found.etag)}</D:getetag>"
            )
        return (
            f"<D:response><D:href>/{bucket}/{escape(key)}</D:href><D:propstat><D:prop>"
            f"<D:getlastmodified>{when}</D:getlastmodified>{what}</D:prop>"
            "<D:status>HTTP/1.1 200 OK</D:status></D:propstat></D:response>"
        )

    def _list_uploads(self, r: Request) -> None:
        rows = [
            f"<Upload><Key>{escape(key)}</Key><UploadId>{number}</UploadId></Upload>"
            for number, (bucket, key, _) in self.store.uploads.items()
            if bucket == r.bucket
        ]
        self._xml("ListMultipartUploadsResult", "".join(rows))

    def _xml(self, name: str, content: str) -> None:
        self._answer(200, f"<?xml version='1.0'?><{name}>{content}</{name}>".encode())

    def _answer(
        self, status: int, body: bytes = b"", etag: str = "", generation: int | None = None
    ) -> None:
        self.send_response(status)
        if etag:
            self.send_header("ETag", etag)
        if generation is not None:
            self.send_header("x-goog-generation", str(generation))
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_: object) -> None:
        """Whoever was killed does not wait for an answer."""


@contextlib.contextmanager
def serving(store: Store) -> Iterator[str]:
    """Serve a store on loopback; yield its address."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(address: str) -> dict[str, str]:
    """Return the environment in which ``s3://`` and ``gs://`` are what is served at ``address``."""
    key = {"gcs_base_url": address, "disable_oauth": True, "client_email": "", "private_key": ""}
    return {
        "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(key | {"private_key_id": "not-to-be-seen"}),
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "not-to-be-seen",
        "AWS_REGION": "us-east-1",
    }


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0)
    parser.add_argument("--cap", type=float, default=0)
    parser.add_argument("folder", type=Path, nargs="?")
    given = parser.parse_args()
    store = Store(latency=given.latency, cap=given.cap)
    if given.folder:
        store.add_folder("disk", given.folder)
    with serving(store) as address:
        print(address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
