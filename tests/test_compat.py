"""Outputs in transformers 4.57, which many pin beside vLLM, and in the installed one: the same logits.

Version 4 holds experts one by one, and takes its defaults in silence for settings it does not find.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streamconv
from scripts import releases
from scripts.campaigns.older_release import compare
from scripts.makers.architectures import architectures
from scripts.makers.fsdp import Made
from scripts.outputs import Stored, differences, read_truth

pytestmark = [pytest.mark.slow, pytest.mark.compat]

# Loads each folder and writes the state dict with the names and values that the library holds, or the
# logits of some tokens.
LOAD = """
import json, sys
import torch, transformers
from safetensors.torch import save_file
version, *jobs = json.loads(sys.argv[1])
assert transformers.__version__.startswith(version), transformers.__version__
ids = torch.tensor([[7, 3, 90, 11, 42, 5, 120, 64, 8, 17, 33, 2, 71, 101, 55, 6]])
for what, folder, out in jobs:
    config = transformers.AutoConfig.from_pretrained(folder)
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v}
    assert not wrong, (folder, wrong)
    if what == "logits":
        with torch.no_grad():
            save_file({"logits": model.eval()(input_ids=ids).logits.float()}, out)
        continue
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    state = {n: t.contiguous() for n, t in model.state_dict().items() if n not in tied}
    save_file(state, out)
"""
TOKENS = """
import json, sys
from transformers import AutoTokenizer
print(json.dumps([AutoTokenizer.from_pretrained(f)(sys.argv[1]).input_ids for f in sys.argv[2:]]))
"""

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
LAYERS = ["sliding_attention", "full_attention"]
# What version 4 reads under other names: each of these was wrong there, most of them in silence.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi": (
        "PhiForCausalLM",
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.25}},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            "layer_types": LAYERS,
            "sliding_window": 8,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    "olmo3": (
        "Olmo3ForCausalLM",
        {
            "layer_types": LAYERS,
            "sliding_window": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                # Beside settings for each type of layer these count for nothing.
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 77.0,
            },
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        {
            "tie_word_embeddings": False,
            "image_token_id": 1,
            "video_token_id": 4,
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            # Version 5 saves a tie_word_embeddings of its own here, which version 4 goes by.
            "text_config": {
                **{k: v for k, v in TEXT.items() if k != "tie_word_embeddings"},
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 500.0,
                    "mrope_section": [4, 2, 2],
                },
            },
        },
    ),
}


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with transformers 4.57."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    why_not = releases.install(base / "transformers-4")
    if why_not is not None:
        pytest.skip(f"pip cannot install transformers 4: {why_not}")
    return base / "transformers-4"


def run(script: str, folder: Path | None, *arguments: str) -> str:
    """Run ``script`` with the installed transformers, or with the one in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=releases.environment(folder),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def make(folder: Path, model_type: str) -> Path:
    """Save a model as one rank of a training run does; return its folder."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    architecture, settings = MODELS[model_type]
    nested = "text_config" in settings
    config = CONFIG_MAPPING[model_type](**(settings if nested else TEXT | settings))
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)  # so that positions matter
    model.save_pretrained(folder / "truth")
    (folder / "actor" / "huggingface").mkdir(parents=True)
    torch.save(model.state_dict(), folder / "actor" / "model_world_size_1_rank_0.pt")
    config.architectures = [architecture]
    config.save_pretrained(folder / "actor" / "huggingface")
    return folder


def test_both_versions_compute_what_was_trained(
    transformers_4: Path, tmp_path: Path, planned_here: None
) -> None:
    for name in MODELS:
        streamconv.convert(
            make(tmp_path / name, name) / "actor", tmp_path / name / "out", sync=False
        )

    def logits(version: str, folder: Path | None, which: str) -> dict[str, torch.Tensor]:
        made = {name: tmp_path / name / f"{which}-{version}.safetensors" for name in MODELS}
        jobs = [("logits", str(tmp_path / n / which), str(out)) for n, out in made.items()]
        run(LOAD, folder, json.dumps([version, *jobs]))
        return {name: load_file(out)["logits"] for name, out in made.items()}

    truth = logits("5.", None, "truth")
    for version, folder in (("5.", None), ("4.57.", transformers_4)):
        found = logits(version, folder, "out")
        for name, expected in truth.items():
            off = (found[name] - expected).abs().max().item()
            assert off < 1e-4 * expected.abs().max().item(), (name, version, off)


def test_tokenizers_that_version_5_saved(
    transformers_4: Path, shared_checkpoints: Path, tmp_path: Path, planned_here: None
) -> None:
    sources = sorted((shared_checkpoints / "clients" / "tokenizer-v5").glob("*/tokenizer.json"))
    outputs = []
    for path in sources:
        src, dst = tmp_path / path.parent.name, tmp_path / f"{path.parent.name}-out"
        src.mkdir()
        torch.save({"model.norm.weight": torch.ones(4)}, src / "model_world_size_1_rank_0.pt")
        streamconv.convert(src, dst, hf_config=path.parent, sync=False)
        was = json.loads((path.parent / "tokenizer_config.json").read_text())
        now = json.loads((dst / "tokenizer_config.json").read_text())
        assert len(was) == len(now)
        outputs.append(str(dst))
    text = "<|im_start|>some words<|im_end|> and more"
    before = run(TOKENS, None, text, *(str(p.parent) for p in sources))
    assert run(TOKENS, None, text, *outputs) == before
    assert run(TOKENS, transformers_4, text, *outputs) == before


def test_transformers_4_loads_the_same_weights(
    transformers_4: Path,
    checkpoints: dict[str, Made],
    tmp_path: Path,
    planned_here: None,  # where torch and transformers 5 are loaded already
) -> None:
    names = ["fsdp2", "fsdp2-bf16", "fsdp2-tied", "fsdp1-tied-differs"]
    names += ["fsdp2-moe", "fsdp2-mixtral", "fsdp2-qwen2_moe"]
    jobs = []
    for name in names:
        streamconv.convert(
            checkpoints[name].source, tmp_path / name, sync=False, max_shard_size="64KB"
        )
        jobs.append(("state", str(tmp_path / name), str(tmp_path / f"{name}.safetensors")))
    run(LOAD, transformers_4, json.dumps(["4.57.", *jobs]))
    for name, (_, _, state) in zip(names, jobs, strict=True):
        found: dict[str, Stored] = read_truth(Path(state))
        assert differences(found, read_truth(checkpoints[name].truth_hf)) == [], name


RIGHT = ("LlamaForCausalLM", "Qwen2MoeForCausalLM", "Glm4ForCausalLM", "XLMWithLMHeadModel")
TOLD_OF = {
    # Another rotary base, and embeddings tied that are not by default, or the other way round.
    False: ("DogeForCausalLM", "ApertusForCausalLM"),
    True: ("DogeForCausalLM", "BertLMHeadModel", "MoshiForCausalLM"),
}


@pytest.mark.parametrize("untie", [False, True])
def test_a_notice_tells_where_version_4_computes_something_else(
    untie: bool, transformers_4: Path, tmp_path: Path
) -> None:
    names = {*RIGHT, *TOLD_OF[untie]}
    chosen = [a for a in architectures() if a.name in names]
    figures = compare(tmp_path, transformers_4, chosen, len(chosen), untie=untie)
    assert figures.breaches == []
    assert figures.counts == {
        "with equal logits": len(RIGHT),
        "that say what is not": len(TOLD_OF[untie]),
    }
