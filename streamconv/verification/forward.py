"""Running an output: load it with transformers in a child process, look at the logits, compare them.

The child holds the weights; where they exceed the budget they stay on disk and come in one module at
a time. What it found is plain data: ``architecture``, ``dtype`` (as it was loaded), ``stored`` (the
floating type of most of the files), ``offloaded``, ``token_ids``, ``rows`` (embeddings), ``tokens`` (of
the tokenizer), ``adapter`` (whether it is one), ``missing``, ``unexpected``, ``passed_over`` (by PEFT),
``mismatched`` and ``not_finite`` names, ``finite`` (the logits), ``top`` (the likeliest tokens after
the last one), ``peak_bytes``, ``budget_bytes``, and ``reference`` where there is one to compare with:
``max_abs``, ``tolerance``, ``kl`` (nats, mean over the tokens, reference against output), ``top1``
(share of tokens with the same likeliest class).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamconv.errors import BudgetError
from streamconv.executor import budget as budgets
from streamconv.system import memory
from streamconv.system.children import ask
from streamconv.units import format_size
from streamconv.verification.report import Report

Array = np.ndarray[Any, Any]

# Of the largest logit of the reference. Equal weights in one dtype give equal logits, but for the
# order of sums; rounding all weights to bfloat16 moves the logits of a deep model by a few percent.
_SAME_DTYPE = 1e-5
_OTHER_DTYPE = 0.05
_LISTED = 12


def verify_forward(
    folder: Path,
    *,
    reference: Path | None = None,
    base: Path | None = None,
    prompt: str | None = None,
    token_ids: Sequence[int] | None = None,
    logits_atol: float | None = None,
    max_mem_bytes: int | None = None,
) -> Report:
    """Load ``folder`` with transformers and run it on a few tokens.

    ``prompt`` is text for the folder's tokenizer, ``token_ids`` are tokens as they are. With
    ``reference`` another folder is run on the same tokens, and the logits may differ by
    ``logits_atol`` (None: 1e-5 of the largest logit, 0.05 where the dtypes differ). The folder of an
    adapter is put on ``base`` by PEFT, or on the local folder that its config names. Raises
    :class:`BudgetError` where the model cannot be run in ``max_mem_bytes``, and
    :class:`BadInputError` where transformers cannot load or run it.
    """
    budget = max_mem_bytes or memory.available_bytes()[0]
    _check_budget(budget)
    report = Report()
    with tempfile.TemporaryDirectory(prefix="streamconv-") as scratch, memory.PeakMeter() as meter:
        ours_path = Path(scratch) / "ours.npy"
        request = {"prompt": prompt, "token_ids": token_ids, "budget_bytes": budget}
        request["base"] = str(base) if base is not None else None
        found = _run(folder, ours_path, request, meter)
        _judge(found, report)
        if reference is not None:
            theirs_path = Path(scratch) / "theirs.npy"
            request |= {"prompt": None, "token_ids": found["token_ids"]}
            theirs = _run(reference, theirs_path, request, meter)
            found["reference"] = _compare(
                np.load(ours_path, mmap_mode="r"),
                np.load(theirs_path, mmap_mode="r"),
                same_dtype=_round_alike(found, theirs),
                atol=logits_atol,
            )
            _judge_reference(found["reference"], reference, theirs, report)
        report.forward = found | {"peak_bytes": meter.peak_bytes, "budget_bytes": budget}
    return report


def _round_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether equal models give the same logits: a merge rounds, an adapter does not."""
    if any(one[k] != other[k] for k in ("dtype", "stored")):
        return False
    return one["adapter"] == other["adapter"] or one["dtype"] in ("float32", "float64")


def _check_budget(budget: int) -> None:
    """Loading torch and transformers alone needs what planning needs."""
    need = budgets.smallest_convert_bytes()
    if budget < need:
        raise BudgetError(
            "the memory budget is too small to run a model",
            expected=f"at least {format_size(need)}, and room for the largest weight",
            found=format_size(budget),
            hint=f"try --max-mem {need * 5 // 4 // 10**6}MB",
        )


