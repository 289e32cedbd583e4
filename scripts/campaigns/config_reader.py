"""What one release of transformers makes of configs; run by version_4.py under that release.

``python config_reader.py TASK IN OUT``: tasks and results are lines of JSON. It imports nothing but
transformers, for the releases differ in what else they go with.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "llama3",
        "factor": 3.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
# Settings of generate(), which version 5 keeps in generation_config.json alone.
OF_GENERATION = frozenset(
    (
        "output_scores",
        "top_p",
        "top_k",
        "diversity_penalty",
        "early_stopping",
        "typical_p",
        "num_beam_groups",
        "temperature",
        "remove_invalid_values",
        "num_beams",
        "length_penalty",
        "min_length",
        "max_length",
        "no_repeat_ngram_size",
        "repetition_penalty",
        "do_sample",
        "num_return_sequences",
        "encoder_no_repeat_ngram_size",
        "return_dict",
        "return_dict_in_generate",
        "output_hidden_states",
        "output_attentions",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
    )
)
# What does not change the model that is read.
NOT_COMPARED = OF_GENERATION | {
    *("transformers_version", "dtype", "torch_dtype", "_name_or_path", "initializer_range"),
    "use_falcon_mambapy",  # which code computes it
}


def config_of(said: dict[str, Any]) -> Any:
    """Return the library's config object of what a config.json says."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[said["model_type"]]
    # Version 5 does this when it reads a file.
    decoded = getattr(config_class, "_decode_special_floats", lambda read: read)
    return config_class.from_dict(decoded(json.loads(json.dumps(said))))


def saved(config: Any) -> dict[str, Any]:
    """Return what save_pretrained writes."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return found


def read(said: dict[str, Any]) -> dict[str, Any]:
    """Return every setting that the library reads."""
    found: dict[str, Any] = json.loads(config_of(said).to_json_string(use_diff=False))
    return found


def cases(lines: list[Any]) -> Iterator[dict[str, Any]]:
    """Yield a config of each model type, and one for each of its keys with another value."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    ((count, seed),) = lines
    every = sorted(CONFIG_MAPPING_NAMES)
    for model_type in random.Random(seed).sample(every, min(count, len(every))):
        with contextlib.suppress(Exception):
            plain = read({"model_type": model_type})
            yield {"name": model_type, "said": saved(config_of({"model_type": model_type}))}
            for path, value in _changes(plain, _other_names(config_of({"model_type": model_type}))):
                said = json.loads(json.dumps(plain))
                part = said
                for key in path[:-1]:
                    part = part[key]
                part[path[-1]] = value
                with contextlib.suppress(Exception):
                    kept = saved(config_of(said))
                    yield {"name": f"{model_type} {'.'.join(path)}={_short(value)}", "said": kept}


def _other_names(config: Any) -> set[str]:
    """Return names that stand for another key of the config or of one of its parts."""
    parts = [c for c in vars(config).values() if hasattr(c, "attribute_map")]
    return set(config.attribute_map).union(*map(_other_names, parts))


def _short(value: Any) -> str:
    return str(value.get("rope_type", value) if isinstance(value, dict) else value)


def _changes(
    part: dict[str, Any], other_names: set[str], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    nested = path or any(isinstance(v, dict) and k.endswith("config") for k, v in part.items())
    for key, value in part.items():
        here = (*path, key)
        if key in NOT_COMPARED or key in other_names:
            continue
        # One that contradicts another: version 5 goes by the whole config's, or by encoder_layers.
        if (key == "tie_word_embeddings" and nested) or (
            key == "num_hidden_layers" and "encoder_layers" in part
        ):
            continue
        if isinstance(value, dict) and (key.endswith("config") or "model_type" in value):
            yield from _changes(value, other_names, here)
        elif key == "rope_scaling":
            for scaling in SCALINGS:
                yield here, scaling
            if isinstance(value, dict) and "mrope_section" in value:
                yield here, MROPE
        elif isinstance(value, bool):
            yield here, not value
        elif isinstance(value, int):
            yield here, value + 1
        elif isinstance(value, float):
            yield here, value * 0.5 + 0.125


def resave(lines: list[Any]) -> Iterator[Any]:
    """Yield what this release saves of each config that another one saved."""
    for case in lines:
        with contextlib.suppress(Exception):
            config = config_of(case["said"])
            changed = case["name"].partition(" ")[2].partition("=")[0].split(".")[-1]
            if changed in config.attribute_map and config.attribute_map[changed] in case["said"]:
                continue  # to this release two names of one setting, which now contradict each other
            tied = getattr(config, "tie_word_embeddings", None)
            yield {**case, "again": saved(config), "tied": tied}


def compare(lines: list[Any]) -> Iterator[Any]:
    """Yield each case with the settings that are read otherwise from its two configs."""
    for case in lines:
        differing = ["cannot be read"]
        with contextlib.suppress(Exception):
            differing = sorted(_differing(read(case["one"]), read(case["two"]), ""))
        yield {"name": case["name"], "differing": differing}


def _differing(one: Any, two: Any, where: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        for key in one:
            if key in NOT_COMPARED:
                continue
            if key not in two:
                yield f"{where}{key}"
            else:
                yield from _differing(one[key], two[key], f"{where}{key}.")
    elif one != two:
        yield f"{where.rstrip('.')}: {one} became {two}"


TASKS: dict[str, Callable[[list[Any]], Iterator[Any]]] = {
    "cases": cases,
    "resave": resave,
    "compare": compare,
}

if __name__ == "__main__":
    task, given, made = sys.argv[1:]
    lines = [json.loads(line) for line in Path(given).read_text().splitlines()]
    with Path(made).open("w") as out:
        out.writelines(json.dumps(result) + "\n" for result in TASKS[task](lines))
