"""Dense decoders with rotary attention and a gated MLP: Llama, Mistral, Qwen2, Qwen3 and kin."""

from __future__ import annotations

from streamconv.families.blocks import DENSE
from streamconv.families.rules import Family, borrowing

FAMILIES = (
    Family(
        name="llama",
        model_types=(
            *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3"),
            *("seed_oss", "smollm3"),
        ),
        rules=DENSE,
    ),
    Family(
        name="internlm3",
        model_types=("internlm3",),
        rules=DENSE,
        reference=borrowing(
            {"internlm3": ("llama", "LlamaForCausalLM")},
            {"qkv_bias": "attention_bias", "bias": "mlp_bias"},
        ),
    ),
)
