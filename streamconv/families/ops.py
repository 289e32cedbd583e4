"""What rules do to tensors: a few lines of torch each, run on meta tensors while planning.

Letters: H hidden size, V vocabulary, n query heads, g query groups, d head width, I width of an
MLP, E experts. Shapes are torch's ``[out, in]``.
"""

from __future__ import annotations

from streamconv.errors import BadInputError
from streamconv.families.rules import Dims
from streamconv.tracing.later import Tensor as Tensor
from streamconv.tracing.later import torch


def copy(_: Dims, tensor: Tensor) -> Tensor:
    """Hand the tensor on."""
    return tensor


def vocab(dims: Dims, tensor: Tensor) -> Tensor:
    """``[V padded, …]`` → ``[V, …]``: the rows that only fill up are last and may hold anything."""
    rows = tensor.shape[0]
    # The run's own number, without padding: a config that says less would cut trained rows off.
    tokens = dims.megatron.get("vocab_size")
    if type(tokens) is int and dims.vocab < tokens <= rows:
        dims.expect("the size of the vocabulary", dims.vocab, tokens)
    if rows < dims.vocab:
        dims.expect("the size of the vocabulary", dims.vocab, rows)
    return tensor[: dims.vocab]


def gate_up(_: Dims, fc1: Tensor) -> tuple[Tensor, ...]:
    """``[2I, …]`` → gate ``[I, …]``, up ``[I, …]``."""
    return _halves(fc1, 0)


def expert_gate_up(dims: Dims, fc1: Tensor) -> tuple[Tensor, ...]:
    """``[E, 2I, …]`` → gate ``[E, I, …]``, up ``[E, I, …]``."""
    return _halves(experts(dims, fc1), 1)


def experts(dims: Dims, tensor: Tensor) -> Tensor:
    """``[E, …]``, handed on; a missing expert shows here."""
    dims.expect("the number of experts", dims.experts, tensor.shape[0])
    return tensor


def expert_columns(dims: Dims, tensor: Tensor) -> Tensor:
    """``[E, out, in]`` → ``[E, in, out]``."""
    return experts(dims, tensor).transpose(1, 2)


def _halves(tensor: Tensor, dim: int) -> tuple[Tensor, ...]:
    if tensor.shape[dim] % 2:
        raise BadInputError(
            "a gate and an up projection of unequal size", found=str(list(tensor.shape))
        )
    return tensor.chunk(2, dim)


def qkv(dims: Dims, tensor: Tensor) -> tuple[Tensor, ...]:
    """``[g·(n/g + 2)·d, …]`` → q ``[n·d, …]``, k ``[g·d, …]``, v ``[g·d, …]``.

    Megatron keeps each group together: its query heads, its key head, its value head.
    """
    grouped, per = _groups(dims, tensor, 1)
    return (
        grouped[:, :per].flatten(0, 2),
        grouped[:, per].flatten(0, 1),
        grouped[:, per + 1].flatten(0, 1),
    )


def joined_qkv(dims: Dims, tensor: Tensor) -> Tensor:
    """The same in one tensor: all queries, all keys, all values."""
    return torch.cat(qkv(dims, tensor))


def gated_qkv(dims: Dims, tensor: Tensor) -> tuple[Tensor, ...]:
    """The same with a gate a query head: q ``[n·2·d, …]`` has query and gate of each head in turn."""
    grouped, per = _groups(dims, tensor, 2)
    query, gate = grouped[:, :per], grouped[:, per : 2 * per]
    return (
        torch.stack((query, gate), dim=2).flatten(0, 3),
        grouped[:, 2 * per].flatten(0, 1),
        grouped[:, 2 * per + 1].flatten(0, 1),
    )


def paired_qkv(dims: Dims, tensor: Tensor) -> tuple[Tensor, ...]:
    """The same where each query head has its gate right behind it, as ms-swift builds it."""
    grouped, per = _groups(dims, tensor, 2)
    return (
        grouped[:, : 2 * per].flatten(0, 2),
        grouped[:, 2 * per].flatten(0, 1),
        grouped[:, 2 * per + 1].flatten(0, 1),
    )


