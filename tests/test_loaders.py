"""Our folders by the rules of programs that do not use transformers to load: vLLM, SGLang, llama.cpp.

Small readers of their public rules: which files they take, what they call the tensors, what they merge,
and that nothing is missing or left over.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from scripts.outputs import read_safetensors

LAYERS, EXPERTS = 2, 4
CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
}
# The parameters that an engine fuses: each is made of all of its parts, or not at all.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "w13_weight": ("gate_proj", "up_proj"),
    "w2_weight": ("down_proj",),
}
# llama.cpp's names for those of the Hub; a tensor that is none of them stops its converter.
GGUF = {
    r"model\.embed_tokens": "token_embd",
    r"model\.norm": "output_norm",
    r"lm_head": "output",
    r"model\.layers\.(\d+)\.input_layernorm": "blk.{}.attn_norm",
    r"model\.layers\.(\d+)\.post_attention_layernorm": "blk.{}.ffn_norm",
    r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj": "blk.{}.attn_{}",
    r"model\.layers\.(\d+)\.self_attn\.([qk])_norm": "blk.{}.attn_{}_norm",
    r"model\.layers\.(\d+)\.self_attn\.o_proj": "blk.{}.attn_output",
    r"model\.layers\.(\d+)\.mlp\.gate": "blk.{}.ffn_gate_inp",
    r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj": "blk.{0}.ffn_{2}_exps {1}",
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def output(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bool]:
    """A Qwen3-MoE in several files, from the fused experts that transformers 5 has in memory."""
    import transformers

    tied = request.param
    folder = tmp_path_factory.mktemp("loaders")
    config = transformers.Qwen3MoeConfig(
        **CONFIG, tie_word_embeddings=tied, architectures=["Qwen3MoeForCausalLM"]
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    (folder / "actor" / "huggingface").mkdir(parents=True)
    torch.save(model.state_dict(), folder / "actor" / "model_world_size_1_rank_0.pt")
    config.save_pretrained(folder / "actor" / "huggingface")
    streamconv.convert(folder / "actor", folder / "out", max_shard_size="30KB", sync=False)
    return folder / "out", tied


def weights(folder: Path) -> dict[str, tuple[int, ...]]:
    """As vLLM and SGLang do: every safetensors file, but for those that the index does not name."""
    files = sorted(folder.glob("*.safetensors"))
    mapped = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {f.name for f in files} == set(mapped.values())
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        for name, tensor in read_safetensors(path)[1].items():
            assert name not in found
            assert mapped[name] == path.name
            found[name] = tensor.shape
    assert found.keys() == mapped.keys()
    return found


def test_an_engine_consumes_every_name_and_misses_none(output: tuple[Path, bool]) -> None:
    folder, tied = output
    names = weights(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["tie_word_embeddings"] is tied
    assert config["num_experts"] == EXPERTS
    # Tied: the engine makes the head of the embedding, and skips one that is there.
    wanted = {"model.embed_tokens.weight", "model.norm.weight"}
    wanted |= set() if tied else {"lm_head.weight"}
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        wanted |= {f"{layer}.{m}_layernorm.weight" for m in ("input", "post_attention")}
        wanted |= {f"{layer}.self_attn.{m}.weight" for m in ("o_proj", "q_norm", "k_norm")}
        wanted |= {f"{layer}.self_attn.{part}.weight" for part in FUSED["qkv_proj"]}
        wanted.add(f"{layer}.mlp.gate.weight")
        for fused in ("w13_weight", "w2_weight"):
            for part in FUSED[fused]:
                experts = {f"{layer}.mlp.experts.{e}.{part}.weight" for e in range(EXPERTS)}
                assert len({names[e] for e in experts}) == 1
                wanted |= experts
    assert names.keys() == wanted


def test_llama_cpp_knows_every_name(output: tuple[Path, bool]) -> None:
    folder, tied = output
    parts = [p.name for p in folder.iterdir() if p.name.endswith(".safetensors")]
    assert all(name.startswith("model") for name in parts)  # it looks for no others
    made = []
    for name in weights(folder):
        stem = name.removesuffix(".weight")
        (match,) = [m for p in GGUF if (m := re.fullmatch(p, stem))]
        made.append(GGUF[match.re.pattern].format(*match.groups()))
    assert len(set(made)) == len(made)
    assert ("output" in made) is not tied
    # It stacks the experts of a layer: each of them must be there.
    for n in range(LAYERS):
        for kind in ("gate", "up", "down"):
            stacked = [m for m in made if m.startswith(f"blk.{n}.ffn_{kind}_exps ")]
            assert sorted(int(m.split()[1]) for m in stacked) == [*range(EXPERTS)]
