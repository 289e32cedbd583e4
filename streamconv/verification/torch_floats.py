"""What torch itself makes of quantized weights, of sums, and of floats that are quantized.

The second opinion about what ``--dequantize``, ``--quantize`` and ``average`` compute: torch's own
float8 types in the place of tables, whole blocks in the place of tiles, and no code in common with
the byte path.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from streamconv.formats.safetensors_file import FileTensor, read_files
from streamconv.ir.boxes import Shape
from streamconv.verification.torch_files import MappedFile, UnreadableError, map_bytes

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# The values of e2m1, by code.
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


class Pieces(Protocol):
    """A tensor of a checkpoint, of which boxes are read."""

    @property
    def shape(self) -> Shape:
        """Return the shape of the whole."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of an element."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole."""

    def box(self, lo: Shape, sizes: Shape) -> torch.Tensor:
        """Return the elements of a box."""


Headers = dict[str, tuple[Shape, torch.dtype]]


class Files(Protocol):
    """The files of one checkpoint."""

    def headers(self, names: Iterable[str]) -> Headers:
        """Return the shape and the type of each tensor."""

    def read(self, names: Sequence[str]) -> Mapping[str, Pieces]:
        """Return tensors, of which nothing is read yet."""


@dataclass(frozen=True, slots=True)
class _Mapped:
    tensor: FileTensor
    raw: torch.Tensor
    mapping: MappedFile

    @property
    def shape(self) -> Shape:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.tensor.dtype.torch)
        return found

    @property
    def nbytes(self) -> int:
        return self.tensor.end - self.tensor.begin

    def box(self, lo: Shape, sizes: Shape) -> torch.Tensor:
        # Bytes may lie at any offset, of which a type makes no use.
        width = self.dtype.itemsize
        held = self.raw[self.tensor.begin : self.tensor.end].view(*self.shape, width)
        index = tuple(slice(a, a + n) for a, n in zip(lo, sizes, strict=True))
        made = held[index].contiguous().clone().view(-1).view(self.dtype).view(sizes)
        self.mapping.drop()
        return made


class SafetensorsFiles:
    """The files of a finished model, mapped."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._tensors = read_files(paths, paths[0].parent)
        self._mapped: dict[Path, tuple[torch.Tensor, MappedFile]] = {}

    def headers(self, names: Iterable[str]) -> Headers:
        """Return the shape and the type of each tensor."""
        return {n: (t.shape, t.dtype) for n, t in self.read([*names]).items()}

    def read(self, names: Sequence[str]) -> dict[str, Pieces]:
        """Return tensors, of which nothing is read yet."""
        return {n: self._one(self._tensors[n]) for n in names}

    def _one(self, tensor: FileTensor) -> Pieces:
        if tensor.path not in self._mapped:
            self._mapped[tensor.path] = map_bytes(tensor.path)
        return _Mapped(tensor, *self._mapped[tensor.path])


# --- quantized weights ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stored:
    codes: str
    scale: str
    outer: str = ""
    divide: bool = False

    @property
    def names(self) -> list[str]:
        return [n for n in (self.codes, self.scale, self.outer) if n]


