"""``--overwrite`` replaces a former output, and of what else lies in its folder nothing."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import streamconv
from scripts.outputs import MANIFEST, contents
from streamconv.errors import OutputExistsError
from streamconv.options import Event, Phase, ignore_event
from streamconv.output import publication, staging

pytestmark = pytest.mark.usefixtures("planned_here")
TOKENS = {"tokenizer.json": "{}", "additional_chat_templates/tool.jinja": "{{ x }}"}


@pytest.fixture
def source(tmp_path: Path, lone_rank_file: Path) -> Path:
    folder = tmp_path / "actor"
    for name, text in TOKENS.items():
        (folder / "huggingface" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "huggingface" / name).write_text(text)
    shutil.copy(lone_rank_file, folder)
    return folder


def convert(source: Path, out: Path, dtype: str, on_event=ignore_event) -> streamconv.Result:
    return streamconv.convert(
        source, out, dtype=dtype, overwrite=True, sync=False, on_event=on_event
    )


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """A former output, of another job than the one that follows."""
    convert(source, tmp_path / "place" / "out", "float32")
    return tmp_path / "place" / "out"


def tree(folder: Path) -> dict[str, object]:
    return {
        p.relative_to(folder).as_posix(): str(p.readlink())
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in folder.rglob("*")
    }


def retrained(out: Path) -> None:
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (out / "model.safetensors").write_bytes(raw)


def edited_long_ago(out: Path) -> None:
    """Of the same size, and with the time of the file that it replaced."""
    status = (out / "tokenizer.json").stat()
    (out / "tokenizer.json").write_text("[]")
    os.utime(out / "tokenizer.json", ns=(status.st_atime_ns, status.st_mtime_ns))


def moved_elsewhere(out: Path) -> None:
    (out / "model.safetensors").rename(out.parent / "weights")
    (out / "model.safetensors").symlink_to(out.parent / "weights")


def repository(out: Path) -> None:
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref: refs/heads/main")


OTHERS: dict[str, Callable[[Path], object]] = {
    "README.md": lambda out: (out / "README.md").write_text("my model"),
    ".git/": repository,
    ".env": lambda out: (out / ".env").write_text("KEY=1"),
    "checkpoint-10/": lambda out: shutil.copytree(out, out.parent / "x").rename(
        out / "checkpoint-10"
    ),
    "empty/": lambda out: (out / "empty").mkdir(),
    "link": lambda out: (out / "link").symlink_to("nowhere"),
    "pipe": lambda out: os.mkfifo(out / "pipe"),
    "additional_chat_templates/mine.jinja": lambda out: (
        out / "additional_chat_templates/mine.jinja"
    ).touch(),
    "model.safetensors": retrained,
    "tokenizer.json": edited_long_ago,
    "model.safetensors ": moved_elsewhere,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_was_added_or_changed_is_named_and_stays(name, source, out):
    OTHERS[name](out)
    before = tree(out.parent)
    with pytest.raises(OutputExistsError, match=r"did not write|were changed") as caught:
        convert(source, out, "bfloat16")
    assert caught.value.exit_code == 8
    assert caught.value.found == name.strip()
    assert tree(out.parent) == before


def test_much_is_counted(source, out):
    for k in range(9):
        (out / f"notes-{k}").touch()
    with pytest.raises(OutputExistsError) as caught:
        convert(source, out, "bfloat16")
    assert caught.value.found == "notes-0, notes-1, notes-2 and 6 more"


def test_a_model_that_streamconv_did_not_make_stays(source, out):
    (out / MANIFEST).unlink()
    (out / "config.json").write_text("{}")
    before = tree(out)
    with pytest.raises(OutputExistsError, match="did not write"):
        convert(source, out, "bfloat16")
    assert tree(out) == before


def test_an_output_that_was_copied_or_lost_a_file_is_replaced(source, out, tmp_path):
    copy = shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copyfile)
    (copy / "tokenizer.json").unlink()
    convert(source, copy, "bfloat16")
    assert streamconv.verify(copy).passed
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("swappable", [True, False])
def test_what_appears_meanwhile_stays(swappable, source, out, monkeypatch):
    if not swappable:
        monkeypatch.setattr(publication, "_swapped", lambda *_: False)
    before = contents(out)

    def add(event: Event) -> None:
        if event == Phase("publish"):
            (out / "late.txt").write_text("important")

    with pytest.raises(OutputExistsError, match="did not write"):
        convert(source, out, "bfloat16", on_event=add)
    (out / "late.txt").unlink()
    assert contents(out) == before
    assert convert(source, out, "bfloat16").reused_bytes > 0
    assert streamconv.verify(out).passed


def test_what_appears_at_the_very_moment_is_kept(source, out, monkeypatch):
    swapped = publication._swapped

    def add_first(new: Path, old: Path) -> bool:
        (old / "late.txt").write_text("important")
        return swapped(new, old)

    monkeypatch.setattr(publication, "_swapped", add_first)
    (notice,) = [n for n in convert(source, out, "bfloat16").notices if "replaced" in n]
    kept = out.with_name("out.replaced-1")
    assert str(kept) in notice
    assert tree(kept) == {"late.txt": b"important"}
    assert streamconv.verify(out).passed


# --- stopped while the new output takes the old one's place ----------------------------------------


class Stopped(BaseException):
    """What a kill leaves undone is left undone by this, too."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Stop before the ``step``-th change of a name while the new output is put in its place."""
    count = -1

    def counting(name: str) -> None:
        change = getattr(Path, name)

        def counted(self: Path, *args, **kwargs):
            nonlocal count
            if publishing and (count := count + 1) >= step:
                raise Stopped
            return change(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, counted)

    publishing: list[bool] = []
    publish = staging.Staging.publish

    def begin(self: staging.Staging, **options) -> Path | None:
        publishing.append(True)
        try:
            return publish(self, **options)
        finally:
            publishing.clear()  # the lock is given back whatever happens

    monkeypatch.setattr(staging.Staging, "publish", begin)
    for name in ("unlink", "rename", "replace", "rmdir"):
        counting(name)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)


