"""Why tensors are not of the shapes that config.json's model has: the cause where shapes tell it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence

from streamconv.ir.boxes import Shape

_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|embed_in|embed_out|wte|word_embeddings|embeddings|lm_head)\.(weight|bias)$"
)
_HEAD = re.compile(r"(^|\.)(score|classifier(\.out_proj)?)\.(weight|bias)$")
_EXPERTS = re.compile(r"(^|\.)experts\.")
_EXPERT = re.compile(r"(^|.*\.)experts\.(\d+)\.")
_OWN_EXPERTS = "it seems that each rank of expert parallelism saved its own experts ({}) as if all"
_GATHER = (
    "the others' are lost, or look like copies that differ. Gather the experts before saving, or "
    "check that config.json belongs to this checkpoint"
)


def cause(expected: Mapping[str, Shape], made: Mapping[str, Shape]) -> str | None:
    """Return the likely cause, and what to do, for tensors ``made`` not as ``expected``."""
    pairs = [(n, expected[n], shape) for n, shape in made.items()]
    if all(len(f) == 1 and len(e) > 1 and f[0] <= math.prod(e) for _, e, f in pairs):
        return (
            "these are flat pieces of tensors (FSDP1's flat parameters, or a distributed optimizer's), "
            "not tensors: save the model with a full or a sharded state dict"
        )
    if all(_rows_alone(e, f) for _, e, f in pairs):
        names = [n for n, _, _ in pairs]
        _, e, f = pairs[0]
        if all(map(_VOCABULARY.search, names)):
            return (
                f"the checkpoint has {f[0]} rows of the vocabulary and config.json another vocab_size "
                f"({e[0]}): were tokens added, or rows to fill up? Set vocab_size to what was "
                "trained, or name its config: --hf-config DIR"
            )
        if all(map(_HEAD.search, names)):
            return (
                f"the checkpoint has a head with {f[0]} outputs and config.json another num_labels "
                f"({e[0]}): set it (or id2label) to what was trained, or name its config: "
                "--hf-config DIR"
            )
        shares = {e[0] / f[0] for _, e, f in pairs if f[0]}
        if all(map(_EXPERTS.search, names)) and len(shares) == 1 and (n := shares.pop()) % 1 == 0:
            return f"{_OWN_EXPERTS.format(f'1 of {int(n)} shares')}: {_GATHER}"
    return None


def cause_of_missing(missing: Sequence[str], made: Collection[str]) -> str | None:
    """Return the likely cause, and what to do, where it is experts that are not there."""
    found = [_EXPERT.match(n) for n in missing]
    if not found or not all(found):
        return None
    least = min(int(m[2]) for m in found if m)
    there = {int(m[2]) for n in made if (m := _EXPERT.match(n))}
    if not least or there != set(range(least)):
        return None
    return f"{_OWN_EXPERTS.format(f'here the first {least}')}: {_GATHER}"


def _rows_alone(expected: Shape, found: Shape) -> bool:
    """Whether both differ in their first dimension and in nothing else."""
    return bool(expected and found) and expected[1:] == found[1:] and expected[0] != found[0]
