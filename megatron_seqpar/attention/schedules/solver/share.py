# SPDX-License-Identifier: Apache-2.0
"""Two ranks that fetch the same keys share them out: an exchange of equal work that moves less.

Say ranks a and b each compute their own rows on the same keys. Instead, a computes the rows of both
on the first half of these keys, b on the second: each fetches half the keys, and the other's rows.

    keys     first  second                first  second
    rows a     a      a         ->          a      b
    rows b     b      b                     a      b

Where many keys are common that halves the bytes, and pairs of pairs go on to share in the same way:
blocks grow as wide as they are high, as in a matrix product. The same with rows and keys exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ...layouts import Span
from .assignment import Assignment
from .blocks import KV, Block, Q, most, work


def share(state: Assignment, limit: int) -> int:
    """Make exchanges between two ranks while they lower the cost; returns how many.

    No rank gets more than `limit` pairs, or more than it had.
    """
    made = 0
    changed = set(range(state.size))
    while changed:
        before, changed = changed, set()
        for a in range(state.size):
            for b in range(a + 1, state.size):
                if a in before or b in before or a in changed or b in changed:
                    for axis in (KV, Q):
                        if _exchange(state, axis, a, b, limit):
                            made += 1
                            changed |= {a, b}
    return made


class _Common(NamedTuple):
    """A span that both ranks fetch or own, and their blocks with it."""

    piece: int
    span: Span
    at_a: list[Block]
    at_b: list[Block]
    pairs: int
    saved_by_a: int  # when b computes all of it
    saved_by_b: int


def _common(state: Assignment, axis: int, a: int, b: int) -> Iterator[_Common]:
    of_a, of_b = state.held[axis][a], state.held[axis][b]
    for piece, spans in of_a.items():
        others = of_b.get(piece, {})
        for span in spans:
            if span in others:
                at_a, at_b = spans[span], others[span]
                yield _Common(
                    piece, span, list(at_a), list(at_b), work(at_a) + work(at_b),
                    state.exclusive_cost(axis, piece, span, a),
                    state.exclusive_cost(axis, piece, span, b),
                )  # fmt: skip


def _exchange(state: Assignment, axis: int, a: int, b: int, limit: int) -> bool:
    """Share out the common spans of one operand; False if that would not pay."""
    common = list(_common(state, axis, a, b))
    # to a what b would have to fetch at the greatest cost
    common.sort(key=lambda c: (c.saved_by_a - c.saved_by_b, c.span))
    left = sum(work(c.at_a) for c in common)  # each keeps as much work as it had
    if len(common) < 2 and (not common or left in (0, common[0].pairs)):
        return False
    to_a: list[_Common] = []
    to_b: list[_Common] = []
    cut: tuple[_Common, int] | None = None
    gain = 0
    for c in common:
        if c.pairs <= left:
            to_a.append(c)
            gain += c.saved_by_b
            left -= c.pairs
        elif left > 0:
            cut = c, left
            gain += (c.saved_by_b * left + c.saved_by_a * (c.pairs - left)) // c.pairs
            left = 0
        else:
            to_b.append(c)
            gain += c.saved_by_a
    arriving = [(a, c.at_b) for c in to_a] + [(b, c.at_a) for c in to_b]
    if cut is not None:
        arriving += [(a, cut[0].at_b), (b, cut[0].at_a)]
    if gain <= _fetched(state, 1 - axis, arriving):
        return False
    return _try(state, axis, (a, b), (to_a, cut, to_b), limit)


def _fetched(state: Assignment, axis: int, arriving: list[tuple[int, list[Block]]]) -> int:
    """Cost of the other operand of blocks that come to ranks."""
    needs = {
        (rank, block.pieces[axis], block.spans[axis]): None
        for rank, blocks in arriving
        for block in blocks
    }
    return sum(state.fetch_cost(axis, piece, span, rank) for rank, piece, span in needs)


def _try(
    state: Assignment,
    axis: int,
    ranks: tuple[int, int],
    shares: tuple[list[_Common], tuple[_Common, int] | None, list[_Common]],
    limit: int,
) -> bool:
    """Make an exchange; undo it, and say False, if the exact count does not confirm it."""
    (a, b), (to_a, cut, to_b) = ranks, shares
    cost = state.cost(a) + state.cost(b)
    limit = max(limit, state.load[a], state.load[b])
    done: list[tuple[int, Block, list[tuple[Block | None, int]]]] = []

    def hand(rank: int, block: Block, parts: list[tuple[Block | None, int]]) -> None:
        state.replace(rank, block, parts)
        done.append((rank, block, parts))

    for c in to_a:
        for block in c.at_b:
            hand(b, block, [(block, a)])
    for c in to_b:
        for block in c.at_a:
            hand(a, block, [(block, b)])
    if cut is not None:
        c, kept = cut
        first, last = c.span
        blocks = [*c.at_a, *c.at_b]
        at = first + most(
            lambda n: work(block.part(axis, first, first + n) for block in blocks),
            last - first, kept,
        )  # fmt: skip
        for number, block in enumerate(blocks):
            parts = [(block.part(axis, first, at), a), (block.part(axis, at, last), b)]
            hand(a if number < len(c.at_a) else b, block, parts)
    if state.cost(a) + state.cost(b) < cost and max(state.load[a], state.load[b]) <= limit:
        return True
    for rank, block, parts in reversed(done):
        for part, new in parts:
            if part is not None:
                state.remove(new, part)
        state.add(rank, block)
    return False
