"""Megatron-Core's distributed checkpoints (torch_dist): a DCP folder whose tensors are Megatron's.

Byte layout: that of :mod:`streamconv.formats.dcp.folder`, and ``metadata.json``, written last, which
names the layout. verl keeps it as ``dist_ckpt/`` of ``actor/`` or of ``actor/model/``, Megatron-LM,
Megatron-Bridge and slime as ``iter_0000500/``. Tensor, pipeline and expert parallelism leave no trace
but the boxes of the pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from streamconv.errors import BadInputError, StreamconvError
from streamconv.files.jsonfile import object_or_empty
from streamconv.formats.assembly import Assembler, Stored
from streamconv.formats.dcp.folder import (
    INDEX,
    RecordReader,
    has_index,
    older_index,
    read_index,
    source_files,
)
from streamconv.formats.megatron import facts
from streamconv.formats.megatron.names import Place, place, why_no_weight
from streamconv.formats.side_folder import above, side_folder
from streamconv.ir.boxes import Box, Shape
from streamconv.ir.dtypes import DType
from streamconv.ir.source import Checkpoint, GlobalTensor, Skipped, SourceFile
from streamconv.torchfile.dcp import DcpIndex, DcpTensor

NAME = "torch_dist"
FINISHED = False
SEVERAL = False

_SIGN = "metadata.json"
_SUBFOLDERS = (".", "dist_ckpt", "model/dist_ckpt")
_ADAPTER = "adapter_checkpoint"  # verl's, beside dist_ckpt/
_MAX_SIGN_NBYTES = 1 << 16


def detect(path: Path) -> str | None:
    """Return why ``path`` looks like such a folder, or None."""
    folder = _data_folder(path)
    return f"{_SIGN} of torch_dist" if folder is not None else None


def _data_folder(path: Path) -> Path | None:
    for name in _SUBFOLDERS:
        folder = path / name
        if _backend(folder) == "torch_dist":
            return folder
    return None


def _backend(folder: Path) -> str | None:
    found = object_or_empty(folder / _SIGN, most_bytes=_MAX_SIGN_NBYTES)
    backend = found.get("sharded_backend")
    return backend if isinstance(backend, str) else None


def written_beside(path: Path) -> Path | None:
    """Return the folder of the finished model that the trainer wrote where others write weights here.

    verl up to 0.8 has the optimizer's states alone in ``dist_ckpt/`` and the weights in
    ``huggingface/``, unless it was told otherwise: the index tells, which is read only for that.
    """
    folder, side = _data_folder(path), side_dir(path)
    if folder is None or side is None or not any(side.glob("*.safetensors")):
        return None
    if (above(folder) / _ADAPTER).is_dir():
        return None
    try:
        weights, _ = split_weights(read_index(folder))
    except StreamconvError:
        return None  # whoever reads it says why
    return None if _has_layers(weights) else side


def _has_layers(weights: Iterable[str]) -> bool:
    return any(".layers." in name for name in weights)


def is_zarr(path: Path) -> bool:
    """Whether a folder is of Megatron-Core's older layout, which nothing here reads."""
    return _backend(path) == "zarr"


def side_dir(path: Path) -> Path | None:
    """Return the folder with config and tokenizer, where it is there."""
    return side_of(_data_folder(path) or path)


def side_of(folder: Path) -> Path | None:
    """Return the folder with config and tokenizer in or above the folder of the data."""
    places = [folder, above(folder)]
    if places[-1].name == "model":
        places.append(above(places[-1]))
    return side_folder(*places)


def index_file(path: Path) -> Path | None:
    """Return the file that describes the others."""
    return (_data_folder(path) or path) / INDEX


def identify(path: Path) -> tuple[SourceFile, ...]:
    """Return the files of records with size, time and the hash of their index."""
    return source_files(_folder(path), path)


def _folder(path: Path) -> Path:
    folder = _data_folder(path)
    if folder is None:
        raise BadInputError("no torch_dist checkpoint here", where=str(path), expected=_SIGN)
    if not has_index(folder):
        raise BadInputError(
            "a torch_dist checkpoint without its index",
            where=str(folder),
            expected=".metadata",
            hint="copy the whole folder, files that begin with a dot too",
        )
    return folder


def read(path: Path) -> Checkpoint:
    """Read the metadata of the checkpoint in the folder ``path``.

    Raises :class:`BadInputError` for missing files, and for tensors whose pieces do not make them up.
    """
    folder = _folder(path)
    files = source_files(folder, path)
    index = read_index(folder)
    weights, skipped = split_weights(index)
    if not _has_layers(weights):
        raise _no_weights(folder, skipped)
    tensors = canonical_tensors(weights, RecordReader(folder, files).read(weights.values()))
    megatron = run_facts(folder, index)
    return Checkpoint(
        root=path,
        format=NAME,
        files=files,
        tensors=MappingProxyType(tensors),
        side_dir=side_of(folder),
        skipped=skipped,
        notices=older_index(folder, files),
        facts=MappingProxyType(
            {
                "ranks": count_ranks(files),
                "parallelism": facts.parallelism(megatron),
                "megatron": megatron,
            }
        ),
        naming="mcore",
    )


def count_ranks(files: Iterable[SourceFile]) -> int:
    """Return how many ranks wrote ``files`` (``__<rank>_<thread>.distcp``)."""
    return len({Path(f.path).stem.rpartition("_")[0] for f in files})


def run_facts(folder: Path, index: DcpIndex) -> dict[str, object]:
    """Return what the checkpoint says of its run."""
    return facts.of_run(folder, _common(folder, index))


