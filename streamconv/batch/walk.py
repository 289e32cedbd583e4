"""One walk through a folder, for all who must know what lies in it and how it looks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Entry:
    """What was met: its ``name`` below the folder, and its own ``status``, not a link's target's."""

    name: str
    path: str
    status: os.stat_result
    is_folder: bool
    is_link: bool


def walk(folder: Path, *, skip: Callable[[str], bool] = lambda _: False) -> Iterator[Entry]:
    """Yield all that lies below ``folder``, that one itself left out; links are not followed.

    ``skip`` tells by its last name what is not to be met. Raises ``OSError`` where something cannot be
    looked at, or goes meanwhile.
    """
    pending = [str(folder)]
    prefix = len(str(folder)) + 1
    while pending:
        with os.scandir(pending.pop()) as listing:
            for entry in listing:
                if skip(entry.name):
                    continue
                status = entry.stat(follow_symlinks=False)
                is_folder = entry.is_dir(follow_symlinks=False)
                yield Entry(entry.path[prefix:], entry.path, status, is_folder, entry.is_symlink())
                if is_folder:
                    pending.append(entry.path)
