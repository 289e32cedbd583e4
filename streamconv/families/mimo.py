"""MiMo-7B: Qwen2 with layers for multi-token prediction under names of their own."""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import ATTENTION, DENSE, MLP, mtp_layer
from streamconv.families.rules import Family, borrowing, rule

_M = "mtp.layers.{mtp}."
_L = "model.mtp_layers.{mtp}."


FAMILIES = (
    Family(
        name="mimo",
        model_types=("mimo",),
        rules=(
            *DENSE,
            rule(_M + "enorm.weight", _L + "token_layernorm.weight", ops.copy),
            rule(_M + "hnorm.weight", _L + "hidden_layernorm.weight", ops.copy),
            # Megatron joins [embedding, hidden], MiMo [hidden, embedding].
            rule(_M + "eh_proj.weight", _L + "input_proj.weight", ops.swapped_halves),
            rule(_M + "final_layernorm.weight", _L + "final_layernorm.weight", ops.copy),
            *mtp_layer((*ATTENTION, *MLP), _L),
        ),
        extras=("model.mtp_layers.{mtp}.{rest}",),
        # Without its extra layers it is Qwen2.
        reference=borrowing({"mimo": ("qwen2", "Qwen2ForCausalLM")}),
    ),
)
