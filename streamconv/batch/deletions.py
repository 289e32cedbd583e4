"""Decides what may be deleted, from facts that somebody else took a moment ago.

For every step that was ever whole there is a whole source or a verified output, unless retention was
asked to remove it; a later whole step to train on is there; what streamconv did not write stays. In
doubt, everything stays.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What decides about a source. A text says what is in the way, empty where nothing is.

    ``is_step``: it is part of a run's step. ``finished``: it is a model in the format of the outputs.
    ``verified``: its output was compared with it. ``intact``: that output looks as it did then.
    ``loads``: a loader can tell what it is.
    ``unchanged``: the source looks as it did then. ``other_job``: how what is in it now differs from
    what the output's manifest says that it was made of. ``inside``: what lies in it that is not
    converted with it. ``training``: why training still needs it. ``unfinished``: another output that is
    made of it.
    """

    is_step: bool
    finished: bool
    verified: bool
    intact: bool
    loads: bool
    unchanged: bool
    other_job: str
    inside: str
    unfinished: str
    training: str


def why_keep_source(f: SourceFacts) -> str:
    """Return why a source must stay; empty where it may go, once its output was read again."""
    if not f.is_step:
        return "it is not a step of a run"
    if f.finished:
        return "it is a finished model, not a checkpoint that an output stands for"
    if not f.verified:
        return "its output has not been verified against it (--verify)"
    if not f.intact:
        return "its output is not as it was when it was verified"
    if not f.unchanged:
        return "it changed since it was converted"
    kept = f.inside or f.training or f.other_job or f.unfinished
    if not kept and not f.loads:
        return "its output has no config.json, without which no loader knows what it is"
    return kept


@dataclass(frozen=True, slots=True)
class OutputFacts:
    """What decides about an output that the rule does not keep; texts as above.

    ``place``: why its folder is none to delete. ``ours``: this run's options made it. ``edited``: what
    is in it that its conversion did not write. ``awaited``: who has yet to read it.
    """

    ours: bool
    place: str
    edited: str
    intact: bool
    awaited: str


def why_keep_output(f: OutputFacts) -> str:
    """Return why an output must stay; empty where it may go, once it was found to be unedited."""
    if not f.ours:
        return "it is another run's, or was made with other options"
    if f.place or f.edited:
        return f.place or f.edited
    if not f.intact:
        return "it is not as it was when it was finished"
    return f.awaited