def stored_in(headers: Mapping[str, tuple[Shape, torch.dtype]]) -> dict[str, _Stored]:
    """Return how quantized weights are stored, each by the name of its float."""
    found = {}
    for name, (shape, dtype) in headers.items():
        stem, _, leaf = name.rpartition(".")

        def there(*names: str) -> str:
            return next((n for n in names if n in headers), "")

        if leaf == "weight_packed":
            scale, outer = f"{stem}.weight_scale", there(f"{stem}.weight_global_scale")
            found[f"{stem}.weight"] = _Stored(name, scale, outer, divide=True)
        elif name.endswith("_blocks") and dtype == torch.uint8 and len(shape) == 4:
            float_ = name.removesuffix("_blocks")
            found[float_] = _Stored(name, f"{float_}_scales")
        elif leaf == "weight" and (dtype in _FLOAT8 or dtype in (torch.int8, torch.uint8)):
            names = (f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale", f"{stem}.qscale_weight")
            scale = there(*names)
            if scale and len(shape) > 1:
                found[name] = _Stored(name, scale, there(f"{name}_scale_2"))
    return found


class FloatFiles:
    """The files of a checkpoint with floats in the place of quantized weights."""

    def __init__(
        self, files: Files, names: Iterable[str], config: Mapping[str, Any] | None
    ) -> None:
        self._files = files
        self._stored = stored_in(files.headers(names))
        self._block = _declared_block(config)

    def headers(self, names: Iterable[str]) -> Headers:
        """Return the shape and the type of each tensor."""
        return {n: (p.shape, p.dtype) for n, p in self.read([*names]).items()}

    def read(self, names: Sequence[str]) -> dict[str, Pieces]:
        """Return tensors, of which nothing is read yet."""
        wanted = {n: self._stored.get(n) for n in names}
        needed = [p for n, s in wanted.items() for p in (s.names if s else [n])]
        pieces = self._files.read(sorted({*needed}))
        made: dict[str, Pieces] = {}
        for name, s in wanted.items():
            if s is None:
                made[name] = pieces[name]
                continue
            if s.codes.endswith("_blocks"):
                made[name] = _Turned(pieces[s.codes], pieces[s.scale])
                continue
            outer = pieces[s.outer] if s.outer else None
            made[name] = _Floats(pieces[s.codes], pieces[s.scale], outer, s.divide, self._block)
        return made


@dataclass(frozen=True, slots=True)
class _Floats:
    """A quantized weight as float32, a box at a time."""

    codes: Pieces
    scale: Pieces
    outer: Pieces | None
    divide: bool
    declared: tuple[int, int] | None

    def __post_init__(self) -> None:
        if len(self.codes.shape) != 2:
            raise UnreadableError("quantized weights of more than two dimensions")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)

    @property
    def per_byte(self) -> int:
        return 1 if self.codes.dtype in _FLOAT8 else 2

    @property
    def shape(self) -> Shape:
        rows, columns = self.codes.shape
        return rows, columns * self.per_byte

    @property
    def block(self) -> tuple[int, int]:
        """Return how many rows and columns one scale is for."""
        rows, columns = self.shape
        grid = self.scale.shape
        if math.prod(grid) == 1:
            return rows, columns
        if self.per_byte == 2:
            return 1, 16 if self.scale.dtype in _FLOAT8 else 32
        if grid in ((rows,), (rows, 1)):
            return 1, columns
        if self.scale.dtype in (torch.uint8, torch.float8_e8m0fnu) and grid[0] == rows:
            return 1, 32
        if self.declared is None:
            raise UnreadableError("blocks of which config.json tells no size")
        return self.declared

    def box(self, lo: Shape, sizes: Shape) -> torch.Tensor:
        (top, left), (rows, columns) = lo, sizes
        per = self.per_byte
        first, end = left // per, -(-(left + columns) // per)
        codes = self.codes.box((top, first), (rows, end - first))
        values = codes.float() if per == 1 else _halves(codes)
        values = values[:, left - first * per :][:, :columns]
        high, wide = self.block
        i = torch.arange(top, top + rows) // high
        j = torch.arange(left, left + columns) // wide
        return (
            values
            * self._scales(int(i[0]), int(i[-1]), int(j[0]), int(j[-1]))[i - i[0]][:, j - j[0]]
        )

    def _scales(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        grid = self.scale.shape
        if len(grid) == 2:
            sizes = (bottom - top + 1, right - left + 1)
            scale = self.scale.box((top, left), sizes)
        else:
            whole = self.scale.box((0,) * len(grid), grid).view(-1, 1)
            scale = whole[top : bottom + 1]
        if scale.dtype == torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu)
        made = scale.float()
        if self.outer is None:
            return made
        outer = self.outer.box((0,) * len(self.outer.shape), self.outer.shape).float().view(1, 1)
        return made / outer if self.divide else made * outer


@dataclass(frozen=True, slots=True)
class _Turned:
    """The experts of gpt-oss: bytes ``[expert, out, group, 16]``, floats ``[expert, in, out]``."""

    codes: Pieces
    scale: Pieces

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def shape(self) -> Shape:
        experts, rows, groups, width = self.codes.shape
        return experts, groups * width * 2, rows

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)

    def box(self, lo: Shape, sizes: Shape) -> torch.Tensor:
        (expert, column, row), (experts, columns, rows) = lo, sizes
        size = self.codes.shape[3] * 2
        group, end = column // size, -(-(column + columns) // size)
        at, taken = (expert, row, group), (experts, rows, end - group)
        codes = self.codes.box((*at, 0), (*taken, size // 2))
        scale = self.scale.box(at, taken).view(torch.float8_e8m0fnu).float()
        values = (_halves(codes) * scale[..., None]).view(experts, rows, -1)
        first = column - group * size
        return values[:, :, first : first + columns].transpose(1, 2).contiguous()


def _halves(codes: torch.Tensor) -> torch.Tensor:
    """Return the two values of each byte side by side, that of the lower half first."""
    byte = codes.view(torch.uint8)
    values = torch.stack([_E2M1[(byte & 15).long()], _E2M1[(byte >> 4).long()]], dim=-1)
    return values.view(*codes.shape[:-1], -1)


def _declared_block(config: Mapping[str, Any] | None) -> tuple[int, int] | None:
    said = (config or {}).get("quantization_config") or {}
    block = said.get("weight_block_size") if isinstance(said, Mapping) else None
    for group in (said.get("config_groups") or {}).values() if block is None else ():
        block = (group.get("weights") or {}).get("block_structure")
    return None if block is None else (int(block[0]), int(block[1]))


# --- sums, and floats that are quantized ------------------------------------------------------------


def added(values: Sequence[torch.Tensor], weights: Sequence[float], divisor: float) -> torch.Tensor:
    """Return the weighted sum of tensors over ``divisor``, in float64."""
    total = weights[0] * values[0].double()
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value.double()
    return total / divisor


def quantized(
    values: torch.Tensor, rule: str, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales of rows in blocks, the first of which begins with the first row."""
    (rows, columns), (high, wide) = values.shape, block
    padded = torch.nn.functional.pad(values.float(), (0, -columns % wide, 0, -rows % high))
    blocks = padded.view(-(-rows // high), high, -(-columns // wide), wide)
    scale = (blocks.abs().amax(dim=(1, 3)) / 448).clamp(min=1e-12)
    if rule.endswith("ue8m0"):
        fraction, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (fraction == 0.5).int())
    codes = (blocks / scale[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[:rows, :columns], scale
