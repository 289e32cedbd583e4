"""Plain torch distributed checkpoints (DCP): what ``torch.distributed.checkpoint.save`` writes.

Byte layout: that of :mod:`streamconv.formats.dcp.folder`. The names are those of the state dict that
was given to it: a model's own, mostly below a key of the trainer's (``model.``, ``module.``,
``app.model.``), beside an optimizer. How much of it is a prefix, the model decides
(:mod:`streamconv.tracing.hf_names`), not this module. Accelerate keeps the weights in
``pytorch_model_fsdp_0/``, VeOmni in ``global_step_N/``. Megatron-FSDP (``fsdp_dtensor``) writes such a
folder with Megatron's names, and these are treated as in
:mod:`streamconv.formats.megatron.torch_dist`; so is one of torch_dist whose ``metadata.json`` is lost.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from streamconv.errors import BadInputError
from streamconv.formats import trainer_state
from streamconv.formats.assembly import Assembler
from streamconv.formats.dcp.folder import (
    INDEX,
    RecordReader,
    has_index,
    older_index,
    read_index,
    source_files,
)
from streamconv.formats.megatron.names import is_mcore, unwrapped, why_no_weight
from streamconv.formats.megatron.torch_dist import (
    canonical_tensors,
    count_ranks,
    run_facts,
    side_of,
)
from streamconv.ir.source import Checkpoint, GlobalTensor, Skipped, SourceFile
from streamconv.torchfile.dcp import DcpIndex, DcpTensor

NAME = "dcp"
FINISHED = False
SEVERAL = True

_OPTIMIZER_FOLDER = re.compile(r"optim(izer)?(_\d+)?", re.ASCII)


def detect(path: Path) -> str | None:
    """Return why ``path`` looks like such a folder, or None."""
    if has_index(path) and not _OPTIMIZER_FOLDER.fullmatch(path.name):
        return "an index .metadata"
    return None


def side_dir(path: Path) -> Path | None:
    """Return the folder with config and tokenizer beside or above the weights, where it is there."""
    return side_of(path)


def index_file(path: Path) -> Path | None:
    """Return the file that describes the others."""
    return path / INDEX


def identify(path: Path) -> tuple[SourceFile, ...]:
    """Return the files of records with size, time and the hash of their index."""
    return source_files(path, path)


def read(path: Path) -> Checkpoint:
    """Read the metadata of the checkpoint in the folder ``path``.

    Raises :class:`BadInputError` for missing files, and for tensors whose pieces do not make them up.
    """
    if any(path.glob("*.safetensors")) and not any(path.glob("*.distcp")):
        raise BadInputError(
            "this checkpoint was saved in safetensors pieces by torch's HuggingFace writer",
            where=str(path),
            hint="torch.distributed.checkpoint.consolidate_hf_safetensors joins them",
        )
    files = source_files(path, path)
    index = read_index(path)
    weights, skipped = _split(index)
    if not weights:
        raise BadInputError(
            "this checkpoint holds no weights",
            where=str(path),
            found=f"{len(skipped)} kinds of state",
        )
    stored = RecordReader(path, files).read(weights.values())
    mcore = is_mcore(list(weights))
    tensors: Mapping[str, GlobalTensor]
    if mcore:
        tensors = canonical_tensors(weights, stored)
    else:
        assembler = Assembler()
        tensors = {n: assembler.tensor(n, t.dtype, t.shape, stored[n]) for n, t in weights.items()}
    return Checkpoint(
        root=path,
        format=NAME,
        files=files,
        tensors=MappingProxyType(dict(tensors)),
        side_dir=side_of(path),
        skipped=skipped,
        notices=(*older_index(path, files), *(_notices(weights) if mcore else ())),
        facts=MappingProxyType(
            {
                "ranks": count_ranks(files),
                **({"megatron": run_facts(path, index)} if mcore else {}),
            }
        ),
        naming="mcore" if mcore else "trainer",
    )


def _notices(weights: Mapping[str, DcpTensor]) -> tuple[str, ...]:
    """Megatron-FSDP, which leaves its wrappers in the names, writes no ``metadata.json``; others do."""
    if any(name != unwrapped(name) for name in weights):
        return ()
    notice = "there is no metadata.json, which Megatron writes last: was the save not finished?"
    return (notice,)


def _split(index: DcpIndex) -> tuple[dict[str, DcpTensor], tuple[Skipped, ...]]:
    weights: dict[str, DcpTensor] = {}
    others: Counter[str] = Counter()
    states = trainer_state.states([*index.tensors])
    for name in index.tensors:
        reason = trainer_state.STATE if name in states else why_no_weight(name)
        if reason:
            others[reason] += 1
        else:
            weights[name] = index.tensor(name)
    skipped = [Skipped(f"{n} tensors", reason) for reason, n in others.items()]
    if index.objects:
        skipped.append(Skipped(f"{len(index.objects)} objects", "no tensors"))
    return weights, tuple(skipped)
