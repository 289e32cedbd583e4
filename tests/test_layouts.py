"""What trainers other than verl leave: finished models, pieces, single files, each with its answer."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import streamconv
from scripts.makers import layouts
from scripts.makers.dcp import save_alone
from scripts.outputs import differences, read_model
from streamconv import formats
from streamconv.batch.discover import discover
from streamconv.errors import BadInputError, UnsafeInputError, UsageError
from tests.scenes import cli

CONVERT = (
    "accelerate_full",
    "accelerate_nodcp_fsdp1",
    "areal_dcp",
    "composer_sharded",
    "hf_bin_sharded_legacy",
    "hf_safetensors_sharded",
    "hf_writer_pieces",
    "hf_writer_pieces_moe",
    "lightning_ckpt",
    "lightning_fsdp_optimizer_0",
    "verl_automodel",
    "verl_megatron_default",
    "verl_veomni_ep2",
)
CHOSEN = {"dcp_with_ema": {"model": "main"}}


@pytest.fixture(scope="module")
def llama() -> transformers.PreTrainedModel:
    return layouts.tiny_llama()


@pytest.fixture
def truth(llama: transformers.PreTrainedModel, tmp_path: Path) -> Path:
    llama.save_pretrained(tmp_path / "truth")
    return tmp_path / "truth"


def converted(src: Path, dst: Path, truth: Path, **options) -> None:
    """Convert, and compare with the truth bit for bit."""
    assert streamconv.convert(src, dst, sync=False, **options).status == "done"
    assert not differences(read_model(dst), read_model(truth))


@pytest.mark.parametrize("name", [*CONVERT, *CHOSEN])
def test_real_checkpoints_become_their_models(
    name: str, shared_checkpoints: Path, tmp_path: Path
) -> None:
    case = shared_checkpoints / "layouts" / name
    converted(case / "src", tmp_path / "out", case / "truth", **CHOSEN.get(name, {}))
    report = streamconv.verify(tmp_path / "out", source=case / "src")
    assert not report.problems, report.problems


# Finished models


@pytest.mark.parametrize(("kind", "shard"), [("safe", "20KB"), ("bin", "1GB"), ("legacy", "20KB")])
def test_a_finished_model_is_cut_anew(
    kind: str, shard: str, llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    src = layouts.finished(tmp_path / "src", llama, kind=kind)
    converted(src, tmp_path / "out", truth, max_shard_size=shard)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard == "20KB")


def test_a_finished_model_is_cast(llama: transformers.PreTrainedModel, tmp_path: Path) -> None:
    src = layouts.finished(tmp_path / "src", llama)
    streamconv.convert(src, tmp_path / "out", dtype="float32", sync=False)
    wanted = {n: t.float() for n, t in llama.state_dict().items()}
    made = {k: t for f in (tmp_path / "out").glob("*.safetensors") for k, t in load_file(f).items()}
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[n], t) for n, t in wanted.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_a_finished_model_is_not_converted_in_its_own_place(
    llama: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    src = layouts.finished(tmp_path / "src", llama)
    before = sorted(p.name for p in src.iterdir())
    with pytest.raises(UsageError, match="contains the source"):
        streamconv.convert(src, src, overwrite=True, sync=False)
    assert sorted(p.name for p in src.iterdir()) == before


def test_a_finished_model_that_lacks_a_file_is_refused(
    llama: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    src = layouts.finished(tmp_path / "src", llama)
    next(src.glob("model-00002-*")).unlink()
    with pytest.raises(BadInputError, match="names a file that is not there"):
        streamconv.convert(src, tmp_path / "out", sync=False)
    with pytest.raises(BadInputError, match="names a file that is not there"):
        streamconv.inspect(src)


@pytest.mark.parametrize("kind", ["bin", "legacy"])
def test_a_truncated_file_is_refused(
    kind: str, llama: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    src = layouts.finished(tmp_path / "src", llama, kind=kind)
    path = next(src.glob("pytorch_model-00002-*"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInputError):
        streamconv.convert(src, tmp_path / "out", sync=False)
    assert not (tmp_path / "out").exists()


def test_what_else_is_a_model_in_the_folder_is_named(
    llama: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    src = layouts.finished(tmp_path / "src", llama)
    for name in ("pytorch_model.bin", "last.ckpt", "model.gguf", "training_args.bin"):
        (src / name).write_bytes(b"")
    streamconv.convert(src, tmp_path / "out", sync=False)
    skipped = json.loads((tmp_path / "out/streamconv.json").read_text())["skipped"]
    assert {name for name, _ in skipped} == {
        f"src/{n}" for n in ("pytorch_model.bin", "last.ckpt", "model.gguf")
    }


def test_an_index_is_not_read_to_find_a_model(
    llama: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    src = layouts.finished(tmp_path / "src", llama)
    (src / "model.safetensors.index.json").write_text("{")
    location = formats.find_model(src)
    assert location.format == "huggingface"
    with pytest.raises(BadInputError, match="JSON"):
        location.identify()


@pytest.mark.parametrize("size", [1 << 63, 1 << 80])
def test_sizes_that_no_tensor_has_are_refused(size: int, tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [0, size], "data_offsets": [0, 0]}})
    raw = len(header).to_bytes(8, "little") + header.encode()
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(BadInputError, match="not a valid safetensors file"):
        formats.find_model(tmp_path).read()


def test_a_config_of_another_model_is_refused(
    llama: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    src = layouts.finished(tmp_path / "src", llama)
    path = src / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 64}))
    with pytest.raises(BadInputError, match="shape"):
        streamconv.convert(src, tmp_path / "out", sync=False)


# Pieces of ranks


@pytest.mark.parametrize("world", [1, 3])
def test_pieces_are_joined(
    world: int, llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    src = layouts.pieces(tmp_path / "src", llama.state_dict(), world=world)
    shutil.copy(truth / "config.json", src)
    converted(src, tmp_path / "out", truth)


@pytest.mark.parametrize("lost", [2, 4])
def test_pieces_of_a_lost_rank_are_missed(
    lost: int, llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    src = layouts.pieces(tmp_path / "src", llama.state_dict(), world=4)
    shutil.copy(truth / "config.json", src)
    next(src.glob(f"shard-{lost:05d}-*")).unlink()
    with pytest.raises(BadInputError):
        streamconv.convert(src, tmp_path / "out", sync=False)


def test_pieces_need_a_model_that_shows_them_whole(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    src = layouts.pieces(tmp_path / "src", llama.state_dict(), world=4)
    with pytest.raises(BadInputError, match="last rank's pieces") as caught:
        streamconv.convert(src, tmp_path / "out", sync=False)
    assert "--hf-config DIR" in str(caught.value.hint)
    converted(src, tmp_path / "out", truth, hf_config=truth)


def test_pieces_that_do_not_say_where_they_belong_are_refused(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    src = layouts.pieces(tmp_path / "src", llama.state_dict(), world=2)
    path = next(src.glob("shard-00002-*"))
    layouts.write_safe(path, load_file(path))
    with pytest.raises(BadInputError, match="does not say where its pieces belong"):
        streamconv.convert(src, tmp_path / "out", hf_config=truth, sync=False)


def test_a_file_that_no_rank_has_is_missed(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    src = layouts.pieces(tmp_path / "src", llama.state_dict(), world=2)
    for path in src.iterdir():
        path.rename(src / path.name.replace("00001-of-00001", "00001-of-00002"))
    with pytest.raises(BadInputError, match="missing on every rank"):
        streamconv.inspect(src)
    shutil.copy(truth / "config.json", src)
    assert any("model-00002-of-00002" in n for n in streamconv.inspect(src)["notices"])


def test_what_was_joined_already_is_taken(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    """With the config that lies beside the pieces, and only where it is what they make."""
    src = layouts.pieces(tmp_path / "src", llama.state_dict(), world=2)
    shutil.copytree(truth, src / "consolidated")
    (src / "consolidated" / "config.json").rename(src / "config.json")
    assert formats.find_model(src).root == src / "consolidated"
    assert formats.find_model(src).side_dir == src
    checkpoint = formats.find_model(src).read()
    assert "consolidated/ is taken" in checkpoint.notices[0]
    made = load_file(src / "consolidated" / "model.safetensors")
    layouts.write_safe(
        src / "consolidated" / "model.safetensors", made | {"lm_head.weight": torch.ones(8, 4)}
    )
    with pytest.raises(BadInputError, match="is not what the pieces beside it make"):
        formats.find_model(src).read()
    (src / "consolidated" / "model.safetensors").unlink()
    assert formats.find_model(src).root == src


def test_a_finished_model_goes_before_the_files_of_metas_beside_it(
    llama: transformers.PreTrainedModel, truth: Path
) -> None:
    """A release on the Hub has both; the folder's config.json is the finished model's."""
    torch.save({"tok_embeddings.weight": torch.ones(2, 2)}, truth / "consolidated.00.pth")
    assert formats.find_model(truth).format == "huggingface"
    (truth / "model.safetensors").unlink()
    assert formats.find_model(truth).format == "meta"


def test_a_finished_model_beside_the_steps_of_its_run_is_told_of(
    llama: transformers.PreTrainedModel, truth: Path
) -> None:
    assert formats.find_model(truth).notices == ()
    for step in ("iter_0000010", "iter_0000020"):
        (truth / step).mkdir()
    assert formats.find_model(truth).format == "huggingface"
    (notice,) = formats.find_model(truth).read().notices
    assert "not a step of the run beside it (iter_0000010, iter_0000020)" in notice


# Rank files


def test_rank_files_of_accelerate_are_joined(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    src = layouts.accelerate_ranks(tmp_path / "src", llama.state_dict(), world=3)
    converted(src, tmp_path / "out", truth, hf_config=truth)
    for lost in (0, 2):
        path = src / f"pytorch_model_fsdp_0_rank{lost}.bin"
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(BadInputError):
            streamconv.inspect(src)
        path.write_bytes(data)


def test_flat_parameters_are_refused_by_name(tmp_path: Path) -> None:
    layouts.write_single(tmp_path / "pytorch_model_fsdp_rank0.bin", {"_flat_param": torch.ones(8)})
    with pytest.raises(BadInputError, match="LOCAL_STATE_DICT"):
        streamconv.inspect(tmp_path)


@pytest.mark.parametrize("alike", [False, True])
def test_experts_of_groups_of_ranks_are_joined(alike: bool, tmp_path: Path) -> None:
    """Without checksums, and with the same experts in each group, only the model's shape tells."""
    model = layouts.tiny_moe()
    state = dict(model.state_dict())
    if alike:
        for name, tensor in state.items():
            if ".experts." in name:
                tensor.copy_(tensor[:2].repeat(2, 1, 1))
    model.save_pretrained(tmp_path / "truth")
    src = layouts.veomni_ranks(tmp_path / "src", state, world=4, groups=2)
    with pytest.raises(BadInputError, match="nothing says which"):
        streamconv.convert(src, tmp_path / "out", sync=False)
    converted(src, tmp_path / "out", tmp_path / "truth", hf_config=tmp_path / "truth")


