"""Megatron's per-rank folders: every parameter of every rank finds its place, or is refused by name."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamconv
from scripts.makers.mcore_ranks import (
    HEAD,
    HIDDEN,
    VOCAB,
    Sizes,
    State,
    delta_layer,
    dense_layer,
    latent_layer,
    mamba_layer,
    moe_layer,
    mtp_layer,
    rand,
    whole_model,
    write_ranks,
)
from scripts.makers.megatron_walk import Walk
from scripts.outputs import read_model
from streamconv import formats
from streamconv.errors import BadInputError, StreamconvError
from streamconv.executor.pipeline import WindowFiller, filled_windows
from streamconv.executor.reader import SourceReader
from streamconv.executor.records import RecordChecks
from streamconv.ir.dtypes import BY_TORCH
from streamconv.ir.source import Checkpoint
from tests.family_cases import CASES, Case, plan, taken_apart
from tests.replay import array, replay

MOE = partial(moe_layer, experts=4)


def assembled(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return (dtype, shape, bytes) of every tensor, put together with numpy from boxes and strides."""
    result = {}
    for name, tensor in checkpoint.tensors.items():
        dtype = tensor.dtype.to_numpy()
        whole = np.zeros(tensor.shape, dtype)
        layout = tensor.layout
        for j, (box, strides) in enumerate(zip(layout.boxes, layout.strides, strict=True)):
            record = tensor.shards[j]
            file = checkpoint.root / checkpoint.files[record.file].path
            raw = np.fromfile(file, np.uint8, record.nbytes, offset=record.start).view(dtype)
            piece = np.lib.stride_tricks.as_strided(
                raw[layout.storage_offsets[j] :],
                box.sizes,
                [s * dtype.itemsize for s in strides],
            )
            whole[tuple(map(slice, box.offsets, box.ends))] = piece
        result[name] = (tensor.dtype.torch, tensor.shape, whole.tobytes())
    return result


def expected(model: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (
            str(t.dtype).removeprefix("torch."),
            tuple(t.shape),
            t.contiguous().view(torch.uint8).numpy().tobytes(),
        )
        for name, t in model.items()
    }


def check(folder: Path, model: dict[str, torch.Tensor]) -> Checkpoint:
    """Read ``folder`` and hold it against the model it was cut from."""
    checkpoint = formats.find_model(folder).read()
    found, truth = assembled(checkpoint), expected(model)
    assert sorted(found) == sorted(truth)
    assert [n for n in truth if found[n] != truth[n]] == []
    return checkpoint


@pytest.mark.parametrize("writer", ["verl", "megatron"])
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(tp=2),
        Sizes(tp=4, pp=2),  # more ranks than query groups: the weight is cut through a group
        Sizes(pp=2, vpp=2),
        Sizes(tp=2, pp=2, stages=(1, 3)),
        Sizes(pp=3, stages=(0, 4, 0)),  # stages of their own for the embedding and the output
    ],
    ids=str,
)
def test_dense(sizes: Sizes, writer: str, tmp_path: Path) -> None:
    model = whole_model()
    checkpoint = check(write_ranks(tmp_path, model, sizes, writer=writer, num_layers=4), model)
    assert checkpoint.facts["layers"] == 4
    assert checkpoint.facts["ranks"] == sizes.tp * sizes.pp


@pytest.mark.parametrize("writer", ["verl", "megatron"])
@pytest.mark.parametrize("kind", ["grouped", "sequential", "legacy", "stacked", "joined"])
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(ep=2),  # mp_rank_00_001 is expert-parallel here, pipeline-parallel above
        Sizes(tp=2, ep=2),  # only mp_rank_00_000 and mp_rank_01_001 exist
        Sizes(tp=2, etp=2),
        Sizes(tp=4, pp=2, ep=2, etp=2),
    ],
    ids=str,
)
def test_experts(sizes: Sizes, kind: str, writer: str, tmp_path: Path) -> None:
    model = whole_model(MOE, layers=2)
    checkpoint = check(write_ranks(tmp_path, model, sizes, writer=writer, kind=kind), model)
    parallelism = f"tp {sizes.tp}, pp {sizes.pp}, ep {sizes.ep}, etp {sizes.etp}"
    assert checkpoint.facts["parallelism"] == parallelism


@pytest.mark.parametrize("kind", ["grouped", "stacked", "joined"])
def test_biases_of_experts(kind: str, tmp_path: Path) -> None:
    model = whole_model(MOE, layers=2)
    for name in [n for n in model if ".experts.experts." in n]:
        model[name.removesuffix("weight") + "bias"] = rand(*model[name].shape[:2])
    check(write_ranks(tmp_path, model, Sizes(tp=2, ep=2), kind=kind), model)


