"""Megatron checkpoints made by megatron-core itself become the model they were made of."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from scripts.makers import megatron, tiny_families
from scripts.makers.dcp import save_alone
from scripts.makers.megatron_inverse import invert
from scripts.outputs import differences, read_model
from streamconv.errors import BadInputError, UsageError
from streamconv.families import ops
from streamconv.families.convert import convert
from streamconv.families.rules import Dims
from streamconv.formats import find_model
from streamconv.formats.dcp import plain_dcp
from streamconv.formats.megatron import torch_dist
from streamconv.formats.megatron.facts import OF_MODEL
from streamconv.formats.megatron.names import place
from streamconv.options import JobOptions
from tests.stored import stored

CASES = ("llama_tp2pp2", "qwen2_tp2pp2_tied", "v0192_llama", "qwen3_moe_tp2ep2", "v0122_deepseek")
LAYOUTS = ("global_step_1/actor", "mlm_dist", "verl_ranks", "mlm_ranks")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_bit_for_bit(case: str, layout: str, shared_checkpoints: Path, tmp_path: Path) -> None:
    root = shared_checkpoints / "megatron" / case
    answer = root / "hf_answer"
    streamconv.convert(root / layout, tmp_path / "out", hf_config=answer, sync=False)
    assert differences(read_model(tmp_path / "out"), read_model(answer)) == []


@pytest.mark.parametrize("folder", ["step_10", "step_10/policy", "step_10/policy/weights"])
def test_the_folders_of_nemo_rl(folder: str, shared_checkpoints: Path) -> None:
    root = shared_checkpoints / "megatron_cases/nemo_rl_layout"
    assert find_model(root / folder).root == root / "step_10/policy/weights/iter_0000000"


def test_the_older_layout_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    (tmp_path / "decoder.layers.mlp.linear_fc2.weight").mkdir()
    with pytest.raises(BadInputError, match="zarr layout"):
        find_model(tmp_path)


def test_a_later_save_of_a_constant_structure(shared_checkpoints: Path, tmp_path: Path) -> None:
    """Its index says of every rank's plan where the files go, by a class of torch's file system."""
    root = shared_checkpoints / "megatron_cases/constant_structure"
    answer = root / "hf_truth"
    streamconv.convert(root / "iter_0000002", tmp_path / "out", hf_config=answer, sync=False)
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


def test_interleaved_experts_are_refused() -> None:
    """An experiment of Megatron-Core 0.19 that changes no shape: only its arguments tell."""
    facts = {"moe_mlp_glu_interleave_size": 32}
    with pytest.raises(BadInputError, match="gate and up rows are interleaved"):
        convert({}, {"model_type": "qwen3_moe"}, facts, JobOptions())


HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "hidden_size": 64}
ROWS = torch.empty(128, 64, device="meta")


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 8},
        {"num_query_groups": 4, "group_query_attention": True},
    ],
)
def test_heads_that_agree_with_the_run(run: dict[str, object]) -> None:
    query, key, value = ops.qkv(Dims(HEADS, run), ROWS)
    assert (query.shape[0], key.shape[0], value.shape[0]) == (64, 32, 32)


def test_without_grouped_queries_the_number_of_groups_is_a_mere_default() -> None:
    ungrouped = HEADS | {"num_key_value_heads": 8}
    run = {"num_attention_heads": 8, "num_query_groups": 1, "group_query_attention": False}
    query, key, value = ops.qkv(Dims(ungrouped, run), torch.empty(192, 64, device="meta"))
    assert query.shape == key.shape == value.shape == (64, 64)
    with pytest.raises(BadInputError, match="number of query groups"):
        ops.qkv(Dims(HEADS, run), ROWS)


@pytest.mark.parametrize(
    ("run", "what"),
    [
        ({"num_attention_heads": 16}, "number of query heads"),
        ({"num_query_groups": 8}, "number of query groups"),
        ({"kv_channels": 4}, "width of a head"),
    ],
)
def test_heads_that_fill_the_same_rows_are_refused(run: dict[str, object], what: str) -> None:
    with pytest.raises(BadInputError, match=f"contradict each other: the {what}"):
        ops.qkv(Dims(HEADS, run), ROWS)


def test_a_run_that_tells_no_heads_is_noticed(shared_checkpoints: Path, tmp_path: Path) -> None:
    root = shared_checkpoints / "megatron/llama_tp2pp2"
    for layout, count in (("verl_ranks", 1), ("mlm_ranks", 0)):
        planned = streamconv.plan(root / layout, hf_config=root / "hf_answer")
        assert sum("numbers of heads cannot be checked" in n for n in planned.head.notices) == count


def test_only_padding_is_cut_off_the_vocabulary() -> None:
    dims = Dims({"vocab_size": 300}, {"vocab_size": 290})  # a config may count more than the run
    assert ops.vocab(dims, ROWS.new_empty(320, 64)).shape == (300, 64)
    with pytest.raises(BadInputError, match="size of the vocabulary"):
        ops.vocab(Dims({"vocab_size": 160}, {"vocab_size": 300}), ROWS.new_empty(320, 64))


@pytest.mark.parametrize("layout", ["mlm_dist", "global_step_1/actor/dist_ckpt"])
def test_the_run_is_known_without_the_file_that_names_the_layout(
    layout: str, shared_checkpoints: Path, tmp_path: Path
) -> None:
    """What a run says decides how some tensors are read, so it must not get lost with it."""
    source = shared_checkpoints / "megatron/llama_tp2pp2" / layout
    copy = tmp_path / "run" / "weights"
    shutil.copytree(next(source.rglob(".metadata")).parent, copy)
    for config in source.parent.glob("transformer_config.json"):
        shutil.copy(config, copy.parent)
    expected = torch_dist.read(copy).facts["megatron"]
    copy.chmod(0o755)
    (copy / "metadata.json").unlink()
    assert expected
    found = plain_dcp.read(copy)
    assert found.facts["megatron"] == expected
    assert ["metadata.json" in n for n in found.notices] == [True]


# --- where a run keeps its models -----------------------------------------------------------------


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """verl's folder of a tiny model: ``dist_ckpt/`` and ``huggingface/``."""
    root = tmp_path_factory.mktemp("run")
    return megatron.save_family(root, tiny_families.make("qwen3"), megatron.Options())


