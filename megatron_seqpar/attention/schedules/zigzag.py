# SPDX-License-Identifier: Apache-2.0
"""`zigzag`: worker r computes an early and a late part of the sequence, so that all work alike.

The sequence is cut into 2P parts; worker r computes the queries of parts r and 2P-1-r. Under a
causal mask every step but the diagonal's costs everybody two full tiles. At step t worker r meets
the keys of worker j = r-t (mod P):

    j < r    both of its parts see part j, neither sees part 2P-1-j: only half of the keys and
             values move
    j > r    only its late part sees anything, and it sees parts j and 2P-1-j

They come straight from their owner, 3/4 of what a ring sends on the mean.

In a zigzag token layout rank r owns those parts and is worker r. In a contiguous one attention
permutes to zigzag inside and back: the owner of one of a worker's two parts takes that worker's
place, so half of the queries move to it, and half of the outputs back. Keys and values need no
permutation, they go straight to who needs them. That costs about query heads x local tokens more,
whatever P, and beats `balanced` where its Q-routes cost more: at large groups.
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
    places = range(workers) if problem.layout.name == "zigzag" else _owners(workers)
    for step in range(workers):
        for worker, place in enumerate(places):
            for q in pairs[worker]:
                for kv in pairs[(worker - step) % workers]:
                    if problem.pairs(q, kv):
                        yield Placed(step, place, q, kv)


def _owners(workers: int) -> list[int]:
    """Who of the owners of contiguous chunks, two parts each, takes which worker's place.

    Parts w and 2W-1-w lie in chunks w//2 and W-1-w//2: even workers take the first, odd ones the
    last, and everybody is taken once.
    """
    return [w // 2 if w % 2 == 0 else workers - 1 - w // 2 for w in range(workers)]
