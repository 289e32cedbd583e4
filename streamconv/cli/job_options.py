"""The options that decide the output: declared once, and given to every command that takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from streamconv.cli.command import LORA, MODEL
from streamconv.files.inputs import local_path
from streamconv.options import DTypeChoice, Layout, LoraMode, Masters, Quantization, ValueHead


def _one_of(choice: Any) -> Callable[[str], list[str]]:
    """Return what completes a value that is one of a ``Literal``."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in get_args(choice) if value.startswith(incomplete)]

    return complete


MaxShard = Annotated[
    str,
    typer.Option(
        "--max-shard-size", metavar="SIZE", help="Size of an output file; a tensor is never split."
    ),
]
DTypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        autocompletion=_one_of(DTypeChoice),
        help="keep, auto (config.json's), bfloat16 (bf16), float16 (fp16), float32 (fp32).",
    ),
]
KeepDType = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-dtype",
        metavar="PATTERN",
        help="Output names that --dtype leaves alone, such as '*.gate.*'; may be repeated.",
        rich_help_panel=MODEL,
    ),
]
LayoutOption = Annotated[
    str,
    typer.Option(
        "--layout",
        metavar="LAYOUT",
        autocompletion=_one_of(Layout),
        help="hub: the names the Hub expects; memory: the state dict's.",
        rich_help_panel=MODEL,
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Refuse tensors that the model does not know.", rich_help_panel=MODEL
    ),
]
HfConfig = Annotated[
    Path | None,
    typer.Option(
        "--hf-config",
        parser=local_path,
        metavar="DIR",
        help="Take config, tokenizer and the other side files from this folder.",
    ),
]
ConfigOption = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        metavar="KEY=VALUE",
        help="Put this value into config.json, such as rope_theta=1e6; may be repeated.",
        rich_help_panel=MODEL,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="Which model of a step folder (actor, critic, or all) or of a checkpoint (ema).",
    ),
]
StripPrefix = Annotated[
    str | None,
    typer.Option(
        "--strip-prefix",
        metavar="PREFIX",
        help="What the names of the model's tensors begin with, where that cannot be found out.",
        rich_help_panel=MODEL,
    ),
]
FamilyOption = Annotated[
    str | None,
    typer.Option(
        "--family",
        metavar="NAME",
        help="Whose rules name the tensors of Megatron or a trainer's own. Default: by config.json.",
        rich_help_panel=MODEL,
    ),
]
MastersOption = Annotated[
    str,
    typer.Option(
        "--masters",
        metavar="YES",
        autocompletion=_one_of(Masters),
        help="no takes the 16-bit weights where a checkpoint (DeepSpeed) has fp32 masters beside them.",
        rich_help_panel=MODEL,
    ),
]
Lora = Annotated[
    str,
    typer.Option(
        "--lora",
        metavar="MODE",
        autocompletion=_one_of(LoraMode),
        help="LoRA adapters: merge, adapter (a PEFT folder), both; auto merges where base weights are.",
        rich_help_panel=LORA,
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(
        "--base",
        parser=local_path,
        metavar="DIR",
        help="Merge a checkpoint of adapters alone into this model folder.",
        rich_help_panel=LORA,
    ),
]
LoraAlpha = Annotated[
    float | None,
    typer.Option(
        "--lora-alpha",
        metavar="N",
        help="The lora_alpha that it was trained with.",
        rich_help_panel=LORA,
    ),
]
LoraRank = Annotated[
    int | None,
    typer.Option(
        "--lora-rank", metavar="N", help="The rank that it must have.", rich_help_panel=LORA
    ),
]
LoraRslora = Annotated[
    bool,
    typer.Option(
        "--lora-rslora", help="Scale by alpha / sqrt(rank), as rsLoRA does.", rich_help_panel=LORA
    ),
]
AllowZeroDelta = Annotated[
    bool,
    typer.Option(
        "--allow-zero-delta", help="Take an adapter that changes nothing.", rich_help_panel=LORA
    ),
]
ValueHeadOption = Annotated[
    str,
    typer.Option(
        "--value-head",
        metavar="KEEP",
        autocompletion=_one_of(ValueHead),
        help="keep or drop the v_head that trl adds to a model.",
        rich_help_panel=MODEL,
    ),
]
KeepBuffers = Annotated[
    bool,
    typer.Option(
        "--keep-buffers",
        help="Write what quantization-aware training measured beside the weights, too.",
        rich_help_panel=MODEL,
    ),
]
Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize",
        help="Make floats of quantized weights (fp8, mxfp4, nvfp4): bfloat16, or what --dtype says.",
        rich_help_panel=MODEL,
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="RULE",
        autocompletion=_one_of(Quantization),
        help="Write projections as fp8: fp8-block, fp8-block:ue8m0, fp8-channel.",
        rich_help_panel=MODEL,
    ),
]

_JOB: Mapping[str, tuple[Any, Any]] = {
    "max_shard_size": (MaxShard, "5GB"),
    "dtype": (DTypeOption, "keep"),
    "keep_dtype": (KeepDType, None),
    "layout": (LayoutOption, "hub"),
    "strict": (Strict, False),
    "hf_config": (HfConfig, None),
    "config": (ConfigOption, None),
    "model": (Model, None),
    "strip_prefix": (StripPrefix, None),
    "family": (FamilyOption, None),
    "masters": (MastersOption, "yes"),
    "lora": (Lora, "auto"),
    "base": (Base, None),
    "lora_alpha": (LoraAlpha, None),
    "lora_rank": (LoraRank, None),
    "lora_rslora": (LoraRslora, False),
    "allow_zero_delta": (AllowZeroDelta, False),
    "value_head": (ValueHeadOption, "keep"),
    "keep_buffers": (KeepBuffers, False),
    "dequantize": (Dequantize, False),
    "quantize": (Quantize, None),
}
JobOptions = Mapping[str, Any]
NONE: JobOptions = MappingProxyType({})


def given(context: typer.Context, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a command's parameters that were said, not those that go without saying."""

    def is_said(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name != "DEFAULT"

    return {name: value for name, value in names.items() if is_said(name)}


def with_job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command`` with these options in place of its parameter ``job``: those that were said.

    The command takes its ``context``, too.
    """
    return in_place_of("job", _JOB, command, given)


def in_place_of(
    parameter: str,
    options: Mapping[str, tuple[Any, Any]],
    command: Callable[..., None],
    collected: Callable[[Any, dict[str, Any]], Mapping[str, Any]],
) -> Callable[..., None]:
    """Return ``command`` with ``options`` in place of one parameter.

    ``options`` are types and defaults by their names. The parameter gets what ``collected`` makes of
    the command's context (None where it takes none) and their values.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for each in inspect.signature(command).parameters.values():
        if each.name == parameter:
            parameters += [
                each.replace(name=name, annotation=kind, default=default)
                for name, (kind, default) in options.items()
            ]
        else:
            parameters.append(each.replace(annotation=hints[each.name]))

    def taking(**values: Any) -> None:
        mine = {name: values.pop(name) for name in options}
        command(**values, **{parameter: collected(values.get("context"), mine)})

    taking.__name__, taking.__doc__ = command.__name__, command.__doc__
    taking.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    taking.__annotations__ = {p.name: p.annotation for p in parameters}
    return taking
