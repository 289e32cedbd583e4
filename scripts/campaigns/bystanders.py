"""Other files in and around SRC, DST, report and plan paths: no command changes or deletes any.

COUNT commands (convert, run, plan, verify, inspect, doctor, batch, with all that makes them write),
eight in each scene, a quarter of them killed at a random moment. Between them files, folders, links,
hard links and pipes with likely and unlikely names are laid where the next command works, and files
that a command made are edited. After each command everything that streamconv did not make is what it
was, and what is new lies where the README says. Commands run in forks of one process, planning in the
same process; a batch has workers of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import random
import shutil
import signal
import stat
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from scripts.campaigns.common import Figures, main
from scripts.campaigns.inproc import each_number
from scripts.makers import runs
from streamconv import __main__
from streamconv.planning import child as planning

_COMMANDS_A_SCENE = 8
_HANG_SECONDS = 120.0
_DOCUMENTED = frozenset({0, 1, 2, 3, 4, 5, 6, 7, 8, 11})
_NAMES = (
    *("notes.txt", "README.md", ".env", "config.json", "streamconv.json", "model.safetensors"),
    *(
        "tokenizer.json",
        "report.html",
        "plan.jsonl",
        "plan.jsonl.part",
        "batch.prom",
        "status.json",
    ),
    *(
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        ".git",
        "out",
        "out.html",
    ),
    *(".out.streamconv", ".out.streamconv.lock", ".streamconv", ".streamconv.lock", "files"),
    *(".streamconv-batch", "journal.jsonl", "publishing.json", "out.replaced-1", "lost+found"),
    *(".report.html", "trash", ".actor.streamconv-deleted", "modeling_x.py", "gl\u00fc ck\n.txt"),
)

_LOADED = (
    *("cli.commands", "cli.progress", "cli.report", "conversion.job", "planning.build", "formats"),
    *(
        "report.conversion",
        "verification.source",
        "batch.cycle",
        "batch.overview",
        "environment.doctor",
    ),
    *("torchfile.rankfiles", "tracing.hf_names", "environment.doctor", "environment.forecast"),
)

Snapshot = dict[str, tuple[object, ...]]


@dataclass
class _Scene:
    """A run with a checkpoint, and the places that commands write to; ``ours`` is what they made."""

    root: Path
    rng: random.Random
    ours: set[str] = field(default_factory=set)

    @property
    def source(self) -> Path:
        return self.root / "run" / "global_step_1" / "actor"

    @property
    def out(self) -> Path:
        return self.root / "place" / "out"

    @property
    def batch(self) -> Path:
        return self.root / "models"

    @property
    def report(self) -> Path:
        return self.root / "pages" / "report.html"

    @property
    def plan(self) -> Path:
        return self.root / "plans" / "plan.jsonl"

    def look(self) -> Snapshot:
        return dict(_look(self.root))


def load(work: Path) -> None:
    """Load here, once, what commands need, and keep what they remember of this user in ``work``."""
    planning._ask = lambda request, **_: planning._TASKS[request["task"]](request)
    os.environ["XDG_STATE_HOME"] = str(work / "state")
    for module in _LOADED:
        importlib.import_module(f"streamconv.{module}")


def campaign(work: Path, count: int, seed: int) -> Figures:
    load(work)
    file = runs.rank_file(work / runs.RANK_FILE)
    trial = partial(_trial, file, seed)
    scenes = -(-count // _COMMANDS_A_SCENE)
    return each_number(work, scenes, trial, on_crash=_crashed, memory_bytes=8 << 30)


def _trial(file: Path, seed: int, folder: Path, number: int) -> Figures:
    signal.alarm(0)  # of the worker; its commands have a limit of their own
    rng, figures = random.Random(f"{seed}/{number}"), Figures()
    shutil.rmtree(folder)
    scene = _Scene(folder / "scene", rng)
    for place in (scene.source / "huggingface", scene.out.parent, scene.batch, scene.plan.parent):
        place.mkdir(parents=True)
    shutil.copy(file, scene.source)
    (scene.source / "huggingface" / "tokenizer.json").write_text("{}")
    runs.age(scene.source)
    if rng.random() < 0.5:
        command(["convert", scene.source, scene.out, "--no-sync"], None, folder / "words")
        scene.ours |= {name for name in scene.look() if name.startswith("place/")}
    for step in range(_COMMANDS_A_SCENE):
        for _ in range(rng.randint(0, 2)):
            _lay(scene, figures)
        before = scene.look()
        arguments = _arguments(scene)
        kill_after = rng.uniform(0, 0.15) if rng.random() < 0.25 else None
        code = command(arguments, kill_after, folder / "words")
        words = (folder / "words").read_text(errors="replace")
        where = f"scene {number}.{step}, {' '.join(map(str, arguments))}"
        figures.add("commands")
        figures.add("killed" if code == -signal.SIGKILL else "done" if code == 0 else "refused")
        if code != -signal.SIGKILL and (code not in _DOCUMENTED or "internal:" in words):
            figures.breach(f"{where}: code {code}, {words[-300:]}")
        _compare(scene, before, scene.look(), arguments, where, figures)
    return figures


def _arguments(scene: _Scene) -> list[object]:
    rng = scene.rng
    report = rng.choice(
        [scene.report, *_anything(scene), scene.out / "page.html", scene.source / "page.html"]
    )
    plan = rng.choice([scene.plan, scene.plan, *_anything(scene)])
    source = rng.choice([scene.source] * 6 + [scene.source.parent, scene.root / "run"])
    out = rng.choice([scene.out] * 6 + [scene.source, scene.root / "run", *_folders(scene)])
    overwrite = ["--overwrite"] * rng.randint(0, 1)
    dtype = ["--dtype", rng.choice(["keep", "bfloat16", "float16"])]
    reported = ["--report", report] if rng.random() < 0.5 else []
    kind = rng.choices(("convert", "run", "plan", "look", "batch"), weights=(10, 4, 4, 2, 1), k=1)[
        0
    ]
    if kind == "convert":
        return ["convert", source, out, *dtype, *overwrite, *reported, "--no-sync"]
    if kind == "run":
        return ["run", plan, out, *overwrite, "--no-sync"]
    if kind == "plan":
        return ["plan", source, *dtype, "-o", plan]
    if kind == "look":
        return rng.choice(
            [
                ["verify", out],
                ["verify", out, "--source", source],
                ["inspect", source],
                ["doctor", source, out],
                ["status", scene.batch],
            ]
        )
    prometheus = ["--prometheus", rng.choice([scene.root / "batch.prom", *_anything(scene)])]
    more = rng.sample([["--pin"], overwrite, prometheus, ["--keep-last", "1", "--apply"]], 2)
    flat = [word for words in more for word in words]
    return ["batch", scene.root / "run", scene.batch, *reported, *flat, "--no-sync"]


def _anything(scene: _Scene) -> list[Path]:
    """Two of all that is there, wherever it lies."""
    names = sorted(scene.look())
    return [scene.root / name for name in scene.rng.sample(names, min(2, len(names)))]


def _folders(scene: _Scene) -> list[Path]:
    found = [name for name, facts in sorted(scene.look().items()) if facts[0] == "folder"]
    return [scene.root / name for name in scene.rng.sample(found, min(1, len(found)))]


def _lay(scene: _Scene, figures: Figures) -> None:
    """Lay a file or something like it where commands work, or edit one of theirs."""
    rng = scene.rng
    mine = [n for n in sorted(scene.ours) if (scene.root / n).is_file()]
    if mine and rng.random() < 0.15:
        name = rng.choice(mine)
        # What is at work is streamconv's own, and a report or a plan is recognized by how it begins.
        if ".streamconv" not in name and (scene.root / name).is_relative_to(scene.out):
            with (scene.root / name).open("ab") as stream:
                stream.write(b"edited")
            scene.ours.discard(name)
            figures.add("edited")
        return
    places = [
        *([scene.out.parent, scene.out, scene.source, scene.source / "huggingface"] * 2),
        *(scene.source.parent, scene.root / "run", scene.plan.parent, scene.report.parent),
        *(scene.batch, scene.batch / "global_step_1", scene.root),
    ]
    place = rng.choice(places)
    # A folder that is not there is not made: that alone may keep a command from working.
    if not place.is_dir():
        return
    path = place / rng.choice(_NAMES)
    if os.path.lexists(path):
        return
    rng.choice((_file, _file, _file, _folder, _link, _hard_link, _pipe))(path, scene)
    figures.add("bystanders")


def _file(path: Path, scene: _Scene) -> None:
    path.write_bytes(scene.rng.randbytes(scene.rng.randint(1, 300)))


def _folder(path: Path, scene: _Scene) -> None:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / scene.rng.choice(_NAMES)).write_bytes(scene.rng.randbytes(20))
    (path / "HEAD").write_text("ref: refs/heads/main")


def _link(path: Path, scene: _Scene) -> None:
    path.symlink_to(scene.rng.choice([*_anything(scene), Path("nowhere"), Path()]))


def _hard_link(path: Path, scene: _Scene) -> None:
    files = [p for p in _anything(scene) if p.is_file() and not p.is_symlink()]
    # A second name of the lock, or of what is staged, makes it somebody else's.
    with contextlib.suppress(OSError):
        os.link(files[0] if files else scene.source / runs.RANK_FILE, path)


def _pipe(path: Path, _: _Scene) -> None:
    os.mkfifo(path)


def _look(root: Path) -> Iterable[tuple[str, tuple[object, ...]]]:
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            yield name, ("link", str(path.readlink()))
        elif stat.S_ISDIR(status.st_mode):
            yield name, ("folder", stat.S_IMODE(status.st_mode))
        elif stat.S_ISREG(status.st_mode):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            yield name, ("file", digest, status.st_mode, status.st_mtime_ns, status.st_ino)
        else:
            yield name, ("other", status.st_mode, status.st_ino)


def _compare(
    scene: _Scene,
    before: Snapshot,
    after: Snapshot,
    arguments: list[object],
    where: str,
    figures: Figures,
) -> None:
    for name, facts in before.items():
        if name in scene.ours:
            continue
        if name not in after:
            figures.breach(f"{where}: {name} is gone")
        # The folder of an output is another one after a swap, with the rights of a new one.
        elif after[name] != facts and not (facts[0] == "folder" == after[name][0]):
            figures.breach(f"{where}: {name} was changed: {facts[:2]} to {after[name][:2]}")
    new = after.keys() - before.keys()
    for name in sorted(new):
        if not _is_documented(scene, scene.root / name, arguments):
            figures.breach(f"{where}: {name} is new")
    scene.ours |= new
    scene.ours &= after.keys()


def _is_documented(scene: _Scene, path: Path, arguments: list[object]) -> bool:
    """Whether a command may have made ``path``."""
    command, *rest = arguments
    written = [Path(str(rest[k + 1])).resolve() for k, word in enumerate(rest[:-1])
               if word in ("--report", "-o", "--prometheus")]  # fmt: skip
    for place in written:
        part = path.parent == place.parent and path.name.startswith(".streamconv-")
        pages = path.is_relative_to(place.with_suffix("")) if command == "batch" else False
        if part or pages or path == place or path in place.parents:
            return True
    if command in ("convert", "run", "batch"):
        out = Path(str(rest[1])).resolve()
        beside = path.is_relative_to(out.parent) and (
            path.relative_to(out.parent).parts[0].startswith(f".{out.name}.streamconv")
        )
        if path.is_relative_to(out) or beside or path in out.parents:
            return True
    return command == "batch" and path.is_relative_to(scene.root / "run" / ".streamconv-batch")


def command(arguments: list[object], kill_after: float | None, words: Path) -> int:
    """Run a command in a fork; kill it after that many seconds. Returns its code, or minus a signal."""
    words.write_text("")
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            fd = os.open(words, os.O_WRONLY | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            code = __main__._run([str(argument) for argument in arguments])
        except BaseException:  # noqa: BLE001 - that is what is looked for
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + (_HANG_SECONDS if kill_after is None else kill_after)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if kill_after is not None else -signal.SIGALRM


def _crashed(number: int, signal_name: str) -> Figures:
    return Figures(breaches=[f"scene {number}: ended by {signal_name}"])


if __name__ == "__main__":
    main(campaign, count=1_200)
