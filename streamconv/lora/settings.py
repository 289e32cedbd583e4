"""The settings of a LoRA adapter: read from what lies beside the rank files, written for PEFT.

``lora_train_meta.json`` (newer verl: ``r``, ``lora_alpha``, ``task_type``) and
``lora_adapter/adapter_config.json`` (verl writes PEFT's own settings there), ``run_config.yaml``
(Megatron-Bridge), ``args.json`` (ms-swift), ``hyperparameters.yaml`` (litgpt) and
``torchtune_config.yaml``. All are data of strangers: only the keys below are
taken, for a PEFT config can also name code to import.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from streamconv.errors import BadInputError
from streamconv.files.inputs import readable
from streamconv.files.jsonfile import object_or_empty
from streamconv.formats.megatron.run_yaml import settings_below
from streamconv.ir.planned import TextFile
from streamconv.options import LoraOptions

PREFIX = "base_model.model."  # of every name in PEFT's model
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# Beside an adapter these would say that the folder is a model.
OF_A_MODEL = ("config.json", "generation_config.json")
FILES = ("lora_train_meta.json", "lora_adapter/adapter_config.json")
LITGPT = "hyperparameters.yaml"
_TORCHTUNE = "torchtune_config.yaml"
# Where else trainers say how an adapter was trained: seen from the weights, whose folder may be one of
# several in the trainer's.
_PLACES = (
    *FILES,
    "model/huggingface/adapter/adapter_config.json",  # verl with Megatron
    "huggingface/adapter/adapter_config.json",
    "../huggingface/adapter/adapter_config.json",
    "../adapter_config.json",
    "run_config.yaml",  # Megatron-Bridge
    "../run_config.yaml",
    "../../../config.yaml",  # NeMo-RL, of step_N/policy/weights/iter_0000000
    "args.json",  # ms-swift
    "../args.json",
    LITGPT,
    _TORCHTUNE,
    f"../{_TORCHTUNE}",
)
_BELOW = {"run_config.yaml": ("peft",), "config.yaml": ("policy", "megatron_cfg", "peft")}
# What recipes of others call rank, and below which keys.
_OF_RECIPES = {LITGPT: ((), "lora_r"), _TORCHTUNE: (("model",), "lora_rank")}
_OF_ADAPTERS = (CONFIG, FILES[0])
_BY_USER = "the command line"
_MAX_NBYTES = 1 << 20
_NAME = re.compile(r"\^?(?:[\w.-]|\\\.)+\$?", re.ASCII)
_T = TypeVar("_T")
# Those of PEFT's initializations that leave the base weights as they are; the others (PiSSA, OLoRA, …)
# take the adapter's first values out of them.
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
_KEPT_KEYS = (
    "base_model_name_or_path",
    "bias",
    "init_lora_weights",
    "lora_dropout",
    "task_type",
)

# What these say has no part in what the adapter computes once it is loaded.
IDLE = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    )
)
# What these say shows in the adapter's tensors.
_SHOWN = frozenset(
    (
        "bias",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "lora_bias",
        "modules_to_save",
        "target_modules",
    )
)


@dataclass(frozen=True, slots=True)
class Settings:
    """How an adapter was trained, as far as is known; ``alpha`` and ``rank`` may be unknown.

    The patterns hold values for some modules, by the end of their name or, after ``^``, the whole of
    it. ``kept`` goes into the written config as it stands. ``origin`` says where ``alpha`` is from.
    """

    alpha: float | None = None
    rank: int | None = None
    rslora: bool = False
    dora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""

    def rank_of(self, module: str) -> int | None:
        """Return the rank that the settings give a module, None where they do not say."""
        return _by_pattern({**self.rank_pattern}, module, self.rank)

    def check_unchanged_base(self) -> None:
        """Raise :class:`BadInputError` where training began with other weights than the base's."""
        how = self.kept.get("init_lora_weights")
        if how not in _KEEPS_BASE:
            raise BadInputError(
                "this adapter was trained on altered base weights: added to the base model's own, it "
                "would give another model",
                found=f"init_lora_weights {how!r} in {CONFIG}",
                hint="convert a checkpoint that holds the base weights, or merge it with PEFT",
            )

    def check_biases(self) -> None:
        """Raise :class:`BadInputError` where a folder of the adapter would lack trained biases."""
        bias = self.kept.get("bias", "none")
        if bias != "none":
            raise BadInputError(
                "the model's biases were trained too, and an adapter's folder would lack them",
                found=f"bias {bias!r} in {CONFIG}",
                hint="merge it: --lora merge (and --base DIR where there are no base weights)",
            )

    def scale(self, module: str, rank: int) -> float:
        """Return what the product of a module's factors is multiplied by; ``alpha`` must be known."""
        alpha = _by_pattern({**self.alpha_pattern}, module, self.alpha)
        if alpha is None:
            raise BadInputError(
                "the adapter's lora_alpha is not known, and a guess would give another model",
                expected=f"it in {', '.join(FILES)}, run_config.yaml (Megatron-Bridge), config.yaml "
                f"(NeMo-RL), args.json (ms-swift), {LITGPT} (litgpt) or {_TORCHTUNE} near the weights",
                hint="say what it was trained with: --lora-alpha N",
            )
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _by_pattern(patterns: Mapping[str, _T], module: str, default: _T) -> _T:
    for pattern, value in patterns.items():
        name = pattern.removesuffix("$").replace("\\.", ".")
        if module == name.removeprefix("^") or module.endswith(f".{name}"):
            return value
    return default


