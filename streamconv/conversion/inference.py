"""A checkpoint in a model that runs, with no folder in between: each tensor is read when asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from streamconv.errors import BadInputError, UsageError
from streamconv.ir.boxes import Shape
from streamconv.ir.dtypes import DType
from streamconv.ir.planfile import Plan
from streamconv.storage.address import place

if TYPE_CHECKING:
    import torch

_CONFIG = "config.json"


class Readable(Protocol):
    """What is asked of a lazy tensor here."""

    @property
    def shape(self) -> Shape:
        """Return the shape."""

    @property
    def dtype(self) -> DType:
        """Return the element type."""

    def torch(self, index: Any = ...) -> torch.Tensor:
        """Read a part as a torch tensor."""


class _Slice:
    """A lazy tensor as transformers takes those of safetensors: nothing is read before ``[...]``."""

    def __init__(self, tensor: Readable) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor.torch(index)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._tensor.shape

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return self._tensor.dtype.name


def load_model(plan: Plan, tensors: Mapping[str, Readable], settings: dict[str, Any]) -> Any:
    """Return the transformers model that the output of ``plan`` would be, filled with ``tensors``.

    ``settings`` go to ``from_pretrained`` (``dtype``, ``device_map``, …). Raises
    :class:`BadInputError` where there is no config, :class:`UsageError` for an adapter.
    """
    import transformers

    with tempfile.TemporaryDirectory(prefix="streamconv-") as scratch:
        folder = Path(scratch)
        for name, text in _side_texts(plan).items():
            (folder / name).write_text(text, encoding="utf-8")
        if not (folder / _CONFIG).is_file():
            raise BadInputError(
                f"there is no {_CONFIG}: which model the tensors belong to is not known",
                where=plan.head.root,
                hint="name a folder that has one: --hf-config DIR",
            )
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = _model_class(transformers, config)
        settings.setdefault("dtype", getattr(config, "dtype", None) or "auto")
        slices = {name: _Slice(tensor) for name, tensor in tensors.items()}
        model = kind.from_pretrained(None, config=config, state_dict=slices, **settings)
        if (folder / "generation_config.json").is_file() and model.can_generate():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _side_texts(plan: Plan) -> Mapping[str, str]:
    wanted = (_CONFIG, "generation_config.json")
    copied = {s.name: place(s.path) for s in plan.head.side if s.name in wanted}
    texts = {name: path.read_text(encoding="utf-8") for name, path in copied.items()}
    return texts | {
        w.name: "".join(plan.content(w.name)) for w in plan.head.written if w.name in wanted
    }


def _model_class(transformers: Any, config: Any) -> Any:
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    kind = next((found for found in named if found is not None), None)
    if kind is None:
        raise UsageError(
            "config.json names no class of transformers",
            found=", ".join(config.architectures or ()) or "no architectures",
            hint="convert the checkpoint, and load the folder with the class that you mean",
        )
    return kind
