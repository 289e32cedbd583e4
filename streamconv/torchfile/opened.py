"""A torch file of either form, a zip or the old one, read with classes that are not known inert."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamconv.torchfile.legacy import is_legacy, read_legacy
from streamconv.torchfile.rankfile import open_archive
from streamconv.torchfile.unpickle import load_inert, no_garbage_collection
from streamconv.torchfile.zipdir import ZipDirectory


@contextmanager
def opened(
    path: Path, *, max_pickle_nbytes: int
) -> Iterator[tuple[os.stat_result, ZipDirectory, Any]]:
    """Yield the status of a file, where its storages lie, and its object; a zip closes at the end.

    Raises :class:`BadInputError` for a damaged file, :class:`UnsafeInputError` for a hostile one.
    """
    if is_legacy(path):
        with no_garbage_collection():
            yield read_legacy(path, max_nbytes=max_pickle_nbytes)
        return
    with open_archive(path) as (status, directory), no_garbage_collection():
        root = load_inert(
            directory.read_entry("data.pkl", max_nbytes=max_pickle_nbytes),
            str(path),
            unknown="keep",
            max_nbytes=max_pickle_nbytes,
        )
        yield status, directory, root