def test_stacked_experts_that_are_fewer_than_the_router_knows(tmp_path: Path) -> None:
    def drop(state: State, rank: tuple[int, ...]) -> None:
        for name in [n for n in state if n.endswith(".mlp.experts.linear_fc1.weight")]:
            state[name] = state[name][1:].clone()

    folder = write_ranks(tmp_path, whole_model(MOE), Sizes(ep=2), kind="stacked", change=drop)
    with pytest.raises(
        BadInputError, match="cannot determine the layout of grouped experts"
    ) as caught:
        formats.find_model(folder).read()
    assert "2 experts, one after the other" in str(caught.value)


@pytest.mark.parametrize("layer", [delta_layer, mamba_layer, latent_layer])
@pytest.mark.parametrize("tp", [1, 2])
def test_other_layers(layer, tp: int, tmp_path: Path) -> None:
    model = whole_model(layer)
    check(write_ranks(tmp_path, model, Sizes(tp=tp, pp=2)), model)


def test_latent_attention_of_older_and_newer_releases(tmp_path: Path) -> None:
    """Up to 0.12 the down projections are cut by rows; 0.19 can join them, with the norm before."""
    model = whole_model(latent_layer)

    def cut_down(state: State, rank: tuple[int, ...]) -> None:
        for name in state:
            if "_down_proj.weight" in name:
                state[name] = state[name].chunk(2)[rank[0]].clone()

    def fuse(state: State, rank: tuple[int, ...]) -> None:
        for name in [n for n in state if "linear_q_down_proj.weight" in n]:
            module = name.removesuffix("linear_q_down_proj.weight")
            parts = state.pop(name), state.pop(f"{module}linear_kv_down_proj.weight")
            state[f"{module}linear_qkv_down_proj.weight"] = torch.cat(parts)
            norm = module.removesuffix("self_attention.") + "input_layernorm.weight"
            state[f"{module}linear_qkv_down_proj.layer_norm_weight"] = state.pop(norm)

    def both(state: State, rank: tuple[int, ...]) -> None:
        cut_down(state, rank)
        fuse(state, rank)

    for change in (cut_down, fuse, both):
        check(write_ranks(tmp_path, model, Sizes(tp=2), change=change), model)


def test_names_of_megatrons_own_modules(tmp_path: Path) -> None:
    """Without Transformer Engine the norms are modules of their own, and wrappers may be left on."""
    model = whole_model()

    def rename(state: State, _: tuple[int, ...]) -> None:
        for name in list(state):
            new = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
            new = new.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
            state["module." + new] = state.pop(name)

    check(write_ranks(tmp_path, model, Sizes(tp=2, pp=2), change=rename), model)


