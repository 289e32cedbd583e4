"""The walk over a HuggingFace state dict that takes it apart into Megatron's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from scripts.makers.tiny_families import State


@dataclass
class Walk:
    """The HuggingFace tensors that are left, and the Megatron ones made of them."""

    config: dict[str, Any]
    """Of the language model."""
    left: State
    made: State = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    """Keys of ``made`` that hold gate rows, then up rows."""

    def has(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> torch.Tensor:
        return self.left.pop(name)

    def put(self, key: str, tensor: torch.Tensor, *, gated: bool = False) -> None:
        assert key not in self.made
        self.made[key] = tensor.contiguous()
        if gated:
            self.gated.add(key)

    def copy(self, key: str, name: str, *, optional: bool = False) -> None:
        if not optional or self.has(name):
            self.put(key, self.take(name))

    def copy_all(self, key_prefix: str, name_prefix: str) -> None:
        for name in [n for n in self.left if n.startswith(name_prefix)]:
            self.put(key_prefix + name.removeprefix(name_prefix), self.take(name))

    def copy_both(self, key: str, name: str) -> None:
        """Copy a module's weight, and its bias if it has one."""
        for kind in ("weight", "bias"):
            separator = "" if key.endswith("layer_norm_") else "."
            self.copy(f"{key}{separator}{kind}", f"{name}.{kind}", optional=kind == "bias")

    def layers(self) -> range:
        return range(self.config["num_hidden_layers"])


Part = Callable[[Walk, str, str], None]
"""Moves one part of a layer: the walk, the Megatron prefix, the HuggingFace prefix."""


def gate_up(w: Walk, mg: str, hf: str) -> None:
    for kind in ("weight", "bias"):
        if w.has(f"{hf}gate_proj.{kind}"):
            both = [w.take(f"{hf}{x}_proj.{kind}") for x in ("gate", "up")]
            w.put(f"{mg}.{kind}", torch.cat(both), gated=True)
