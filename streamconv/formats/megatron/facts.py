"""What Megatron says of a run beside the weights: parallel sizes, iteration, parts of its config.

The sources are ``common.pt`` (or, since 0.19, the record ``common_state``), which holds the arguments
of a Megatron-LM run, and the model's own config as trainers save it: verl's
``transformer_config.json``, Megatron-Bridge's ``run_config.yaml``, NeMo's ``context/model.yaml``;
ms-swift has the arguments of its run in ``args.json``. All
are strangers' data of many classes: they are read inertly, only plain numbers, texts, truth values and
lists of them are taken, and what cannot be read is not a reason to fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from streamconv.errors import StreamconvError
from streamconv.files.inputs import opened
from streamconv.files.jsonfile import object_or_empty
from streamconv.formats.megatron.run_yaml import settings_below
from streamconv.formats.side_folder import above
from streamconv.torchfile.inert import Inert, InertDict
from streamconv.torchfile.unpickle import load_inert
from streamconv.torchfile.window import FileWindow
from streamconv.torchfile.zipdir import read_directory

OF_MODEL = "told_by_the_model"
"""The fact that the others are those of the model's own config and not arguments of a run."""

_MAX_NBYTES = 16 << 20
_WANTED = frozenset(
    {
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "group_query_attention",
        "kv_channels",
        "ffn_hidden_size",
        "moe_ffn_hidden_size",
        "num_experts",
        "num_moe_experts",
        "padded_vocab_size",
        "vocab_size",
        "mtp_num_layers",
        "untie_embeddings_and_output_weights",
        "attention_output_gate",
        "layernorm_zero_centered_gamma",
        "apply_layernorm_1p",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "iteration",
        "moe_mlp_glu_interleave_size",
        "layernorm_epsilon",
        "norm_epsilon",
        "rotary_base",
        "rotary_percent",
        "use_rope_scaling",
        "rope_scaling_factor",
        "rope_type",
        "rotary_scaling_factor",
        "mscale",
        "mscale_all_dim",
        "beta_fast",
        "beta_slow",
        "original_max_position_embeddings",
        "moe_router_topk",
        "moe_router_topk_scaling_factor",
        "moe_router_score_function",
        "moe_router_num_groups",
        "moe_router_group_topk",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "mamba_num_heads",
        "mamba_head_dim",
        "mamba_num_groups",
        "mamba_state_dim",
        "position_embedding_type",
        "rotary_interleaved",
        "rope_scaling",
        "yarn_rotary_scaling_factor",
        "yarn_beta_fast",
        "yarn_beta_slow",
        "yarn_original_max_position_embeddings",
        "mrope_section",
        "qk_l2_norm",
        "softmax_type",
        "moe_router_pre_softmax",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "activation_func_clamp_value",
        "noop_layers",
    }
)
# Where nothing means something: no scaling, no window, positions in every layer.
_WANTED_IF_NULL = frozenset(
    {
        "rotary_seq_len_interpolation_factor",
        "seq_len_interpolation_factor",
        "window_size",
        "window_attn_skip_freq",
        "no_rope_freq",
    }
)
# Trainers differ in whether they count padding here.
_NOT_OF_YAML = frozenset({"vocab_size", "padded_vocab_size"})
# An argument of the same name as Megatron-Bridge's, for another thing.
_NOT_OF_SWIFT = _NOT_OF_YAML | {"rope_scaling"}
_MAX_LISTED = 1024
_KINDS = (int, float, bool, str)


def of_file(path: Path, offset: int = 0, nbytes: int | None = None) -> dict[str, object]:
    """Return the facts in a file that torch.save wrote, or in the record at ``offset`` of one."""
    try:
        with opened(path) as file:
            directory = read_directory(FileWindow(file, offset, nbytes))
            data = directory.read_entry("data.pkl", max_nbytes=_MAX_NBYTES)
        return dict(_scalars(load_inert(data, str(path), unknown="keep"), 0))
    except (StreamconvError, OSError):
        return {}


def of_json(path: Path) -> dict[str, object]:
    """Return the facts in a JSON file: verl's transformer_config.json."""
    return dict(_scalars(object_or_empty(path, most_bytes=_MAX_NBYTES), 0))


def of_run(folder: Path, arguments: Mapping[str, object]) -> dict[str, object]:
    """Return what is known of the run behind the weights in ``folder``.

    The trainer's own ``arguments`` go before the model's config, where both speak.
    """
    config = _of_model(folder)
    if config and not arguments.keys() & config.keys():
        # What the model was built of: here a default is not an argument that nobody gave.
        config[OF_MODEL] = True
    return {**config, **_of_swift(folder), **arguments}


def _of_swift(folder: Path) -> dict[str, object]:
    """Return the arguments that ms-swift saved beside a step, or in the folder of all."""
    for place in (folder, above(folder)):
        told = object_or_empty(place / "args.json", most_bytes=_MAX_NBYTES)
        if isinstance(told.get("swift_version"), str):
            wanted = {k: v for k, v in told.items() if k not in _NOT_OF_SWIFT and v is not None}
            return dict(_plain(wanted))
    return {}


def _of_model(folder: Path) -> dict[str, object]:
    """Return the model's own config as verl, Megatron-Bridge or NeMo saved it."""
    beside = above(folder)
    if beside.name == "model":
        beside = above(beside)
    wanted = (_WANTED | _WANTED_IF_NULL) - _NOT_OF_YAML
    found = of_json(beside / "transformer_config.json")
    for file, keys in (
        (folder / "run_config.yaml", ("model",)),
        # A model with a vision tower: the settings around it only fill up.
        (beside / "context/model.yaml", ("config", "language_transformer_config")),
        (beside / "context/model.yaml", ("config",)),
    ):
        found = found or dict(_plain(settings_below(file, keys, wanted)))
    return found


def of_state(value: object) -> dict[str, object]:
    """Return the facts in an unpickled checkpoint: a dict with ``args``, ``iteration`` and so on."""
    return dict(_scalars(value, 0))


def parallelism(facts: Mapping[str, object]) -> str:
    """Return the parallel sizes that ``facts`` tell, in short: ``tp 2, pp 4``."""
    sizes = (
        ("tp", "tensor_model_parallel_size"),
        ("pp", "pipeline_model_parallel_size"),
        ("vpp", "virtual_pipeline_model_parallel_size"),
        ("ep", "expert_model_parallel_size"),
        ("etp", "expert_tensor_parallel_size"),
    )
    return (
        ", ".join(f"{short} {facts[name]}" for short, name in sizes if name in facts) or "unknown"
    )


def _scalars(value: Any, depth: int) -> Iterator[tuple[str, object]]:
    if type(value) is list and len(value) == 1:
        value = value[0]
    if isinstance(value, Inert):
        value = value.state
    if type(value) not in (dict, InertDict) or depth > 1:
        return
    if "args" in value:
        yield from _scalars(value["args"], depth + 1)
    yield from _plain(value)


def _plain(values: Mapping[Any, Any]) -> Iterator[tuple[str, object]]:
    """Yield the wanted ones of ``values`` that are plain, tuples as lists."""
    for key, item in values.items():
        if key not in _WANTED and key not in _WANTED_IF_NULL:
            continue
        if type(item) in (list, tuple):
            if len(item) <= _MAX_LISTED and all(map(_is_plain, item)):
                yield str(key), list(item)
        elif _is_plain(item) or (item is None and key in _WANTED_IF_NULL):
            yield str(key), item


def _is_plain(item: object) -> bool:
    """A number that no setting has cannot be compared with a float, nor shown."""
    return type(item) in _KINDS and not (isinstance(item, int) and abs(item) >> 63)
