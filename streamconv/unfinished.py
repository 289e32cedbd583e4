"""What a stopped run left in the staging folder: whether this one may go on with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamconv.errors import BadInputError, OutputExistsError
from streamconv.options import RunOptions
from streamconv.plan import Plan
from streamconv.staging import Staging


def _readable_plan(staging: Staging) -> Plan | None:
    """Return the staged plan; None where there is none, or one that nobody can go on with.

    A crash may have cut it off, or another release have written it.
    """
    try:
        return Plan(staging.plan_path)
    except BadInputError:
        return None


def discard_leftover(dst: Path, digest: str) -> None:
    """Remove what a run that was killed right after publishing left beside its output."""
    staging = Staging(dst, sync=False)
    plan = _readable_plan(staging)
    if plan is None or plan.head.job["digest"] == digest:
        staging.discard()
    # Otherwise it is another job's, begun with --overwrite: its own command finishes it.


def staged_plan(
    staging: Staging,
    root: Path,
    job: Mapping[str, Any],
    run: RunOptions,
    plan_digest: str | None = None,
) -> Plan | None:
    """Return the plan of an interrupted run of this job; refuse or discard another job's.

    ``root`` and ``job`` are the checkpoint and the identity of this one.
    ``plan_digest`` asks for that very plan: one job can be planned differently by other releases, and
    the files that the journal names are finished only for the plan they were made by.
    """
    plan = _readable_plan(staging)
    if plan is None:
        staging.discard()
        return None
    if plan.head.job["digest"] == job["digest"] and plan_digest in (None, plan.digest):
        return plan
    if not run.overwrite and not _superseded(plan, root, job):
        raise OutputExistsError(
            "an unfinished run of another job is staged for this output",
            where=str(staging.root),
            hint="finish it with its own command, or start afresh with --overwrite",
        )
    staging.discard()
    return None


def _superseded(staged: Plan, root: Path, job: Mapping[str, Any]) -> bool:
    """Whether a staged plan is of what was asked for again, but its source was written anew since.

    Or it is gone. Nobody can go on with such a plan, not even its own command.
    """
    head = staged.head
    asked = ("options", "given")
    same_place = Path(head.root) == root.absolute() or not Path(head.root).exists()
    another_source = head.job["digest"] != job["digest"]
    return same_place and another_source and all(head.job.get(k) == job.get(k) for k in asked)
