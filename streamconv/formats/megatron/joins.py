"""How tensor parallelism cuts each of Megatron-Core's parameters, and where the parts belong.

One table (:data:`_TABLE`) says which rule holds for which name. Some rules look at the shapes of the
parameters nearby, so that neither the arguments of the run nor a config is needed: ``linear_fc1`` is
gated where it has twice as many rows as ``linear_fc2`` has columns. A name that is not in the table
must be the same on every rank: how to put different parts together is never guessed.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from streamconv.errors import BadInputError
from streamconv.formats.assembly import Stored as Piece
from streamconv.formats.replicas import Local
from streamconv.ir.boxes import Box, Shape


@dataclass(frozen=True, slots=True)
class Part:
    """``size`` rows (or columns) of each rank's local tensor, which belong to the tensor ``name``.

    Parts of one name follow one another in it, each with those of all ranks together.
    """

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A local tensor as parts along ``dim``; ``replicated`` where all ranks hold the same.

    ``or_same`` says that the shapes fit both: ranks that hold the same have replicas, others parts.
    """

    parts: tuple[Part, ...]
    dim: int = 0
    replicated: bool = False
    or_same: bool = False


@dataclass(frozen=True, slots=True)
class Around:
    """Where a parameter stands: the local shapes on its rank, and how many ranks share it.

    ``kept`` are the prefixes of modules that are HuggingFace's own, and whole on every rank.
    """

    shapes: Mapping[str, Shape]
    ranks: int
    kept: tuple[str, ...] = ()

    @staticmethod
    def of(shapes: Mapping[str, Shape], ranks: int) -> Around:
        """Return what is around the parameters of one stage."""
        towers = {m[0] for name in shapes if (m := _TOWER.match(name))}
        megatron = {t for t in towers if any(n.startswith(t + "decoder.layers.") for n in shapes)}
        return Around(shapes, ranks, tuple(sorted(towers - megatron)))

    def shape(self, name: str, of: str) -> Shape:
        """Return the local shape of ``name``, without which the cut of ``of`` cannot be told."""
        found = self.shapes.get(name)
        if found is None:
            raise BadInputError(
                "cannot determine how this parameter is sharded: a related parameter is missing",
                where=of,
                expected=f"a parameter {name}",
            )
        return found


# A tower for pictures or sound: one of transformers' has no decoder.layers, Megatron's own has.
_TOWER = re.compile(r"(thinker\.)?(visual|vision_model|vision_tower|audio_model|audio_tower)\.")

Rule = Callable[[str, Shape, Around], Cut]


def _same(name: str, shape: Shape, around: Around) -> Cut:  # noqa: ARG001 - a rule
    return Cut((Part(name, shape[0] if shape else 1),), replicated=True)


def _rows(name: str, shape: Shape, around: Around) -> Cut:  # noqa: ARG001 - a rule
    return Cut((Part(name, shape[0]),))


def _columns(name: str, shape: Shape, around: Around) -> Cut:  # noqa: ARG001 - a rule
    return Cut((Part(name, shape[1]),), dim=1)


def _gated(name: str, shape: Shape, around: Around) -> Cut:
    """[gate of this rank; up of this rank], or plain rows where there is no gate."""
    module = name.rpartition("linear_fc1.")[0]
    width = around.shape(f"{module}linear_fc2.weight", name)[1]
    if shape[0] == 2 * width:
        return Cut((Part(name, width), Part(name, width)))
    if shape[0] == width:
        return Cut((Part(name, width),))
    raise _unexpected(
        name, f"{width} or {2 * width} rows, as linear_fc2 has {width} columns", shape
    )


def _queries(name: str, shape: Shape, around: Around) -> Cut:
    """Queries, keys and values, and behind them a row for each head where it has a gate of its own.

    The rows of keys and values are even in number and whole heads, the gates' are not.
    """
    module = name.removesuffix("linear_qkv.weight")
    norm = around.shapes.get(f"{module}q_layernorm.weight")
    out = around.shapes.get(f"{module}linear_proj.weight")
    if norm and out and norm[0]:
        width, queries = norm[0], out[1]
        heads, rest = queries // width, shape[0] - queries
        if rest % (2 * width) and rest > heads and (rest - heads) % (2 * width) == 0:
            return Cut((Part(name + "._qkv", shape[0] - heads), Part(name + "._gate", heads)))
    return _rows(name, shape, around)


def _down(name: str, shape: Shape, around: Around) -> Cut:
    """MLA's down projections: cut by rows up to Megatron-Core 0.12, on every rank from 0.13 on."""
    module, _, which = name.rpartition("linear_")
    up = around.shape(
        f"{module}linear_{which.replace('down', 'up').partition('.')[0]}.weight", name
    )
    # kv holds the rotary part too, whose width only the config knows.
    whole = shape[0] > up[1] if which.startswith("kv") else shape[0] == up[1]
    return Cut((Part(name, shape[0]),), replicated=whole)


