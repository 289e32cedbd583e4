"""Where zero_to_fp32 of DeepSpeed 0.19.8 fails or is wrong: a test of each, in which this is right.

Whether it still is so can be tried with ``STREAMCONV_TEST_DEEPSPEED`` (see ``test_deepspeed_real``).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import streamconv
from scripts.makers import zero
from streamconv.errors import BadInputError
from tests.test_deepspeed_real import PYTHONS

Truth = dict[str, torch.Tensor]
FROZEN = {"frozen.weight": torch.arange(22.0).reshape(2, 11).bfloat16()}


def run(stage: int, **changes: object) -> zero.Run:
    generator = torch.Generator().manual_seed(5)
    shapes = {"a.weight": (33, 7), "a.bias": (33,), "b.weight": (5, 33), "norm.weight": (7,)}
    named = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    return dataclasses.replace(zero.Run([named], stage=stage, ranks=3), **changes)


def made(stage: int, **changes: object) -> Callable[[Path, Path], Truth]:
    def write(root: Path, _: Path) -> Truth:
        what = run(stage, **changes)
        zero.write(what, root)
        return what.truth

    return write


def shared(case: str) -> Callable[[Path, Path], Truth]:
    def copy(root: Path, checkpoints: Path) -> Truth:
        shutil.copytree(checkpoints / "deepspeed" / case, root)
        return load_file(root / "truth" / "model.safetensors")

    return copy


def of_fewer_ranks(root: Path, _: Path) -> Truth:
    """Write a checkpoint over one of more ranks, whose last files stay."""
    zero.write(run(3, ranks=5), root)
    later = zero.write(run(3), root.with_name("later"))
    for path in later.iterdir():
        shutil.copy(path, root / zero.TAG)
    return run(3).truth


# What zero_to_fp32 says, or does without a word: what it was given.
FAULTS = {
    "left out without a word: frozen in stage 1": made(1, frozen=FROZEN),
    "left out without a word: frozen in stage 1, by DeepSpeed": shared("s1_frozen_bf16_w2"),
    "TypeError: stage 0 in bf16": made(0),
    "TypeError: stage 0 in fp16": made(0, dtype=torch.float16),
    "TypeError: stage 0 in fp32": made(0, dtype=torch.float32),
    "TypeError: stage 0 by DeepSpeed": shared("s0_llama_bf16_w2"),
    "is not a zero checkpoint: BF16_Optimizer": made(1, kept_padding=True),
    "mmap: files without a zip in stage 1": made(1, legacy=True),
    "mmap: files without a zip in stage 3": made(3, legacy=True),
    "share memory: in stage 1": made(1, shared={"c.weight": "a.weight"}),
    "share memory: in stage 3": made(3, shared={"c.weight": "a.weight"}),
    "share memory: tied, by DeepSpeed": shared("s3_qwen2tied_bf16_w3"),
    "upcast: buffers of 16 bits in stage 2": made(2, buffers={"at": torch.rand(3).bfloat16()}),
    "upcast: buffers of 16 bits in stage 3": made(3, buffers={"at": torch.rand(3).half()}),
    "upcast: frozen in stage 2": made(2, frozen=FROZEN),
    "upcast: frozen in stage 3": made(3, frozen=FROZEN),
    "upcast: frozen in stage 3, by DeepSpeed": shared("s3_frozen_fp16_w2"),
    "but found: of an earlier save on more ranks": of_fewer_ranks,
    "is not a model state checkpoint: deepspeed.moe": shared("dsmoe_s2_ep2_w2"),
    "AttributeError: pipeline": shared("pipe_pp2_bf16"),
    "but found: AutoTP": shared("tp2_s1_bf16"),
}


def same(made: Truth, truth: Truth) -> bool:
    return made.keys() == truth.keys() and all(
        made[n].dtype == t.dtype and torch.equal(made[n], t) for n, t in truth.items()
    )


def tensors(folder: Path) -> Truth:
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


@pytest.mark.parametrize("fault", FAULTS)
def test_is_right_here(fault: str, shared_checkpoints: Path, tmp_path: Path) -> None:
    src = tmp_path / "src"
    truth = FAULTS[fault](src, shared_checkpoints)
    layout = "hub" if (src / "config.json").exists() else "memory"
    streamconv.convert(src, tmp_path / "out", layout=layout, sync=False)
    found = tensors(tmp_path / "out")
    assert same(found, {n: truth[n] for n in truth if n in found or layout == "memory"})
    left_out = truth.keys() - found.keys()
    assert left_out <= {"lm_head.weight"}, "only what config.json ties may be left out"


@pytest.mark.slow
@pytest.mark.skipif(not PYTHONS, reason="STREAMCONV_TEST_DEEPSPEED names no interpreter")
@pytest.mark.parametrize("fault", FAULTS)
def test_is_wrong_there(fault: str, shared_checkpoints: Path, tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    truth = FAULTS[fault](src, shared_checkpoints)
    done = zero_to_fp32(src, out, "--safe_serialization")
    if done.returncode:
        assert fault.partition(":")[0] in done.stderr
    else:
        assert not same(tensors(out), truth)


def zero_to_fp32(src: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHONS[0], "-W", "ignore", "-m", "deepspeed.utils.zero_to_fp32", src, out, *options],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards_hold_their_own_bytes_alone(stage: int, tmp_path: Path) -> None:
    # Each of zero_to_fp32's .bin shards of stages 1 and 2 holds the whole flat vector.
    what = zero.Run([{f"w{k}": torch.randn(64, 64) for k in range(16)}], stage=stage)
    zero.write(what, tmp_path / "src")
    streamconv.convert(
        tmp_path / "src", tmp_path / "out", layout="memory", max_shard_size="64KB", sync=False
    )
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 6
    weights = sum(4 * t.numel() for t in what.truth.values())
    assert weights < sum(s.stat().st_size for s in shards) < weights + 1024 * len(shards)
    assert same(tensors(tmp_path / "out"), what.truth)


def test_a_universal_checkpoint_of_another_order_is_refused(tmp_path: Path) -> None:
    # ds_to_universal mixes up the parameters of a run with round_robin_gradients.
    what = run(2)
    tag = zero.write(what, tmp_path)
    for path in tag.glob("*_optim_states.pt"):
        path.unlink()
    universal = tag.rename(tmp_path / f"{zero.TAG}_universal")
    (tmp_path / "latest").rename(tmp_path / "latest_universal")
    (tmp_path / "latest_universal").write_text(universal.name)
    flat = torch.cat([t.reshape(-1) for t in reversed([*what.truth.values()])])
    for name, tensor in what.truth.items():
        mixed, flat = flat[: tensor.numel()].view(tensor.shape), flat[tensor.numel() :]
        (universal / "zero" / name).mkdir(parents=True)
        zero.save({"param": mixed, "cat_dim": 0}, universal / "zero" / name / "fp32.pt")
    with pytest.raises(BadInputError, match="are not what the run computed with") as error:
        streamconv.convert(tmp_path, tmp_path / "out", layout="memory", sync=False)
    assert "round_robin_gradients" in error.value.hint
    streamconv.convert(tmp_path, tmp_path / "out", layout="memory", masters="no", sync=False)
    halves = {n: t.bfloat16() for n, t in what.truth.items()}
    assert same(tensors(tmp_path / "out"), halves)
