"""What is asked of an object store, over obstore: list, look, read ranges, write, delete.

obstore is loaded when the first address is met (the extra ``streamconv[remote]``). Its threads start
then: nothing may fork without ``exec`` afterwards, and nothing here does. Two of its traps: it keeps
the memory that it is given and does not copy it, so that every piece that is written must be bytes of
its own; and its messages show whole URLs, of which queries and users are cut.

What a process has learnt of a bucket (listings, the version of each object) stays true for it until
:func:`forget`: all that is read of an object in between is of one version, or an error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from streamconv.errors import (
    BadInputError,
    OutputExistsError,
    SourceChangedError,
    StreamconvError,
    UsageError,
)

NODES = "nodes"
SCHEMES = ("s3", "gs", "az", "hf", "http", "https", NODES)
READ_ONLY = ("hf", "http", "https", NODES)
CREDENTIALS = {
    "s3": "they come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or the machine's role",
    "gs": "they come from GOOGLE_APPLICATION_CREDENTIALS, gcloud's login, or the machine's role",
    "az": "they come from AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or the "
    "machine's identity",
    "hf": "a token comes from HF_TOKEN, or from where `hf auth login` puts it",
    "http": "only servers that ask for none can be read",
    "https": "only servers that ask for none can be read",
    NODES: "they are those of one run, and end with it",
}
# Metadata is read in blocks: the directory of a zip is at its end, its pickle at the beginning.
_BLOCK_BYTES = 256 << 10
_TAIL_BYTES = 64 << 10
_CACHE_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20
# A store that has answered before is waited for: 503s of a minute, a switch that restarts.
_PAUSES_SECONDS = (0.5, 1, 2, 4, 8, 16, 30)
_SECRETS = re.compile(r"\?[^\s'\"]*|(?<=//)[^/\s@]*@")
_RIGHTS = 0o444
# What obstore says where nobody gave it credentials, and, of an upload, where they are not enough.
_SIGNS = (
    "169.254.169.254",
    "metadata.google.internal",
    "CredentialsError",
    "lacked the necessary privileges",
    # Of a listing obstore tells these as it tells any other failure.
    "403 Forbidden",
    "401 Unauthorized",
)

FOLDER = os.stat_result((stat.S_IFDIR | _RIGHTS | 0o111, 0, 0, 1, 0, 0, 0, 0, 0, 0))

T = TypeVar("T")


def without_secrets(text: str) -> str:
    """Return a text without what may be a secret in the addresses in it: users and queries.

    >>> without_secrets("http://me:pw@host/x?sig=abc failed")
    'http://host/x failed'
    """
    text = _SECRETS.sub("", text)
    before, at, after = text.partition("@")
    return after if at and "/" not in before and " " not in before else text


def not_found(bucket: str, key: str) -> FileNotFoundError:
    """Return the error for an object that is not there."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{bucket}/{key}")


def _obstore(scheme: str) -> Any:
    try:
        import obstore
        import obstore.store
    except ImportError as error:
        raise UsageError(
            f"{scheme}:// needs obstore, which is not installed",
            hint="pip install 'streamconv[remote]'",
        ) from error
    return obstore


def new_store(scheme: str, name: str, headers: Mapping[str, str] | None = None) -> Any:
    """Return obstore's client of a bucket or a server, which sends ``headers`` with each request."""
    # Threads for as many requests as the processors can serve are more than enough.
    os.environ.setdefault("TOKIO_WORKER_THREADS", "2")
    ob = _obstore(scheme)
    from datetime import timedelta  # 1.5 MB that a conversion on disks can do without

    client: dict[str, Any] = {"timeout": "180s", "connect_timeout": "10s"}
    if headers:
        client["default_headers"] = dict(headers)
    retry = {
        "max_retries": 5,
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=3),
            "base": 2,
        },
        "retry_timeout": timedelta(seconds=60),
    }
    config: dict[str, Any] = {}
    endpoint = ""
    if scheme == "s3":
        from streamconv.storage import aws

        config = aws.settings()
        endpoint = str(config.get("endpoint", ""))
    if _is_plain(scheme, endpoint):
        client["allow_http"] = True
    try:
        return ob.store.from_url(
            f"{scheme}://{name}",
            config=config or None,
            client_options=client,
            retry_config=retry,
        )
    except (ob.exceptions.BaseError, ValueError) as error:
        raise UsageError(
            f"the store cannot be opened: {_told(error)}",
            where=f"{scheme}://{name}",
            hint=CREDENTIALS[scheme],
        ) from None


