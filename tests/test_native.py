"""Names of trainers with models of their own, both ways.

``scripts/makers/native_inverse.py`` turns tiny models of transformers into what a trainer's own loader
makes of them. The rules must undo that, tensor by tensor, byte by byte, and refuse what is incomplete,
unknown, of another size, or of a model that the trainer's map has not.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import streamconv
from scripts.docs_pages import families
from scripts.makers.dcp import Pieces, save_alone
from scripts.makers.native_inverse import TRAINERS, balancing, make
from scripts.makers.tiny_families import State, TinyModel
from scripts.outputs import differences, read_model
from streamconv.errors import BadInputError, UsageError
from streamconv.families import native
from streamconv.families.converted import Converted
from streamconv.families.native import convert as conversion
from streamconv.families.native.beside import said_of_run
from streamconv.options import JobOptions
from streamconv.planning import checks
from tests.replay import array, dtype_of, replay

CASES = [(trainer, model) for trainer, found in TRAINERS.items() for model in found.models]
every_case = pytest.mark.parametrize(("trainer", "name"), CASES, ids=lambda x: str(x))


@functools.cache
def taken_apart(trainer: str, name: str) -> tuple[TinyModel, State]:
    model = make(name)
    return model, TRAINERS[trainer].names(model)


def plan(
    config: Mapping[str, Any] | None, tensors: State, run: Mapping[str, Any] | None = None
) -> Converted:
    """Plan in this process, with the checks that a conversion makes."""
    dialect = native.find(list(tensors))
    assert dialect is not None
    headers = {key: (tuple(t.shape), dtype_of(t)) for key, t in tensors.items()}
    made = conversion.convert(dialect, headers, config, run or {}, JobOptions())
    if made.model is not None:
        checks.check_recipes(made.recipes, made.model, JobOptions(), made.extras)
    return made


@pytest.fixture
def _models_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build transformers' model of a config once: the mutations ask for the same one."""
    build, built = conversion.build_meta, {}

    def once(config: Mapping[str, Any], names: Collection[str] = ()) -> Any:
        key = json.dumps([config, sorted(names)])
        if key not in built:
            built[key] = build(config, names)
        return built[key]

    monkeypatch.setattr(conversion, "build_meta", once)


def one_of_each_kind(tensors: State) -> list[str]:
    """Return a name for all that differ in numbers only."""
    return list({tuple(p for p in k.split(".") if not p.isdigit()): k for k in tensors}.values())


# --- the rules against the oracle ------------------------------------------------------------


@every_case
def test_the_rules_undo_the_oracle(trainer: str, name: str) -> None:
    model, tensors = taken_apart(trainer, name)
    arrays = {key: array(t) for key, t in tensors.items()}
    made = {r.name: replay(r, arrays) for r in plan(model.config, tensors).recipes}
    assert sorted(made.keys() ^ model.state.keys()) == []
    for key, expected in model.state.items():
        assert made[key].shape == tuple(expected.shape), key
        assert made[key].tobytes() == array(expected).tobytes(), key


@every_case
@pytest.mark.usefixtures("_models_once")
def test_no_tensor_may_be_missing(trainer: str, name: str) -> None:
    """Without the names by which it is known, it is not the trainer's."""
    model, tensors = taken_apart(trainer, name)
    may_lack = {"rope.freqs"}
    if model.config["tie_word_embeddings"]:
        may_lack |= {"lm_head.weight", "output.weight"}
    for key in one_of_each_kind(tensors):
        left = {k: t for k, t in tensors.items() if k != key}
        if key in may_lack or native.find(list(left)) is None:
            continue
        with pytest.raises(BadInputError, match=r"not in the checkpoint|not all there"):
            plan(model.config, left)


