"""FSDP's checkpoints as verl and Accelerate write them: a folder of files, one state dict per rank.

They are called ``model_world_size_W_rank_R.pt`` (verl) or ``pytorch_model_fsdp_0_rankR.bin``
(Accelerate with ``use_dcp=False``), which says nothing of the world's size: it is as large as the
highest rank says, and what a lost last rank held is missed by the shapes. Accelerate's LOCAL_STATE_DICT
has such files too, of flat parameters whose own shapes are nowhere: it is refused.

Byte layout: each file is a torch.save zip (see :mod:`streamconv.torchfile`). Beside them may lie
``fsdp_config.json`` (``FSDP_version``, ``world_size``), ``huggingface/`` (config, tokenizer), and files
that are not weights (``optim_…``, ``extra_state_…``). FSDP1, FSDP2, hybrid sharding, tensor
parallelism and no sharding at all look alike here: placements on a device mesh decide.

**Trap: torch 2.4 and two Shards of one dimension.** FSDP2 with tensor parallelism on torch ≤ 2.4
writes (Shard(0), Shard(0)) for data cut tp first (``_fsdp_param.py``: the placements of fsdp and tp
side by side). FSDP1 writes the same for data cut from left to right: it redistributes the tensor
(``_dtensor_extensions``), and 2.4's ``_gen_transform_infos`` replicates a nested Shard before it cuts
again. Later torch tells them apart (``_StridedShard``). So for files of 2.4 (module path
``torch.distributed._tensor``) the FSDP version decides: ``fsdp_config.json``, or FSDP1's wrapper in
the module names of the state dict's ``_metadata``. Where neither says, the checkpoint is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from streamconv.errors import BadInputError, StreamconvError
from streamconv.files.jsonfile import object_or_empty, read_json
from streamconv.formats.fsdp.merge import Cut, Merger, Pending
from streamconv.formats.identity import identify_file, source_file
from streamconv.formats.side_folder import side_folder
from streamconv.ir.source import Checkpoint, GlobalTensor, Skipped, SourceFile, Undecided
from streamconv.torchfile.meshes import Mesh
from streamconv.torchfile.rankfile import LocalSpec, RankFile, RankReader
from streamconv.torchfile.rankfiles import read_rank_files
from streamconv.torchfile.unpickle import no_garbage_collection

NAME = "fsdp"
FINISHED = False
SEVERAL = True

_RANK_FILE = re.compile(
    r"model_world_size_(?P<world>[1-9]\d*)_rank_(?P<verl>0|[1-9]\d*)\.pt|"
    r"(?P<stem>pytorch_model_fsdp(_\d+)?)_rank(?P<accelerate>0|[1-9]\d*)\.bin",
    re.ASCII,
)
_OTHER_FILE = re.compile(
    r"(optim|extra_state)_world_size_\d+_rank_\d+\.pt|optimizer(_\d+)?_rank\d+\.bin", re.ASCII
)
_FLAT = "_flat_param"
_CONFIG = "fsdp_config.json"
_MAX_EXAMPLES = 5
_MAX_CONFIG_NBYTES = 1 << 20


def detect(path: Path) -> str | None:
    """Return why ``path`` looks like such a folder, or None."""
    files = _rank_files(path)
    if not files:
        return None
    return f"{len(files)} rank files such as {files[0].path.name}"


def side_dir(path: Path) -> Path | None:
    """Return the folder with config and tokenizer, where it is there."""
    return side_folder(path)


def index_file(_: Path) -> Path | None:
    """Return None: each rank file describes itself."""
    return None


def identify(path: Path) -> tuple[SourceFile, ...]:
    """Return the rank files with size, time and directory hash, their pickles unread."""
    return tuple(identify_file(file, path) for _, file in _open_folder(path).files)


def settings(path: Path) -> list[tuple[str, str]]:
    """Return (file, what it says) where ``fsdp_config.json`` names a version: see the module's trap."""
    config = object_or_empty(path / _CONFIG, most_bytes=_MAX_CONFIG_NBYTES)
    version = config.get("FSDP_version")
    return [(_CONFIG, f"FSDP{version}")] if version in (1, 2) else []


