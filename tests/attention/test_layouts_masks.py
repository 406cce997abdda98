# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_seqpar.attention import Causal, ContiguousLayout, Full, Span, even_lengths
from megatron_seqpar.attention.masks import TileKind
from megatron_seqpar.errors import ScheduleError

spans = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda p: Span(min(p), max(p)))


@given(spans, spans)
def test_masks_count_the_pairs_they_claim(q: Span, kv: Span) -> None:
    visible = sum(j <= i for i in range(*q) for j in range(*kv))
    assert Causal().pairs(q, kv) == visible
    assert Full().pairs(q, kv) == q.size * kv.size
    kind = Causal().kind(q, kv)
    if kind is TileKind.EMPTY:
        assert visible == 0
    elif kind is TileKind.FULL:
        assert visible == q.size * kv.size
    elif kind is TileKind.CAUSAL:
        assert q == kv
    else:
        assert visible > 0


@given(st.integers(1, 64), st.integers(0, 500))
def test_even_lengths_cover_the_sequence(size: int, more: int) -> None:
    lengths = even_lengths(size + more, size)
    assert sum(lengths) == size + more
    assert max(lengths) - min(lengths) <= 1


def test_a_sequence_shorter_than_the_axis_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"seq_length=3 is shorter than size=4"):
        even_lengths(3, 4)
    with pytest.raises(ScheduleError, match="own no token"):
        ContiguousLayout((4, 0, 4))
    with pytest.raises(ScheduleError, match="exactly one of"):
        ContiguousLayout.of(2, seq_length=8, lengths=(4, 4))
    with pytest.raises(ScheduleError, match="2 entries but size=3"):
        ContiguousLayout.of(3, lengths=(4, 4))


def test_a_span_over_two_owners_has_no_owner() -> None:
    layout = ContiguousLayout((4, 6, 2))
    assert layout.owner(Span(5, 9)) == 1
    assert layout.local(1, Span(5, 9)) == slice(1, 5)
    with pytest.raises(ScheduleError, match="not owned by one rank"):
        layout.owner(Span(3, 5))
