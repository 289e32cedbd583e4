"""What makes a conversion this job and no other: the checkpoint's files, and all else that counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamconv import formats
from streamconv.files.durable import hash_file
from streamconv.files.names import HF_QUANT_CONFIG
from streamconv.formats.huggingface import base as base_model
from streamconv.ir.identity import JobIdentity, identified, job_identity
from streamconv.ir.planned import SideFile
from streamconv.ir.source import SourceFile
from streamconv.lora import settings as adapter_config
from streamconv.options import JobOptions, LoraOptions

_Inputs = list[tuple[str | int, ...]]


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint as it takes part in a job: its files are relative to ``root``."""

    root: Path
    format: str
    files: Sequence[SourceFile]


def identity_of(
    source: Contents, side: Iterable[SideFile], job: JobOptions, others: Sequence[Contents] = ()
) -> JobIdentity:
    """Return the identity of converting ``source``, averaged with ``others`` if there are any.

    ``side`` are the files beside the weights. Cheap: no pickle is read.
    """
    inputs: _Inputs = list(formats.settings(source.root, source.format, job.model))
    inputs += _of_adapter(source.root, job.lora)
    for k, other in enumerate(others, 2):
        inputs += [(f"{k}/{n}", *rest) for n, *rest in _of_other(other, job)]
    return job_identity(
        source.format, source.files, side, job, inputs, _places(job, [o.root for o in others])
    )


def _of_adapter(root: Path, options: LoraOptions) -> _Inputs:
    """Return the adapter's settings, and the base model's files."""
    found: _Inputs = list(adapter_config.hashes(root))
    return found if options.base is None else found + base_inputs(options.base)


def base_inputs(base: Path) -> _Inputs:
    """Return what identifies a base model; its weights have no checksums to go by."""
    found: _Inputs = [(Path(f.path).name, *identified(f)[1:]) for f in base_model.identify(base)]
    return found + [
        (f"base/{name}", hash_file(base / name))
        for name in ("config.json", HF_QUANT_CONFIG)
        if (base / name).is_file()
    ]


def _of_other(other: Contents, job: JobOptions) -> _Inputs:
    """Return what identifies a checkpoint that the source is averaged with."""
    found: _Inputs = [("", other.format)]
    found += [(f.path, *identified(f)[1:]) for f in other.files]
    found += formats.settings(other.root, other.format, job.model)
    return found + _of_adapter(other.root, dataclasses.replace(job.lora, base=None))


def _places(job: JobOptions, roots: Sequence[Path]) -> list[Path]:
    """Return where the checkpoints lie that the source is averaged with: all of their files are there.

    ``roots`` are what their paths are relative to. A path that was given may lead into a checkpoint.
    """
    given = [p.absolute() for p in job.average.sources] if job.average is not None else []
    return [
        p if p.is_file() or r.absolute().is_relative_to(p) else r.absolute()
        for p, r in zip(given, roots, strict=True)
    ]