# Single files


class Callback:
    """What a trainer pickles beside the weights; nobody else can import it."""

    def __init__(self) -> None:
        self.best = {"score": 0.5}


class Settings(dict[str, object]):
    """A kind of dict."""


def contents(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """Return what frameworks put into one file, by their names for it."""
    adam = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    named = {f"optimizer.state.{n}.exp_avg": t for n, t in state.items()}
    return {
        "plain": state,
        "model": {"model": state, "step": 7, "args": Namespace(lr=0.1)},
        "lightning": {
            "state_dict": {f"llm.{n}": t for n, t in state.items()},
            "callbacks": {
                "ModelCheckpoint": {"kth_value": torch.tensor(2.5), "best": Callback()},
                "settings": Settings(a=1),
            },
            "optimizer_states": [adam],
            "loops": {"fit_loop": {"epoch": torch.tensor(2)}},
            "epoch": 1,
        },
        "optimizer": {"model": state, "optimizer": adam, "lr_scheduler": {"last": 1}},
        "flat": {**{f"model.{n}": t for n, t in state.items()}, **named},
        "wrapped": {"module": {f"_orig_mod.{n}": t for n, t in state.items()}},
    }


KINDS = ["plain", "model", "lightning", "optimizer", "flat", "wrapped"]


@pytest.mark.parametrize(
    ("kind", "legacy"), [*((k, False) for k in KINDS), ("plain", True), ("lightning", True)]
)
def test_a_single_file_is_a_model(
    kind: str, legacy: bool, llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    """Objects of classes that we do not have lie beside the tensors, and are not called."""
    content = contents(dict(llama.state_dict()))[kind]
    src = layouts.write_single(tmp_path / "src" / "model.pt", content, legacy=legacy)
    given = src if legacy else src.parent
    converted(given, tmp_path / "out", truth, hf_config=truth)


def test_one_of_several_files_must_be_named(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    src = tmp_path / "src"
    for name in ("epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt"):
        layouts.write_single(src / name, {"state_dict": llama.state_dict()})
    for path in list(src.iterdir()):
        path.rename(path.with_name(path.name.replace("epoch=", "best-of-")))
    with pytest.raises(BadInputError, match="no checkpoint of a known format") as caught:
        streamconv.convert(src, tmp_path / "out", hf_config=truth, sync=False)
    assert "best-of-0-step=3.ckpt" in str(caught.value)
    converted(src / "best-of-0-step=3.ckpt", tmp_path / "out", truth, hf_config=truth)


def test_two_models_in_one_file_are_asked_about(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    state = dict(llama.state_dict())
    other = {n: t + 1 for n, t in state.items()}
    src = layouts.write_single(tmp_path / "model.pt", {"model": state, "ema": other})
    with pytest.raises(UsageError, match="2 models to choose from"):
        streamconv.convert(src, tmp_path / "out", hf_config=truth, sync=False)
    converted(src, tmp_path / "out", truth, hf_config=truth, model="main")


def test_one_dict_by_two_keys_is_one_model(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    state = dict(llama.state_dict())
    content: dict[str, object] = {"model": state, "module": state}
    content["all"] = content
    src = layouts.write_single(tmp_path / "model.pt", content)
    converted(src, tmp_path / "out", truth, hf_config=truth)


def test_a_key_of_the_model_s_own_is_no_other_release(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    src = layouts.write_single(tmp_path / "model.pt", {"model": dict(llama.state_dict())})
    converted(src, tmp_path / "out", truth, hf_config=truth)
    told = json.loads((tmp_path / "out/streamconv.json").read_text())["notices"]
    assert any("prefix 'model.'" in n for n in told)
    assert not any("another release" in n for n in told)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({0: torch.ones(2), 1: torch.ones(2)}, "tensors by numbers"),
        ({"w": np.ones(2)}, "numpy"),
        ({"step": 3}, "int"),
        ({}, "nothing"),
    ],
)
def test_what_holds_no_model_is_said(content: object, found: str, tmp_path: Path) -> None:
    src = layouts.write_single(tmp_path / "model.pt", content)
    with pytest.raises(BadInputError, match="no tensors by names") as caught:
        formats.find_model(src).read()
    assert found in str(caught.value.found)


def test_a_run_of_files_is_a_run(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    src = tmp_path / "checkpoints"
    first, second = "epoch=0-step=3", "epoch=1-val_loss=0.25-v1"
    for name in (first, "last", second):
        layouts.write_single(src / f"{name}.ckpt", {"state_dict": llama.state_dict()})
    with pytest.raises(UsageError, match="a run with 2 training steps") as caught:
        streamconv.convert(src, tmp_path / "out", hf_config=truth, sync=False)
    assert f"{second}.ckpt" in str(caught.value.found)
    (src / f"{second}.ckpt").unlink()
    converted(src, tmp_path / "one", truth, hf_config=truth)
    layouts.write_single(src / f"{second}.ckpt", {"state_dict": llama.state_dict()})
    found = [(c.place.as_posix(), c.step, c.format) for c in discover(tmp_path)]
    assert sorted(found) == [
        (f"checkpoints/{first}", 3, "torch_file"),
        (f"checkpoints/{second}", 1, "torch_file"),
    ]


def test_a_batch_takes_each_file_of_a_run(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    src, out = tmp_path / "checkpoints", tmp_path / "out"
    layouts.write_single(src / "epoch=0-step=3.ckpt", {"state_dict": llama.state_dict()})
    (src / "epoch=1-step=6.ckpt").write_bytes(b"no zip, and no pickle")
    options = ("--hf-config", str(truth), "--settle", "0s", "--no-sync", "--pin")
    done = cli("batch", str(src), str(out), *options)
    assert done.returncode == 3
    assert "error: epoch=1-step=6: " in done.stderr
    assert "\n  where: " in done.stderr
    assert not differences(read_model(out / "epoch=0-step=3"), read_model(truth))
    states = {
        c["step"]: c["state"] for c in json.loads((out / "status.json").read_text())["checkpoints"]
    }
    assert states == {3: "done", 6: "failed"}
    gone = cli("batch", str(src), str(out), *options, "--verify", "--delete-sources", "--apply")
    assert "only folders are deleted" in gone.stdout + gone.stderr
    assert (src / "epoch=0-step=3.ckpt").is_file()


def test_a_weight_that_is_no_tensor_is_not_left_out(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    state = dict(llama.state_dict())
    name = "model.norm.weight"
    src = layouts.write_single(tmp_path / "model.pt", state | {name: Callback()})
    with pytest.raises(BadInputError, match="something other than a tensor"):
        streamconv.convert(src, tmp_path / "out", hf_config=truth, sync=False)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_calls_nothing(legacy: bool, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "called",)

    src = layouts.write_single(
        tmp_path / "model.pt", {"w": torch.ones(2), "x": {"y": Evil()}}, legacy=legacy
    )
    streamconv.convert(src, tmp_path / "out", layout="memory", sync=False)
    assert not (tmp_path / "called").exists()


def test_optimizer_states_are_left_out_whatever_they_are_called(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    state = dict(llama.state_dict())
    adam = {
        f"opt.{n}.{key}": torch.zeros_like(t)
        for n, t in state.items()
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    src = save_alone(tmp_path / "src", {f"model.{n}": t for n, t in state.items()} | adam)
    converted(src, tmp_path / "out", truth, hf_config=truth)


# What the user says of it


def test_values_are_put_into_config_json(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    src = layouts.finished(tmp_path / "src", llama)
    overrides = ["rope_theta=500000.0", "max_position_embeddings=4096", "note=as it is"]
    assert llama.config.rope_parameters["rope_theta"] == 10000.0
    converted(src, tmp_path / "out", truth, config=overrides)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config["max_position_embeddings"]) == (500000.0, 4096)
    assert config["note"] == "as it is"
    told = " ".join(json.loads((tmp_path / "out" / "streamconv.json").read_text())["notices"])
    assert "max_position_embeddings is 4096, as --config says (it was 2048)" in told
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert loaded.rope_parameters["rope_theta"] == 500000.0
    assert not streamconv.verify(tmp_path / "out", source=src).problems


@pytest.mark.parametrize(
    "text", ["rope_theta", "=3", "a..b=1", "model_type.x=1", "rope_scaling=null"]
)
def test_a_value_that_does_not_fit_is_refused(
    text: str, llama: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    src = layouts.finished(tmp_path / "src", llama)
    with pytest.raises(UsageError):
        streamconv.plan(src, config=[text])


def test_a_value_without_a_config_is_refused(tmp_path: Path) -> None:
    src = layouts.write_single(tmp_path / "model.pt", {"w": torch.ones(2)})
    with pytest.raises(UsageError, match=r"no config\.json"):
        streamconv.plan(src, layout="memory", config=["a=1"])


def test_a_prefix_is_stripped(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    """Where no model tells what is whose, the user does."""
    state = dict(llama.state_dict())
    src = layouts.write_single(
        tmp_path / "model.pt",
        {**{f"net.inner.{n}": t for n, t in state.items()}, "net.other.weight": torch.ones(3)},
    )
    converted(src, tmp_path / "out", truth, strip_prefix="net.inner", layout="memory")
    with pytest.raises(UsageError, match="no tensor's name begins"):
        streamconv.plan(src, strip_prefix="inner", layout="memory")


@pytest.mark.parametrize("keep", [False, True])
def test_what_quantization_aware_training_measured_is_left_out(
    keep: bool, llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    measured = {
        f"model.layers.0.self_attn.q_proj.{name}": torch.ones(1)
        for name in ("input_global_scale", "input_amax")
    }
    src = layouts.write_single(tmp_path / "model.pt", {**llama.state_dict(), **measured})
    streamconv.convert(src, tmp_path / "out", hf_config=truth, keep_buffers=keep, sync=False)
    assert (measured.keys() <= read_model(tmp_path / "out").keys()) == keep


def test_a_snapshot_in_the_hubs_cache_is_a_source(
    llama: transformers.PreTrainedModel, truth: Path, tmp_path: Path
) -> None:
    """Its files are links into a folder beside it; a link to anywhere else is refused."""
    made = layouts.finished(tmp_path / "made", llama)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(made.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    converted(snapshot, tmp_path / "out", truth)
    (snapshot / "vocab.json").symlink_to("/etc/hostname")
    with pytest.raises(UnsafeInputError, match="leads out of the checkpoint"):
        streamconv.plan(snapshot)


@pytest.mark.parametrize("name", ["base-model", "truth"])
def test_a_model_beside_the_steps_of_a_run_is_not_what_it_trained(
    name: str, truth: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    actor = run / "global_step_10" / "actor"
    actor.mkdir(parents=True)
    (actor / "model_world_size_1_rank_0.pt").touch()
    shutil.copytree(truth, run / name)
    assert formats.find_model(run).root == actor
    assert formats.find_model(run, "actor").root == actor
    assert formats.model_names(run) == ("actor",)
    assert formats.find_model(run, name).root == run / name
    shutil.copytree(run / "global_step_10", run / "global_step_20")
    with pytest.raises(UsageError, match="a run with 2 training steps"):
        formats.find_model(run)
    assert formats.model_names(run) == ()
