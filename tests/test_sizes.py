"""Sizes: a plain letter is decimal, an ``i`` makes it binary, a share needs its whole."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.api import memory_bytes
from streamconv.errors import UsageError
from streamconv.units import counted, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("32GB", 32_000_000_000),
        ("32gb", 32_000_000_000),
        ("32G", 32_000_000_000),
        ("32GiB", 34_359_738_368),
        ("32Gi", 34_359_738_368),
        ("500MB", 500_000_000),
        ("512MiB", 536_870_912),
        ("4k", 4_000),
        ("4Ki", 4_096),
        ("1.5 GB", 1_500_000_000),
        (" .5kB ", 500),
        ("2TB", 2_000_000_000_000),
        ("17B", 17),
        (4096, 4096),
    ],
)
def test_reads_what_people_type(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "-1GB",
        "0",
        "0.1",
        "32 gigs",
        "1e9",
        "iB",
        "5i",
        "32GBs",
        "nan",
        "1,5GB",
        "101%",
        "%",
    ],
)
def test_refuses_what_is_no_size(text):
    with pytest.raises(UsageError):
        parse_size(text, whole_bytes=1000)


@pytest.mark.parametrize(("text", "nbytes"), [("80%", 800), ("100%", 1000), ("12.5 %", 125)])
def test_a_share_is_one_of_the_whole(text, nbytes):
    assert parse_size(text, whole_bytes=1000) == nbytes


def test_a_share_of_nothing_is_refused():
    with pytest.raises(UsageError, match="makes no sense here"):
        parse_size("80%")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1234, "1.23 kB"),
        (12_345_678, "12.3 MB"),
        (123_456_789, "123 MB"),
        (999_999_999, "1.00 GB"),
        (5_000_000_000, "5.00 GB"),
        (1_234_000_000_000_000, "1234 TB"),
    ],
)
def test_writes_three_digits(nbytes, text):
    assert format_size(nbytes) == text


@given(st.integers(min_value=1, max_value=10**17))
def test_what_is_written_reads_back_within_its_digits(nbytes):
    assert abs(parse_size(format_size(nbytes)) - nbytes) <= nbytes * 0.0051


@given(st.text(max_size=12))
def test_anything_is_a_size_or_a_usage_error(text):
    with contextlib.suppress(UsageError):
        assert parse_size(text, whole_bytes=10**9) > 0


def test_a_budget_of_a_few_bytes_lacks_its_unit():
    with pytest.raises(UsageError, match="did you mean --max-mem 32GB"):
        memory_bytes(" 32 ")
    assert memory_bytes("32GB") == memory_bytes(32 * 10**9)


@pytest.mark.parametrize(("count", "text"), [(0, "0 files"), (1, "1 file"), (2, "2 files")])
def test_one_is_not_several(count, text):
    assert counted(count, "file") == text
