"""Operates batches for longer than any test: thousands of rounds beside training that goes on.

Two runs write, rotate, go back, write anew, move and lose their trackers, with clocks that are wrong by
minutes. One to three batches with options of all kinds work on them at once; disks fill, processes are
killed, hooks fail. After each round, by a model of its own and not by streamconv's words:

* whatever was whole is still there, as a whole source or as an output with its very bytes, unless
  training itself took it, or retention was asked to remove it and its rule says so;
* a step to train on is there, and nothing was deleted under the hands of training;
* every published output is a model that was trained, under its own name;
* other people's files are as they were; every end has an exit code of ours and no traceback;
* a hook ran for each output, or is still due.

A unit is a round. ``--seed`` repeats what was tried, not when processes happened to meet.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from scripts.campaigns import forked
from scripts.campaigns.common import WORKERS, Figures, main
from scripts.campaigns.operation_checks import (
    Batch,
    Look,
    Scene,
    check,
    check_end,
    check_hooks,
    outputs_below,
)
from scripts.campaigns.training import Training, template

_ROUNDS_A_SCENE = 20
_HANG_SECONDS = 60.0
_HOOKS = {
    "plain": "true",
    "fails at first": 'test "$STREAMCONV_HOOK_ATTEMPT" -ge 2',
    "talks": "head -c 300000 /dev/zero >&2",
    "leaves a child": "(sleep 1 &)",
    "dies": "kill -9 $$",
}


def operation(work: Path, count: int, seed: int) -> Figures:
    """Play scenes of twenty rounds until there were ``count``, in two processes."""
    template(work)
    forked.prepare()
    scenes = max(1, count // _ROUNDS_A_SCENE)
    total = Figures()
    context = get_context("fork")
    results: Any = context.SimpleQueue()
    players = [
        context.Process(target=_play_all, args=(work, range(k, scenes, WORKERS), seed, results))
        for k in range(min(WORKERS, scenes))
    ]
    for player in players:
        player.start()
    for _ in range(scenes):
        counts, breaches = results.get()
        total.counts.update(counts)
        total.breaches += breaches
        if breaches and len(total.breaches) > 200:
            break
    for player in players:
        player.terminate() if len(total.breaches) > 200 else player.join()
    return total


def _play_all(work: Path, numbers: range, seed: int, results: Any) -> None:
    forked.prepare()
    for number in numbers:
        figures = Figures()
        try:
            _play(work / f"scene-{number}", seed, number, figures)
        except Exception as error:  # noqa: BLE001 - a fault of the campaign's is a breach, too
            import traceback

            figures.breach(f"seed {seed} scene {number}: {error!r} {traceback.format_exc()[-700:]}")
        results.put((dict(figures.counts), figures.breaches))


def _play(folder: Path, seed: int, number: int, figures: Figures) -> None:
    dice = random.Random(f"{seed}/{number}")
    folder.mkdir()
    scene = Scene(folder, dice, f"seed {seed} scene {number}", figures)
    small_disk = dice.random() < 0.25 and _mounted(folder, dice.choice((60, 200, 400)))
    try:
        _set_up(scene)
        keep = _keep(dice)
        template_name = dice.choice([None, None, "{run}-{step}-{model}", "{model}/{step_dir}"])
        hook = dice.choice([None, *_HOOKS])
        for k in range(_ROUNDS_A_SCENE):
            scene.number = k
            _round(scene, keep, template_name, hook, small_disk=small_disk)
            figures.add("rounds")
            if len(figures.breaches) > 3:
                return
        if not small_disk:
            _settle(scene, keep, template_name, hook)
    finally:
        forked.end_all()
        if small_disk:
            subprocess.run(["umount", "-l", str(folder / "disk")], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _mounted(folder: Path, kilobytes: int) -> bool:
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _set_up(scene: Scene) -> None:
    dice, folder = scene.dice, scene.folder
    base = template(folder.parent)
    (folder / "disk").mkdir(exist_ok=True)
    shared = dice.random() < 0.2
    for name in ("red", "blue")[: dice.choice((1, 2, 2))]:
        root = folder / "runs" / name
        root.mkdir(parents=True)
        skew = dice.choice((0, 0, -600, -60, 60, 600))
        run = Training(name, root, base, random.Random(dice.random()), dice.random() < 0.3, skew)
        scene.runs.append(run)
        scene.outs.append(folder / "disk" / ("out" if shared else f"out-{name}"))
        scene.bystanders[root / "notes.txt"] = b"mine"
    scene.bystanders[folder / "runs" / "other.txt"] = b"mine too"
    for out in set(scene.outs):
        out.mkdir(parents=True)
        scene.bystanders[out / "README.md"] = b"about these models"
        scene.bystanders[out / "mine" / "model.safetensors"] = b"not made here"
    for path, content in scene.bystanders.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def _keep(dice: random.Random) -> tuple[int | None, int | None]:
    return dice.choice([(None, None), (1, None), (2, None), (3, None), (1, 30), (None, 20)])


def _round(
    scene: Scene,
    keep: tuple[int | None, int | None],
    name: str | None,
    hook: str | None,
    *,
    small_disk: bool,
) -> None:
    dice = scene.dice
    scene.clock += dice.choice((0, 1, 7, 100, 4000))
    _users(scene)
    for run in scene.runs:
        for _ in range(dice.randint(0, 2)):
            for _ in run.acts():
                pass
        if dice.random() < 0.04:
            _move(scene, run)
    before = Look.at(scene)
    scene.story.append(
        f"== {scene.number} clock {scene.clock}, sources {sorted(map(repr, before.sources))}"
        f"\n   outputs {sorted(map(repr, before.outputs.items()))}"
    )
    batches = [_batch(scene, keep, name, hook) for _ in range(dice.choice((1, 1, 1, 2, 2, 3)))]
    acting = [run.acts() for run in scene.runs if dice.random() < 0.4]
    most = dice.choice((None, None, None, None, None, 700, 3000)) if not small_disk else None
    kills = sorted(dice.uniform(0, 0.5) for _ in range(dice.choice((0, 0, 0, 1, 2))))
    for batch in batches:
        _start(scene, batch, most)
        scene.figures.add("batches")
    _watch(scene, batches, acting, kills)
    for acts in acting:
        for _ in acts:
            pass
    for batch in batches:
        check_end(scene, batch)
    if dice.random() < 0.7:
        forked.end_all()  # else hooks that were left behind go on
    if most is None and not small_disk and hook is not None:
        check_hooks(scene)
    check(scene, before, batches)


def _move(scene: Scene, run: Training) -> None:
    old = run.root
    run.move()
    scene.moved(old, run.root)


def _users(scene: Scene) -> None:
    """What people do to outputs: move one away, edit one, flip a byte of one, move all of them."""
    dice = scene.dice
    if dice.random() > 0.12:
        return
    index = dice.randrange(len(scene.outs))
    out = scene.outs[index]
    outputs = [path for path, _ in outputs_below(out)]
    what = dice.choice(("away", "edit", "flip", "move"))
    if what == "move":
        new = out.with_name(f"{out.name.partition('~')[0]}~{scene.number}")
        out.rename(new)
        scene.outs = [new if o == out else o for o in scene.outs]
        scene.moved(out, new)
    elif outputs:
        path = dice.choice(outputs)
        weights = path / "model.safetensors"
        if what == "away":
            away = scene.folder / f"away-{scene.number}"
            shutil.move(path, away)
            scene.moved(path, away)
        elif what == "edit":
            with contextlib.suppress(OSError):
                (path / "mine.txt").write_bytes(b"a note")
                scene.bystanders[path / "mine.txt"] = b"a note"
        else:
            times = weights.stat()
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            with weights.open("r+b") as stream:
                stream.write(data)
            os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))


def _batch(
    scene: Scene, keep: tuple[int | None, int | None], name: str | None, hook: str | None
) -> Batch:
    dice = scene.dice
    index = dice.randrange(len(scene.runs))
    run, out = scene.runs[index], scene.outs[index]
    if dice.random() < 0.03:
        keep = _keep(dice)
    if len(set(scene.outs)) < len(scene.outs) and dice.random() < 0.9:
        name = name or "{run}-{step}-{model}"
    options = ["--settle", "5s", "--max-mem", "16GB", "--no-sync"]
    for option, chance in (
        ("--apply", 0.6),
        ("--delete-sources", 0.5),
        ("--verify", 0.7),
        ("--pin", 0.3),
        ("--overwrite", 0.5),
    ):
        options += [option] if dice.random() < chance else []
    options += ["--jobs", str(dice.choice((1, 2, 3)))]
    last, every = keep
    options += ["--keep-last", str(last)] if last else []
    options += ["--keep-every", str(every)] if every else []
    if dice.random() < 0.1:
        options += ["--model", "actor"]
    if dice.random() < 0.05:
        name = dice.choice([None, "{step}/{model}", "{step_dir}"])
    options += ["--name", name] if name else []
    if len(set(scene.outs)) < len(scene.outs) and "{run}" not in (name or ""):
        # Two runs under one name: to replace the other's is what was asked for then.
        options = [option for option in options if option != "--overwrite"]
    if hook is not None:
        options += ["--on-done", _hook(scene, hook), "--hook-limit", "20s"]
    if dice.random() < 0.2:
        options += ["--report", str(scene.folder / "report.html")]
    if dice.random() < 0.2:
        options += ["--prometheus", str(scene.folder / "metrics.prom")]
    return Batch(run, out, options, last, every)


def _hook(scene: Scene, hook: str) -> str:
    log = scene.folder / "hooks.log"
    return f'{_HOOKS[hook]} && echo "$STREAMCONV_STATE $STREAMCONV_NAME" >> "{log}"'


def _start(scene: Scene, batch: Batch, most_bytes: int | None) -> None:
    clock = scene.clock

    def wind() -> None:
        """Let the clock that nobody sets go on by minutes between two rounds."""
        from streamconv.batch import leases, survey

        real = leases.boot_clock

        def boot_clock() -> tuple[str, float]:
            boot, seconds = real()
            return boot, seconds + clock

        survey.boot_clock = boot_clock  # type: ignore[assignment]

    batch.said = scene.folder / f"said-{scene.dice.getrandbits(40):x}"
    arguments = ["batch", str(batch.run.root), str(batch.out), *batch.options]
    batch.pid = forked.start(arguments, batch.said, most_bytes=most_bytes, before=wind)


def _watch(
    scene: Scene, batches: list[Batch], acting: list[Iterator[None]], kills: list[float]
) -> None:
    """Wait for the ends, while training goes on and processes are killed."""
    began = time.monotonic()
    while any(b.code is None for b in batches):
        time.sleep(0.004)
        for acts in acting:
            if scene.dice.random() < 0.3:
                next(acts, None)
        now = time.monotonic() - began
        if kills and now > kills[0]:
            kills.pop(0)
            alive = [b.pid for b in batches if b.code is None]
            everybody = [*alive, *(d for pid in alive for d in forked.descendants(pid))]
            with contextlib.suppress(ProcessLookupError):
                how = scene.dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
                os.kill(scene.dice.choice(everybody), how)
                scene.figures.add("kills")
        if now > _HANG_SECONDS:
            scene.breach("a batch hangs")
            for batch in batches:
                if batch.code is None:
                    os.kill(batch.pid, signal.SIGKILL)
            began = time.monotonic()
        for batch in batches:
            if batch.code is None:
                pid, status = os.waitpid(batch.pid, os.WNOHANG)
                if pid:
                    batch.code = os.waitstatus_to_exitcode(status)


def _what_is_known(run: Training, out: Path) -> list[str]:
    """Return what a rule of retention decides by, for whoever reads the story of a breach."""
    lines = [path.read_text() for path in (out / ".streamconv-batch" / "jobs").glob("*.json")]
    lines += [f"{path}: {path.stat()}" for path in sorted(run.root.rglob("*")) if path.is_file()]
    return [*lines, f"order {run.order}", f"broken {run.broken}"]


def _settle(
    scene: Scene, keep: tuple[int | None, int | None], name: str | None, hook: str | None
) -> None:
    """At rest, every step that is whole becomes an output, its own; those that are kept, at least."""
    scene.number = _ROUNDS_A_SCENE
    if len(set(scene.outs)) < len(scene.outs):
        return  # names may clash, as they were let
    for path, item in Look.at(scene).outputs.items():
        if item is None or path / "mine.txt" in scene.bystanders:
            shutil.rmtree(path)  # changed by hand: nobody but its owner removes it
            scene.bystanders.pop(path / "mine.txt", None)
    for run, out in zip(scene.runs, scene.outs, strict=True):
        for _ in range(2):
            scene.clock += 9000
            last, every = keep
            options = ["--settle", "5s", "--max-mem", "16GB", "--no-sync", "--overwrite"]
            options += ["--keep-last", str(last)] if last else []
            options += ["--keep-every", str(every)] if every else []
            options += ["--name", name] if name else []
            if hook is not None:
                options += ["--on-done", _hook(scene, hook)]
            batch = Batch(run, out, options, last, every)
            _start(scene, batch, None)
            _watch(scene, [batch], [], [])
            said = check_end(scene, batch)
        look = Look.at(scene)
        wanted = {i for i in look.weights if i.run == run.name}
        if last or every:
            # What was written last, where its times agree.
            tops = (
                {max(wanted, key=run.order.__getitem__), max(wanted, key=run.written)}
                if wanted
                else ()
            )
            wanted = set(tops) if last and len(tops) == 1 else set()
        if "would be put into another one" in said:
            continue  # as another --name had it
        for item in wanted - set(look.outputs.values()):
            scene.story += _what_is_known(run, out)
            scene.breach(f"at rest {item} has no output: {batch.code} {said[-600:]}")


if __name__ == "__main__":
    main(operation, count=5000)
