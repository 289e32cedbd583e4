"""The pieces that ranks write of a model that is to be a HuggingFace model once they are joined.

torch's ``HuggingFaceStorageWriter`` (transformers' ``save_pretrained(distributed_checkpoint=True)``,
NeMo Automodel, torchtitan, verl with either) writes ``shard-RRRRR-model-NNNNN-of-MMMMM.safetensors``: R
is the rank, counted from 1, and a rank without any piece has no file. In each header ``__metadata__``
has ``DCP_SHARDING_INFO``, JSON text that gives the offsets of each piece in its tensor. The whole shape
is nowhere: it is as far as pieces reach, so that the model of config.json alone can tell that the last
rank is lost. Names are those in memory.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from streamconv.errors import BadInputError
from streamconv.files.names import INDEX
from streamconv.formats.assembly import Assembler, Stored
from streamconv.formats.huggingface import weights
from streamconv.formats.safetensors_file import FileTensor, read_header_and_metadata
from streamconv.formats.side_folder import above, side_folder
from streamconv.ir.boxes import Box, Shape, contiguous_strides
from streamconv.ir.dtypes import DType
from streamconv.ir.source import Checkpoint, Record, SourceFile

NAME = "huggingface_pieces"
FINISHED = False
SEVERAL = False

_PIECES = re.compile(r"shard-\d{5}-model-(?P<file>\d{5})-of-(?P<of>\d{5})\.safetensors", re.ASCII)
_UNSEEN = (
    "whether the last rank's pieces are missing cannot be seen without config.json of a model that "
    "transformers knows"
)
_SHARDING = "DCP_SHARDING_INFO"
JOINED = "consolidated"
"""The folder in which NeMo Automodel and transformers join them."""
_OWN = ".hf_metadata"  # NeMo Automodel's folder with config and tokenizer


def holds(path: Path) -> bool:
    """Whether pieces lie in ``path``."""
    return bool(_files(path))


def detect(path: Path) -> str | None:
    """Return why ``path`` looks like such a folder, or None; where they were joined, that is taken."""
    files = _files(path)
    if not files or weights.main_file(path / JOINED) is not None:
        return None
    return f"{len(files)} files shard-*-model-*.safetensors"


def side_dir(path: Path) -> Path | None:
    """Return the folder with config and tokenizer, where it is there."""
    return side_folder(path, path / _OWN, above(path))


def index_file(_: Path) -> Path | None:
    """Return None: each file describes itself."""
    return None


def identify(path: Path) -> tuple[SourceFile, ...]:
    """Return the files with size, time and the hash of their headers."""
    return weights.identify(_files(path), path)


def read(path: Path) -> Checkpoint:
    """Read the headers of all pieces in the folder ``path``.

    Raises :class:`BadInputError` where pieces overlap, leave a hole or differ in type.
    """
    files = _files(path)
    found: dict[str, list[tuple[int, FileTensor, Shape]]] = defaultdict(list)
    for number, file in enumerate(files):
        tensors, metadata = read_header_and_metadata(file)
        offsets = _offsets(file, metadata)
        for name, tensor in tensors.items():
            at = offsets.get(name, (0,) * len(tensor.shape))
            if len(at) != len(tensor.shape):
                raise BadInputError(
                    "a piece and its offsets differ in dimensions", where=f"{file}, {name}"
                )
            found[name].append((number, tensor, at))
    assembler = Assembler()
    tensors_made = {}
    for name, pieces in found.items():
        dtype = _one_dtype(name, [t.dtype for _, t, _ in pieces], path)
        shape = tuple(
            max(at[d] + t.shape[d] for _, t, at in pieces) for d in range(len(pieces[0][2]))
        )
        tensors_made[name] = assembler.tensor(
            name, dtype, shape, [_stored(number, t, at) for number, t, at in pieces]
        )
    side = side_dir(path)
    return Checkpoint(
        root=path,
        format=NAME,
        files=weights.identify(files, path),
        tensors=MappingProxyType(tensors_made),
        side_dir=side,
        notices=_notices(files, path, side),
        unproved=_UNSEEN,
        facts=MappingProxyType({"ranks": len({f.name[:11] for f in files})}),
    )


def _notices(files: Sequence[Path], path: Path, side: Path | None) -> tuple[str, ...]:
    """Return what the names of files tell to be missing, which config.json would prove.

    Raises :class:`BadInputError` where there is no config.json.
    """
    found = [m for f in files if (m := _PIECES.fullmatch(f.name))]
    most = max(int(m["of"]) for m in found)
    missing = sorted({*range(1, most + 1)} - {int(m["file"]) for m in found})
    names = ", ".join(f"shard-*-model-{n:05d}-of-{most:05d}.safetensors" for n in missing[:5])
    if missing and side is None:
        raise BadInputError(
            f"{len(missing)} of {most} files are missing on every rank",
            where=str(path),
            expected=names,
            hint="copy the missing files, or put config.json beside the others: it tells whether the "
            "model is whole without them",
        )
    if missing:
        return (f"no rank has {names}: config.json tells whether the model is whole without them",)
    return ()


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if _PIECES.fullmatch(p.name))


def _offsets(file: Path, metadata: Mapping[str, object]) -> dict[str, Shape]:
    """Return where the pieces of a file begin, by tensor."""
    text = metadata.get(_SHARDING)
    try:
        said = json.loads(text) if isinstance(text, str) else {}
        offsets = {name: tuple(entry["saved_offsets"]) for name, entry in said.items()}
        if not all(type(n) is int and n >= 0 for at in offsets.values() for n in at):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadInputError(
            "where the pieces of a file belong cannot be read",
            where=str(file),
            expected=f"{_SHARDING} in the header, with saved_offsets of each tensor",
        ) from None
    if not offsets:
        raise BadInputError(
            "the file does not say where its pieces belong",
            where=str(file),
            expected=f"{_SHARDING} in the header",
            hint=f"was it made by torch's HuggingFace writer? {INDEX} names the files of a whole model",
        )
    return offsets


def _one_dtype(name: str, dtypes: list[DType], path: Path) -> DType:
    if len(set(dtypes)) > 1:
        raise BadInputError(
            "the pieces of a tensor differ in type",
            where=f"{path}, {name}",
            found=", ".join(sorted({d.name for d in dtypes})),
            hint="are all files of the same step?",
        )
    return dtypes[0]


def _stored(number: int, tensor: FileTensor, offsets: Shape) -> Stored:
    record = Record(number, 0, tensor.begin, tensor.end - tensor.begin, 0, 0)
    return Stored(Box(offsets, tensor.shape), contiguous_strides(tensor.shape), 0, record)
