"""The tracer: what torch code does to meta tensors, written down and replayed, is what it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from streamconv.errors import BadInputError
from streamconv.ir.dtypes import BF16, BY_NAME, F16, F32
from streamconv.ir.recipe import AddScalar, Cast, Gather, Recipe, SourceRef, View
from streamconv.tracing.tracer import trace
from tests.replay import array, dtype_of, replay

Body = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def traced(body: Body, **inputs: torch.Tensor) -> dict[str, Recipe]:
    return trace({k: (tuple(t.shape), dtype_of(t)) for k, t in inputs.items()}, body)


def check(body: Body, **inputs: torch.Tensor) -> dict[str, Recipe]:
    """Trace and replay ``body`` and hold it against what torch does eagerly, bit for bit."""
    eager = body(dict(inputs))
    recipes = traced(body, **inputs)
    sources = {name: array(tensor) for name, tensor in inputs.items()}
    assert list(recipes) == list(eager)
    for name, tensor in eager.items():
        recipe = recipes[name]
        assert recipe.name == name
        assert recipe.dtype == dtype_of(tensor)
        assert recipe.view.shape == tuple(tensor.shape)
        assert replay(recipe, sources).tobytes() == array(tensor).tobytes(), name
        if tensor.numel() == 0:
            assert isinstance(recipe.view.base, SourceRef)
    return recipes


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(dtype)


# --- what recipes look like ---------------------------------------------------------------------


def test_an_input_returned_unchanged_is_the_identity_view() -> None:
    recipe = check(lambda t: {"out": t["w"]}, w=numbers(2, 3))["out"]
    assert recipe == Recipe("out", F32, View(SourceRef("w", (2, 3)), (2, 3), (3, 1)))


def test_views_are_strides_and_offset_of_the_source() -> None:
    recipe = check(lambda t: {"out": t["w"].t()[1:, 2]}, w=numbers(4, 3))["out"]
    assert recipe.view == View(SourceRef("w", (4, 3)), (2,), (1,), 7)


def test_fused_experts_come_apart_into_plain_views() -> None:
    def unfuse(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        halves = [half.contiguous() for half in t["w"].chunk(2, dim=1)]
        return {
            f"{k}.{name}": expert.squeeze(0)
            for name, half in zip(("gate", "up"), halves, strict=True)
            for k, expert in enumerate(half.chunk(3, dim=0))
        }

    recipes = check(unfuse, w=numbers(3, 4, 5))
    assert recipes["2.up"].view == View(SourceRef("w", (3, 4, 5)), (2, 5), (5, 1), 50)
    assert all(isinstance(r.view.base, SourceRef) for r in recipes.values())


def test_a_transposed_copy_is_still_a_view_of_the_source() -> None:
    recipe = check(lambda t: {"out": t["w"].t().contiguous()}, w=numbers(4, 3))["out"]
    assert recipe.view == View(SourceRef("w", (4, 3)), (3, 4), (1, 3))


def test_cat_is_a_gather_and_a_slice_of_one_part_looks_through_it() -> None:
    def body(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        joined = torch.cat([t["a"], t["b"]])
        return {"all": joined, "second": joined[2:], "across": joined[1:3]}

    recipes = check(body, a=numbers(2, 3), b=numbers(2, 3))
    assert isinstance(recipes["all"].view.base, Gather)
    assert recipes["second"].view == View(SourceRef("b", (2, 3)), (2, 3), (3, 1))
    assert isinstance(recipes["across"].view.base, Gather)


def test_ops_ride_on_the_view() -> None:
    recipe = check(lambda t: {"out": (t["w"] - 1).bfloat16()[0]}, w=numbers(2, 3))["out"]
    assert recipe.dtype == BF16
    assert recipe.view.ops == (AddScalar(-1.0), Cast(BF16))
    assert recipe.view.base == SourceRef("w", (2, 3))


def test_strides_that_are_never_walked_are_canonical() -> None:
    recipe = check(lambda t: {"out": t["w"][:, :1, :]}, w=numbers(1, 4, 5))["out"]
    assert recipe.view == View(SourceRef("w", (1, 4, 5)), (1, 1, 5), (5, 5, 1))


# --- the traps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda w: w.t().clone(), id="clone keeps strides"),
        pytest.param(lambda w: w.t().clone().reshape(-1), id="and is then reshaped"),
        pytest.param(lambda w: w.t().clone().view(3, 2, 2), id="and is then viewed"),
        pytest.param(lambda w: w.t().to(torch.bfloat16)[1:], id="a cast keeps strides"),
        pytest.param(lambda w: w.t().to(torch.bfloat16).clone().t()[1], id="twice"),
        pytest.param(lambda w: (w.t() + 1)[1:], id="so does an addition"),
        pytest.param(lambda w: w.expand(2, 4, 3).clone()[1], id="expand then clone"),
        pytest.param(lambda w: w.expand(2, 4, 3).transpose(0, 2).clone()[1], id="with strides"),
        pytest.param(lambda w: w.repeat(2, 1, 2)[1], id="repeat"),
        pytest.param(lambda w: w.repeat_interleave(2, dim=1), id="repeat_interleave"),
        pytest.param(lambda w: w.as_strided((2, 3), (1, 2), 1), id="overlapping as_strided"),
        pytest.param(lambda w: w.as_strided((2, 3), (1, 2), 1).clone()[1], id="and its copy"),
        pytest.param(lambda w: w.unfold(0, 2, 1).reshape(-1), id="unfold"),
        pytest.param(lambda w: w.diagonal().clone(), id="diagonal"),
        pytest.param(lambda w: w[1, 2], id="a scalar"),
        pytest.param(lambda w: torch.stack([w[1, 2], w[0, 0]]), id="a stack of scalars"),
        pytest.param(lambda w: torch.stack([w, w + 1], dim=-1)[..., 1], id="stack last"),
        pytest.param(lambda w: torch.cat([w[:0], w, w[1:1]]), id="cat of empty"),
        pytest.param(lambda w: torch.cat([w.new_empty if False else w[:0, 0], w]), id="shape (0,)"),
        pytest.param(lambda w: torch.cat([w, w.bfloat16()]), id="cat promotes"),
        pytest.param(lambda w: torch.cat([w, w], dim=-1), id="negative dim"),
        pytest.param(lambda w: w[:0].t().clone().reshape(0), id="empty"),
        pytest.param(lambda w: w.to(torch.float32), id="a cast that is none"),
        pytest.param(lambda w: w.detach().alias_copy() if False else w.detach(), id="detach"),
        pytest.param(lambda w: w.unflatten(0, (2, 2)).flatten(1).T, id="flatten"),
        pytest.param(lambda w: w.tile(2).narrow(1, 2, 3), id="tile"),
        pytest.param(lambda w: torch.cat([w, w.new_zeros(2, 3)])[3:], id="zeros below"),
        pytest.param(lambda w: torch.cat([w.T.new_zeros(1, 4), w.T]).T, id="zeros above"),
        pytest.param(lambda w: w.new_zeros(0, 3), id="no zeros"),
        pytest.param(lambda w: w[[3, 0, -2]].T[1], id="a list of rows"),
        pytest.param(lambda w: w[1:, [2, 0, 0]], id="a list of columns"),
        pytest.param(lambda w: torch.zeros_like(w[1:, 1]), id="zeros like"),
        pytest.param(lambda w: (w + 1).bfloat16().new_zeros(2) + 1, id="zeros and ops"),
        pytest.param(lambda w: torch.zeros_like(w, dtype=torch.bfloat16), id="zeros of a dtype"),
        pytest.param(lambda w: pad(w, (1, 2, 0, 3)).T, id="padded"),
        pytest.param(lambda w: pad(w, (0, 0)), id="padded with nothing"),
        pytest.param(lambda w: w.movedim(0, 1).ravel().unbind()[5], id="unbind"),
    ],
)
def test_replay_equals_eager(body: Callable[[torch.Tensor], torch.Tensor]) -> None:
    check(lambda t: {"out": body(t["w"])}, w=numbers(4, 3))


def test_channels_last_copies() -> None:
    def body(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last = t["w"].clone(memory_format=torch.channels_last)
        joined = torch.cat([last, last])
        assert not joined.is_contiguous()
        return {"one": last[1], "two": joined[1:3, 1:], "flat": joined.permute(0, 2, 3, 1).view(-1)}

    check(body, w=numbers(2, 3, 4, 5))


def test_inference_mode_hands_over_whole_operations() -> None:
    def body(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            return {"out": t["w"].reshape(6, 2).t().reshape(4, 3)}

    check(body, w=numbers(4, 3))


@pytest.mark.parametrize("name", ["BOOL", "U8", "I64", "F8_E4M3", "F8_E8M0", "F16", "F64", "C64"])
def test_every_dtype_can_be_moved(name: str) -> None:
    dtype = BY_NAME[name]
    recipe = trace({"w": ((4, 3), dtype)}, lambda t: {"o": t["w"].t().contiguous()[1]})["o"]
    assert recipe == Recipe("o", dtype, View(SourceRef("w", (4, 3)), (4,), (3,), 1))


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda w: w * 2, r"aten\.mul\.Tensor cannot be streamed"),
        (lambda w: w + w, r"aten\.add\.Tensor cannot be streamed"),
        (lambda w: w.add_(1), r"aten\.add_\.Tensor writes into its argument"),
        (lambda w: w.copy_(w), "writes into its argument"),
        (lambda w: torch.cat([w, w], out=w), "writes into its argument"),
        (lambda w: w.view(torch.int32), "reads float32 as torch.int32"),
        (lambda w: w.view(torch.int32).clone(), "reads float32 as torch.int32"),
        (lambda w: w + 0.1, "float32 holds no exact 0.1"),
        (lambda w: w.bfloat16() + 257, "bfloat16 holds no exact 257"),
        (lambda w: w.half() + 1e6, "float16 holds no exact 1000000.0"),
        (lambda w: w + float("nan"), "holds no exact nan"),
        (lambda w: 1 - w, r"aten\.rsub\.Scalar cannot be streamed"),
        (lambda w: w.to(torch.int64), "a cast from float32 to int64"),
        (lambda w: w.to("cpu"), "moves a tensor to cpu"),
        (lambda w: w.flip(0), r"aten\.flip"),
        (lambda w: w[torch.tensor([0, 2])], "cannot be streamed"),
        (lambda w: w[[0, 2], [1, 1]], "cannot be streamed"),
        (lambda w: pad(w, (0, 1), value=1), r"aten\.constant_pad_nd"),
        (lambda w: pad(w, (0, -1)), r"aten\.constant_pad_nd"),
        (lambda w: w[:0].new_zeros(2), r"aten\.new_zeros"),
        (lambda w: w.new_zeros(2, dtype=torch.int8), "a cast from float32 to int8"),
        (lambda w: torch.zeros(3), r"aten\.zeros"),
        (lambda w: torch.empty_like(w), r"aten\.empty_like"),
        (lambda w: w.as_strided((9, 9), (1, 1)), "reaches past its storage"),
        (lambda w: w.sum(), r"aten\.sum"),
        (lambda w: "text", "output out is not a tensor"),
        (lambda w: None, "output out is not a tensor"),
    ],
)
def test_refusals_name_the_operation(
    body: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        traced(lambda t: {"out": body(t["w"])}, w=numbers(4, 3))


def test_refusals_name_the_tensors() -> None:
    with pytest.raises(BadInputError) as caught:
        traced(lambda t: {"o": torch.cat([t["a"], t["b"]]) * 2}, a=numbers(3), b=numbers(2))
    assert caught.value.where == "a, b"


def test_a_conjugated_view_is_refused() -> None:
    for body in (lambda w: w.conj(), lambda w: w.conj().imag, lambda w: torch.view_as_real(w)):
        with pytest.raises(BadInputError, match="cannot be streamed"):
            traced(lambda t, body=body: {"o": body(t["w"])}, w=numbers(2).to(torch.complex64))


def test_a_tensor_from_elsewhere_is_refused() -> None:
    elsewhere = torch.empty(3, device="meta")
    with pytest.raises(BadInputError, match="output o is not a tensor made of the checkpoint's"):
        traced(lambda t: {"o": elsewhere}, w=numbers(3))
    with pytest.raises(BadInputError, match=r"aten\.cat\.default is not a tensor made of"):
        traced(lambda t: {"o": torch.cat([t["w"], elsewhere])}, w=numbers(3))


def test_what_the_body_raises_passes_through() -> None:
    with pytest.raises(KeyError):
        traced(lambda t: {"o": t["absent"]}, w=numbers(3))


# --- any chain of operations --------------------------------------------------------------------

Step = Callable[[list[torch.Tensor]], torch.Tensor]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def steps(draw: st.DrawFn, pool: list[torch.Tensor]) -> Step:
    """Draw one operation that works on a tensor of ``pool``, which is extended by its result."""
    k = draw(st.integers(0, len(pool) - 1))
    t = pool[k]
    dims = st.integers(0, t.dim() - 1) if t.dim() else st.nothing()
    choices = ["clone", "contiguous", "cast", "add", "unsqueeze", "flatten", "repeat", "stack"]
    if t.dim():
        choices += ["permute", "narrow", "select", "expand", "cat", "cat2", "unfold", "split"]
    if t.dim() == 4:
        choices.append("channels_last")
    kind = draw(st.sampled_from(choices))

    def at(change: Callable[[torch.Tensor], torch.Tensor]) -> Step:
        return lambda tensors: change(tensors[k])

    match kind:
        case "clone":
            return at(torch.clone)
        case "contiguous":
            return at(torch.Tensor.contiguous)
        case "channels_last":
            return at(lambda x: x.clone(memory_format=torch.channels_last))
        case "cast":
            dtype = draw(st.sampled_from(_DTYPES))
            return at(lambda x: x.to(dtype))
        case "add":
            value = draw(st.sampled_from([1, -1, 0.5, 0, -0.0, 2.0]))
            return at((lambda x: x - value) if draw(st.booleans()) else (lambda x: x + value))
        case "unsqueeze":
            d = draw(st.integers(0, t.dim()))
            return at(lambda x: x.unsqueeze(d) if x.dim() < 5 else x)
        case "flatten":
            shape = draw(st.sampled_from(_factorings(t.numel())))
            return at(lambda x: x.reshape(shape))
        case "repeat":
            times = draw(st.lists(st.integers(0, 2), min_size=t.dim(), max_size=t.dim() + 1))
            return at(lambda x: x.repeat(times) if x.numel() < 200 and x.dim() < 5 else x)
        case "stack":
            d, n = draw(st.integers(0, t.dim())), draw(st.integers(1, 3))
            return at(lambda x: torch.stack([x] * n, d) if x.numel() < 200 and x.dim() < 5 else x)
        case "permute":
            order = draw(st.permutations(range(t.dim())))
            return at(lambda x: x.permute(order))
        case "narrow" | "select" | "split":
            d = draw(dims)
            start = draw(st.integers(0, t.shape[d]))
            if kind == "select" and start < t.shape[d]:
                return at(lambda x: x.select(d, start))
            if kind == "split" and start:
                return at(lambda x: x.split(start, d)[-1])
            size = draw(st.integers(0, t.shape[d] - start))
            return at(lambda x: x.narrow(d, start, size))
        case "expand":
            sizes = [draw(st.integers(1, 3)) if n == 1 else n for n in t.shape]
            return at(lambda x: x.expand(sizes) if x.numel() < 200 else x)
        case "unfold":
            d = draw(dims)
            size = draw(st.integers(0, t.shape[d]))
            step = draw(st.integers(1, 2))
            return at(lambda x: x.unfold(d, size, step) if x.numel() < 200 and x.dim() < 5 else x)
        case _:
            d = draw(dims)
            start = draw(st.integers(0, t.shape[d]))
            fits = [
                i
                for i, o in enumerate(pool)
                if o.dim() == t.dim() and _but(o.shape, d) == _but(t.shape, d)
            ]
            others = draw(st.lists(st.sampled_from(fits), max_size=2))
            if kind == "cat" or t.numel() > 200:
                # Put together what was taken apart, in either order.
                return at(lambda x: torch.cat([x.narrow(d, start, x.shape[d] - start), x[:]], d))
            return lambda tensors: torch.cat([tensors[i] for i in (k, *others)], d)


def _but(shape: torch.Size, d: int) -> list[int]:
    return [n for i, n in enumerate(shape) if i != d]


def _factorings(numel: int) -> list[tuple[int, ...]]:
    found = [(numel,), (1, numel, 1)]
    if numel:
        found += [(a, numel // a) for a in range(2, 7) if numel % a == 0]
        found += [
            (a, b, numel // a // b)
            for a in range(2, 5)
            for b in range(2, 5)
            if numel % (a * b) == 0
        ]
    return found


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_chain_replays_bit_for_bit(data: st.DataObject) -> None:
    shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
    first = data.draw(shapes)
    inputs = {
        name: numbers(*shape, dtype=dtype)
        for name, shape, dtype in (
            ("a", first, torch.float32),
            ("b", first, data.draw(st.sampled_from(_DTYPES))),
            ("c", data.draw(shapes), torch.bfloat16),
        )
    }
    pool = list(inputs.values())
    chain: list[Step] = []
    for _ in range(data.draw(st.integers(1, 8))):
        step = data.draw(steps(pool))
        chain.append(step)
        pool.append(step(pool))
        if pool[-1].numel() > 5000:
            break

    def body(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = list(given.values())
        for step in chain:
            tensors.append(step(tensors))
        return {str(k): tensor for k, tensor in enumerate(tensors)}

    check(body, **inputs)


def test_recipes_hold_no_tensor() -> None:
    recipe = check(lambda t: {"o": torch.cat([t["a"], t["a"].half().float()])}, a=numbers(3))["o"]
    assert isinstance(recipe.view.base, Gather)
    assert [p.view.ops for p in recipe.view.base.parts] == [(), (Cast(F16), Cast(F32))]
    assert all(isinstance(n, int) for n in (*recipe.view.shape, *recipe.view.strides))
    assert not isinstance(recipe.view.offset, np.generic)
