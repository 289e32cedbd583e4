"""The child of ``verify --source``: every output tensor against the rank files as torch reads them.

What the converter computes with boxes, moves and kernels is computed here with torch itself: whole
tensors are put together by torch's placements (:mod:`streamconv.verification.torch_files`), and the
names and layouts of the Hub are made by transformers' own conversion, run on these real tensors.
Where that would not fit into the budget, the traced recipe is evaluated a slice at a time. What
cannot be checked here is named with the reason, and left to the other reader.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamconv.errors import StreamconvError
from streamconv.files.memory_limit import share_of, within
from streamconv.formats.deepspeed.folder import tag_folder
from streamconv.formats.safetensors_file import FileTensor, read_folder
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import BY_TORCH, F32
from streamconv.ir.planfile import Plan
from streamconv.ir.planned import PlannedTensor
from streamconv.ir.recipe import (
    Encode,
    Recipe,
)
from streamconv.lora.names import has_adapter
from streamconv.options import JobOptions
from streamconv.planning.child import read_checkpoint
from streamconv.planning.precision import chosen_weights
from streamconv.planning.sidefiles import overridden, read_config, side_files
from streamconv.planning.understanding import one_model
from streamconv.quantization import decoding
from streamconv.system.children import serve
from streamconv.system.memory import resident_bytes
from streamconv.verification.evaluation import (
    Computing,
    LostValuesError,
    TooLargeError,
    cast_to,
    check_size,
    evaluate,
    tiles,
    torch_dtype,
)
from streamconv.verification.torch_files import (
    MappedFile,
    RankFiles,
    UnreadableError,
    map_bytes,
)
from streamconv.verification.torch_floats import (
    Files,
    FloatFiles,
    Pieces,
    SafetensorsFiles,
    quantized,
)
from streamconv.verification.zero_files import ZeroFiles

# What a tensor of a rank file takes as Python and torch objects, measured with torch 2.13.
_OBJECT_BYTES = 3000
_MARGIN_BYTES = 24 << 20
_MAX_TILE_BYTES = 32 << 20
_MIN_TILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output tensor as it was planned, without how the converter makes it."""

    name: str
    dtype: torch.dtype
    shape: Shape
    sources: frozenset[str]
    file_name: str  # the tensor in the output that holds its bytes