@pytest.mark.parametrize("layer", [dense_layer, MOE], ids=["dense", "experts"])
def test_multi_token_prediction(
    layer: Callable[[int], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model = whole_model(layer) | mtp_layer(layer)
    embedding = "embedding.word_embeddings.weight"

    def change(state: State, rank: tuple[int, ...]) -> None:
        for name in [n for n in state if ".transformer_layer." in n]:  # as 0.19 calls it
            state[name.replace("transformer_layer", "mtp_model_layer")] = state.pop(name)
        if rank[1] == 1:
            state[embedding] = model[embedding].chunk(2)[rank[0]].clone()

    folder = write_ranks(tmp_path, model, Sizes(tp=2, pp=2, etp=2), change=change)
    checkpoint = check(folder, model)
    assert embedding in {s.name for s in checkpoint.skipped}


def tie(copy: torch.Tensor, state: State, rank: tuple[int, ...]) -> None:
    if "output_layer.weight" in state:
        state["output_layer.weight"] = copy.chunk(2)[rank[0]].clone()


def test_a_tied_embeddings_copy_is_left_out(tmp_path: Path) -> None:
    model = whole_model()
    copy = model["embedding.word_embeddings.weight"]
    folder = write_ranks(tmp_path, model, Sizes(tp=2, pp=2), change=partial(tie, copy))
    side = folder / "huggingface"
    side.mkdir()
    del model["output_layer.weight"]
    for config in ('{"tie_word_embeddings": true}', "{}", '{"tie_word_embeddings": 7}'):
        (side / "config.json").write_text(config)
        checkpoint = check(folder, model)
        reasons = {s.name: s.reason for s in checkpoint.skipped}
        assert reasons["output_layer.weight"] == "a copy of the embedding, with equal bytes"
    (side / "config.json").write_text('{"tie_word_embeddings": false}')
    check(folder, model | {"output_layer.weight": copy})


def test_a_tied_embedding_whose_copies_differ(tmp_path: Path) -> None:
    model = whole_model()
    folder = write_ranks(tmp_path, model, Sizes(tp=2, pp=2))
    (folder / "hf_config_and_tokenizer").mkdir()
    (folder / "hf_config_and_tokenizer/config.json").write_text('{"tie_word_embeddings": true}')
    with pytest.raises(BadInputError, match="two copies of one tensor differ") as caught:
        formats.find_model(folder).read()
    assert "mp_rank_00_001/model.pt, output_layer.weight" in str(caught.value)
    assert "mp_rank_00_000/model.pt" in str(caught.value)


def test_a_value_model_has_one_row_on_every_rank(tmp_path: Path) -> None:
    model = whole_model()
    head = rand(1, HIDDEN)

    def replace(state: State, _: tuple[int, ...]) -> None:
        if "output_layer.weight" in state:
            state["output_layer.weight"] = head.clone()

    for sizes in (Sizes(tp=2), Sizes(tp=2, pp=2)):
        folder = write_ranks(tmp_path, model, sizes, change=replace)
        check(folder, model | {"output_layer.weight": head})


def test_norms_of_the_whole_width_are_cut(tmp_path: Path) -> None:
    model = whole_model()
    for n in range(4):
        model[f"decoder.layers.{n}.self_attention.q_layernorm.weight"] = rand(4 * HEAD)
        model[f"decoder.layers.{n}.self_attention.k_layernorm.weight"] = rand(2 * HEAD)

    def cut_norms(state: State, rank: tuple[int, ...]) -> None:
        for name in state:
            if re.search(r"[qk]_layernorm", name):
                state[name] = state[name].chunk(2)[rank[0]].clone()

    check(write_ranks(tmp_path, model, Sizes(tp=2), change=cut_norms), model)


@pytest.mark.parametrize("heads", [(4, 1), (2, 2)], ids=["a group on two ranks", "a head a rank"])
@pytest.mark.parametrize("writer", ["verl", "megatron"])
def test_norms_of_a_head_that_look_like_the_whole_width(
    heads: tuple[int, int], writer: str, tmp_path: Path
) -> None:
    """The rank's rows are as many as one query, one key and one value head have."""
    model = whole_model()
    for n in range(4):
        for kind, shape in (("weight", (HIDDEN,)), ("bias", ())):
            name = f"decoder.layers.{n}.self_attention.linear_qkv.{kind}"
            model[name] = rand((heads[0] + 2 * heads[1]) * HEAD, *shape)
    check(write_ranks(tmp_path, model, Sizes(tp=2), writer=writer), model)


def test_norms_of_the_whole_width_that_look_like_those_of_a_head(tmp_path: Path) -> None:
    model = whole_model()
    for n in range(4):
        at = f"decoder.layers.{n}.self_attention."
        model |= {f"{at}{p}_layernorm.weight": rand(4 * HEAD) for p in "qk"}
        model[at + "linear_qkv.weight"] = rand(12 * HEAD, HIDDEN)
        model[at + "linear_qkv.bias"] = rand(12 * HEAD)
    special = {k: "rows" for k in model if re.search(r"[qk]_layernorm", k)}
    check(write_ranks(tmp_path, model, Sizes(tp=4), special=special), model)


def test_an_mlp_without_a_gate(tmp_path: Path) -> None:
    model = whole_model()
    for n in range(4):
        model[f"decoder.layers.{n}.mlp.linear_fc1.weight"] = rand(16, HIDDEN)

    def rows(state: State, rank: tuple[int, ...]) -> None:
        for name in state:
            if name.endswith("linear_fc1.weight"):
                n = int(name.split(".")[2])
                state[name] = model[f"decoder.layers.{n}.mlp.linear_fc1.weight"].chunk(2)[rank[0]]
                state[name] = state[name].clone()

    check(write_ranks(tmp_path, model, Sizes(tp=2), change=rows), model)


def one_buffer(state: State, _: tuple[int, ...]) -> None:
    """With the distributed optimizer all parameters are views of one buffer, saved once."""
    names = [n for n, t in state.items() if t is not None and t.numel()]
    buffer = torch.cat([state[n].flatten() for n in names])
    for name, flat in zip(names, buffer.split([state[n].numel() for n in names]), strict=True):
        state[name] = flat.view(state[name].shape)


def test_parameters_that_share_one_storage(tmp_path: Path) -> None:
    model = whole_model(MOE, layers=2)
    for name in [n for n in model if n.endswith("expert_bias")]:
        model[name] = model[name].to(torch.bfloat16)

    for kind in ("grouped", "legacy"):
        folder = write_ranks(tmp_path, model, Sizes(tp=2, ep=2), kind=kind, change=one_buffer)
        check(folder, model)


class Float8Tensor:
    """Stands in for Transformer Engine's, which is pickled as a call of a method of its class."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    @classmethod
    def _make_in_reduce_ex(cls, data: torch.Tensor) -> Float8Tensor:
        return cls(data)

    def __reduce_ex__(self, _: object) -> tuple[object, tuple[torch.Tensor]]:
        return self._make_in_reduce_ex, (self.data,)


def test_weights_that_transformer_engine_keeps_in_fp8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ["transformer_engine", "pytorch", "tensor", "float8_tensor"]
    for n in range(1, len(parts) + 1):
        name = ".".join(parts[:n])
        module = types.ModuleType(name)
        module.Float8Tensor = Float8Tensor  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Float8Tensor, "__module__", ".".join(parts))
    key = "decoder.layers.0.self_attention.linear_qkv.weight"

    def quantize(state: Any, _: tuple[int, ...]) -> None:
        state[key] = Float8Tensor(state[key].to(torch.uint8))

    text = refused(
        write_ranks(tmp_path, whole_model(), Sizes(tp=2), change=quantize, writer="megatron"),
        "kept in fp8 or fp4 by Transformer Engine",
    )
    assert key in text
    assert "float8_tensor.Float8Tensor" in text


def test_parameters_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        model = whole_model()
        check(write_ranks(tmp_path, model, Sizes(tp=2, pp=2)), model)

        def other(state: State, rank: tuple[int, ...]) -> None:
            if rank[0] and "decoder.final_layernorm.weight" in state:
                state["decoder.final_layernorm.weight"] += 1

        folder = write_ranks(tmp_path, model, Sizes(tp=2), change=other)
        with pytest.raises(BadInputError, match="replicas of a parameter differ"):
            formats.find_model(folder).read()
    finally:
        torch.serialization.set_crc32_options(True)


def test_what_is_no_weight_is_counted(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path, whole_model(), Sizes(tp=2), writer="megatron")
    (folder / "mp_rank_00/distrib_optim.pt").write_bytes(b"not looked at")
    skipped = {s.reason: s.name for s in formats.find_model(folder).read().skipped}
    assert skipped == {
        "state of Transformer Engine (fp8)": "4 entries",
        "optimizer state": "2 entries",
        "random number generators": "2 entries",
        "arguments and counters of the run": "6 entries",
    }


def refused(folder: Path, what: str) -> str:
    with pytest.raises(BadInputError, match=what) as caught:
        formats.find_model(folder).read()
    return str(caught.value)


@pytest.mark.parametrize("writer", ["verl", "megatron"])
def test_missing_ranks(writer: str, tmp_path: Path) -> None:
    folder = write_ranks(tmp_path, whole_model(), Sizes(tp=2, pp=2), writer=writer)
    data = folder / "model" if writer == "verl" else folder
    lost = data / "mp_rank_00_001"
    lost.rename(tmp_path / "kept")
    text = refused(folder, "the files of 1 of 4 ranks are missing")
    assert "expected: mp_rank_00_001" in text
    (data / "mp_rank_01_001").rename(tmp_path / "kept too")
    refused(folder, "contradict" if writer == "megatron" else "last pipeline stage is missing")
    lost.mkdir()
    assert str(lost) in refused(folder, "a rank folder without its weights")


def test_missing_tensor_parallel_ranks_show_in_the_vocabulary(tmp_path: Path) -> None:
    import shutil

    folder = write_ranks(tmp_path, whole_model(), Sizes(tp=2))
    shutil.rmtree(folder / "model/mp_rank_01")
    (folder / "huggingface").mkdir()
    (folder / "huggingface/config.json").write_text(f'{{"vocab_size": {VOCAB}}}')
    text = refused(folder, "files of tensor-parallel ranks are missing")
    assert f"found: {VOCAB // 2} rows in 1 ranks" in text


def test_missing_experts(tmp_path: Path) -> None:
    """verl 0.3 and 0.4 saved only data-parallel rank 0, and with it only its experts."""
    import shutil

    model = whole_model(MOE, layers=2)
    folder = write_ranks(tmp_path, model, Sizes(ep=4))
    for lost in ("mp_rank_00_001", "mp_rank_00_002", "mp_rank_00_003"):
        shutil.rmtree(folder / "model" / lost)
    text = refused(folder, "3 of 4 experts are not in the checkpoint")
    assert "found: 1 of them" in text
    folder = write_ranks(tmp_path, model, Sizes(tp=2, ep=2, etp=2))
    shutil.rmtree(folder / "model/mp_rank_01_001")
    assert "in 2 parts each" in refused(folder, "2 of 4 experts are not in the checkpoint")

    def drop(state: State, _: tuple[int, ...]) -> None:
        state.pop("decoder.layers.1.mlp.experts.linear_fc2.weight0")

    refused(write_ranks(tmp_path, model, Sizes(), change=drop), "a rank lacks some of its experts")


@pytest.mark.parametrize(
    ("sizes", "claims"),
    [
        (Sizes(tp=2), {"num_layers": 5}),
        (Sizes(tp=2), {"tensor_model_parallel_size": 4}),
        (Sizes(pp=2), {"pipeline_model_parallel_size": 3}),
        (Sizes(pp=2), {"expert_model_parallel_size": 2}),
        (Sizes(pp=2, vpp=2), {"virtual_pipeline_model_parallel_size": 4}),
    ],
    ids=str,
)
def test_arguments_that_contradict_the_files(
    sizes: Sizes, claims: dict[str, int], tmp_path: Path
) -> None:
    folder = write_ranks(tmp_path, whole_model(), sizes, writer="megatron")
    for file in folder.glob("*/*.pt"):
        content = torch.load(file, weights_only=False)
        vars(content["args"]).update(claims)
        torch.save(content, file)
    refused(folder, "contradict the arguments")


@pytest.mark.parametrize(
    ("one", "two"), [("mp_rank_00_000", "mp_rank_01_000"), ("mp_rank_01_001", "mp_rank_01_002")]
)
def test_rank_files_in_each_others_folders(one: str, two: str, tmp_path: Path) -> None:
    """Their parameters are alike: only the number of the process that wrote it tells a file's place."""
    sizes = Sizes(tp=2, pp=4)
    model = whole_model(layers=4)
    folder = write_ranks(tmp_path, model, sizes, writer="megatron")
    for path in folder.rglob("*.pt"):
        tp, pp = map(int, path.parent.name.split("_")[2:])
        content = torch.load(path, weights_only=False)
        content["args"].rank = tp + sizes.tp * pp
        torch.save(content, path)
    check(folder, model)
    first, second = (folder / name / "model_optim_rng.pt" for name in (one, two))
    first.rename(folder / "kept")
    second.rename(first)
    (folder / "kept").rename(second)
    with pytest.raises(BadInputError, match="lies in the folder of another rank"):
        formats.find_model(folder).read()


def test_lists_and_nothings_among_the_arguments(tmp_path: Path) -> None:
    told: dict[str, object] = {"window_size": (127, 0), "no_rope_freq": [0, 1]}
    folder = write_ranks(
        tmp_path, whole_model(), Sizes(), writer="megatron", **told, window_attn_skip_freq=None
    )
    facts = formats.find_model(folder).read().facts["megatron"]
    assert [facts[n] for n in told] == [[127, 0], [0, 1]]
    assert facts["window_attn_skip_freq"] is None


def test_files_of_two_runs(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path, whole_model(), Sizes(tp=2), writer="megatron")
    file = folder / "mp_rank_01/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["args"].num_layers = 3
    torch.save(content, file)
    assert "mp_rank_01" in refused(folder, "their arguments disagree")
    (folder / "mp_rank_00_000").mkdir()
    (folder / "mp_rank_00_000/model_optim_rng.pt").write_bytes(b"")
    refused(folder, "rank folders of several runs")


def test_expert_ranks_that_overwrote_each_other(tmp_path: Path) -> None:
    model = whole_model(MOE, layers=2)
    folder = write_ranks(tmp_path, model, Sizes(tp=1, ep=2, etp=2), writer="megatron")
    text = refused(folder, "a file's expert-tensor-parallel rank")
    assert "found: 2 and 1" in text


def test_replicas_that_differ_name_both_files(tmp_path: Path) -> None:
    def other(state: State, rank: tuple[int, ...]) -> None:
        if rank[0]:
            state["decoder.layers.2.mlp.linear_fc1.layer_norm_weight"] += 1

    text = refused(
        write_ranks(tmp_path, whole_model(), Sizes(tp=2), change=other),
        "replicas of a parameter differ",
    )
    assert "mp_rank_01/model.pt, decoder.layers.2.mlp.linear_fc1.layer_norm_weight" in text
    assert "mp_rank_00/model.pt" in text


def test_unknown_parameters(tmp_path: Path) -> None:
    model = whole_model()
    name = "decoder.layers.0.self_attention.novelty.weight"
    model[name] = rand(6, HIDDEN)
    folder = write_ranks(tmp_path, model, Sizes(tp=2))
    check(folder, model)  # the same on all ranks: whatever it is, this is all of it

    def cut(state: State, rank: tuple[int, ...]) -> None:
        state[name] = state[name].chunk(2)[rank[0]].clone()

    folder = write_ranks(tmp_path, model, Sizes(tp=2), change=cut)
    assert name in refused(folder, "does not know differs between tensor-parallel ranks")


def test_two_kinds_of_modules_in_one_layer(tmp_path: Path) -> None:
    def add(name: str, state: State, _: tuple[int, ...]) -> None:
        if "decoder.layers.0.mlp.router.weight" in state:
            state[name] = rand(HIDDEN)

    model = whole_model(MOE, layers=2)
    for name in (
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight",
        "decoder.layers.0.input_layernorm.weight",
    ):
        folder = write_ranks(tmp_path, model, Sizes(tp=2), change=partial(add, name))
        assert "decoder.layers.0." in refused(folder, "mean the same")
    folder = write_ranks(
        tmp_path,
        model,
        Sizes(),
        change=partial(add, "module.decoder.final_layernorm.weight"),
    )
    refused(folder, "parameters of one name")


def test_a_parameter_that_one_rank_lacks(tmp_path: Path) -> None:
    name = "decoder.layers.3.self_attention.linear_proj.bias"

    def drop(state: State, rank: tuple[int, ...]) -> None:
        if rank[0]:
            del state[name]

    text = refused(
        write_ranks(tmp_path, whole_model(), Sizes(tp=2), change=drop), "hold different parameters"
    )
    assert name in text
    assert "mp_rank_01" in text


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_a_truncated_file(keep: int, tmp_path: Path) -> None:
    folder = write_ranks(tmp_path, whole_model(), Sizes(tp=2))
    file = folder / "model/mp_rank_01/model.pt"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(StreamconvError) as caught:
        formats.find_model(folder).read()
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"model": {"language_model": {"encoder": {}}}}, "before Megatron-Core"),
        ({"model1": {}}, "a virtual stage is missing"),
        ({"weights": {}}, "no state dicts of a Megatron model"),
        ([], "no state dicts of a Megatron model"),
        ([{"decoder.layers.0.mlp.linear_fc2.weight": {"_data": 1}}], "other than a plain tensor"),
    ],
    ids=str,
)
def test_other_contents(content: object, what: str, tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00").mkdir()
    torch.save(content, tmp_path / "mp_rank_00/model.pt")
    assert "mp_rank_00/model.pt" in refused(tmp_path, what)


class _Trap:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_nothing_in_the_arguments_is_executed(tmp_path: Path) -> None:
    model = whole_model()
    folder = write_ranks(tmp_path / "run", model, Sizes(), writer="megatron")
    file = folder / "mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["args"].trap = _Trap(tmp_path / "sprung")
    content["args"].kind = argparse.ArgumentParser  # a class, by name
    content["args"].nested = argparse.Namespace(lr=0.1)
    torch.save(content, file)
    check(folder, model)
    assert not (tmp_path / "sprung").exists()


def test_detection(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "run", whole_model(), Sizes(tp=2))
    data = folder / "model"
    (folder / "optim").mkdir()
    for path in (tmp_path / "run", folder, data, data / "mp_rank_01", data / "mp_rank_01/model.pt"):
        assert formats.find_model(path).format == "megatron_ranks"
    assert [f.path for f in formats.find_model(folder).identify()] == [
        "model/mp_rank_00/model.pt",
        "model/mp_rank_01/model.pt",
    ]
    read = [
        dataclasses.replace(f, entry_prefix="") for f in formats.find_model(folder).read().files
    ]
    assert list(formats.find_model(folder).identify()) == read  # which does not open the zips
    os.mkfifo(data / "mp_rank_00/model_optim_rng.pt")
    with pytest.raises(BadInputError, match="not a regular file"):
        formats.find_model(folder).read()


def llama(tmp_path: Path, change: Callable[[State, tuple[int, ...]], object]) -> Path:
    """Write a tiny Llama to ``truth`` and as rank folders, whose checkpoint's folder is returned."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD,
        vocab_size=VOCAB - 3,
    )
    torch.manual_seed(3)
    llama = LlamaForCausalLM(config).to(torch.bfloat16)
    llama.save_pretrained(tmp_path / "truth")
    truth = llama.state_dict()
    pad = torch.full((3, HIDDEN), 7.0, dtype=torch.bfloat16)
    model = {
        "embedding.word_embeddings.weight": torch.cat([truth["model.embed_tokens.weight"], pad]),
        "output_layer.weight": torch.cat([truth["lm_head.weight"], pad]),
        "decoder.final_layernorm.weight": truth["model.norm.weight"],
    }
    for n in range(2):
        part = {k.removeprefix(f"model.layers.{n}."): v for k, v in truth.items()}
        q, k, v = (part[f"self_attn.{x}_proj.weight"] for x in "qkv")
        groups = [x.view(2, -1, HIDDEN) for x in (q, k, v)]
        d = f"decoder.layers.{n}."
        gate_up = part["mlp.gate_proj.weight"], part["mlp.up_proj.weight"]
        model |= {
            d + "self_attention.linear_qkv.layer_norm_weight": part["input_layernorm.weight"],
            d + "self_attention.linear_qkv.weight": torch.cat(groups, 1).view(-1, HIDDEN),
            d + "self_attention.linear_proj.weight": part["self_attn.o_proj.weight"],
            d + "mlp.linear_fc1.layer_norm_weight": part["post_attention_layernorm.weight"],
            d + "mlp.linear_fc1.weight": torch.cat(gate_up),
            d + "mlp.linear_fc2.weight": part["mlp.down_proj.weight"],
        }
    folder = write_ranks(tmp_path / "run", model, Sizes(tp=2, pp=2), change=change)
    config.save_pretrained(folder / "huggingface")
    return folder


def test_a_whole_conversion(tmp_path: Path) -> None:
    """From rank folders to the model of transformers that the weights were taken from."""
    for k, change in enumerate((lambda *_: None, one_buffer)):
        folder = llama(tmp_path, change)
        out = tmp_path / f"out{k}"
        streamconv.convert(folder, out, sync=False)
        assert read_model(out) == read_model(tmp_path / "truth")


def test_a_shared_storage_is_not_read_anew_for_each_parameter(tmp_path: Path) -> None:
    folder = llama(tmp_path, one_buffer)
    plan = streamconv.plan(folder)
    records = {
        (record.file, record.start): record.header_nbytes + record.nbytes
        for _, section in plan.sections()
        for tensor in section
        for source in tensor.sources
        for record in source.shards
    }
    assert len(records) == len(plan.head.files)
    with SourceReader(folder, plan.head.files) as reader:
        checks = RecordChecks(reader)
        filler = WindowFiller(reader, checks, max_bytes=1 << 20)
        for _, section in plan.sections():
            for tensor in section:  # a large model's tensors do not share a window
                for _ in filled_windows([tensor], filler, checks):
                    pass
        filler.close()
        # Once for the weights, and once more for the checksums of what they lie in.
        assert reader.read_bytes <= 2 * sum(records.values())


# Modules of transformers', which trainers build on every rank alike.
THEIRS = re.compile(
    r"(thinker\.)?(visual|(vision|audio)_tower|audio_model|multi_modal_projector|mm_projector)\."
    r"|lightning_indexers\.|(language_model\.)?decoder\.layers\.\d+\.self_attention\.(linear_attn|self_attn)\."
)


def cut_otherwise(walk: Walk) -> dict[str, str]:
    """Return how parameters are cut of which that depends on more than the end of their names."""
    model = walk.made
    theirs = {n for n in model if THEIRS.match(n)}
    if not any(n.startswith("vision_model.decoder.") for n in model):
        theirs |= {n for n in model if n.startswith("vision_model.")}
    first = [n for n in model if re.search(r"linear_fc1\.(weight|bias)$", n)]
    special = {n: "rows" for n in first if n not in walk.gated} | dict.fromkeys(theirs, "all")
    special |= {n: "all" for n in model if "output_layer." in n and len(model[n]) == 1}
    for q in [n for n in model if n.endswith("self_attention.q_layernorm.weight")]:
        if len(model[q]) == model[q.replace("q_layernorm", "linear_proj")].shape[1]:
            special |= {q: "rows", q.replace("q_layernorm", "k_layernorm"): "rows"}
    return special


# ms-swift writes no rank folders.
@pytest.mark.parametrize("case", [c for c in CASES if "swift" not in str(c)], ids=str)
def test_every_familys_parameters_have_their_join(case: Case, tmp_path: Path) -> None:
    """Ranks that are cut as Megatron's modules are become the model that the tensors came from."""
    tiny, walk = taken_apart(case)
    experts = max((len(t) for n, t in walk.made.items() if ".experts.experts." in n), default=1)
    ep = next((n for n in (2, 3, 5) if experts % n == 0), 1)
    # Megatron-Core refuses to cut the attention of DeepSeek-V4.
    sizes = Sizes(tp=1 if case.name == "deepseek_v4" else 2, ep=ep)
    folder = write_ranks(tmp_path, walk.made, sizes, special=cut_otherwise(walk))
    checkpoint = formats.find_model(folder).read()
    arrays = {
        name: np.frombuffer(raw, BY_TORCH[dtype].to_numpy()).reshape(shape)
        for name, (dtype, shape, raw) in assembled(checkpoint).items()
    }
    headers = {n: (t.shape, t.dtype) for n, t in checkpoint.tensors.items()}
    made = {r.name: replay(r, arrays) for r in plan(tiny, headers).recipes}
    assert sorted(made.keys() ^ tiny.state.keys()) == []
    assert [n for n, t in tiny.state.items() if made[n].tobytes() != array(t).tobytes()] == []


SHARED = ("llama_tp2pp2", "qwen2_tp2pp2_tied", "qwen3_moe_tp2ep2", "v0122_deepseek", "v0192_llama")


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("layout", ["verl_ranks", "mlm_ranks"])
def test_the_same_tensors_as_in_torch_dist(
    case: str, layout: str, shared_checkpoints: Path
) -> None:
    """megatron-core itself puts the ranks of one model together, in its distributed format."""
    root = shared_checkpoints / "megatron" / case
    found, truth = (assembled(formats.find_model(root / n).read()) for n in (layout, "mlm_dist"))
    assert sorted(found) == sorted(truth)
    assert [n for n in truth if found[n] != truth[n]] == []


# Adapters


def adapter(
    model: dict[str, torch.Tensor], bridge: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the factors of an adapter on every matrix within the layers, and how each is cut.

    Without ``bridge`` as ms-swift hangs PEFT's on Megatron's modules.
    """
    factors: dict[str, torch.Tensor] = {}
    how: dict[str, str] = {}
    for name, weight in model.items():
        module = name.removesuffix(".weight")
        if not name.startswith("decoder.layers.") or weight.ndim < 2:
            continue
        a, b = (
            (f"{module}.adapter.linear_in.weight", f"{module}.adapter.linear_out.weight")
            if bridge
            else (f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight")
        )
        factors |= {a: rand(4, weight.shape[1]), b: rand(weight.shape[0], 4)}
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            how |= {a: "columns", b: "rows" if bridge else "all"}
        elif name.endswith("linear_fc1.weight"):
            how |= {a: "rows" if bridge else "all", b: "halves"}
        else:
            how |= {a: "rows" if bridge else "all", b: "rows"}
    return factors, how


@pytest.mark.parametrize("bridge", [True, False], ids=["bridge", "swift"])
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(tp=2), Sizes(tp=4, pp=2)], ids=str)
def test_adapters_beside_their_model(sizes: Sizes, bridge: bool, tmp_path: Path) -> None:
    model = whole_model()
    factors, how = adapter(model, bridge)
    check(write_ranks(tmp_path, model | factors, sizes, special=how), model | factors)


@pytest.mark.parametrize("bridge", [True, False], ids=["bridge", "swift"])
@pytest.mark.parametrize("sizes", [Sizes(tp=2), Sizes(tp=2, pp=2)], ids=str)
def test_adapters_alone(sizes: Sizes, bridge: bool, tmp_path: Path) -> None:
    factors, how = adapter(whole_model(), bridge)
    folder = write_ranks(tmp_path, factors, sizes, writer="megatron", special=how, num_layers=4)
    check(folder, factors)


def test_an_adapter_of_a_module_that_every_rank_has(tmp_path: Path) -> None:
    """Both factors are the same on all ranks: they are whole."""
    model = whole_model()
    factors, how = adapter(model, True)
    whole = {n: "all" for n in factors if ".0.self_attention.linear_qkv." in n}
    check(write_ranks(tmp_path, model | factors, Sizes(tp=2), special=how | whole), model | factors)


def test_layers_of_an_adapter_alone_are_not_guessed(tmp_path: Path) -> None:
    """A stage whose last layer has no adapter would shift those of the next one."""
    factors, how = adapter(whole_model(), True)
    some = {n: t for n, t in factors.items() if not n.startswith("decoder.layers.3.")}
    some |= {n.replace(".0.", ".3."): t for n, t in factors.items() if ".layers.0." in n}
    some = {n: t for n, t in some.items() if not n.startswith("decoder.layers.1.")}
    cuts = how | {n.replace(".0.", ".3."): h for n, h in how.items()}
    with pytest.raises(BadInputError, match="contradict the arguments"):
        formats.find_model(
            write_ranks(
                tmp_path / "a", some, Sizes(pp=2), writer="megatron", special=cuts, num_layers=4
            )
        ).read()
    with pytest.raises(BadInputError, match="layers of a pipeline stage belong"):
        formats.find_model(write_ranks(tmp_path / "b", factors, Sizes(pp=2), special=how)).read()
