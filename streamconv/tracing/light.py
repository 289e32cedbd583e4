"""torch and transformers for asking about a model: what only running one takes is not loaded.

Of the 2.7 CPU seconds that asking takes for the first time, one went to the compiler of torch,
distributed tensors, and a second search of the files of all models. Whoever asks afterwards for what
was left out gets it: this is about when things are loaded, and not about what they say.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
# masking_utils takes one class of it, for the masks of a model that is run.
_OF_MASKS = f"{_COMPILER}._trace_wrapped_higher_order_op"


@functools.cache
def load() -> None:
    """Load torch and transformers; for processes that ask about models and run none."""
    if "transformers" in sys.modules:
        return
    import torch

    if _COMPILER not in sys.modules:
        marks = ("disable", "allow_in_graph", "assume_constant_result")
        torch._dynamo = _Later(_COMPILER, dict.fromkeys(marks, _as_it_is))
        _Later(_OF_MASKS, {"TransformGetItemToIndex": _masks})
    # No group of processes is ever made here. transformers knows torch without any, and then does not
    # load distributed tensors to tell that nothing is one.
    torch.distributed.is_available = lambda: False
    _search_once()


class _Later(ModuleType):
    """Stands for a module until something of it is used that is not among ``known``."""

    def __init__(self, name: str, known: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.__dict__.update(known)
        del self.__dict__["__spec__"]
        sys.modules[name] = self

    def __getattr__(self, name: str) -> Any:
        # What lies below the compiler is about to be imported where its path is asked for.
        stands = sys.modules.get(self.__name__) is self
        if stands and name.startswith("__") and (name, self.__name__) != ("__path__", _COMPILER):
            raise AttributeError(name)
        return getattr(_loaded(self.__name__), name)


def _as_it_is(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Any:
    """Do as the marks for the compiler do where nothing is compiled."""
    return _as_it_is if function is None else function


def _masks() -> Any:
    return _loaded(_OF_MASKS).TransformGetItemToIndex()


def _loaded(name: str) -> Any:
    """Return a module itself, and not what stands for it."""
    if isinstance(sys.modules.get(name), _Later):
        del sys.modules[name]
    return importlib.import_module(name)


def _search_once() -> None:
    """Load ``transformers.models`` without searching all files of models, as transformers has done."""
    import transformers
    from transformers.utils import import_utils

    folder = Path(transformers.__file__).parent / "models"
    search = getattr(import_utils, "define_import_structure", None)
    if search is None:  # a release that looks for its models in another way
        return

    def remembered(path: Any, prefix: str | None = None) -> Any:
        if prefix is not None or Path(path) != folder / "__init__.py":
            return search(path, prefix)
        return of_models(search(folder, prefix="models"))

    import_utils.define_import_structure = remembered
    try:
        importlib.import_module("transformers.models")
    finally:
        import_utils.define_import_structure = search


def of_models(found: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Return, of what transformers found of itself, what ``transformers.models`` would find."""
    return {
        backends: {
            name.removeprefix("models."): objects
            for name, objects in modules.items()
            if name.startswith("models.")
        }
        for backends, modules in found.items()
    }
