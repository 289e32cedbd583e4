"""What the planner asks of a model: the interface between checkpoints and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import DType
from streamconv.ir.recipe import Recipe
from streamconv.options import Layout

if TYPE_CHECKING:
    from streamconv.tracing.hf_load import Loaded


class Model(Protocol):
    """What the planner asks of the model that the config describes (tracing.hf.MetaModel)."""

    state_shapes: dict[str, Shape]
    hub_shapes: dict[str, Shape]
    tied: tuple[tuple[str, str], ...]
    architecture: str
    certain: bool

    @property
    def optional(self) -> frozenset[str]:
        """Return the Hub names that a complete model may lack."""

    def is_optional_unexpected(self, name: str) -> bool:
        """Whether the library ignores a tensor that it does not know."""

    def has(self, name: str) -> bool:
        """Whether a tensor of this name is the model's, whatever release or layout names it so."""

    def load(self, tensors: Mapping[str, tuple[Shape, DType]]) -> Loaded:
        """Return what the library makes of files that hold ``tensors``."""

    def keep_fp32(self, name: str, target: DType) -> bool:
        """Whether the library keeps a tensor in float32 when it loads as ``target``."""

    def hub_name(self, name: str) -> str | None:
        """Return what the Hub calls a tensor that keeps its elements in place; None for others."""

    def holds_transposed(self, module: str) -> bool | None:
        """Whether a module's weight is (in, out); None where there is no such module."""

    def reads_alike(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether the library reads all that ``one`` says from the config ``other``, too."""

    def recipes(
        self, tensors: Mapping[str, tuple[Shape, DType]], layout: Layout = "hub"
    ) -> tuple[tuple[Recipe, ...], tuple[str, ...]]:
        """Return the recipes of the output tensors, and notices."""
