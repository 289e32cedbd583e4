"""A folder whose file system ignores case: NTFS by lowntfs-3g, in a file, where that can be mounted."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

_TOOLS = ("mkntfs", "lowntfs-3g", "umount")
_NBYTES = 64 << 20


def why_not() -> str | None:
    """Return why no such folder can be had here, None where one can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {missing[0]} here (Debian: apt-get install ntfs-3g)"
    return (
        None if os.geteuid() == 0 and Path("/dev/fuse").exists() else "nothing can be mounted here"
    )


@contextlib.contextmanager
def folding(work: Path) -> Iterator[Path]:
    """Yield an empty folder on such a file system; raises ``OSError`` where it cannot be mounted."""
    image, place = work / "ntfs.img", work / "ntfs"
    place.mkdir(parents=True)
    with image.open("wb") as stream:
        stream.truncate(_NBYTES)
    _run("mkntfs", "-F", "-q", "-f", image)
    _run("lowntfs-3g", "-o", "ignore_case", image, place)
    try:
        yield place
    finally:
        _run("umount", "--lazy", place)  # whatever still holds a file there open
        image.unlink()


def _run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{command[0]}: {done.stderr.strip()[-200:]}")
