# SPDX-License-Identifier: Apache-2.0
"""A length is cut into the number of pieces asked for, and nothing is left over."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_seqpar.memory.spans import spans


@given(st.integers(0, 300), st.integers(1, 320))
def test_pieces_cover_the_length_in_order(length: int, count: int) -> None:
    cut = spans(length, count)
    assert [start for start, _ in cut] == [0, *(stop for _, stop in cut[:-1])]
    assert cut[-1][1] == length
    sizes = [stop - start for start, stop in cut]
    assert max(sizes) - min(sizes) <= 1
    assert len(cut) == max(1, min(count, length))


def test_a_ragged_length_has_no_short_tail() -> None:
    assert spans(10, 4) == [(0, 3), (3, 6), (6, 8), (8, 10)]


@pytest.mark.parametrize(("length", "count"), [(4, 0), (4, -1), (-1, 1)])
def test_nonsense_is_refused(length: int, count: int) -> None:
    with pytest.raises(ValueError, match="cannot cut"):
        spans(length, count)
