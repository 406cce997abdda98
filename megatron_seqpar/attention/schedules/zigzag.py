# SPDX-License-Identifier: Apache-2.0
"""`zigzag`: worker r computes an early and a late part of the sequence, so that all work alike.

The sequence is cut into 2P parts; worker r computes the queries of parts r and 2P-1-r. Under a
causal mask every step but the diagonal's costs everybody two full tiles. At step t worker r meets
the keys of worker j = r-t (mod P):

    j < r    both of its parts see part j, neither sees part 2P-1-j: only half of the keys and
             values move
    j > r    only its late part sees anything, and it sees parts j and 2P-1-j

They come straight from their owner, 3/4 of what a ring sends on the mean.

In a zigzag token layout worker r owns those parts. In any other, the queries (and in the end the
outputs) move as well: attention permutes to zigzag inside and back. Keys and values need no such
permutation, they go straight to who needs them. That costs about 2 x query heads x local tokens
more, whatever P, and beats `balanced` where its Q-routes cost more: at large groups.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..ir import Placed, Problem
from ..layouts import Span, even_spans
from ..placement import Placement


def place(problem: Problem) -> Placement:
    """Place the rectangles; serves every mask and token layout."""
    return Placement(list(cells(problem, problem.size)))


def cells(problem: Problem, workers: int) -> Iterator[Placed]:
    """Who computes which rectangle when, for a number of workers (ranks, or nodes)."""
    parts = even_spans(Span(0, problem.seq_length), 2 * workers)
    pairs = [(parts[worker], parts[-1 - worker]) for worker in range(workers)]
    for step in range(workers):
        for worker in range(workers):
            for q in pairs[worker]:
                for kv in pairs[(worker - step) % workers]:
                    if problem.pairs(q, kv):
                        yield Placed(step, worker, q, kv)