def _common(folder: Path, index: DcpIndex) -> dict[str, object]:
    if (folder / "common.pt").is_file():
        return facts.of_file(folder / "common.pt")
    for name in index.objects:
        if name.startswith("common_state"):
            record = index.object_record(name)
            if record is not None:
                return facts.of_file(folder / record.file, record.offset, record.nbytes)
    return {}


def split_weights(index: DcpIndex) -> tuple[dict[str, DcpTensor], tuple[Skipped, ...]]:
    """Return the tensors of the model, and the rest counted by what it is."""
    weights: dict[str, DcpTensor] = {}
    others: Counter[str] = Counter()
    for name in index.tensors:
        reason = why_no_weight(name)
        if reason:
            others[reason] += 1
        else:
            weights[name] = index.tensor(name)
    for name in index.objects:
        others[why_no_weight(name) or "an object that is not a tensor"] += 1
    skipped = tuple(Skipped(f"{n} entries", reason) for reason, n in sorted(others.items()))
    return weights, skipped


def _no_weights(folder: Path, skipped: tuple[Skipped, ...]) -> BadInputError:
    adapter = above(folder) / _ADAPTER
    if adapter.is_dir():
        side = side_of(folder)
        model = side if side is not None and any(side.glob("*.safetensors")) else None
        beside = f", and the trainer wrote a HuggingFace model to {model}" if model else ""
        return BadInputError(
            "this checkpoint holds no weights of the model: an adapter was trained",
            where=str(folder),
            found=f"the adapter in {adapter}{beside}",
            hint=f"no file says whether the adapter is merged into {model}: compare it with the "
            "model that the run started from"
            if model
            else "the adapter's base is the model that the run started from",
        )
    found = ", ".join(f"{s.name}: {s.reason}" for s in skipped)
    return BadInputError(
        "this checkpoint holds no weights of a Megatron model", where=str(folder), found=found
    )


def canonical_tensors(
    weights: Mapping[str, DcpTensor], stored: Mapping[str, list[Stored]]
) -> dict[str, GlobalTensor]:
    """Return the tensors under canonical names; see :mod:`streamconv.formats.megatron.names`."""
    parts: dict[str, _Parts] = {}
    for name, tensor in weights.items():
        where = place(name)
        for canonical, shape, pieces in _by_layer(tensor, where, stored[name]):
            held = parts.get(canonical)
            if held is None:
                held = parts[canonical] = _Parts(tensor.dtype, shape)
            held.add(name, where, tensor.dtype, shape, pieces)
    assembler = Assembler()
    return {
        name: assembler.tensor(name, held.dtype, held.shape, held.pieces)
        for name, held in parts.items()
    }


def _by_layer(
    tensor: DcpTensor, where: Place, stored: list[Stored]
) -> Iterator[tuple[str, Shape, list[Stored]]]:
    """Yield (canonical name, shape, pieces) of each layer; of the whole where it is not stacked."""
    if not where.stacked:
        yield where.name, tensor.shape, stored
        return
    layers: dict[int, list[Stored]] = {n: [] for n in range(tensor.shape[0])}
    for piece in stored:
        first, count = piece.box.offsets[0], piece.box.sizes[0]
        box = Box(piece.box.offsets[1:], piece.box.sizes[1:])
        for k in range(count):
            if first + k not in layers:
                raise BadInputError(
                    "a piece lies outside its tensor",
                    where=tensor.name,
                    expected=str(list(tensor.shape)),
                    found=str(piece.box),
                )
            at = piece.storage_offset + k * piece.strides[0]
            layers[first + k].append(Stored(box, piece.strides[1:], at, piece.record))
    for n, pieces in layers.items():
        yield where.canonical(n), tensor.shape[1:], pieces


class _Parts:
    """Collects the pieces of one canonical tensor, of one stored tensor or of several."""

    def __init__(self, dtype: DType, shape: Shape) -> None:
        self.dtype = dtype
        self.pieces: list[Stored] = []
        self._stored_shape = shape
        self._experts: int | None = None
        self._halves = 1
        # Of a matrix or a bias; the factor of an adapter may have an axis of experts before.
        self._half_axis = max(0, len(shape) - 2)

    @property
    def shape(self) -> Shape:
        """Return the shape of the whole."""
        shape, axis = self._stored_shape, self._half_axis
        if self._halves > 1:
            shape = (*shape[:axis], self._halves * shape[axis], *shape[axis + 1 :])
        return shape if self._experts is None else (self._experts, *shape)

    def add(
        self, name: str, where: Place, dtype: DType, shape: Shape, pieces: list[Stored]
    ) -> None:
        """Take in what is stored as ``name``."""
        if (dtype, shape) != (self.dtype, self._stored_shape):
            raise BadInputError(
                "parts of one tensor differ in type or shape",
                where=name,
                expected=f"{self.dtype} {list(self._stored_shape)}",
                found=f"{dtype} {list(shape)}",
            )
        if where.half is not None:
            self._halves = 2
        if where.expert is not None:
            self._experts = max(self._experts or 0, where.expert + 1)
        axis = self._half_axis
        shift = shape[axis] if where.half else 0
        for piece in pieces:
            box, strides = piece.box, piece.strides
            if shift:
                at = box.offsets
                box = Box((*at[:axis], at[axis] + shift, *at[axis + 1 :]), box.sizes)
            if where.expert is not None:
                box = Box((where.expert, *box.offsets), (1, *box.sizes))
                strides = (0, *strides)
            self.pieces.append(Stored(box, strides, piece.storage_offset, piece.record))