def _fused_down(name: str, shape: Shape, around: Around) -> Cut:
    """MLA's down projections in one (0.19, mla_down_proj_fusion): q's rows, then kv's."""
    module, _, rest = name.rpartition("linear_qkv_down_proj.")
    q, kv = (around.shape(f"{module}linear_{x}_up_proj.weight", name)[1] for x in ("q", "kv"))
    whole = shape[0] > q + kv
    if not whole:
        q //= around.ranks
    return Cut(
        (
            Part(f"{module}linear_q_down_proj.{rest}", q),
            Part(f"{module}linear_kv_down_proj.{rest}", shape[0] - q),
        ),
        replicated=whole,
    )


def _width(name: str, shape: Shape, around: Around) -> Cut:
    """Norms of queries and keys: of one head and on every rank, or of the rank's whole width.

    Where a rank has one query head and one group, or its share of a group's rows comes to as many, that
    is the same width. The bytes tell then.
    """
    module = name.rpartition("self_attention.")[0] + "self_attention."
    leaf = name.rpartition(".")[2]
    q, k, qkv = (
        around.shapes.get(module + n)
        for n in (f"q_layernorm.{leaf}", f"k_layernorm.{leaf}", "linear_qkv.weight")
    )
    if not (q and k and qkv and q[0] + 2 * k[0] == qkv[0]):
        return _same(name, shape, around)
    return dataclasses.replace(_rows(name, shape, around), or_same=q[0] == k[0])


def _head(name: str, shape: Shape, around: Around) -> Cut:
    """The output layer: cut like the vocabulary, but the one row of a value model is on every rank."""
    prefix = name.rpartition("output_layer.")[0]
    embedding = around.shapes.get(f"{prefix}embedding.word_embeddings.weight")
    if embedding and shape[0] != embedding[0]:
        return _same(name, shape, around)
    return _rows(name, shape, around)


def _named(name: str, shape: Shape, parts: Sequence[tuple[str, int]]) -> Cut:
    if sum(size for _, size in parts) != shape[0]:
        expected = " + ".join(f"{size} ({part})" for part, size in parts)
        raise _unexpected(name, f"{expected} rows", shape)
    return Cut(tuple(Part(f"{name}.{part}", size) for part, size in parts))


def _delta_net(name: str, shape: Shape, around: Around) -> Cut:
    """Gated DeltaNet: the heads of this rank, kind by kind."""
    module = name.rpartition("self_attention.")[0] + "self_attention."
    heads = around.shape(f"{module}A_log", name)[0]
    value = heads * around.shape(f"{module}out_norm.weight", name)[0]
    key = max(0, around.shape(f"{module}conv1d.weight", name)[0] - value) // 2
    parts = [("query", key), ("key", key), ("value", value)]
    if ".in_proj." in name:
        parts += [("z", value), ("beta", heads), ("alpha", heads)]
    return _named(name, shape, parts)


def _mamba(name: str, shape: Shape, around: Around) -> Cut:
    """Mamba: the heads and groups of this rank, kind by kind."""
    module = name.rpartition("mixer.")[0] + "mixer."
    heads = around.shape(f"{module}A_log", name)[0]
    inner = around.shape(f"{module}out_proj.weight", name)[1]
    state = max(0, around.shape(f"{module}conv1d.weight", name)[0] - inner) // 2
    parts = [("x", inner), ("B", state), ("C", state)]
    if ".in_proj." in name:
        parts = [("z", inner), *parts, ("dt", heads)]
    return _named(name, shape, parts)


def is_factor(name: str) -> bool:
    """Whether a parameter is a factor of a LoRA adapter."""
    return _FACTOR.fullmatch(name) is not None


def _factor(name: str, shape: Shape, around: Around) -> Cut:
    """A factor of an adapter: of a module that is whole on every rank both are whole, too.

    Megatron-Bridge cuts A by its rows where the module is cut by rows, and B always by its rows.
    ms-swift (PEFT's names) has A on every rank there, and B where the module is cut by columns. B of
    ``linear_fc1`` has rows of the gate and of up, as the module has.
    """
    match = _FACTOR.fullmatch(name)
    if match is None or ".experts." in name:
        return _same(name, shape, around)
    module, bridge, part, which = match.group("module", "bridge", "part", "which")
    by_columns = module.endswith(("linear_proj", "linear_fc2", "out_proj"))
    if which in ("in", "A"):
        cut = (_columns if by_columns else _rows if bridge else _same)(name, shape, around)
    elif by_columns and not bridge:
        cut = _same(name, shape, around)
    elif module.endswith("linear_fc1") and part is None:
        cut = _gated_factor(name, module, shape, around)
    else:
        cut = _rows(name, shape, around)
    return dataclasses.replace(cut, or_same=not cut.replicated)


