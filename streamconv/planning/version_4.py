"""Files that transformers 5 saved, so that transformers 4 (4.57, its last) reads the same from them.

Version 5 renamed settings, and version 4 takes its defaults for what it does not find, in silence. Both
read a file that says it under both names. What is added must not change what version 5 reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]
Alike = Callable[[Mapping[str, Any], Mapping[str, Any]], bool]

TOKENIZER_CONFIG = "tokenizer_config.json"

# The ways of scaling that version 4 knows.
_SCALINGS = frozenset({"linear", "dynamic", "yarn", "longrope", "llama3"})
# Types that do not start without any, and what they make of one that says nothing is the default.
_NEED_A_SCALING = ("mllama", "qwen3_vl", "qwen3_omni")
# Settings of the rotary embedding that stand beside rope_scaling and not in it.
_BESIDE = ("rope_theta", "partial_rotary_factor")
# What version 5 calls layers of every model; these know their own names alone in version 4.
_LAYER_TYPES = {"linear_attention": "mamba", "full_attention": "attention"}
_OLD_LAYER_TYPES = frozenset({"granitemoehybrid", "zamba", "zamba2"})
# Their names where a model has its own, by the beginning of its type.
_NAMES = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "sam2_video": {"rope_theta": "memory_attention_rope_theta"},
    "edgetam_video": {"rope_theta": "memory_attention_rope_theta"},
}

# Of how many layers one has no sliding window by default, where older releases take a number for it.
_PATTERNS = {"gemma3_text": 6, "cohere2": 4}
# Other settings that have another name in version 5, by the type of the model.
_RENAMED = {
    "videomae": {"qv_bias": "qkv_bias"},
    "xlm": {f"{token}_token_id": f"{token}_index" for token in ("bos", "eos", "pad")},
}


@dataclass(frozen=True, slots=True)
class Unlike:
    """What 4.57 does with models of some types, whatever their config.json says."""

    model_types: tuple[str, ...]
    does: str
    classes: str = ""
    """A pattern that the names of the classes in question have in them."""
    tied: bool | None = None
    """Whether it is so of models with tied embeddings alone, or of those without."""


_TIES_ANYWAY = (
    *("blenderbot", "blenderbot-small", "florence2", "led", "marian", "mvp"),
    *("pegasus", "pegasus_x", "prophetnet", "t5gemma"),
)
# What scripts/campaigns/older_release.py found, which also finds what is missing here or too much.
UNLIKE: tuple[Unlike, ...] = (
    Unlike(("cpmant", "dbrx"), "does not load this model"),
    Unlike(("moshi",), "does not load this model with tied embeddings", "CausalLM", tied=True),
    Unlike(("reformer",), "does not load this model with tied embeddings", "LMHead", tied=True),
    Unlike(("fsmt",), "cannot run this model"),
    Unlike(("shieldgemma2", "vit_msn"), "looks for the weights of this model under other names"),
    Unlike(("doge",), "computes other logits of this model"),
    Unlike(("bigbird_pegasus",), "computes other logits of this model", "CausalLM", tied=True),
    Unlike(
        ("apertus",),
        "computes the activations of this model less exactly (logits were off by 0.0005)",
        "CausalLM",
    ),
    Unlike(
        ("mt5", "pop2piano"),
        "scales the logits of this model, for its embeddings are tied",
        "ConditionalGeneration",
        tied=True,
    ),
    Unlike(
        ("bert", "big_bird", "ernie", "megatron-bert", "roc_bert", "roformer"),
        "has one bias for the two that the head of this model has when its embeddings are not tied",
        "LM|PreTraining",
        tied=False,
    ),
    Unlike(
        _TIES_ANYWAY,
        "ties the embeddings of this model, which are not tied",
        "ConditionalGeneration|MTModel|ProphetNetForCausalLM",
        tied=False,
    ),
    Unlike(
        ("evolla", "longcat_flash", "udop"), "warns of tensors of this model that it does not use"
    ),
)


def unlike(config: Mapping[str, Any], architecture: str | None, tied: bool | None) -> list[str]:
    """Return a notice where version 4 is known not to make the same of a model as version 5.

    ``architecture`` is the model's class where it is certain; else it is what the config says. ``tied``
    is what version 4 takes the embeddings for.
    """
    name = architecture or ", ".join(map(str, config.get("architectures") or ()))
    return [
        f"transformers 4 {known.does} ({name}, tried with 4.57); use transformers 5"
        for known in UNLIKE
        if config.get("model_type") in known.model_types
        and re.search(known.classes, name)
        and known.tied in (None, tied)
    ]


def say_again(config: Config, alike: Alike) -> list[str]:
    """Say as version 4 reads it what version 5 says otherwise, at every level; tell what became of it.

    ``alike`` tells whether version 5 reads the same from two configs: the rest stays as it is.
    """
    notices = []
    for where, part in _parts("", config):
        for tell, change in _CHANGES:
            changed = change(part)
            if changed == part:
                continue
            keys = [where + k for k in {**changed, **part} if changed.get(k) != part.get(k)]
            before, kept = json.loads(json.dumps(config)), dict(part)
            _replace(part, changed)
            if alike(before, config):
                notices.append(f"config.json: {', '.join(keys)} {tell} for transformers 4")
            else:
                _replace(part, kept)
    return notices


def _replace(part: Config, content: Config) -> None:
    part.clear()
    part.update(content)


def say_ties(config: Config, tied: bool) -> list[str]:
    """Say in each text_config whether the model is ``tied``, as its own config does; tell where.

    Version 5 goes by the config of the whole model, 4 by that of its text part, which version 5 saves
    with a default of its own. A config that 4 saved and that does not say it has the right default.
    """
    notices = []
    of_5 = str(config.get("transformers_version")).startswith("5.")
    for where, outer in (("", config), ("thinker_config.", config.get("thinker_config"))):
        part = outer.get("text_config") if isinstance(outer, dict) else None
        if not isinstance(part, dict):
            continue
        said = part.get("tie_word_embeddings")
        if said is not tied and (of_5 or said is not None):
            part["tie_word_embeddings"] = tied
            notices.append(
                f"config.json: {where}text_config.tie_word_embeddings became {str(tied).lower()}, "
                "for transformers 4"
            )
    return notices


def _parts(where: str, part: Config) -> Iterator[tuple[str, Config]]:
    yield where, part
    for key, value in part.items():
        # The encoder and decoder of t5gemma are configs, too.
        if isinstance(value, dict) and (key.endswith("config") or "model_type" in value):
            yield from _parts(f"{where}{key}.", value)


def _with_older_names(part: Config) -> Config:
    # Where the older name is there and says something else, version 5 does not heed it, or it stays.
    return part | _older(part)


def _without_infinities(part: Config) -> Config:
    """Leave out what JSON has no number for: version 4 takes the object that stands for it as it is."""
    return {k: v for k, v in part.items() if not _has_infinity(v)}


def _has_infinity(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_infinity, value))
    return isinstance(value, dict) and value.keys() == {"__float__"}


def _with_older_layer_types(part: Config) -> Config:
    if part.get("model_type") not in _OLD_LAYER_TYPES:
        return part
    return part | {
        key: [_LAYER_TYPES.get(str(kind), kind) for kind in part[key]]
        for key in ("layer_types", "layers_block_type")
        if isinstance(part.get(key), list)
    }


_CHANGES: tuple[tuple[str, Callable[[Config], Config]], ...] = (
    ("said again", _with_older_names),
    ("left out, the default,", _without_infinities),
    ("by the older names of layers", _with_older_layer_types),
)


def _older(part: Config) -> Config:
    """Return what a part of a config says, under the names of version 4."""
    renamed = _RENAMED.get(str(part.get("model_type")), {})
    found: Config = {older: part[name] for name, older in renamed.items() if name in part}
    if "num_local_experts" in part:
        found["num_experts"] = part["num_local_experts"]
    found |= _sliding_layers(part)
    rope = part.get("rope_parameters")
    if not isinstance(rope, dict) or part.get("rope_scaling") is not None:
        return found  # where there is a rope_scaling, version 5 reads that, too
    model_type = str(part.get("model_type"))
    # Settings for each type of layer; others beside them count for nothing.
    layers = {k: v for k, v in rope.items() if k.endswith("_attention") and isinstance(v, dict)}
    if not layers:
        return found | _flat(rope, model_type)
    full, sliding = layers.get("full_attention", {}), layers.get("sliding_attention", {})
    if model_type.startswith("modernbert"):
        found["global_rope_theta"] = full.get("rope_theta")
        found["local_rope_theta"] = sliding.get("rope_theta")
    else:
        found |= _flat(full, model_type)
        if model_type.startswith("gemma3"):
            found["rope_local_base_freq"] = sliding.get("rope_theta")
    return {k: v for k, v in found.items() if v is not None}


def _sliding_layers(part: Config) -> Config:
    """Return how many layers there are to each without a window: 4.51 does not read their types."""
    default = _PATTERNS.get(str(part.get("model_type")))
    types = part.get("layer_types")
    if default is None or not isinstance(types, list):
        return {}
    for number in (default, *range(1, len(types) + 1)):
        kinds = ("full_attention", *["sliding_attention"] * (number - 1))
        if types == [kinds[layer % number] for layer in range(1, len(types) + 1)]:
            return {} if number == default else {"sliding_window_pattern": number}
    return {}


def _flat(rope: Config, model_type: str) -> Config:
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = next((n for start, n in _NAMES.items() if model_type.startswith(start)), {})
    found = {names.get(k, k): rope[k] for k in _BESIDE if rope.get(k) is not None}
    needed = "mrope_section" in rope or model_type.startswith(_NEED_A_SCALING)
    if kind in _SCALINGS or (kind == "default" and needed):
        scaling = {k: v for k, v in rope.items() if k not in _BESIDE}
        if model_type.startswith("phi3") and kind == "longrope":
            # These three and no other, and the first by its old name.
            scaling = {"type": kind} | {k: rope.get(k) for k in ("short_factor", "long_factor")}
        found["rope_scaling"] = scaling
    return found


def tokenizer_config(said: Any) -> tuple[Any, list[str]]:
    """Return what tokenizer_config.json has to say, and what was changed, nothing as a rule.

    Version 5 has a name of its own for the class of tokenizers that ``tokenizers`` runs, and lists in
    ``extra_special_tokens``, a dict to version 4, what both read as ``additional_special_tokens``.
    """
    if not isinstance(said, dict):
        return said, []
    changed, notices = dict(said), []
    if said.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
        notices.append("tokenizer_class TokenizersBackend became PreTrainedTokenizerFast")
    extra = said.get("extra_special_tokens")
    if isinstance(extra, list):
        # Of two lists version 5 takes its own, if there is anything in it.
        tokens = extra or said.get("additional_special_tokens") or []
        changed.pop("additional_special_tokens", None)
        names = {"extra_special_tokens": "additional_special_tokens"}
        changed = {names.get(k, k): v for k, v in changed.items()}
        changed["additional_special_tokens"] = tokens
        notices.append("the list in extra_special_tokens became additional_special_tokens")
    return changed, [f"{TOKENIZER_CONFIG}: {n}, for transformers 4" for n in notices]
