"""Retention rules that are at work on one output folder: unlike ones would undo one another."""

from __future__ import annotations

import json
import uuid
from dataclasses import astuple
from pathlib import Path

from streamconv.batch import leases
from streamconv.batch.leases import Lease
from streamconv.batch.retention import Rule
from streamconv.errors import UsageError

_FOLDER = "rules"


def claim_rule(folder: Path, rule: Rule) -> Lease | None:
    """Let others know that ``rule`` is at work in a batch's ``folder``, as long as the lease is held.

    Raises :class:`UsageError` where a batch that is alive has another rule.
    """
    place = folder / _FOLDER
    text = json.dumps(astuple(rule))
    mine = leases.take(place / f"{uuid.uuid4().hex}.lease", wait=True)
    if mine is not None:
        mine.say(text)
    for path in place.glob("*.lease"):
        if mine is not None and path == mine.path:
            continue
        try:
            found = leases.take(path)
        except OSError as error:
            if error.errno in leases.NO_FILE:
                continue  # nobody's lease
            raise
        if found is not None:
            if found.locked:
                found.release()  # whoever had it is gone
            continue
        theirs = path.read_text(errors="replace")
        if theirs not in ("", text):
            if mine is not None:
                mine.release()
            raise UsageError(
                "another batch keeps other outputs in this folder",
                where=str(folder.parent),
                expected=f"[--keep-last, --keep-every] {theirs}",
                found=text,
                hint="give both the same rule, or each an output folder of its own",
            )
    return mine
