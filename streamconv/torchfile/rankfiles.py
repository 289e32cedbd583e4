"""Many rank files: read by two processes where they are many and there are cores to spare.

Reading is pure Python work of some ten microseconds a tensor, and 1024 rank files of 2000 tensors
are two million of them. A second interpreter reads every other file and sends what it found as
marshalled plain values (which, unlike a pickle, can call nothing). Results come in the order of the
files, so the first error is the same one whoever found it.
"""

from __future__ import annotations

import contextlib
import fcntl
import marshal
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from streamconv.errors import BadInputError, StreamconvError
from streamconv.files import memory_limit
from streamconv.ir.dtypes import BY_NAME
from streamconv.ir.placements import Kind, Placement
from streamconv.storage.address import place
from streamconv.system.signals import end_with_parent, how_it_ended
from streamconv.torchfile.meshes import Mesh
from streamconv.torchfile.rankfile import LocalSpec, RankFile, RankReader, Stored
from streamconv.torchfile.unpickle import no_garbage_collection

RankPath = tuple[int, Path]

# From here on a second interpreter (its start, its 15 MB) is worth it.
MANY_FILES = 64
_PIPE_BYTES = 1 << 20
_LENGTH_BYTES = 8
_FACTS = [f.name for f in fields(RankFile) if f.name not in ("path", "tensors")]
_F_SETPIPE_SZ = 1031


def read_rank_files(reader: RankReader, files: Sequence[RankPath]) -> Iterator[RankFile]:
    """Yield the contents of ``files``, given as (rank, path), in their order.

    Raises what :meth:`RankReader.read` raises.
    """
    if len(files) < MANY_FILES or len(os.sched_getaffinity(0)) < 2:
        for rank, path in files:
            yield reader.read(path, rank)
        return
    with _Helper(files[1::2]) as helper:
        for number, (rank, path) in enumerate(files):
            yield helper.next(reader, path) if number % 2 else reader.read(path, rank)


class _Helper:
    """The second interpreter, as the first one sees it."""

    def __init__(self, files: Sequence[RankPath]) -> None:
        self._specs: list[LocalSpec] = []
        self._names: tuple[str, ...] = ()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            close_fds=False,  # what this process was given to inherit (a lock) is handed on
        )
        assert self._process.stdin is not None  # noqa: S101 - PIPE
        self._shared = contextlib.ExitStack()
        self._shared.enter_context(self._share())
        request = marshal.dumps([(rank, str(path)) for rank, path in files])
        self._process.stdin.write(request)
        self._process.stdin.close()

    def _share(self) -> AbstractContextManager[None]:
        """Give the helper a part of what is left of the memory limit, before it reads a file.

        This interpreter keeps what both have found, hence the larger part.
        """
        mine = memory_limit.limit()
        if mine is None:
            return contextlib.nullcontext()
        share = max(1, mine - _private_bytes()) // 3
        memory_limit.bind(share, self._process.pid)
        return memory_limit.within(mine - share)

    def next(self, reader: RankReader, path: Path) -> RankFile:
        """Return what the helper found in its next file, which is ``path``."""
        answer = self._answer()
        if answer is None:
            code = self._process.wait()
            raise BadInputError(
                "reading a rank file ended in a crash",
                where=str(path),
                found=how_it_ended(code),
                hint="the file is damaged or hostile, or the machine is out of memory",
            )
        if "memory" in answer:
            raise memory_limit.MemoryNeededError(*answer["memory"])
        if "error" in answer:
            raise StreamconvError.from_json(answer["error"])
        self._specs += [reader.adopt(_spec_from_plain(s)) for s in answer["specs"]]
        if answer["names"] is not None:
            self._names = answer["names"]
        specs = [self._specs[i] for i in answer["spec"]]
        stored = map(Stored._make, zip(specs, *answer["columns"], strict=True))
        return RankFile(
            path=path, tensors=dict(zip(self._names, stored, strict=True)), **answer["facts"]
        )

    def _answer(self) -> dict[str, Any] | None:
        """Return the next answer; None where the helper ended without one."""
        stream = self._process.stdout
        assert stream is not None  # noqa: S101 - PIPE
        nbytes = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        data = stream.read(nbytes)
        if not data or len(data) < nbytes:
            return None
        answer: dict[str, Any] = marshal.loads(data)  # noqa: S302 - plain values, from ourselves
        return answer

    def __enter__(self) -> _Helper:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        self._shared.close()
        if self._process.stdout:
            self._process.stdout.close()


def _spec_to_plain(spec: LocalSpec) -> tuple[Any, ...]:
    mesh = spec.mesh
    return (
        spec.kind,
        spec.dtype.name,
        tuple(spec.shape),
        tuple(spec.strides),
        spec.storage_offset,
        spec.storage_numel,
        tuple(spec.global_shape),
        mesh and (mesh.dim_names, mesh.shape, mesh.ranks, mesh.coordinates, mesh.generation),
        tuple((p.kind.value, p.dim, p.split_factor) for p in spec.placements),
        spec.shard_order,
        spec.offsets and tuple(spec.offsets),
        spec.empty,
        spec.torch_2_4,
    )


def _spec_from_plain(plain: tuple[Any, ...]) -> LocalSpec:
    kind, dtype, shape, strides, offset, numel, whole, mesh, placements, *rest = plain
    return LocalSpec(
        0,
        kind,
        BY_NAME[dtype],
        shape,
        strides,
        offset,
        numel,
        whole,
        mesh and Mesh(*mesh),
        tuple(Placement(Kind(k), dim, factor) for k, dim, factor in placements),
        *rest,
    )


def _private_bytes() -> int:
    """Return what counts against the limit by now."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[5]) * mmap.PAGESIZE


def _serve(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    """Be the second interpreter: read the files that are asked for, answer for one after the other."""
    reader = RankReader()
    sent = 0
    names: tuple[str, ...] | None = None
    for rank, path in marshal.loads(stdin.read()):  # noqa: S302 - see above
        try:
            found = reader.read(place(path), rank)
        except StreamconvError as error:
            _send(stdout, {"error": error.to_json()})
            return
        except MemoryError as error:
            if isinstance(error, memory_limit.MemoryNeededError):
                needed = error.where, error.nbytes, error.needed_bytes
            else:
                needed = path, place(path).stat().st_size, memory_limit.PARSE_BYTES
            _send(stdout, {"memory": needed})
            return
        same = names == (names := tuple(found.tensors))
        specs, *columns = zip(*found.tensors.values(), strict=True) if names else ((),) * 6
        answer = {
            "specs": [_spec_to_plain(s) for s in reader.specs[sent:]],
            "names": None if same else names,
            "spec": [s.index for s in specs],
            "columns": columns,
            "facts": {f: getattr(found, f) for f in _FACTS},
        }
        sent = len(reader.specs)
        _send(stdout, answer)


def _send(stdout: IO[bytes], answer: dict[str, Any]) -> None:
    data = marshal.dumps(answer)
    stdout.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
    stdout.flush()


def main() -> None:
    """Serve on the standard streams until the asking process is gone."""
    if not end_with_parent(signal.SIGKILL, int(sys.argv[1])):
        return
    with contextlib.suppress(OSError):  # a small pipe only makes both wait more often
        fcntl.fcntl(1, _F_SETPIPE_SZ, _PIPE_BYTES)
    with no_garbage_collection():
        _serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
