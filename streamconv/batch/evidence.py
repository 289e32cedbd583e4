"""By what an output is recognised: alone, since every worker takes it, and records are large."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from streamconv.storage.address import Address


def output_evidence(output: Path, files: Iterable[str]) -> list[list[Any]]:
    """Return (name, size, time of change) of an output's files: unchanged, it is still the output.

    Of an object the time is a number that stands for its version. Raises ``OSError`` where one is
    missing.
    """
    evidence: list[list[Any]] = []
    if isinstance(output, Address):
        found = output.bucket.below(output.key)
        for name in files:
            if name not in found:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(output / name))
            mark = xxhash.xxh3_64_intdigest(found[name].version.encode()) >> 1
            evidence.append([name, found[name].nbytes, mark])
        return evidence
    for name in files:
        status = (output / name).stat()
        evidence.append([name, status.st_size, status.st_mtime_ns])
    return evidence
