"""What wrappers leave inside the names of tensors."""

from __future__ import annotations

# torch.compile, FSDP1 and activation checkpointing each insert a component of their own.
_MARKERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})


def without_markers(name: str) -> str:
    """Return a name without the components that wrappers leave inside it."""
    return ".".join(part for part in name.split(".") if part not in _MARKERS)
