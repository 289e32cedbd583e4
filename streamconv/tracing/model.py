"""What the planner asks of a model: the interface between checkpoints and transformers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import DType
from streamconv.ir.recipe import Recipe
from streamconv.options import Layout

Headers = Mapping[str, tuple[Shape, DType]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What comes of loading, in the names of the tensors that were given unless said otherwise.

    ``missing``: names of the state dict that nothing fills. ``unexpected``: tensors that fill nothing.
    ``clashing``: pairs that fill one place, of which the second is lost. ``misshapen``: (state dict's
    name, expected, found). ``failed``: (state dict's name, what transformers says).
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    clashing: tuple[tuple[str, str], ...] = ()
    misshapen: tuple[tuple[str, Shape, Shape], ...] = ()
    failed: tuple[tuple[str, str], ...] = ()


class Model(Protocol):
    """What the planner asks of the model that the config describes.

    tracing.hf.MetaModel answers, or planning.answers.AskedModel remembers what it answered.
    """

    @property
    def state_shapes(self) -> Mapping[str, Shape]:
        """Return the tensors of the state dict."""

    @property
    def hub_shapes(self) -> Mapping[str, Shape]:
        """Return the tensors of a saved model."""

    @property
    def tied(self) -> tuple[tuple[str, str], ...]:
        """Return (alias, kept) of tied weights, in Hub names."""

    @property
    def architecture(self) -> str:
        """Return the name of the class."""

    @property
    def certain(self) -> bool:
        """Whether that is the class that config.json names."""

    @property
    def optional(self) -> frozenset[str]:
        """Return the Hub names that a complete model may lack."""

    def is_optional_unexpected(self, name: str) -> bool:
        """Whether the library ignores a tensor that it does not know."""

    def has(self, name: str) -> bool:
        """Whether a tensor of this name is the model's, whatever release or layout names it so."""

    def load(self, tensors: Headers) -> Loaded:
        """Return what the library makes of files that hold ``tensors``."""

    def kept_fp32(self, names: Collection[str], target: DType) -> frozenset[str]:
        """Return the tensors that the library keeps in float32 when it loads as ``target``."""

    def hold_fractions(self, names: Collection[str]) -> frozenset[str]:
        """Return the tensors of ``names`` that hold floating-point numbers in the model."""

    def hub_name(self, name: str) -> str | None:
        """Return what the Hub calls a tensor that keeps its elements in place; None for others."""

    def holds_transposed(self, module: str) -> bool | None:
        """Whether a module's weight is (in, out); None where there is no such module."""

    def reads_alike(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether the library reads all that ``one`` says from the config ``other``, too."""

    def recipes(
        self, tensors: Headers, layout: Layout = "hub"
    ) -> tuple[tuple[Recipe, ...], tuple[str, ...]]:
        """Return the recipes of the output tensors, and notices."""