def _groups(dims: Dims, tensor: Tensor, queries: int) -> tuple[Tensor, int]:
    """Return ``[g, queries·n/g + 2, d, …]`` and ``n/g``."""
    if not dims.groups or dims.heads % dims.groups:
        raise BadInputError(
            "config.json: the query heads cannot be divided among the key and value heads",
            where="config.json",
            found=f"{dims.heads} and {dims.groups} heads",
        )
    dims.check_heads()
    per = dims.heads // dims.groups
    slots = queries * per + 2
    dims.expect(
        f"the rows of queries, keys and values ({dims.heads} query heads and {dims.groups} groups "
        f"of width {dims.head_dim})",
        dims.groups * slots * dims.head_dim,
        tensor.shape[0],
    )
    return tensor.reshape(dims.groups, slots, dims.head_dim, *tensor.shape[1:]), per


def swapped_halves(_: Dims, tensor: Tensor) -> Tensor:
    """``[H, 2H]`` with its two halves of columns in the other order."""
    first, second = _halves(tensor, 1)
    return torch.cat((second, first), dim=1)


def swapped_index_heads(dims: Dims, tensor: Tensor) -> Tensor:
    """``[heads·128, …]`` of an indexer with the two halves of each head in the other order."""
    dims.expect(
        "the width of an indexer's head, which slime takes for", dims.get("index_head_dim"), 128
    )
    heads = tensor.reshape(-1, 2, 64, *tensor.shape[1:])
    return torch.stack((heads[:, 1], heads[:, 0]), dim=1).flatten(0, 2)


def row(_: Dims, tensor: Tensor) -> Tensor:
    """``[E]`` → ``[1, E]``."""
    return tensor[None]


def flat_qkv(dims: Dims, tensor: Tensor) -> tuple[Tensor, ...]:
    """``[(n + 2g)·d, …]``, all queries, all keys, all values → q, k, v."""
    queries, keys = dims.heads * dims.head_dim, dims.groups * dims.head_dim
    dims.expect(
        f"the rows of queries, keys and values ({dims.heads} query heads and {dims.groups} groups "
        f"of width {dims.head_dim})",
        queries + 2 * keys,
        tensor.shape[0],
    )
    return (
        tensor[:queries],
        tensor[queries : queries + keys],
        tensor[queries + keys :],
    )


def fused_qkv(_: Dims, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q ``[n·d, …]``, k ``[g·d, …]``, v ``[g·d, …]`` → ``[(n + 2g)·d, …]``."""
    return torch.cat((q, k, v))


def fused_gate_up(_: Dims, gate: Tensor, up: Tensor) -> Tensor:
    """Gate ``[I, …]``, up ``[I, …]`` → ``[2I, …]``."""
    return torch.cat((gate, up))


def paired_queries(dims: Dims, tensor: Tensor) -> Tensor:
    """``[n·d, …]`` with rotary pairs side by side → with the two of a pair half a head apart."""
    return _halves_of_heads(dims, tensor, "query", dims.heads)


def paired_keys(dims: Dims, tensor: Tensor) -> Tensor:
    """The same of keys, ``[g·d, …]``."""
    return _halves_of_heads(dims, tensor, "key", dims.groups)


def _halves_of_heads(dims: Dims, tensor: Tensor, what: str, heads: int) -> Tensor:
    """Rotary embedding turns pairs of rows: (0, 1), (2, 3)… as complex numbers are kept, (0, d/2)… in
    HuggingFace's models.
    """
    width = dims.head_dim
    rows = f"the {what} rows ({heads} heads of width {width})"
    dims.expect(rows, heads * width, tensor.shape[0])
    if width % 2:
        raise BadInputError("rotary embedding needs heads of an even width", found=str(width))
    pairs = tensor.reshape(heads, width // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).flatten(0, 2)


BY_HEADS = frozenset(
    {qkv, joined_qkv, gated_qkv, paired_qkv, flat_qkv, paired_queries, paired_keys}
)
"""Those that put other rows in other places where the numbers of heads are others."""
