"""Every record of a torch.save zip against its CRC-32, whatever it holds and whoever wants it.

Conversions check what they read as it passes (:mod:`streamconv.executor.records`). Here a whole file
is read for the check's sake alone, a piece at a time and in the order of its bytes.
"""

from __future__ import annotations

from streamconv.errors import BadInputError
from streamconv.torchfile.crc import crc32
from streamconv.torchfile.zipdir import ZipDirectory, check_local_header

_STEP_BYTES = 1 << 20


def check_records(directory: ZipDirectory) -> bool:
    """Read all records; return whether each of them carries a checksum.

    Raises :class:`BadInputError` for the first whose header or bytes are damaged.
    """
    window, checked = directory.window, True
    for name, (start, nbytes, crc, header_nbytes) in sorted(
        directory.entries.items(), key=lambda entry: entry[1][0]
    ):
        begin = start - window.base
        full_name = f"{directory.prefix}/{name}"
        header = window.read(begin - header_nbytes, header_nbytes)
        check_local_header(header, full_name, window.name, nbytes=nbytes, crc32=crc)
        found = 0
        for at in range(begin, begin + nbytes, _STEP_BYTES):
            found = crc32(window.read(at, min(_STEP_BYTES, begin + nbytes - at)), found)
        if found == crc:
            continue
        if crc:
            raise BadInputError(
                f"the record {full_name!r} is damaged: its bytes do not match their CRC-32",
                where=window.name,
                expected=f"{crc:08x}",
                found=f"{found:08x}",
                hint="copy the file again from where it was written",
            )
        checked = False
    return checked
