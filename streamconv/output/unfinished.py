"""What lies in the staging folder: whether this run may go on with it, begin afresh, or must refuse.

A run goes on with what a run of the same user wrote for the same target and job, and can prove it. What
has a staging folder's files and nothing else, without the proof, is removed, and said to be; anything
else is named and left where it is.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from streamconv.errors import OutputExistsError
from streamconv.files import newfile
from streamconv.files.names import INDEX, MANIFEST, SINGLE
from streamconv.ir.identity import JobIdentity
from streamconv.ir.planfile import Plan
from streamconv.options import Notice, RunOptions
from streamconv.output.journal import DONE, JOURNAL
from streamconv.output.staging import PLAN, Staging
from streamconv.storage.address import place

_NAMED = re.compile(rb'\{"(?:side|text|output)": ?"([^"\\]{1,1024})"')
# The number of a part is missing where an older release wrote it.
_PART = re.compile(r"(\.streamconv-[0-9a-f]{16}|(?P<of>.+?)(\.[0-9a-f]{16})?)\.part")
_WEIGHTS = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_LONGEST_NAME_LINE = 4096


def discard_leftover(dst: Path, digest: str) -> None:
    """Remove what a run that was killed right after publishing left beside its output."""
    staging = Staging(dst, sync=False)
    if staging.root.is_symlink():
        return
    plan = staging.sealed_plan()
    same = plan is not None and plan.head.job["digest"] == digest
    if plan is not None:
        plan.close()
    if same or staging.is_rest_of_ours():
        staging.discard()
    # Otherwise it is another job's, begun with --overwrite: its own command finishes it.


def staged_plan(
    staging: Staging,
    root: Path,
    job: JobIdentity,
    run: RunOptions,
    plan_digest: str | None = None,
) -> Plan | None:
    """Return the plan of an interrupted run of this job; refuse or discard another job's.

    ``root`` and ``job`` are the checkpoint and the identity of this one.
    ``plan_digest`` asks for that very plan: one job can be planned differently by other releases, and
    the files that the journal names are finished only for the plan they were made by.
    """
    plan = staging.sealed_plan()
    if plan is None:
        _clear_away(staging, run)
        return None
    _refuse_strangers(staging, _names_of(plan))
    if goes_on(plan, root, job, run, plan_digest, where=staging.root):
        return plan
    plan.close()
    staging.discard()
    return None


def goes_on(
    plan: Plan,
    root: Path,
    job: JobIdentity,
    run: RunOptions,
    plan_digest: str | None,
    *,
    where: Path,
) -> bool:
    """Whether the plan that is staged ``where`` is that of this run; False where it may be thrown away.

    Raises :class:`OutputExistsError` for another job's, which must not. The others are those of
    :func:`staged_plan`.
    """
    if plan.head.job["digest"] == job.digest and plan_digest in (None, plan.digest):
        return True
    if run.overwrite or _superseded(plan, root, job):
        return False
    raise OutputExistsError(
        "an unfinished run of another job is staged for this output",
        where=str(where),
        hint="finish it with its own command, or start afresh with --overwrite",
    )


def _superseded(staged: Plan, root: Path, job: JobIdentity) -> bool:
    """Whether a staged plan is of what was asked for again, but its source was rewritten since.

    Or it is gone. Nobody can go on with such a plan, not even its own command.
    """
    head = staged.head
    asked = ("options", "given")
    before = place(head.root)
    same_place = before == root.absolute() or not before.exists()
    another_source = head.job["digest"] != job.digest
    now = job.to_json()
    return same_place and another_source and all(head.job.get(k) == now.get(k) for k in asked)


def _clear_away(staging: Staging, run: RunOptions) -> None:
    """Remove a staging folder that no run of this user can be shown to have written."""
    root = staging.root
    try:
        status = root.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(status.st_mode):
        raise _stranger(root, root, "something else lies where this output is staged")
    # A folder that cannot be read is another user's as well.
    if status.st_uid != os.geteuid() or not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        raise _stranger(root, root, "an unfinished run of another user is staged for this output")
    _refuse_strangers(staging, _names_in(staging.plan_path))
    empty = not any(staging.files.rglob("*")) and not os.path.lexists(staging.plan_path)
    staging.discard()
    if not empty:
        run.on_event(
            Notice(
                f"begun afresh: nothing shows that a run of this user has written {root}, which was "
                "removed",
            )
        )


def _names_of(plan: Plan) -> set[str]:
    head = plan.head
    names = {o.name for o in plan.outputs()} | {s.name for s in head.side}
    return names | {w.name for w in head.written} | {MANIFEST}


def _names_in(path: Path) -> set[str]:
    """Return the names of output files in what looks like a plan; it may be anything."""
    names = {MANIFEST, INDEX, SINGLE, "config.json"}
    fd = newfile.reopen(path)
    if fd is None:
        return names
    with os.fdopen(fd, "rb") as stream:
        while line := stream.readline(_LONGEST_NAME_LINE):
            if found := _NAMED.match(line):
                names.add(found[1].decode(errors="replace"))
    return names


def _refuse_strangers(staging: Staging, names: set[str]) -> None:
    """Raise :class:`OutputExistsError` for what no run puts there, where ``names`` are an output's."""
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    odd = next(_strange(staging.root, "", names, folders), None)
    if odd is not None:
        raise _stranger(
            odd,
            staging.root,
            "what streamconv did not write lies in the folder of an unfinished run",
        )


def _strange(folder: Path, below: str, names: set[str], folders: set[str]) -> Iterator[Path]:
    """Yield what no run puts there: other names, links, devices, folders in the place of files."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            name = below + entry.name
            top, _, inside = name.partition("/")
            if entry.is_dir(follow_symlinks=False):
                if top not in ("files", DONE) or (inside and inside not in folders):
                    yield Path(entry.path)
                else:
                    yield from _strange(Path(entry.path), name + "/", names, folders)
            elif not entry.is_file(follow_symlinks=False) or not _is_ours(top, inside, names):
                yield Path(entry.path)


def _is_ours(top: str, inside: str, names: set[str]) -> bool:
    """Whether a run writes such a file: ``inside`` one of its folders, or called ``top``."""
    if top == "files":
        return inside in names or _WEIGHTS.fullmatch(inside) is not None
    part = _PART.fullmatch(inside or top)
    name = part["of"] if part else inside or top
    if name is None:
        return True
    if top == DONE:
        note = name.removesuffix(".json")
        return note != name and (note in names or _WEIGHTS.fullmatch(note) is not None)
    if name in (PLAN, JOURNAL):
        return True
    flat = {n.replace("/", "-") for n in names}
    return part is not None and (name in flat or _WEIGHTS.fullmatch(name) is not None)


def _stranger(path: Path, root: Path, what: str) -> OutputExistsError:
    return OutputExistsError(
        what,
        where=str(path),
        hint=f"look at it and move it away, or choose another output folder ({root} may be removed "
        "as a whole: the conversion then begins afresh)",
    )
