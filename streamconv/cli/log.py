"""``-v`` and ``--log-file``: what the package logs, and in the file what was printed on stderr, too.

The package logs under ``streamconv``; nothing listens unless it is asked to, here or by a program of
one's own that configures :mod:`logging`.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

from streamconv._version import __version__
from streamconv.errors import UsageError
from streamconv.files import askedfile
from streamconv.files.inputs import local_path

_LOG = logging.getLogger("streamconv")
# What the commands print: for the file alone, as the terminal has it already.
_PRINTED = logging.getLogger("streamconv-printed")
_PRINTED.propagate = False
_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(message)s"
_TIMES = "%Y-%m-%d %H:%M:%S"


class _Telling(logging.Handler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(self.format(record))


def to_stderr(verbosity: int, tell: Callable[[str], None]) -> None:
    """Have ``tell`` print what is logged: at 1 what happens, at 2 everything."""
    if verbosity:
        _add(_LOG, _Telling(tell), logging.INFO if verbosity == 1 else logging.DEBUG)


def to_file(path: str | None) -> None:
    """Append what is logged and what is printed on stderr to the file ``path``."""
    if path is None:
        return
    place = askedfile.checked(local_path(path), askedfile.LOG)
    try:
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(
            f"the log cannot be written: {error.strerror}",
            where=str(place),
            hint="choose another path for --log-file, or for STREAMCONV_LOG_FILE where that is set",
        ) from error
    handler = logging.StreamHandler(os.fdopen(fd, "a", encoding="utf-8", errors="replace"))
    if os.fstat(fd).st_size == 0:
        handler.stream.write(askedfile.LOG.mark.decode())
    _add(_LOG, handler, logging.DEBUG)
    _add(_PRINTED, handler, logging.DEBUG)
    arguments = " ".join(sys.argv[1:])
    _LOG.info("streamconv %s on %s in %s: %s", __version__, platform.node(), Path.cwd(), arguments)


def printed(text: str) -> None:
    """Take note of what was printed."""
    if _PRINTED.handlers:
        _PRINTED.info(text)


def _add(logger: logging.Logger, handler: logging.Handler, level: int) -> None:
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(_FORMAT, _TIMES))
    logger.addHandler(handler)
    logger.setLevel(min(level, logger.level or level))
