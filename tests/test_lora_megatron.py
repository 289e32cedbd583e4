"""Adapters on Megatron's modules: merged, and handed on under HuggingFace's names.

The truth is computed on HuggingFace's side, module by module; the maker's inverse turns it into
Megatron's. Values are such that float32 sums are exact: every order of summing gives one result.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import streamconv
from scripts.makers.megatron import Options, Parallel, Piece, save, stacked, write_dcp
from scripts.makers.megatron_inverse import invert
from scripts.makers.tiny_families import State, TinyModel, make
from streamconv.errors import BadInputError, UsageError
from tests.test_lora import convert, load

RANK, ALPHA = 4, 8.0
PREFIX = "base_model.model."
ADAPTED = re.compile(
    r".*\.(linear_(qkv|proj|fc1|fc2|q_proj|(q|kv)_(down|up)_proj))\.weight", re.ASCII
)
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "fc1", "up_proj": "fc1"}

pytestmark = [
    pytest.mark.usefixtures("planned_here"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


# --- files that the trainers' own libraries wrote --------------------------------------------------


@pytest.fixture(scope="module")
def bridge(shared_checkpoints: Path) -> Path:
    return shared_checkpoints / "megatron_cases/lora_bridge"


@pytest.mark.parametrize("mode", ["merge", "both"])
def test_megatron_bridge_beside_its_base_weights(mode: str, bridge: Path, tmp_path: Path) -> None:
    src, base = bridge / "full", bridge / "base_hf"
    convert(src, tmp_path / "out", hf_config=base, lora=mode, lora_alpha=16)
    assert_same(load(tmp_path / "out"), load(bridge / "merged_hf"))
    assert streamconv.verify(tmp_path / "out", source=src / "iter_0000001").passed
    if mode == "both":
        assert_peft_merges(tmp_path / "out/lora_adapter", base, load(bridge / "merged_hf"))


def test_megatron_bridge_alone(bridge: Path, tmp_path: Path) -> None:
    """Alpha is in run_config.yaml, and what only stands beside a key of that name is not it."""
    src = shutil.copytree(bridge / "only", tmp_path / "only") / "iter_0000001"
    base = bridge / "base_hf"
    (src / "run_config.yaml").write_text(
        "model:\n  alpha: 99\npeft:\n  _target_: bridge.peft.lora.LoRA\n  alpha: 16\n  dim: 8\n"
    )
    convert(src, tmp_path / "merged", base=base)
    assert_same(load(tmp_path / "merged"), load(bridge / "merged_hf"))
    convert(src, tmp_path / "adapter", hf_config=base)
    assert_peft_merges(tmp_path / "adapter", base, load(bridge / "merged_hf"))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["lora_alpha"], config["r"]) == (16, 8)
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@pytest.mark.parametrize("enabled", [True, False])
def test_nemo_rl(enabled: bool, bridge: Path, tmp_path: Path) -> None:
    """Its own config.yaml has the settings that it makes Megatron-Bridge's of."""
    weights = tmp_path / "step_10/policy/weights/iter_0000000"
    shutil.copytree(bridge / "only/iter_0000001", weights)
    peft = f"{{enabled: {str(enabled).lower()}, dim: 8, alpha: 16}}"
    text = f"policy:\n  peft: {{alpha: 99}}\n  megatron_cfg:\n    peft: {peft}\n"
    (tmp_path / "step_10/config.yaml").write_text(text)
    if enabled:
        convert(tmp_path / "step_10", tmp_path / "out", base=bridge / "base_hf")
        assert_same(load(tmp_path / "out"), load(bridge / "merged_hf"))
    else:
        with pytest.raises(BadInputError, match="lora_alpha is not known"):
            convert(tmp_path / "step_10", tmp_path / "out", base=bridge / "base_hf")


