# SPDX-License-Identifier: Apache-2.0
"""`allgather`: every rank gets all keys and values that its queries see, at once.

Two steps of few and large kernel calls, whatever P; but the transfers hide behind nothing except
the local tile, a rank holds as many keys and values as its queries see, and the work is as uneven
as the mask. Only what is seen is sent, straight from its owner: under a causal mask half of what a
collective all-gather moves.
"""

from __future__ import annotations

from ..ir import Placed, Problem
from ..layouts import Span
from ..placement import Placement


def place(problem: Problem) -> Placement:
    """Place the rectangles; serves every mask and token layout."""
    tiles = []
    for rank, pieces in enumerate(problem.layout.pieces):
        ends = [0, *(edge for piece in sorted(pieces) for edge in piece), problem.seq_length]
        between = [Span(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if a < b]
        for q in pieces:
            tiles += [Placed(0, rank, q, kv) for kv in pieces]
            tiles += [Placed(1, rank, q, kv) for kv in between]
    return Placement(tiles)
