# SPDX-License-Identifier: Apache-2.0
"""`ring`: the naive baseline, kept for comparison (Ring Attention, arXiv 2310.01889).

Every rank passes the keys and values it received on to the next rank, P-1 times, whatever the mask.
At step t rank r holds those of rank r-t. Under a causal mask it has nothing to compute when r < t,
so the last rank works P-1/2 units while the first works half a unit: the others wait for it, and an
idle fraction of (P-1)/(2P-1) is lost. Dead transfers are made all the same, as a ring must.
"""

from __future__ import annotations

from ...errors import ScheduleError
from ..ir import Payload, Placed, Problem, Transfer
from ..masks import Causal, Full
from .placement import Placement


def place(problem: Problem) -> Placement:
    """Place the tiles; `ScheduleError` for masks other than causal and full."""
    if not isinstance(problem.mask, Causal | Full):
        raise ScheduleError(
            f"schedule 'ring' does not serve mask {problem.mask.name!r}; use causal or full"
        )
    chunks, size = problem.layout.chunks, problem.layout.size
    tiles = [
        Placed(step, rank, chunks[rank], chunks[(rank - step) % size])
        for step in range(size)
        for rank in range(size)
    ]
    relay = [
        (step, Transfer(Payload.KV, chunks[(rank - step) % size], rank, (rank + 1) % size))
        for step in range(size - 1)
        for rank in range(size)
    ]
    return Placement(tiles, relay)
