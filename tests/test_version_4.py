"""What is said again for transformers 4, and that it changes nothing for version 5."""

from __future__ import annotations

from typing import Any

import pytest

from streamconv.options import is_routine
from streamconv.planning import version_4

SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DEFAULT = {"rope_type": "default", "rope_theta": 300.0}


def added(config: dict[str, Any]) -> dict[str, Any]:
    """What version 4's keys are, with nothing else changed."""
    changed = dict(config)
    version_4.say_again(changed, lambda one, other: True)
    return {k: v for k, v in changed.items() if k not in config}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_local_experts": 4}, {"num_experts": 4}),
        (
            {"model_type": "gemma3_text", "layer_types": [SLIDING, FULL, SLIDING]},
            {"sliding_window_pattern": 2},
        ),
        ({"model_type": "gemma3_text", "layer_types": [SLIDING] * 5 + [FULL, SLIDING]}, {}),
        ({"model_type": "gemma3_text", "layer_types": [FULL, FULL, SLIDING]}, {}),
        ({"model_type": "videomae", "qv_bias": False}, {"qkv_bias": False}),
        ({"model_type": "xlm", "pad_token_id": 3}, {"pad_index": 3}),
        ({"model_type": "xlm-roberta", "pad_token_id": 3}, {}),
        ({"rope_parameters": DEFAULT}, {"rope_theta": 300.0}),
        ({"rope_parameters": YARN | DEFAULT | YARN}, {"rope_theta": 300.0, "rope_scaling": YARN}),
        (
            {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}},
            {"rope_theta": 300.0, "partial_rotary_factor": 0.5},
        ),
        (
            {"model_type": "gpt_neox", "rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}},
            {"rotary_emb_base": 300.0, "rotary_pct": 0.5},
        ),
        (
            {"rope_parameters": DEFAULT | {"mrope_section": [1, 1, 2]}},
            {
                "rope_theta": 300.0,
                "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            },
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": YARN | {"rope_theta": 9.0},
                    "sliding_attention": DEFAULT,
                    "rope_theta": 77.0,
                },
            },
            {"rope_theta": 9.0, "rope_scaling": YARN, "rope_local_base_freq": 300.0},
        ),
        (
            {
                "model_type": "modernbert-decoder",
                "rope_parameters": {
                    "full_attention": DEFAULT | {"rope_theta": 9.0},
                    "sliding_attention": DEFAULT,
                },
            },
            {"global_rope_theta": 9.0, "local_rope_theta": 300.0},
        ),
        # A vision tower, whose way of rotating is no setting of version 4; and what is there already.
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 9.0}}, {"rope_theta": 9.0}),
        ({"rope_parameters": YARN, "rope_theta": 1.0, "rope_scaling": {"type": "linear"}}, {}),
        ({"rope_parameters": "yarn"}, {}),
        (
            {"model_type": "qwen3_vl_text", "rope_parameters": DEFAULT},
            {"rope_theta": 300.0, "rope_scaling": {"rope_type": "default"}},
        ),
        ({"rope_parameters": None, "text_config": None}, {}),
    ],
)
def test_settings_under_their_old_names(config: dict[str, Any], expected: Any) -> None:
    assert added(config) == expected


def test_an_older_name_that_says_something_else_follows() -> None:
    config = {
        "num_local_experts": 4,
        "num_experts": 2,
        "rope_parameters": DEFAULT,
        "rope_theta": 5.0,
    }
    version_4.say_again(config, lambda one, other: True)
    assert (config["num_experts"], config["rope_theta"]) == (4, 300.0)


def test_parts_of_a_config_are_told_by_their_path() -> None:
    part = {"model_type": "t5_gemma_module", "rope_parameters": DEFAULT}
    config = {
        "text_config": {"rope_parameters": DEFAULT}, "encoder": part, "rope_parameters": DEFAULT
    }  # fmt: skip
    notices = version_4.say_again(config, lambda one, other: "rope_theta" not in other)
    assert notices == [
        f"config.json: {part}.rope_theta said again for transformers 4"
        for part in ("text_config", "encoder")
    ]
    assert "rope_theta" not in config


