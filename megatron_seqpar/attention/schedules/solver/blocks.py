# SPDX-License-Identifier: Apache-2.0
"""Blocks: what of a mask lies in the queries of one owner's piece and the keys of another's.

They are the units of work that the solver hands out, whole or cut at a row or a column.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from ...ir import Problem
from ...layouts import Span
from ...masks import Region

Q, KV = 0, 1
"""The two operands of a block; `block.span(Q)` are its rows, `block.span(KV)` its columns."""


class Block(NamedTuple):
    """A rectangle of pairs to be computed in one place.

    Attributes:
        spans: its queries and its keys, no more than the mask needs.
        pieces: numbers of the pieces of the token layout that they lie in.
        pairs: interacting pairs: the block's work.
        regions: what of the mask lies in it.
    """

    spans: tuple[Span, Span]
    pieces: tuple[int, int]
    pairs: int
    regions: tuple[Region, ...]

    def part(self, axis: int, start: int, stop: int) -> Block | None:
        """What lies in some of its rows (axis Q) or columns (axis KV); None if nothing does."""
        if stop <= start:
            return None
        q, kv = self.spans
        if axis == Q:
            q = Span(start, stop)
        else:
            kv = Span(start, stop)
        parts = [part for region in self.regions if (part := region.clip(q, kv)) is not None]
        return _block(parts, self.pieces) if parts else None


def pieces_of(problem: Problem) -> list[tuple[int, Span]]:
    """(owner, span) of every piece of the token layout, in token order."""
    return list(problem.layout.split(Span(0, problem.seq_length)))


def blocks_of(problem: Problem, pieces: Sequence[tuple[int, Span]], small: int) -> list[Block]:
    """All pairs of the mask, in blocks that do not overlap.

    Small blocks in a row (documents inside a rank) are taken together up to `small` pairs.
    """
    found: dict[tuple[int, int], list[Region]] = defaultdict(list)
    starts = [span.start for _, span in pieces]

    def near(span: Span) -> range:
        return range(bisect_right(starts, span.start) - 1, bisect_right(starts, span.stop - 1))

    for region in problem.index.regions:
        for row in near(region.q):
            strip = region.clip(pieces[row][1], region.kv)
            for column in near(strip.kv) if strip is not None else ():
                part = region.clip(pieces[row][1], pieces[column][1])
                if part is not None:
                    found[row, column].append(part)
    return [
        _block(parts, at)
        for at, regions in found.items()
        for parts in _clumps(list(_disjoint(regions)), small)
    ]


def _disjoint(regions: list[Region]) -> Iterator[list[Region]]:
    """Regions together whose rectangles overlap: a schedule places rectangles, not regions."""
    together: list[Region] = []
    stop = 0
    for region in sorted(regions, key=lambda region: (region.q, region.kv)):
        if together and region.q.start >= stop:
            yield from _overlapping(together)
            together = []
        together.append(region)
        stop = max(stop, region.q.stop)
    yield from _overlapping(together)


def _overlapping(regions: list[Region]) -> Iterator[list[Region]]:
    done: list[tuple[Span, Span, list[Region]]] = []
    for region in regions:
        q, kv, parts, at = region.q, region.kv, [region], 0
        while at < len(done):
            other_q, other_kv, others = done[at]
            if q.meet(other_q).size > 0 and kv.meet(other_kv).size > 0:
                q, kv, parts = _hull((q, other_q)), _hull((kv, other_kv)), [*others, *parts]
                del done[at]
                at = 0  # the larger rectangle may overlap what the smaller one did not
            else:
                at += 1
        done.append((q, kv, parts))
    return (parts for _, _, parts in done)


def _clumps(groups: list[list[Region]], small: int) -> Iterator[list[Region]]:
    """Neighbours taken together while they are small, where that keeps rectangles apart."""
    hulls = [(_hull(r.q for r in group), _hull(r.kv for r in group)) for group in groups]
    # down a staircase no rectangle around neighbours meets another
    if any(b[at].start < a[at].stop for a, b in pairwise(hulls) for at in (Q, KV)):
        yield from groups
        return
    clump: list[Region] = []
    for group in groups:
        if clump and sum(region.pairs for region in (*clump, *group)) > small:
            yield clump
            clump = []
        clump = clump + group
    yield clump


def _hull(spans: Iterable[Span]) -> Span:
    starts, stops = zip(*spans, strict=True)
    return Span(min(starts), max(stops))


def _block(parts: Sequence[Region], pieces: tuple[int, int]) -> Block:
    if len(parts) == 1:
        only = parts[0]
        return Block((only.q, only.kv), pieces, only.pairs, (only,))
    spans = _hull(part.q for part in parts), _hull(part.kv for part in parts)
    return Block(spans, pieces, sum(part.pairs for part in parts), tuple(parts))


def work(blocks: Iterable[Block | None]) -> int:
    """Pairs of blocks, some of which may be nothing."""
    return sum(block.pairs for block in blocks if block is not None)


def most(measure: Callable[[int], int], size: int, want: int) -> int:
    """The largest n <= size with measure(n) <= want, by bisection; measure never decreases."""
    low, high = 0, size
    while low < high:
        middle = (low + high + 1) // 2
        if measure(middle) <= want:
            low = middle
        else:
            high = middle - 1
    return low