def hashes(root: Path) -> list[tuple[str, str]]:
    """Return (name, xxh3_128) of the settings files that are there: they take part in the output."""
    return [
        (name, xxhash.xxh3_128_hexdigest(_read(root / name)))
        for name in _beside(root)
        # What is nobody's but an adapter's is not parsed: a checkpoint without one does not need it.
        if name.endswith(_OF_ADAPTERS) or _told_in(root / name) is not None
    ]


def _beside(root: Path) -> list[str]:
    """Return the names of the files that may say how the adapter in ``root`` was trained."""
    # Several adapters of PEFT lie in each other's folders: each has its own.
    places = (CONFIG,) if (root / CONFIG).is_file() else _PLACES
    return [name for name in places if (root / name).is_file()]


def _told_in(path: Path) -> Mapping[str, Any] | None:
    """Return the settings of an adapter in a file, under PEFT's names; None where it has none."""
    if path.name in _OF_RECIPES:
        return _of_recipe(path, *_OF_RECIPES[path.name])
    if path.suffix == ".yaml":
        return _of_bridge(path, _BELOW[path.name])
    return _of_swift(path) if path.name == "args.json" else read_object(path)


def _of_bridge(path: Path, keys: tuple[str, ...]) -> Mapping[str, Any] | None:
    """Return PEFT's names for Megatron-Bridge's settings below ``keys``; None without an adapter."""
    told = settings_below(path, keys, {"dim", "alpha", "normalize_moe_lora", "enabled"})
    if not _is_alpha(told.get("alpha")) or told.get("enabled") is False:
        return None
    # With it the experts have a rank of their own, by which their alpha is divided.
    rank = told.get("dim") if _is_rank(told.get("dim")) else None
    return {"lora_alpha": told["alpha"], "r": None if told.get("normalize_moe_lora") else rank}


def _of_recipe(path: Path, keys: tuple[str, ...], rank: str) -> Mapping[str, Any] | None:
    """Return PEFT's names for what a recipe's settings say; None without an adapter."""
    told = settings_below(path, keys, {"lora_alpha", rank})
    found = {"lora_alpha": told.get("lora_alpha"), "r": told.get(rank)}
    return found if all(_CHECKS[k](v) for k, v in found.items()) else None


