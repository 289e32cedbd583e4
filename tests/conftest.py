"""Fixtures that every test may ask for."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from scripts.makers.fsdp import Made
    from tests.scenes import Scene

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def user_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the key and the cache of a user of these tests away from those of whoever runs them."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        patch.setenv("STREAMCONV_CACHE", str(tmp_path_factory.mktemp("cache") / "streamconv"))
        yield folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Every recipe's checkpoint, made once a session and shared by all xdist workers.

    The folders are shared: a test that changes one works on a copy. With ``STREAMCONV_TEST_CACHE`` they
    are kept there for later sessions, until a maker changes.
    """
    from scripts.makers import fsdp  # imports torch: seconds that only these tests should pay

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each worker has a folder of its own below the session's
    if kept := os.environ.get("STREAMCONV_TEST_CACHE"):
        makers = sorted((REPOSITORY / "scripts" / "makers").glob("*.py"))
        base = (
            Path(kept) / hashlib.sha256(b"".join(m.read_bytes() for m in makers)).hexdigest()[:16]
        )
        base.mkdir(parents=True, exist_ok=True)
    root, complete = base / "checkpoints", base / "checkpoints.complete"
    with FileLock(base / "checkpoints.lock"):
        if not complete.exists():
            shutil.rmtree(root, ignore_errors=True)  # another worker failed half-way
            fsdp.make_all(root)
            complete.touch()
    return fsdp.collect(root)


class Kept(type(Path())):  # type: ignore[misc]
    """A folder of kept checkpoints, ``KIND/NAME``: a test of one that is not there is skipped."""

    top: Path

    def __truediv__(self, key: Any) -> Path:
        found: Path = super().__truediv__(key)
        if not found.is_relative_to(self.top):
            return found
        kind_and_name = Path(self.top, *found.relative_to(self.top).parts[:2])
        if not kind_and_name.exists():
            pytest.skip(f"{kind_and_name.relative_to(self.top)} is not among the checkpoints here")
        return found


@pytest.fixture(scope="session")
def shared_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of older torch releases, of trainers and of verl itself.

    All of them where they are kept beside the repository; else the smallest of each kind, which
    ``tests/fixtures`` has in an archive.
    """
    path = REPOSITORY.parent / "shared" / "checkpoints"
    if not path.is_dir():
        path = tmp_path_factory.mktemp("checkpoints")
        with tarfile.open(REPOSITORY / "tests" / "fixtures" / "checkpoints.tar.xz") as archive:
            archive.extractall(path, filter="data")
    Kept.top = path
    return Kept(path)


@pytest.fixture(scope="session")
def lone_rank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint in one file of a kilobyte."""
    from scripts.makers import runs

    return runs.rank_file(tmp_path_factory.mktemp("ranks") / runs.RANK_FILE)


@pytest.fixture(scope="session")
def lone_output(tmp_path_factory: pytest.TempPathFactory, lone_rank_file: Path) -> Path:
    """What converting :func:`lone_rank_file` makes: the output of every step that is a link to it."""
    import streamconv

    output = tmp_path_factory.mktemp("outputs") / "made"
    with pytest.MonkeyPatch.context() as patch:
        plan_here(patch)
        streamconv.convert(lone_rank_file.parent, output)
    return output


@pytest.fixture
def scene(tmp_path: Path, lone_rank_file: Path, lone_output: Path) -> Scene:
    """A training run and an output folder, for a batch between them."""
    from tests.scenes import Scene

    return Scene(tmp_path, lone_rank_file, lone_output)


class _DictCache(dict[str, bytes]):
    """A cache in memory."""

    def get_or_claim(self, key: str) -> bytes | None:
        return self.get(key)

    def put(self, key: str, data: bytes) -> bool:
        self[key] = data
        return True

    def close(self) -> None:
        pass


def _refuse() -> None:
    raise AssertionError("transformers is asked what it was asked before")


@pytest.fixture
def planned_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the planning child's task in this process, without its limit on memory."""
    plan_here(monkeypatch)


def plan_here(patch: pytest.MonkeyPatch) -> None:
    """Do as :func:`planned_here` for as long as ``patch`` is in force.

    Each plan is made twice: the second time nobody may be asked what was asked the first time, and it
    must be the same byte for byte.
    """
    from streamconv.planning import build, child
    from streamconv.planning.answers import Answers

    make = build.build_plan

    def ask(request: dict[str, Any], **_: object) -> dict[str, Any]:
        return child._TASKS[request["task"]](request)

    def make_twice(
        checkpoint: Any,
        job: Any,
        stream: IO[str],
        asked: Any = None,
        answers: Any = None,
        others: Any = (),
    ) -> None:
        cache: Any = _DictCache()
        plan, first = io.StringIO(), Answers(cache)
        make(checkpoint, job, plan, asked, first, others)
        stream.write(plan.getvalue())
        if first.remembered:
            again = io.StringIO()
            make(checkpoint, job, again, asked, Answers(cache, _refuse), others)
            assert again.getvalue() == plan.getvalue()

    patch.setattr(child, "_ask", ask)
    patch.setattr(build, "build_plan", make_twice)
    patch.setattr(child, "_limited_memory", contextlib.nullcontext)
