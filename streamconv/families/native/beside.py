"""What a trainer's own file beside the weights says of the run: Meta's params.json, litgpt's YAML.

Other numbers of heads can make up the same rows, and bases and epsilons have no tensors at all: no
shape would show a config of another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from streamconv.files.jsonfile import object_or_empty
from streamconv.formats.megatron.facts import OF_MODEL
from streamconv.formats.megatron.run_yaml import settings_below

_META = {
    "num_attention_heads": "n_heads",
    "num_query_groups": "n_kv_heads",
    "kv_channels": "head_dim",
    "rotary_base": "rope_theta",
    "use_rope_scaling": "use_scaled_rope",
    "layernorm_epsilon": "norm_eps",
}
_LITGPT = {
    "num_attention_heads": "n_head",
    "num_query_groups": "n_query_groups",
    "kv_channels": "head_size",
    "rotary_base": "rope_base",
    "rotary_percent": "rotary_percentage",
    "layernorm_epsilon": "norm_eps",
    "moe_router_topk": "n_expert_per_token",
}


def said_of_run(root: Path) -> dict[str, object]:
    """Return what is told, by the names of Megatron's arguments; empty where nothing is."""
    for folder in (root, root.absolute().parent):
        found = _named(object_or_empty(folder / "params.json", most_bytes=1 << 20), _META)
        if "num_attention_heads" in found:
            return {"num_query_groups": found["num_attention_heads"], **found, OF_MODEL: True}
        said = settings_below(folder / "model_config.yaml", (), frozenset(_LITGPT.values()))
        found = _named(said, _LITGPT)
        if "num_attention_heads" in found:
            # Some of litgpt's own configs leave an epsilon at its default that the model's is not.
            return {"num_query_groups": found["num_attention_heads"], **found}
    return {}


def _named(said: Mapping[str, object], names: Mapping[str, str]) -> dict[str, object]:
    return {
        ours: value
        for ours, name in names.items()
        if type(value := said.get(name)) in (int, float, bool)
    }