def _gated_factor(name: str, module: str, shape: Shape, around: Around) -> Cut:
    second = f"{module.removesuffix('1')}2."
    factors = (n for n in around.shapes if n.startswith(second) and n.endswith(_FIRST_FACTORS))
    width = around.shape(next(factors, f"{second}weight"), name)[1]
    if shape[0] not in (width, 2 * width):
        raise _unexpected(name, f"{width} or {2 * width} rows, as of linear_fc2", shape)
    return Cut((Part(name, width),) * (shape[0] // width))


def _unexpected(name: str, expected: str, shape: Shape) -> BadInputError:
    return BadInputError(
        "a parameter's shape fits no layout of Megatron-Core's",
        where=name,
        expected=expected,
        found=str(list(shape)),
    )


_FACTOR = re.compile(
    r"(?P<module>.+)(?:(?P<bridge>\.adapter)(?P<part>\.adapter_[a-z]+)?\.linear_|\.lora_)"
    r"(?P<which>in|out|A|B)(?:\.[^.]+)?\.weight",
    re.ASCII,
)
_FIRST_FACTORS = (".adapter.linear_in.weight", ".lora_A.weight", ".lora_A.default.weight")

_TABLE: tuple[tuple[str, Rule], ...] = (
    (r"(embedding\.word_embeddings|per_layer_embedding|per_layer_model_proj)\.weight", _rows),
    (r"output_layer\.(weight|bias)", _head),
    (r"linear_fc1\.(weight|bias)", _gated),
    (r"linear_qkv\.weight", _queries),
    (r"linear_(qkv|q_proj|q_up_proj|kv_up_proj)\.(weight|bias)", _rows),
    (r"(linear_proj|linear_fc2)\.weight", _columns),
    (r"(self_attention|(mamba_)?mixer)\.out_proj\.weight", _columns),
    (r"linear_(q|kv)_down_proj\.(weight|bias)", _down),
    (r"linear_qkv_down_proj\.(weight|bias)", _fused_down),
    (r"mtp\.layers\.\d+\.eh_proj\.(weight|bias)", _rows),
    (r"self_attention\.(in_proj|conv1d)\.(weight|bias)", _delta_net),
    (r"self_attention\.(A_log|dt_bias)", _rows),
    (r"(mamba_)?mixer\.(in_proj|conv1d)\.(weight|bias)", _mamba),
    (r"(mamba_)?mixer\.(A_log|D|dt_bias|norm\.weight)", _rows),
    (r"core_attention\.softmax_offset", _rows),
    (r"self_attention\.[qk]_layernorm\.(weight|bias)", _width),
    # On every rank. Listed only so that ranks which differ are called replicas that differ.
    (r"\w*(norm|layernorm)\.(weight|bias)", _same),
    (r"layer_norm_(weight|bias)", _same),
    (r"[eh]norm\.(weight|bias)", _same),
    (r"(linear_proj|linear_fc2|out_proj)\.bias", _same),
    (r"router\.(weight|bias|expert_bias)", _same),
    (r"adapter\.(adapter_[a-z]+\.)?linear_(in|out)\.weight|lora_[AB]\.([^.]+\.)?weight", _factor),
    (r"shared_experts\.gate_weight", _same),
)
_RULES = tuple((re.compile(rf"(?:^|\.)(?:{pattern})$", re.ASCII), rule) for pattern, rule in _TABLE)


def is_known(name: str) -> bool:
    """Whether the table has a row for ``name``."""
    return any(pattern.search(name) for pattern, _ in _RULES)


def cut_of(name: str, shape: Shape, around: Around) -> Cut:
    """Return how the parameter ``name``, of the local ``shape``, is cut."""
    if name.startswith(around.kept):
        return _same(name, shape, around)
    for pattern, rule in _RULES:
        if pattern.search(name):
            try:
                return rule(name, shape, around)
            except IndexError:
                raise _unexpected(name, "more dimensions", shape) from None
    return _same(name, shape, around)


def join(cut: Cut, ranks: Sequence[Local]) -> dict[str, tuple[Shape, list[Piece]]]:
    """Return the tensors that the local tensors of all ranks make: name to (shape, pieces)."""
    if cut.replicated:
        ranks = ranks[:1]
    shape, dim = ranks[0].shape, cut.dim
    totals: Counter[str] = Counter()
    for part in cut.parts:
        totals[part.name] += part.size * len(ranks)
    result: dict[str, tuple[Shape, list[Piece]]] = {
        name: ((*shape[:dim], total, *shape[dim + 1 :]) if shape else (), [])
        for name, total in totals.items()
    }
    done: Counter[str] = Counter()
    first = 0
    for part in cut.parts:
        for rank, local in enumerate(ranks):
            at = done[part.name] + rank * part.size
            result[part.name][1].append(_slice(local, dim, first, part.size, at))
        done[part.name] += part.size * len(ranks)
        first += part.size
    return result


def _slice(local: Local, dim: int, first: int, count: int, at: int) -> Piece:
    """Return ``count`` rows of ``local`` from ``first``, placed at row ``at`` of the whole."""
    if not local.shape:
        return Piece(Box((), ()), (), local.storage_offset, local.record)
    offsets, sizes = [0] * len(local.shape), list(local.shape)
    offsets[dim], sizes[dim] = at, count
    start = local.storage_offset + first * local.strides[dim]
    return Piece(Box(tuple(offsets), tuple(sizes)), local.strides, start, local.record)