def test_a_run_of_megatron_lm(actor: Path, tmp_path: Path) -> None:
    shutil.copytree(actor / "dist_ckpt", tmp_path / "iter_0000003")
    location = find_model(tmp_path)
    assert (location.format, location.root.name) == ("torch_dist", "iter_0000003")
    shutil.copytree(actor / "dist_ckpt", tmp_path / "iter_0000012")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(UsageError, match="a run with 2 training steps") as caught:
        find_model(tmp_path)
    assert "iter_0000003 (the latest" in str(caught.value.hint)


def test_actor_and_critic_of_verl(actor: Path, tmp_path: Path) -> None:
    step = tmp_path / "global_step_7"
    shutil.copytree(actor / "dist_ckpt", step / "actor/model/dist_ckpt")
    shutil.copytree(actor, step / "critic")
    with pytest.raises(UsageError, match="2 models to choose from"):
        find_model(tmp_path)
    (step / "actor/huggingface").mkdir()
    location = find_model(tmp_path, "actor")
    assert location.root == step / "actor"
    assert location.side_dir == step / "actor/huggingface"
    assert location.identify() == torch_dist.read(location.root).files


def test_an_adapter_that_verl_wrote_beside_no_weights(tmp_path: Path) -> None:
    folder = tmp_path / "actor/dist_ckpt"
    save_alone(folder, {"optimizer.state.exp_avg.x": torch.zeros(3)})
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (tmp_path / "actor/adapter_checkpoint").mkdir()
    (tmp_path / "actor/huggingface").mkdir()
    with pytest.raises(BadInputError, match="an adapter was trained") as caught:
        torch_dist.read(tmp_path / "actor")
    assert str(tmp_path / "actor/adapter_checkpoint") in str(caught.value.found)
    (tmp_path / "actor/huggingface/model.safetensors").touch()
    with pytest.raises(BadInputError, match="an adapter was trained") as caught:
        torch_dist.read(tmp_path / "actor")
    assert "no file says" in str(caught.value.hint)


def test_ranges_of_quantizers_in_a_dcp_folder(tmp_path: Path) -> None:
    at = "model.layers.0.mlp.up_proj."
    names = ("input_quantizer._amax", "weight_quantizer._global_amax", "weight_quantizers.3._amax")
    save_alone(tmp_path, {at + n: torch.ones(1) for n in ("weight", *names)})
    checkpoint = plain_dcp.read(tmp_path)
    assert [*checkpoint.tensors] == [at + "weight"]
    assert [(s.name, s.reason) for s in checkpoint.skipped] == [
        ("3 tensors", "quantizer state (ModelOpt)")
    ]