@every_case
@pytest.mark.usefixtures("_models_once")
def test_no_tensor_may_be_of_another_size(trainer: str, name: str) -> None:
    model, tensors = taken_apart(trainer, name)
    for key in one_of_each_kind(tensors):
        for axis in range(tensors[key].ndim if key != "rope.freqs" else 0):
            other = torch.cat([tensors[key], tensors[key].narrow(axis, 0, 1)], dim=axis)
            with pytest.raises(BadInputError, match=r"shape|contradict|make up"):
                plan(model.config, tensors | {key: other})


@every_case
@pytest.mark.usefixtures("_models_once")
def test_no_tensor_may_be_unknown(trainer: str, name: str) -> None:
    model, tensors = taken_apart(trainer, name)
    prefix = TRAINERS[trainer].prefix
    layer = next(k for k in tensors if ".0." in k).partition(".0.")[0]
    for key in (f"{layer}.0.strange.weight", f"{prefix}strange.weight", "beside.weight"):
        with pytest.raises(BadInputError, match="knows no rule") as refused:
            plan(model.config, tensors | {key: torch.zeros(3)})
        assert key.rsplit(".", 2)[1] in str(refused.value)


# --- whose names they are ----------------------------------------------------------------------


@every_case
def test_the_names_tell_whose_they_are(trainer: str, name: str) -> None:
    """Whatever stands before them, wrappers inside them or not."""
    model, tensors = taken_apart(trainer, name)
    prefix = TRAINERS[trainer].prefix
    found = native.find(list(tensors))
    assert found is not None
    for other in ("", "app.state.", "a.b.c.d."):
        moved = {other + k.removeprefix(prefix): t for k, t in tensors.items()}
        assert native.find(list(moved)) is found
        assert found.prefix(moved) == other
    assert native.find(list(model.state)) is None


@pytest.mark.usefixtures("_models_once")
def test_markers_of_wrappers_are_left_out() -> None:
    model, tensors = taken_apart("torchtitan", "llama")
    wrapped = {
        f"_orig_mod.{k.replace('.attention.', '._checkpoint_wrapped_module.attention.')}": t
        for k, t in tensors.items()
    }
    made = plan(model.config, wrapped)
    assert {r.name for r in made.recipes} == set(model.state)
    assert {s for r in made.recipes for s in r.view.sources()} == set(wrapped)


def test_the_page_of_families_lists_them() -> None:
    page = families()
    for dialect in native.dialects():
        types = ", ".join(t for f in dialect.families for t in f.model_types)
        assert f"| {dialect.name} | {types} |" in page


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["torchtitan", "olmo_core", "torchtune", "litgpt"])
def test_a_model_type_without_a_map_is_refused_by_the_trainers_name(trainer: str) -> None:
    model, tensors = taken_apart(trainer, "llama")
    dialect = native.find(list(tensors))
    assert dialect is not None
    with pytest.raises(BadInputError) as refused:
        plan(dict(model.config) | {"model_type": "glm4"}, tensors)
    assert dialect.name in str(refused.value)
    assert "'glm4'" in str(refused.value)
    assert refused.value.hint
    with pytest.raises(BadInputError, match="no model_type"):
        plan({"model": {"d_model": 48}}, tensors)
    with pytest.raises(BadInputError, match=r"no config\.json") as refused:
        plan(None, tensors)
    assert dialect.name in str(refused.value)
    assert "--hf-config" in str(refused.value.hint)


def test_a_map_that_contradicts_its_model_is_refused() -> None:
    model, tensors = taken_apart("torchtune", "gemma")
    with pytest.raises(BadInputError, match="'gemma2' are not read") as refused:
        plan(dict(model.config) | {"model_type": "gemma2"}, tensors)
    assert "the other way round" in str(refused.value.found)


def test_adapters_are_refused() -> None:
    model, tensors = taken_apart("torchtune", "llama")
    key = "layers.0.attn.q_proj.lora_a.weight"
    with pytest.raises(BadInputError, match="adapter") as refused:
        plan(model.config, tensors | {key: torch.zeros(4, 48)})
    assert refused.value.where == key


