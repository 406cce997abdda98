# SPDX-License-Identifier: Apache-2.0
"""Token layouts and masks against their definitions, pair by pair."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_seqpar.attention import (
    Causal,
    Documents,
    Full,
    Mask,
    Prefix,
    Ranges,
    Region,
    SlidingWindow,
    Span,
    TokenLayout,
    as_mask,
    even_lengths,
)
from megatron_seqpar.attention.masks import RegionIndex, Samples, TileKind
from megatron_seqpar.errors import ScheduleError
from tests.support.masks import SEES, masks

spans = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda p: Span(min(p), max(p)))
bounds = st.none() | st.integers(-14, 14)


def _pairs(region: Region) -> set[tuple[int, int]]:
    return {
        (i, j)
        for i in range(*region.q)
        for j in range(*region.kv)
        if (region.low is None or j - i >= region.low)
        and (region.high is None or j - i <= region.high)
    }


@given(spans, spans, spans, spans, bounds, bounds)
def test_a_clipped_region_is_what_lies_in_the_rectangle(
    q: Span, kv: Span, rows: Span, columns: Span, low: int | None, high: int | None
) -> None:
    if low is not None and high is not None and low > high:
        low, high = high, low
    region = Region(q, kv, low, high)
    inside = {p for p in _pairs(region) if p[0] in range(*rows) and p[1] in range(*columns)}
    clipped = region.clip(rows, columns)
    if clipped is None:
        assert not inside
        return
    assert _pairs(clipped) == inside
    assert clipped.pairs == len(inside)
    # no row and no column without a pair, no limit that cuts nothing off
    assert {i for i, _ in inside} == set(range(*clipped.q))
    assert {j for _, j in inside} == set(range(*clipped.kv))
    area = clipped.q.size * clipped.kv.size
    assert (clipped.kind is TileKind.FULL) == (len(inside) == area)
    for loose in (clipped._replace(low=None), clipped._replace(high=None)):
        assert loose == clipped or loose.pairs > clipped.pairs
    if clipped.kind is TileKind.CAUSAL:
        corner = clipped.kv.start - clipped.q.start
        assert inside == {
            (i, j) for i in range(*clipped.q) for j in range(*clipped.kv) if j <= i + corner
        }


@given(masks(20), spans, spans)
def test_masks_say_what_their_definitions_say(mask: Mask, q: Span, kv: Span) -> None:
    sees = SEES[mask.name]
    visible = {(i, j) for i in range(20) for j in range(20) if sees(mask, i, j)}
    regions = mask.regions(20)
    assert sum(region.pairs for region in regions) == len(visible)
    assert set().union(*(_pairs(region) for region in regions)) == visible
    index = RegionIndex(regions)
    found = list(index.clip(q, kv))
    expected = {(i, j) for i, j in visible if i in range(*q) and j in range(*kv)}
    assert set().union(*map(_pairs, found)) == expected
    assert index.pairs(q, kv) == len(expected)
    assert all(index.find(part) is not None for part in found)


def test_samples_are_laid_end_to_end() -> None:
    mask = Samples((Causal(), Documents((0, 2, 5)), Full()), 5)
    pairs = set().union(*(_pairs(region) for region in mask.regions(15)))
    assert {(i, j) for i, j in pairs if i < 5} == {(i, j) for i in range(5) for j in range(i + 1)}
    assert {(i, j) for i, j in pairs if i >= 10} == {
        (i, j) for i in range(10, 15) for j in range(10, 15)
    }
    assert (7, 5) not in pairs
    assert (6, 5) in pairs
    with pytest.raises(ScheduleError, match="3 of 5 tokens are not 14"):
        mask.regions(14)


def test_ranges_that_share_a_pair_are_refused() -> None:
    triangles = Ranges.of([((0, 8), (0, 8), "causal"), ((0, 8), (0, 8), "inverse")])
    with pytest.raises(ScheduleError, match="share pairs"):
        triangles.regions(8)  # both hold the diagonal
    apart = Ranges.of([((0, 8), (0, 8), "causal"), ((0, 7), (1, 8), "inverse")])
    assert sum(region.pairs for region in apart.regions(8)) == 64
    with pytest.raises(ScheduleError, match="leaves the sequence of 7 tokens"):
        apart.regions(7)
    with pytest.raises(ScheduleError, match="kind='diagonal': use full, causal, inverse or both"):
        Ranges.of([((0, 8), (0, 8), "diagonal")])
    with pytest.raises(ScheduleError, match="needs as many keys as queries"):
        Ranges.of([((0, 8), (0, 7), "both")])


def test_masks_from_text() -> None:
    assert as_mask("causal") == Causal()
    assert as_mask("full") == Full()
    assert as_mask("window:4096") == SlidingWindow(4096)
    assert as_mask("window:4,2") == SlidingWindow(4, 2)
    assert as_mask("window:4,0,3") == SlidingWindow(4, 0, 3)
    assert as_mask("prefix:17") == Prefix(17)
    assert as_mask("documents:3,9,12") == Documents((0, 3, 9, 12))
    for text in ("window", "window:a", "causal:3", "striped", "documents", "prefix:1,2"):
        with pytest.raises(ScheduleError, match="is unknown; use one of causal, full, window"):
            as_mask(text)


def test_masks_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ScheduleError, match="left=-2"):
        SlidingWindow(-2)
    with pytest.raises(ScheduleError, match="length=-1"):
        Prefix(-1)
    for ends in ((), (1, 4), (0, 5, 3)):
        with pytest.raises(ScheduleError, match="start with 0 and never decrease"):
            Documents(ends)
    with pytest.raises(ScheduleError, match="end at 9, after 8 tokens"):
        Documents((0, 9)).regions(8)


# ---- token layouts ----------------------------------------------------------------------------


@given(st.integers(1, 64), st.integers(0, 500))
def test_even_lengths_cover_the_sequence(size: int, more: int) -> None:
    lengths = even_lengths(size + more, size)
    assert sum(lengths) == size + more
    assert max(lengths) - min(lengths) <= 1


def test_a_sequence_shorter_than_the_axis_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"seq_length=3 is shorter than size=4"):
        even_lengths(3, 4)
    with pytest.raises(ScheduleError, match="own no token"):
        TokenLayout.contiguous(3, lengths=(4, 0, 4))
    with pytest.raises(ScheduleError, match="exactly one of"):
        TokenLayout.contiguous(2, seq_length=8, lengths=(4, 4))
    with pytest.raises(ScheduleError, match="2 entries but size=3"):
        TokenLayout.contiguous(3, lengths=(4, 4))
    with pytest.raises(ScheduleError, match="have no one owner"):
        TokenLayout(((Span(0, 4),), (Span(3, 6),)))


def test_a_span_over_two_owners_has_no_owner() -> None:
    layout = TokenLayout.contiguous(3, lengths=(4, 6, 2))
    assert layout.owner(Span(5, 9)) == 1
    assert layout.local(1, Span(5, 9)) == slice(1, 5)
    assert list(layout.split(Span(3, 11))) == [(0, Span(3, 4)), (1, Span(4, 10)), (2, Span(10, 11))]
    for span in (Span(3, 5), Span(5, 5), Span(10, 13), Span(-1, 2)):
        with pytest.raises(ScheduleError, match="not owned by one rank"):
            layout.owner(span)
    with pytest.raises(ScheduleError, match="does not hold tokens"):
        layout.local(1, Span(3, 5))


@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 3))
def test_zigzag_gives_each_rank_an_early_and_a_late_part(size: int, more: int, batch: int) -> None:
    layout = TokenLayout.zigzag(size, size + more).repeated(batch)
    total = (size + more) * batch
    owner = {t: rank for rank, p in enumerate(layout.pieces) for s in p for t in range(*s)}
    assert sorted(owner) == list(range(total))
    assert layout.seq_length == total
    for rank, pieces in enumerate(layout.pieces):
        held = [token for piece in pieces for token in range(*piece)]
        for piece in pieces:
            at = layout.local(rank, piece)
            assert held[at] == list(range(*piece))
        assert layout.lengths[rank] == len(held)
    for start, stop in pairwise(range(0, total + 1, 3)):
        assert [t for rank, part in layout.split(Span(start, stop)) for t in range(*part)] == list(
            range(start, stop)
        )
        assert all(owner[p.start] == r for r, p in layout.split(Span(start, stop)))
