"""Any shapes, groups, ranks and paddings: what DeepSpeed cut goes together again."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.makers import zero
from streamconv.formats.deepspeed import checkpoint
from tests.stored import stored

SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


def tensor(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.reshape(shape)


@st.composite
def runs(draw: st.DrawFn) -> zero.Run:
    stage = draw(st.integers(0, 3))
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=8))
    if stage == 0:  # nothing tells whether a parameter without elements was trained
        shapes = [s for s in shapes if 0 not in s]
    named = {f"layer.{k}.weight": tensor(s, k) for k, s in enumerate(shapes)}
    kinds = [draw(st.sampled_from("aabf")) for _ in named]
    groups = [
        {n: named[n] for n, k in zip(named, kinds, strict=True) if k == kind} for kind in "ab"
    ]
    frozen = {n: named[n].bfloat16() for n, k in zip(named, kinds, strict=True) if k == "f"}
    groups = [g for g in groups if g] or [{"only": tensor((3,), 99)}]
    buffers = draw(
        st.sampled_from([{}, {"steps": torch.tensor(7), "mask": torch.tensor([True, False])}])
    )
    first = next(iter(groups[0]))
    optimizer = stage in (1, 2)
    return zero.Run(
        groups,
        stage=stage,
        ranks=draw(st.integers(1, 6)),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        frozen=frozen,
        buffers=buffers,
        shared=draw(st.sampled_from([{}, {"other.name": first}])) if stage else {},
        aligned=optimizer and draw(st.booleans()),
        kept_padding=optimizer and draw(st.booleans()),
        sub_group=draw(st.sampled_from([1, 20, 1 << 40])),
        flat=draw(st.booleans()),
        legacy=draw(st.booleans()),
    )


@given(runs())
@settings(max_examples=200, deadline=None)
def test_every_parameter_is_put_together_again(run: zero.Run) -> None:
    with tempfile.TemporaryDirectory() as place:
        zero.write(run, Path(place))
        found = checkpoint.read(Path(place) / zero.TAG)
        made = stored(found)
    assert made.keys() == run.truth.keys()
    for name, expected in run.truth.items():
        assert made[name].dtype == expected.dtype
        assert torch.equal(made[name], expected), name
    trained = {n for g in run.groups for n in g} if run.stage < 3 else set()
    assert trained <= found.halves.keys()


@pytest.mark.parametrize("shape", [(), (1,), (5, 0, 3), (3, 5), (2, 3, 4), (1, 7, 1)])
@pytest.mark.parametrize("ranks", [1, 2, 7, 64])
def test_a_parameter_smaller_than_its_ranks(
    tmp_path: Path, shape: tuple[int, ...], ranks: int
) -> None:
    run = zero.Run([{"w": tensor(shape, 1), "v": tensor((2,), 2)}], stage=3, ranks=ranks)
    zero.write(run, tmp_path)
    made = stored(checkpoint.read(tmp_path / zero.TAG))
    assert {n: made[n].tolist() for n in made} == {n: t.tolist() for n, t in run.truth.items()}


@given(
    st.lists(SHAPES, min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_experts_of_all_ranks_are_put_together(
    shapes: list[tuple[int, ...]], layers: int, ep: int, each: int, sharing: int
) -> None:
    dense = {"a.weight": tensor((5, 3), 1), "gate": tensor((7,), 2)}
    experts = [
        [
            {f"{k}.weight": tensor(s, 1000 * layer + 100 * e + k) for k, s in enumerate(shapes)}
            for e in range(ep * each)
        ]
        for layer in range(layers)
    ]
    with tempfile.TemporaryDirectory() as place:
        truth = zero.write_experts(Path(place), dense, experts, ep * sharing, ep)
        found = checkpoint.read(Path(place) / zero.TAG)
        made = stored(found)
    assert made.keys() == truth.keys()
    assert all(torch.equal(made[n], t) and made[n].dtype == t.dtype for n, t in truth.items())
    assert found.halves.keys() == truth.keys()
