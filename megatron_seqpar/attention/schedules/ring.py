# SPDX-License-Identifier: Apache-2.0
"""`ring`: the naive baseline, kept for comparison (Ring Attention, arXiv 2310.01889).

Every rank passes the keys and values it received on to the next rank, P-1 times, whatever the mask.
At step t rank r holds those of rank r-t. Under a causal mask it has nothing to compute when r < t,
so the last rank works P-1/2 units while the first works half a unit: the others wait for it, and an
idle fraction of (P-1)/(2P-1) is lost. Dead transfers are made all the same, as a ring must.
"""

from __future__ import annotations

from ..ir import Payload, Placed, Problem, Transfer
from ..layouts import Span
from ..placement import Placement


def place(problem: Problem) -> Placement:
    """Place the rectangles; serves every mask and token layout."""
    pieces, size = problem.layout.pieces, problem.size
    kv_heads = Span(0, problem.kv_heads)
    tiles = [
        Placed(step, rank, q, kv)
        for step in range(size)
        for rank in range(size)
        for q in pieces[rank]
        for kv in pieces[(rank - step) % size]
    ]
    relay = [
        (step, Transfer(Payload.KV, piece, rank, (rank + 1) % size, kv_heads))
        for step in range(size - 1)
        for rank in range(size)
        for piece in pieces[(rank - step) % size]
    ]
    return Placement(tiles, relay)
