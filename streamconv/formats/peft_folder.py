"""An adapter as PEFT saves it: adapter_config.json beside adapter_model.safetensors or .bin.

The names are PEFT's (``base_model.model.…lora_A.weight``); what of them is the base model's own is told
by :mod:`streamconv.lora.names`. safetensors files carry no checksums, the records of a torch file do.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from streamconv.errors import BadInputError
from streamconv.formats import safetensors_folder
from streamconv.formats.dcp.folder import Assembler, Stored
from streamconv.formats.identity import evidence_of, identify_file
from streamconv.formats.replicas import Local
from streamconv.formats.safetensors_file import read_header
from streamconv.ir.boxes import Box
from streamconv.ir.source import Checkpoint, GlobalTensor, Skipped, SourceFile
from streamconv.torchfile.rankfile import RankReader

NAME = "peft"
FINISHED = True
SEVERAL = False

_CONFIG = "adapter_config.json"
_SAFETENSORS = "adapter_model.safetensors"
_TORCH = "adapter_model.bin"


def detect(path: Path) -> str | None:
    """Return why ``path`` looks like such a folder, or None."""
    weights = _weights(path)
    found = weights is not None and (path / _CONFIG).is_file()
    return f"{_CONFIG} beside {weights.name}" if found and weights is not None else None


def _weights(path: Path) -> Path | None:
    """Return the file of weights that PEFT would load."""
    return next((f for n in (_SAFETENSORS, _TORCH) if (f := path / n).is_file()), None)


def side_dir(path: Path) -> Path | None:  # noqa: ARG001 - a format
    """Return None: config and tokenizer are the base model's."""
    return None


def index_file(path: Path) -> Path | None:  # noqa: ARG001 - a format
    """Return None: one file holds all."""
    return None


def identify(path: Path) -> tuple[SourceFile, ...]:
    """Return the file of weights with size, time and the hash of its header or directory."""
    file = _file(path)
    if file.name == _SAFETENSORS:
        return (safetensors_folder.identify_file(file, file.name),)
    return (identify_file(file, path),)


def _file(path: Path) -> Path:
    file = _weights(path)
    if file is None:
        raise BadInputError(
            "an adapter without its weights",
            where=str(path),
            expected=f"{_SAFETENSORS} or {_TORCH}",
        )
    return file


def read(path: Path) -> Checkpoint:
    """Read the metadata of the adapter in the folder ``path``.

    Raises :class:`BadInputError` for a damaged file and for values that are no whole tensors,
    :class:`UnsafeInputError` for a hostile one.
    """
    file = _file(path)
    if file.name == _TORCH:
        return _of_torch(path, file)
    found = read_header(file).values()
    return _checkpoint(
        path,
        safetensors_folder.identify_file(file, file.name),
        {t.name: safetensors_folder.global_tensor(t, 0, "whole") for t in found},
    )


def _checkpoint(
    path: Path,
    file: SourceFile,
    tensors: dict[str, GlobalTensor],
    skipped: tuple[Skipped, ...] = (),
) -> Checkpoint:
    return Checkpoint(
        root=path,
        format=NAME,
        files=(file,),
        tensors=MappingProxyType(tensors),
        skipped=skipped,
        facts=MappingProxyType({"ranks": 1}),
    )


def _of_torch(path: Path, file: Path) -> Checkpoint:
    held = RankReader().read(file, 0)
    assembler = Assembler()
    tensors: dict[str, GlobalTensor] = {}
    for name, stored in held.tensors.items():
        if stored.spec.kind != "plain":
            raise BadInputError(
                "a tensor of a kind that PEFT's files do not hold",
                where=f"{file}, {name[:200]}",
                found=stored.spec.kind,
            )
        local = Local.of(0, stored)
        piece = Stored(Box.whole(local.shape), local.strides, local.storage_offset, local.record)
        tensors[name] = assembler.tensor(name, local.dtype, local.shape, [piece])
    source = SourceFile(
        file.name,
        held.nbytes,
        held.mtime_ns,
        held.directory_hash,
        held.prefix,
        evidence="" if held.checksums else evidence_of(file),
    )
    skipped = tuple(Skipped(n, reason) for n, reason in held.skipped)
    return _checkpoint(path, source, tensors, skipped)
