"""Models with Mamba layers: Nemotron-H (one block a layer) and Falcon-H1 (attention beside Mamba).

Megatron keeps each part of Mamba's projections in a tensor of its own, flat; HuggingFace has them one
after the other. Nemotron-H's MLPs and experts have no gate.
"""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import ATTENTION, MLP, TOP, D, L
from streamconv.families.ops import Tensor
from streamconv.families.rules import Dims, Family, Rule, moved, renamed, rule
from streamconv.tracing.later import torch

_PROJECTED, _CONVOLVED = ("z", "x", "B", "C", "dt"), ("x", "B", "C")


def _expect(dims: Dims, names: tuple[str, ...], parts: tuple[Tensor, ...]) -> None:
    heads = dims.number("mamba_num_heads", "mamba_n_heads")
    inner = heads * dims.number("mamba_head_dim", "mamba_d_head")
    state = dims.number("n_groups", "mamba_n_groups") * dims.number(
        "ssm_state_size", "mamba_d_state"
    )
    rows = {"z": inner, "x": inner, "B": state, "C": state, "dt": heads}
    dims.expect("the rows of Mamba", [rows[n] for n in names], [p.shape[0] for p in parts])


def projected(dims: Dims, *parts: Tensor) -> Tensor:
    """z, x, B, C, dt ``[rows, H]`` → one after the other."""
    _expect(dims, _PROJECTED, parts)
    return torch.cat(parts)


def convolved(dims: Dims, *parts: Tensor) -> Tensor:
    """x, B, C ``[rows, …]`` → one after the other."""
    _expect(dims, _CONVOLVED, parts)
    return torch.cat(parts)


def _mixer(source: str, target: str) -> tuple[Rule, ...]:
    """Return the rules of a Mamba mixer between the prefixes of both sides."""
    return (
        *(rule(source + name, target + name, ops.copy) for name in ("A_log", "D", "dt_bias")),
        *moved(source, target, {name: name for name in ("norm", "out_proj")}, ops.copy),
        rule(
            tuple(f"{source}in_proj.weight.{x}" for x in _PROJECTED),
            target + "in_proj.weight",
            projected,
        ),
        *(
            rule(
                tuple(f"{source}conv1d{joint}{kind}.{x}" for x in _CONVOLVED),
                f"{target}conv1d.{kind}",
                convolved,
            )
            for kind in ("weight", "bias")
            for joint in (".", "_")  # from Megatron-Core 0.19 on it is not a module
        ),
    )


_B = "backbone.layers.{layer}."
_NORMS = (
    "mixer.in_proj.layer_norm_weight",
    "norm.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.weight",
    "input_layernorm.weight",
)
_NEMOTRON_H = (
    *(rule(D + norm, _B + "norm.weight", ops.copy) for norm in _NORMS),
    *_mixer(D + "mixer.", _B + "mixer."),
    *(
        rule(
            f"{D}self_attention.linear_qkv.{kind}",
            tuple(f"{_B}mixer.{x}_proj.{kind}" for x in "qkv"),
            ops.qkv,
        )
        for kind in ("weight", "bias")
    ),
    *moved(
        D,
        _B + "mixer.",
        {
            "self_attention.linear_proj": "o_proj",
            "mlp.linear_fc1": "up_proj",
            "mlp.linear_fc2": "down_proj",
            "mlp.shared_experts.linear_fc1": "shared_experts.up_proj",
            "mlp.shared_experts.linear_fc2": "shared_experts.down_proj",
            "mlp.fc1_latent_proj": "fc1_latent_proj",
            "mlp.fc2_latent_proj": "fc2_latent_proj",
            "mlp.router": "gate",
        },
        ops.copy,
        ("weight", "bias"),
    ),
    rule(D + "mlp.router.expert_bias", _B + "mixer.gate.e_score_correction_bias", ops.copy),
    *moved(
        D + "mlp.experts.experts.",
        _B + "mixer.experts.{expert}.",
        {"linear_fc1": "up_proj", "linear_fc2": "down_proj"},
        ops.experts,
    ),
)
_M = "mtp.layers.{mtp}."
_MTP = (
    *moved(
        _M, "mtp.layers.{inner_first}.", {n: n for n in ("enorm", "hnorm", "eh_proj")}, ops.copy
    ),
    *moved(_M, "mtp.layers.{inner_last}.", {"final_layernorm": "final_layernorm"}, ops.copy),
    *renamed(
        _NEMOTRON_H,
        sources={D: _M + "transformer_layer.layers.{inner}."},
        targets={_B: "mtp.layers.{inner_layer}."},
    ),
)

_MLP = renamed(
    MLP,
    targets={"post_attention_layernorm.": "pre_ff_layernorm.", ".mlp.": ".feed_forward."},
)

FAMILIES = (
    Family(
        name="nemotron_h",
        model_types=("nemotron_h",),
        rules=(
            rule("embedding.word_embeddings.weight", "backbone.embeddings.weight", ops.vocab),
            rule("decoder.final_norm.weight", "backbone.norm_f.weight", ops.copy),
            rule("decoder.final_layernorm.weight", "backbone.norm_f.weight", ops.copy),
            rule("output_layer.weight", "lm_head.weight", ops.vocab),
            *_NEMOTRON_H,
            *_MTP,
        ),
        extras=("mtp.layers.{inner_layer}.{rest}",),
        hybrid=True,
    ),
    Family(
        name="falcon_h1",
        model_types=("falcon_h1",),
        rules=(
            rule("decoder.final_norm.weight", "model.final_layernorm.weight", ops.copy),
            rule("decoder.final_layernorm.weight", "model.final_layernorm.weight", ops.copy),
            *TOP,
            rule(D + "norm.weight", L + "input_layernorm.weight", ops.copy),
            *ATTENTION,
            *_mixer(D + "mamba_mixer.", L + "mamba."),
            *_MLP,
        ),
        hybrid=True,
    ),
)