def _check(request: dict[str, Any]) -> dict[str, Any]:
    job = JobOptions.from_json(request["job"])
    answer = _Answer()
    plan = Plan(Path(request["plan_path"]))
    wanted = list(_wanted(plan, request["skip"]))
    others = job.average.sources if job.average is not None else ()
    try:
        inputs = [_opened(path, job, request) for path in (Path(request["src"]), *others)]
        room = _free_bytes(request["budget_bytes"])
        tile = min(_MAX_TILE_BYTES, room // 6)
        output = _Output(Path(request["folder"]))
        output.check_holds(w.file_name for w in wanted)
        if job.average is not None or job.dequantize or job.quantize is not None:
            encoded = {t.name: t.encode for t in _planned(plan) if t.encode is not None}
            computed = _Computed(inputs, job, output, tile, answer)
            for group in _chunks(wanted, room, sum(i.count for i in inputs)):
                computed.run(group, encoded)
            return answer.to_json()
        (only,) = inputs
        comparison = _Comparison(only.conversion, output, tile, room, answer)
        for batch in _batches(wanted, only.conversion, room, only.count):
            used = sorted({s for w in batch for s in w.sources})
            comparison.run(batch, only.files.read(used))
    except UnreadableError as error:
        done = answer.same | answer.differing | answer.lost | answer.left
        answer.leave((w for w in wanted if w.name not in done), str(error))
    except TooLargeError as error:
        answer.leave(wanted, str(error))
    return answer.to_json()


@dataclass(frozen=True, slots=True)
class _Input:
    """A checkpoint as torch reads it, in ``count`` files, and what transformers makes of it."""

    files: Files
    conversion: _Conversion
    count: int


def _opened(src: Path, job: JobOptions, request: Mapping[str, Any]) -> _Input:
    """Open a checkpoint; raises :class:`UnreadableError` for what torch cannot read."""
    from streamconv import formats

    format_name = formats.find_model(src, job.model).format
    computed = job.average is not None or job.dequantize or job.quantize is not None
    # A finished model is read by its own library's rules where there is something to compute.
    known = ("fsdp", "deepspeed", "huggingface") if computed else ("fsdp", "deepspeed")
    if format_name not in known:
        raise UnreadableError(f"torch has no reader for {format_name}")
    # Untrusted files: torch sees only what the strict reader has accepted.
    with within(share_of(request["budget_bytes"], resident_bytes(str(os.getppid())))):
        checkpoint = read_checkpoint(src, job.model)
    paths = [checkpoint.root / f.path for f in checkpoint.files]
    if checkpoint.undecided or (len(paths) > 1 and _all_plain(checkpoint.facts)):
        raise UnreadableError("plain tensors on several ranks say no placement")
    if job.strip_prefix is not None:
        raise UnreadableError("--strip-prefix gave the tensors other names")
    if has_adapter(checkpoint.tensors):
        raise UnreadableError("torch has no reader for LoRA adapters")
    checkpoint = chosen_weights(checkpoint, job)
    files: Files
    if format_name == "deepspeed":
        tag = tag_folder(checkpoint.root) or checkpoint.root
        files = ZeroFiles(tag, masters=job.masters == "yes")
    elif format_name == "huggingface":
        if any(path.suffix != ".safetensors" for path in paths):
            raise UnreadableError("a finished model that is not safetensors")
        files = SafetensorsFiles(paths)
    else:
        files = RankFiles(paths)
    folder, _ = side_files(checkpoint.root, checkpoint.side_dir, job)
    config, _ = overridden(read_config(folder) if folder else None, job.config)
    if job.dequantize or job.quantize is not None:
        files = FloatFiles(files, checkpoint.tensors, config)
        decoded = decoding.decode(checkpoint, [config] if config else [], F32)
        checkpoint = checkpoint if decoded is None else decoded.checkpoint
    chosen, _, prefix = one_model(checkpoint, config, job, [])
    headers = files.headers(list(chosen.tensors))
    return _Input(files, _Conversion(config, headers, job, prefix), len(paths))


def _chunks(wanted: Sequence[Wanted], room: int, files: int) -> Iterator[Sequence[Wanted]]:
    """Cut the tensors into groups whose pieces fit into memory as mere objects."""
    most = max(1, room // 4 // (_OBJECT_BYTES * files))
    for at in range(0, len(wanted), most):
        yield wanted[at : at + most]


def _planned(plan: Plan) -> Iterator[PlannedTensor]:
    for _, section in plan.sections():
        yield from section


def _all_plain(facts: Mapping[str, object]) -> bool:
    return facts.get("tensor_kinds") == ["plain"]


def _wanted(plan: Plan, skip: Sequence[str]) -> Iterator[Wanted]:
    left_out = set(skip)
    for t in _planned(plan):
        if t.name not in left_out:
            dtype = torch_dtype(t.dtype)
            sources = frozenset(sys.intern(s.fqn) for s in t.sources)
            yield Wanted(t.name, dtype, t.shape, sources, t.same_as or t.name)


def _free_bytes(budget: int) -> int:
    """Return what the budget leaves beside this process and the one that waits for it."""
    used = resident_bytes(str(os.getppid())) + resident_bytes() + _MARGIN_BYTES
    if budget - used < 6 * _MIN_TILE_BYTES:
        need = used + 6 * _MIN_TILE_BYTES
        raise TooLargeError(
            f"torch's reader needs --max-mem {-(-need // 10**7) * 10}MB, more than the budget"
        )
    return budget - used


def _batches(
    wanted: Iterable[Wanted], conversion: _Conversion, room: int, files: int
) -> Iterator[list[Wanted]]:
    """Cut the tensors into batches whose pieces on all ranks fit into memory as mere objects.

    Outputs that are converted together stay together.
    """
    groups: dict[str, list[Wanted]] = {}
    for w in wanted:
        groups.setdefault(conversion.group_of(w), []).append(w)
    most = max(1, room // 2 // (_OBJECT_BYTES * files))
    batch: list[Wanted] = []
    names: set[str] = set()
    for group in groups.values():
        more = {s for w in group for s in w.sources}
        if batch and len(names | more) > most:
            yield batch
            batch, names = [], set()
        batch += group
        names |= more
    if batch:
        yield batch


class _Answer:
    """What was found: by which way each tensor agrees, what differs, what is left and why."""

    def __init__(self) -> None:
        self.same: dict[str, str] = {}
        self.differing: dict[str, str] = {}
        self.lost: dict[str, str] = {}
        self.left: dict[str, str] = {}

    def leave(self, wanted: Iterable[Wanted], reason: str) -> _Answer:
        self.left |= {w.name: reason for w in wanted}
        return self

    def to_json(self) -> dict[str, Any]:
        return {
            "ways": dict(Counter(self.same.values())),
            "differing": self.differing,
            "lost": self.lost,
            "left": self.left,
        }


class _Conversion:
    """What transformers makes of the checkpoint's tensors, on meta and for real."""

    def __init__(
        self,
        config: Mapping[str, Any] | None,
        headers: Mapping[str, tuple[Shape, torch.dtype]],
        job: JobOptions,
        prefix: str,
    ) -> None:
        from streamconv.tracing.hf import build_meta

        given = {
            name: (shape, BY_TORCH[str(dtype).removeprefix("torch.")])
            for name, (shape, dtype) in headers.items()
        }
        model = build_meta(config, list(given), job.layout) if config is not None else None
        if model is None:
            made = [
                Recipe.identity(n.removeprefix(prefix), n, *header) for n, header in given.items()
            ]
        else:
            made = list(model.recipes(given, job.layout)[0])
        self.recipes: dict[str, Recipe] = {r.name: r for r in made}
        self.convert = model.converter(list(given)) if model is not None else None
        self._groups = _connected({r.name: frozenset(r.view.sources()) for r in made})

    def group_of(self, wanted: Wanted) -> str:
        """Return what outputs that come out of one conversion have in common."""
        return self._groups.get(wanted.name, wanted.name)

    def is_handed_on(self, name: str) -> bool:
        """Whether the output is a tensor of the checkpoint as it stands."""
        return self.recipes[name].is_identity


def _connected(uses: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """Return one name for all outputs that share sources, however indirectly."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name] = parent[parent[name]]
        return name

    for sources in uses.values():
        first, *others = sorted(sources)
        for other in others:
            parent[root(other)] = root(first)
    return {name: root(min(sources)) for name, sources in uses.items()}


class _Output:
    """The folder that is checked, mapped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tensors = read_folder(folder, nested=True)
        self._mapped: dict[Path, tuple[torch.Tensor, MappedFile]] = {}

    def check_holds(self, names: Iterable[str]) -> None:
        """Raise where a tensor is not there any more that was there a moment ago."""
        missing = next((name for name in names if name not in self.tensors), None)
        if missing is not None:
            raise StreamconvError(
                "the output changed or went away while it was compared with its source",
                where=str(self._folder),
                found=f"no {missing}",
            )

    def differs(self, tensor: FileTensor, at: int, expected: torch.Tensor, cast: bool) -> bool:
        """Whether the bytes from element ``at`` on are not those of ``expected``."""
        if tensor.path not in self._mapped:
            self._mapped[tensor.path] = map_bytes(tensor.path)
        raw, mapping = self._mapped[tensor.path]
        begin = tensor.begin + at * expected.dtype.itemsize
        held = raw[begin : begin + expected.numel() * expected.dtype.itemsize]
        mine = expected.contiguous().view(-1).view(torch.uint8)
        same = torch.equal(held, mine)
        if not same and cast:
            # A cast NaN is a NaN; which of them is nobody's promise.
            found = held.clone().view(expected.dtype)
            nan = found.isnan() & expected.reshape(-1).isnan()
            width = expected.dtype.itemsize
            bits = (held.view(-1, width) == mine.view(-1, width)).all(dim=1)
            same = bool((nan | bits).all())
        mapping.drop()
        return not same


class _Comparison:
    """Compares batches of output tensors with what torch makes of the rank files."""

    def __init__(
        self,
        conversion: _Conversion,
        output: _Output,
        tile: int,
        room: int,
        answer: _Answer,
    ) -> None:
        self._conversion = conversion
        self._output = output
        self._tile = tile
        self._room = room
        self._answer = answer

    def run(self, batch: Iterable[Wanted], pieces: Mapping[str, Pieces]) -> None:
        """Check one batch, the outputs of one conversion after those of another."""
        key = self._conversion.group_of
        for _, group in itertools.groupby(batch, key):
            converted = []
            for wanted in group:
                recipe = self._conversion.recipes.get(wanted.name)
                if recipe is None or frozenset(recipe.view.sources()) != wanted.sources:
                    self._answer.leave([wanted], "made by more than transformers' conversion")
                elif self._conversion.is_handed_on(wanted.name):
                    self._in_slices(wanted, pieces, "handed on")
                else:
                    converted.append(wanted)
            if converted:
                self._converted(converted, pieces)

    def _converted(self, group: Sequence[Wanted], pieces: Mapping[str, Pieces]) -> None:
        names = {s for w in group for s in w.sources}
        convert = self._conversion.convert
        # Once as they are, once as the conversion copies them, and room for a look at the result.
        if (
            convert is None
            or 2 * sum(pieces[n].nbytes for n in names) > self._room - 4 * self._tile
        ):
            for wanted in group:
                self._in_slices(wanted, pieces, "converted in slices")
            return
        made = convert(
            {n: pieces[n].box((0,) * len(pieces[n].shape), pieces[n].shape) for n in names}
        )
        for wanted in group:
            tensor = made.get(wanted.name)
            if tensor is None or tuple(tensor.shape) != wanted.shape:
                self._answer.differing[wanted.name] = "transformers makes no such tensor of them"
                continue
            cast = tensor.dtype != wanted.dtype
            flat = tensor.contiguous().view(-1)
            step = max(1, self._tile // 8)
            self._verdict(
                wanted,
                (
                    (at, cast_to(flat[at : at + step], wanted.dtype))
                    for at in range(0, flat.numel(), step)
                ),
                cast,
                "converted",
            )

    def _in_slices(self, wanted: Wanted, pieces: Mapping[str, Pieces], way: str) -> None:
        view = self._conversion.recipes[wanted.name].view
        source = pieces[min(wanted.sources)].dtype
        width = max(source.itemsize, wanted.dtype.itemsize)
        try:
            slices = (
                (at, cast_to(evaluate(view, lo, sizes, pieces, self._tile), wanted.dtype))
                for at, lo, sizes in tiles(wanted.shape, max(1, self._tile // width))
            )
            self._verdict(wanted, slices, source != wanted.dtype, way)
        except TooLargeError as error:
            self._answer.leave([wanted], str(error))

    def _verdict(
        self,
        wanted: Wanted,
        slices: Iterable[tuple[int, torch.Tensor]],
        cast: bool,
        way: str,
    ) -> None:
        tensor = self._output.tensors[wanted.file_name]
        try:
            for at, expected in slices:
                if self._output.differs(tensor, at, expected, cast):
                    self._answer.differing[wanted.name] = f"from element {at} on"
                    return
        except LostValuesError as error:
            self._answer.lost[wanted.name] = str(error)
            return
        self._answer.same[wanted.name] = way


class _Computed:
    """Compares output tensors with what torch computes: floats of codes, sums, codes of floats."""

    def __init__(
        self,
        inputs: Sequence[_Input],
        job: JobOptions,
        output: _Output,
        tile: int,
        answer: _Answer,
    ) -> None:
        self._inputs = inputs
        self._average = job.average
        self._output = output
        self._tile = tile
        self._answer = answer

    def run(self, group: Sequence[Wanted], encoded: Mapping[str, Encode]) -> None:
        """Check some tensors."""
        names = {w.name: self._weight(w.name, encoded.get(w.name)) for w in group}
        sources = []
        for i in self._inputs:
            views = [r.view for n in names.values() if (r := i.conversion.recipes.get(n))]
            sources.append(i.files.read(sorted({s for v in views for s in v.sources()})))
        for wanted in group:
            name = names[wanted.name]
            if any(name not in i.conversion.recipes for i in self._inputs):
                self._answer.leave([wanted], "made by more than transformers' conversion")
                continue
            views = [i.conversion.recipes[name].view for i in self._inputs]
            floats = Computing(views, sources, self._average, self._tile)
            try:
                self._check_one(wanted, floats, encoded.get(wanted.name))
            except TooLargeError as error:
                self._answer.leave([wanted], str(error))
            except LostValuesError as error:
                self._answer.lost[wanted.name] = str(error)

    def _weight(self, name: str, encode: Encode | None) -> str:
        """Return the weight whose codes or scales a tensor holds, or the tensor itself."""
        if encode is None or encode.part == "codes":
            return name
        return name.removesuffix("_inv").removesuffix("_scale")

    def _check_one(self, wanted: Wanted, floats: Computing, encode: Encode | None) -> None:
        tensor = self._output.tensors[wanted.file_name]
        slices = self._encoded(floats, encode) if encode else self._plain(wanted, floats)
        for at, expected in slices:
            if self._output.differs(tensor, at, expected, cast=encode is None):
                self._answer.differing[wanted.name] = f"from element {at} on"
                return
        self._answer.same[wanted.name] = "computed"

    def _plain(self, wanted: Wanted, floats: Computing) -> Iterator[tuple[int, torch.Tensor]]:
        for at, lo, sizes in tiles(wanted.shape, max(1, self._tile // 8)):
            made = floats.box(lo, sizes)
            if made.dtype == torch.float64 and wanted.dtype.itemsize < 4:
                made = cast_to(made, torch.float32)
            yield at, cast_to(made, wanted.dtype)

    def _encoded(self, floats: Computing, encode: Encode) -> Iterator[tuple[int, torch.Tensor]]:
        (rows, columns), high = encode.shape, encode.block[0]
        check_size(high * columns * 8, self._tile)
        step = max(1, self._tile // (high * columns * 8)) * high
        for top in range(0, rows, step):
            band = floats.box((top, 0), (min(step, rows - top), columns))
            codes, scales = quantized(cast_to(band, torch.float32), encode.rule, encode.block)
            if encode.part == "codes":
                yield top * columns, codes
            else:
                yield top // high * encode.grid[1], scales


if __name__ == "__main__":
    sys.exit(serve({"check": _check}))
