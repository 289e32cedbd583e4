"""Errors: one class per exit code, each able to say what, where, expected, found and what to do next.

A message is a few lines, never a traceback. ``what`` is one sentence; the other parts are optional
and are printed one to a line in a fixed order, so that a script can read them too.
"""

from __future__ import annotations

import errno
import functools
import inspect
import re
from collections.abc import Collection
from itertools import islice
from typing import Any, ClassVar

# A name in a file can be as long as the file. A path cannot, and all of it is of use.
_LONGEST = 500
_LONGEST_PATH = 5000
# What to do about what the system refuses.
_WHAT_TO_DO: dict[int | None, str] = {
    errno.EMFILE: "raise the limit: `ulimit -n 1024`",
    errno.ENFILE: "raise the limit: `ulimit -n 1024`",
    errno.EROFS: "choose a place on a file system that can be written to",
}


class StreamconvError(Exception):
    """Base of every error that streamconv raises on purpose (exit code 1)."""

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "failed"

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = clipped(what, _LONGEST)
        super().__init__(self.what)
        self.where = where and clipped(where, _LONGEST_PATH)
        self.expected = expected and clipped(expected, _LONGEST)
        self.found = found and clipped(found, _LONGEST)
        self.hint = hint and clipped(hint, 2 * _LONGEST_PATH)
        self._errno: int | None = None

    @classmethod
    def of_system(cls, error: OSError | MemoryError) -> StreamconvError:
        """Return what the system refused, as an error of ours."""
        if isinstance(error, MemoryError):
            return cls(
                "the system refused memory that the budget allows",
                hint="raise the limit of `ulimit -v`, or see what else takes memory here",
            )
        where = None if error.filename is None else str(error.filename)
        told = cls(
            f"the system refused: {error.strerror or error}",
            where=where,
            hint=_WHAT_TO_DO.get(error.errno),
        )
        told.__cause__ = error
        return told

    @property
    def errno(self) -> int | None:
        """Return the number of the system's error that led to this one, where there was one."""
        error: BaseException | None = self
        seen: list[BaseException] = []  # an error may be its own cause
        while error is not None and error not in seen:
            seen.append(error)
            number = error._errno if isinstance(error, StreamconvError) else None
            if isinstance(error, OSError):
                number = error.errno
            if number is not None:
                return number
            error = error.__cause__ or error.__context__
        return None

    def __str__(self) -> str:
        parts = [clipped(shown(self.what), _LONGEST)]
        for label, text, longest in (
            ("where", self.where, _LONGEST_PATH),
            ("expected", self.expected, _LONGEST),
            ("found", self.found, _LONGEST),
            ("next", self.hint, 2 * _LONGEST_PATH),
        ):
            if text:
                parts.append(f"  {label}: {clipped(shown(text), longest)}")
        return "\n".join(parts)

    def to_json(self) -> dict[str, str | int | None]:
        """Return the error as plain data: how a planning child hands it to its parent."""
        return {
            "kind": self.kind,
            "exit_code": self.exit_code,
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "found": self.found,
            "hint": self.hint,
            "errno": self.errno,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> StreamconvError:
        """Rebuild an error from :meth:`to_json`; an unknown kind becomes the base class."""
        # Of a class and those below it that have no kind of their own, the class.
        known = {c.kind: c for c in reversed(_all_classes(StreamconvError))}
        cls = known.get(data.get("kind") or "", StreamconvError)
        error = cls(
            data.get("what") or "unknown error",
            where=data.get("where"),
            expected=data.get("expected"),
            found=data.get("found"),
            hint=data.get("hint"),
        )
        error._errno = data.get("errno")
        return error


def _all_classes(cls: type[StreamconvError]) -> list[type[StreamconvError]]:
    return [cls, *(c for sub in cls.__subclasses__() for c in _all_classes(sub))]


class UsageError(StreamconvError):
    """The command or the options do not make sense together (exit code 2)."""

    exit_code = 2
    kind = "usage"


class ClosedError(UsageError, ValueError):
    """Something is read from what was closed before: a ``ValueError``, as Python's own files raise."""

    kind = "closed"


class BudgetError(StreamconvError):
    """The memory budget cannot work; the message says the smallest that does (exit code 4)."""

    exit_code = 4
    kind = "budget"


class BadInputError(StreamconvError):
    """The checkpoint is incomplete, damaged, contradictory or of an unknown format (exit code 5)."""

    exit_code = 5
    kind = "bad-input"


class SourceChangedError(BadInputError):
    """A source file changed, shrank or vanished between planning and the end of the run."""

    kind = "source-changed"


class DamagedPlanError(BadInputError):
    """A plan that is not one, or whose lines do not fit together: it can never be executed."""

    kind = "damaged-plan"


class UnfitValuesError(BadInputError):
    """What the job asks for cannot be made of the weights' values: it fails as often as it is run."""

    kind = "unfit-values"


class VerificationError(BadInputError):
    """An output differs from its manifest, its source or its reference."""

    kind = "verification"


class UnsafeInputError(StreamconvError):
    """A file asks for something that data must not ask for: a global, a path, a trick (exit code 6)."""

    exit_code = 6
    kind = "unsafe"


class NoSpaceError(StreamconvError):
    """The disk is full, or would be (exit code 7)."""

    exit_code = 7
    kind = "no-space"


class OutputExistsError(StreamconvError):
    """The output folder belongs to another job (exit code 8)."""

    exit_code = 8
    kind = "output-exists"


class UnfinishedError(StreamconvError):
    """Parts of the output are still to be written (exit code 12)."""

    exit_code = 12
    kind = "unfinished"


class LockedError(StreamconvError):
    """Another process is writing this output (exit code 11)."""

    exit_code = 11
    kind = "locked"


class CancelledError(StreamconvError):
    """A conversion was ended by its ``cancel``; the same call again goes on (exit code 130)."""

    exit_code = 130
    kind = "cancelled"


# What follows an option in a message and is its value: a number, a choice, a word for any value.
_CHOICES = "bfloat16|float16|float32|merge|adapter|both|auto|memory|hub|keep|drop|no|yes"
_VALUE = rf"[A-Z]+(?:=[A-Z]+)?\b|[\w.%-]*\d[\w.%]*|\w+(?:\|\w+)+|{_CHOICES}"
_OPTION = re.compile(rf"--([a-z][a-z0-9-]+)(?:[ =]({_VALUE})(?![\w/]))?")
_SWITCHED_OFF = {"no-sync": "sync=False", "no-source-crc": "source_crc=False"}
_SWITCHES = frozenset(
    {
        "overwrite",
        "strict",
        "direct",
        "allow-zero-delta",
        "lora-rslora",
        "keep-buffers",
        "private",
        "dequantize",
    }
)


def in_python(text: str) -> str:
    """Return a message with options of the command line as keyword arguments.

    >>> in_python("--max-mem 490MB works, or --overwrite; see --family")
    "max_mem='490MB' works, or overwrite=True; see family"
    """

    def keyword(found: re.Match[str]) -> str:
        flag, value = found[1], found[2]
        if flag in _SWITCHED_OFF:
            return _SWITCHED_OFF[flag] + (f" {value}" if value else "")
        name = flag.replace("-", "_")
        if flag in _SWITCHES:
            return f"{name}=True" + (f" {value}" if value else "")
        if value is None:
            return name
        return f"{name}={value}" if value.isalpha() and value.isupper() else f"{name}={value!r}"

    return _OPTION.sub(keyword, text)


def speaking_python(function: Any) -> Any:
    """Return a function whose errors have a note with options as keyword arguments."""

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wait(*args: Any, **kwargs: Any) -> Any:
            try:
                return await function(*args, **kwargs)
            except StreamconvError as error:
                _speak_python(error)
                raise

        return wait

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except StreamconvError as error:
            _speak_python(error)
            raise

    return call


def _speak_python(error: StreamconvError) -> None:
    """Add a note, which tracebacks show, where the message names options of the command line."""
    said = [text for text in (error.what, error.expected, error.hint) if text]
    changed = [in_python(text) for text in said if in_python(text) != text]
    note = "from Python: " + "; ".join(changed)
    if changed and note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def shown(text: str) -> str:
    """Return ``text`` as one line of printable characters, all others escaped as in Python.

    >>> print(shown("a\\x1b[31m\\n\\u202eb"))
    a\\x1b[31m\\n\\u202eb
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def listed(names: Collection[str], most: int = 8) -> str:
    """Return the first of many names, and how many more there are.

    >>> listed(["a", "b", "c"], 2), listed({"a": 1})
    ('a, b and 1 more', 'a')
    """
    more = len(names) - most
    return ", ".join(islice(names, most)) + (f" and {more} more" if more > 0 else "")


def clipped(text: str, most: int) -> str:
    """Return ``text`` in at most ``most`` characters: its beginning, and how many more there are.

    >>> print(clipped("a" * 100, 40))
    aaaaaaaaaaaaaaaaa… (83 more characters)
    """
    if len(text) <= most:
        return text
    kept = most - len(f"… ({len(text)} more characters)")
    return f"{text[:kept]}… ({len(text) - kept} more characters)"


def _escaped(character: str) -> str:
    return repr(character)[1:-1]