def test_the_ranges_of_modelopts_quantizers_are_no_weights(
    shared_checkpoints: Path, tmp_path: Path
) -> None:
    root = shared_checkpoints / "megatron_cases/modelopt_quantizers"
    source = root / "modelopt/iter_0000001"
    streamconv.convert(source, tmp_path / "out", hf_config=root / "hf", sync=False)
    assert differences(read_model(tmp_path / "out"), read_model(root / "hf")) == []
    assert any("quantizer state" in s.reason for s in torch_dist.read(source).skipped)


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize("options", [{}, {"dequantize": True}, {"quantize": "fp8-block"}])
def test_codes_of_fp8_under_megatrons_names_are_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_families.make("llama")
    tensors = dict(invert(model.config, model.state).made)
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    for dtype in (torch.float8_e4m3fn, torch.uint8):
        name = "decoder.layers.0.mlp.linear_fc2.weight"
        tensors[name] = tensors[name].to(dtype)
        source = save_alone(tmp_path / str(dtype), tensors)
        with pytest.raises(BadInputError, match="quantized weights have no scale") as caught:
            streamconv.convert(source, tmp_path / "out", hf_config=tmp_path, **options)
        assert "layers.0.mlp.down_proj" in str(caught.value.where)
    assert not (tmp_path / "out").exists()


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored_name", "name"),
    [
        ("decoder.layers.mlp.linear_fc2.weight", "decoder.layers.{layer}.mlp.linear_fc2.weight"),
        ("decoder.layers.3.mlp.linear_fc1.weight_v", "decoder.layers.3.mlp.linear_fc1.weight"),
        (
            "mtp.layers.0.mtp_model_layer.mlp.linear_fc2.weight",
            "mtp.layers.0.transformer_layer.mlp.linear_fc2.weight",
        ),
        (
            "decoder.layers.1.mlp.experts.experts.7.linear_fc1.weight_w",
            "decoder.layers.1.mlp.experts.experts.linear_fc1.weight",
        ),
        (
            "model.module.module.decoder.layers.1.mlp.experts.linear_fc1.weight7_w",
            "decoder.layers.1.mlp.experts.experts.linear_fc1.weight",
        ),
        (
            "vision_model.decoder.deepstack_merger_list.linear_fc1.weight",
            "vision_model.decoder.deepstack_merger_list.{layer}.linear_fc1.weight",
        ),
        (
            "decoder.layers.self_attention.in_proj.weight.query",
            "decoder.layers.{layer}.self_attention.in_proj.weight.query",
        ),
    ],
)
def test_canonical_names(stored_name: str, name: str) -> None:
    assert place(stored_name).name == name


def test_a_folder_of_megatron_fsdp(tmp_path: Path) -> None:
    """fsdp_dtensor has no metadata.json, wrappers before the names, and its own experts' names."""
    model = tiny_families.make("qwen3_moe")
    expected = invert(model.config, model.state).made
    state: dict[str, torch.Tensor] = {}
    for name, tensor in expected.items():
        if ".experts.experts." not in name:
            state["model.module." + name] = tensor
            continue
        stem = "model.module." + name.replace(".experts.experts.", ".experts.")
        for e, one in enumerate(tensor):
            if "fc1" in name:
                state[f"{stem}{e}_w"], state[f"{stem}{e}_v"] = one.chunk(2)
            else:
                state[f"{stem}{e}"] = one
    checkpoint = plain_dcp.read(save_alone(tmp_path / "iter_0000003", state))
    assert (checkpoint.naming, checkpoint.notices) == ("mcore", ())
    found = stored(checkpoint)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_an_index_that_was_not_copied_is_named(tmp_path: Path) -> None:
    """``cp run/iter_1/*`` leaves out files that begin with a dot."""
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(BadInputError, match="no checkpoint of a known format") as caught:
        find_model(tmp_path)
    assert "begin with a dot were not copied" in str(caught.value.found)


@pytest.mark.parametrize("folder", ["actor/dist_ckpt", "actor/model/dist_ckpt"])
def test_what_verl_says_of_the_model_is_its_own_word(tmp_path: Path, folder: str) -> None:
    data = tmp_path / folder
    data.mkdir(parents=True)
    (data / "common.pt").touch()
    (tmp_path / "actor/transformer_config.json").write_text('{"layernorm_epsilon": 1e-05}')
    unread: Any = None
    facts = torch_dist.run_facts(data, unread)
    assert facts == {"layernorm_epsilon": 1e-5, OF_MODEL: True}
    torch.save({"args": {"norm_epsilon": 1e-6, "layernorm_epsilon": 1e-6}}, data / "common.pt")
    facts = torch_dist.run_facts(data, unread)
    assert OF_MODEL not in facts
    assert facts["layernorm_epsilon"] == 1e-6


