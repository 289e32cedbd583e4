"""Errors: each class owns an exit code, says its parts in a fixed order and survives JSON."""

from __future__ import annotations

import errno
import json

import pytest

from streamconv import errors
from streamconv.errors import StreamconvError

CODES = {
    "CancelledError": 130,
    "StreamconvError": 1,
    "UsageError": 2,
    "ClosedError": 2,
    "BudgetError": 4,
    "BadInputError": 5,
    "SourceChangedError": 5,
    "DamagedPlanError": 5,
    "UnfitValuesError": 5,
    "VerificationError": 5,
    "UnsafeInputError": 6,
    "NoSpaceError": 7,
    "OutputExistsError": 8,
    "UnfinishedError": 12,
    "LockedError": 11,
}
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, StreamconvError)
}


def test_every_class_has_the_exit_code_that_is_documented():
    assert {name: cls.exit_code for name, cls in CLASSES.items()} == CODES


def test_kinds_are_unique():
    assert len({cls.kind for cls in CLASSES.values()}) == len(CLASSES)


def test_parts_come_one_to_a_line_in_a_fixed_order():
    error = errors.BadInputError(
        "a rank file is missing",
        hint="copy it here",
        found="7 files",
        expected="8 files",
        where="/run/actor",
    )
    assert str(error) == (
        "a rank file is missing\n"
        "  where: /run/actor\n"
        "  expected: 8 files\n"
        "  found: 7 files\n"
        "  next: copy it here"
    )


def test_parts_that_are_missing_take_no_line():
    assert str(StreamconvError("planning failed", found="no answer")) == (
        "planning failed\n  found: no answer"
    )


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_an_error_survives_the_way_from_a_child_process(cls):
    error = cls("what", where="where", expected="expected", found=None, hint="hint")
    again = StreamconvError.from_json(json.loads(json.dumps(error.to_json())))
    assert type(again) is cls
    assert str(again) == str(error)


def test_a_class_without_a_kind_of_its_own_takes_no_other_ones_place():
    class Narrower(errors.UsageError):
        pass

    again = StreamconvError.from_json(errors.UsageError("what").to_json())
    assert type(again) is errors.UsageError


def test_an_unknown_kind_becomes_the_base_class():
    assert type(StreamconvError.from_json({"kind": "from the future"})) is StreamconvError


def test_the_number_of_the_system_error_behind_an_error_survives_too():
    stale = OSError(errno.ESTALE, "Stale file handle")
    stale.__cause__ = stale
    try:
        try:
            raise stale
        except OSError:
            raise errors.SourceChangedError("a rank file cannot be read") from None
    except StreamconvError as told:
        again = StreamconvError.from_json(json.loads(json.dumps(told.to_json())))
    assert again.errno == errno.ESTALE
    assert StreamconvError("planning failed").errno is None
    vague = OSError("no number")
    vague.__cause__ = vague
    told = StreamconvError("failed")
    told.__cause__ = vague
    assert told.errno is None


def test_what_strangers_wrote_is_told_in_part_and_a_path_as_a_whole():
    path = "/" + "d" * 4000
    error = StreamconvError(
        f"unknown layout: {'x' * 5000!r}", where=path, expected="\u202e" * 5000, found="y" * 5000
    )
    text = str(error)
    assert path in text
    assert len(text) - len(path) < 1700
    assert "unknown layout: 'xxx" in text
    assert "more characters)" in text
    assert all(len(str(v)) <= 500 for k, v in error.to_json().items() if k != "where")


def test_what_the_system_refuses_says_what_to_do():
    read_only = OSError(errno.EROFS, "Read-only file system", "/ro/.m.streamconv.lock")
    told = StreamconvError.of_system(read_only)
    assert (told.where, told.errno) == ("/ro/.m.streamconv.lock", errno.EROFS)
    assert "can be written to" in told.hint
    assert "ulimit -n" in StreamconvError.of_system(OSError(errno.EMFILE, "too many")).hint
    assert StreamconvError.of_system(OSError(errno.EIO, "I/O error")).hint is None