@pytest.mark.parametrize("beside", ["", ".."], ids=["in the folder", "above it"])
def test_ms_swift(beside: str, shared_checkpoints: Path, tmp_path: Path) -> None:
    root = shared_checkpoints / "megatron_cases/lora_peft_names"
    alone, whole = (
        shutil.copytree(root / name, tmp_path / name) / "iter_0000001"
        for name in ("swift_lora", "swift_lora_full")
    )
    told = {"tuner_type": "lora", "lora_alpha": 16, "lora_rank": 8, "use_rslora": False}
    for src in (alone, whole):
        (src / beside / "args.json").write_text(json.dumps(told))
    base = root / "base_hf"
    convert(whole, tmp_path / "merged", hf_config=base)
    convert(alone, tmp_path / "from_base", base=base)
    assert_same(load(tmp_path / "merged"), load(tmp_path / "from_base"))
    convert(alone, tmp_path / "adapter", hf_config=base)
    convert(whole, tmp_path / "left", hf_config=base, lora="adapter")
    assert_same(load(tmp_path / "adapter"), load(tmp_path / "left"))
    assert_peft_merges(tmp_path / "adapter", base, load(tmp_path / "merged"))


def test_verls_adapter_beside_the_ready_one(shared_checkpoints: Path, tmp_path: Path) -> None:
    """The folder that verl exported says what no other file of it does: alpha."""
    src = shared_checkpoints / "layouts/verl_megatron_lora/src/global_step_5"
    convert(src, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["lora_alpha"], config["r"]) == (16, 4)
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


# --- every family ------------------------------------------------------------------------------------


@dataclass
class Made:
    """A model, an adapter for it, and both under Megatron's names."""

    model: TinyModel
    merged: State
    base: State
    factors: State = field(default_factory=dict)


