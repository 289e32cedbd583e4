"""HuggingFace state dict → Megatron's, family by family: the oracle of the Megatron families.

Written from the families' facts and from real checkpoints, not from the converter's tables, and in
the other direction. It walks the HuggingFace tensors and takes each exactly once, so that none can
be forgotten; what a layer has (biases, norms of queries and keys, shared experts) it sees from the
names. The result has one key a layer and the experts on the first axis; ``megatron.py`` writes it in
the flavours that occur on disk.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from scripts.makers import megatron_linear
from scripts.makers.megatron_towers import intern_vit, siglip, tower_of_qwen2_5, tower_of_qwen3
from scripts.makers.megatron_walk import Part, Walk, gate_up
from scripts.makers.tiny_families import State

VOCAB_DIVISOR = 16


# Attention


def attention(w: Walk, mg: str, hf: str, *, output_gate: bool = False) -> None:
    """Queries, keys and values interleaved by group: ``[ng, per (+ per gates) + 2, hd, H]``."""
    w.copy_both(mg + "self_attention.linear_qkv.layer_norm_", hf + "input_layernorm")
    groups, heads = w.config["num_key_value_heads"], w.config["num_attention_heads"]
    for kind in ("weight", "bias"):
        if not w.has(f"{hf}self_attn.q_proj.{kind}"):
            continue
        q, k, v = (w.take(f"{hf}self_attn.{x}_proj.{kind}") for x in "qkv")
        width = k.shape[0] // groups
        rest = q.shape[1:]
        if output_gate:
            by_head = q.reshape(groups, heads // groups, 2, width, *rest)
            slots = [by_head[:, :, 0], by_head[:, :, 1]]
        else:
            slots = [q.reshape(groups, heads // groups, width, *rest)]
        slots += [x.reshape(groups, 1, width, *rest) for x in (k, v)]
        w.put(f"{mg}self_attention.linear_qkv.{kind}", torch.cat(slots, 1).flatten(0, 2))
    w.copy_both(mg + "self_attention.linear_proj", hf + "self_attn.o_proj")
    for x in "qk":
        name = f"{hf}self_attn.{x}_norm.weight"
        w.copy(f"{mg}self_attention.{x}_layernorm.weight", name, optional=True)
    sinks = mg + "self_attention.core_attention.softmax_offset"
    w.copy(sinks, hf + "self_attn.sinks", optional=True)


def latent_attention(w: Walk, mg: str, hf: str) -> None:
    """DeepSeek's MLA: names change, values do not."""
    w.copy(mg + "input_layernorm.weight", hf + "input_layernorm.weight")
    mg, hf = mg + "self_attention.", hf + "self_attn."
    for key, name in {
        "linear_q_proj": "q_proj",
        "linear_q_down_proj": "q_a_proj",
        "linear_q_up_proj": "q_b_proj",
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "linear_kv_up_proj": "kv_b_proj",
        "linear_proj": "o_proj",
    }.items():
        w.copy(f"{mg}{key}.weight", f"{hf}{name}.weight", optional=name.startswith("q_"))
    for x in ("q", "kv"):
        key, name = f"{mg}linear_{x}_up_proj.layer_norm_weight", f"{hf}{x}_a_layernorm.weight"
        if w.config.get("index_n_heads"):  # of sparse attention nothing is fused
            key = f"{mg}{x}_layernorm.weight"
        w.copy(key, name, optional=True)
    if w.has(hf + "indexer.wk.weight"):
        mg, hf = mg + "core_attention.indexer.", hf + "indexer."
        for x in ("wq_b", "wk", "weights_proj"):
            w.copy(f"{mg}linear_{x}.weight", f"{hf}{x}.weight")
        w.copy_both(mg + "k_norm", hf + "k_norm")


