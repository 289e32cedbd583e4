"""What identifies a file that torch.save wrote: its size, its time, and the hash of its directory."""

from __future__ import annotations

import os
from pathlib import Path

from streamconv.errors import SourceChangedError
from streamconv.source import SourceFile
from streamconv.torchfile.window import FileWindow
from streamconv.torchfile.zipdir import hash_directory


def identify_file(file: Path, root: Path) -> SourceFile:
    """Return ``file`` of the checkpoint in ``root`` as a source, known by its directory's hash.

    Nothing is parsed: whoever reads the file checks what it holds.
    """
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            digest = hash_directory(FileWindow(fd, str(file), 0, status.st_size))
        finally:
            os.close(fd)
    except OSError as error:
        raise SourceChangedError(
            f"a rank file cannot be read: {error.strerror}", where=str(file)
        ) from None
    return SourceFile(
        file.relative_to(root).as_posix(),
        status.st_size,
        status.st_mtime_ns,
        digest,
    )
