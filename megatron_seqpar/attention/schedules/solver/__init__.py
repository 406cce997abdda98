# SPDX-License-Identifier: Apache-2.0
"""`solver`: any mask, any token layout: work balanced, few bytes moved, tokens stay where they are.

Under packed documents or windows no fixed pattern of tiles balances the ranks. Here each problem is
solved, by rule and in milliseconds:

    blocks.py      the mask, cut where the owner of the queries or of the keys changes
    assignment.py  who computes which block; to begin with, the owner that has to fetch less for it
    balance.py     work moves from overloaded ranks where a unit of it moves fewest bytes
    share.py       pairs of ranks that fetch the same tokens share them out
    order.py       steps of equal work on all ranks, operands fetched a step ahead

Below, 4 ranks own 4096 tokens each; six short documents, one of 1024 tokens and one of 11264. A
digit is the rank that computes there: ranks 0 and 1 take over rows of ranks 2 and 3, rank 0 also
fetching keys, rank 1 mostly on keys of its own.

    queries of rank 0     0                 queries of rank 2     .....2222
                          00                                      .....22222
                          ..0                                     .....222222
                          ...0                                    .....0002222
    queries of rank 1     ....1             queries of rank 3     .....00003333
                          .....1                                  .....000033333
                          .....11                                 .....1111111333
                          .....111                                .....11111113333

Bytes are those of a forward and a backward pass together; between nodes they count eight times, and
keys and values cross once a node. Balance: no rank gets more than 1/500 above the mean, but for
what one row of pairs weighs, because a row is not cut. Where ranks are within 4% to begin with (a
window: only the first rank has less to do), 1/60 will do if that saves a fifth of the bytes.

Only integers decide, in a fixed order: every rank finds the same schedule.
"""

from __future__ import annotations

from ...ir import Problem
from ...placement import Placement
from .assignment import Assignment, start
from .balance import balance
from .blocks import blocks_of, pieces_of
from .order import in_steps
from .share import share

TIGHT, LOOSE = 500, 60  # one part in so many that a rank may have above the mean
NEAR = 25  # one part in so many above the mean is near enough to ask whether LOOSE will do
SMALL = 16  # documents inside a rank are handed out together up to this part of the mean


def place(problem: Problem) -> Placement:
    """Place the rectangles; serves every mask and every token layout."""
    tiles = in_steps(problem, assign(problem))
    return Placement(tiles, gateways=1 < problem.node_size < problem.size)


def assign(problem: Problem) -> Assignment:
    """Which rank computes what."""
    pieces = pieces_of(problem)
    mean = problem.total_work // (problem.query_heads * problem.size)
    blocks = blocks_of(problem, pieces, mean // SMALL)
    owners = [owner for owner, _ in pieces]

    def solved(part: int) -> Assignment:
        state, limit = start(problem, owners, blocks), mean + max(mean // part, 1)
        balance(state, limit)
        share(state, limit + mean // 1000)
        return state

    best = solved(TIGHT)
    if mean < max(start(problem, owners, blocks).load) <= mean + mean // NEAR:
        loose = solved(LOOSE)
        if loose.total_cost() * 5 <= best.total_cost() * 4:
            return loose
    return best