def test_another_order_of_rotary_rows_is_refused() -> None:
    """The config asks HuggingFace's DeepSeek for the rows that torchtitan has not."""
    model = make("deepseek_halves")
    with pytest.raises(BadInputError, match="rotary rows"):
        plan(model.config, TRAINERS["torchtitan"].names(model))


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(("name", "layers"), [("qwen3_moe", 3), ("deepseek_v2", 2)])
def test_a_bias_that_only_balances_experts_is_left_out(name: str, layers: int, new: bool) -> None:
    model, tensors = taken_apart("torchtitan" if new else "torchtitan_0.2", name)
    biases = balancing(tensors, 3, 5, new=new)
    assert len(biases) == layers
    made = plan(model.config, tensors | biases)
    assert {s.name for s in made.skipped} == set(biases)
    assert any("balances the load" in n for n in made.notices)


# --- the order of rows -------------------------------------------------------------------------


def test_pairs_turned_as_complex_numbers_are_halves_turned_by_transformers() -> None:
    """Attention scores are the same: rotary embedding on both sides, each with its own rows."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, tensors = taken_apart("torchtitan", "llama")
    n, g, d, words = 6, 2, 8, 5
    x = torch.randn(words, 48, generator=torch.Generator().manual_seed(0))
    angles = torch.outer(torch.arange(words), 1.0 / 10000 ** (torch.arange(0, d, 2) / d))

    def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ weight.float().T).view(words, heads, d // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones(()), angles)[:, None]).flatten(2)

    layer = "layers.0.attention.qkv_linear."
    ours = torch.einsum(
        "qhd,khd->hqk",
        turned(tensors[layer + "wq.weight"], n),
        turned(tensors[layer + "wk.weight"], g).repeat_interleave(n // g, dim=1),
    )
    q, k = (
        (x @ model.state[f"model.layers.0.self_attn.{p}_proj.weight"].float().T)
        .view(1, words, heads, d)
        .transpose(1, 2)
        for p, heads in (("q", n), ("k", g))
    )
    both = torch.cat((angles, angles), dim=-1)[None]
    q, k = apply_rotary_pos_emb(q, k, both.cos(), both.sin())
    theirs = q[0] @ k[0].repeat_interleave(n // g, dim=0).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)


def test_heads_of_another_model_are_refused() -> None:
    """Twelve heads make up the rows of six: only what lies beside the weights can tell."""
    model, tensors = taken_apart("meta", "llama")
    other = dict(model.config) | {
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 4,
    }
    assert any("12 query heads" in n for n in plan(other, tensors).notices)
    run = {"num_attention_heads": 6, "num_query_groups": 2}
    with pytest.raises(BadInputError, match="query heads"):
        plan(other, tensors, run)
    assert not any("query heads" in n for n in plan(model.config, tensors, run).notices)


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize(
    ("trainer", "name", "text", "word"),
    [
        (
            "meta",
            "params.json",
            '{"n_heads": 6, "n_kv_heads": 2, "rope_theta": 5e5}',
            "rotary_base",
        ),
        (
            "litgpt",
            "model_config.yaml",
            "n_head: 6\nn_query_groups: 2\nnorm_eps: 1e-04\n",
            "layernorm_epsilon",
        ),
    ],
)
def test_a_setting_that_no_tensor_shows_is_compared(
    trainer: str, name: str, text: str, word: str, tmp_path: Path
) -> None:
    model, tensors = taken_apart(trainer, "llama")
    step = write_dcp(tmp_path / "run", model, tensors)
    (step.parent / name).write_text(text)
    with pytest.raises(BadInputError, match="contradict") as refused:
        streamconv.convert(step, tmp_path / "out", hf_config=step.parent, sync=False)
    assert word in str(refused.value.found)


@pytest.mark.usefixtures("planned_here")
def test_a_default_of_litgpts_is_told(tmp_path: Path) -> None:
    """Its own config of Gemma 2 has another epsilon than Gemma 2: nobody chose it."""
    model, tensors = taken_apart("litgpt", "gemma2")
    step = write_dcp(tmp_path / "run", model, tensors)
    text = "n_head: 6\nn_query_groups: 2\nhead_size: 12\nnorm_eps: 1.0e-05\n"
    (step.parent / "model_config.yaml").write_text(text)
    planned = streamconv.plan(step, tmp_path / "plan", hf_config=step.parent)
    assert any("which is litgpt's default" in n for n in planned.head.notices)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("params.json", '{"dim": 48, "n_heads": 6, "n_kv_heads": 2}'),
        ("model_config.yaml", "n_embd: 48\nn_head: 6\nn_query_groups: 2\n"),
    ],
)
def test_what_lies_beside_tells_the_heads(name: str, text: str, tmp_path: Path) -> None:
    step = tmp_path / "step"
    step.mkdir()
    assert said_of_run(step) == {}
    (tmp_path / name).write_text(text)
    said = said_of_run(step)
    assert (said["num_attention_heads"], said["num_query_groups"]) == (6, 2)
    (step / name).write_text(text.replace("6", "4").replace("2", "4"))
    assert said_of_run(step)["num_attention_heads"] == 4
    (step / name).write_text("[")
    assert said_of_run(step)["num_attention_heads"] == 6


# --- whole conversions -------------------------------------------------------------------------


def write_dcp(folder: Path, model: TinyModel, tensors: State, *, moments: bool = True) -> Path:
    """Write a step of torch's own writer, an optimizer's state beside it, and config.json above."""
    names = tensors if moments else ()
    state = {f"optimizer.state.{k}.exp_avg": torch.zeros_like(tensors[k]) for k in names}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config))
    return save_alone(folder / "step-10", {**tensors, **state})


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize(
    ("trainer", "name"),
    [
        ("torchtitan", "llama3_tied"),
        ("torchtitan", "deepseek_v3"),
        ("torchtitan_0.2", "qwen3_moe"),
        ("olmo_core", "olmo2"),
        ("olmo_core", "gemma3_norms"),
        ("torchtune", "qwen3"),
        ("litgpt", "gemma2"),
    ],
)
def test_a_step_becomes_the_model(trainer: str, name: str, tmp_path: Path) -> None:
    model, tensors = taken_apart(trainer, name)
    step = write_dcp(tmp_path / "run", model, tensors)
    streamconv.convert(step, tmp_path / "out", hf_config=step.parent, sync=False)
    made = {k: t for f in (tmp_path / "out").glob("*.safetensors") for k, t in load_file(f).items()}
    assert made.keys() == model.state.keys()
    for key, expected in model.state.items():
        assert made[key].dtype == expected.dtype
        assert torch.equal(made[key], expected), key
    reference = tmp_path / "reference"
    tiny = model.tiny
    config = getattr(transformers, tiny.config_class).from_dict(dict(model.config))
    class_ = getattr(transformers, tiny.model_class)
    class_.from_pretrained(None, config=config, state_dict=model.state).save_pretrained(reference)
    ids = torch.arange(8)[None]
    logits = [
        class_.from_pretrained(folder, experts_implementation="eager")(ids).logits
        for folder in (tmp_path / "out", reference)
    ]
    assert torch.equal(*logits)


def cut(tensor: torch.Tensor, turn: int) -> torch.Tensor:
    """Cut a tensor unevenly as ranks may: along the first axis, the last, or both."""
    axes = [(0,), (tensor.ndim - 1,), (0, tensor.ndim - 1)][turn % 3]
    ranges = [
        [(0, n)] if d not in axes or n < 3 else [(0, n // 3), (n // 3, n - n // 3)]
        for d, n in enumerate(tensor.shape)
    ]
    boxes = [tuple(zip(*box, strict=True)) for box in itertools.product(*ranges)]
    return Pieces(tensor, [(tuple(o), tuple(s)) for o, s in boxes])


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize(
    ("trainer", "name"),
    [
        ("torchtitan", "llama"),
        ("torchtitan", "qwen3_moe"),
        ("torchtitan", "qwen3_5_alone"),
        ("olmo_core", "flex_olmo"),
        ("torchtune", "phi3"),
        ("litgpt", "gpt_neox"),
    ],
)
def test_ranks_may_cut_anywhere(trainer: str, name: str, tmp_path: Path) -> None:
    """Within a head, an expert or a pair of rows."""
    model, tensors = taken_apart(trainer, name)
    pieces = {k: cut(t, turn) for turn, (k, t) in enumerate(tensors.items())}
    step = write_dcp(tmp_path / "run", model, pieces, moments=False)
    streamconv.convert(step, tmp_path / "out", hf_config=step.parent, sync=False)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made.keys() == model.state.keys()
    for key, expected in model.state.items():
        assert torch.equal(made[key], expected), key


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize("same", [True, False])
def test_a_tied_output_layer_that_is_stored(same: bool, tmp_path: Path) -> None:
    """torchtitan stores it; where it is another, config.json is told that it is not tied."""
    model, tensors = taken_apart("torchtitan", "llama3_tied")
    embedding = tensors["tok_embeddings.weight"]
    output = embedding.clone() if same else embedding + 1
    step = write_dcp(tmp_path / "run", model, tensors | {"lm_head.weight": output})
    streamconv.convert(step, tmp_path / "out", hf_config=step.parent, sync=False)
    made = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is same
    assert ("lm_head.weight" in made) is not same
    assert made.keys() - {"lm_head.weight"} == model.state.keys()
    if not same:
        assert torch.equal(made["lm_head.weight"], output)


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("trainer", "file"),
    [("litgpt", "lit_model.pth"), ("torchtune", "torchtune_model_0.pt"), ("meta", "model.pt")],
)
def test_a_single_file(trainer: str, file: str, nested: bool, tmp_path: Path) -> None:
    """With the trainer's keys around the state dict, and without any."""
    model, tensors = taken_apart(trainer, "llama")
    tensors = {k.removeprefix(TRAINERS[trainer].prefix): t for k, t in tensors.items()}
    torch.save({"model": tensors, "epoch": 1} if nested else tensors, tmp_path / file)
    with pytest.raises(BadInputError, match="names"):
        streamconv.convert(tmp_path, tmp_path / "out", sync=False)
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    streamconv.convert(tmp_path / file, tmp_path / "out", sync=False)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made.keys() == model.state.keys()
    assert all(torch.equal(made[k], t) for k, t in model.state.items())


