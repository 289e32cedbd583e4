"""Megatron torch_dist checkpoints made by megatron-core itself become the model they were made of."""

from __future__ import annotations

from pathlib import Path

import pytest

import streamconv
from streamconv.errors import BadInputError, UsageError
from tests.outputs import differences, read_model

CASES = ("llama_tp2pp2", "qwen2_tp2pp2_tied", "v0192_llama")
LAYOUTS = ("global_step_1/actor", "mlm_dist")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_bit_for_bit(case: str, layout: str, shared_checkpoints: Path, tmp_path: Path) -> None:
    root = shared_checkpoints / "megatron" / case
    answer = root / "hf_answer"
    streamconv.convert(root / layout, tmp_path / "out", hf_config=answer, sync=False)
    assert differences(read_model(tmp_path / "out"), read_model(answer)) == []


def test_the_config_beside_the_weights_is_found(shared_checkpoints: Path, tmp_path: Path) -> None:
    actor = shared_checkpoints / "megatron/llama_tp2pp2/global_step_1/actor"
    for src in (actor.parent.parent / "global_step_1", actor, actor / "dist_ckpt"):
        found = streamconv.inspect(src)
        assert found["format"] == "torch_dist"
        assert found["side_dir"] == str(actor / "huggingface")
        assert found["facts"]["parallelism"] == "tp 2, pp 2, ep 1, etp 2"


def test_without_a_config_the_way_out_is_named(shared_checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"needs the model's config.json") as caught:
        streamconv.convert(
            shared_checkpoints / "megatron/llama_tp2pp2/mlm_dist", tmp_path / "out", sync=False
        )
    assert "--hf-config" in str(caught.value)


def test_family(shared_checkpoints: Path, tmp_path: Path) -> None:
    actor = shared_checkpoints / "megatron/llama_tp2pp2/global_step_1/actor"
    with pytest.raises(UsageError, match="no family 'klingon'"):
        streamconv.convert(actor, tmp_path / "out", family="klingon", sync=False)
    streamconv.convert(actor, tmp_path / "out", family="llama", sync=False)