def read(path: Path) -> Checkpoint:
    """Read the metadata of the checkpoint in the folder ``path``.

    Raises :class:`BadInputError` when rank files are missing and no replica steps in, when ranks
    disagree, or a file is damaged; :class:`UnsafeInputError` when a file asks for more than weights do.
    """
    folder = _open_folder(path)
    reader = RankReader()
    pending: dict[str, Pending] = {}
    sources: list[SourceFile] = []
    facts = _FileFacts()
    skipped: dict[str, str] = {}
    with no_garbage_collection():
        for number, contents in enumerate(read_rank_files(reader, folder.files)):
            sources.append(source_file(contents.path, contents, path))
            facts.add(contents)
            skipped.update(contents.skipped)
            for fqn, stored in contents.tensors.items():
                held = pending.get(fqn)
                if held is None:
                    held = pending[fqn] = Pending()
                held.append(number, stored)
    specs = reader.specs
    merger = Merger(
        specs,
        [file for _, file in folder.files],
        [rank for rank, _ in folder.files],
        lambda: _cut_tp_first(folder, facts),
    )
    merged = _merge(folder, pending, specs, merger)
    return Checkpoint(
        root=path,
        format=NAME,
        files=tuple(sources),
        tensors=MappingProxyType(merged.tensors),
        undecided=MappingProxyType(merged.undecided),
        side_dir=side_dir(path),
        skipped=(
            *(Skipped(n, r) for n, r in sorted(skipped.items())),
            *(Skipped(n, "optimizer or trainer state") for n in folder.other_files),
        ),
        notices=(*folder.notices, *merged.notices, *facts.notices()),
        facts=MappingProxyType(_facts(folder, facts, specs, merger)),
    )


@dataclass(frozen=True, slots=True)
class _Folder:
    path: Path
    name: str
    world_size: int
    files: tuple[tuple[int, Path], ...]  # (rank, file), by rank
    missing: tuple[int, ...]
    fsdp_version: int | None
    other_files: tuple[str, ...]
    notices: tuple[str, ...]

    def name_of(self, rank: int) -> str:
        return self.name.format(rank=rank)


@dataclass(frozen=True, slots=True, order=True)
class _RankFile:
    """A rank's file; ``name`` is what those of its kind are called, but for the rank."""

    name: str
    world_size: int
    rank: int
    path: Path


def _rank_files(path: Path) -> list[_RankFile]:
    """Return the rank files in ``path``, by the rank."""
    if not path.is_dir():
        return []
    found = []
    for file in path.iterdir():
        match = _RANK_FILE.fullmatch(file.name)
        if match is None:
            continue
        # Opening a FIFO would wait for a writer for ever.
        if file.exists() and not file.is_file():
            raise BadInputError("a rank file that is not a regular file", where=str(file))
        world = int(match["world"] or 0)
        name = f"model_world_size_{world}_rank_{{rank}}.pt"
        if match["stem"]:
            name = f"{match['stem']}_rank{{rank}}.bin"
        found.append(_RankFile(name, world, int(match["verl"] or match["accelerate"]), file))
    return sorted(found)


def _open_folder(path: Path) -> _Folder:
    found = _rank_files(path)
    kinds = Counter(f.name for f in found)
    if not kinds:
        raise BadInputError(
            "no rank files here", where=str(path), expected="model_world_size_*_rank_*.pt"
        )
    if len(kinds) > 1:
        raise BadInputError(
            "rank files of several world sizes or models in one folder: which belong together?",
            where=str(path),
            expected="files of one kind",
            found=", ".join(f"{n} files {k.format(rank='*')}" for k, n in sorted(kinds.items())),
            hint="move the files of the other run away",
        )
    (name,) = kinds
    world = found[0].world_size or 1 + max(f.rank for f in found)
    extra = [f.path.name for f in found if f.rank >= world]
    if extra:
        raise BadInputError(
            f"a rank that a world of {world} does not have",
            where=str(path),
            found=", ".join(extra[:_MAX_EXAMPLES]),
        )
    present = {f.rank for f in found}
    version, notices = _fsdp_config(path, world)
    return _Folder(
        path,
        name,
        world,
        tuple((f.rank, f.path) for f in found),
        tuple(r for r in range(world) if r not in present),
        version,
        tuple(sorted(f.name for f in path.iterdir() if _OTHER_FILE.fullmatch(f.name))),
        notices,
    )


def _fsdp_config(path: Path, world: int) -> tuple[int | None, tuple[str, ...]]:
    """Return (FSDP version, notices) of ``fsdp_config.json``; absent in old checkpoints."""
    file = path / _CONFIG
    if not file.is_file():
        return None, ()
    try:
        config = read_json(file, most_bytes=_MAX_CONFIG_NBYTES)
    except StreamconvError as error:
        return None, (f"fsdp_config.json is ignored: {error.what}",)
    if not isinstance(config, dict):
        return None, ("fsdp_config.json is ignored: no JSON object",)
    version, size = config.get("FSDP_version"), config.get("world_size")
    if type(size) is int and size != world:
        raise BadInputError(
            "the rank files and fsdp_config.json disagree about the world size",
            where=str(file),
            expected=f"{world}, as the file names say",
            found=str(size),
        )
    return (version if version in (1, 2) else None), ()


