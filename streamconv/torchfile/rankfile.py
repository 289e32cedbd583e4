"""One rank file: its zip and its pickle, lowered to where each local tensor lies and what it is.

The pickled values are those of :mod:`streamconv.torchfile.allowlist`: a plain tensor
(``_rebuild_tensor_v2``, maybe inside ``_rebuild_parameter`` or ``_rebuild_from_type_v2``), a DTensor
(``_rebuild_from_type_v2(_rebuild_wrapper_subclass, DTensor, (…global size…), (None,
{_local_tensor, _spec}))``) or a ShardedTensor (the same with a state of five). Fields are taken by
name, every integer is checked.

A checkpoint of 1024 rank files of 2000 tensors has two million of these, so what tensors have in common
(everything but the place of the bytes) is a :class:`LocalSpec`, built and checked once for all the
tensors and files that share it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from streamconv.errors import BadInputError, StreamconvError, UnsafeInputError
from streamconv.files.inputs import opened
from streamconv.ir.dtypes import DType
from streamconv.ir.placements import Placement, ShardOrder
from streamconv.torchfile import allowlist as allowed
from streamconv.torchfile.archive import check_archive
from streamconv.torchfile.inert import Frozen, Function, Inert, InertStorage
from streamconv.torchfile.meshes import Mesh, is_ints, read_mesh
from streamconv.torchfile.unpickle import (
    MAX_PICKLE_NBYTES,
    load_inert,
    no_garbage_collection,
)
from streamconv.torchfile.values import (
    MALFORMED,
    TENSOR_CALLS,
    bad,
    check_dtensor,
    check_numbers,
    dtype_of,
    find_state_dict,
    fsdp1_modules,
    name_of,
    placement_key,
    placement_of,
    shard_order_entry,
    tensor_parts,
    why_no_tensor,
)
from streamconv.torchfile.window import FileWindow
from streamconv.torchfile.zipdir import ZipDirectory, read_directory

# Looked up once for each of two million tensors, hence names of the module's own.
REBUILD_FROM_TYPE, REBUILD_WRAPPER, DTENSOR = (
    allowed.REBUILD_FROM_TYPE,
    allowed.REBUILD_WRAPPER,
    allowed.DTENSOR,
)

# Primary weights that are quantized: tensors of classes of its own.
_TRANSFORMER_ENGINE = "a transformer_engine."
_MAX_RANK = 64  # dimensions; torch's own limit
_MAX_MESH_NBYTES = 1 << 23


@dataclass(frozen=True, slots=True, eq=False)
class LocalSpec:
    """What a local tensor is, apart from where its bytes lie; compared by identity, one per content.

    ``shape``, ``strides`` and ``storage_offset`` (in elements) describe the view of its storage of
    ``storage_numel`` elements. ``global_shape`` equals ``shape`` for a plain tensor. ``offsets`` is set
    for a ShardedTensor's shard, ``mesh``, ``placements`` and ``shard_order`` for a DTensor. ``empty``
    marks a rank that holds no shard. ``torch_2_4`` is the module path of torch ≤ 2.4.
    """

    index: int
    kind: Literal["plain", "dtensor", "sharded"]
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage_offset: int
    storage_numel: int
    global_shape: tuple[int, ...]
    mesh: Mesh | None = None
    placements: tuple[Placement, ...] = ()
    shard_order: ShardOrder | None = None
    offsets: tuple[int, ...] | None = None
    empty: bool = False
    torch_2_4: bool = False
    storage_nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage_nbytes", self.storage_numel * self.dtype.itemsize)

    @property
    def padded(self) -> bool:
        """Whether the storage holds more than the view shows, as FSDP2's uneven shards do."""
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        used = 0 if 0 in self.shape else self.storage_offset + last + 1
        return used < self.storage_numel


class Stored(NamedTuple):
    """A local tensor: its spec, and the record that holds its storage (as in ``source.Record``)."""

    spec: LocalSpec
    key: int
    start: int
    nbytes: int
    crc32: int
    header_nbytes: int


@dataclass(frozen=True, slots=True)
class RankFile:
    """What one rank file holds; no byte of a weight has been read.

    ``skipped`` are (name, reason) of values that are not tensors, ``wrapper`` the key under which the
    state dict was found when it was not the top level. ``location`` is the device of the first tensor.
    ``fsdp1`` is True when module names in ``_metadata`` are FSDP1's, None when there are none.
    """

    path: Path
    nbytes: int
    mtime_ns: int
    prefix: str
    directory_hash: str
    checksums: bool
    tensors: dict[str, Stored]
    skipped: tuple[tuple[str, str], ...]
    wrapper: str | None
    location: str
    fsdp1: bool | None


