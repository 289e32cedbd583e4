"""Files of ranks that have changed names: what comes out is the same model, or an error."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch

from streamconv import formats
from streamconv.errors import BadInputError
from tests.stored import stored

CASES = (
    "deepspeed/dsmoe_s2_ep2_w2",
    "deepspeed/pipe_pp2_bf16",
    "deepspeed/s1_odd_fp16_w2",
    "deepspeed/s3_frozen_fp16_w2",
    "deepspeed/s3_qwen2tied_bf16_w3",
    "deepspeed/tp2_s1_bf16",
    "deepspeed/v0145_s3_frozen_bf16_w3",
    "fsdp/verl-native-fsdp1",
    "fsdp/verl-native-fsdp2",
    "layouts/accelerate_nodcp_fsdp1/src",
    "layouts/verl_veomni_ep2/src/global_step_5/actor",
)


@pytest.mark.parametrize("case", CASES)
def test_swapped_or_copied_over(case: str, shared_checkpoints: Path, tmp_path: Path) -> None:
    copy = tmp_path / "case"
    shutil.copytree(shared_checkpoints / case, copy)
    truth = stored(formats.find_model(copy).read())
    alike: dict[tuple[Path, str], list[Path]] = {}
    for location in formats.find_model(copy).identify():
        path = formats.find_model(copy).root / location.path
        alike.setdefault((path.parent, re.sub(r"\d+", "#", path.name)), []).append(path)
    pairs = [p for files in alike.values() for p in itertools.permutations(files, 2)]
    assert pairs
    refused = 0
    for one, other in pairs:
        first, second = one.read_bytes(), other.read_bytes()
        for swapped in (False, True):
            other.write_bytes(first)
            if swapped:
                one.write_bytes(second)
            try:
                found = stored(formats.find_model(copy).read())
                assert found.keys() == truth.keys()
                assert all(torch.equal(found[n], t) for n, t in truth.items()), (one, other)
            except BadInputError:
                refused += 1
            one.write_bytes(first)
            other.write_bytes(second)
    assert refused
