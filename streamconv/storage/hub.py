"""Repositories of models on the HuggingFace Hub as a store that is read: ``hf://ORG/NAME[@REVISION]/…``.

huggingface_hub, which transformers needs as well, is loaded when the first such address is met. What a
revision means is asked once a process, and all that is read is of that commit. The token comes from
where ``hf auth login`` puts it, or from ``HF_TOKEN``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn
from urllib.parse import quote

from streamconv.errors import BadInputError, StreamconvError, UsageError
from streamconv.storage import objects
from streamconv.storage.objects import CREDENTIALS, Bucket, Found, NoAnswerError, not_found

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60.0
_PARTIAL = 206
_NO_ENTRY = 404
_DENIED = (401, 403)
# Whoever asks too often, and servers that fail.
_LATER = (408, 429, *range(500, 600))


class Repository(Bucket):
    """A repository at one commit; safe to use from several threads."""

    def __init__(self, scheme: str, name: str) -> None:
        import huggingface_hub.constants
        import huggingface_hub.utils

        self._hub: Any = huggingface_hub
        # A client of our own: nobody else in a planning child may reach the Hub, and theirs is barred.
        kind = type(self._hub.utils.get_session())
        self._client = kind(follow_redirects=True, timeout=_TIMEOUT_SECONDS)
        self._repo, _, self._revision = name.partition("@")
        self._commit = ""
        self._files: dict[str, Found] = {}
        self._begin(scheme, name)

    def forget(self) -> None:
        """Ask again which commit the revision is."""
        super().forget()
        with self._lock:
            self._commit, self._files = "", {}

    def _tree(self) -> dict[str, Found]:
        """Return all files of the commit."""
        with self._lock:
            if not self._commit:
                self.ask("", self._look_around)
            return self._files

    def _look_around(self) -> None:
        api = f"{self._hub.constants.ENDPOINT}/api/models/{self._repo}"
        told = self._ask_for(f"{api}/revision/{quote(self._revision or 'main', safe='')}")
        commit = str(told.json()["sha"])
        url: str | None = f"{api}/tree/{commit}?recursive=true"
        files: dict[str, Found] = {}
        while url:
            page = self._ask_for(url)
            for one in page.json():
                if one["type"] == "file":
                    version = (one.get("lfs") or one)["oid"]
                    files[one["path"]] = Found(one["size"], 0, version)
            url = page.links.get("next", {}).get("url")
        self._commit, self._files = commit, files

    def _ask_for(self, url: str) -> Any:
        answer = self._client.get(url, headers=self._hub.utils.build_hf_headers())
        if answer.status_code in (*_DENIED, _NO_ENTRY):
            raise BadInputError(
                "there is no such repository or revision on the Hub, or this token may not read it",
                where=self.name,
                hint=CREDENTIALS[self.scheme],
            )
        self._check("", answer.status_code)
        answer.raise_for_status()
        return answer

    def _list(self, key: str) -> dict[str, Found | None]:
        names: dict[str, Found | None] = {}
        for name, found in self.below(key).items():
            first, slash, _ = name.partition("/")
            names[first] = None if slash else found
        if names:
            self._listed[key] = names
        return names

    def look(self, key: str) -> Found:
        """Return the file at ``key``; raises ``FileNotFoundError``."""
        found = self._tree().get(key)
        if found is None:
            raise not_found(self.name, key)
        return found

    def below(self, key: str) -> dict[str, Found]:
        """Return all files below a folder by their names relative to it."""
        prefix = f"{key}/" if key else ""
        tree = self._tree()
        return {n.removeprefix(prefix): f for n, f in tree.items() if n.startswith(prefix)}

    def _stream(self, key: str, lo: int, hi: int, version: str) -> Iterator[memoryview]:
        found = self.look(key)
        if found.version != version:
            raise self._changed(key, version, found.version)
        url = self._hub.hf_hub_url(self._repo, key, revision=self._commit)
        headers = self._hub.utils.build_hf_headers()
        headers |= {"Range": f"bytes={lo}-{hi - 1}", "Accept-Encoding": "identity"}
        with self._client.stream("GET", url, headers=headers) as answer:
            self._check(key, answer.status_code)
            if answer.status_code != _PARTIAL and (lo, hi) != (0, found.nbytes):
                raise BadInputError("the Hub gives no ranges of files", where=f"{self.name}/{key}")
            for chunk in answer.iter_raw(_CHUNK_BYTES):
                yield memoryview(chunk)

    def _check(self, key: str, status: int) -> None:
        where = f"{self.name}/{key}".rstrip("/")
        if status in _DENIED:
            raise BadInputError(
                "the Hub refuses access", where=where, hint=CREDENTIALS[self.scheme]
            )
        if status == _NO_ENTRY:
            raise not_found(self.name, key)
        if status in _LATER:
            raise NoAnswerError(f"the Hub does not answer: HTTP {status}", where=where)

    @contextlib.contextmanager
    def answers(self, key: str, *, writing: bool = False) -> Iterator[None]:  # noqa: ARG002 - a bucket's
        """Raise what the client raises as errors of ours."""
        where = f"{self.name}/{key}".rstrip("/")
        try:
            yield
        except (StreamconvError, FileNotFoundError):
            raise
        except Exception as error:
            # Of httpx, or what takes its place: no class of theirs is one of the system's.
            of_client = type(error).__module__.startswith(("httpx", "httpcore"))
            if not (of_client or isinstance(error, OSError)):
                raise
            raise _silent(error, where) from None

    # Writing.

    def _refuse(self) -> NoReturn:
        raise UsageError(
            "hf:// can only be read",
            where=self.name,
            hint=f"convert into a folder, and --hf-upload-path {self._repo} uploads it",
        )

    def put(self, key: str, data: bytes, *, if_version: str | None = "") -> str:  # noqa: ARG002
        """Raise :class:`UsageError`."""
        self._refuse()

    def upload(self, key: str, part_bytes: int, at_once: int) -> objects.Upload:  # noqa: ARG002
        """Raise :class:`UsageError`."""
        self._refuse()

    def delete(self, keys: Iterable[str]) -> None:  # noqa: ARG002
        """Raise :class:`UsageError`."""
        self._refuse()


def _silent(error: Exception, where: str) -> NoAnswerError:
    told: Any = str(error).strip().splitlines() or [type(error).__name__]
    return NoAnswerError(
        f"the Hub does not answer: {objects.without_secrets(told[0])[:300]}",
        where=where,
        hint="run the same command again: it goes on where it was",
    )