def _is_plain(scheme: str, endpoint: str) -> bool:
    """Whether a user has named a server that does not speak TLS."""
    if scheme == "az":
        return os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("1", "true")
    if scheme == "gs":
        with contextlib.suppress(ValueError):
            key = json.loads(os.environ.get("GOOGLE_SERVICE_ACCOUNT_KEY", ""))
            endpoint = str(key.get("gcs_base_url", "")) if isinstance(key, dict) else ""
        endpoint = os.environ.get("GOOGLE_BASE_URL", endpoint)
    return scheme == "http" or endpoint.startswith("http://")


def _told(error: BaseException) -> str:
    """Return the first line of what obstore says, without what may be secret."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    return without_secrets(text[0])[:300]


@dataclass(frozen=True, slots=True)
class Found:
    """What a store says of an object; ``version`` is its ETag, or its time of change without one."""

    nbytes: int
    mtime_ns: int
    version: str

    @staticmethod
    def of(meta: Mapping[str, Any]) -> Found:
        """Return what obstore's ``meta`` says."""
        mtime_ns = int(meta["last_modified"].timestamp() * 1000) * 1_000_000
        etag = meta["e_tag"] or ""
        # Azure's lists have them without the quotes that its answers and its conditions have.
        if etag and not etag.endswith('"'):
            etag = f'"{etag}"'
        return Found(meta["size"], mtime_ns, etag or f"modified-{mtime_ns}")


class Object:
    """An object of one version; what is read of it is of that version, or an error."""

    def __init__(self, bucket: Bucket, key: str, found: Found) -> None:
        self.bucket = bucket
        self.key = key
        self.found = found
        self.nbytes = found.nbytes
        self.version = found.version

    @property
    def status(self) -> os.stat_result:
        """Return what a file's status would be."""
        seconds = self.found.mtime_ns // 10**9
        basic = (stat.S_IFREG | _RIGHTS, 0, 0, 1, 0, 0, self.nbytes, seconds, seconds, seconds)
        return os.stat_result(basic, {"st_mtime_ns": self.found.mtime_ns})

    def read(self, offset: int, nbytes: int | None) -> bytes:
        """Return bytes from ``offset`` on, fewer where the object ends; through the cache of blocks."""
        end = self.nbytes if nbytes is None else min(offset + nbytes, self.nbytes)
        if end <= offset:
            return b""
        pieces = []
        while offset < end:
            lo, block = self.bucket.block(self, offset, end)
            pieces.append(block[offset - lo : end - lo])
            offset += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def flow(self, offset: int) -> Iterator[memoryview]:
        """Yield the object's bytes from ``offset`` on, as they come: one answer, and no cache."""
        return self.bucket.flow(self, offset)


class NoAnswerError(StreamconvError):
    """A store does not answer, or with an error of its own: it may, a moment later."""

    kind = "no-answer"


class Upload:
    """A new object on its way. It appears when it is finished; closed before, it never was."""

    def __init__(self, bucket: Bucket, key: str, writer: Any) -> None:
        self._bucket = bucket
        self._key = key
        self._writer: Any = writer

    def write(self, data: bytes) -> None:
        """Append bytes, which are kept and must never change."""
        with self._bucket.answers(self._key, writing=True):
            self._writer.write(data)

    def finish(self) -> None:
        """Make the object appear."""
        writer, self._writer = self._writer, None
        with self._bucket.answers(self._key, writing=True):
            writer.close()
        self._bucket.wrote(self._key)

    def close(self) -> None:
        """Take it all back unless it is finished."""
        writer, self._writer = self._writer, None
        if writer is not None:
            # An exception within its block is how the client is told to abort.
            with contextlib.suppress(Exception):
                writer.__exit__(RuntimeError, RuntimeError("not finished"), None)


