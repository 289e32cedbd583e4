"""The manifest of an output that a stranger made: damaged, hostile, enormous."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import streamconv
from scripts.makers.fsdp import Made
from scripts.outputs import MANIFEST
from streamconv.conversion.finished import finished_output
from streamconv.conversion.job import refuse_others
from streamconv.errors import (
    BadInputError,
    BudgetError,
    OutputExistsError,
    StreamconvError,
    UnsafeInputError,
    UsageError,
)
from streamconv.output.manifest import MAX_MANIFEST_BYTES, read_manifest
from streamconv.verification.folder import verify_output
from streamconv.verification.room import parsed_bytes
from streamconv.verification.source import _job

SECRET = "secret.json"


@pytest.fixture(scope="module")
def converted(
    checkpoints: dict[str, Made], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("converted") / "model"
    streamconv.convert(checkpoints["fsdp2"].source, out, max_shard_size="150kB", sync=False)
    (out.parent / SECRET).write_text("{}")
    return out, json.loads((out / MANIFEST).read_text())


@pytest.fixture
def folder(converted: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted[0], tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


# --- mutants ------------------------------------------------------------------------------------

HOSTILE = [
    *(None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**30, -(10**400)),
    *("", ".", "..", "/", "a/../b", f"../{SECRET}", MANIFEST, "a\0b", "\ud800", "x" * 5000, "é\n"),
    *([], {}, [[]], [None, None], {"name": []}, ["a", "b"]),
]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield from places(inner, (*at, key))


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


# Of these a change shows by nothing else than the manifest itself.
UNCHECKED = {"streamconv", "plan_digest", "unverifiable_bytes", "notices", "skipped", "run", "job"}
UNCHECKED |= {"source_files", "shards", "sources"}
opened: list[str] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if opened is not None and event == "open":
        opened.append(str(args[0]))


sys.addaudithook(_hook)


@contextlib.contextmanager
def opening() -> Iterator[list[str]]:
    global opened
    opened = found = []
    try:
        yield found
    finally:
        opened = None


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_changed_manifest_is_an_error_or_a_problem_and_leads_nowhere(
    data: st.DataObject, converted: tuple[Path, dict[str, Any]]
) -> None:
    folder, original = converted
    manifest = copy.deepcopy(original)
    place = data.draw(st.sampled_from([p for p in places(original) if p]))
    *path, last = place
    holder: Any = manifest
    for key in path:
        holder = holder[key]
    before = copy.deepcopy(holder[last])
    action = data.draw(st.sampled_from(["replace", "delete", "nest", "repeat", "absolute"]))
    if action == "delete":
        del holder[last]
    elif action == "nest":
        holder[last] = nested(before, data.draw(st.sampled_from([1, 3, 50])))
    elif action == "repeat" and isinstance(holder, list):
        holder.append(copy.deepcopy(before))
    elif action == "absolute":
        holder[last] = str(folder.parent / SECRET)
    else:
        holder[last] = data.draw(st.sampled_from(HOSTILE))
    same = json.dumps(manifest, sort_keys=True) == json.dumps(original, sort_keys=True)
    try:
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with opening() as seen:
            passed = outcome(folder)
    finally:
        (folder / MANIFEST).write_text(json.dumps(original))
    assert not any(SECRET in name for name in seen)
    if not UNCHECKED.intersection(map(str, (place[0], place[-1], *place[2:3]))) and not same:
        assert not passed, (place, action)


def outcome(folder: Path) -> bool:
    """Whether it passes; whatever is raised must be an error of bad or unsafe input."""
    raised: StreamconvError | None = None
    try:
        report = verify_output(folder)
        json.dumps(report.to_json(), allow_nan=False)
        _job(folder, read_manifest(folder) or {}, folder, None, ())
    except StreamconvError as error:
        raised = error
    if raised is None:
        return report.passed
    gone = isinstance(raised, UsageError) and "is gone" in raised.what  # --hf-config's, or --base's
    assert gone or raised.exit_code in (5, 6)
    assert len(str(raised)) < 1000
    return gone


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.integers(0, 10_000), text=st.text(max_size=3))
@example(cut=0, text="[" * 100_000)
@example(cut=0, text='{"files":' + "[" * 100_000 + "]" * 100_000 + "}")
@example(cut=0, text="9" * 10_000)
@example(cut=0, text="null")
@example(cut=0, text="[]")
def test_a_manifest_that_is_cut_off_is_an_error(
    cut: int, text: str, converted: tuple[Path, dict[str, Any]]
) -> None:
    folder, original = converted
    whole = json.dumps(original, indent=1)
    try:
        # Characters that no encoding has are written as they would lie on a disk.
        mutant = (whole[: min(cut, len(whole) - 2)] + text).encode(errors="surrogatepass")
        (folder / MANIFEST).write_bytes(mutant)
        with pytest.raises(BadInputError) as caught:
            verify_output(folder)
    finally:
        (folder / MANIFEST).write_text(whole)
    assert caught.value.where == str(folder / MANIFEST)


def test_names_that_occur_twice(folder: Path) -> None:
    rewrite(folder, lambda m: m["files"].append(m["files"][0]))
    with pytest.raises(BadInputError, match="listed twice"):
        verify_output(folder)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"tensors": {', '"tensors": {}, "tensors": {'))
    with pytest.raises(BadInputError, match="a name occurs twice"):
        verify_output(folder)


def test_a_manifest_that_is_no_file_is_not_waited_for(folder: Path) -> None:
    import os

    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    with pytest.raises(BadInputError, match="is not a file"):
        verify_output(folder)


def test_a_monstrous_manifest_is_not_read(folder: Path) -> None:
    with (folder / MANIFEST).open("r+b") as stream:
        stream.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(UnsafeInputError, match="too large"):
        verify_output(folder)


def test_a_folder_that_the_manifest_names_is_looked_at_only_where_it_is_that_config(
    folder: Path, tmp_path: Path
) -> None:
    """Every file of it would be hashed, be it the root of the machine."""
    rewrite(folder, lambda m: m["job"]["given"].update(hf_config="/"))
    with pytest.raises(UsageError, match="config came from is gone"):
        _job(folder, read_manifest(folder) or {}, folder, None, ())
    (tmp_path / "config.json").write_text("{}")
    rewrite(folder, lambda m: m["job"]["given"].update(hf_config=str(tmp_path)))
    with pytest.raises(UsageError, match="holds another by now"):
        _job(folder, read_manifest(folder) or {}, folder, None, ())
    rewrite(folder, lambda m: m["job"]["given"].update(hf_config=str(folder.parent / "model")))
    shutil.copy(folder / "config.json", tmp_path / "aside.json")
    assert _job(folder, read_manifest(folder) or {}, folder, tmp_path, ()).hf_config == tmp_path


# --- a damaged output in the way of a conversion ---------------------------------------------------


def test_an_output_with_a_damaged_manifest_stays(
    checkpoints: dict[str, Made], folder: Path
) -> None:
    """Which of its files are streamconv's nobody knows any more."""
    (folder / MANIFEST).write_text("{")
    assert finished_output(folder, "0" * 32) is None
    with pytest.raises(OutputExistsError, match="cannot tell which job wrote"):
        refuse_others(folder, {"digest": "0" * 32}, overwrite=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputExistsError, match="is not known"):
        streamconv.convert(checkpoints["fsdp2"].source, folder, overwrite=True, sync=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- room ---------------------------------------------------------------------------------------

MANY = 3000


def _repeated(text: str, last: str = "1") -> str:
    return f"[{(text + ',') * MANY}{last}]"


@pytest.mark.parametrize(
    "text",
    [
        *map(_repeated, ["[]", "{}", '{"":0}', "1", "1000", "1.5", '"a"', '"abc"', "[1]", "null"]),
        _repeated('{"a":1,"b":2,"c":3,"d":4,"e":5,"f":6}'),
        '{"":' * 900 + "1" + "}" * 900,
        "[" * 900 + "]" * 900,
        "{" + ",".join(f'"k{k}":{k + 1000}' for k in range(MANY)) + "}",
        "[" + ",".join(f'"\\ud83d\\ude00{k}"' for k in range(MANY)) + "]",
        "[" + ",".join(f'"{k}é😀"' for k in range(MANY)) + "]",
        _repeated("9" * 4000),
    ],
    ids=lambda text: text[:12],
)
def test_what_a_text_takes_at_most_is_told_before(text: str) -> None:
    raw = text.encode()
    told = parsed_bytes(io.BytesIO(raw), len(raw))
    tracemalloc.start()
    try:
        json.loads(raw.decode() + " ")
        peak = tracemalloc.get_traced_memory()[1] + len(raw)
    finally:
        tracemalloc.stop()
    assert peak <= told + 20_000  # what a parser takes for itself


def test_a_config_that_the_budget_has_no_room_for_is_not_parsed(folder: Path) -> None:
    (folder / "config.json").write_text("[" + "{}," * 3_000_000 + "1]")
    for options in ({}, {"reference": folder}):
        with pytest.raises(BudgetError, match="too small for what manifest") as caught:
            streamconv.verify(folder, max_mem="800MB", **options)
        assert "--max-mem" in (caught.value.hint or "")


def test_without_entries_it_still_names_every_tensor(folder: Path) -> None:
    whole = read_manifest(folder)
    short = read_manifest(folder, entries=False)
    assert whole is not None
    assert short == whole | {"tensors": dict.fromkeys(whole["tensors"])}
    entry = next(iter(whole["tensors"].values()))
    del entry["file"]
    (folder / MANIFEST).write_text(json.dumps(whole))
    with pytest.raises(BadInputError, match="not one that streamconv writes"):
        read_manifest(folder, entries=False)
