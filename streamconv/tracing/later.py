"""torch for tables of rules, which are read whenever names are looked at and run only to be traced.

``torch`` is imported when something of it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:

    class _Later:
        def __getattr__(self, name: str) -> Any:
            import torch as loaded

            return getattr(loaded, name)

    torch, Tensor = _Later(), Any

__all__ = ["Tensor", "torch"]
