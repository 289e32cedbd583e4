"""What identifies a file of weights: its size, the hash of its directory, and evidence of its bytes.

The central directory of a torch.save zip holds the CRC-32 of every record: its hash stands for the
weights. Where nothing does so (checksums switched off, the records of a DCP folder, safetensors),
weights of the same shapes written anew would look the same. There the time of change is part of the
identity, and samples of the bytes, for where times are coarse or were copied along.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import xxhash

from streamconv.errors import BadInputError
from streamconv.files.inputs import opened
from streamconv.ir.source import SourceFile
from streamconv.storage.address import Address
from streamconv.torchfile.legacy import hash_head, is_legacy
from streamconv.torchfile.window import FileWindow
from streamconv.torchfile.zipdir import hash_directory

_NUMBER = re.compile(r"\d+", re.ASCII)
_SAMPLES = 8
_SAMPLE_NBYTES = 4096


def identify_file(file: Path, root: Path) -> SourceFile:
    """Return the torch.save file ``file`` of the checkpoint in ``root`` as a source.

    Nothing is parsed: whoever reads the file checks what it holds.
    """
    with opened(file) as stored:
        status = stored.status
        digest, checksums = hash_directory(FileWindow(stored))
    return SourceFile(
        file.relative_to(root).as_posix(),
        status.st_size,
        status.st_mtime_ns,
        digest,
        evidence="" if checksums else evidence_of(file),
    )


def check_name(file: Path, prefix: str) -> None:
    """Raise :class:`BadInputError` where a rank's file has another rank's name.

    torch.save puts the name that it writes to into the zip, as ``prefix`` of all entries, and nothing
    else in the file may say whose it is. A prefix that differs in more than numbers says nothing.
    """
    if prefix != file.stem and _NUMBER.sub("#", prefix) == _NUMBER.sub("#", file.stem):
        raise BadInputError(
            "the file was written by another rank than its name says",
            where=str(file),
            expected=f"{file.stem}, which torch.save puts into the file",
            found=prefix,
            hint="was it renamed, or copied over another? Give it back its name",
        )


class Read(Protocol):
    """What a file said of itself when it was read."""

    @property
    def nbytes(self) -> int:
        """Return its size."""

    @property
    def mtime_ns(self) -> int:
        """Return its time of change."""

    @property
    def directory_hash(self) -> str:
        """Return the hash of its directory."""

    @property
    def prefix(self) -> str:
        """Return what precedes the names of its entries."""

    @property
    def checksums(self) -> bool:
        """Return whether its directory holds the CRC-32 of every record."""


def source_file(path: Path, read: Read, root: Path) -> SourceFile:
    """Return a torch file that was read as a source of the checkpoint in ``root``."""
    return SourceFile(
        path.relative_to(root).as_posix(),
        read.nbytes,
        read.mtime_ns,
        read.directory_hash,
        read.prefix,
        evidence="" if read.checksums else evidence_of(path),
    )


def identify_torch_file(file: Path, root: Path | None) -> SourceFile:
    """Return a file of torch's as a source, be it a zip or of the old format.

    Without ``root`` its path is absolute.
    """
    if not is_legacy(file):
        found = identify_file(file, root or file.parent)
        return found if root is not None else replace(found, path=str(file.absolute()))
    status = file.stat()
    return SourceFile(
        str(file.absolute()) if root is None else file.relative_to(root).as_posix(),
        status.st_size,
        status.st_mtime_ns,
        hash_head(file),
        evidence=evidence_of(file),
    )


def evidence_of(file: Path) -> str:
    """Return what tells one content of a file from another where no checksum does.

    Not the time of the inode's change, which a hard link changes, too. In a store it is the object's
    version, which no two contents have.
    """
    if isinstance(file, Address):
        return file.version
    samples = xxhash.xxh3_64()
    with opened(file) as stored:
        status = stored.status
        last = max(0, status.st_size - _SAMPLE_NBYTES)
        for k in range(_SAMPLES):
            samples.update(stored.pread(_SAMPLE_NBYTES, last * k // (_SAMPLES - 1)))
    return f"{status.st_mtime_ns}-{samples.hexdigest()}"
