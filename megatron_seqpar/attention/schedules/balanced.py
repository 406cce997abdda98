# SPDX-License-Identifier: Apache-2.0
"""`balanced`: contiguous chunks, no rank ever idle (DISTFLASHATTN, arXiv 2310.03294, section 3).

Under a causal mask query chunk i meets the key/value chunks j <= i, so later ranks own more tiles.
Step 0 is everyone's diagonal. At step t a rank r >= t computes its own tile (r, r-t) on the keys
and values of r-t; the ranks r < t, which have no tile left at that distance, compute (P+r-t, r) for
rank P+r-t: they receive its queries, use their own keys and values, and return the partial output.

    P = 5          kv 0    1    2    3    4         a letter pair is "step:rank that computes"
      q 0        0:0
      q 1        1:1  0:1
      q 2        2:2  1:2  0:2
      q 3        2:0  2:3  1:3  0:3                 (3,0) has distance 3 = P-2: helped by rank 0,
                                                          at step 2
      q 4        1:0  2:1  2:4  1:4  0:4            (4,0) has distance 4 = P-1: helped by rank 0
                                                    at step 1

For odd P that is all: (P-1)/2 steps of one tile a rank, after the diagonal. For even P the tiles at
distance P/2 remain, P/2 of them for P ranks. The paper lets half the ranks idle then (efficiency
P/(P+1)); here each such tile is cut between its two owners: the owner of the queries computes the
later rows with the keys and values sent to it, the owner of the keys computes the earlier rows for
queries sent to it. Cutting the queries moves less than cutting the keys whenever KV heads <= query
heads, and the last step costs everybody half a tile, so the idle fraction is 0 for every P.

Under a full mask every rank has P tiles anyway; keys and values come straight from their owners.

What is said of ranks and chunks here holds for nodes and their chunks too (`hybrid.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...errors import ScheduleError
from ..ir import Placed, Problem
from ..layouts import Span
from ..masks import Causal, Full
from ..placement import Placement


def place(problem: Problem) -> Placement:
    """Place the rectangles; `ScheduleError` for other masks and token layouts."""
    check(problem, "balanced")
    return Placement(list(cells(problem.layout.chunks, isinstance(problem.mask, Causal))))


def check(problem: Problem, name: str) -> None:
    """Raise `ScheduleError` where this balance is not one."""
    if not isinstance(problem.mask, Causal | Full):
        raise ScheduleError(
            f"schedule {name!r} does not serve mask {problem.mask.name!r}; it serves causal and "
            "full: use solver or auto"
        )
    if problem.layout.name != "contiguous":
        raise ScheduleError(
            f"schedule {name!r} does not serve {problem.layout.name} token layouts; it serves "
            "contiguous ones: use zigzag, solver or auto"
        )


def cells(chunks: Sequence[Span], causal: bool) -> Iterator[Placed]:
    """Who computes which rectangle when; worker r owns chunk r."""
    size = len(chunks)
    if not causal:
        for step in range(size):
            for rank in range(size):
                yield Placed(step, rank, chunks[rank], chunks[(rank - step) % size])
        return
    for rank, chunk in enumerate(chunks):
        yield Placed(0, rank, chunk, chunk)
    for step in range(1, (size + 1) // 2):
        for rank in range(size):
            if rank >= step:
                yield Placed(step, rank, chunks[rank], chunks[rank - step])
            else:
                yield Placed(step, rank, chunks[size + rank - step], chunks[rank])
    if size % 2 == 0:
        half = size // 2
        for rank in range(half, size):
            helper, queries = rank - half, chunks[rank]
            middle = queries.start + queries.size // 2
            yield Placed(half, helper, Span(queries.start, middle), chunks[helper])
            yield Placed(half, rank, Span(middle, queries.stop), chunks[helper])
