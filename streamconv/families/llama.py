"""Dense decoders with rotary attention and a gated MLP: Llama, Mistral, Qwen2, Qwen3 and kin."""

from __future__ import annotations

from streamconv.families.blocks import DENSE
from streamconv.families.rules import Family

FAMILIES = (
    Family(
        name="llama",
        model_types=("llama", "mistral", "ministral", "qwen2", "qwen3"),
        rules=DENSE,
    ),
)