class _FileFacts:
    """What the files say about who wrote them."""

    def __init__(self) -> None:
        self.fsdp1: set[bool | None] = set()
        self.locations: set[str] = set()
        self.wrappers: set[str | None] = set()
        self.records = 0
        self.records_without_crc = 0

    def add(self, file: RankFile) -> None:
        """Take note of ``file``."""
        self.fsdp1.add(file.fsdp1)
        self.locations.add(file.location.partition(":")[0])
        self.wrappers.add(file.wrapper)
        self.records += len(file.tensors)
        self.records_without_crc += sum(
            1 for s in file.tensors.values() if not s.crc32 and s.nbytes
        )

    def notices(self) -> list[str]:
        """Return what a user should know."""
        result = [f"the state dict was found under the key {w!r}" for w in self.wrappers if w]
        if self.records_without_crc:
            result.append(
                f"{self.records_without_crc} of {self.records} records have no CRC-32: their bytes "
                "cannot be verified"
            )
        return result


def _cut_tp_first(folder: _Folder, facts: _FileFacts) -> bool:
    """Whether a torch 2.4 checkpoint with nested Shards is FSDP2's; see the module's trap."""
    wrapped = {f for f in facts.fsdp1 if f is not None}
    if folder.fsdp_version is not None:
        if wrapped == {True} and folder.fsdp_version == 2:
            raise BadInputError(
                "fsdp_config.json says FSDP2, the module names in the rank files are FSDP1's",
                where=str(folder.path),
                hint="correct FSDP_version in fsdp_config.json: the order of the pieces depends on it",
            )
        return folder.fsdp_version == 2
    if wrapped == {True}:
        return False
    if wrapped == {False}:
        return True
    raise BadInputError(
        "cannot determine the order of the pieces: torch 2.4 wrote the same placements (two Shards of "
        "one dimension) for FSDP1 and FSDP2 with tensor parallelism",
        where=str(folder.path),
        hint='say which it was in fsdp_config.json there: {"FSDP_version": 1} or {"FSDP_version": 2}',
    )


@dataclass(frozen=True, slots=True)
class _Merged:
    tensors: dict[str, GlobalTensor]
    undecided: dict[str, Undecided]
    notices: tuple[str, ...]


def _merge(
    folder: _Folder, pending: dict[str, Pending], specs: list[LocalSpec], merger: Merger
) -> _Merged:
    if not pending:
        raise BadInputError("the rank files hold no tensors", where=str(folder.path))
    flat = next((n for n in pending if n.rpartition(".")[2] == _FLAT), None)
    if flat is not None:
        raise BadInputError(
            "these files hold FSDP's flat parameters (LOCAL_STATE_DICT): no file says which "
            "parameters they are made of, nor their shapes",
            where=str(folder.path),
            found=flat,
            hint="load them where they were made, and save with SHARDED_STATE_DICT or FULL_STATE_DICT",
        )
    tensors: dict[str, GlobalTensor] = {}
    undecided: dict[str, Undecided] = {}
    lost: dict[str, Cut] = {}
    all_plain = folder.world_size > 1 and all(
        specs[i].kind == "plain" for held in pending.values() for i in set(held.specs)
    )
    for fqn, held in pending.items():
        _check_present(folder, fqn, held)
        if all_plain:
            _decide_plain(folder, fqn, held, merger, tensors, undecided)
            continue
        experts = merger.experts(fqn, held)
        if experts is not None:
            undecided[fqn] = experts
            held.release()
            continue
        cut = merger.cut(fqn, held)
        if cut.layout is None:
            lost[fqn] = cut
        else:
            tensors[fqn] = merger.tensor(fqn, held, cut)
        held.release()
    notices: list[str] = []
    if lost:
        _report_lost(folder, lost, len(pending))
    if folder.missing:
        notices.append(f"{_missing(folder)} missing, but replicas on other ranks hold every piece")
    return _Merged(tensors, undecided, tuple(notices))


def _missing(folder: _Folder) -> str:
    names = [folder.name_of(r) for r in folder.missing]
    more = f" and {len(names) - _MAX_EXAMPLES} more" if len(names) > _MAX_EXAMPLES else ""
    return f"{', '.join(names[:_MAX_EXAMPLES])}{more}"


def _check_present(folder: _Folder, fqn: str, held: Pending) -> None:
    """Every rank that is there must have the tensor: ranks save the same keys."""
    files = held.table.files
    if len(files) == len(folder.files):
        return
    absent = sorted(set(range(len(folder.files))) - set(files))
    rank, file = folder.files[absent[0]]
    raise BadInputError(
        f"rank {rank} has no tensor {fqn!r} that rank {folder.files[files[0]][0]} has",
        where=str(file),
        expected=f"the same keys in all {len(folder.files)} files",
        found=f"missing in {len(absent)} of them",
        hint="are all rank files of the same step of the same run?",
    )


