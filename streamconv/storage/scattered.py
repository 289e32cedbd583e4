"""A checkpoint whose files lie on the disks of several machines, each of which serves its own.

``nodes://ray/run/actor`` is the folder ``/run/actor`` as all of them have it together. Who serves
what says a catalogue, which is asked of one of them: :data:`SERVERS` in the environment names it, with
the run's token (see :mod:`streamconv.nodes.serving`). It is like a store's credentials, for as long as
a run lasts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from streamconv.errors import BadInputError, UsageError
from streamconv.storage import objects

SCHEME = objects.NODES
SERVERS = "STREAMCONV_SERVERS"
CATALOGUE = "catalogue"
_ROOT = f"{SCHEME}://ray"


def address(path: str) -> str:
    """Return the address of what lies at the absolute path ``path`` of all machines.

    >>> address("/runs/a")
    'nodes://ray/runs/a'
    """
    return f"{_ROOT}{path}"


@dataclass(frozen=True, slots=True)
class Served:
    """A file that a machine serves: its server (``HOST:PORT``), its number there, and what it is.

    ``version`` goes with its bytes, whichever machine serves them. ``conflict`` says in words that
    several machines have different files of its name: then none is served.
    """

    server: str
    number: int
    nbytes: int
    mtime_ns: int
    version: str
    conflict: str = ""

    @property
    def found(self) -> objects.Found:
        """Return it as a store says it."""
        return objects.Found(self.nbytes, self.mtime_ns, self.version)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All files by their absolute paths without the first slash, and which server has each."""

    files: Mapping[str, Served]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {key: asdict(file) for key, file in self.files.items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Catalogue:
        """Rebuild it from :meth:`to_json`."""
        return Catalogue({key: Served(**file) for key, file in data.items()})


def setting(token: str, server: str) -> str:
    """Return what :data:`SERVERS` must be for who is to read."""
    return f"{token}@{server}"


class Nodes(objects.Bucket):
    """The disks of the machines of a run as one bucket; it can only be read."""

    def __init__(self) -> None:
        token, at, server = os.environ.get(SERVERS, "").partition("@")
        if not at:
            raise UsageError(
                f"{SCHEME}:// is where a conversion with --scattered reads, while it runs",
                hint="convert the folder itself: `--nodes ray --scattered`",
            )
        self._token = token
        self._stores: dict[str, Any] = {}
        super().__init__(SCHEME, "ray")
        self._server = server
        told = self.ask(CATALOGUE, lambda: self._ob.get(self._open(server), CATALOGUE).bytes())
        self._files = Catalogue.from_json(json.loads(bytes(told))).files
        self.forget()

    def _new_store(self) -> Any:
        return None

    def _open(self, server: str) -> Any:
        with self._lock:
            if server not in self._stores:
                self._stores[server] = objects.new_store(
                    "http", server, {"Authorization": f"Bearer {self._token}"}
                )
            return self._stores[server]

    def forget(self) -> None:
        """Forget what was read; what there is stays, for as long as a run lasts."""
        with self._lock:
            super().forget()
            for path, file in self._files.items():
                key: str = path
                found: objects.Found | None = file.found
                while key:
                    key, _, name = key.rpartition("/")
                    self._listed.setdefault(key, {})[name] = found
                    found = None

    def _list(self, key: str) -> dict[str, objects.Found | None]:
        return self._listed.get(key, {})

    def _place(self, key: str) -> tuple[Any, str]:
        if key not in self._files:
            raise objects.not_found(self.name, key)
        file = self._files[key]
        if file.conflict:
            raise BadInputError(
                "two machines have different files of one name",
                where=f"/{key}",
                found=file.conflict,
                hint="remove what another run has left on one of them",
            )
        return self._open(file.server), str(file.number)

    def look(self, key: str) -> objects.Found:
        """Return what lies at ``key`` now; raises ``SourceChangedError`` where it has changed."""
        self.ask(key, lambda: self._ob.head(*self._place(key)))
        return self._files[key].found
