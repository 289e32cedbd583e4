"""Vision towers, HuggingFace → Megatron, where Megatron's own modules hold them."""

from __future__ import annotations

from typing import Any

import torch

from scripts.makers.megatron_walk import Walk, gate_up


def vision_attention(w: Walk, mg: str, hf: str, heads: int) -> None:
    for kind in ("weight", "bias"):
        qkv = w.take(f"{hf}attn.qkv.{kind}").unflatten(0, (3, heads, -1))
        w.put(f"{mg}self_attention.linear_qkv.{kind}", qkv.transpose(0, 1).flatten(0, 2))
    w.copy_both(mg + "self_attention.linear_proj", hf + "attn.proj")
    w.copy_both(mg + "self_attention.linear_qkv.layer_norm_", hf + "norm1")
    w.copy_both(mg + "mlp.linear_fc1.layer_norm_", hf + "norm2")


def tower_of_qwen2_5(w: Walk, vision: dict[str, Any]) -> None:
    """The vision transformer in Megatron's own modules, as mbridge and verl have it."""
    w.copy("vision_model.patch_embed.proj.weight", "visual.patch_embed.proj.weight")
    for i in range(vision["depth"]):
        mg, hf = f"vision_model.decoder.layers.{i}.", f"visual.blocks.{i}."
        vision_attention(w, mg, hf, vision["num_heads"])
        gate_up(w, mg + "mlp.linear_fc1", hf + "mlp.")
        w.copy_both(mg + "mlp.linear_fc2", hf + "mlp.down_proj")
    w.copy("vision_model.decoder.final_layernorm.weight", "visual.merger.ln_q.weight")
    w.copy_both("vision_model.projection.encoder.linear_fc1", "visual.merger.mlp.0")
    w.copy_both("vision_model.projection.encoder.linear_fc2", "visual.merger.mlp.2")


def tower_of_qwen3(w: Walk, vision: dict[str, Any]) -> None:
    mg, hf = "vision_model.", "model.visual."
    w.copy_both(mg + "patch_embed.proj", hf + "patch_embed.proj")
    w.copy(mg + "pos_embed.weight", hf + "pos_embed.weight")
    mergers = {"merger.": "merger."}
    for i in range(vision["depth"]):
        layer, block = f"{mg}decoder.layers.{i}.", f"{hf}blocks.{i}."
        vision_attention(w, layer, block, vision["num_heads"])
        for x in ("linear_fc1", "linear_fc2"):
            w.copy_both(f"{layer}mlp.{x}", f"{block}mlp.{x}")
    for j in range(len(vision.get("deepstack_visual_indexes", []))):
        mergers[f"decoder.deepstack_merger_list.{j}."] = f"deepstack_merger_list.{j}."
    for key, name in mergers.items():
        w.copy_both(f"{mg}{key}patch_norm", f"{hf}{name}norm")
        for x in ("linear_fc1", "linear_fc2"):
            w.copy_both(f"{mg}{key}{x}", f"{hf}{name}{x}")


def siglip(w: Walk, vision: dict[str, Any]) -> None:
    mg, hf = "vision_model.", "vision_tower.vision_model."
    w.copy_both(mg + "conv1", hf + "embeddings.patch_embedding")
    key = "position_embeddings.weight"
    w.copy(mg + key, hf + "embeddings.position_embedding.weight")
    w.copy_both(mg + "ln_post", hf + "post_layernorm")
    for i in range(vision["num_hidden_layers"]):
        layer, block = f"{mg}decoder.layers.{i}.", f"{hf}encoder.layers.{i}."
        w.copy_both(layer + "self_attention.linear_qkv.layer_norm_", block + "layer_norm1")
        for kind in ("weight", "bias"):
            parts = [w.take(f"{block}self_attn.{x}_proj.{kind}") for x in "qkv"]
            by_head = [p.unflatten(0, (vision["num_attention_heads"], 1, -1)) for p in parts]
            qkv = torch.cat(by_head, 1).flatten(0, 2)
            w.put(f"{layer}self_attention.linear_qkv.{kind}", qkv)
        w.copy_both(layer + "self_attention.linear_proj", block + "self_attn.out_proj")
        w.copy_both(layer + "mlp.linear_fc1.layer_norm_", block + "layer_norm2")
        w.copy_both(layer + "mlp.linear_fc1", block + "mlp.fc1")
        w.copy_both(layer + "mlp.linear_fc2", block + "mlp.fc2")


def intern_vit(w: Walk, vision: dict[str, Any]) -> None:
    mg, hf = "vision_model.", "vision_model.embeddings."
    w.copy(mg + "class_token", hf + "class_embedding")
    w.copy(mg + "position_embedding", hf + "position_embedding")
    w.copy_both(mg + "conv1", hf + "patch_embedding")
    for i in range(vision["num_hidden_layers"]):
        layer, block = f"{mg}decoder.layers.{i}.", f"{mg}encoder.layers.{i}."
        vision_attention(w, layer, block, vision["num_attention_heads"])
        w.copy_both(layer + "mlp.linear_fc1", block + "mlp.fc1")
        w.copy_both(layer + "mlp.linear_fc2", block + "mlp.fc2")
        for x in ("ls1", "ls2"):
            w.copy(layer + x, block + x)
    mg = "vision_projection.encoder.linear_fc"
    w.copy_both(mg + "1.layer_norm_", "mlp1.0")
    w.copy_both(mg + "1", "mlp1.1")
    w.copy_both(mg + "2", "mlp1.3")
