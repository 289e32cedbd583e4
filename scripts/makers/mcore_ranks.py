"""Writes Megatron's per-rank folders by hand, as its sources lay them out; knows nothing of streamconv.

A model is a dict of whole tensors under canonical names. Every rank's state dict is cut from it the
way Megatron-Core's layers cut their parameters, named as its modules are, and saved by torch.save.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

State = OrderedDict[str, torch.Tensor | None]

HIDDEN, WIDTH, VOCAB, HEAD = 8, 16, 24, 4


@dataclass(frozen=True)
class Sizes:
    """Parallel sizes, and how many layers each stage has (all pp of virtual stage 0 first)."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    stages: tuple[int, ...] = ()

    def layers(self, total: int) -> list[list[int]]:
        """Return the global numbers of each stage's layers."""
        counts = self.stages or (total // (self.pp * self.vpp),) * (self.pp * self.vpp)
        numbers = iter(range(total))
        return [[next(numbers) for _ in range(n)] for n in counts]

    def ranks(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (tp, pp, ep, etp) of the ranks that save: ranks that write the same hold the same.

        Megatron numbers the ranks of a pipeline stage twice: tp fastest for what is dense, etp and
        then ep fastest for experts.
        """
        for p in range(self.pp):
            for r in range(math.lcm(self.tp, self.ep * self.etp)):
                yield r % self.tp, p, r // self.etp % self.ep, r % self.etp

    def folder(self, tp: int, pp: int, ep: int) -> str:
        """Return the name of a rank's folder."""
        name = f"mp_rank_{tp:02d}"
        if self.pp > 1:
            name += f"_{pp:03d}"
        return name + (f"_{ep:03d}" if self.ep > 1 else "")


def rand(*shape: int) -> torch.Tensor:
    """Return bf16 values; the caller seeds."""
    return torch.randn(*shape).to(torch.bfloat16)


def dense_layer(n: int) -> dict[str, torch.Tensor]:
    """Return a layer of the llama kind: 4 query heads in 2 groups of dimension 4."""
    d = f"decoder.layers.{n}."
    return {
        d + "self_attention.linear_qkv.layer_norm_weight": rand(HIDDEN),
        d + "self_attention.linear_qkv.weight": rand((4 + 2 * 2) * HEAD, HIDDEN),
        d + "self_attention.linear_qkv.bias": rand((4 + 2 * 2) * HEAD),
        d + "self_attention.q_layernorm.weight": rand(HEAD),
        d + "self_attention.k_layernorm.weight": rand(HEAD),
        d + "self_attention.linear_proj.weight": rand(HIDDEN, 4 * HEAD),
        d + "self_attention.linear_proj.bias": rand(HIDDEN),
        d + "mlp.linear_fc1.layer_norm_weight": rand(HIDDEN),
        d + "mlp.linear_fc1.weight": rand(2 * WIDTH, HIDDEN),
        d + "mlp.linear_fc2.weight": rand(HIDDEN, WIDTH),
    }


def moe_layer(n: int, experts: int) -> dict[str, torch.Tensor]:
    """Return a layer with routed experts and a shared one."""
    d = f"decoder.layers.{n}."
    attention = {k: v for k, v in dense_layer(n).items() if ".mlp." not in k}
    return attention | {
        d + "pre_mlp_layernorm.weight": rand(HIDDEN),
        d + "mlp.router.weight": rand(experts, HIDDEN),
        d + "mlp.router.expert_bias": torch.randn(experts),
        d + "mlp.shared_experts.linear_fc1.weight": rand(2 * WIDTH, HIDDEN),
        d + "mlp.shared_experts.linear_fc2.weight": rand(HIDDEN, WIDTH),
        d + "mlp.experts.experts.linear_fc1.weight": rand(experts, 2 * WIDTH, HIDDEN),
        d + "mlp.experts.experts.linear_fc2.weight": rand(experts, HIDDEN, WIDTH),
    }


def delta_layer(n: int) -> dict[str, torch.Tensor]:
    """Return a layer of gated DeltaNet: 4 key heads, 8 value heads, each of dimension 2."""
    d = f"decoder.layers.{n}."
    rows = {"query": 8, "key": 8, "value": 16, "z": 16, "beta": 8, "alpha": 8}
    layer = {k: v for k, v in dense_layer(n).items() if ".mlp." in k}
    layer |= {f"{d}self_attention.in_proj.weight.{k}": rand(r, HIDDEN) for k, r in rows.items()}
    layer |= {
        f"{d}self_attention.conv1d.weight.{k}": rand(rows[k], 1, 4)
        for k in ("query", "key", "value")
    }
    return layer | {
        d + "self_attention.in_proj.layer_norm_weight": rand(HIDDEN),
        d + "self_attention.A_log": rand(8),
        d + "self_attention.dt_bias": rand(8),
        d + "self_attention.out_norm.weight": rand(2),
        d + "self_attention.out_proj.weight": rand(HIDDEN, 16),
    }


def mamba_layer(n: int) -> dict[str, torch.Tensor]:
    """Return a Mamba layer: 8 heads of dimension 2 in 2 groups, state 3."""
    d = f"decoder.layers.{n}.mixer."
    rows = {"z": 16, "x": 16, "B": 6, "C": 6, "dt": 8}
    layer = {f"{d}in_proj.weight.{k}": rand(r, HIDDEN) for k, r in rows.items()}
    for k in ("x", "B", "C"):
        layer |= {
            f"{d}conv1d.weight.{k}": rand(rows[k], 1, 4),
            f"{d}conv1d.bias.{k}": rand(rows[k]),
        }
    return layer | {
        d + "in_proj.layer_norm_weight": rand(HIDDEN),
        d + "A_log": rand(8),
        d + "D": rand(8),
        d + "dt_bias": rand(8),
        d + "norm.weight": rand(16),
        d + "out_proj.weight": rand(HIDDEN, 16),
    }


def latent_layer(n: int) -> dict[str, torch.Tensor]:
    """Return a layer of multi-latent attention: ranks 12 (q) and 8 (kv), rotary dimension 2."""
    d = f"decoder.layers.{n}."
    layer = {k: v for k, v in dense_layer(n).items() if ".mlp." in k}
    return layer | {
        d + "input_layernorm.weight": rand(HIDDEN),
        d + "self_attention.linear_q_down_proj.weight": rand(12, HIDDEN),
        d + "self_attention.linear_q_up_proj.layer_norm_weight": rand(12),
        d + "self_attention.linear_q_up_proj.weight": rand(4 * 6, 12),
        d + "self_attention.linear_kv_down_proj.weight": rand(8 + 2, HIDDEN),
        d + "self_attention.linear_kv_up_proj.layer_norm_weight": rand(8),
        d + "self_attention.linear_kv_up_proj.weight": rand(4 * 8, 8),
        d + "self_attention.linear_proj.weight": rand(HIDDEN, 4 * HEAD),
    }


def mtp_layer(
    layer: Callable[[int], dict[str, torch.Tensor]] = dense_layer,
) -> dict[str, torch.Tensor]:
    """Return the layer for multi-token prediction, which has an ordinary one inside."""
    inner = {
        "mtp.layers.0.transformer_layer." + k.removeprefix("decoder.layers.0."): v
        for k, v in layer(0).items()
    }
    return inner | {
        "mtp.layers.0.enorm.weight": rand(HIDDEN),
        "mtp.layers.0.hnorm.weight": rand(HIDDEN),
        "mtp.layers.0.eh_proj.weight": rand(HIDDEN, 2 * HIDDEN),
        "mtp.layers.0.final_layernorm.weight": rand(HIDDEN),
    }


def whole_model(
    layer: Callable[[int], dict[str, torch.Tensor]] = dense_layer, layers: int = 4
) -> dict[str, torch.Tensor]:
    """Return a model of alike layers, under canonical names."""
    torch.manual_seed(7)
    model = {
        "embedding.word_embeddings.weight": rand(VOCAB, HIDDEN),
        "decoder.final_layernorm.weight": rand(HIDDEN),
        "output_layer.weight": rand(VOCAB, HIDDEN),
    }
    for n in range(layers):
        model |= layer(n)
    return model


_HOW = (
    (r"linear_fc1\.(weight|bias)", "halves"),
    (r"core_attention\.softmax_offset", "rows"),
    (r"word_embeddings\.weight|output_layer\.weight|eh_proj\.weight", "rows"),
    # Of Gemma 4: VocabParallelEmbedding and ColumnParallelLinear. Within a layer all is on every rank.
    (r"per_layer_embedding\.weight|per_layer_model_proj\.weight", "rows"),
    (r"linear_(qkv|q_proj|q_up_proj|kv_up_proj)\.(weight|bias)", "rows"),
    (r"linear_qkv\.weight\._\w+", "rows"),
    (r"(in_proj|conv1d)\.(weight|bias)\.\w+|A_log|\.D|dt_bias|mixer\.norm\.weight", "rows"),
    (r"(linear_proj|linear_fc2|out_proj)\.weight", "columns"),
)


def cut(
    name: str, whole: torch.Tensor, rank: int, size: int, special: Mapping[str, str] | None = None
) -> torch.Tensor:
    """Return the part of the canonical tensor ``name`` that tensor-parallel rank ``rank`` has.

    ``special`` says of some names how they are cut, otherwise than the table does.
    """
    how = next((how for pattern, how in _HOW if re.search(f"({pattern})$", name)), "all")
    how = (special or {}).get(name, how)
    if how == "halves":
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    if how == "all":
        return whole
    return whole.chunk(size, dim=0 if how == "rows" else 1)[rank]


_LAYER = re.compile(r"((?:thinker\.)?(?:language_model\.)?decoder\.layers\.)(\d+)\.")
_AT_THE_END = re.compile(r"(thinker\.)?(language_model\.)?(decoder\.final_|output_layer|mtp\.)")


def rank_state(
    model: Mapping[str, torch.Tensor],
    sizes: Sizes,
    rank: tuple[int, int, int, int],
    virtual: int,
    kind: str,
    special: Mapping[str, str] | None = None,
) -> State:
    """Return the state dict of one stage of one rank; ``kind`` says how it keeps its experts."""
    tp, pp, ep, etp = rank
    total = 1 + max(int(m[2]) for k in model if (m := _LAYER.match(k)))
    stages = sizes.layers(total)
    number = virtual * sizes.pp + pp
    state: State = OrderedDict()
    joined: dict[str, list[torch.Tensor]] = {}
    for name, whole in model.items():
        local = name
        layer = _LAYER.match(name)
        if layer:
            if int(layer[2]) not in stages[number]:
                continue
            local = f"{layer[1]}{int(layer[2]) - stages[number][0]}.{name[layer.end() :]}"
        elif number != (len(stages) - 1 if _AT_THE_END.match(name) else 0):
            continue
        if ".experts.experts." in name:
            count = whole.shape[0] // sizes.ep
            experts = whole[ep * count : (ep + 1) * count]
            parts = [cut(name, e, etp, sizes.etp, special) for e in experts]
            state |= expert_state(local, parts, kind)
            continue
        part = cut(name, whole, tp, sizes.tp, special)
        split = re.fullmatch(r"(.*(?:in_proj|conv1d|linear_qkv)\.(?:weight|bias))\.\w+", local)
        if split:
            joined.setdefault(split[1], []).append(part)
        else:
            state[local] = part.clone()
    for local, parts in joined.items():
        state[local] = torch.cat(parts)
    state["decoder.final_layernorm._extra_state"] = torch.empty(0, dtype=torch.uint8)
    state["output_layer._extra_state"] = None
    return state


def expert_state(name: str, parts: list[torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Return a rank's experts of one parameter, as ``kind`` of module keeps them."""
    base, _, rest = name.partition("experts.experts.")
    if kind == "grouped":
        return {f"{base}experts.{rest}{e}": p.clone() for e, p in enumerate(parts)}
    if kind in ("stacked", "joined"):
        return {f"{base}experts.{rest}": (torch.stack if kind == "stacked" else torch.cat)(parts)}
    if kind == "sequential":
        return {f"{base}experts.local_experts.{e}.{rest}": p.clone() for e, p in enumerate(parts)}
    # GroupedMLP: weight1 [hidden, experts·width] is used as view(experts, hidden, width), weight2
    # [experts·width, hidden] as view(experts, width, hidden).
    stack = torch.stack([p.t() for p in parts])
    first = "linear_fc1" in rest
    shape = (HIDDEN, -1) if first else (-1, HIDDEN)
    return {f"{base}experts.weight{1 if first else 2}": stack.reshape(shape).contiguous()}


def write_ranks(
    root: Path,
    model: Mapping[str, torch.Tensor],
    sizes: Sizes,
    *,
    writer: str = "verl",
    kind: str = "grouped",
    change: Callable[[State, tuple[int, int, int, int]], object] = lambda *_: None,
    special: Mapping[str, str] | None = None,
    **args: object,
) -> Path:
    """Write the folders of all ranks below ``root`` and return the checkpoint's folder.

    ``writer`` is verl or megatron, ``special`` as in :func:`cut`; ``change`` may alter each state
    dict before it is saved; ``args`` are added to the arguments that Megatron-LM saves.
    """
    shutil.rmtree(root, ignore_errors=True)
    folder = root / ("global_step_1/actor" if writer == "verl" else "iter_0000001")
    namespace = argparse.Namespace(
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp,
        untie_embeddings_and_output_weights=True,
        params_dtype=torch.bfloat16,
        **args,
    )
    for rank in sizes.ranks():
        tp, pp, ep, _ = rank
        states = [rank_state(model, sizes, rank, v, kind, special) for v in range(sizes.vpp)]
        for state in states:
            change(state, rank)
        name = sizes.folder(tp, pp, ep)
        if writer == "verl":
            file = folder / "model" / name / "model.pt"
            content: object = states
        else:
            file = folder / name / "model_optim_rng.pt"
            models = {f"model{v}" if sizes.vpp > 1 else "model": s for v, s in enumerate(states)}
            content = {
                "args": namespace,
                "checkpoint_version": 3.0,
                "iteration": 1,
                **models,
                "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
                "rng_state": [
                    {"random_rng_state": (3, (1, 2), None), "torch": torch.get_rng_state()}
                ],
            }
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, file)
    return folder
