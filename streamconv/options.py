"""What a user chose: the options that decide which bytes come out (the job) and how it is run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args

from streamconv.errors import CancelledError, UsageError
from streamconv.files.inputs import local_path
from streamconv.storage.address import StrPath
from streamconv.units import format_size, parse_size

Layout = Literal["hub", "memory"]
DTypeChoice = Literal["keep", "auto", "bfloat16", "float16", "float32"]
# As hands type them; everything else knows the long names only.
ShortDType = Literal["bf16", "fp16", "fp32"]
SHORT_DTYPES: dict[str, DTypeChoice] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ValueHead = Literal["keep", "drop"]
Masters = Literal["yes", "no"]
Quantization = Literal["fp8-block", "fp8-block:ue8m0", "fp8-channel"]
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
LoraMode = Literal["auto", "merge", "adapter", "both"]

DEFAULT_SHARD_BYTES = 5 * 10**9


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise UsageError(
            f"unknown {name}: {value!r}", expected="one of " + ", ".join(get_args(choices))
        )


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """What becomes of LoRA adapters.

    ``mode``: ``merge`` into the base weights, ``adapter`` for a PEFT folder, ``both``; ``auto`` merges
    where there are base weights. ``base``: a model folder to merge into, for a checkpoint that holds
    the adapter alone. ``alpha``, ``rank``, ``rslora`` go before what the checkpoint says of itself.
    ``allow_zero``: take an adapter that changes nothing.
    """

    mode: LoraMode = "auto"
    base: Path | None = None
    alpha: float | None = None
    rank: int | None = None
    rslora: bool = False
    allow_zero: bool = False

    def __post_init__(self) -> None:
        _check_choice("--lora", self.mode, LoraMode)
        if self.alpha is not None and not (0 < self.alpha < math.inf):
            raise UsageError("--lora-alpha must be a positive number", found=str(self.alpha))
        if self.rank is not None and self.rank < 1:
            raise UsageError("--lora-rank must be 1 or more", found=str(self.rank))

    def to_json(self) -> dict[str, Any]:
        """Return the options as plain data."""
        return {**asdict(self), "base": str(self.base) if self.base else None}

    @staticmethod
    def from_json(data: dict[str, Any]) -> LoraOptions:
        """Rebuild the options from :meth:`to_json`; what is missing takes its default."""
        return LoraOptions(**{**data, "base": Path(data["base"]) if data.get("base") else None})


@dataclass(frozen=True, slots=True)
class AverageOptions:
    """The weighted sum of several checkpoints, which is what is converted.

    ``sources``: where the others lie, beside the one that is the source; empty in what makes a job's
    identity. ``weights``: one for each checkpoint, that of the source first. ``divisor``: what the sum
    is divided by, once.
    """

    sources: tuple[Path, ...]
    weights: tuple[float, ...]
    divisor: float = 1.0

    def __post_init__(self) -> None:
        if not self.weights or len(self.sources) not in (0, len(self.weights) - 1):
            raise UsageError(
                "as many weights are needed as there are checkpoints",
                expected=str(len(self.sources) + 1),
                found=str(len(self.weights)),
            )
        if not all(map(math.isfinite, self.weights)) or not any(self.weights):
            raise UsageError(
                "weights must be numbers, not all of them 0",
                found=", ".join(f"{w:g}" for w in self.weights),
            )
        if not (0 < self.divisor < math.inf):
            raise UsageError("a sum is divided by a positive number", found=str(self.divisor))

    @staticmethod
    def mean(others: Sequence[Path]) -> AverageOptions:
        """Return the mean of a checkpoint and ``others``: their sum, divided once."""
        count = len(others) + 1
        return AverageOptions(tuple(others), (1.0,) * count, float(count))

    @staticmethod
    def moving(others: Sequence[Path], decay: float) -> AverageOptions:
        """Return the moving average that begins with a checkpoint and takes in ``others`` in turn."""
        if not 0 < decay < 1:
            raise UsageError("the decay lies between 0 and 1", found=f"{decay:g}")
        count = len(others)
        later = [(1 - decay) * decay ** (count - 1 - k) for k in range(count)]
        return AverageOptions(tuple(others), (decay**count, *later))

    @property
    def said(self) -> str:
        """Return in words what is summed up."""
        return f"the sum of {len(self.weights)} checkpoints times {self.said_weights}"

    @property
    def said_weights(self) -> str:
        """Return the weights, and what their sum is divided by, in words."""
        weights = ", ".join(f"{w:.6g}" for w in self.weights)
        return weights if self.divisor == 1 else f"{weights}, over {self.divisor:g}"

    def to_json(self) -> dict[str, Any]:
        """Return the options as plain data."""
        return {
            "sources": [str(s) for s in self.sources],
            "weights": list(self.weights),
            "divisor": self.divisor,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> AverageOptions:
        """Rebuild the options from :meth:`to_json`."""
        sources = tuple(Path(s) for s in data["sources"])
        return AverageOptions(sources, tuple(data["weights"]), data["divisor"])


@dataclass(frozen=True, slots=True)
class JobOptions:
    """Options that change the output; they are part of the job's identity and of the plan.

    ``layout``: ``hub`` gives the names the Hub expects, ``memory`` keeps the state dict's.
    ``dtype``: ``keep`` is lossless, ``auto`` is what config.json declares. ``keep_dtype``: glob
    patterns of output names that ``dtype`` leaves alone. ``max_shard_bytes``: the size of an output
    file; a tensor is never split. ``strict``: refuse tensors that the model does not know.
    ``hf_config``: a folder to take config, tokenizer and the other side files from. ``family``: whose
    rules turn Megatron's tensors into HuggingFace's; None means what config.json's model type says.
    ``value_head``: whether the head that trl adds to a causal model is written. ``masters``: whether
    the fp32 masters are taken where a checkpoint has them beside the 16-bit weights. ``config``: values
    that replace config.json's, each ``KEY=VALUE``. ``strip_prefix``: what the names of the model's
    tensors begin with, where that cannot be found out. ``keep_buffers``: write what quantization-aware
    training measures beside the weights. ``dequantize``: make floats of quantized weights, bfloat16
    where ``dtype`` does not say. ``quantize``: write the weights of projections as fp8, by this rule,
    from what the source holds; ``dtype`` is for the others. ``average``: other checkpoints that the
    source is summed up with; what is written is the sum of what would be written of each.
    """

    layout: Layout = "hub"
    dtype: DTypeChoice = "keep"
    keep_dtype: tuple[str, ...] = ()
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    strict: bool = False
    hf_config: Path | None = None
    model: str | None = None
    family: str | None = None
    lora: LoraOptions = field(default_factory=LoraOptions)
    value_head: ValueHead = "keep"
    masters: Masters = "yes"
    config: tuple[str, ...] = ()
    strip_prefix: str | None = None
    keep_buffers: bool = False
    dequantize: bool = False
    quantize: Quantization | None = None
    average: AverageOptions | None = None

    def __post_init__(self) -> None:
        _check_choice("value head", self.value_head, ValueHead)
        _check_choice("masters", self.masters, Masters)
        _check_choice("layout", self.layout, Layout)
        _check_choice("dtype", self.dtype, DTypeChoice)
        if self.quantize is not None:
            _check_choice("--quantize", self.quantize, Quantization)
            if self.layout != "hub":
                raise UsageError("--quantize is for the names of the Hub", found="--layout memory")
        if self.average is not None and self.lora.mode in ("adapter", "both"):
            raise UsageError(
                "the sum of adapters is not the adapter of the sum",
                found=f"--lora {self.lora.mode}",
                hint="leave it out: adapters are merged before models are summed up",
            )
        if self.max_shard_bytes <= 0:
            raise UsageError("the shard size must be positive")
        if self.strip_prefix is not None and not self.strip_prefix.strip("."):
            raise UsageError("--strip-prefix needs the prefix that names begin with")
        for text in self.config:
            parse_override(text)

    def absolute(self) -> JobOptions:
        """Return the same for processes that run in another folder, on another machine."""
        config, base = self.hf_config, self.lora.base
        return replace(
            self,
            hf_config=config and config.absolute(),
            lora=replace(self.lora, base=base and base.absolute()),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the options as plain data; what goes into the job's identity."""
        return {
            **asdict(self),
            "keep_dtype": list(self.keep_dtype),
            "config": list(self.config),
            "hf_config": str(self.hf_config) if self.hf_config else None,
            "lora": self.lora.to_json(),
            "average": self.average.to_json() if self.average else None,
        }

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return what is read beside the source: config, base model, other checkpoints."""
        named = (self.hf_config, self.lora.base)
        others = self.average.sources if self.average is not None else ()
        return (*(p for p in named if p is not None), *others)

    @staticmethod
    def from_json(data: dict[str, Any]) -> JobOptions:
        """Rebuild the options from :meth:`to_json`; what is missing takes its default."""
        made = {
            **data,
            "keep_dtype": tuple(data["keep_dtype"]),
            "config": tuple(data.get("config", ())),
            "hf_config": Path(data["hf_config"]) if data["hf_config"] else None,
            "lora": LoraOptions.from_json(data.get("lora", {})),
            "average": AverageOptions.from_json(data["average"]) if data.get("average") else None,
        }
        return JobOptions(**made)


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """Return the keys and the value of ``KEY=VALUE``; raises :class:`UsageError`.

    A key's parts are joined by dots, the value is JSON, or a text where it is none.

    >>> parse_override("text_config.rope_theta=1e6"), parse_override("model_type=qwen2")
    ((('text_config', 'rope_theta'), 1000000.0), (('model_type',), 'qwen2'))
    """
    key, equals, value = text.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise UsageError("--config takes KEY=VALUE", found=repr(text))
    try:
        return keys, json.loads(value)
    except ValueError:
        return keys, value


class JobKeywords(TypedDict, total=False):
    """The options that decide the output, as calls and commands take them.

    :class:`JobOptions` and :class:`LoraOptions` say what they mean; ``base``, ``lora_alpha``,
    ``lora_rank``, ``lora_rslora`` and ``allow_zero_delta`` are the latter's. Their defaults are there.
    """

    layout: Layout
    dtype: DTypeChoice | ShortDType
    keep_dtype: Sequence[str]
    max_shard_size: int | str
    strict: bool
    hf_config: StrPath | None
    model: str | None
    family: str | None
    lora: LoraMode
    base: StrPath | None
    lora_alpha: float | None
    lora_rank: int | None
    lora_rslora: bool
    allow_zero_delta: bool
    value_head: ValueHead
    masters: Masters
    config: Sequence[str]
    strip_prefix: str | None
    keep_buffers: bool
    dequantize: bool
    quantize: Quantization | None
    average: AverageOptions | None


class ConvertKeywords(JobKeywords, total=False):
    """All keywords of :func:`streamconv.convert` but ``cancel``: its docstring says what they mean."""

    max_mem: int | str | None
    overwrite: bool
    sync: bool
    direct: bool
    source_crc: bool
    checksum: str | None
    io_threads: int
    on_event: Callable[[Event], None]
    report: StrPath | None


_OF_LORA = {
    "lora": "mode",
    "base": "base",
    "lora_alpha": "alpha",
    "lora_rank": "rank",
    "lora_rslora": "rslora",
    "allow_zero_delta": "allow_zero",
}
_LISTS = ("keep_dtype", "config")


def differing_flags(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words which options differ between two jobs, each as :meth:`JobOptions.to_json` has it.

    >>> differing_flags({"dtype": "keep"}, {"dtype": "bfloat16"})
    ['--dtype keep, now --dtype bfloat16']
    """
    said = []
    for old, new in zip(_flags(before, now), _flags(now, before), strict=True):
        if old != new:
            said.append(f"{old}, now {new}")
    return said


