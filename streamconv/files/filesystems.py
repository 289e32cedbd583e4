"""Which file system a path lies on, and what is known to hurt there."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from streamconv.storage.address import Address
from streamconv.storage.objects import READ_ONLY

_MOUNTINFO = Path("/proc/self/mountinfo")
_NETWORK = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "virtiofs"),
        *("lustre", "beegfs", "gpfs", "ceph", "glusterfs", "orangefs", "pvfs2", "wekafs", "panfs"),
        *("fuse.sshfs", "fuse.rclone", "fuse.glusterfs", "fuse.ceph", "fuse.juicefs"),
        *("fuse.s3fs", "fuse.goofys", "fuse.mount-s3", "fuse.gcsfuse", "fuse.blobfuse2"),
    }
)
_MEMORY = frozenset({"tmpfs", "ramfs"})
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A mounted file system: where, of what type, what of, and how much of it is free.

    ``device`` is the number by which the kernel knows it: equal numbers are one file system.
    """

    mount: Path
    kind: str
    source: str
    device: int
    free_bytes: int
    total_bytes: int

    @property
    def is_network(self) -> bool:
        """Whether its files are another machine's."""
        return self.kind in _NETWORK or self.kind == "object store"

    @property
    def is_memory(self) -> bool:
        """Whether what is written there takes memory and no disk."""
        return self.kind in _MEMORY


def real_path(path: Path) -> Path:
    """Return where a path leads to, links followed as far as they lead.

    ``Path.resolve`` says the same, but for links that lead to themselves: these it takes for an error
    of the program's before Python 3.13.
    """
    return path if isinstance(path, Address) else Path(os.path.realpath(path))


def nearest(path: Path) -> Path:
    """Return the path, or the folder above it that exists."""
    here = path.absolute()
    while not here.exists():
        here = here.parent
    return here


def lies_in(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or lies in it, however either is written.

    On a file system that ignores case, and under a bind mount, a folder has more than one name.
    """
    path = real_path(path)
    if path.is_relative_to(real_path(folder)):
        return True
    if isinstance(path, Address) or isinstance(folder, Address):
        return False
    try:
        wanted = folder.stat()
    except OSError:
        return False
    for place in (path, *path.parents):
        try:
            if os.path.samestat(place.stat(), wanted):
                return True
        except OSError:
            continue
    return False


def why_not_writable(path: Path) -> str | None:
    """Return why nothing can be written at ``path``, which need not exist yet; None where it can be.

    What a store allows only writing tells.
    """
    if isinstance(path, Address):
        return f"{path.scheme}:// can only be read" if path.scheme in READ_ONLY else None
    here = nearest(path)
    if not here.is_dir():
        return f"{here} is not a folder"
    if os.statvfs(here).f_flag & os.ST_RDONLY:
        return f"the file system of {here} is read-only"
    return None if os.access(here, os.W_OK | os.X_OK) else f"no permission to write in {here}"


def filesystem_of(path: Path, mountinfo: Path = _MOUNTINFO) -> FileSystem:
    """Return the file system that ``path``, which need not exist yet, lies on or would lie on.

    A store is one, too, without an end.
    """
    if isinstance(path, Address):
        return FileSystem(path, "object store", path.bucket.name, -1, 1 << 62, 1 << 62)
    here = real_path(nearest(path))
    mount, kind, source = Path("/"), "unknown", ""
    for line in _lines(mountinfo):
        # "36 35 98:0 /root /mount options … - type source super-options"; later mounts lie on top.
        left, _, right = line.partition(" - ")
        point = Path(_unescaped(left.split()[4]))
        if here.is_relative_to(point) and len(point.parts) >= len(mount.parts):
            kind, source, *_ = right.split()
            mount, source = point, _unescaped(source)
    usage = shutil.disk_usage(here)
    return FileSystem(mount, kind, source, here.stat().st_dev, usage.free, usage.total)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if " - " in line]
    except OSError:
        return []


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda m: chr(int(m[1], 8)), text)