def _of_swift(path: Path) -> Mapping[str, Any] | None:
    """Return PEFT's names for what ms-swift's args.json says; None where it trained no adapter."""
    told = object_or_empty(path, most_bytes=_MAX_NBYTES)
    kinds = [told.get("tuner_type"), told.get("train_type")]
    if not any(isinstance(k, str) and k.startswith("lora") for k in kinds):
        return None
    found = {
        "lora_alpha": told.get("lora_alpha"),
        "r": told.get("lora_rank"),
        "use_rslora": told.get("use_rslora"),
    }
    return {k: v for k, v in found.items() if _CHECKS[k](v)}


def _read(path: Path) -> bytes:
    with readable(path), path.open("rb") as stream:
        data = stream.read(_MAX_NBYTES + 1)
    if len(data) > _MAX_NBYTES:
        raise BadInputError("the adapter's settings are too large", where=str(path))
    return data


def read_settings(root: Path, options: LoraOptions) -> Settings:
    """Return what the files beside the rank files and the user say of the adapter.

    The user goes before the files. Raises :class:`BadInputError` for values that no adapter has, and
    where two files disagree.
    """
    given = {
        "lora_alpha": options.alpha,
        "r": options.rank,
        "use_rslora": options.rslora or None,
    }
    found: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    origins = dict.fromkeys(found, _BY_USER)
    kept: dict[str, Any] = {}
    for name in _beside(root):
        data = _told_in(root / name)
        if data is None:
            continue
        kind = data.get("peft_type")
        if kind not in (None, "LORA"):
            raise BadInputError(
                "this adapter is of another kind than LoRA",
                where=str(root / name),
                found=f"peft_type {kind!r}"[:80],
                expected="LORA",
                hint="merge it with PEFT",
            )
        if Path(name).name == CONFIG:
            _refuse_unknown(data, root / name)
        for key, value in _checked(data, root / name):
            if key not in found:
                found[key], origins[key] = value, name
            elif found[key] != value and key in ("lora_alpha", "r") and origins[key] != _BY_USER:
                raise BadInputError(
                    f"two files disagree about the adapter's {key}",
                    where=str(root),
                    found=f"{found[key]} in {origins[key]}, {value} in {name}",
                    hint="say which is right (--lora-alpha, --lora-rank)",
                )
        kept |= {k: data[k] for k in _KEPT_KEYS if data.get(k) is not None}
    return Settings(
        alpha=found.get("lora_alpha"),
        rank=found.get("r"),
        rslora=found.get("use_rslora", False),
        dora=found.get("use_dora", False),
        fan_in_fan_out=found.get("fan_in_fan_out", False),
        alpha_pattern=found.get("alpha_pattern", {}),
        rank_pattern=found.get("rank_pattern", {}),
        kept=kept,
        origin=origins.get("lora_alpha", ""),
    )


def _refuse_unknown(data: Mapping[str, Any], path: Path) -> None:
    """Raise :class:`BadInputError` for settings that may say what no tensor shows."""
    known = _CHECKS.keys() | _SHOWN | IDLE
    others = sorted(k for k, v in data.items() if v and k not in known)
    if others:
        raise BadInputError(
            "the adapter has settings that are not known",
            where=str(path),
            found=", ".join(f"{k} {json.dumps(data[k])}"[:60] for k in others[:3]),
            hint="merge it with PEFT",
        )


def is_adapter(folder: Path) -> bool:
    """Whether this is the folder of an adapter alone."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path, given: Path | None) -> Path | None:
    """Return the base model's folder: the one given, or what the config names where it is here."""
    if given is not None or not (folder / CONFIG).is_file():
        return given
    named = read_object(folder / CONFIG).get("base_model_name_or_path")
    local = isinstance(named, str) and named and (Path(named) / "config.json").is_file()
    return Path(str(named)) if local else None


