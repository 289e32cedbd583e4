"""The CRC-32 of a record, however its bytes come in, is zlib's."""

from __future__ import annotations

import itertools
import random
import zlib

from hypothesis import given
from hypothesis import strategies as st

from streamconv.torchfile.crc import Coverage, crc32, crc32_combine


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combine(a: bytes, b: bytes) -> None:
    assert crc32_combine(crc32(a), crc32(b), len(b)) == zlib.crc32(a + b)


def test_literal() -> None:
    assert crc32(b"123456789") == 0xCBF43926  # the check value in every CRC-32 catalogue


@given(st.binary(min_size=1, max_size=400), st.data())
def test_pieces_in_any_order_with_overlaps(data: bytes, draw: st.DataObject) -> None:
    n = len(data)
    cuts = sorted({0, n, *draw.draw(st.lists(st.integers(0, n), max_size=8))})
    pieces = list(itertools.pairwise(cuts))
    for _ in range(draw.draw(st.integers(0, 3))):
        a = draw.draw(st.integers(0, n - 1))
        pieces.append((a, draw.draw(st.integers(a + 1, n))))
    random.Random(draw.draw(st.integers())).shuffle(pieces)
    seen = Coverage()
    for a, b in pieces:
        seen.add(a, memoryview(data)[a:b])
        seen = Coverage(seen.intervals())  # as a resumed run would
    assert list(seen.missing(n)) == []
    assert seen.whole(n) == zlib.crc32(data)


def test_missing_bytes_are_named() -> None:
    seen = Coverage()
    seen.add(2, memoryview(b"cd"))
    seen.add(6, memoryview(b"g"))
    assert seen.whole(8) is None
    assert list(seen.missing(8)) == [(0, 2), (4, 6), (7, 8)]
    assert Coverage().whole(0) == 0
