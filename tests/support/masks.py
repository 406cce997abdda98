# SPDX-License-Identifier: Apache-2.0
"""Random masks, and what they mean said pair by pair (independent of regions)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from megatron_seqpar.attention import Causal, Documents, Full, Mask, Prefix, Ranges, SlidingWindow


def _window(mask: Any, i: int, j: int) -> bool:
    if mask.right >= 0 and j > i + mask.right:
        return False
    return mask.left < 0 or j >= i - mask.left or j < mask.sink_tokens


def _documents(mask: Any, i: int, j: int) -> bool:
    ends = mask.cu_seqlens
    if max(i, j) >= ends[-1] or bisect_right(ends, i) != bisect_right(ends, j):
        return False
    start = ends[bisect_right(ends, i) - 1]
    return SEES[mask.inner.name](mask.inner, i - start, j - start)


def _ranges(mask: Any, i: int, j: int) -> bool:
    for q, kv, low, high in mask.blocks:
        inside = q.start <= i < q.stop and kv.start <= j < kv.stop
        if inside and (low is None or j - i >= low) and (high is None or j - i <= high):
            return True
    return False


SEES: dict[str, Callable[[Any, int, int], bool]] = {
    "causal": lambda mask, i, j: j <= i,
    "full": lambda mask, i, j: True,
    "window": _window,
    "prefix": lambda mask, i, j: j <= i or j < mask.length,
    "documents": _documents,
    "ranges": _ranges,
}
"""Whether query i sees key j, by the mask's name."""


def plain_masks(seq_length: int) -> st.SearchStrategy[Mask]:
    """Masks without parts."""
    limit = st.integers(-1, seq_length + 2)
    return st.one_of(
        st.just(Causal()),
        st.just(Full()),
        st.builds(SlidingWindow, limit, limit, st.integers(0, 5)),
        st.builds(Prefix, st.integers(0, seq_length + 3)),
    )


@st.composite
def ranges(draw: st.DrawFn, seq_length: int) -> Ranges:
    """Blocks of a random grid, each with a random kind."""
    cuts = st.lists(st.integers(1, seq_length - 1), max_size=4, unique=True).map(sorted)
    rows, columns = ([0, *draw(cuts), seq_length] for _ in range(2))
    kinds = st.sampled_from(["full", "causal", "inverse", "both", "none"])
    blocks = []
    for q in pairwise(rows):
        for kv in pairwise(columns):
            kind = draw(kinds)
            if kind == "both" and kv[1] - q[1] < kv[0] - q[0]:
                kind = "causal"  # a band needs room for both its sides
            if kind != "none":
                blocks.append((q, kv, kind))
    return Ranges.of(blocks)


def masks(seq_length: int) -> st.SearchStrategy[Mask]:
    """Any mask of a sequence of that length."""
    ends = st.lists(st.integers(0, seq_length), max_size=6).map(lambda e: (0, *sorted(e)))
    documents = st.builds(Documents, ends, plain_masks(seq_length))
    return st.one_of(plain_masks(seq_length), documents, ranges(seq_length))
