"""Build a transformers model on the meta device from a config.json that nobody vouches for.

The config is JSON data. Its model_type is looked up in the library's own registry, its
architecture among the library's own auto-model tables; nothing of the checkpoint's folder is
imported and nothing is fetched. transformers before 5.3 ran code that a config named (attention
kernels, auto_map): such keys are removed at every depth anyway.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from streamconv.errors import BadInputError

MAX_LAYERS = 2_000
MAX_MODULES = 300_000

_DROPPED = frozenset(
    {
        "quantization_config",  # else a quantizer's modules, and its library, are wanted
        "compression_config",
        "attn_implementation",  # may name code on the Hub
        "experts_implementation",
        "architectures",  # decided by resolve(), and refused by the library where it is not a list
        "auto_map",
        "use_kernels",
        "kernel_config",
        "use_pretrained_backbone",  # would fetch weights
        "backbone_kwargs",
        "dtype",
        "torch_dtype",
    }
)
# What the library counts up to in plain Python; the first pattern that fits a key decides.
_LIMITS = (
    (re.compile(r"(num_|n_)?(\w+_)?(layers?|blocks|depths?|stages)"), MAX_LAYERS),
    (re.compile(r"num_labels|(num_|n_)(\w+_)?experts"), 1_000_000),
    (re.compile(r"(num|n)_\w+"), 10_000_000),
)


def clean(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a parsed config.json without the keys that must not take part.

    Raises :class:`BadInputError` for counts that no model has: they would not fail, but fill the
    memory with modules.
    """
    return {k: _clean(k, v, 0) for k, v in config.items() if _taken(k)}


def _taken(key: object) -> bool:
    # Underscored keys are the library's private state; none of them describes a model.
    return isinstance(key, str) and key not in _DROPPED and not key.startswith("_")


def _clean(key: str, value: Any, depth: int) -> Any:
    if depth > 32:
        raise BadInputError("config.json is nested too deeply", where=key)
    value = _as_number(value)
    if isinstance(value, dict):
        return {k: _clean(k, v, depth + 1) for k, v in value.items() if _taken(k)}
    if isinstance(value, list):
        return [_clean(key, v, depth + 1) for v in value]
    if isinstance(value, int | float):
        _check_count(key, value)
    return value


def _as_number(value: Any) -> Any:
    """Return the number that transformers 5 writes as an object, JSON having none such."""
    tag = value.get("__float__") if isinstance(value, dict) and len(value) == 1 else None
    return float(tag) if tag in ("Infinity", "-Infinity", "NaN") else value


def _check_count(key: str, value: float) -> None:
    limit = next((limit for pattern, limit in _LIMITS if pattern.fullmatch(key)), None)
    if limit is not None and value > limit:
        raise BadInputError(
            f"config.json: {key} is beyond any model",
            expected=f"at most {limit}",
            found=str(value),
        )


def resolve(
    config: Mapping[str, Any], names: Collection[str]
) -> tuple[str, tuple[str, ...]] | None:
    """Return the class name that ``config`` means, and the library's classes for its model type.

    The class name is empty where the config names none that the library has; None where the library
    does not know the model type, or where custom code would define the model.

    verl keeps the config of the base model when it trains a critic, so a classification head among
    ``names`` overrides ``architectures``.
    """
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        return None
    if _reaches_out(config):
        return None
    tables: dict[str, dict[str, Any]] = {
        table: value
        for table, value in vars(modeling_auto).items()
        if table.startswith("MODEL") and table.endswith("_NAMES") and isinstance(value, dict)
    }
    known: dict[str, None] = {}
    for table in _by_preference(tables):
        found = tables[table].get(model_type)
        for name in found if isinstance(found, tuple | list) else (found,):
            if isinstance(name, str):
                known[name] = None
    architectures = config.get("architectures")
    given = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(given, str):
        given = next(iter(known), "")
    if not known and given in _of_package(model_type, tables.values()):
        known[given] = None  # a text model alone, listed as that of the whole
    if given not in known and config.get("auto_map"):
        return None
    if known and given not in known:
        _refuse_class_of_others(given, model_type, known, tables.values())
    head = _score_head(names)
    if head and not given.endswith("Classification"):
        given = tables[f"MODEL_FOR_{head}_CLASSIFICATION_MAPPING_NAMES"].get(model_type, given)
    return (given if given in known else ""), tuple(known)


def _refuse_class_of_others(
    given: str, model_type: str, known: Iterable[str], tables: Collection[Mapping[str, Any]]
) -> None:
    """Raise :class:`BadInputError` for a class of another type: loaders go by either."""
    elsewhere = {
        name
        for table in tables
        for names in table.values()
        for name in ((names,) if isinstance(names, str) else names)
    }
    if given in elsewhere.difference(_of_package(model_type, tables)):
        raise BadInputError(
            "config.json names a class and a model type that do not go together",
            where="config.json",
            expected=f"a class of {model_type}, such as {next(iter(known))}",
            found=f"{given}, a class of another model type",
            hint="name the config of the model that was trained (--hf-config DIR), or change this one: "
            "--config 'architectures=[\"NAME\"]' or --config model_type=NAME",
        )


