"""What the comparison of two trees' outputs reports."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scripts.same_outputs import Outcome, differences

BEFORE = Outcome(0, "", {"model.safetensors": "aa", "config.json": "bb"}, 400 << 20)


def test_the_same_is_the_same():
    assert differences(BEFORE, replace(BEFORE, peak_bytes=420 << 20)) == []


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (replace(BEFORE, code=3, error="error: damaged"), "exit code 3 in place of 0"),
        (replace(BEFORE, error="error: other"), "'error: other' in place of ''"),
        (replace(BEFORE, files={**BEFORE.files, "config.json": "cc"}), "other files: config.json"),
        (replace(BEFORE, files={"config.json": "bb"}), "other files: model.safetensors"),
        (replace(BEFORE, files={**BEFORE.files, "new": "dd"}), "other files: new"),
        (replace(BEFORE, peak_bytes=470 << 20), "peak 493 MB after 419"),
    ],
)
def test_a_change_is_named(now: Outcome, said: str):
    (found,) = differences(BEFORE, now)
    assert found.startswith(said)
