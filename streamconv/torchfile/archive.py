"""What the small records of a torch.save zip say about how torch reads it: those it would not, or
otherwise, are refused."""

from __future__ import annotations

import re

from streamconv.errors import BadInputError
from streamconv.torchfile.zipdir import ZipDirectory

_VERSION = re.compile(rb"([1-9]|10)\n?")  # kMinSupported… to kMaxSupportedFileFormatVersion


def check_archive(directory: ZipDirectory) -> None:
    """Raise :class:`BadInputError` for what torch.load would not read as weights of this machine."""
    where, entries = directory.window.name, directory.entries
    if "constants.pkl" in entries:
        raise BadInputError(
            "a TorchScript archive, which holds a program and no state dict",
            where=where,
            hint="load it with torch.jit.load and save its state_dict() with torch.save",
        )
    name = next((n for n in (".data/version", "version") if n in entries), None)
    version = b"" if name is None else directory.read_entry(name, max_nbytes=16)
    if not _VERSION.fullmatch(version):
        raise BadInputError(
            "an unknown file format of torch.save",
            where=where,
            expected="a record 'version' of 1 to 10",
            found=repr(version) if name else "no such record",
        )
    check_byteorder(directory)


def check_byteorder(directory: ZipDirectory) -> None:
    """Raise :class:`BadInputError` for numbers of another byte order."""
    if "byteorder" in directory.entries:
        found = directory.read_entry("byteorder", max_nbytes=16)
        if found != b"little":
            raise BadInputError(
                "the file holds big-endian numbers",
                where=directory.window.name,
                expected="little",
                found=repr(found),
            )
