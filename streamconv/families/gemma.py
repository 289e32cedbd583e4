"""Gemma 1, 2 and 3: tied embeddings, and from 2 on norms before and behind attention and MLP.

The norms are zero-centred on both sides, so they are copied. From Gemma 3's 4B model on there is a
vision tower (SigLIP): Megatron-Bridge keeps HuggingFace's module, mbridge builds one of Megatron's.
"""

from __future__ import annotations

from streamconv.families import ops, vision
from streamconv.families.blocks import DENSE, MLP, MLP_NORM, OUT, QK_NORM, QKV, TOP, D, L
from streamconv.families.rules import Dims, Family, prefixed, renamed, rule

_INNER_NORM = {"post_attention_layernorm": "pre_feedforward_layernorm"}
"""What other families call the norm behind attention is the one before the MLP here."""

# Megatron-Bridge hangs the norms behind a block on its last projection, mbridge on the layer.
_OUTER_NORMS = tuple(
    rule(D + source, f"{L}{target}.weight", ops.copy)
    for target, source, other in (
        (
            "post_attention_layernorm",
            "self_attention.linear_proj.post_layernorm.weight",
            "post_attention_layernorm.weight",
        ),
        (
            "post_feedforward_layernorm",
            "mlp.linear_fc2.post_layernorm.weight",
            "post_feedforward_layernorm.weight",
        ),
    )
    for source in (source, other)
)

_TEXT = (*renamed(DENSE, targets=_INNER_NORM), *_OUTER_NORMS)


def transposed(_: Dims, tensor: ops.Tensor) -> ops.Tensor:
    """``[out, in]`` → ``[in, out]``."""
    return tensor.transpose(0, 1)


_TOWER = "vision_tower.vision_model."
_BLOCK = _TOWER + "encoder.layers.{layer}."
_PROJECTION = "multi_modal_projector.mm_input_projection_weight"
_PROJECTION_NORM = "multi_modal_projector.mm_soft_emb_norm.weight"

_KEPT_TOWER = (
    # The module has the inner name in some releases of transformers; the Hub's files have it.
    rule(_TOWER + "{rest}", _TOWER + "{rest}", ops.copy),
    rule("vision_tower.{rest}", _TOWER + "{rest}", ops.copy),
    rule("multi_modal_projector.proj.weight", _PROJECTION, transposed),
    rule("multi_modal_projector.mm_soft_embed_norm.weight", _PROJECTION_NORM, ops.copy),
)

_MEGATRON_TOWER = (
    *vision.both("vision_model.conv1", _TOWER + "embeddings.patch_embedding"),
    rule(
        "vision_model.position_embeddings.weight",
        _TOWER + "embeddings.position_embedding.weight",
        ops.copy,
    ),
    *vision.both("vision_model.ln_post", _TOWER + "post_layernorm"),
    *vision.norm(vision.B + "self_attention.linear_qkv", _BLOCK + "layer_norm1"),
    *(
        rule(
            f"{vision.B}self_attention.linear_qkv.{kind}",
            tuple(f"{_BLOCK}self_attn.{x}_proj.{kind}" for x in "qkv"),
            vision.qkv,
        )
        for kind in ("weight", "bias")
    ),
    *vision.both(vision.B + "self_attention.linear_proj", _BLOCK + "self_attn.out_proj"),
    *vision.norm(vision.B + "mlp.linear_fc1", _BLOCK + "layer_norm2"),
    *vision.both(vision.B + "mlp.linear_fc1", _BLOCK + "mlp.fc1"),
    *vision.both(vision.B + "mlp.linear_fc2", _BLOCK + "mlp.fc2"),
    rule("vision_projection.mm_input_projection.weight", _PROJECTION, transposed),
    rule("vision_projection.mm_input_projection.layer_norm_weight", _PROJECTION_NORM, ops.copy),
)

FAMILIES = (
    Family(
        name="exaone4",  # its norms are all behind a block
        model_types=("exaone4",),
        rules=(*TOP, *QKV, *OUT, *QK_NORM, *MLP[len(MLP_NORM) :], *_OUTER_NORMS),
    ),
    Family(name="gemma", model_types=("gemma",), rules=DENSE, zero_centred_norms=True),
    Family(
        name="gemma2",
        model_types=("gemma2", "gemma3_text"),
        rules=_TEXT,
        zero_centred_norms=True,
    ),
    Family(
        name="gemma3",
        model_types=("gemma3",),
        rules=(
            *prefixed(
                renamed(_TEXT, targets={"model.": "language_model.model."}),
                sources="language_model.",
            ),
            *_KEPT_TOWER,
            *_MEGATRON_TOWER,
        ),
        zero_centred_norms=True,
    ),
)