def _report_lost(folder: _Folder, lost: dict[str, Cut], total: int) -> None:
    examples = "; ".join(f"{fqn} {cut.problem}" for fqn, cut in list(lost.items())[:_MAX_EXAMPLES])
    if folder.missing:
        raise BadInputError(
            f"{len(folder.missing)} of {folder.world_size} rank files are missing: {_missing(folder)}",
            where=str(folder.path),
            expected=f"{folder.world_size} files, or replicas of what the missing ones hold",
            found=f"{len(lost)} of {total} tensors have holes: {examples}",
            hint="copy the missing files; the checkpoint cannot be converted without them",
        )
    raise BadInputError(
        f"the pieces of {len(lost)} of {total} tensors do not make up the whole",
        where=str(folder.path),
        found=examples,
        hint="are all rank files of the same step of the same run, and is none missing?",
    )


def _decide_plain(
    folder: _Folder,
    fqn: str,
    held: Pending,
    merger: Merger,
    tensors: dict[str, GlobalTensor],
    undecided: dict[str, Undecided],
) -> None:
    """Very old checkpoints: every rank holds its piece along dim 0, or every rank the whole.

    Different shapes can only be pieces. Different values are pieces, or the ranks have diverged. Equal
    ones are most likely replicas, but a bias of zeros or a norm of ones would look the same cut in
    pieces. The model's shapes must tell.
    """
    differing = merger.differing(held)
    pieces = merger.stacked(fqn, held)
    if pieces is None and differing:
        raise BadInputError(
            "the ranks hold different values of a tensor that cannot be put together along dim 0: "
            "they have diverged, or their files are of different steps",
            where=merger.where(held, 0, fqn),
            found=f"other values, or another shape, on {differing.replace(' and ', ' than on ')}",
        )
    if pieces is None:
        tensors[fqn] = merger.whole(fqn, held)
        return
    if folder.missing:
        _refuse_missing(folder)
    if differing and merger.shapes_differ(held):
        tensors[fqn] = pieces
    else:
        undecided[fqn] = Undecided(pieces, merger.whole(fqn, held), differing)


def _refuse_missing(folder: _Folder) -> None:
    """Plain tensors say nothing about the whole, so no rank may be missing."""
    raise BadInputError(
        f"{len(folder.missing)} of {folder.world_size} rank files are missing: {_missing(folder)}",
        where=str(folder.path),
        hint="copy the missing files; the checkpoint cannot be converted without them",
    )


def _facts(
    folder: _Folder, files: _FileFacts, specs: list[LocalSpec], merger: Merger
) -> dict[str, object]:
    meshes = {str(s.mesh): s.mesh for s in specs if s.mesh is not None}
    kinds = sorted({s.kind for s in specs})
    return {
        "world_size": folder.world_size,
        "missing_ranks": list(folder.missing),
        "fsdp_version": folder.fsdp_version,
        "strategy": _strategy(kinds, meshes, files),
        "tensor_kinds": kinds,
        "torch": _torch_generation(specs),
        "meshes": {
            name: {"names": list(m.dim_names), "shape": list(m.shape)} for name, m in meshes.items()
        },
        "placements": dict(merger.placements.most_common()),
        "replicas_dropped": merger.replicas.dropped,
        "replica_nbytes_dropped": merger.replicas.dropped_nbytes,
        "padded_storages": any(s.padded for s in specs if s.kind == "dtensor"),
        "records": files.records,
        "records_without_crc": files.records_without_crc,
        "saved_device": sorted(files.locations),
    }


def _strategy(kinds: Sequence[str], meshes: Mapping[str, Mesh], files: _FileFacts) -> str:
    """Return a guess in words, from module names, mesh names and kinds of tensor."""
    wrapped = {f for f in files.fsdp1 if f is not None}
    name = "FSDP1" if wrapped == {True} or "sharded" in kinds else "FSDP2" if meshes else "unknown"
    names = {n for m in meshes.values() for n in m.dim_names}
    extras = [n for n in ("ddp", "tp", "ep") if n in names]
    if not meshes and "sharded" not in kinds:
        return "no sharding (plain tensors)"
    return name + "".join(f" + {'hybrid sharding' if e == 'ddp' else e}" for e in extras)


def _torch_generation(specs: list[LocalSpec]) -> str:
    if any(s.torch_2_4 for s in specs):
        return "up to 2.4"
    generations = sorted({s.mesh.generation for s in specs if s.mesh is not None})
    return ", ".join(generations) or "unknown"
