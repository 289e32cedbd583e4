"""The names of adapters: which tensors are whose part, and what wrappers put around the names.

PEFT puts ``base_model.model.`` in front of every name. Trainers put their own in front of that, and
torch.compile, FSDP1 and activation checkpointing insert a component each, anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from streamconv.lora.settings import PREFIX
from streamconv.tracing.wrappers import without_markers

PARTS = (
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)
PART = re.compile(rf"(.+)\.({'|'.join(PARTS)})(?:\.(?!weight$|bias$)([^.]+))?(?:\.(weight|bias))?")
SAVED = re.compile(r"(.+)\.modules_to_save\.([^.]+)\.(.+)")
ORIGINAL = re.compile(r"(.+)\.original_module\.(.+)")
# Parts of adapters of other kinds (trained tokens, routers of several adapters): no weights of a
# model either.
FOREIGN = re.compile(
    r"(?:.+\.)?(?:lora_\w+|token_adapter|ranknum)(?:\..+)?"
    r"|.+\.adapter\.(?:.+\.)?weight_magnitude"
)
# Megatron-Bridge hangs LoRA's factors on a module as an adapter, CanonicalLoRA one for each part of a
# fused module: adapter.adapter_q.
PART_OF_FUSED = re.compile(r"(.+)\.adapter_([a-z]+)")
# torchtune and torchtitan write them with small letters.
_SMALL = re.compile(r"(.+)\.lora_([ab])\.weight")
_BRIDGE = re.compile(r"(.+)\.adapter(\.adapter_[a-z]+)?\.linear_(in|out)\.weight")

# By the components that PEFT's tuners give their parameters. A component must match as a whole, for
# models have prompt encoders and low-rank projections of their own.
_TUNERS = {
    "AdaLoRA": r"lora_E|ranknum",
    "LoHa": r"hada_(?:w[12]_[ab]|t[12])",
    "LoKr": r"lokr_(?:w[12](?:_[ab])?|t2)",
    "(IA)³": r"ia3_l",
    "OFT": r"oft_[rRs]",
    "BOFT": r"boft_[Rs]",
    "VeRA": r"vera_(?:lambda_[bd]|[AB])",
    "PVeRA": r"pvera_(?:lambda_[bd]|[AB])",
    "FourierFT": r"fourierft_\w+",
    "HRA": r"hra_u",
    "Poly": r"poly_(?:lora_[AB]|router)",
    "RandLoRA": r"randlora_(?:lambda|gamma|[AB])",
    "VB-LoRA": r"vblora_\w+",
    "SHiRA": r"shira_\w+",
    "C3A": r"c3a_kernel",
    "RoAd": r"road_(?:theta|alpha)",
    "Bone": r"bone_block",
    "MiSS": r"miss_block",
    "WaveFT": r"waveft_\w+",
    "GraLoRA": r"gralora_[AB]",
    "DeLoRA": r"delora_(?:lambda|[AB])",
    "HiRA": r"hira_[AB]",
    "X-LoRA": r"internal_xlora_classifier",
    "LLaMA-Adapter": r"adaption_(?:prompt|gate)",
    "trained tokens": r"trainable_tokens_(?:delta|original)",
}
_TUNER_COMPONENTS = tuple((kind, re.compile(pattern)) for kind, pattern in _TUNERS.items())
_PROMPT = re.compile(
    r"(?:.+\.)?(?:prompt_embeddings"
    r"|prompt_encoder\.[^.]+\.(?:embedding|mlp_head|transform|lstm_head)\..+)"
)


def canonical(name: str) -> str:
    """Return a name as PEFT's base model has it: after PEFT's own prefix, without markers.

    >>> canonical("decoder.layers.0.linear_proj.adapter.linear_in.weight")
    'decoder.layers.0.linear_proj.lora_A.weight'
    >>> canonical("layers.0.attn.q_proj.lora_b.weight")
    'layers.0.attn.q_proj.lora_B.weight'
    """
    name = without_markers(name).rpartition(PREFIX)[2]
    if match := _BRIDGE.fullmatch(name):
        return f"{match[1]}{match[2] or ''}.lora_{'AB'[match[3] == 'out']}.weight"
    if match := _SMALL.fullmatch(name):
        return f"{match[1]}.lora_{match[2].upper()}.weight"
    return name


def fused(module: str) -> str:
    """Return the module that an adapter hangs on, which may be that of one of its parts."""
    match = PART_OF_FUSED.fullmatch(module)
    return match[1] if match else module


def weights(names: Iterable[str]) -> set[str]:
    """Return the weights that the adapter among these tensors is for."""
    found = (PART.fullmatch(canonical(name)) for name in names)
    return {f"{match[1]}.weight" for match in found if match}


def has_adapter(names: Iterable[str]) -> bool:
    """Whether any of these tensors is a part of a LoRA adapter."""
    return any(PART.fullmatch(canonical(name)) for name in names)


def other_tuner(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the kind of an adapter that is not LoRA, and the name that shows it."""
    for name in names:
        kinds = filter(None, map(_kind, name.split(".")))
        kind = next(kinds, "prompt tuning" if _PROMPT.fullmatch(name) else None)
        if kind is not None:
            return kind, name
    return None


@lru_cache(maxsize=4096)
def _kind(component: str) -> str | None:
    return next((kind for kind, p in _TUNER_COMPONENTS if p.fullmatch(component)), None)
