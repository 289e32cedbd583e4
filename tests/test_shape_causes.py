"""Shapes that do not fit: the cause that they tell."""

from __future__ import annotations

import pytest

from streamconv.planning.shape_causes import cause, cause_of_missing

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("expected", "made", "told"),
    [
        (
            {EMBEDDING: (100, 8), HEAD: (100, 8)},
            {EMBEDDING: (101, 8), HEAD: (101, 8)},
            "vocab_size",
        ),
        ({EMBEDDING: (100, 8)}, {EMBEDDING: (100, 9)}, None),
        ({"score.weight": (2, 8)}, {"score.weight": (1, 8)}, "num_labels"),
        ({EMBEDDING: (100, 8)}, {EMBEDDING: (400,)}, "flat pieces"),
        ({"norm.weight": (8,)}, {"norm.weight": (9,)}, None),
        ({GATE: (8, 4, 4)}, {GATE: (4, 4, 4)}, "1 of 2 shares"),
        ({GATE: (8, 4, 4)}, {GATE: (5, 4, 4)}, None),
        ({"x.weight": ()}, {"x.weight": (1, 2)}, None),
        ({GATE: (8, 4, 4), HEAD: (10, 8)}, {GATE: (4, 4, 4), HEAD: (9, 8)}, None),
        ({"embeddings.position_embeddings.weight": (9, 8)}, {}, None),
    ],
)
def test_a_cause(expected, made, told) -> None:
    made = made or {n: (4, *s[1:]) for n, s in expected.items()}
    found = cause(expected, made)
    assert found is None if told is None else told in str(found)


def test_experts_of_other_ranks() -> None:
    names = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(8)]
    assert "the first 4" in str(cause_of_missing(names[4:], names[:4]))
    assert cause_of_missing(names[3:5], [*names[:3], *names[5:]]) is None
    assert cause_of_missing([*names[4:], HEAD], names[:4]) is None