def typed_flags(options: Mapping[str, Any]) -> list[str]:
    """Return the options that differ from their defaults, as they are typed.

    >>> typed_flags({"dtype": "bfloat16", "strict": True})
    ['--dtype bfloat16', '--strict']
    """
    defaults = _flags(JobOptions().to_json(), options)
    said = _flags(options, {})
    return [flag for flag, default in zip(said, defaults, strict=True) if flag != default]


def _flags(options: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    defaults = JobOptions().to_json()
    flags = []
    for key in sorted(defaults.keys() | options.keys() | others.keys()):
        value, default = options.get(key, defaults.get(key)), defaults.get(key)
        if key == "average":
            made = AverageOptions.from_json(value) if value else None
            flags.append(_flag("weights", made and made.said_weights))
        elif isinstance(value, dict):
            names = {v: k for k, v in _OF_LORA.items()}
            flags += [
                _flag(names.get(k, k), value.get(k, d)) for k, d in (default or value).items()
            ]
        else:
            name = "max_shard_size" if key == "max_shard_bytes" else key
            text = format_size(value) if key == "max_shard_bytes" else value
            flags.append(_flag(name, text))
    return flags


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return flag
    if value in (False, None, [], ()):
        return f"no {flag}"
    if isinstance(value, list):
        return " ".join(f"{flag} {v}" for v in value)
    return f"{flag} {value}"


def job_options(**given: Unpack[JobKeywords]) -> JobOptions:
    """Return the options that decide the output; raises :class:`UsageError`.

    Sizes may be texts (``"5GB"``), paths whatever names one.
    """
    job: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    said: dict[str, Any] = {**given}
    for name, value in said.items():
        if name in _LISTS:
            if isinstance(value, str):
                raise UsageError(f"{name} must be a list", found=repr(value))
            job[name] = tuple(value or ())
        elif name == "dtype":
            job[name] = SHORT_DTYPES.get(value, value)
        elif name == "max_shard_size":
            job["max_shard_bytes"] = parse_size(value)
        elif name in ("hf_config", "base"):
            path = None if value is None else local_path(value)
            (lora if name == "base" else job)[name] = path
        elif name in _OF_LORA:
            lora[_OF_LORA[name]] = value
        else:
            job[name] = value
    return JobOptions(**job, lora=LoraOptions(**lora))


@dataclass(frozen=True, slots=True)
class Phase:
    """A conversion begins to do what ``name`` says."""

    name: Literal["plan", "compare", "resume", "write", "publish"]

    def to_json(self) -> dict[str, Any]:
        """Return the event as a line of ``--json`` has it."""
        return {"event": "phase", "text": self.name}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is.

    ``done_bytes`` of ``total_bytes`` of the output are there, of which an earlier run wrote
    ``reused_bytes``; ``seconds`` is the time since the start; ``memory_bytes`` are resident in the
    whole process tree, which may have ``budget_bytes``; ``file`` is the output file being written.
    """

    done_bytes: int
    total_bytes: int
    reused_bytes: int
    seconds: float
    memory_bytes: int
    budget_bytes: int
    file: str

    def to_json(self) -> dict[str, Any]:
        """Return the event as a line of ``--json`` has it."""
        return {"event": "progress", **asdict(self)}


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a user should know; ``deleted`` names files that an upload deletes on the Hub."""

    text: str
    deleted: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the event as a line of ``--json`` has it."""
        notice: dict[str, Any] = {"event": "notice", "text": self.text}
        return notice | ({"deleted": list(self.deleted)} if self.deleted else {})


Event = Phase | Progress | Notice


NO_CONFIG = (
    "no config.json: names and shapes could not be checked, and the output has none "
    "(--hf-config DIR names a folder that has it)"
)
"""The notice of an output that no loader takes as it is."""


def is_routine(notice: str) -> bool:
    """Whether a notice stands in nearly every output: one that nobody need read."""
    return notice.endswith("for transformers 4")


class Cancel:
    """Ends a conversion that another thread runs: give it as ``cancel`` and call :meth:`set`.

    The conversion then raises :class:`streamconv.errors.CancelledError` within a window's time; the
    same call again goes on with what was finished.
    """

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        """Ask for the end; may be called by any thread, and more than once."""
        self._is_set = True

    def is_set(self) -> bool:
        """Whether the end was asked for."""
        return self._is_set

    def check(self) -> None:
        """Raise :class:`streamconv.errors.CancelledError` where the end was asked for."""
        if self._is_set:
            raise CancelledError(
                "cancelled", hint="the same call again goes on with what is finished"
            )


def ignore_event(_: Event) -> None:
    """Listen to nothing."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run: nothing here changes a byte of the output.

    ``max_mem_bytes``: the budget for the whole process tree; None means what the machine can give.
    ``sync``: make the output durable. ``direct``: write past the page cache (O_DIRECT) where the file
    system can. ``source_crc``: check every source record's CRC-32.
    ``sha256``: add sha256 digests to the manifest. ``io_threads``: readers at work at once. ``cancel``
    ends it from another thread. ``cache``: remember what transformers says of models.
    """

    max_mem_bytes: int | None = None
    overwrite: bool = False
    sync: bool = True
    direct: bool = False
    source_crc: bool = True
    sha256: bool = False
    io_threads: int = 1
    cache: bool = True
    on_event: Callable[[Event], None] = ignore_event
    cancel: Cancel | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What a conversion did. ``status`` is ``done`` or ``nothing-to-do``; sizes are in bytes."""

    status: Literal["done", "nothing-to-do"]
    output: Path
    seconds: float = 0.0
    read_bytes: int = 0
    write_bytes: int = 0
    reused_bytes: int = 0
    peak_bytes: int = 0
    budget_bytes: int = 0
    files: int = 0
    tensors: int = 0
    unverifiable_bytes: int = 0
    notices: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        rows = [
            ("output", str(self.output)),
            ("status", self.status),
            ("tensors", f"{self.tensors:,} in {self.files} files"),
            ("written", format_size(self.write_bytes)),
            ("time", f"{self.seconds:.1f} s"),
            ("peak memory", f"{format_size(self.peak_bytes)} of {format_size(self.budget_bytes)}"),
            *(("notice", notice) for notice in self.notices),
        ]
        from html import escape  # large, and only for notebooks

        cells = "".join(f"<tr><th>{a}</th><td>{escape(b)}</td></tr>" for a, b in rows)
        return f"<table>{cells}</table>"