class RankReader:
    """Reads the rank files of one checkpoint, sharing specs and meshes between them."""

    def __init__(self) -> None:
        self.specs: list[LocalSpec] = []
        self.specs_by_key: dict[object, LocalSpec] = {}
        self._by_contents: dict[object, LocalSpec] = {}
        self._meshes: dict[Mesh, int] = {}
        self._mesh_list: list[Mesh] = []
        self._ranks: dict[tuple[int, ...], tuple[int, ...]] = {}

    def read(
        self, path: Path, rank: int, *, max_pickle_nbytes: int = MAX_PICKLE_NBYTES
    ) -> RankFile:
        """Read the file that global rank ``rank`` wrote.

        Raises :class:`BadInputError` and :class:`UnsafeInputError`, with the file and the FQN.
        """
        with open_archive(path) as (status, directory):
            data = directory.read_entry("data.pkl", max_nbytes=max_pickle_nbytes)
            with no_garbage_collection():
                root = load_inert(data, str(path), max_nbytes=max_pickle_nbytes)
                state_dict, wrapper = find_state_dict(root, str(path))
                contents = Contents(self, directory, rank)
                for name, value in state_dict.items():
                    contents.add(name, value)
        return RankFile(
            path,
            status.st_size,
            status.st_mtime_ns,
            directory.prefix,
            directory.directory_hash,
            directory.checksums,
            contents.tensors,
            tuple(contents.skipped),
            wrapper,
            contents.location,
            fsdp1_modules(state_dict),
        )

    def add_spec(self, key: object, spec: LocalSpec) -> LocalSpec:
        """Check, number and keep ``spec``; ``key`` finds it again."""
        spec = self.specs_by_key[key] = self._known(spec)
        return spec

    def adopt(self, spec: LocalSpec) -> LocalSpec:
        """Return the spec of this reader that equals one that another reader made."""
        if spec.mesh is not None:
            spec = replace(spec, mesh=self.mesh(self.add_mesh(spec.mesh)))
        return self._known(spec)

    def _known(self, spec: LocalSpec) -> LocalSpec:
        """Return the one spec of these contents, numbered; check and keep it where it is new."""
        contents = tuple(getattr(spec, f.name) for f in fields(spec) if f.name != "index")
        known = self._by_contents.get(contents)
        if known is None:
            _check_view(spec)
            known = self._by_contents[contents] = replace(spec, index=len(self.specs))
            self.specs.append(known)
        return known

    def add_mesh(self, mesh: Mesh) -> int:
        """Return the number of ``mesh``; equal meshes have one."""
        number = self._meshes.get(mesh)
        if number is None:
            # 1024 ranks see the same 1024 numbers: keep them once
            ranks = self._ranks.setdefault(mesh.ranks, mesh.ranks)
            mesh = replace(mesh, ranks=ranks)
            number = self._meshes[mesh] = len(self._mesh_list)
            self._mesh_list.append(mesh)
        return number

    def mesh(self, number: int) -> Mesh:
        """Return the mesh that :meth:`add_mesh` numbered."""
        return self._mesh_list[number]


@contextmanager
def open_archive(path: Path) -> Iterator[tuple[os.stat_result, ZipDirectory]]:
    """Open the torch.save zip ``path`` and yield its status and directory; it closes at the end."""
    with opened(path) as file:
        status = file.status
        directory = read_directory(FileWindow(file))
        check_archive(directory)
        yield status, directory


