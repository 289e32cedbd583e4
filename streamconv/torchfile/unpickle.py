"""The inert, weights-only unpickler: CPython's C unpickler with a closed table of stand-ins.

Nothing is imported and nothing of the pickle's is executed: ``find_class`` looks a name up in
:mod:`streamconv.torchfile.allowlist` and returns an inert class of ours, or refuses. What comes
back is a tree of plain Python values and :mod:`streamconv.torchfile.inert` records.

What this cannot prevent in process: memory (a memo index of 2**31, a bytearray of 2**40) and the depth
of nested tuples. Both end in MemoryError or a crash of the process, so untrusted files are read
in a child with limits. A MemoryError then comes out as UnsafeInputError like the rest, or as
MemoryNeededError where a larger budget would do.
"""

from __future__ import annotations

import gc
import io
import pickle
from collections.abc import Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Literal, cast

from streamconv.errors import BadInputError, UnsafeInputError
from streamconv.files.memory_limit import too_much
from streamconv.torchfile.allowlist import KEPT, WEIGHTS, Globals
from streamconv.torchfile.inert import (
    Frozen,
    InertStorage,
    Kept,
    RefusedPickleError,
    StandIn,
    stand_in,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_PICKLE_NBYTES = 64 << 20

# Everything that CPython's unpickler and the calls it makes are known to raise on bad input.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,  # UnicodeDecodeError too
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
    NotImplementedError,
    ImportError,  # copyreg's extension registry
    Warning,  # odd escapes in a textual string, where warnings are errors
)


class InertUnpickler(pickle.Unpickler):
    """See the module; ``unknown`` says whether names outside the table are refused or kept inert."""

    def __init__(
        self, stream: IO[bytes], table: Globals, unknown: Literal["refuse", "keep"]
    ) -> None:
        super().__init__(stream, fix_imports=False)
        self._table = table
        self._unknown = unknown
        self._kept: dict[tuple[str, str], StandIn] = {}
        self._storages: dict[str, InertStorage] = {}

    def find_class(self, module: str, name: str) -> StandIn:
        """Return the stand-in for a global; called once per global and file (pickle memoises it)."""
        found = self._table.get((module, name)) or self._kept.get((module, name))
        if found is None:
            if self._unknown == "refuse":
                raise RefusedPickleError(f"the global {f'{module}.{name}'[:200]}")
            found = self._kept[module, name] = stand_in(f"{module}.{name}"[:200], Kept)
        return found

    def persistent_load(self, pid: object) -> InertStorage:
        """Return the record for a storage: the only persistent id that torch.save writes."""
        if type(pid) is not tuple or len(pid) != 5:
            raise RefusedPickleError("a persistent id that names no storage")
        tag, kind, key, location, numel = pid
        if (
            type(tag) is not str
            or tag != "storage"
            or type(kind) is not Frozen
            or type(key) is not str
            or type(location) is not str
            or type(numel) is not int
        ):
            raise RefusedPickleError("a persistent id that names no storage")
        known = self._storages.get(key)
        if known is not None:
            # Torch takes the type of whichever comes first.
            if known.kind is not kind or known.numel != numel:
                raise RefusedPickleError(f"one storage of two types or sizes: {key[:40]!r}")
            return known
        storage = self._storages[key] = _new_storage(InertStorage)
        storage.kind = kind
        storage.key = key
        storage.location = location
        storage.numel = numel
        return storage


_new_storage = object.__new__


def load_inert(
    data: bytes,
    where: str,
    *,
    extra_globals: Mapping[tuple[str, str], StandIn] | None = None,
    unknown: Literal["refuse", "keep"] = "refuse",
    max_nbytes: int = MAX_PICKLE_NBYTES,
) -> object:
    """Return what the pickle ``data`` of the file ``where`` describes, as inert records.

    ``extra_globals`` extends the table; ``unknown="keep"`` makes names outside it inert records too
    (for parts that are only reported, such as saved arguments). Raises :class:`UnsafeInputError` for
    a name outside the table or an attempt to misuse one inside it, :class:`BadInputError` for a
    damaged or truncated pickle.
    """
    if len(data) > max_nbytes:
        raise UnsafeInputError(
            "the pickle is too large",
            where=where,
            expected=f"at most {max_nbytes} bytes",
            found=f"{len(data)} bytes",
        )
    table = WEIGHTS if unknown == "refuse" else KEPT
    if extra_globals is not None:
        table = {**table, **extra_globals}
    # A BufferedReader, because the C unpickler prefetches only from what has a peek method: reading
    # opcode by opcode from a BytesIO takes four times as long.
    stream = io.BufferedReader(io.BytesIO(data), 1 << 17)
    with refusals(where, len(data)), no_garbage_collection():
        value: object = InertUnpickler(cast("IO[bytes]", stream), table, unknown).load()
    if stream.read(1):
        raise BadInputError("bytes follow the end of the pickle", where=where)
    return value


@contextmanager
def refusals(where: str, nbytes: int) -> Iterator[None]:
    """Turn what an unpickler raises for the file ``where``, ``nbytes`` of a pickle, into our errors."""
    try:
        yield
    except RefusedPickleError as error:
        raise UnsafeInputError(
            f"the pickle asks for something that weights never need: {error}",
            where=where,
            hint="if you trust the file, load it with torch.load where it was made and save plain "
            "tensors",
        ) from None
    except MemoryError:
        raise too_much(where, nbytes) from None
    except _DAMAGE as error:
        raise BadInputError(
            "the pickle is damaged or truncated",
            where=where,
            found=f"{type(error).__name__}: {str(error)[:200]}",
        ) from None


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the cyclic collector off: it would walk a growing tree again and again (thrice the time).

    Whoever reads many files puts this around all of it, so that no tree is alive when it ends.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
