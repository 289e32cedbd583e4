"""Meta's own files, ``consolidated.NN.pth``: a state dict from each tensor-parallel rank.

fairscale cut what a rank multiplies with by rows or by columns, the embedding by columns (Llama 1 and
2) or by rows (Llama 3), and stored everything else on every rank. No file says so, nor how many there
are: the names tell the axis, the width of the last norm that of the embedding. ``params.json`` beside
them has the sizes of the model. The names become HuggingFace's in
:mod:`streamconv.families.native`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from streamconv.errors import BadInputError
from streamconv.formats.assembly import Assembler, Stored
from streamconv.formats.identity import check_name, identify_torch_file
from streamconv.formats.replicas import Local, Replicas
from streamconv.formats.side_folder import above, side_folder
from streamconv.ir.boxes import Box, Shape
from streamconv.ir.source import Checkpoint, GlobalTensor, Skipped, SourceFile
from streamconv.torchfile.rankfile import Stored as LocalTensor
from streamconv.torchfile.single import TorchFile, read_torch_file

NAME = "meta"
FINISHED = True
SEVERAL = False

_FILE = re.compile(r"consolidated\.(\d{2,})\.pth", re.ASCII)
_ROWS = re.compile(r"layers\.\d+\.(attention\.w[qkv]|feed_forward\.w[13])\.weight|output\.weight")
_COLUMNS = re.compile(r"layers\.\d+\.(attention\.wo|feed_forward\.w2)\.weight")
_ON_EVERY_RANK = re.compile(r"(layers\.\d+\.(attention|ffn)_norm|norm)\.weight|rope\.freqs")
_EMBEDDING = "tok_embeddings.weight"
_LAST_NORM = "norm.weight"


def detect(path: Path) -> str | None:
    """Return why ``path`` looks like such a folder, or None."""
    found = _rank_files(path)
    return f"{len(found)} files consolidated.NN.pth" if found else None


def side_dir(path: Path) -> Path | None:
    """Return the folder with config and tokenizer: this one, or the one above ``original/``."""
    return side_folder(path, above(path))


def index_file(_: Path) -> Path | None:
    """Return None: each file describes itself."""
    return None


def identify(path: Path) -> tuple[SourceFile, ...]:
    """Return the files with size, time and directory hash, their pickles unread."""
    return tuple(identify_torch_file(file, path) for file in _open_folder(path))


def read(path: Path) -> Checkpoint:
    """Read the metadata of the checkpoint in the folder ``path``.

    Raises :class:`BadInputError` when a file is missing or damaged, ranks disagree, or a tensor of
    several ranks has a name that does not tell how it was cut.
    """
    listed = _open_folder(path)
    files = [read_torch_file(file) for file in listed]
    for name, file in zip(listed, files, strict=True):
        check_name(name, file.prefix)
    replicas = Replicas(listed)
    assembler = Assembler()
    tensors = {name: _joined(name, files, replicas, assembler) for name in files[0].tensors}
    return Checkpoint(
        root=path,
        format=NAME,
        files=tuple(
            replace(identify_torch_file(file, path), entry_prefix=f.prefix)
            for file, f in zip(listed, files, strict=True)
        ),
        tensors=MappingProxyType(tensors),
        side_dir=side_dir(path),
        skipped=tuple(Skipped(n, r) for n, r in sorted({s for f in files for s in f.skipped})),
        facts=MappingProxyType(
            {
                "ranks": len(files),
                "replicas_dropped": replicas.dropped,
                "replica_nbytes_dropped": replicas.dropped_nbytes,
            }
        ),
        naming="trainer",
    )


def _rank_files(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    return {int(m[1]): p for p in folder.iterdir() if (m := _FILE.fullmatch(p.name))}


def _open_folder(path: Path) -> list[Path]:
    found = _rank_files(path)
    missing = [n for n in range(max(found, default=0) + 1) if n not in found]
    if missing:
        raise BadInputError(
            f"{len(missing)} files of tensor-parallel ranks are missing",
            where=str(path),
            expected=", ".join(f"consolidated.{n:02}.pth" for n in missing[:8]),
            found=f"{len(found)} files",
            hint="copy the missing files; the checkpoint cannot be converted without them",
        )
    files = [found[n] for n in sorted(found)]
    for file in files:
        if not file.is_file():
            raise BadInputError("a file of weights that is not a regular file", where=str(file))
    return files


def _joined(
    name: str, files: Sequence[TorchFile], replicas: Replicas, assembler: Assembler
) -> GlobalTensor:
    pieces = _pieces(name, files, replicas.paths)
    spec = pieces[0].spec
    axis = _axis(name, files) if len(files) > 1 else None
    if axis is None:
        kept = Local.of(0, pieces[0])
        for other in (Local.of(number, p) for number, p in enumerate(pieces) if number):
            if not replicas.same(kept, other):
                raise BadInputError(
                    "ranks that should hold the same tensor hold different ones",
                    where=f"{name} in {replicas.path(other)}",
                    expected=f"what {replicas.path(kept).name} holds",
                    hint="are the files of different models or steps?",
                )
            replicas.drop(other)
        pieces = pieces[:1]
    size = spec.shape[axis] if axis is not None else 0
    shape = tuple(n * len(pieces) if d == axis else n for d, n in enumerate(spec.shape))
    return assembler.tensor(
        name,
        spec.dtype,
        shape,
        [
            Stored(
                Box(tuple(k * size if d == axis else 0 for d in range(len(shape))), spec.shape),
                piece.spec.strides,
                piece.spec.storage_offset,
                Local.of(k, piece).record,
            )
            for k, piece in enumerate(pieces)
        ],
    )


def _pieces(name: str, files: Sequence[TorchFile], paths: Sequence[Path]) -> list[LocalTensor]:
    """Return what each rank holds of a tensor, all of one shape."""
    lacking = [p.name for p, f in zip(paths, files, strict=True) if name not in f.tensors]
    strange = [n for f in files for n in f.tensors if n not in files[0].tensors]
    if lacking or strange:
        raise BadInputError(
            "a tensor is not in the files of all ranks",
            where=name if lacking else strange[0],
            found=f"not in {', '.join(lacking[:8] or [paths[0].name])}",
            hint="are the files of different models?",
        )
    pieces = [f.tensors[name] for f in files]
    specs = [p.spec for p in pieces]
    if any(s.kind != "plain" for s in specs) or len({(s.shape, s.dtype) for s in specs}) > 1:
        raise BadInputError(
            "a tensor is not cut into equal pieces",
            where=name,
            found=", ".join(f"{s.kind} {s.dtype.torch} {list(s.shape)}" for s in specs[:4]),
            hint="are the files of different models?",
        )
    return pieces


def _axis(name: str, files: Sequence[TorchFile]) -> int | None:
    """Return along which axis the ranks cut a tensor, None where each holds all of it."""
    held = files[0].tensors
    shape: Shape = held[name].spec.shape
    if name == _EMBEDDING and _LAST_NORM in held:
        hidden = held[_LAST_NORM].spec.shape
        if shape[1:] == hidden:
            return 0
        if (*(n * len(files) for n in shape[1:]),) == hidden:
            return 1
    if _ROWS.fullmatch(name):
        return 0
    if _COLUMNS.fullmatch(name):
        return 1
    if _ON_EVERY_RANK.fullmatch(name):
        return None
    raise BadInputError(
        "cannot determine how the ranks cut this tensor",
        where=name,
        found=f"{list(shape)} in each of {len(files)} files",
        hint="only those of Llama's language models are known: join the files with the tools of the "
        "model's maker, or take its HuggingFace release",
    )
