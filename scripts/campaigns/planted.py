"""Staging folders, journals, locks, plans and manifests of a stranger: nothing foreign gets in.

Every form is one folder as it may come in the archive of a checkpoint: a staging folder beside or
inside the target, genuine and then changed, made by another user's run, or made by hand with every
checksum fitting; a lock; a plan that is run; a manifest in the target. The next command ends with the
right output, or with a clear refusal (5, 6, 8 or 11); no file outside of the output is made or changed,
and what no run of ours wrote is not removed unless it was named. All forms are tried in process, COUNT
of them through the command as well.

A whole output under its own name is no form: its manifest says whose job it is, and whether its bytes
are those of the source only ``verify --source`` says.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from scripts.campaigns.common import Figures, is_complete, main, run
from scripts.makers.tiny import make_tiny
from scripts.outputs import contents
from streamconv import api
from streamconv.conversion import execution, job
from streamconv.errors import StreamconvError
from streamconv.options import RunOptions
from streamconv.planning import child

_JOB: dict[str, Any] = {"layout": "memory", "max_shard_size": 120}
_FLAGS = ("--layout", "memory", "--max-shard-size", "120", "--no-sync", "--json")
_REFUSED = (5, 6, 8, 11)
_EVIL = "EVIL"
_NAMES = (
    "../evil.json", "../../evil.json", "/tmp/streamconv-evil.json", "a/../../evil.json", "./evil.json",
    "a//evil.json", ".git/evil.json", "evil\0.json", "", "..", "streamconv.json", "evil.json/", 7, None,
    "a" * 300 + ".json", "\ud800.json", ["evil.json"],
)  # fmt: skip
_NUMBERS = (-1, 1 << 63, 1 << 70, 1.5, "7", True, None, [], float("nan"), {})
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Form:
    """``base`` is what the folder is made from, ``change`` what a stranger then does to it."""

    name: str
    base: str
    change: Change
    inside: bool = False


@dataclass(frozen=True)
class Scene:
    """The same folder for all forms: seals are those of a path."""

    place: Path
    source: Path
    bases: Path
    expected: dict[str, bytes]


def campaign(work: Path, count: int, seed: int) -> Figures:
    # As the child does it, but here.
    ask = child._ask
    child._ask = lambda request, **_: child._TASKS[request["task"]](request)
    scene = _prepare(work)
    forms = list(_forms())
    figures = Figures()
    figures.add("forms", len(forms))
    for form in forms:
        figures.merge(_try(scene, form, partial(_here, scene)))
    child._ask = ask
    for form in random.Random(seed).sample(forms, min(count, len(forms))):
        figures.merge(_try(scene, form, partial(_by_command, scene)))
    return figures


def _prepare(work: Path) -> Scene:
    bases, place = work / "bases", work / "place"
    source = make_tiny(work / "source", "fsdp")
    other = make_tiny(work / "other", "fsdp", salt=_EVIL)
    bases.mkdir()
    api.convert(source, work / "clean", sync=False, **_JOB)
    for name, checkpoint, state in (
        ("ours", source, "my-state"),
        ("another job of ours", other, "my-state"),
        ("a stranger's", other, "state-of-a-stranger"),
    ):
        for inside in (False, True):
            os.environ["XDG_STATE_HOME"] = str(work / state)
            place.mkdir()
            if inside:
                (place / "out").mkdir()
            _stop(checkpoint, place / "out")
            place.rename(bases / f"{name}{inside}")
    os.environ["XDG_STATE_HOME"] = str(work / "my-state")
    plan = bases / "plan"
    plan.mkdir()
    api.plan(source, output=plan / "plan.jsonl", **_JOB)
    for inside in (False, True):
        (bases / f"nothing{inside}").mkdir()
        shutil.copytree(plan, bases / f"plan{inside}")
    shutil.copytree(work / "clean", bases / "outputFalse" / "out")
    return Scene(place, source, bases, contents(work / "clean"))


def _stop(source: Path, out: Path) -> None:
    """Stop a conversion after three files."""
    write, done = execution.write_output, []

    def stopping(output: Any, *args: Any, **kwargs: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(output.name)
        return write(output, *args, **kwargs)

    execution.write_output = stopping
    try:
        api.convert(source, out, sync=False, **_JOB)
    except KeyboardInterrupt:
        pass
    finally:
        execution.write_output = write


_OURS = ("plan.jsonl", "journal.jsonl", "done", "done/{1}.json", "files/{1}", "{4}.part")

# --- what is tried -----------------------------------------------------------------------------


def _forms() -> Iterator[Form]:
    for base in ("ours", "another job of ours", "a stranger's"):
        for inside in (False, True):
            yield Form("as it is", base, lambda _: None, inside)
            yield Form("as the job that is asked for", base, _relabelled, inside)
            for name, change in _journals():
                yield Form(name, base, change, inside)
            for name in ("", "files", *_OURS):
                for kind in (
                    "link to a file",
                    "link to a folder",
                    "link to nowhere",
                    "pipe",
                    "folder",
                ):
                    yield Form(
                        f"{name or 'all'} is a {kind}", base, partial(_odd, name, kind), inside
                    )
            for name in (n for n in _OURS if n != "done"):
                yield Form(f"{name} is a hard link", base, partial(_odd, name, "hard link"), inside)
            for name in ("files/modeling_evil.py", "files/EVIL.safetensors", "notes", "files/a/b"):
                yield Form(f"{name} is there, too", base, partial(_extra, name), inside)
    for number, name in enumerate(_NAMES):
        for kind in ("output", "side", "text"):
            change = partial(_named, kind, name)
            yield Form(f"staged plan, {kind} {number}", "a stranger's", change)
            yield Form(f"staged plan, {kind} {number}", "ours", change)
            yield Form(f"plan, {kind} {number}", "plan", change)
    for number, name in enumerate(_NAMES):
        for key in ("file", "path"):
            yield Form(f"plan, {key} {number}", "plan", partial(_path, key, name))
    for line, keys in _FIELDS.items():
        for key in keys:
            for number, value in enumerate(_NUMBERS):
                change = partial(_field, line, key, value)
                yield Form(f"plan, {line} {key} {number}", "plan", change)
    for name, change in _plans():
        yield Form(f"plan, {name}", "plan", change)
    for kind in ("link to a file", "link to nowhere", "pipe", "folder", "hard link", "file"):
        yield Form(f"the lock is a {kind}", "nothing", partial(_lock, kind))
    for number, name in enumerate(_NAMES):
        yield Form(f"manifest, name {number}", "output", partial(_manifest, name))


def _staging(place: Path) -> Path:
    inside = place / "out" / ".streamconv"
    return inside if inside.exists() else place / ".out.streamconv"


def _file(place: Path, pattern: str) -> Path:
    names = [f"model-0000{k}-of-00004.safetensors" for k in range(5)]
    return _staging(place) / pattern.format(*names)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, lines: list[Any]) -> None:
    """Write a plan whose digest fits: it is no secret."""
    texts = [t if isinstance(t, str) else json.dumps(t, separators=(",", ":")) for t in lines[:-1]]
    digest = xxhash.xxh3_128()
    for text in texts[1:]:
        digest.update(text.encode() + b"\n")
    texts.append(json.dumps({"end": digest.hexdigest(), "lines": len(lines)}))
    path.write_text("\n".join(texts) + "\n")


def _plan(place: Path) -> Path:
    loose = place / "plan.jsonl"
    return loose if loose.exists() else _staging(place) / "plan.jsonl"


def _relabelled(place: Path) -> None:
    """The job that is asked for, with tensors of another."""
    wanted = _read(place.parent / "bases" / "plan" / "plan.jsonl")
    lines = _read(_plan(place))
    lines[0:2] = wanted[0:2]
    _write(_plan(place), lines)


def _journals() -> Iterator[tuple[str, Change]]:
    def edit(change: Callable[[list[bytes]], list[bytes]]) -> Change:
        def changed(place: Path) -> None:
            path = _staging(place) / "journal.jsonl"
            path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))

        return changed

    def evil_file(place: Path) -> None:
        path = _file(place, "files/{1}")
        data = bytearray(path.read_bytes())
        data[-4:] = b"EVIL"
        path.write_bytes(data)

    def evil_and_fitting(place: Path) -> None:
        path = _file(place, "files/{1}")
        before = xxhash.xxh3_128_hexdigest(path.read_bytes())
        evil_file(place)
        after = xxhash.xxh3_128_hexdigest(path.read_bytes())
        journal = _file(place, "done/{1}.json")
        journal.write_bytes(journal.read_bytes().replace(before.encode(), after.encode()))

    def swapped(place: Path) -> None:
        one, two = _file(place, "files/{2}"), _file(place, "files/{3}")
        data = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(data)

    def records_swapped(place: Path) -> None:
        """The bytes of two tensors change places, each with its own checksum."""
        lines = _read(_plan(place))
        sources = [x for x in lines if "source" in x]
        same = [x for x in sources if x["dtype"] == sources[0]["dtype"]]
        for key in ("keys", "starts", "crcs", "nbytes"):
            same[0][key], same[-1][key] = same[-1][key], same[0][key]
        _write(_plan(place), lines)

    def note(change: Callable[[bytes], bytes]) -> Change:
        def changed(place: Path) -> None:
            path = _file(place, "done/{1}.json")
            path.write_bytes(change(path.read_bytes()))

        return changed

    def notes_swapped(place: Path) -> None:
        one, two = _file(place, "done/{1}.json"), _file(place, "done/{2}.json")
        data = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(data)

    def note_of_another(place: Path) -> None:
        """Said of a file that is not finished: with the bytes that it has, and a genuine seal."""
        _file(place, "done/{4}.json").write_bytes(_file(place, "done/{1}.json").read_bytes())
        _file(place, "files/{4}").write_bytes(_file(place, "files/{1}").read_bytes())

    yield "the journal is gone", lambda p: (_staging(p) / "journal.jsonl").unlink()
    yield "the journal is empty", edit(lambda _: [])
    yield "the journal is noise", edit(lambda _: [os.urandom(500)])
    yield "the journal twice", edit(lambda x: [*x, *x])
    yield "the journal without its seal", edit(lambda x: [x[0].partition(b" ")[2]])
    yield "the journal with other choices", edit(lambda x: [x[0].replace(b"true", b"false")])
    yield "notes swapped", notes_swapped
    yield "a note of another file", note_of_another
    yield "a note is gone", lambda p: _file(p, "done/{1}.json").unlink()
    yield "a note is noise", note(lambda _: os.urandom(500))
    yield "a note without its seal", note(lambda x: x.partition(b" ")[2])
    yield "an edited note", note(lambda x: x.replace(b'"nbytes"', b'"nbytes" '))
    yield "a key twice", note(lambda x: x.replace(b'{"file"', b'{"file": 1, "file"'))
    yield "a finished file changed", evil_file
    yield "a finished file and its hash changed", evil_and_fitting
    yield "finished files swapped", swapped
    yield "two tensors swapped, checksums fitting", records_swapped


def _odd(name: str, kind: str, place: Path) -> None:
    path = _file(place, name) if name else _staging(place)
    victim = place.parent / "outside" / "victim"
    if kind == "hard link" and path.exists():
        os.link(path, place.parent / "outside" / "linked")
        return
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "link to a file":
        path.symlink_to(victim)
    elif kind == "link to a folder":
        path.symlink_to(victim.parent)
    elif kind == "link to nowhere":
        path.symlink_to(victim.parent / "made")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
        (path / "notes").write_text("precious")
    else:
        os.link(victim, path)


def _extra(name: str, place: Path) -> None:
    path = _staging(place) / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"precious {_EVIL}")


def _named(kind: str, name: Any, place: Path) -> None:
    lines = _read(_plan(place))
    at = next(k for k, x in enumerate(lines) if "output" in x)
    if kind == "output":
        lines[at]["output"] = name.replace(".json", ".safetensors") if type(name) is str else name
    elif kind == "side":
        victim = place.parent / "outside" / "victim"
        digest = xxhash.xxh3_128_hexdigest(victim.read_bytes())
        lines.insert(at, {"side": name, "path": str(victim), "nbytes": 8, "xxh3": digest})
    else:
        lines[at:at] = [{"text": name, "nbytes": 4}, {"piece": _EVIL}]
    _write(_plan(place), lines)


def _path(key: str, name: Any, place: Path) -> None:
    lines = _read(_plan(place))
    at = next(k for k, x in enumerate(lines) if "file" in x)
    if key == "file":
        lines[at]["file"] = name
    else:
        lines.insert(at + 3, {"side": "evil.json", "path": name, "nbytes": 8, "xxh3": "0" * 32})
    _write(_plan(place), lines)


_FIELDS = {
    "file": ("nbytes", "mtime_ns", "directory_hash", "entry_prefix", "index"),
    "output": ("nbytes", "tensors", "header"),
    "source": ("n", "files", "keys", "starts", "nbytes", "crcs", "header_nbytes", "dtype", "fqn"),
    "pattern": ("moves",),
    "tensor": ("dtype", "shape", "at", "sources", "pattern", "last"),
    "job": ("job",),
    "totals": ("totals",),
    "notices": ("notices",),
    "skipped": ("skipped",),
}


def _field(line: str, key: str, value: Any, place: Path) -> None:
    lines = _read(_plan(place))
    next(x for x in lines if line in x)[key] = value
    _write(_plan(place), lines)


def _plans() -> Iterator[tuple[str, Change]]:
    def edit(change: Callable[[list[Any]], None]) -> Change:
        def changed(place: Path) -> None:
            lines = _read(_plan(place))
            change(lines)
            _write(_plan(place), lines)

        return changed

    def the(lines: list[Any], key: str, number: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = [x for x in lines if key in x][number]
        return found

    def move(number: int, value: Any) -> Change:
        return edit(lambda x: the(x, "moves")["moves"][0].__setitem__(number, value))

    def twice(lines: list[Any]) -> None:
        at = next(k for k, x in enumerate(lines) if "tensor" in x)
        lines[at] = json.dumps(lines[at]).replace("{", '{"dtype": "I64", ', 1)

    yield "a key twice", edit(twice)
    yield "the job twice", edit(lambda x: x.insert(2, x[1]))
    yield "the job's digest", edit(lambda x: x[1]["job"].update(digest="0" * 32))
    yield "the job's source", edit(lambda x: x[1]["job"]["source"][0].__setitem__(0, "other.pt"))
    yield "no end of an array", edit(lambda x: x.insert(3, "[" * 100_000))
    yield "a line of noise", edit(lambda x: x.insert(-1, "noise"))
    yield (
        "an output twice",
        edit(lambda x: the(x, "output", 1).update(output=the(x, "output")["output"])),
    )
    yield "a tensor twice", edit(lambda x: x.insert(-1, the(x, "tensor", -1)))
    yield "a tensor left out", edit(lambda x: x.remove(the(x, "tensor", -1)))
    yield "tensors exchanged", edit(lambda x: the(x, "tensor").update(tensor="another.name"))
    yield (
        "a tied tensor of nothing",
        edit(lambda x: x.insert(-1, {**the(x, "tensor", -1), "tied": "t", "same_as": "no such"})),
    )
    for name, (number, value) in {
        "a source that there is not": (0, 7), "a piece that there is not": (1, 99),
        "past the end": (2, 1 << 20), "before the beginning": (2, -1), "past the record": (3, 1 << 40),
        "no dims": (4, []), "too many": (4, [[9, 1, 1], [9, 9, 9]]), "a step of zero": (4, [[0, 1, 1]]),
        "backwards": (4, [[2, -1, 1]]), "a cast to nothing": (5, [["cast", "X9"]]),
        "a cast that does not fit": (5, [["cast", "BF16"]]), "no such op": (5, [["exec", "x"]]),
        "a product of nothing": (5, [["product", 0, 0, 0, 0, 0, 0]]), "infinity": (5, [["add", 1e999]]),
    }.items():  # fmt: skip
        yield name, move(number, value)
    for name, old, new in (
        ("another name in the header", "embed", "embev"), ("another type in the header", "F32", "I32"),
        ("another place in the header", "[0,", "[8,"), ("more metadata", '"pt"', '"pt","a":"b"'),
        ("something behind the header", "}}", "}} x"),
    ):  # fmt: skip
        yield (
            name,
            edit(
                lambda x, old=old, new=new: the(x, "output").update(
                    header=the(x, "output")["header"].replace(old, new)
                )
            ),
        )


def _lock(kind: str, place: Path) -> None:
    path = place / ".out.streamconv.lock"
    victim = place.parent / "outside" / "victim"
    if kind == "link to a file":
        path.symlink_to(victim)
    elif kind == "link to nowhere":
        path.symlink_to(victim.parent / "made")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "hard link":
        os.link(victim, path)
    else:
        path.write_text("precious")


def _manifest(name: Any, place: Path) -> None:
    path = place / "out" / "streamconv.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["name"] = name
    path.write_text(json.dumps(manifest))


# --- how it is judged --------------------------------------------------------------------------


def _here(scene: Scene, command: str) -> tuple[int | None, str]:
    """Do the command in this process; return its exit code and what it said."""
    said: list[str] = []
    options = RunOptions(sync=False, on_event=lambda e: said.append(str(e)))
    try:
        if command == "run":
            job.run_plan(scene.place / "plan.jsonl", scene.place / "out", options)
        else:
            api.convert(
                scene.source, scene.place / "out", sync=False, on_event=options.on_event, **_JOB
            )
    except StreamconvError as error:
        return error.exit_code, str(error)
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        at = traceback.extract_tb(error.__traceback__)[-1]
        return None, f"{type(error).__name__}: {error} ({at.filename}:{at.lineno})"
    return 0, "\n".join(said)


def _by_command(scene: Scene, command: str) -> tuple[int | None, str]:
    out = scene.place / "out"
    if command == "run":
        done = run("run", scene.place / "plan.jsonl", out, "--no-sync", "--json")
    else:
        done = run("convert", scene.source, out, *_FLAGS)
    return (None if "Traceback" in done.stderr else done.code), done.stdout + done.stderr


def _tree(*folders: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            if path.is_symlink():
                found[str(path)] = str(path.readlink())
            elif path.is_file():
                found[str(path)] = path.read_bytes()
            else:
                found[str(path)] = None
    return found


def _try(scene: Scene, form: Form, convert: Callable[[str], tuple[int | None, str]]) -> Figures:
    figures = Figures()
    where = f"{form.base}{', inside' if form.inside else ''}: {form.name}"
    place, outside = scene.place, scene.place.parent / "outside"
    for folder in (place, outside):
        shutil.rmtree(folder, ignore_errors=True)
    outside.mkdir()
    (outside / "victim").write_bytes(b"precious")
    shutil.copytree(scene.bases / f"{form.base}{form.inside}", place, symlinks=True)
    form.change(place)
    around = (outside, scene.source, scene.bases)
    before, planted = _tree(*around), _tree(place)
    code, said = convert("run" if form.base == "plan" else "convert")
    evil = Path("/tmp/streamconv-evil.json")
    if _tree(*around) != before or evil.exists() or (place.parent / "evil.json").exists():
        figures.breach(f"{where}: something outside was made or changed")
    out = place / "out"
    whole = (out / "streamconv.json").is_file() and is_complete(out, scene.expected)
    if form.base == "plan":  # whose words are the user's; the weights are those of the source
        weights = [d for n, d in scene.expected.items() if n.endswith(".safetensors")]
        whole = all(p.read_bytes() in weights for p in out.rglob("*.safetensors"))
        whole &= not any(_EVIL.encode() in p.read_bytes() for p in out.rglob("*") if p.is_file())
    if code == 0:
        figures.add("right outputs")
        if not whole:
            figures.breach(f"{where}: exit code 0 and another output")
    elif code in _REFUSED:
        figures.add("refused by name")
        if str(place.parent) not in said and "where" not in said:
            figures.breach(f"{where}: does not say where: {said}")
        if form.base != "output" and any(out.glob("*.safetensors")):
            figures.breach(f"{where}: refused, and an output")
    else:
        figures.breach(f"{where}: exit code {code}, {said[-300:]}")
    for name, data in planted.items():
        lost = isinstance(data, bytes) and data.startswith(b"precious") and not Path(name).exists()
        if lost and ".part" not in name:
            figures.breach(f"{where}: {name} was removed")
    return figures


if __name__ == "__main__":
    main(campaign, count=40)
