"""Megatron-Core's names of tensors in a torch_dist or DTensor checkpoint, and the canonical ones.

Canonical is one tensor a layer, experts stacked within it, gate rows before up rows::

    decoder.layers.<i>.mlp.experts.experts.linear_fc1.weight     [experts, 2·width, hidden]

Megatron-Core writes a block of layers in one of three flavours: all layers in one tensor with a
leading axis (``decoder.layers.mlp…``), one tensor a layer, or one tensor a layer and expert with the
gate and up halves in tensors of their own (``weight_w``, ``weight_v``). Indices are global in all of
them. A name says where the elements of its tensor belong in canonical ones; no byte is looked at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# The layer axis: a list of modules that is followed by no index.
_STACKED = re.compile(
    r"(?:^|\.)(?:decoder\.layers|mtp\.layers|deepstack_merger_list)(?=\.[a-zA-Z_])"
)
_EXPERT = re.compile(r"(\.mlp\.experts\.)experts\.(\d+)(\.)")
# Megatron-FSDP numbers the parameters and not the modules.
_EXPERT_WEIGHT = re.compile(r"(\.mlp\.experts\.)(linear_fc[12]\.(?:weight|bias))(\d+)$")
_HALF = re.compile(r"(\.linear_fc1\.(?:adapter\.linear_out\.)?(?:weight|bias)\d*)_([wv])$")
_MTP_INNER = re.compile(r"((?:^|\.)mtp\.layers\.(?:\d+\.)?)mtp_model_layer\.")
_WRAPPERS = re.compile(r"^(?:model\.|module\.)+")

# The ranges that ModelOpt's quantizers have seen: the weights beside them are as they were trained.
QUANTIZER_RANGES = (
    re.compile(r"_quantizers?\.(\d+\.)?_(global_)?amax$"),
    "quantizer state (ModelOpt)",
)

_NO_WEIGHTS = (
    (re.compile(r"(^|\.)(chained_\d+\.)?optimizer\.|^optimizer$"), "optimizer state"),
    (re.compile(r"\._extra_state(/|$)|\._extra_state\d*$"), "state of Transformer Engine (fp8)"),
    QUANTIZER_RANGES,
    (re.compile(r"^rng_state(/|$)"), "random number generators"),
    (re.compile(r"^rerun_state_machine"), "rerun state"),
    (re.compile(r"^common_state(/|$)"), "arguments and counters of the run"),
    (re.compile(r"^opt_param_scheduler|^lr_scheduler"), "optimizer state"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor belongs: the canonical ``name`` with ``{layer}`` where it is stacked.

    ``expert`` is the index along a leading axis that the stored tensor lacks; ``half`` says that it
    holds the gate (0) or the up (1) rows only.
    """

    name: str
    stacked: bool = False
    expert: int | None = None
    half: int | None = None

    def canonical(self, layer: int | None) -> str:
        """Return the canonical name of one layer of it."""
        return self.name if layer is None else self.name.replace("{layer}", str(layer))


def why_no_weight(name: str) -> str:
    """Return what ``name`` is where it is not a weight of the model, else nothing."""
    return next((reason for pattern, reason in _NO_WEIGHTS if pattern.search(name)), "")


def is_mcore(names: list[str]) -> bool:
    """Whether tensors have Megatron-Core's names."""
    return any(re.search(r"(^|\.)decoder\.layers\.", n) for n in names) and any(
        n.endswith("embedding.word_embeddings.weight") or ".linear_qkv." in n or ".linear_fc1." in n
        for n in names
    )


def unwrapped(name: str) -> str:
    """Return ``name`` without what wrappers put before it, the layer inside MTP by its one name."""
    return _MTP_INNER.sub(r"\1transformer_layer.", _WRAPPERS.sub("", name))


def place(name: str) -> Place:
    """Return where the tensor that is stored as ``name`` belongs."""
    name = unwrapped(name)
    name, stacked = _STACKED.subn(lambda m: m[0] + ".{layer}", name)
    half = None
    if found := _HALF.search(name):
        name, half = name[: found.end(1)], "wv".index(found[2])
    expert = None
    if found := _EXPERT.search(name):
        expert = int(found[2])
        name = f"{name[: found.end(1)]}experts.{name[found.end(3) :]}"
    elif found := _EXPERT_WEIGHT.search(name):
        expert = int(found[3])
        name = f"{name[: found.end(1)]}experts.{found[2]}"
    return Place(name, bool(stacked), expert, half)