def small(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return eighths of small whole numbers, other ones for another name."""
    made = torch.Generator().manual_seed(sum(name.encode()) * 7919 + len(name))
    return (torch.randint(-3, 4, shape, generator=made) / 8).to(torch.bfloat16)


def adapted(name: str, *, shared: bool = False) -> Made:
    """Adapt all linear modules of a tiny model; ``shared``: one adapter for all experts of a layer."""
    model = make(name)
    base = invert(model.config, dict(model.state)).made
    matrices = {
        n
        for n, t in model.state.items()
        if t.ndim == 2 and re.search(r"_(proj|a|b|mqa)\.weight", n)
    }

    def group(name: str, kinds: Mapping[str, str] = FUSED) -> str:
        """Return what stands for the A of a module: one for q, k and v, one for gate and up."""
        name = re.sub(r"experts\.\d+\.", "experts.", name) if shared else name
        module, leaf = name.removesuffix(".weight").rpartition(".")[::2]
        latent = "kv_a_proj" in " ".join(model.state)
        fused = kinds.get(leaf) if not (latent and "self_attn" in module) else None
        return f"{module}.{fused or leaf}"

    def b_of(name: str, rows: int) -> torch.Tensor:
        key = re.sub(r"experts\.\d+\.", "experts.", name) if shared else name
        return small(f"{key}.B", (rows, RANK))

    factors_b = {n: b_of(n, t.shape[0]) if n in matrices else t for n, t in model.state.items()}
    # A's columns are the weight's: the inverse of what HuggingFace's modules have, one a group.
    factors_a = {
        n: small(f"{group(n)}.A", (RANK, t.shape[1])) if n in matrices else t
        for n, t in model.state.items()
    }
    merged = dict(model.state)
    for n in matrices:
        product = factors_b[n].float() @ factors_a[n].float()
        merged[n] = (model.state[n].float() + ALPHA / RANK * product).to(torch.bfloat16)
    made = Made(model, merged, base)
    inverse_b = invert(model.config, dict(factors_b)).made
    for key in inverse_b:
        if not ADAPTED.fullmatch(key):
            continue
        module = key.removesuffix(".weight")
        a = (
            torch.stack([factors_a[n] for n in _experts(module, model.state)])
            if (".experts." in key)
            else factors_a[_source(module, model.state)]
        )
        b = inverse_b[key]
        if shared and ".experts." in key:
            a, b = a[0], b[0]
        made.factors |= {
            f"{module}.adapter.linear_in.weight": a.contiguous(),
            f"{module}.adapter.linear_out.weight": b.contiguous(),
        }
    return made


NAMES = {
    "linear_qkv": "q_proj", "linear_proj": "o_proj",
    "linear_fc1": "gate_proj", "linear_fc2": "down_proj",
    "linear_q_proj": "q_proj", "linear_q_down_proj": "q_a_proj", "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa", "linear_kv_up_proj": "kv_b_proj",
}  # fmt: skip


def _source(module: str, state: State) -> str:
    """Return a module of HuggingFace's whose A is that of Megatron's."""
    layer = re.search(r"layers\.(\d+)\.", module)
    assert layer is not None
    part = "self_attn" if "self_attention" in module else "mlp"
    if ".shared_experts." in module:
        part = "mlp.shared_experts"
    return f"model.layers.{layer[1]}.{part}.{NAMES[module.rpartition('.')[2]]}.weight"


def _experts(module: str, state: State) -> list[str]:
    name = _source(module, state).replace(".mlp.", ".mlp.experts.0.")
    found = []
    while (one := name.replace(".experts.0.", f".experts.{len(found)}.")) in state:
        found.append(one)
    return found


def folder(path: Path, made: Made, tensors: State) -> Path:
    return save(path, made.model.config, invert(made.model.config, dict(made.model.state)),
                Options(noise=False, parallel=Parallel(1, 1)), tensors)  # fmt: skip


def base_folder(made: Made, path: Path) -> Path:
    path.mkdir()
    save_file(made.model.state, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(made.model.config))
    return path


FAMILIES = [
    ("llama", False), ("qwen3", False), ("deepseek_v3", False),
    ("qwen3_moe", False), ("qwen3_moe", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shared"), FAMILIES)
def test_merged_handed_on_and_put_on_its_base(name: str, shared: bool, tmp_path: Path) -> None:
    made = adapted(name, shared=shared)
    base = base_folder(made, tmp_path / "base")
    whole = folder(tmp_path / "whole", made, made.base | made.factors)
    convert(whole, tmp_path / "merged", lora_alpha=ALPHA)
    assert_same(load(tmp_path / "merged"), made.merged)
    stackable = name != "deepseek_v3"  # its first layer is dense
    factors = stacked(made.factors) if stackable else made.factors
    alone = folder(tmp_path / "alone", made, factors)
    convert(alone, tmp_path / "on_base", base=base, lora_alpha=ALPHA)
    assert_same(load(tmp_path / "on_base"), made.merged)
    convert(alone, tmp_path / "adapter", lora_alpha=ALPHA)
    assert_same(by_hand(load(tmp_path / "adapter"), made.model.state), made.merged)


def test_layers_for_multi_token_prediction(tmp_path: Path) -> None:
    """They are merged with the others; PEFT would pass over them, as the library does.

    Their attention has a gate for each query head, whose rows lie between those of the queries.
    """
    model = make("qwen3_next_mtp")
    inner, hub = "mtp.layers.0.transformer_layer.", "mtp.layers.0."
    modules = {
        f"{inner}self_attention.linear_qkv": [f"{hub}self_attn.{x}_proj.weight" for x in "qkv"],
        f"{inner}mlp.shared_experts.linear_fc2": [f"{hub}mlp.shared_expert.down_proj.weight"],
    }
    b_of = {
        n: small(n, (model.state[n].shape[0], RANK)) for names in modules.values() for n in names
    }
    inverse = invert(model.config, model.state | b_of).made
    made = Made(model, dict(model.state), invert(model.config, dict(model.state)).made)
    for module, names in modules.items():
        a = small(module, (RANK, model.state[names[0]].shape[1]))
        made.factors |= {
            f"{module}.adapter.linear_in.weight": a,
            f"{module}.adapter.linear_out.weight": inverse[f"{module}.weight"],
        }
        for n in names:
            update = ALPHA / RANK * (b_of[n].float() @ a.float())
            made.merged[n] = (model.state[n].float() + update).to(torch.bfloat16)
    src = folder(tmp_path / "whole", made, made.base | made.factors)
    convert(src, tmp_path / "out", lora_alpha=ALPHA)
    assert_same(load(tmp_path / "out"), made.merged)
    with pytest.raises(BadInputError, match="PEFT would pass over"):
        convert(src, tmp_path / "adapter", lora="adapter", lora_alpha=ALPHA)


def by_hand(factors: State, state: State) -> State:
    """Return the model with an adapter of PEFT's merged in."""
    merged = dict(state)
    for name in [n for n in factors if n.endswith(".lora_A.weight")]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        a, b = factors[name].float(), factors[name.replace(".lora_A.", ".lora_B.")].float()
        weight = f"{module}.weight"
        merged[weight] = (state[weight].float() + ALPHA / RANK * (b @ a)).to(torch.bfloat16)
    return merged


# --- forms of single trainers ------------------------------------------------------------------------


def test_adapters_of_parts_of_a_fused_module(tmp_path: Path) -> None:
    """CanonicalLoRA has factors for q, k, v, gate and up, and need not have all of them."""
    made, tensors = adapted("llama"), {}
    merged = dict(made.model.state)
    for key, module, part in (
        ("self_attention.linear_qkv.adapter.adapter_q", "self_attn.q_proj", 0),
        ("self_attention.linear_qkv.adapter.adapter_v", "self_attn.v_proj", 2),
        ("mlp.linear_fc1.adapter.adapter_up", "mlp.up_proj", 1),
        ("mlp.linear_fc1.adapter.adapter_gate", "mlp.gate_proj", 0),
    ):
        weight = merged[f"model.layers.1.{module}.weight"]
        a, b = small(f"{key}A{part}", (RANK, weight.shape[1])), small(key, (weight.shape[0], RANK))
        tensors[f"decoder.layers.1.{key}.linear_in.weight"] = a
        tensors[f"decoder.layers.1.{key}.linear_out.weight"] = b
        update = ALPHA / RANK * (b.float() @ a.float())
        merged[f"model.layers.1.{module}.weight"] = (weight.float() + update).to(torch.bfloat16)
    convert(
        folder(tmp_path / "whole", made, made.base | tensors), tmp_path / "out", lora_alpha=ALPHA
    )
    assert_same(load(tmp_path / "out"), merged)
    convert(folder(tmp_path / "alone", made, tensors), tmp_path / "adapter", lora_alpha=ALPHA)
    assert_same(by_hand(load(tmp_path / "adapter"), made.model.state), merged)


def test_halves_of_the_factors_of_all_experts(tmp_path: Path) -> None:
    """Megatron-Bridge, where every expert has a tensor of its own (singleton_local_shards)."""
    made, tensors = adapted("qwen3_moe"), {}
    for name, tensor in made.factors.items():
        if name.endswith("experts.linear_fc1.adapter.linear_out.weight"):
            gate, up = tensor.chunk(2, dim=1)
            tensors |= {f"{name}_w": gate.contiguous(), f"{name}_v": up.contiguous()}
        else:
            tensors[name] = tensor
    convert(folder(tmp_path / "alone", made, tensors), tmp_path / "out", lora_alpha=ALPHA)
    assert_same(by_hand(load(tmp_path / "out"), made.model.state), made.merged)


RANKS = 2
FC1 = "decoder.layers.{n}.mlp.linear_fc1"


def by_rank(rows: torch.Tensor, order: Callable[[int], list[int]]) -> torch.Tensor:
    """Return the rows as ranks' pieces lie in the global tensor: blocks in another order."""
    blocks = rows.chunk(2 * RANKS)
    return torch.cat([blocks[k] for k in order(RANKS)])


def cut(path: Path, made: Made, tensors: State, pieces: Mapping[str, int], tp: int | None) -> Path:
    """Write tensors, those in ``pieces`` in so many by rows, and a run's arguments beside them."""
    actor = folder(path, made, {"decoder.layers.0.x": torch.zeros(1)})
    shutil.rmtree(actor / "dist_ckpt")
    (actor / "dist_ckpt").mkdir()
    cuts = {}
    for name, tensor in tensors.items():
        number = pieces.get(name, 1)
        size = tensor.shape[0] // number
        cuts[name] = [
            Piece((k * size, 0), (size, tensor.shape[1]), k % RANKS) for k in range(number)
        ]
    write_dcp(actor / "dist_ckpt", tensors, cuts, {}, world=RANKS)
    (actor / "dist_ckpt/metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    if tp is not None:
        (actor / "transformer_config.json").write_text(
            json.dumps({"tensor_model_parallel_size": tp})
        )
    return actor


@pytest.mark.parametrize("halves", [1, 2], ids=["rank by rank", "in halves as the weight"])
def test_ms_swifts_rows_of_gate_and_up(halves: int, tmp_path: Path) -> None:
    """Its B of linear_fc1 is put together rank by rank: gate and up of one, gate and up of the next."""
    made = adapted("llama")
    tensors, pieces = {}, {}
    for name, tensor in made.factors.items():
        module = name.partition(".adapter.")[0]
        if not module.endswith("linear_fc1"):
            continue
        out = name.endswith("linear_out.weight")
        key = f"{module}.lora_{'B' if out else 'A'}.default.weight"
        if out:
            pieces[key] = RANKS * halves
            if halves == 1:
                tensor = by_rank(tensor, lambda n: [h * n + k for k in range(n) for h in (0, 1)])
        tensors[key] = tensor
    src = cut(tmp_path / "run", made, tensors, pieces, RANKS)
    convert(src, tmp_path / "out", lora_alpha=ALPHA)
    expected = dict(made.model.state)
    for name in expected:
        if "gate_proj" in name or "up_proj" in name:
            expected[name] = made.merged[name]
    assert_same(by_hand(load(tmp_path / "out"), made.model.state), expected)
    if halves == 1:
        src = cut(tmp_path / "untold", made, tensors, pieces, None)
        with pytest.raises(BadInputError, match="cannot determine the order of the ranks' rows"):
            convert(src, tmp_path / "none", lora_alpha=ALPHA)


def test_megatron_bridges_halves_of_what_has_none(tmp_path: Path) -> None:
    """It cuts the B of CanonicalLoRA's gate in two on every rank, as if gate and up were in it."""
    made = adapted("llama")
    weight = made.model.state["model.layers.0.mlp.gate_proj.weight"]
    a, b = small("A", (RANK, weight.shape[1])), small("B", (weight.shape[0], RANK))
    module = f"{FC1.format(n=0)}.adapter.adapter_gate"
    stored = by_rank(b, lambda n: [2 * k + h for h in (0, 1) for k in range(n)])
    tensors = {f"{module}.linear_in.weight": a, f"{module}.linear_out.weight": stored}
    src = cut(tmp_path / "run", made, tensors, {f"{module}.linear_out.weight": 2 * RANKS}, RANKS)
    convert(src, tmp_path / "out", lora_alpha=ALPHA)
    found = load(tmp_path / "out")
    assert torch.equal(found[f"{PREFIX}model.layers.0.mlp.gate_proj.lora_B.weight"], b)
    assert torch.equal(found[f"{PREFIX}model.layers.0.mlp.gate_proj.lora_A.weight"], a)


# --- a file a rank ---------------------------------------------------------------------------------


def of_ranks(
    path: Path, made: Made, *, tp: int = 1, pp: int = 1, ep: int = 1, told: bool = True
) -> Path:
    """Write an adapter as verl does: a file a rank, layers numbered within their stage.

    Ranks of expert parallelism are those of tensor parallelism, where there are both.
    """
    actor = path / "actor"
    (actor / "adapter_checkpoint").mkdir(parents=True)
    (actor / "huggingface").mkdir()
    (actor / "huggingface/config.json").write_text(json.dumps(made.model.config))
    layers = made.model.config["num_hidden_layers"]
    for t, p, e in [(t, p, e) for t in range(tp) for p in range(pp) for e in range(ep)]:
        if ep > 1 and tp > 1 and t != e:
            continue
        held = {}
        for name, tensor in made.factors.items():
            layer = int(name.split(".")[2])
            stage = torch.arange(layers).chunk(pp)[p].tolist()
            if layer not in stage:
                continue
            name = name.replace(f"layers.{layer}.", f"layers.{layer - stage[0]}.")
            experts = ".experts." in name
            if experts and tensor.ndim == 3:
                tensor = tensor.chunk(ep)[e]
            name = name.replace(".experts.experts.", ".experts.")
            held[name] = tensor if experts else share(name, tensor, t, tp)
        numbers = [f"{t:02d}", *([f"{p:03d}"] if pp > 1 else []), *([f"{e:03d}"] if ep > 1 else [])]
        file = actor / "adapter_checkpoint" / f"mp_rank_{'_'.join(numbers)}_adapter.pt"
        torch.save({"adapter_state_dict": {n: x.clone() for n, x in held.items()}}, file)
    if told:
        sizes = {"tensor": tp, "pipeline": pp, "expert": ep}
        settings = {f"{k}_model_parallel_size": n for k, n in sizes.items()}
        settings |= {"expert_tensor_parallel_size": 1, "num_layers": layers}
        (actor / "transformer_config.json").write_text(json.dumps(settings))
    return actor


def share(name: str, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """Return a rank's part, as Megatron-Bridge's parallel layers hold it."""
    if name.endswith("linear_in.weight"):
        by_columns = re.search(r"linear_(proj|fc2)\.adapter", name)
        return tensor.chunk(ranks, dim=1 if by_columns else 0)[rank]
    if ".linear_fc1." in name:
        return torch.cat([half.chunk(ranks)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(ranks)[rank]


@pytest.mark.parametrize(
    ("name", "shared", "sizes"),
    [
        ("llama", False, {}),
        ("llama", False, {"tp": 2}),
        ("llama", False, {"pp": 2}),
        ("llama", False, {"tp": 2, "pp": 2, "told": False}),
        ("qwen3_moe", False, {"ep": 2}),
        ("qwen3_moe", True, {"ep": 5}),
        ("qwen3_moe", False, {"tp": 2, "ep": 2}),
        ("qwen3_moe", True, {"tp": 2, "pp": 2}),
    ],
)
def test_a_file_a_rank(name: str, shared: bool, sizes: Any, tmp_path: Path) -> None:
    made = adapted(name, shared=shared)
    src = of_ranks(tmp_path / "run", made, **sizes)
    base = base_folder(made, tmp_path / "base")
    convert(src.parent, tmp_path / "out", base=base, lora_alpha=ALPHA)
    assert_same(load(tmp_path / "out"), made.merged)


def test_verls_own_file(bridge: Path, tmp_path: Path) -> None:
    src, base = bridge / "verl_global_step_1", bridge / "base_hf"
    convert(src, tmp_path / "out", base=base, lora_alpha=16)
    assert_same(load(tmp_path / "out"), load(bridge / "merged_hf"))
    assert streamconv.verify(tmp_path / "out", source=src).passed
    found = streamconv.inspect(src / "actor")
    assert (found["format"], found["facts"]["parallelism"]) == (
        "megatron_adapter",
        "tp 1, pp 1, ep 1, etp 1",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "mp_rank_01_000_adapter.pt").unlink(), "files of ranks are missing"),
        (lambda f: (f / "mp_rank_00_adapter.pt").write_bytes(b""), "several runs in one folder"),
        (
            lambda f: shutil.copy(f / "mp_rank_00_001_adapter.pt", f / "mp_rank_00_002_adapter.pt"),
            "written by another rank than its name says",
        ),
        (lambda f: rewritten(f, "mp_rank_00_001_adapter.pt", "layers.0"), "pipeline stage belong"),
        (lambda f: rewritten(f, "mp_rank_01_001_adapter.pt", "linear_fc2"), "of different modules"),
        (
            lambda f: (f.parent / "transformer_config.json").write_text(
                json.dumps({"virtual_pipeline_model_parallel_size": 2})
            ),
            "the rest of the adapter was not saved",
        ),
    ],
)
def test_ranks_that_do_not_go_together(change: Any, message: str, tmp_path: Path) -> None:
    src = of_ranks(tmp_path / "run", adapted("llama"), tp=2, pp=2)
    change(src / "adapter_checkpoint")
    with pytest.raises(BadInputError, match=message):
        convert(src, tmp_path / "out", lora_alpha=ALPHA)


def rewritten(folder: Path, file: str, without: str) -> None:
    """Leave out what has ``without`` in its name, on all ranks of the stage for a layer."""
    files = [file] if "layers" not in without else [file, file.replace("00_", "01_", 1)]
    for name in files:
        state = torch.load(folder / name)["adapter_state_dict"]
        last = max(n.split(".")[2] for n in state)
        gone = f"layers.{last}." if "layers" in without else without
        kept = {n: t for n, t in state.items() if gone not in n}
        torch.save({"adapter_state_dict": kept}, folder / name)


# --- what cannot be --------------------------------------------------------------------------------


def test_an_adapter_of_fused_experts_has_no_module(tmp_path: Path) -> None:
    made = Made(make("gpt_oss"), {}, {})
    made.base = invert(made.model.config, dict(made.model.state)).made
    module = "decoder.layers.0.mlp.experts.experts.linear_fc2"
    number, rows, columns = made.base[f"{module}.weight"].shape
    tensors = {
        f"{module}.adapter.linear_in.weight": small("A", (number, RANK, columns)),
        f"{module}.adapter.linear_out.weight": small("B", (number, rows, RANK)),
    }
    src = folder(tmp_path / "alone", made, tensors)
    with pytest.raises(BadInputError, match="not a module of its own"):
        convert(src, tmp_path / "out", lora_alpha=ALPHA)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.adapter.weight_magnitude", "of DoRA"),
        (
            "decoder.layers.0.self_attention.linear_qkv.lora_B.bias",
            "no place in HuggingFace's",
        ),
        (
            "decoder.layers.0.self_attention.linear_z.adapter.linear_out.weight",
            "incomplete adapter",
        ),
        ("decoder.layers.7.mlp.linear_fc2.adapter.linear_out.weight", "incomplete adapter"),
    ],
)
def test_parts_that_are_not_understood(name: str, message: str, tmp_path: Path) -> None:
    made = adapted("llama")
    shape = (64,) if name.endswith(("magnitude", "bias")) else (64, RANK)
    src = folder(tmp_path / "alone", made, made.factors | {name: small("x", shape)})
    with pytest.raises(BadInputError, match=message):
        convert(src, tmp_path / "out", lora_alpha=ALPHA)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("decoder.layers.0.self_attention.linear_z", "knows no rule"),
        ("decoder.layers.9.mlp.linear_fc2", "are not in LlamaForCausalLM"),
    ],
)
def test_modules_that_the_model_lacks(module: str, message: str, tmp_path: Path) -> None:
    made = adapted("llama")
    old = "decoder.layers.0.mlp.linear_fc2."
    moved = {n.replace(old, f"{module}."): t for n, t in made.factors.items() if n.startswith(old)}
    src = folder(tmp_path / "alone", made, moved)
    with pytest.raises(BadInputError, match=message):
        convert(src, tmp_path / "out", lora_alpha=ALPHA)


