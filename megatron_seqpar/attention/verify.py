# SPDX-License-Identifier: Apache-2.0
"""Proof that a schedule is right, from its plan alone: nothing here trusts how the plan was made.

Proved, for one pass: every interacting (query, key) pair is computed exactly once; every operand is
on the rank that uses or sends it when it does; every result that belongs to another rank is
returned exactly once, after its last tile; every send has its receive, in the same order per pair
of ranks (the transports have no tags); the steps run to their end without deadlock when neither
sends nor receives are buffered; received operands are freed, and never more than two steps' worth
are held.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np

from ..errors import ScheduleError
from .ir import RETURNS, Direction, Payload, Plan, Problem, Step, Tile, Transfer
from .layouts import Span


def verify(problem: Problem, direction: Direction, plan: Plan) -> bool:
    """Check the whole plan of one pass.

    Returns:
        True.

    Raises:
        ScheduleError: names the first thing found wrong (rank, step, tile or transfer).
    """
    lengths = {len(steps) for steps in plan}
    if len(plan) != problem.layout.size or len(lengths) != 1:
        raise ScheduleError(f"plan for {len(plan)} ranks with {lengths} steps is malformed")
    _check_tiles(problem, plan)
    _check_coverage(problem, plan)
    _check_matching(plan)
    _check_deadlock(plan)
    for rank, steps in enumerate(plan):
        _RankCheck(problem, direction, rank).run(steps)
    return True


def _tiles(plan: Plan) -> list[tuple[int, Tile]]:
    return [
        (rank, tile) for rank, steps in enumerate(plan) for step in steps for tile in step.tiles
    ]


def _check_tiles(problem: Problem, plan: Plan) -> None:
    mask, layout = problem.mask, problem.layout
    for rank, tile in _tiles(plan):
        if tile.pairs != mask.pairs(tile.q, tile.kv) or tile.kind is not mask.kind(tile.q, tile.kv):
            raise ScheduleError(
                f"rank {rank}: tile {tile} does not say what mask {mask.name!r} says"
            )
        if (layout.owner(tile.q), layout.owner(tile.kv)) != (tile.q_owner, tile.kv_owner):
            raise ScheduleError(f"rank {rank}: tile {tile} names the wrong owners")


def _check_coverage(problem: Problem, plan: Plan) -> None:
    """Count, on the grid of all range ends, how often each cell is computed."""
    mask, tiles = problem.mask, _tiles(plan)
    chunks = problem.layout.chunks
    q_edges = sorted({edge for span in (*chunks, *(t.q for _, t in tiles)) for edge in span})
    kv_edges = sorted({edge for span in (*chunks, *(t.kv for _, t in tiles)) for edge in span})
    q_index = {edge: i for i, edge in enumerate(q_edges)}
    kv_index = {edge: i for i, edge in enumerate(kv_edges)}
    difference = np.zeros((len(q_edges), len(kv_edges)), dtype=np.int64)
    for _, tile in tiles:
        q0, q1 = (q_index[edge] for edge in tile.q)
        k0, k1 = (kv_index[edge] for edge in tile.kv)
        difference[q0, k0] += 1
        difference[q1, k1] += 1
        difference[q0, k1] -= 1
        difference[q1, k0] -= 1
    times = difference.cumsum(0).cumsum(1)
    for i, q in enumerate(pairwise(q_edges)):
        for j in np.nonzero(times[i, :-1] != 1)[0]:
            kv = Span(kv_edges[j], kv_edges[j + 1])
            if mask.pairs(Span(*q), kv):
                count = int(times[i, j])
                raise ScheduleError(f"queries {Span(*q)} x keys {kv} are computed {count} times")


def _check_matching(plan: Plan) -> None:
    sent: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    received: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for rank, steps in enumerate(plan):
        for step in steps:
            for t in step.sends:
                if t.src != rank or not 0 <= t.dst < len(plan) or t.dst == rank:
                    raise ScheduleError(f"rank {rank}: send {t} is not one of its own to a peer")
                sent[t.src, t.dst].append(t)
            for t in step.receives:
                if t.dst != rank or not 0 <= t.src < len(plan) or t.src == rank:
                    raise ScheduleError(
                        f"rank {rank}: receive {t} is not one of its own from a peer"
                    )
                received[t.src, t.dst].append(t)
    for pair in sent.keys() | received.keys():
        sends, receives = sent.get(pair, []), received.get(pair, [])
        if sends == receives:
            continue
        missing = Counter(sends)
        missing.subtract(receives)
        unmatched = [t for t, count in missing.items() if count]
        if unmatched:
            side = "send has no receive" if missing[unmatched[0]] > 0 else "receive has no send"
            raise ScheduleError(f"a {side}: {unmatched[0]}")
        raise ScheduleError(
            f"ranks {pair[0]} and {pair[1]} post their transfers in different orders"
        )


def _check_deadlock(plan: Plan) -> None:
    """Run the steps: a rank passes one when its peers posted the other ends of its transfers."""
    size, count = len(plan), len(plan[0])
    # per pair of ranks: how many sends (receives) have been posted so far
    posted_sends: Counter[tuple[int, int]] = Counter()
    posted_receives: Counter[tuple[int, int]] = Counter()
    at = [0] * size

    def post(rank: int) -> None:
        step = plan[rank][at[rank]]
        posted_sends.update((t.src, t.dst) for t in step.sends)
        posted_receives.update((t.src, t.dst) for t in step.receives)

    def complete(rank: int) -> bool:
        # all transfers of this step are the newest posted: the peer must have posted as many
        step = plan[rank][at[rank]]
        return all(
            posted_receives[p] >= posted_sends[p] for p in {(t.src, t.dst) for t in step.sends}
        ) and all(
            posted_sends[p] >= posted_receives[p] for p in {(t.src, t.dst) for t in step.receives}
        )

    for rank in range(size):
        post(rank)
    moved = True
    while moved:
        moved = False
        for rank in range(size):
            while at[rank] < count and complete(rank):
                at[rank] += 1
                moved = True
                if at[rank] < count:
                    post(rank)
    stuck = [f"rank {rank} at step {step}" for rank, step in enumerate(at) if step < count]
    if stuck:
        raise ScheduleError(f"deadlock: {', '.join(stuck[:4])} wait for transfers never posted")


class _RankCheck:
    """One rank's memory, step by step: what it holds, what it owes."""

    def __init__(self, problem: Problem, direction: Direction, rank: int) -> None:
        self.rank, self.layout = rank, problem.layout
        forward = direction == "forward"
        self.q_payload = Payload.Q if forward else Payload.Q_GRAD
        self.q_result = Payload.OUT if forward else Payload.DQ
        self.kv_result = None if forward else Payload.DKV
        self.held: set[tuple[Payload, Span]] = set()
        self.owed: dict[tuple[Payload, Span, int], bool] = {}  # result -> returned

    def run(self, steps: tuple[Step, ...]) -> None:
        """Walk the steps."""
        peak = 0
        for index, step in enumerate(steps):
            where = f"rank {self.rank}, step {index}"
            self._check_sends(step, where)
            for tile in step.tiles:
                self._check_operands(tile, where)
            for t in step.receives:
                if t.payload not in RETURNS:
                    if (t.payload, t.span) in self.held:
                        raise ScheduleError(f"{where}: {t} arrives while it is still held")
                    self.held.add((t.payload, t.span))
                elif self.layout.owner(t.span) != self.rank:
                    raise ScheduleError(
                        f"{where}: {t} returns a result to a rank that does not own it"
                    )
            peak = max(peak, len(self.held))
            for key in step.frees:
                if key not in self.held:
                    raise ScheduleError(f"{where}: frees {key} which it does not hold")
                self.held.remove(key)
        unreturned = [key for key, returned in self.owed.items() if not returned]
        if unreturned:
            raise ScheduleError(f"rank {self.rank} never returns {unreturned[0]}")
        if self.held:
            raise ScheduleError(f"rank {self.rank} never frees {sorted(self.held)[0]}")
        bound = 2 * max(1, max(self._remote_operands(s) for s in steps))
        if peak > bound:
            raise ScheduleError(
                f"rank {self.rank} holds {peak} received operands at once, over {bound}"
            )

    def _remote_operands(self, step: Step) -> int:
        q = {tile.q for tile in step.tiles if tile.q_owner != self.rank}
        kv = {tile.kv for tile in step.tiles if tile.kv_owner != self.rank}
        return len(q) + len(kv)

    def _check_operands(self, tile: Tile, where: str) -> None:
        for payload, span, owner, result in (
            (self.q_payload, tile.q, tile.q_owner, self.q_result),
            (Payload.KV, tile.kv, tile.kv_owner, self.kv_result),
        ):
            if owner == self.rank:
                continue
            if (payload, span) not in self.held:
                raise ScheduleError(
                    f"{where}: computes on {payload.value} {span} before it arrived"
                )
            if result is not None:
                if self.owed.get((result, span, owner)):
                    raise ScheduleError(
                        f"{where}: {result.value} {span} was returned before this tile"
                    )
                self.owed[result, span, owner] = False

    def _check_sends(self, step: Step, where: str) -> None:
        for t in step.sends:
            if t.payload in RETURNS:
                key = t.payload, t.span, t.dst
                if self.owed.get(key) is not False:
                    raise ScheduleError(
                        f"{where}: {t} returns what is not computed or already sent"
                    )
                self.owed[key] = True
            elif (t.payload, t.span) not in self.held and self.layout.owner(t.span) != self.rank:
                raise ScheduleError(f"{where}: {t} sends what this rank does not have")