def _run(
    folder: Path, logits: Path, request: dict[str, Any], meter: memory.PeakMeter
) -> dict[str, Any]:
    found = ask(
        "streamconv.verification.forward_child",
        {**request, "task": "run", "src": str(folder), "logits_path": str(logits)},
        doing="running the model",
    )
    if meter.peak_bytes > request["budget_bytes"]:
        raise BudgetError(
            "running the model took more memory than the budget",
            expected=f"at least {format_size(meter.peak_bytes * 1.02)}",
            found=format_size(request["budget_bytes"]),
            hint=f"--max-mem {meter.peak_bytes * 102 // 10**8 + 1}MB works",
        )
    return found


def _judge(found: dict[str, Any], report: Report) -> None:
    how = "a module at a time from disk" if found["offloaded"] else "in memory"
    report.checked.append(
        f"{found['architecture']} loaded as {found['dtype']} and run {how} on "
        f"{len(found['token_ids'])} tokens"
    )
    if found["tokens"] is not None and found["tokens"] > found["rows"]:
        report.checked.append(
            f"note: the tokenizer knows {found['tokens']} tokens, the model has {found['rows']} "
            "embeddings: the others end in an error"
        )
    for key, what in (
        ("missing", "not in the files, so the model would start with a random one"),
        ("mismatched", "of another shape than the model's"),
        ("passed_over", "PEFT passes over it, so that its layer is dead"),
        ("not_finite", "holds NaN or infinity"),
    ):
        names = found[key]
        report.problems += [f"{n}: {what}" for n in names[:_LISTED]]
        if len(names) > _LISTED:
            report.problems.append(f"and {len(names) - _LISTED} more weights {what}")
    if found["unexpected"]:
        names = ", ".join(found["unexpected"][:3])
        report.checked.append(
            f"note: the model does not use {len(found['unexpected'])} tensors, such as {names}"
        )
    if found["finite"]:
        report.checked.append("the logits are finite")
    else:
        report.problems.append("the logits hold NaN or infinity")


def _compare(ours: Array, theirs: Array, *, same_dtype: bool, atol: float | None) -> dict[str, Any]:
    """Compare logits of shape (tokens, classes), a token at a time."""
    if ours.shape != theirs.shape:
        return {"shapes": [list(ours.shape), list(theirs.shape)], "passed": False}
    largest = max_abs = kl = 0.0
    same_top = 0
    for a, b in zip(ours, theirs, strict=True):
        x, y = a.astype(np.float64), b.astype(np.float64)
        largest = max(largest, float(np.abs(y).max()))
        max_abs = float(np.maximum(max_abs, np.abs(x - y).max()))  # keeps a NaN
        p, q = _log_softmax(y), _log_softmax(x)
        kl += float((np.exp(p) * (p - q)).sum())
        same_top += int(x.argmax() == y.argmax())
    share = _SAME_DTYPE if same_dtype else _OTHER_DTYPE
    tolerance = share * max(1.0, largest) if atol is None else atol
    one = ours.shape[-1] == 1  # a critic's value is not a distribution
    return {
        "max_abs": max_abs,
        "tolerance": tolerance,
        "largest_logit": largest,
        "kl": None if one else kl / len(ours),
        "top1": None if one else same_top / len(ours),
        "passed": bool(math.isfinite(max_abs) and max_abs <= tolerance),
    }


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max()
    made: Array = shifted - np.log(np.exp(shifted).sum())
    return made


def _judge_reference(
    found: dict[str, Any], reference: Path, theirs: dict[str, Any], report: Report
) -> None:
    report.checked.append(f"the logits against those of {reference} ({theirs['dtype']})")
    lacking = sum(len(theirs[k]) for k in ("missing", "mismatched", "passed_over"))
    if lacking:
        report.problems.append(f"the reference itself lacks {lacking} weights")
    if not theirs["finite"]:
        # Infinite logits would make any difference a tolerated one.
        report.problems.append("the logits of the reference hold NaN or infinity")
    if "shapes" in found:
        ours, other = found["shapes"]
        report.problems.append(f"the logits have the shape {ours}, those of the reference {other}")
    elif not found["passed"]:
        report.problems.append(
            f"the logits differ by {found['max_abs']:.6g}, more than {found['tolerance']:.6g}"
        )