def _of_package(model_type: str, tables: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the classes of all types that are in the same package as ``model_type``."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    package = model_type_to_module_name(model_type)
    for table in tables:
        for other, names in table.items():
            if model_type_to_module_name(other) == package:
                yield from (names,) if isinstance(names, str) else names


def _reaches_out(value: object) -> bool:
    """Whether a config names a backbone by a path or a repository, which the library would open."""
    if isinstance(value, list):
        return any(map(_reaches_out, value))
    if not isinstance(value, Mapping):
        return False
    architecture = value.get("architecture")
    return (
        isinstance(value.get("backbone"), str)
        or (isinstance(architecture, str) and ":" in architecture)
        or any(map(_reaches_out, value.values()))
    )


def _by_preference(tables: Collection[str]) -> list[str]:
    """Order the tables: what a config without architectures most likely means comes first."""
    first = [
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    ]
    return [t for t in first if t in tables] + [t for t in tables if t not in first]


def _score_head(names: Collection[str]) -> str:
    """Return what kind of classification head is among ``names``: TOKEN, SEQUENCE or none."""
    last = {tuple(name.split(".")[-2:]) for name in names}
    if ("score", "weight") not in last or ("lm_head", "weight") in last:
        return ""
    # verl's critics are token classifiers; transformers gives a bias to those only.
    return "TOKEN" if ("score", "bias") in last else "SEQUENCE"


@contextmanager
def refusing(architecture: str) -> Iterator[None]:
    """Turn whatever transformers raises over a config into an error with the library's own words."""
    try:
        with _quiet():
            yield
    except BadInputError:
        raise
    except Exception as error:
        raise BadInputError(
            f"transformers cannot build {architecture} from config.json",
            where="config.json",
            found=f"{type(error).__name__}: {_first_lines(str(error))}",
            hint=(
                "install the library that is named"
                if isinstance(error, ImportError)
                else "compare config.json with the one of the model that was trained"
            ),
        ) from error


def build(config: Mapping[str, Any], architecture: str) -> Any:
    """Return the model of the library's class ``architecture``, on meta and not initialized."""
    with _bounded_modules():
        return _construct(config, architecture)


def class_and_settings(config: Mapping[str, Any], architecture: str) -> tuple[Any, Any]:
    """Return the library's class ``architecture``, and its config object made of ``config``."""
    settings = _settings(config)
    model_class = _member(_package(config), architecture)
    if not isinstance(settings, model_class.config_class):
        # A text-only class of a multimodal model type takes the nested text config.
        nested = [c for c in vars(settings).values() if isinstance(c, model_class.config_class)]
        settings = nested[0] if len(nested) == 1 else settings
    return model_class, settings


def reads_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the library reads all that ``one`` says from the config ``other``, too.

    False where it does not know the model type, or refuses one of them.
    """
    try:
        with refusing(str(one.get("model_type"))):
            return _holds(_settings(other).to_dict(), _settings(one).to_dict())
    except BadInputError:
        return False


def _holds(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict) and isinstance(found, dict):
        # What begins with an underscore is what a class keeps for itself, not a setting of the model.
        settings = {k: v for k, v in wanted.items() if not str(k).startswith("_")}
        return all(k in found and _holds(found[k], v) for k, v in settings.items())
    return bool(found == wanted)


def _settings(config: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config_class = _member(_package(config), CONFIG_MAPPING_NAMES[str(config["model_type"])])
    return config_class(**{k: v for k, v in clean(config).items() if k != "model_type"})


def _package(config: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    module = model_type_to_module_name(str(config["model_type"]))
    return importlib.import_module(f"transformers.models.{module}")


def _construct(config: Mapping[str, Any], architecture: str) -> Any:
    from transformers.initialization import no_init_weights

    model_class, settings = class_and_settings(config, architecture)
    with torch.device("meta"), no_init_weights(), torch.no_grad():
        return model_class(settings)


def _member(package: Any, name: str) -> Any:
    found = getattr(package, name, None)
    return found if found is not None else getattr(importlib.import_module("transformers"), name)


@contextmanager
def _bounded_modules() -> Iterator[None]:
    """Refuse a model of more modules and parameters than any has, while it is being built."""
    from torch.nn.modules import module as registry

    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise BadInputError(
                "config.json describes a model of more parts than any has",
                expected=f"at most {MAX_MODULES} modules and parameters",
            )

    handles = [
        registry.register_module_module_registration_hook(counted),
        registry.register_module_parameter_registration_hook(counted),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's log and Python's warnings quiet: what matters comes as an error."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _first_lines(text: str, limit: int = 400) -> str:
    short = " ".join(text.split())
    return short if len(short) <= limit else short[:limit] + "…"