Kind = Literal["folder", "object"]


class Bucket:
    """A bucket and what is known of it; safe to use from several threads."""

    def __init__(self, scheme: str, name: str) -> None:
        self._ob = _obstore(scheme)
        self._begin(scheme, name)
        self._store = self._new_store()

    def _begin(self, scheme: str, name: str) -> None:
        self.scheme = scheme
        self.name = f"{scheme}://{name}"
        self._listed: dict[str, dict[str, Found | None]] = {}
        self._versions: dict[str, Found] = {}
        # GCS takes conditions on an object's generation, not on its ETag.
        self._generations: dict[str, tuple[str, str]] = {}
        self._blocks: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.RLock()
        self._answered = False
        self.requests = 0

    def _new_store(self) -> Any:
        return new_store(self.scheme, self.name.partition("://")[2])

    def _place(self, key: str) -> tuple[Any, str]:
        """Return who is asked for an object, and by which name."""
        return self._store, key

    def forget(self) -> None:
        """Ask the store again for what comes."""
        with self._lock:
            self._listed.clear()
            self._versions.clear()
            self._blocks.clear()
            self._held_bytes = 0

    # What is there.

    def kind(self, key: str) -> Kind | None:
        """Return what lies at ``key``; None for nothing. A folder is what objects lie below."""
        if not key:
            return "folder"
        above, _, name = key.rpartition("/")
        with self._lock:
            # Beside a folder that was looked into several names are asked about: one list answers.
            if above and any(k.rpartition("/")[0] == above for k in self._listed if k != key):
                self._list(above)
            if above not in self._listed:
                if key in self._versions:
                    return "object"
                if self._list(key):
                    return "folder"
                try:
                    self.look(key)
                except FileNotFoundError:
                    return None
                return "object"
            listed = self._listed[above]
            if name not in listed:
                return None
            return "folder" if listed[name] is None else "object"

    def names(self, key: str) -> list[str]:
        """Return the names of what lies in the folder ``key``."""
        with self._lock:
            return sorted(self._list(key))

    def _list(self, key: str) -> dict[str, Found | None]:
        if key not in self._listed:
            # Without the slash run_1 would list run_10, too.
            prefix = f"{key}/" if key else None
            try:
                found = self.ask(
                    key, lambda: self._ob.list_with_delimiter(self._store, prefix=prefix)
                )
            except FileNotFoundError:
                found = {"common_prefixes": [], "objects": []}
            except StreamconvError:
                if not self.scheme.startswith("http"):
                    raise
                found = {"common_prefixes": [], "objects": []}  # most web servers list nothing
            names: dict[str, Found | None] = {
                _last(o["path"]): Found.of(o)
                for o in found["objects"]
                # Consoles put an empty object where a folder is to be seen.
                if o["path"].rstrip("/") != key
            }
            # An object and a folder of one name: what lies in the folder counts.
            names |= dict.fromkeys(map(_last, found["common_prefixes"]))
            self._listed[key] = {n: f for n, f in names.items() if n}
        return self._listed[key]

    def stat(self, key: str) -> Object:
        """Return the object at ``key`` as it was first seen; raises ``FileNotFoundError``."""
        above, _, name = key.rpartition("/")
        with self._lock:
            found = self._versions.get(key) or self._listed.get(above, {}).get(name)
        if found is None:
            found = self.look(key)
        return Object(self, key, found)

    def look(self, key: str) -> Found:
        """Return what lies at ``key`` now; raises ``FileNotFoundError``."""
        meta = self.ask(key, lambda: self._ob.head(*self._place(key)))
        found = Found.of(meta)
        self._remember(key, meta)
        with self._lock:
            self._versions[key] = found
        return found

    # Reading.

    def block(self, item: Object, offset: int, end: int) -> tuple[int, bytes]:
        """Return bytes around ``offset``, at least as far as its block goes, and where they begin.

        Blocks are laid out so that the tail of an object is one of its own. A stretch of many blocks
        is read at once and not kept.
        """
        tail = max(0, item.nbytes - _TAIL_BYTES)
        if offset >= tail:
            lo, hi = tail, item.nbytes
        else:
            lo = offset // _BLOCK_BYTES * _BLOCK_BYTES
            hi = min(lo + _BLOCK_BYTES, tail)
        name = (item.key, item.version, lo)
        with self._lock:
            held = self._blocks.get(name)
            if held is not None:
                self._blocks.move_to_end(name)
                return lo, held
        if end - offset > 2 * _BLOCK_BYTES:
            return offset, self.get(item.key, offset, end, item.version)
        data = self.get(item.key, lo, hi, item.version)
        with self._lock:
            self._blocks[name] = data
            self._held_bytes += len(data)
            while self._held_bytes > _CACHE_BYTES:
                _, old = self._blocks.popitem(last=False)
                self._held_bytes -= len(old)
        return lo, data

    def get(self, key: str, lo: int, hi: int, version: str) -> bytes:
        """Return exactly the bytes ``[lo, hi)`` of that version."""
        buffer = bytearray(hi - lo)
        self.read_into(key, lo, version, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, key: str, offset: int, version: str, *buffers: memoryview) -> None:
        """Fill ``buffers``, in order, from byte ``offset`` of that version of an object.

        Raises :class:`SourceChangedError` where it is no longer that version. What has come of a
        request that breaks off is kept.
        """
        wanted = sum(map(len, buffers))
        done = 0

        def attempt() -> None:
            nonlocal done
            for piece in self._stream(key, offset + done, offset + wanted, version):
                _scatter(buffers, done, piece)
                done += len(piece)
            if done < wanted:
                raise ConnectionError("the answer is shorter than what was asked for")

        if wanted:
            try:
                self.ask(key, attempt)
            except FileNotFoundError:
                raise SourceChangedError(
                    "a source file vanished", where=f"{self.name}/{key}"
                ) from None

    def flow(self, item: Object, offset: int) -> Iterator[memoryview]:
        """Yield an object's bytes from ``offset`` on; after an answer that breaks off comes another."""
        while offset < item.nbytes:
            first, rest = self.ask(item.key, partial(self._begun, item, offset))
            offset += len(first)
            yield first
            with contextlib.suppress(NoAnswerError), self.answers(item.key):
                for piece in rest:
                    offset += len(piece)
                    yield piece

    def _begun(self, item: Object, offset: int) -> tuple[memoryview, Iterator[memoryview]]:
        answer = self._stream(item.key, offset, item.nbytes, item.version)
        for first in answer:
            return first, answer
        raise ConnectionError("the answer is empty")

    def _stream(self, key: str, lo: int, hi: int, version: str) -> Iterator[memoryview]:
        options: dict[str, Any] = {"range": (lo, hi)}
        has_etag = not version.startswith("modified-")
        if has_etag:
            options["if_match"] = version
        answer = self._ob.get(*self._place(key), options=options)
        found = Found.of(answer.meta)
        # Also where a server takes no notice of the condition.
        if found.version != version:
            raise self._changed(key, version, found.version)
        for chunk in answer.stream(min_chunk_size=_CHUNK_BYTES):
            yield memoryview(chunk)[: hi - lo]

    def _changed(self, key: str, expected: str, found: str) -> SourceChangedError:
        return SourceChangedError(
            "a source file is not the one that was planned",
            where=f"{self.name}/{key}",
            expected=f"version {expected}",
            found=f"version {found}" if found else "another version",
            hint="plan again once the trainer has finished writing",
        )

    # Writing.

    def put(self, key: str, data: bytes, *, if_version: str | None = "") -> str:
        """Write a whole object and return its version.

        ``if_version``: only over that version; None: only where there is none. Raises
        :class:`OutputExistsError` where it is otherwise.
        """
        mode: Any = "overwrite"
        if if_version is None:
            mode = "create"
        elif if_version:
            version, generation = self._generations.get(key, ("", ""))
            mode = {"e_tag": if_version}
            if generation:
                # Of an object that is another one by now no generation is known, and none is it.
                mode["version"] = generation if version == if_version else "1"
        made = self.ask(
            key,
            lambda: self._ob.put(self._store, key, data, mode=mode, use_multipart=False),
            writing=True,
        )
        self.wrote(key)
        self._remember(key, made)
        return str(made["e_tag"] or "")

    def _remember(self, key: str, meta: Mapping[str, Any]) -> None:
        if self.scheme == "gs" and meta.get("version"):
            self._generations[key] = str(meta["e_tag"]), str(meta["version"])

    def wrote(self, key: str) -> None:
        """What was listed is no longer so."""
        with self._lock:
            self._listed.clear()
            self._versions.pop(key, None)

    def upload(self, key: str, part_bytes: int, at_once: int) -> Upload:
        """Begin to write a new object in parts, ``at_once`` of which are on their way together."""
        with self.answers(key):
            return Upload(
                self,
                key,
                self._ob.open_writer(
                    self._store, key, buffer_size=part_bytes, max_concurrency=at_once
                ),
            )

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; what is not there is as it should be."""
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                self.ask(key, partial(self._ob.delete, self._store, key), writing=True)
            self.wrote(key)

    def below(self, key: str) -> dict[str, Found]:
        """Return all objects below a folder, now, by their names relative to it."""
        prefix = f"{key}/" if key else ""

        def run() -> dict[str, Found]:
            pages = self._ob.list(self._store, prefix=prefix or None)
            return {o["path"].removeprefix(prefix): Found.of(o) for page in pages for o in page}

        return self.ask(key, run)

    # Asking.

    def ask(self, key: str, run: Callable[[], T], *, writing: bool = False) -> T:
        """Do ``run``, again after pauses where the store does not answer; its errors become ours."""
        for pause in (*_PAUSES_SECONDS, None):
            self.requests += 1
            try:
                with self.answers(key, writing=writing):
                    answer = run()
                self._answered = True
                return answer
            except NoAnswerError:
                if pause is None or not self._answered:
                    raise
                time.sleep(pause)
        raise AssertionError

    @contextlib.contextmanager
    def answers(self, key: str, *, writing: bool = False) -> Iterator[None]:
        """Raise what obstore raises as errors of ours."""
        errors = self._ob.exceptions
        where = f"{self.name}/{key}"
        try:
            yield
        except (errors.NotFoundError, FileNotFoundError):
            self._answered = True
            raise not_found(self.name, key) from None
        except (errors.PreconditionError, errors.AlreadyExistsError, errors.NotModifiedError):
            self._answered = True
            if not writing:
                raise self._changed(key, "that was planned", "") from None
            raise OutputExistsError(
                "somebody else has written here meanwhile", where=where
            ) from None
        except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
            raise self._refused(key, error) from None
        except (errors.NotSupportedError, errors.InvalidPathError) as error:
            raise BadInputError(f"the store cannot do this: {_told(error)}", where=where) from None
        except (errors.BaseError, OSError) as error:
            if _is_lack_of_credentials(error):
                raise self._refused(key, error) from None
            raise NoAnswerError(
                f"the store does not answer: {_told(error)}",
                where=where,
                hint="run the same command again: it goes on where it was",
            ) from None

    def _refused(self, key: str, error: BaseException) -> BadInputError:
        return BadInputError(
            f"the store refuses access: {_told(error)}",
            where=f"{self.name}/{key}",
            hint=CREDENTIALS[self.scheme],
        )


def _is_lack_of_credentials(error: BaseException) -> bool:
    text = str(error)
    return any(sign in text for sign in _SIGNS)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _scatter(buffers: tuple[memoryview, ...], at: int, piece: memoryview) -> None:
    """Copy ``piece`` to byte ``at`` of the buffers as if they were one."""
    for buffer in buffers:
        if at >= len(buffer):
            at -= len(buffer)
            continue
        take = min(len(buffer) - at, len(piece))
        buffer[at : at + take] = piece[:take]
        piece = piece[take:]
        at = 0
        if not len(piece):
            return