def test_layers_and_infinities_as_version_4_reads_them() -> None:
    from streamconv.tracing.hf_build import reads_alike

    config = {
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }
    notices = version_4.say_again(config, reads_alike)
    assert config["layer_types"] == ["mamba", "attention"]
    assert "time_step_limit" not in config
    assert notices == [
        "config.json: time_step_limit left out, the default, for transformers 4",
        "config.json: layer_types by the older names of layers for transformers 4",
    ]
    # No default: it stays, and what has these names in both versions, too.
    limit = [0.5, {"__float__": "Infinity"}]
    kept = {"model_type": "mamba2", "time_step_limit": limit, "layer_types": ["linear_attention"]}
    assert version_4.say_again(dict(kept), reads_alike) == []


def test_version_5_reads_the_same() -> None:
    from streamconv.tracing.hf_build import reads_alike

    config = {"model_type": "llama", "rope_parameters": YARN | {"rope_theta": 300.0}}
    assert reads_alike(config, config | {"rope_theta": 300.0, "rope_scaling": YARN})
    assert not reads_alike(config, config | {"rope_scaling": YARN | {"factor": 2.0}})
    assert not reads_alike({"model_type": "none"}, {"model_type": "none"})
    assert not reads_alike(config, config | {"hidden_size": "many"})


@pytest.mark.parametrize("tied", [True, False])
def test_ties_are_said_where_version_4_looks(tied: bool) -> None:
    config: dict[str, Any] = {"text_config": {"tie_word_embeddings": not tied}}
    assert "text_config.tie_word_embeddings" in version_4.say_ties(config, tied)[0]
    assert config["text_config"]["tie_word_embeddings"] is tied
    assert version_4.say_ties(config, tied) == []
    # Not said: version 5 saves what differs from its own defaults.
    config = {"transformers_version": "5.3.0", "thinker_config": {"text_config": {}}}
    assert version_4.say_ties(config, tied)
    assert config["thinker_config"]["text_config"] == {"tie_word_embeddings": tied}
    assert version_4.say_ties({"transformers_version": "4.57.1", "text_config": {}}, tied) == []


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            {"a": 1, "tokenizer_class": "TokenizersBackend", "z": 2},
            {"a": 1, "tokenizer_class": "PreTrainedTokenizerFast", "z": 2},
        ),
        ({"extra_special_tokens": ["x"], "z": 2}, {"additional_special_tokens": ["x"], "z": 2}),
        (
            {"additional_special_tokens": ["y"], "extra_special_tokens": ["x"]},
            {"additional_special_tokens": ["x"]},
        ),
        (
            {"additional_special_tokens": ["y"], "extra_special_tokens": []},
            {"additional_special_tokens": ["y"]},
        ),
        ({"extra_special_tokens": {"image_token": "x"}}, None),
        ({"tokenizer_class": "Qwen2Tokenizer"}, None),
        ([1], None),
    ],
)
def test_tokenizer_config(said: Any, expected: Any) -> None:
    changed, notices = version_4.tokenizer_config(said)
    assert changed == (said if expected is None else expected)
    assert bool(notices) == (expected is not None)
    if expected is not None:
        assert list(changed) == list(expected)
        assert all(n.startswith("tokenizer_config.json: ") for n in notices)


@pytest.mark.parametrize(
    ("model_type", "architecture", "tied", "told"),
    [
        ("doge", "DogeForCausalLM", False, "computes other logits"),
        ("mt5", "MT5ForConditionalGeneration", True, "scales the logits"),
        ("mt5", "MT5ForConditionalGeneration", False, ""),
        ("mt5", "MT5ForTokenClassification", True, ""),
        ("bert", "BertForMaskedLM", False, "has one bias"),
        ("bert", "BertForMaskedLM", True, ""),
        ("bert", "BertForMaskedLM", None, ""),
        ("qwen3", "Qwen3ForCausalLM", False, ""),
    ],
)
def test_what_version_4_is_known_to_read_otherwise(
    model_type: str, architecture: str, tied: bool | None, told: str
) -> None:
    config = {"model_type": model_type, "architectures": [architecture]}
    for certain in (architecture, None):
        notices = version_4.unlike(config, certain, tied)
        assert len(notices) == bool(told)
        assert told in "".join(notices)
        assert not any(map(is_routine, notices))