@pytest.mark.usefixtures("planned_here")
def test_a_model_of_the_hub_may_have_such_names(tmp_path: Path) -> None:
    """InternLM2's own code has Meta's words; its names are the Hub's."""
    layers = ["attention.wqkv", "attention.wo", "attention_norm", "ffn_norm", "feed_forward.w1"]
    names = ["model.tok_embeddings", "model.norm", "output"]
    names += [f"model.layers.0.{x}" for x in layers]
    torch.save({f"{n}.weight": torch.zeros(3) for n in names}, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text('{"model_type": "internlm2"}')
    streamconv.convert(tmp_path / "model.pt", tmp_path / "out", sync=False)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {
        f"{n}.weight" for n in names
    }


@pytest.mark.usefixtures("planned_here")
def test_a_run_of_olmo_core_as_it_lies(tmp_path: Path) -> None:
    """The config.json in a step is OLMo-core's own, and the weights lie a folder deeper."""
    model, tensors = taken_apart("olmo_core", "olmo2")
    state = {
        f"optim.state.{k.removeprefix('model.')}.{part}": torch.zeros_like(t)
        for k, t in tensors.items()
        for part in ("exp_avg", "exp_avg_sq")
    }
    step = tmp_path / "run" / "step100"
    (step / "train").mkdir(parents=True)
    (step / "train" / "rank0.pt").write_bytes(b"?")
    (step / ".metadata.json").write_text('{"version": "3.0.0"}')
    (step / "config.json").write_text('{"model": {"d_model": 48, "vocab_size": 61}}')
    save_alone(step / "model_and_optim", {**tensors, **state})
    with pytest.raises(BadInputError, match="no config") as refused:
        streamconv.convert(step, tmp_path / "out", sync=False)
    assert "OLMo-core" in str(refused.value)
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(model.config))
    streamconv.convert(step, tmp_path / "out", hf_config=hf, sync=False)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made.keys() == model.state.keys()
    assert all(torch.equal(made[k], t) for k, t in model.state.items())