@pytest.mark.parametrize(
    "place", ["checkpoint-10/args.json", "checkpoint-10/iter_0000010/args.json"]
)
def test_what_ms_swift_says_of_its_run(place: str, tmp_path: Path) -> None:
    data = tmp_path / "checkpoint-10/iter_0000010"
    data.mkdir(parents=True)
    torch.save({"args": {"mtp_num_layers": 2}}, data / "common.pt")
    told = {
        "swift_version": "4.1.0",
        "tensor_model_parallel_size": 2,
        "mtp_num_layers": 1,
        "rope_scaling": "yarn",
        "window_size": None,
        "vocab_size": 7,
        "lora_alpha": 16,
    }
    (tmp_path / place).write_text(json.dumps(told))
    unread: Any = None
    facts = torch_dist.run_facts(data, unread)
    assert facts == {"tensor_model_parallel_size": 2, "mtp_num_layers": 2}
    (tmp_path / place).write_text(json.dumps(told | {"swift_version": None}))
    assert torch_dist.run_facts(data, unread) == {"mtp_num_layers": 2}


@pytest.mark.parametrize(
    ("file", "key"), [("weights/run_config.yaml", "model"), ("context/model.yaml", "config")]
)
def test_what_bridge_and_nemo_say_of_the_model(tmp_path: Path, file: str, key: str) -> None:
    """Classes to be made are texts and no more; numbers are as YAML and OmegaConf write them."""
    data = tmp_path / "weights"
    data.mkdir()
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(
        f"_target_: os.system\nother: {{rotary_base: 1}}\n{key}:\n  _target_: os.system\n"
        "  rotary_base: 1e+06\n  layernorm_epsilon: 1.0e-06\n  window_size: &w [127, 0]\n"
        "  no_rope_freq: *w\n  seq_len_interpolation_factor: null\n  vocab_size: 7\n"
        "  softmax_type: {_target_: os.system, _args_: [ls]}\n"
        "  mrope_section: !!python/object/apply:os.system [ls]\n  rotary_interleaved: true\n"
    )
    unread: Any = None
    (data / "common.pt").touch()
    assert torch_dist.run_facts(data, unread) == {
        "rotary_base": 1e6,
        "layernorm_epsilon": 1e-6,
        "window_size": [127, 0],
        "no_rope_freq": [127, 0],
        "seq_len_interpolation_factor": None,
        "mrope_section": ["ls"],
        "rotary_interleaved": True,
        OF_MODEL: True,
    }


def test_nemos_models_with_a_tower_have_their_settings_further_in(tmp_path: Path) -> None:
    for folder in ("weights", "context"):
        (tmp_path / folder).mkdir()
    (tmp_path / "context/model.yaml").write_text(
        "config:\n  num_attention_heads: 1\n  language_transformer_config: {num_attention_heads: 32}\n"
    )
    (tmp_path / "weights/common.pt").touch()
    unread: Any = None
    facts = torch_dist.run_facts(tmp_path / "weights", unread)
    assert facts == {"num_attention_heads": 32, OF_MODEL: True}


@pytest.mark.parametrize(
    "text",
    [
        "model: {rotary_base: " + "[" * 100_000,
        "a: &a [x, x]\n" + "".join(f"k{n}: &b{n} [*a, *a]\n" for n in range(30)) + "model: *b29\n",
        "a: &a {rotary_base: 3}\nmodel: {<<: [*a, *a], num_layers: &b [*b]}\n",
        "model: {rotary_base: 1}\n" + "#" * (1 << 20),
        "model: {rotary_base: " + "1" * 5000 + "}\n",
        "\x00\x01",
        "- - -",
        "",
    ],
)
def test_yaml_of_which_nothing_is_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / "run_config.yaml").write_text(text)
    (tmp_path / "common.pt").touch()
    unread: Any = None
    assert torch_dist.run_facts(tmp_path, unread) == {}


def test_a_run_with_other_positions_than_config_json(
    shared_checkpoints: Path, tmp_path: Path
) -> None:
    root = shared_checkpoints / "megatron_cases/settings_ropelin"
    config = root / "hf_config_of_another_model"
    with pytest.raises(BadInputError, match="contradict each other") as caught:
        streamconv.convert(root / "iter_0000001", tmp_path / "out", hf_config=config, sync=False)
    assert "rotary_seq_len_interpolation_factor 8" in str(caught.value.found)
    assert "rotary_interleaved True" in str(caught.value.found)
    assert not (tmp_path / "out").exists()


def test_lists_among_the_arguments_count(tmp_path: Path) -> None:
    args = {"window_size": (127, 0), "no_rope_freq": [0, 0, 1], "window_attn_skip_freq": None}
    torch.save(
        {"args": argparse.Namespace(**args, rotary_base=[{}], norm_epsilon=10**5000)},
        tmp_path / "common.pt",
    )
    unread: Any = None
    assert torch_dist.run_facts(tmp_path, unread) == args | {"window_size": [127, 0]}
