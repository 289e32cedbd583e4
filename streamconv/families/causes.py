"""Why the tensors of a Megatron checkpoint do not fit: the likely causes, told with what to do."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from streamconv.errors import BadInputError

_ADAPTER = re.compile(r"\.adapter\.|\.lora_[ABab](\.|$)|\.adapter_[a-z]+\.")
_QUANTIZER = re.compile(r"_quantizers?\.")
_SCALE = re.compile(
    r"(\.weight\d*|_blocks|_packed)(\.?_?)(scale|scales|scale_inv|scale_2|global_scale)$"
)
_UNSAID = re.compile(r"\.self_attention\.linear_qgkv\.")
_STAGES = (
    "Megatron-FSDP numbers layers within their stage: the other stages' are not in the checkpoint "
    "under names of their own. Save from a run without pipeline parallelism, or as torch_dist"
)


def of_unknown(names: Collection[str], known: int) -> BadInputError | None:
    """Return what tensors are that no rule knows, where their names tell it.

    ``known`` is how many others of the checkpoint a rule knows.
    """
    adapter, quantizers = adapter_names(names), [n for n in names if _QUANTIZER.search(n)]
    if adapter:
        return BadInputError(
            "there is an adapter (LoRA) in this checkpoint that is not merged into the weights"
            if known
            else "there is an adapter (LoRA) in this checkpoint and no model",
            where=adapter[0],
            found=f"{len(adapter)} tensors of an adapter on the trainer's modules",
            hint="let the trainer merge it into the model, and save that",
        )
    if quantizers:
        return BadInputError(
            "the weights of this checkpoint are scaled or quantized by ModelOpt",
            where=quantizers[0],
            expected="weights as they were trained: of the state of quantizers, _amax alone can be "
            "left out",
            found=f"{len(quantizers)} other tensors of quantizers",
            hint="export it with ModelOpt, whose scales these are (export_mcore_gpt_to_hf)",
        )
    scales = [n for n in names if _SCALE.search(n)]
    if scales:
        return BadInputError(
            "the weights of this Megatron checkpoint are quantized",
            where=scales[0],
            expected="weights in floats: no release of Megatron tells which blocks these scales are of",
            found=f"{len(scales)} tensors of scales",
            hint="save it with the weights in bfloat16 (Megatron: without --fp8-param-gather), or let "
            "the trainer export the model",
        )
    unsaid = [n for n in names if _UNSAID.search(n)]
    if unsaid:
        return BadInputError(
            "queries, gates, keys and values are in one tensor, in an order that no release tells",
            where=unsaid[0],
            expected="linear_qkv, as Megatron-Core and ms-swift write it, or HuggingFace's modules",
            found=f"{len(unsaid)} tensors called linear_qgkv (--use-gated-attention of forks of slime)",
            hint="let the trainer export the model",
        )
    return None


def adapter_names(names: Collection[str]) -> list[str]:
    """Return those of ``names`` that an adapter (LoRA) has."""
    return [n for n in names if _ADAPTER.search(n)]


def of_layers(
    expected: int, found: set[int], names: Collection[str], megatron: Mapping[str, object]
) -> BadInputError | None:
    """Return why the layers ``found`` are not the ``expected`` ones, where anything tells it."""
    where = "decoder.layers." + ", ".join(map(str, sorted(found)[:12]))
    noop, stages = megatron.get("noop_layers"), megatron.get("pipeline_model_parallel_size")
    if not found:
        return of_unknown(adapter_names(names), 0) or BadInputError(
            "no layer of a language model is in this checkpoint",
            where=next(iter(names), ""),
            expected=f"{expected} layers (decoder.layers.0, …), as config.json says",
            found=f"{len(names)} tensors of other names",
            hint="is it a checkpoint of another part of the run?",
        )
    if len(found) == expected and max(found) >= expected:
        empty = sorted(set(range(max(found) + 1)) - found)
        return BadInputError(
            "the layers are numbered with gaps: layers that do nothing (noop layers) are counted",
            where=where,
            expected=f"layers 0 to {expected - 1}",
            found=f"{expected} layers up to {max(found)}, none with the numbers "
            + ", ".join(map(str, empty[:12]))
            + (f"; the run had noop_layers {noop}" if noop else ""),
            hint="such checkpoints are not supported: let the trainer save one without noop layers "
            "or export it",
        )
    local = found == set(range(len(found))) and len(found) < expected
    claimed = megatron.get("num_layers")
    if local and claimed == expected and type(stages) is int and stages > 1:
        return BadInputError(
            "the layers are numbered within each pipeline stage, and the stages share their names",
            where=where,
            expected=f"{expected} layers, as config.json and the run say",
            found=f"{len(found)} of them, in a run with {stages} pipeline stages",
            hint=_STAGES,
        )
    if local and expected % len(found) == 0 and claimed is None:
        return BadInputError(
            "config.json and the checkpoint contradict each other: the number of layers",
            expected=f"{expected} by config.json",
            found=f"{len(found)} in the checkpoint",
            hint="name the config of the model that was trained: --hf-config DIR. If it was trained "
            f"with pipeline parallelism: {_STAGES}",
        )
    return None
