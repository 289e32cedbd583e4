"""A file system that ignores case and swaps no folders: every promise kept, or a refusal says why.

COUNT outputs on NTFS (lowntfs-3g in a file; root, /dev/fuse and ntfs-3g are needed). To each checkpoint
come side files with random names, some alike but for case; the output is asked for under random
spellings, again, over a former one, and killed at a random moment. An output equals the one that the
same command makes on the ordinary disk, or names that are one there were refused before any weight
was written; and what streamconv did not write is as it was. Where nothing can be mounted, the line
says so, and the names are tried on a pretended file system.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

from scripts.campaigns import folding
from scripts.campaigns.bystanders import command, load
from scripts.campaigns.common import Figures, contents, main
from scripts.makers import runs
from streamconv.errors import BadInputError
from streamconv.files import namesakes

_NAMES = ("tokenizer.json", "vocab.txt", "notes.md", "modeling_x.py", "sub/inner.txt", "a.jinja")
_PRETENDED = 200


def campaign(work: Path, count: int, seed: int) -> Figures:
    load(work)
    figures = Figures()
    reason = folding.why_not()
    if reason is None:
        try:
            with folding.folding(work) as place:
                file = runs.rank_file(work / runs.RANK_FILE)
                trial = partial(_trial, file, work, place, seed)
                for number in range(count):
                    figures.merge(trial(number))
        except OSError as error:
            reason = str(error)
    if reason is not None:
        print(f"case_folding: {reason}", file=sys.stderr)
        figures.add("outputs, as no such file system can be mounted here", 0)
    figures.merge(_pretended(work, seed))
    return figures


def _respelled(name: str, rng: random.Random) -> str:
    return "".join(rng.choice((c.upper(), c.lower())) for c in name)


def _trial(file: Path, work: Path, place: Path, seed: int, number: int) -> Figures:
    rng, figures = random.Random(f"{seed}/{number}"), Figures()
    scene, there = work / "scene", place / f"t{number}"
    there.mkdir()
    side = scene / "actor" / "huggingface"
    side.mkdir(parents=True)
    shutil.copy(file, side.parent)
    names = rng.sample(_NAMES, rng.randint(1, 4))
    alike = rng.random() < 0.3
    if alike:
        names += [n for n in (_respelled(rng.choice(names), rng),) if n not in names]
    for name in names:
        (side / name).parent.mkdir(exist_ok=True)
        (side / name).write_text(name)
    one = len({n.casefold() for n in names}) < len(names)
    # A folder in two spellings is one folder there, and both of its files may be in it.
    (there / "Notes.txt").write_text("important")
    dtypes = rng.sample(["keep", "bfloat16", "float16"], 2)
    for k, dtype in enumerate([*dtypes, dtypes[1]]):
        out = there / (_respelled("out", rng) if k else "out")
        arguments = ["convert", side.parent, out, "--dtype", dtype, "--overwrite"]
        where = f"{number}.{k}, {names}, {' '.join(map(str, arguments))}"
        if rng.random() < 0.3:
            code = command([*arguments], rng.uniform(0, 0.2), work / "words")
            figures.add("killed" if code == -signal.SIGKILL else "not killed in time")
        code = command(arguments, None, work / "words")
        words = (work / "words").read_text()
        figures.add("outputs")
        if one:
            figures.add("refused for their names")
            if code != 5 or "for one" not in words or (there / "out").exists():
                figures.breach(f"{where}: code {code}, {words[-300:]}")
            continue
        expected = scene / f"expected-{dtype}"
        if not expected.exists():
            command(["convert", side.parent, expected, "--dtype", dtype], None, work / "words")
        if code != 0 or contents(there / "out") != contents(expected):
            figures.breach(f"{where}: code {code}, {words[-300:]}")
    if (there / "Notes.txt").read_text() != "important":
        figures.breach(f"{number}: a file beside the output was changed")
    left = sorted(p.name for p in there.iterdir() if p.name.lower() not in ("out", "notes.txt"))
    if left and not one:
        figures.breach(f"{number}: {left} left")
    shutil.rmtree(scene)
    shutil.rmtree(there)
    return figures


def _pretended(work: Path, seed: int) -> Figures:
    """Try names on a file system that is asked by names that are folded first."""
    figures, folder = Figures(), work / "pretended"
    folder.mkdir()
    exists = os.path.lexists
    for number in range(_PRETENDED):
        rng = random.Random(f"{seed}/{number}")
        names = rng.sample(_NAMES, rng.randint(1, 4))
        names += [_respelled(n, rng) for n in names if rng.random() < 0.3]
        names = [*dict.fromkeys(names)]
        one = len({n.casefold() for n in names}) < len(names)

        def folded(path: Path) -> bool:
            found = [p for p in folder.rglob("*") if str(p).casefold() == str(path).casefold()]
            return bool(found)

        os.path.lexists = folded  # type: ignore[assignment]
        try:
            namesakes.refuse_folded(folder, names)
            refused = False
        except BadInputError:
            refused = True
        finally:
            os.path.lexists = exists
        figures.add("sets of names pretended")
        if refused != one:
            figures.breach(f"{number}: {names} {'refused' if refused else 'taken'}")
    return figures


if __name__ == "__main__":
    main(campaign, count=200)