def gated_delta_net(w: Walk, mg: str, hf: str) -> None:
    """Linear attention: every part of the projections is a key of its own, flat."""
    c = w.config
    key_heads, value_heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
    keys = key_heads * c["linear_key_head_dim"]
    vals = value_heads * c["linear_value_head_dim"]
    mg += "self_attention."
    w.copy(mg + "in_proj.layer_norm_weight", hf + "input_layernorm.weight")
    hf += "linear_attn."
    if w.has(hf + "in_proj_qkvz.weight"):  # Qwen3-Next: interleaved by key head
        by_head = w.take(hf + "in_proj_qkvz.weight").unflatten(0, (key_heads, -1))
        widths = [keys // key_heads] * 2 + [vals // key_heads] * 2
        parts = [p.flatten(0, 1) for p in by_head.split(widths, 1)]
        by_head = w.take(hf + "in_proj_ba.weight").unflatten(0, (key_heads, -1))
        parts += [p.flatten(0, 1) for p in by_head.chunk(2, 1)]
    else:
        parts = [*w.take(hf + "in_proj_qkv.weight").split([keys, keys, vals])]
        parts += [w.take(f"{hf}in_proj_{x}.weight") for x in "zba"]
    for name, part in zip(("query", "key", "value", "z", "beta", "alpha"), parts, strict=True):
        w.put(f"{mg}in_proj.weight.{name}", part)
    convolution = w.take(hf + "conv1d.weight").split([keys, keys, vals])
    for name, part in zip(("query", "key", "value"), convolution, strict=True):
        w.put(f"{mg}conv1d.weight.{name}", part)
    w.copy(mg + "A_log", hf + "A_log")
    w.copy(mg + "dt_bias", hf + "dt_bias")
    # The run's norms are zero-centred; HuggingFace's other norms are too, this one is not.
    w.put(mg + "out_norm.weight", w.take(hf + "norm.weight") - 1)
    w.copy(mg + "out_proj.weight", hf + "out_proj.weight")


def hybrid_attention(w: Walk, mg: str, hf: str) -> None:
    if w.has(hf + "linear_attn.A_log"):
        gated_delta_net(w, mg, hf)
    else:
        attention(w, mg, hf, output_gate=True)


# MLP


def mlp(w: Walk, mg: str, hf: str, norm: str = "post_attention_layernorm") -> None:
    """The dense one: gate rows, then up rows; without a gate the up rows alone."""
    w.copy_both(mg + "mlp.linear_fc1.layer_norm_", hf + norm)
    if w.has(hf + "mlp.gate_up_proj.weight"):  # GLM-4 keeps them together itself
        w.put(mg + "mlp.linear_fc1.weight", w.take(hf + "mlp.gate_up_proj.weight"), gated=True)
    elif w.has(hf + "mlp.gate_proj.weight"):
        gate_up(w, mg + "mlp.linear_fc1", hf + "mlp.")
    else:
        w.copy_both(mg + "mlp.linear_fc1", hf + "mlp.up_proj")
    w.copy_both(mg + "mlp.linear_fc2", hf + "mlp.down_proj")


EXPERT_BIASES = (
    "mlp.expert_bias",
    "mlp.e_score_correction_bias",
    "mlp.gate.e_score_correction_bias",
    "block_sparse_moe.e_score_correction_bias",
    "mlp.moe_statics.e_score_correction_bias",
)


def moe(w: Walk, mg: str, hf: str) -> None:
    """Router, experts one by one, shared experts."""
    block, names = "mlp.", ("gate_proj", "up_proj", "down_proj")
    if w.has(hf + "block_sparse_moe.gate.weight"):
        block, names = "block_sparse_moe.", ("w1", "w3", "w2")
    router = "router.gate" if w.has(f"{hf}{block}router.gate.weight") else "gate"
    if not w.has(f"{hf}{block}{router}.weight"):  # a dense layer of a mixed model
        return mlp(w, mg, hf)
    w.copy(mg + "pre_mlp_layernorm.weight", hf + "post_attention_layernorm.weight")
    w.copy(mg + "mlp.router.weight", f"{hf}{block}{router}.weight")
    for name in EXPERT_BIASES:
        if w.has(hf + name):
            w.put(mg + "mlp.router.expert_bias", w.take(hf + name).flatten())
    if w.has(f"{hf}{block}experts.gate_up_proj"):  # all experts in one tensor
        first, second = (w.take(f"{hf}{block}experts.{x}") for x in ("gate_up_proj", "down_proj"))
        if first.shape[1] == w.config["hidden_size"]:  # [E, H, 2I], as Qwen3-VL's files have it
            first, second = first.transpose(1, 2), second.transpose(1, 2)
    else:
        fc1, fc2 = [], []
        while w.has(f"{hf}{block}experts.{len(fc1)}.{names[0]}.weight"):
            expert = f"{hf}{block}experts.{len(fc1)}."
            gate, up, down = (w.take(f"{expert}{x}.weight") for x in names)
            fc1.append(torch.cat([gate, up]))
            fc2.append(down)
        first, second = torch.stack(fc1), torch.stack(fc2)
    w.put(mg + "mlp.experts.experts.linear_fc1.weight", first, gated=True)
    w.put(mg + "mlp.experts.experts.linear_fc2.weight", second)
    for name in ("shared_expert", "shared_experts", "shared_mlp"):
        shared, key = f"{hf}{block}{name}", mg + "mlp.shared_experts."
        if w.has(shared + ".down_proj.weight"):
            gate_up(w, key + "linear_fc1", shared + ".")
            w.copy(key + "linear_fc2.weight", shared + ".down_proj.weight")
            w.copy(key + "gate_weight", shared + "_gate.weight", optional=True)
    return None


def moe_of_gpt_oss(w: Walk, mg: str, hf: str) -> None:
    """Gate and up alternate in HuggingFace's tensors, whose last axis is the output."""
    w.copy(mg + "pre_mlp_layernorm.weight", hf + "post_attention_layernorm.weight")
    w.copy_both(mg + "mlp.router", hf + "mlp.router")
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        both = w.take(f"{hf}mlp.experts.gate_up_proj{suffix}")  # [E, H, 2I] or [E, 2I]
        both = torch.cat([both[..., 0::2], both[..., 1::2]], -1)
        down = w.take(f"{hf}mlp.experts.down_proj{suffix}")  # [E, I, H] or [E, H]
        if kind == "weight":
            both, down = both.transpose(1, 2), down.transpose(1, 2)
        w.put(f"{mg}mlp.experts.experts.linear_fc1.{kind}", both, gated=True)
        w.put(f"{mg}mlp.experts.experts.linear_fc2.{kind}", down)


def mlp_of_gemma(w: Walk, mg: str, hf: str) -> None:
    """Norms around both blocks; Megatron-Bridge hangs the outer ones on the projections."""
    mlp(w, mg, hf, "pre_feedforward_layernorm")
    after = "post_layernorm.weight"
    w.copy(f"{mg}self_attention.linear_proj.{after}", hf + "post_attention_layernorm.weight")
    w.copy(f"{mg}mlp.linear_fc2.{after}", hf + "post_feedforward_layernorm.weight")


def layer_of_gemma4(w: Walk, mg: str, hf: str) -> None:
    """Megatron-Bridge's layer: rows for keys and values are there where HuggingFace has none, too."""
    q = w.take(hf + "self_attn.q_proj.weight")
    width = len(q) // w.config["num_attention_heads"]
    name = hf + "self_attn.k_proj.weight"
    if w.has(name):
        k = w.take(name)
        v = w.left.pop(name.replace(".k_proj.", ".v_proj."), k)
    else:
        k = v = torch.zeros(w.config["num_key_value_heads"] * width, q.shape[1], dtype=q.dtype)
    groups = len(k) // width
    rows = torch.cat([x.unflatten(0, (groups, -1)) for x in (q, k, v)], 1).flatten(0, 1)
    w.put(mg + "self_attention.linear_qkv.weight", rows)
    w.copy(mg + "self_attention.linear_proj.weight", hf + "self_attn.o_proj.weight")
    for x in "qk":
        key, name = f"{mg}self_attention.{x}_layernorm.weight", f"{hf}self_attn.{x}_norm.weight"
        w.copy(key, name, optional=x == "k")
    w.copy(mg + "layer_scalar", hf + "layer_scalar")
    if w.has(hf + "router.scale"):
        gate_up(w, mg + "mlp.shared_experts.linear_fc1", hf + "mlp.")
        names = {
            "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
            "self_attention.linear_proj.post_layernorm.weight": "post_attention_layernorm.weight",
            "pre_mlp_layernorm.weight": "pre_feedforward_layernorm_2.weight",
            "pre_shared_expert_layernorm.weight": "pre_feedforward_layernorm.weight",
            "mlp.post_shared_expert_layernorm.weight": "post_feedforward_layernorm_1.weight",
            "mlp.post_moe_layernorm.weight": "post_feedforward_layernorm_2.weight",
            "post_ffn_layernorm.weight": "post_feedforward_layernorm.weight",
            "mlp.router.weight": "router.proj.weight",
            "mlp.router.scale": "router.scale",
            "mlp.router.per_expert_scale": "router.per_expert_scale",
            "mlp.shared_experts.linear_fc2.weight": "mlp.down_proj.weight",
            "mlp.experts.experts.linear_fc2.weight": "experts.down_proj",
        }
        experts = w.take(hf + "experts.gate_up_proj")
        w.put(mg + "mlp.experts.experts.linear_fc1.weight", experts, gated=True)
    else:
        gate_up(w, mg + "mlp.linear_fc1", hf + "mlp.")
        names = {
            "input_layernorm.weight": "input_layernorm.weight",
            "post_self_attn_layernorm.weight": "post_attention_layernorm.weight",
            "pre_mlp_layernorm.weight": "pre_feedforward_layernorm.weight",
            "post_mlp_layernorm.weight": "post_feedforward_layernorm.weight",
            "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        }
        for name in ("input_gate", "projection"):
            w.copy(f"{mg}per_layer_{name}.weight", f"{hf}per_layer_{name}.weight")
        w.copy(mg + "post_per_layer_input_norm.weight", hf + "post_per_layer_input_norm.weight")
    for key, name in names.items():
        w.copy(mg + key, hf + name)


def gemma4(w: Walk) -> None:
    language_model(w, layer_of_gemma4, lambda *_: None)
    if w.has("model.embed_tokens_per_layer.weight"):
        rows = padded(w.take("model.embed_tokens_per_layer.weight"))
        w.put("per_layer_embedding.weight", rows)
        w.copy("per_layer_model_proj.weight", "model.per_layer_model_projection.weight")
        w.copy("per_layer_proj_norm.weight", "model.per_layer_projection_norm.weight")


def mlp_of_glm4(w: Walk, mg: str, hf: str) -> None:
    mlp(w, mg, hf)
    for name in ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"):
        w.copy(mg + name, hf + name)


# Whole language models


def language_model(
    w: Walk, attend: Part = attention, feed: Part = mlp, mg: str = "", hf: str = "model."
) -> None:
    w.put(mg + "embedding.word_embeddings.weight", padded(w.take(hf + "embed_tokens.weight")))
    for name in ("lm_head.weight", "language_model.lm_head.weight", "thinker.lm_head.weight"):
        if w.has(name):
            w.put(mg + "output_layer.weight", padded(w.take(name)))
    w.copy_both(mg + "output_layer", "score") if w.has("score.weight") else None
    w.copy_both(mg + "decoder.final_layernorm", hf + "norm")
    for i in w.layers():
        attend(w, f"{mg}decoder.layers.{i}.", f"{hf}layers.{i}.")
        feed(w, f"{mg}decoder.layers.{i}.", f"{hf}layers.{i}.")


def padded(rows: torch.Tensor) -> torch.Tensor:
    """Fill up the vocabulary; the rows may hold anything."""
    count = -len(rows) % VOCAB_DIVISOR
    return torch.cat([rows, torch.full((count, rows.shape[1]), 7.0, dtype=rows.dtype)])


def prediction(w: Walk, attend: Part, feed: Part, names: dict[str, str], mg: str, hf: str) -> None:
    """Multi-token prediction: norms and a projection around one ordinary layer."""
    for key, name in names.items():
        w.copy(f"{mg}mtp.layers.0.{key}.weight", f"{name}.weight")
    attend(w, mg + "mtp.layers.0.transformer_layer.", hf)
    feed(w, mg + "mtp.layers.0.transformer_layer.", hf)


def deepseek(w: Walk, attend: Part = latent_attention) -> None:
    hf = f"model.layers.{len(w.layers())}."
    shared = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
    for name, original in shared.items():  # Megatron has them once
        if w.has(f"{hf}{name}.weight"):
            assert torch.equal(w.take(f"{hf}{name}.weight"), w.left[f"{original}.weight"])
    language_model(w, attend, moe)
    if w.has(hf + "enorm.weight"):
        names = {x: hf + x for x in ("enorm", "hnorm", "eh_proj")}
        behind = "shared_head.norm" if w.has(hf + "shared_head.norm.weight") else "final_layernorm"
        names["final_layernorm"] = hf + behind
        prediction(w, attend, moe, names, "", hf)


def bailing(w: Walk) -> None:
    names_of_bailing(w)
    glm4_moe(w)


def names_of_bailing(w: Walk) -> None:
    """Give the tensors of Ling the names that others have, queries, keys and values apart."""
    heads, groups = w.config["num_attention_heads"], w.config["num_key_value_heads"]
    width = w.config["head_dim"]
    for name in list(w.left):
        new = name.replace("word_embeddings", "embed_tokens").replace(
            ".attention.dense", ".self_attn.o_proj"
        )
        new = new.replace(".attention.query_layernorm", ".self_attn.q_norm")
        new = new.replace(".attention.key_layernorm", ".self_attn.k_norm")
        new = new.replace("gate.expert_bias", "gate.e_score_correction_bias")
        new = new.replace(".attention.", ".self_attn.")
        tensor = w.take(name)
        if ".query_key_value." not in name:
            w.left[new] = tensor
            continue
        parts = tensor.split([heads * width, groups * width, groups * width])
        for x, part in zip("qkv", parts, strict=True):
            w.left[name.replace(".attention.query_key_value.", f".self_attn.{x}_proj.")] = part


def attention_of_bailing_hybrid(w: Walk, mg: str, hf: str) -> None:
    if w.has(hf + "self_attn.kv_b_proj.weight"):
        return latent_attention(w, mg, hf)
    attention(w, mg, hf)
    norm = w.made.pop(mg + "self_attention.linear_qkv.layer_norm_weight")
    w.put(mg + "input_layernorm.weight", norm)
    for name in ("g_proj.weight", "g_norm.weight"):
        w.copy(f"{mg}self_attention.{name}", f"{hf}self_attn.{name}")
    return None


def bailing_hybrid(w: Walk) -> None:
    names_of_bailing(w)
    deepseek(w, attention_of_bailing_hybrid)


def uneven_attention(w: Walk, mg: str, hf: str) -> None:
    """MiMo-V2-Flash: values narrower than keys, sinks under another name."""
    w.copy(mg + "self_attention.linear_qkv.layer_norm_weight", hf + "input_layernorm.weight")
    q, k, v = (w.take(f"{hf}self_attn.{x}_proj.weight") for x in "qkv")
    groups = len(k) // w.config["head_dim"]
    rows = [x.unflatten(0, (groups, -1)) for x in (q, k, v)]
    w.put(mg + "self_attention.linear_qkv.weight", torch.cat(rows, 1).flatten(0, 1))
    w.copy(mg + "self_attention.linear_proj.weight", hf + "self_attn.o_proj.weight")
    sinks = mg + "self_attention.core_attention.softmax_offset"
    w.copy(sinks, hf + "self_attn.attention_sink_bias", optional=True)


def mimo_v2_flash(w: Walk) -> None:
    language_model(w, uneven_attention, moe)
    hf = "model.mtp.layers.0."
    names = {x: hf + x for x in ("enorm", "hnorm", "eh_proj", "final_layernorm")}
    dense = functools.partial(mlp, norm="pre_mlp_layernorm")
    prediction(w, uneven_attention, dense, names, "", hf)


def attention_behind(w: Walk, mg: str, hf: str) -> None:
    """Attention without a norm before it."""
    w.left[hf + "input_layernorm.weight"] = torch.empty(0)
    attention(w, mg, hf)
    del w.made[mg + "self_attention.linear_qkv.layer_norm_weight"]


def mlp_of_exaone4(w: Walk, mg: str, hf: str) -> None:
    gate_up(w, mg + "mlp.linear_fc1", hf + "mlp.")
    w.copy(mg + "mlp.linear_fc2.weight", hf + "mlp.down_proj.weight")
    after = "post_layernorm.weight"
    w.copy(f"{mg}self_attention.linear_proj.{after}", hf + "post_attention_layernorm.weight")
    w.copy(f"{mg}mlp.linear_fc2.{after}", hf + "post_feedforward_layernorm.weight")


def attention_of_step(w: Walk, mg: str, hf: str) -> None:
    """As Megatron-Core's development branch keeps it: the gates behind queries, keys and values."""
    gate = w.take(hf + "self_attn.g_proj.weight")
    heads, key = w.config["num_attention_heads"], mg + "self_attention.linear_qkv.weight"
    w.config["num_attention_heads"] = len(gate)
    groups = w.config.setdefault("num_key_value_heads", w.config.get("num_attention_groups"))
    assert groups
    attention(w, mg, hf)
    w.config["num_attention_heads"] = heads
    w.made |= {key + "._qkv": w.made.pop(key), key + "._gate": gate}


def feed_of_step(w: Walk, mg: str, hf: str) -> None:
    if not w.has(hf + "moe.gate.weight"):
        return mlp(w, mg, hf)
    w.copy(mg + "pre_mlp_layernorm.weight", hf + "post_attention_layernorm.weight")
    w.copy(mg + "mlp.router.weight", hf + "moe.gate.weight")
    w.copy(mg + "mlp.router.expert_bias", hf + "moe.router_bias")
    both = torch.cat([w.take(f"{hf}moe.{x}_proj.weight") for x in ("gate", "up")], dim=1)
    w.put(mg + "mlp.experts.experts.linear_fc1.weight", both, gated=True)
    w.copy(mg + "mlp.experts.experts.linear_fc2.weight", hf + "moe.down_proj.weight")
    gate_up(w, mg + "mlp.shared_experts.linear_fc1", hf + "share_expert.")
    w.copy(mg + "mlp.shared_experts.linear_fc2.weight", hf + "share_expert.down_proj.weight")
    return None


def step(w: Walk, vision: dict[str, Any] | None = None) -> None:
    mg = "" if vision is None else "language_model."
    hf = f"model.layers.{len(w.layers())}."
    if w.has(hf + "enorm.weight"):
        copy = w.take(hf + "transformer.shared_head.output.weight")
        assert torch.equal(copy, w.left["lm_head.weight"])
    language_model(w, attention_of_step, feed_of_step, mg)
    if w.has(hf + "enorm.weight"):
        names = {x: hf + x for x in ("enorm", "hnorm", "eh_proj")}
        names["final_layernorm"] = hf + "transformer.shared_head.norm"
        prediction(w, attention_of_step, feed_of_step, names, mg, hf)
    w.copy_all("vision_model.", "vision_model.")
    w.copy_all("image_insert_embedding.align_projector.", "vit_large_projector.")


def minimax_m3(w: Walk, _: dict[str, Any]) -> None:
    for layer in w.layers():
        for x in ("q_proj", "k_proj", "q_norm", "k_norm"):
            name = f"language_model.model.layers.{layer}.self_attn.index_{x}.weight"
            w.copy(f"lightning_indexers.{layer}.{x}.weight", name, optional=True)
    language_model(w, feed=moe, mg="language_model.", hf="language_model.model.")
    for tower in ("vision_tower.", "multi_modal_projector."):
        w.copy_all(tower, tower)


def layer_of_deepseek_v4(w: Walk, mg: str, hf: str) -> None:
    w.copy(mg + "input_layernorm.weight", hf + "attn_norm.weight")
    w.copy(mg + "pre_mlp_layernorm.weight", hf + "ffn_norm.weight")
    for key, name in {
        "linear_q_down_proj.weight": "wq_a.weight",
        "q_layernorm.weight": "q_norm.weight",
        "linear_q_up_proj.weight": "wq_b.weight",
        "linear_kv_proj.weight": "wkv.weight",
        "kv_layernorm.weight": "kv_norm.weight",
        "linear_o_group_proj": "wo_a.weight",
        "linear_proj.weight": "wo_b.weight",
        "core_attention.attn_sink": "attn_sink",
    }.items():
        w.copy(f"{mg}self_attention.{key}", f"{hf}attn.{name}")
    core = mg + "self_attention.core_attention."
    for inside in ("compressor.", "indexer.compressor."):
        for x in ("wkv", "wgate"):
            name = f"{hf}attn.{inside}{x}.weight"
            w.copy(f"{core}{inside}linear_{x}.weight", name, optional=True)
        for x in ("ape", "norm.weight"):
            w.copy(core + inside + x, f"{hf}attn.{inside}{x}", optional=True)
    for key, name in {"linear_wq_b": "wq_b", "linear_weights_proj": "scorer.weights_proj"}.items():
        name = f"{hf}attn.indexer.{name}.weight"
        w.copy(f"{core}indexer.{key}.weight", name, optional=True)
    w.copy(mg + "mlp.router.weight", hf + "ffn.gate.weight")
    w.copy(mg + "mlp.router.tid2eid", hf + "ffn.gate.tid2eid", optional=True)
    w.copy(mg + "mlp.router.expert_bias", hf + "ffn.gate.bias", optional=True)
    numbers = range(w.config["n_routed_experts"])
    both = [[w.take(f"{hf}ffn.experts.{e}.{x}.weight") for x in ("w1", "w3")] for e in numbers]
    first = torch.stack([torch.cat(pair) for pair in both])
    w.put(mg + "mlp.experts.experts.linear_fc1.weight", first, gated=True)
    down = [w.take(f"{hf}ffn.experts.{e}.w2.weight") for e in numbers]
    w.put(mg + "mlp.experts.experts.linear_fc2.weight", torch.stack(down))
    shared = [w.take(f"{hf}ffn.shared_experts.{x}.weight") for x in ("w1", "w3")]
    w.put(mg + "mlp.shared_experts.linear_fc1.weight", torch.cat(shared), gated=True)
    w.copy(mg + "mlp.shared_experts.linear_fc2.weight", hf + "ffn.shared_experts.w2.weight")
    for block, name in (("self_attention", "attn"), ("mlp", "ffn")):
        place = f"{mg}{block}_hyper_connection."
        w.copy(place + "mapping_proj.weight", f"{hf}hc_{name}_fn")
        w.copy(place + "bias", f"{hf}hc_{name}_base")
        for x, number in zip(("pre", "post", "res"), w.take(f"{hf}hc_{name}_scale"), strict=True):
            w.put(f"{place}alpha_{x}", number[None])


def deepseek_v4(w: Walk) -> None:
    w.put("embedding.word_embeddings.weight", padded(w.take("embed.weight")))
    w.put("output_layer.weight", padded(w.take("head.weight")))
    w.copy("decoder.final_layernorm.weight", "norm.weight")
    for layer in w.layers():
        layer_of_deepseek_v4(w, f"decoder.layers.{layer}.", f"layers.{layer}.")
    layer_of_deepseek_v4(w, "mtp.layers.0.transformer_layer.", "mtp.0.")
    for key, name in {"final_layernorm": "norm", "enorm": "enorm", "hnorm": "hnorm"}.items():
        w.copy(f"mtp.layers.0.{key}.weight", f"mtp.0.{name}.weight")
    for x in ("e_proj.weight", "h_proj.weight", "hc_head_fn", "hc_head_base", "hc_head_scale"):
        w.copy(f"mtp.layers.0.{x}", f"mtp.0.{x}")
    for x in ("hc_head_fn", "hc_head_base", "hc_head_scale"):
        w.copy("decoder." + x, x)


def glm4_moe(w: Walk) -> None:
    deepseek(w, attention)


def mimo(w: Walk) -> None:
    language_model(w)
    hf = "model.mtp_layers.0."
    names = {
        "enorm": hf + "token_layernorm",
        "hnorm": hf + "hidden_layernorm",
        "eh_proj": hf + "input_proj",
        "final_layernorm": hf + "final_layernorm",
    }
    prediction(w, attention, mlp, names, "", hf)
    # Megatron concatenates embedding and hidden state, MiMo hidden state and embedding.
    key = "mtp.layers.0.eh_proj.weight"
    hidden, embedding = w.made[key].chunk(2, 1)
    w.made[key] = torch.cat([embedding, hidden], 1)


def qwen_hybrid(w: Walk, mg: str = "", hf: str = "model.", attend: Part = hybrid_attention) -> None:
    language_model(w, attend, moe, mg, hf)
    if w.has("mtp.fc.weight"):
        names = {
            "enorm": "mtp.pre_fc_norm_embedding",
            "hnorm": "mtp.pre_fc_norm_hidden",
            "eh_proj": "mtp.fc",
            "final_layernorm": "mtp.norm",
        }
        prediction(w, attend, moe, names, mg, "mtp.layers.0.")


# Mamba


def mamba(w: Walk, mg: str, hf: str, heads: int, width: int) -> None:
    """Every part of the projections is a key of its own, flat."""
    for name in ("A_log", "D", "dt_bias", "out_proj.weight"):
        w.copy(mg + name, hf + name)
    w.copy(mg + "norm.weight", hf + "norm.weight", optional=True)
    projection = w.take(hf + "in_proj.weight")
    inner = heads * width
    state = (len(projection) - 2 * inner - heads) // 2
    sizes = {"z": inner, "x": inner, "B": state, "C": state, "dt": heads}
    for name, part in zip(sizes, projection.split([*sizes.values()]), strict=True):
        w.put(f"{mg}in_proj.weight.{name}", part)
    for kind in ("weight", "bias"):
        parts = w.take(f"{hf}conv1d.{kind}").split([inner, state, state])
        for name, part in zip("xBC", parts, strict=True):
            w.put(f"{mg}conv1d.{kind}.{name}", part)


def block_of_nemotron_h(w: Walk, mg: str, hf: str) -> None:
    """One block: Mamba, attention, an MLP without a gate, or experts without."""
    mixer = hf + "mixer."
    if w.has(mixer + "A_log"):
        w.copy(mg + "mixer.in_proj.layer_norm_weight", hf + "norm.weight")
        mamba(w, mg + "mixer.", mixer, w.config["mamba_num_heads"], w.config["mamba_head_dim"])
    elif w.has(mixer + "q_proj.weight"):
        for name in [n for n in w.left if n.startswith(mixer)]:
            w.left[name.replace(".mixer.", ".self_attn.")] = w.take(name)
        w.left[hf + "input_layernorm.weight"] = w.take(hf + "norm.weight")
        attention(w, mg, hf)
    elif w.has(mixer + "gate.weight"):
        w.copy(mg + "pre_mlp_layernorm.weight", hf + "norm.weight")
        w.copy(mg + "mlp.router.weight", mixer + "gate.weight")
        w.copy(mg + "mlp.router.expert_bias", mixer + "gate.e_score_correction_bias")
        for key, name in (("linear_fc1", "up_proj"), ("linear_fc2", "down_proj")):
            numbers = range(w.config["n_routed_experts"])
            experts = [w.take(f"{mixer}experts.{e}.{name}.weight") for e in numbers]
            w.put(f"{mg}mlp.experts.experts.{key}.weight", torch.stack(experts))
            w.copy(f"{mg}mlp.shared_experts.{key}.weight", f"{mixer}shared_experts.{name}.weight")
        for name in ("fc1_latent_proj.weight", "fc2_latent_proj.weight"):
            w.copy(f"{mg}mlp.{name}", mixer + name, optional=True)
    else:
        w.copy(mg + "mlp.linear_fc1.layer_norm_weight", hf + "norm.weight")
        w.copy(mg + "mlp.linear_fc1.weight", mixer + "up_proj.weight")
        w.copy(mg + "mlp.linear_fc2.weight", mixer + "down_proj.weight")


def nemotron_h(w: Walk) -> None:
    w.put("embedding.word_embeddings.weight", padded(w.take("backbone.embeddings.weight")))
    w.put("output_layer.weight", padded(w.take("lm_head.weight")))
    w.copy("decoder.final_norm.weight", "backbone.norm_f.weight")
    for i in range(len(w.config["layers_block_type"])):
        block_of_nemotron_h(w, f"decoder.layers.{i}.", f"backbone.layers.{i}.")
    number = 0
    while w.has(f"mtp.layers.{2 * number}.enorm.weight"):
        mg = f"mtp.layers.{number}."
        for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight"):
            w.copy(mg + name, f"mtp.layers.{2 * number}.{name}")
        w.copy(mg + "final_layernorm.weight", f"mtp.layers.{2 * number + 1}.final_layernorm.weight")
        for inner in range(2):
            place = f"{mg}transformer_layer.layers.{inner}."
            block_of_nemotron_h(w, place, f"mtp.layers.{2 * number + inner}.")
        number += 1


def layer_of_falcon_h1(w: Walk, mg: str, hf: str) -> None:
    w.copy(mg + "norm.weight", hf + "input_layernorm.weight")
    mamba(
        w, mg + "mamba_mixer.", hf + "mamba.", w.config["mamba_n_heads"], w.config["mamba_d_head"]
    )
    w.left[hf + "input_layernorm.weight"] = torch.empty(0)  # there is none of attention's own
    attention(w, mg, hf)
    del w.made[mg + "self_attention.linear_qkv.layer_norm_weight"]
    for name in [n for n in w.left if n.startswith(hf + "feed_forward.")]:
        w.left[name.replace(".feed_forward.", ".mlp.")] = w.take(name)
    mlp(w, mg, hf, "pre_ff_layernorm")


def falcon_h1(w: Walk) -> None:
    w.left["model.norm.weight"] = w.take("model.final_layernorm.weight")
    language_model(w, layer_of_falcon_h1, lambda *_: None)
    w.made["decoder.final_norm.weight"] = w.made.pop("decoder.final_layernorm.weight")


# The families


def qwen2_5_vl(w: Walk, vision: dict[str, Any], *, megatron_tower: bool = True) -> None:
    language_model(w, mg="language_model.")
    if megatron_tower:
        tower_of_qwen2_5(w, vision)
    else:  # Megatron-Bridge keeps HuggingFace's module
        w.copy_all("visual.", "visual.")


def qwen3_vl(w: Walk, vision: dict[str, Any]) -> None:
    language_model(w, feed=moe, mg="language_model.", hf="model.language_model.")
    tower_of_qwen3(w, vision)


def qwen3_5_vl(w: Walk, vision: dict[str, Any], *, megatron_tower: bool = True) -> None:
    qwen_hybrid(w, "language_model.", "model.language_model.")
    if megatron_tower:
        tower_of_qwen3(w, vision)
    else:  # mbridge keeps HuggingFace's module under another name
        w.copy_all("vision_model.", "model.visual.")


def gemma3_vl(w: Walk, vision: dict[str, Any], *, megatron_tower: bool = True) -> None:
    language_model(w, feed=mlp_of_gemma, mg="language_model.", hf="language_model.model.")
    projection = w.take("multi_modal_projector.mm_input_projection_weight").transpose(0, 1)
    norm = "multi_modal_projector.mm_soft_emb_norm.weight"
    if megatron_tower:  # mbridge
        key = "vision_projection.mm_input_projection."
        w.put(key + "weight", projection)
        w.copy(key + "layer_norm_weight", norm)
        siglip(w, vision)
    else:  # Megatron-Bridge
        w.put("multi_modal_projector.proj.weight", projection)
        w.copy("multi_modal_projector.mm_soft_embed_norm.weight", norm)
        w.copy_all("vision_tower.", "vision_tower.")


def beside_towers(
    hf: str, towers: dict[str, str], feed: Part = moe, attend: Part = attention, below: str = ""
) -> Callable[..., None]:
    """Return the inverse of a language model beside modules that stay HuggingFace's.

    ``towers`` are their names in HuggingFace's model and in Megatron's. Where they are ms-swift's, all
    are in one module, and ``below`` is not before the language model.
    """

    def family(w: Walk, _: dict[str, Any], *, swift: bool = False) -> None:
        language_model(w, attend, feed, ("" if swift else below) + "language_model.", hf)
        for theirs, ours in towers.items():
            key = f"visual.{theirs.rpartition('.')[2]}" if swift else ours
            w.copy_all(key + ".", theirs + ".")

    return family


def internvl_chat(w: Walk, vision: dict[str, Any], *, megatron_tower: bool = False) -> None:
    language_model(w, mg="language_model.", hf="language_model.model.")
    if megatron_tower:  # mbridge
        intern_vit(w, vision)
    else:  # ms-swift
        for tower in ("vision_model.", "mlp1."):
            w.copy_all("visual." + tower, tower)


def feed_of_llama4(w: Walk, mg: str, hf: str) -> None:
    for name in [n for n in w.left if n.startswith(hf + "feed_forward.")]:
        new = name.replace(".feed_forward.", ".mlp.").replace(".mlp.router.", ".mlp.gate.")
        tensor = w.take(name)  # experts are [E, H, 2I] and [E, I, H]
        w.left[new] = tensor.transpose(1, 2) if ".experts." in name else tensor
    moe(w, mg, hf)


def llama4(w: Walk, _: dict[str, Any]) -> None:
    language_model(w, feed=feed_of_llama4, mg="language_model.", hf="language_model.model.")
    for tower in ("vision_model.", "multi_modal_projector."):
        w.copy_all("visual." + tower, tower)


SENSES = {"thinker.visual": "thinker.visual", "thinker.audio_tower": "thinker.audio_model"}
PIXTRAL = {"vision_tower": "vision_tower", "multi_modal_projector": "multi_modal_projector"}

BY_TYPE: dict[str, Callable[..., None]] = {
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "deepseek_v32": deepseek,
    "glm_moe_dsa": deepseek,
    "glm4_moe_lite": deepseek,
    "hy_v3": glm4_moe,
    "exaone_moe": lambda w: qwen_hybrid(w, attend=attention),
    "sarvam_mla": deepseek,
    "sarvam_moe": bailing,
    "kimi_k2": deepseek,
    "glm4": lambda w: language_model(w, feed=mlp_of_glm4),
    "glm4_moe": glm4_moe,
    "nemotron_h": nemotron_h,
    "falcon_h1": falcon_h1,
    "gpt_oss": lambda w: language_model(w, feed=moe_of_gpt_oss),
    "gemma2": lambda w: language_model(w, feed=mlp_of_gemma),
    "gemma3_text": lambda w: language_model(w, feed=mlp_of_gemma),
    "gemma3": gemma3_vl,
    "gemma4_text": gemma4,
    "mimo": mimo,
    "mimo_v2_flash": mimo_v2_flash,
    "bailing_moe": bailing,
    "bailing_hybrid": bailing_hybrid,
    "exaone4": lambda w: language_model(w, attention_behind, mlp_of_exaone4),
    "step3p5": step,
    "step3p7": step,
    "minimax_m3_vl": minimax_m3,
    "deepseek_v4": deepseek_v4,
    "mistral3": beside_towers("language_model.model.", PIXTRAL),
    "internvl": beside_towers("language_model.model.", PIXTRAL),
    "internvl_chat": internvl_chat,
    "kimi_vl": beside_towers("language_model.model.", PIXTRAL, attend=latent_attention),
    "llama4": llama4,
    "kimi_k25": beside_towers(
        "language_model.model.",
        {"vision_tower": "vision_tower", "mm_projector": "mm_projector"},
        attend=latent_attention,
    ),
    "glm4v": beside_towers("model.language_model.", {"model.visual": "visual"}, feed=mlp_of_glm4),
    "glm4v_moe": beside_towers("model.language_model.", {"model.visual": "visual"}),
    "qwen2_vl": beside_towers("model.", {"visual": "visual"}),
    "qwen2_audio": beside_towers(
        "language_model.model.",
        {"audio_tower": "audio_tower", "multi_modal_projector": "multi_modal_projector"},
    ),
    "qwen3_omni_moe": beside_towers("thinker.model.", SENSES, below="thinker."),
    "qwen2_5_omni_thinker": beside_towers(
        "model.", {k.removeprefix("thinker."): v for k, v in SENSES.items()}, below="thinker."
    ),
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl,
    "qwen3_next": qwen_hybrid,
    "qwen3_5_text": qwen_hybrid,
    "qwen3_5_moe_text": qwen_hybrid,
    "qwen3_5": qwen3_5_vl,
    "qwen3_5_moe": qwen3_5_vl,
}
"""Every other type is a plain language model, dense or with softmax routing."""


def indexer_of_slime(w: Walk) -> None:
    """Slime's own module has the indexer's parts elsewhere, each head's second half first."""
    inside = ".core_attention.indexer."
    for key in [k for k in w.made if inside in k]:
        name, tensor = key.replace(inside, ".").replace(".linear_w", ".w"), w.made.pop(key)
        if ".weights_proj." not in name:
            first, second = tensor.unflatten(0, (-1, 128)).split(64, 1)
            tensor = torch.cat([second, first], 1).flatten(0, 1)
        w.put(name, tensor)


def wide_norms(w: Walk) -> None:
    """Norms over all heads under HuggingFace's names, as slime and ms-swift have them."""
    for key in [
        k for k in w.made if "self_attention.q_layer" in k or "self_attention.k_layer" in k
    ]:
        w.put(key.replace("_layernorm", "_norm"), w.made.pop(key))


def norms_of_swift(w: Walk) -> None:
    """GLM-4's outer norms within attention and MLP."""
    for key in [k for k in w.made if ".post_" in k]:
        layer, _, name = key.rpartition(".post_")
        home = "self_attention" if name.startswith("self_attn") else "mlp"
        w.put(f"{layer}.{home}.post_{name}", w.made.pop(key))


def hybrid_model(w: Walk) -> None:
    """Megatron-Core 0.19's HybridModel: attention and MLP are layers of their own."""

    def renamed(match: re.Match[str]) -> str:
        half = match[3].startswith(("mlp.", "pre_mlp"))
        if match[1].startswith("mtp."):
            return f"{match[1]}transformer_layer.layers.{int(half)}.{match[3]}"
        return f"{match[1]}{2 * int(match[2]) + half}.{match[3]}"

    made, gated = dict(w.made), set(w.gated)
    w.made.clear()
    w.gated.clear()
    for key, tensor in made.items():
        name = key.replace("decoder.final_layernorm", "decoder.final_norm")
        name = re.sub(r"^(decoder\.layers\.)(\d+)\.(.+)", renamed, name)
        name = re.sub(r"^(mtp\.layers\.\d+\.)(transformer_layer)\.(.+)", renamed, name)
        w.put(name, tensor, gated=key in gated)


VARIANTS: dict[str, Callable[[Walk], None]] = {
    "HybridModel": hybrid_model,
    "indexer of slime": indexer_of_slime,
    "wide norms": wide_norms,
    "norms of ms-swift": norms_of_swift,
    "slime": megatron_linear.slime,
    "slime throughout": megatron_linear.slime_throughout,
    "ms-swift": megatron_linear.swift,
    "ms-swift, decoupled": megatron_linear.swift_decoupled,
    "ms-swift, HuggingFace's module": megatron_linear.swift_module,
}


def invert(config: dict[str, Any], state: State, *, variant: str = "", **options: Any) -> Walk:
    """Return the walk whose ``made`` is what Megatron keeps of ``state``.

    ``variant`` is a trainer's way of its own (:data:`VARIANTS`), ``options`` go to the family
    (``megatron_tower`` of qwen2_5_vl, qwen3_5 and gemma3).
    """
    classes = {"architectures": config.get("architectures")}
    thinker = config.get("thinker_config", config)
    text = thinker.get("text_config", config.get("llm_config", config))
    walk = Walk(text | classes, dict(state))
    family = BY_TYPE.get(config["model_type"], lambda w: language_model(w, feed=moe))
    if any(f"{tower}_config" in thinker for tower in ("vision", "audio")):
        family(walk, thinker.get("vision_config"), **options)
    else:
        family(walk, **options)
    if variant:
        before = set(walk.made)
        VARIANTS[variant](walk)
        assert before != set(walk.made)
    assert not walk.left, f"not inverted: {sorted(walk.left)}"
    return walk