def checked_settings(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return those of an adapter's own settings that say what it computes.

    Raises :class:`BadInputError` for values that no adapter has, and where the base's were altered.
    """
    Settings(kept=data).check_unchanged_base()
    return dict(_checked(data, path))


def read_object(path: Path) -> dict[str, Any]:
    """Return the settings in a file as they stand."""
    try:
        data = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise BadInputError(
            "the adapter's settings are not valid JSON", where=str(path), found=str(error)[:200]
        ) from error
    if not isinstance(data, dict):
        raise BadInputError("the adapter's settings are not a JSON object", where=str(path))
    return data


def _checked(data: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the settings that matter; an alpha of 0 is what verl's merger writes for "not known"."""
    for key, check in _CHECKS.items():
        value = data.get(key)
        if value is None or (key == "lora_alpha" and value == 0):
            continue
        if not check(value):
            raise BadInputError(
                f"the adapter's {key} makes no sense",
                where=str(path),
                expected="names of modules or their ends (regular expressions are not evaluated)"
                if key.endswith("_pattern")
                else None,
                found=repr(value)[:80],
            )
        yield key, value


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _is_pattern(value: object, of: Callable[[object], bool]) -> bool:
    # PEFT allows any regular expression; a stranger's may run for ever, and names are what is used.
    return isinstance(value, dict) and all(
        _NAME.fullmatch(name) and of(v) for name, v in value.items()
    )


_CHECKS: dict[str, Callable[[object], bool]] = {
    "lora_alpha": _is_alpha,
    "r": _is_rank,
    "use_rslora": _is_flag,
    "use_dora": _is_flag,
    "fan_in_fan_out": _is_flag,
    "alpha_pattern": lambda v: _is_pattern(v, _is_alpha),
    "rank_pattern": lambda v: _is_pattern(v, _is_rank),
}


def config_file(
    name: str,
    settings: Settings,
    ranks: Mapping[str, int],
    modules: Collection[str],
    saved: Collection[str],
) -> TextFile:
    """Return ``adapter_config.json`` for PEFT, as the file ``name`` of the output.

    ``ranks`` are the adapted modules with the rank of each, ``modules`` all modules of the model as far
    as they are known, those that only hold others included, ``saved`` those that were trained whole.
    """
    rank = Counter(ranks.values()).most_common(1)[0][0]
    settings.scale(next(iter(ranks)), rank)  # refuses an unknown alpha
    config: dict[str, Any] = {
        "alpha_pattern": dict(settings.alpha_pattern),
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": settings.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": _saved(saved, modules) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {f"^{m}$".replace(".", r"\."): r for m, r in ranks.items() if r != rank},
        "target_modules": _targets(ranks, modules),
        "task_type": None,
        "use_dora": settings.dora,
        "use_rslora": settings.rslora,
        **settings.kept,
    }
    if settings.lora_bias:  # the key is unknown to PEFT before 0.14, hence only where it is needed
        config["lora_bias"] = True
    return TextFile(name, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _targets(adapted: Collection[str], modules: Collection[str]) -> list[str] | str:
    """Return what means just the adapted modules to PEFT: ends of names, whole names, or a pattern."""
    others = {f".{m}" for m in modules if m not in adapted}
    for names in ({m.rpartition(".")[2] for m in adapted}, set(adapted)):
        if not any(m.endswith(tuple(f".{n}" for n in names)) for m in others):
            return sorted(names)
    return "|".join(re.escape(m) for m in sorted(adapted))


def _saved(saved: Collection[str], modules: Collection[str]) -> list[str]:
    """Return what means just the modules that were trained whole to PEFT.

    There an end of a name need not begin at a dot: "norm" means "input_layernorm", too.
    """
    others = {PREFIX + m for m in modules if m not in saved}
    for names in ({m.rpartition(".")[2] for m in saved}, set(saved)):
        if not any(m.endswith(tuple(names)) for m in others):
            return sorted(names)
    return sorted(PREFIX + m for m in saved)