@pytest.mark.usefixtures("planned_here")
def test_the_names_of_the_state_dict_are_no_models(tmp_path: Path) -> None:
    model, tensors = taken_apart("torchtitan", "llama")
    step = write_dcp(tmp_path / "run", model, tensors)
    with pytest.raises(UsageError, match="--layout memory") as refused:
        streamconv.convert(
            step, tmp_path / "out", hf_config=step.parent, layout="memory", sync=False
        )
    assert "torchtitan" in str(refused.value)
    (step.parent / "config.json").unlink()
    streamconv.convert(step, tmp_path / "out", layout="memory", sync=False)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


@pytest.mark.usefixtures("planned_here")
def test_a_model_that_transformers_lacks(tmp_path: Path) -> None:
    model, tensors = taken_apart("torchtitan", "kimi_k2")
    step = write_dcp(tmp_path / "run", model, tensors)
    streamconv.convert(step, tmp_path / "out", hf_config=step.parent, sync=False)
    assert set(read_model(tmp_path / "out")) == set(model.state)


@pytest.mark.usefixtures("planned_here")
def test_an_average_beside_the_model_is_asked_about(tmp_path: Path) -> None:
    model, tensors = taken_apart("torchtitan", "llama")
    average = {f"ema.{k}": t + 1 for k, t in tensors.items()}
    folder = save_alone(tmp_path / "step-1", tensors | average)
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    with pytest.raises(UsageError, match="2 models to choose from"):
        streamconv.convert(folder, tmp_path / "out", hf_config=tmp_path, sync=False)
    streamconv.convert(folder, tmp_path / "out", hf_config=tmp_path, model="ema", sync=False)
    norm = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(norm, model.state["model.norm.weight"] + 1)


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize(
    ("case", "folder"),
    [
        ("torchtitan_030_llama3", "step-10"),
        ("litgpt_sharded", "step-00000010/lit_model.pth"),
    ],
)
def test_the_shared_cases(case: str, folder: str, shared_checkpoints: Path, tmp_path: Path) -> None:
    root = shared_checkpoints / "layouts" / case
    streamconv.convert(
        root / "src" / folder, tmp_path / "out", hf_config=root / "truth", sync=False
    )
    assert differences(read_model(tmp_path / "out"), read_model(root / "truth")) == []


@pytest.mark.usefixtures("planned_here")
def test_the_shared_case_of_torchtune(shared_checkpoints: Path, tmp_path: Path) -> None:
    """Its query and key rows are HuggingFace's, which torchtune's never are: they come out moved.

    Logits are the judge: torchtune 0.6.1's llama3 with these weights differs from HuggingFace's by
    6e-7 with the rows that come out, and by 0.8 (of 2) with those of the folder beside it.
    """
    root = shared_checkpoints / "layouts" / "torchtune_dcp"
    streamconv.convert(
        root / "src" / "epoch_0", tmp_path / "out", hf_config=root / "truth", sync=False
    )
    made, truth = (load_file(p / "model.safetensors") for p in (tmp_path / "out", root / "truth"))
    assert made.keys() == truth.keys()
    for name, expected in truth.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = {"q": 4, "k": 2}[name[-13]]
            rows = expected.view(heads, 4, 2, -1)
            expected = torch.cat((rows[:, :, 0], rows[:, :, 1]), dim=1).flatten(0, 1)
        assert torch.equal(made[name], expected), name