def test_what_is_needed_is_asked_for(bridge: Path, tmp_path: Path) -> None:
    src, base = bridge / "only/iter_0000001", bridge / "base_hf"
    with pytest.raises(BadInputError, match="needs the model's config"):
        convert(src, tmp_path / "out", lora_alpha=16)
    with pytest.raises(BadInputError, match="lora_alpha is not known"):
        convert(src, tmp_path / "out", hf_config=base)
    with pytest.raises(BadInputError, match="does not hold the weight"):
        convert(src, tmp_path / "out", hf_config=base, lora_alpha=16, lora="merge")
    with pytest.raises(UsageError, match="this one has them"):
        convert(bridge / "full", tmp_path / "out", base=base, lora_alpha=16)
    with pytest.raises(BadInputError, match="rank is not what its settings say"):
        convert(src, tmp_path / "out", base=base, lora_alpha=16, lora_rank=4)


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == []


def assert_peft_merges(adapter: Path, base: Path, merged: State) -> None:
    """PEFT makes of the folder what was merged, but for the order of sums, and passes over nothing."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made = peft.PeftModel.from_pretrained(model, adapter)
    used = {n.replace(".default", "") for n, _ in made.named_parameters() if ".lora_" in n}
    assert used == load_file(adapter / "adapter_model.safetensors").keys()
    state = made.merge_and_unload().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(state[name].to(tensor.dtype), tensor, rtol=1e-2, atol=1e-4)