def without_swap(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(publication, "_swapped", lambda *_: False)


def as_a_mount(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(staging, "_can_be_swapped", lambda _: False)


def across_mounts(patch: pytest.MonkeyPatch) -> None:
    """The staging folder is on another mount than the target: nothing can be renamed into it."""
    without_swap(patch)
    replace = Path.replace

    def refusing(self: Path, target: Path) -> Path:
        if "files" in self.parts:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(self, target)

    patch.setattr(Path, "replace", refusing)


def holds(folders: Iterable[Path], wanted: dict[str, bytes]) -> bool:
    """Whether every file of an output lies in one of the folders."""
    there = [tree(folder) for folder in folders if folder.is_dir()]
    names = wanted.keys() - {MANIFEST}
    return all(any(t.get(n) == wanted[n] for t in there) for n in names)


@pytest.mark.parametrize("place", [None, without_swap, as_a_mount, across_mounts])
@pytest.mark.parametrize("then", ["bfloat16", "float16"])
def test_stopped_anywhere_one_output_is_whole_and_the_next_command_heals(
    then, place, source, out, tmp_path, monkeypatch
):
    """The same command again, and another job's."""
    wanted = {}
    for dtype in ("float32", "bfloat16", "float16"):
        convert(source, tmp_path / dtype, dtype)
        wanted[dtype] = contents(tmp_path / dtype)
    for step in range(100):
        with monkeypatch.context() as patch:
            if place is not None:
                place(patch)
            stop_at(patch, step)
            try:
                convert(source, out, "bfloat16")
            except Stopped:
                pass
            else:
                break
        staged = out.parent / ".out.streamconv/files", out / ".streamconv/files"
        assert (
            holds([out], wanted["float32"])
            or holds(staged, wanted["float32"])
            or holds([out, *staged], wanted["bfloat16"])
        ), step
        with monkeypatch.context() as patch:
            if place is not None:
                place(patch)
            convert(source, out, then)
        assert contents(out) == wanted[then], step
        assert [p.name for p in out.parent.iterdir()] == ["out"], step
        convert(source, out, "float32")
    assert step >= (3 if place is None else 9)


def test_what_lies_in_the_way_of_a_half_moved_output_is_named(source, out, monkeypatch):
    with monkeypatch.context() as patch:
        without_swap(patch)
        stop_at(patch, 7)
        with pytest.raises(Stopped):
            convert(source, out, "bfloat16")
    assert not (out / "model.safetensors").exists()
    (out / "model.safetensors").write_text("mine")
    with pytest.raises(OutputExistsError, match="lies where a file of the output goes"):
        convert(source, out, "bfloat16")
    assert (out / "model.safetensors").read_text() == "mine"
    (out / "model.safetensors").unlink()
    convert(source, out, "bfloat16")
    assert streamconv.verify(out).passed


def test_over_the_lower_layer_of_an_overlay(source, out, tmp_path):
    """Where neither a folder nor two can be renamed: what a container's image holds."""
    lower, merged = out.parent, tmp_path / "merged"
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    layers = f"lowerdir={lower},upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mount = ["mount", "-t", "overlay", "overlay", "-o", layers, str(merged)]
    command = [sys.executable, "-m", "streamconv", "convert", str(source), str(merged / "out")]
    script = '"${@:1:7}" && exec "${@:8}"'

    def inside(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["unshare", "-m", "bash", "-c", script, "bash", *mount, *command, *options],
            capture_output=True,
            text=True,
        )

    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-m", *mount], capture_output=True).returncode
    ):
        pytest.skip("no overlay can be mounted here")
    done = inside("--dtype", "bfloat16", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in inside("--dtype", "bfloat16").stdout
    assert not (lower / ".out.streamconv").exists()
    upper = tmp_path / "upper" / "out"
    assert streamconv.verify(upper).passed


@pytest.mark.parametrize("what", ["another user's", "planted", "changed"])
def test_a_half_moved_output_is_finished_by_who_began_it_alone(what, source, out, monkeypatch):
    """Nobody's files get in, and nothing is lost where that cannot be shown."""
    with monkeypatch.context() as patch:
        without_swap(patch)
        stop_at(patch, 7)
        with pytest.raises(Stopped):
            convert(source, out, "bfloat16")
    staged = out.parent / ".out.streamconv"
    if what == "another user's":
        monkeypatch.setenv("XDG_STATE_HOME", str(out.parent.parent / "elsewhere"))
    elif what == "planted":
        record = (staged / publication.RECORD).read_text()
        victim = out.parent / "victim"
        victim.touch()
        (staged / publication.RECORD).write_text(record.replace('"last": "', '"last": "../'))
    else:
        raw = bytearray((staged / "files/model.safetensors").read_bytes())
        raw[-1] ^= 1
        (staged / "files/model.safetensors").write_bytes(raw)
    before = tree(out.parent)
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(OutputExistsError, match=r"nothing shows|is not as the run") as caught:
            convert(source, out, dtype)
        assert str(staged / "files") in (caught.value.hint or "")
        assert tree(out.parent) == before


@pytest.mark.parametrize("mode", [0o700, 0o2770])
def test_who_may_use_the_folder_stays_as_it_was(mode, source, out):
    """A private model must not become everybody's, nor a shared one its writer's alone."""
    out.chmod(mode)
    convert(source, out, "bfloat16")
    assert out.stat().st_mode & 0o7777 == mode