class Contents:
    """Collects the values of one state dict; see :class:`RankFile`."""

    def __init__(self, reader: RankReader, directory: ZipDirectory, rank: int) -> None:
        self.tensors: dict[str, Stored] = {}
        self.skipped: list[tuple[str, str]] = []
        self.location = ""
        self._reader = reader
        self._specs = reader.specs_by_key
        self._directory = directory
        self._entries = directory.entries
        self._where = directory.window.name
        self._rank = rank
        self._mesh_numbers: dict[int, int] = {}

    def add(self, name: object, value: Any) -> None:
        """Take in one entry of the state dict."""
        if type(name) is not str:
            raise UnsafeInputError(
                "a key of the state dict is not a name",
                where=self._where,
                found=type(name).__name__,
            )
        if not isinstance(value, Inert):
            self.skipped.append((name, why_no_tensor(value)))
            return
        try:
            if type(value) is REBUILD_FROM_TYPE and value.args[0] is REBUILD_WRAPPER:
                _, kind, outer, state = value.args
                if kind is DTENSOR or kind is allowed.DTENSOR_2_4:
                    stored = self._dtensor(kind, outer, state)
                elif kind is allowed.SHARDED_TENSOR:
                    stored = self._sharded(kind, outer, state)
                else:
                    raise bad(f"an unknown tensor subclass: {name_of(kind)}")
            elif type(value) in TENSOR_CALLS or isinstance(value, Function):
                stored = self._plain(value)
            else:
                self.skipped.append((name, f"a {value.path}, not a tensor"))
                return
        except StreamconvError as error:
            error.where = f"{self._where}, {name}"
            raise
        except MALFORMED:
            raise BadInputError(
                "a tensor is pickled in a way that no known torch release does",
                where=f"{self._where}, {name[:200]}",
            ) from None
        self.tensors[name] = stored

    def refuse_others(self) -> None:
        """Raise :class:`BadInputError` for what was not a tensor: a weight must not vanish."""
        for name, reason in self.skipped:
            if reason.startswith(_TRANSFORMER_ENGINE):
                raise BadInputError(
                    "a weight is kept in fp8 or fp4 by Transformer Engine, which is not supported",
                    where=f"{self._where}, {name[:200]}",
                    found=reason,
                    hint="save with --ckpt-format torch_dist, where Megatron-Core from 0.14 on writes "
                    "such weights in full precision",
                )
            raise BadInputError(
                "a weight is stored as something other than a plain tensor",
                where=f"{self._where}, {name[:200]}",
                found=reason,
            )

    def plain(self, whose: str) -> dict[str, Stored]:
        """Return the tensors; raises :class:`BadInputError` for what ``whose`` files do not hold."""
        for name, stored in self.tensors.items():
            if stored.spec.kind != "plain":
                raise BadInputError(
                    f"a tensor of a kind that {whose} do not hold",
                    where=f"{self._where}, {name[:200]}",
                    found=stored.spec.kind,
                )
        return self.tensors

    def _store(self, spec: LocalSpec, storage: InertStorage) -> Stored:
        entry = self._entries.get("data/" + storage.key)
        if entry is None:
            raise bad(f"the record data/{storage.key[:40]} is missing from the file")
        start, nbytes, crc, header_nbytes = entry
        if spec.storage_nbytes != nbytes:
            raise bad(
                "a storage and its record differ in size",
                expected=f"{spec.storage_numel} × {spec.dtype} = {spec.storage_nbytes} bytes",
                found=f"{nbytes} bytes",
            )
        key = int(storage.key)
        if str(key) != storage.key or key >> 32:
            raise UnsafeInputError("a storage key is not a number", found=storage.key[:40])
        if not self.location:
            self.location = storage.location
        return Stored(spec, key, start, nbytes, crc, header_nbytes)

    def _plain(self, value: Inert) -> Stored:
        dtype, storage, numel, offset, shape, strides = tensor_parts(value)
        check_numbers((*shape, *strides, offset))
        key = ("plain", dtype.name, shape, strides, offset, numel)
        spec = self._specs.get(key)
        if spec is None:
            spec = self._reader.add_spec(
                key, LocalSpec(0, "plain", dtype, shape, strides, offset, numel, shape)
            )
        return self._store(spec, storage)

    def _dtensor(self, kind: Any, outer: Any, state: Any) -> Stored:
        """The hot path: what one tensor has in common with others is looked up, not built."""
        _, outer_dtype, global_shape, _, _, _, _, _ = outer
        attributes, fields = state
        spec_record = fields["_spec"]
        check_dtensor(kind, outer, attributes, fields, spec_record)
        torch_2_4 = kind is allowed.DTENSOR_2_4
        spec_fields = spec_record.state
        dtype, storage, numel, offset, shape, strides = tensor_parts(fields["_local_tensor"])
        mesh_record = spec_fields["mesh"]
        mesh = self._mesh_numbers.get(id(mesh_record))
        if mesh is None:
            mesh = self._mesh_numbers[id(mesh_record)] = self._read_mesh(mesh_record)
        meta_shape, _, meta_dtype = spec_fields["tensor_meta"].args
        placements = tuple([placement_key(p) for p in spec_fields["placements"]])
        order = spec_fields.get("shard_order")
        if order is not None:
            order = tuple([shard_order_entry(e) for e in order])
        meta_shape, global_shape = tuple(meta_shape), tuple(global_shape)
        check_numbers((*shape, *strides, offset, *global_shape, *meta_shape))
        if type(outer_dtype) is not Frozen or type(meta_dtype) is not Frozen:
            raise bad("a DTensor without a dtype")
        key = (
            dtype.name,
            shape,
            strides,
            offset,
            numel,
            global_shape,
            mesh,
            placements,
            order,
            meta_shape,
            outer_dtype,
            meta_dtype,
            torch_2_4,
        )
        spec = self._specs.get(key)
        if spec is None:
            if global_shape != meta_shape or not (
                allowed.DTYPES.get(outer_dtype) == allowed.DTYPES.get(meta_dtype) == dtype.torch
            ):
                raise bad(
                    "a DTensor and its local tensor or its spec disagree",
                    expected=f"{dtype} {list(global_shape)}",
                    found=f"{name_of(outer_dtype)}, {name_of(meta_dtype)} {list(meta_shape)}",
                )
            spec = self._reader.add_spec(
                key,
                LocalSpec(
                    0,
                    "dtensor",
                    dtype,
                    shape,
                    strides,
                    offset,
                    numel,
                    global_shape,
                    mesh=self._reader.mesh(mesh),
                    placements=tuple(placement_of(*p) for p in placements),
                    shard_order=order,
                    torch_2_4=torch_2_4,
                ),
            )
        return self._store(spec, storage)

    def _sharded(self, kind: Any, outer: Any, state: Any) -> Stored:
        made, outer_dtype, global_shape, _, _, _, _, _ = outer
        global_shape, dtype = tuple(global_shape), dtype_of(outer_dtype)
        shards, metadata, _, _, _ = state
        if made is not kind or not isinstance(metadata, allowed.SHARDED_TENSOR_METADATA):
            raise bad("a ShardedTensor with a state that no torch writes")
        properties: Any = metadata.state
        size = tuple(properties["size"])
        if not is_ints(global_shape) or not is_ints(size) or global_shape != size:
            raise bad("a ShardedTensor whose sizes disagree")
        if type(shards) is not list or len(shards) > 1:
            raise bad(
                "a ShardedTensor with several local shards on one rank; FSDP writes at most one"
            )
        if not shards:
            key: object = ("empty", dtype.name, global_shape)
            spec = self._specs.get(key)
            if spec is None:
                shape = (0,) * len(global_shape)
                view = LocalSpec(0, "sharded", dtype, shape, shape, 0, 0, global_shape, empty=True)
                spec = self._reader.add_spec(key, view)
            return Stored(spec, 0, 0, 0, 0, 0)
        (shard,) = shards
        if type(shard) is not allowed.SHARDED_TENSOR_SHARD:
            raise bad("a ShardedTensor with a state that no torch writes")
        held: Any = shard.state
        attributes, fields = held
        _, place = fields["metadata"].state
        offsets, sizes = tuple(place["shard_offsets"]), tuple(place["shard_sizes"])
        local_dtype, storage, numel, offset, shape, strides = tensor_parts(fields["tensor"])
        if attributes is not None or not all(
            is_ints(t) for t in (offsets, sizes, shape, strides, (offset,))
        ):
            raise bad("a ShardedTensor's shard is malformed")
        if (
            sizes != shape
            or local_dtype is not dtype
            or not len(offsets) == len(sizes) == len(global_shape)
        ):
            raise bad(
                "a ShardedTensor and its local shard disagree",
                expected=f"{dtype} {list(sizes)} of {list(global_shape)}",
                found=f"{local_dtype} {list(shape)}",
            )
        key = ("sharded", dtype.name, shape, strides, offset, numel, global_shape, offsets)
        spec = self._specs.get(key)
        if spec is None:
            view = LocalSpec(
                0,
                "sharded",
                dtype,
                shape,
                strides,
                offset,
                numel,
                global_shape,
                offsets=offsets,
            )
            spec = self._reader.add_spec(key, view)
        return self._store(spec, storage)

    def _read_mesh(self, record: object) -> int:
        return self._reader.add_mesh(
            read_mesh(record, self._rank, self._where, self._read_small_storage)
        )

    def _read_small_storage(self, storage: InertStorage, first: int, nbytes: int) -> bytes:
        """Return bytes of a mesh's rank tensor, its local header and CRC checked."""
        data = self._directory.read_entry(f"data/{storage.key}", max_nbytes=_MAX_MESH_NBYTES)
        if first + nbytes > len(data):
            raise bad("a device mesh whose rank tensor reaches past its record")
        return data[first : first + nbytes]


def _check_view(spec: LocalSpec) -> None:
    """A view must lie inside its storage; exact integers, as no torch checks it when saving."""
    shape, strides, offset, numel = (
        spec.shape,
        spec.strides,
        spec.storage_offset,
        spec.storage_numel,
    )
    if not all(is_ints(t) for t in (shape, strides, spec.global_shape, (offset, numel))):
        raise UnsafeInputError("a size, stride or offset that is not a number, or negative")
    if len(shape) != len(strides) or len(shape) > _MAX_RANK or len(spec.global_shape) != len(shape):
        raise bad("a shape and its strides differ in rank")
    if 0 in shape:
        return
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if last >= numel:
        raise UnsafeInputError(
            "a tensor reaches outside its storage",
            expected=f"at most element {numel - 1}",
            found=f"element {last} (shape {list(shape)}, strides {list(strides)}, offset {offset})",
        )
