# SPDX-License-Identifier: Apache-2.0
"""Proof that a schedule is right, from its plan alone: nothing here trusts how the plan was made.

Proved, for one pass: every interacting (query, key, head) is computed exactly once; every operand
is on the rank that uses or sends it when it does; every result that belongs to another rank goes
back to it exactly once, after its last part, over gateways or not; every send has its receive, in
the same order per pair of ranks (the transports have no tags); the steps run to their end without
deadlock when neither sends nor receives are buffered; operands arrive no earlier than one step
before they are needed and are freed after their last use.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

from ..errors import ScheduleError
from .ir import RETURNS, Direction, Key, Payload, Plan, Problem, Step, Tile, Transfer
from .layouts import Span
from .masks import Region


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
    _check_coverage(problem, plan)
    _check_matching(plan)
    _check_deadlock(plan)
    for rank, steps in enumerate(plan):
        _RankCheck(problem, direction, rank, steps).run()
    return True


def _check_coverage(problem: Problem, plan: Plan) -> None:
    """Every tile is a part of one region of the mask; together they are each region once."""
    of_region: dict[int, list[Tile]] = defaultdict(list)
    for rank, steps in enumerate(plan):
        for step in steps:
            for tile in step.tiles:
                number = problem.index.find(tile.region)
                if number is None or tile.pairs != tile.region.pairs:
                    raise ScheduleError(
                        f"rank {rank}: tile {tile} does not say what mask {problem.mask.name!r} "
                        "says"
                    )
                problem.kv_range(tile.heads)
                of_region[number].append(tile)
    for number, region in enumerate(problem.index.regions):
        tiles = of_region[number]
        edges = sorted({0, problem.query_heads, *(edge for tile in tiles for edge in tile.heads)})
        for heads in map(Span._make, pairwise(edges)):
            _check_region(region, heads, [t for t in tiles if t.heads.meet(heads) == heads])


def _check_region(region: Region, heads: Span, tiles: list[Tile]) -> None:
    """Count, on the grid of all tiles' ends, how often each cell is computed."""
    if len(tiles) == 1 and tiles[0].region == region:
        return
    import numpy as np  # here, so that settings and planning import nothing heavy

    q_edges = sorted({edge for span in (region.q, *(t.q for t in tiles)) for edge in span})
    kv_edges = sorted({edge for span in (region.kv, *(t.kv for t in tiles)) for edge in span})
    q_number = {edge: i for i, edge in enumerate(q_edges)}
    kv_number = {edge: i for i, edge in enumerate(kv_edges)}
    difference = np.zeros((len(q_edges), len(kv_edges)), dtype=np.int64)
    for tile in tiles:
        q0, q1 = (q_number[edge] for edge in tile.q)
        k0, k1 = (kv_number[edge] for edge in tile.kv)
        difference[q0, k0] += 1
        difference[q1, k1] += 1
        difference[q0, k1] -= 1
        difference[q1, k0] -= 1
    times = difference.cumsum(0).cumsum(1)
    for i, q in enumerate(map(Span._make, pairwise(q_edges))):
        for j in np.nonzero(times[i, :-1] != 1)[0]:
            cell = region.clip(q, Span(kv_edges[j], kv_edges[j + 1]))
            if cell is not None:
                raise ScheduleError(
                    f"queries {cell.q} x keys {cell.kv} of heads {heads} are computed "
                    f"{int(times[i, j])} times"
                )


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

    def __init__(
        self, problem: Problem, direction: Direction, rank: int, steps: tuple[Step, ...]
    ) -> None:
        self.problem, self.layout, self.rank, self.steps = problem, problem.layout, rank, steps
        forward = direction == "forward"
        self.q_payload = Payload.Q if forward else Payload.Q_GRAD
        self.q_result = Payload.OUT if forward else Payload.DQ
        self.kv_result = None if forward else Payload.DKV
        self.held: dict[Key, int] = {}  # operand -> step of arrival
        self.used: dict[Key, list[int]] = {}  # operand -> steps that use it
        # result -> step at which it is sent off, and the parts of it that were summed up so far
        self.sent_at: dict[Key, int] = {}
        self.summed: dict[Key, list[Span]] = defaultdict(list)

    def run(self) -> None:
        """Walk the steps."""
        for index, step in enumerate(self.steps):
            for t in step.sends:
                if t.payload in RETURNS:
                    self._announce(t, index)
        for index, step in enumerate(self.steps):
            where = f"rank {self.rank}, step {index}"
            self._check_sends(step, index, where)
            for tile in step.tiles:
                self._check_tile(tile, index, where)
            for t in step.receives:
                self._check_receive(t, index, where)
            for key in step.frees:
                self._check_free(key, index, where)
        for key in self.sent_at:
            if not _covers(self.summed[key], key[1]):
                raise ScheduleError(f"rank {self.rank} returns {key} without computing all of it")
        if self.held:
            raise ScheduleError(f"rank {self.rank} never frees {sorted(self.held)[0]}")

    def _announce(self, t: Transfer, index: int) -> None:
        for payload, span, heads in self.sent_at:
            if payload is t.payload and heads == t.heads and span.meet(t.span).size > 0:
                raise ScheduleError(f"rank {self.rank} returns {span} and {t.span} of {payload}")
        self.sent_at[t.key] = index

    def _check_sends(self, step: Step, index: int, where: str) -> None:
        for t in step.sends:
            if t.payload in RETURNS:
                if not self.summed[t.key]:
                    raise ScheduleError(f"{where}: {t} returns what is not computed")
            elif t.key in self.held:
                self.used[t.key].append(index)
            elif not self.layout.owns(self.rank, t.span):
                raise ScheduleError(f"{where}: {t} sends what this rank does not have")

    def _check_tile(self, tile: Tile, index: int, where: str) -> None:
        kv_heads = self.problem.kv_range(tile.heads)
        for payload, heads, span, result in (
            (self.q_payload, tile.heads, tile.q, self.q_result),
            (Payload.KV, kv_heads, tile.kv, self.kv_result),
        ):
            remote = [part for owner, part in self.layout.split(span) if owner != self.rank]
            for part in remote:
                keys = [
                    key
                    for key in self.held
                    if key[0] is payload and key[2] == heads and key[1].meet(part).size > 0
                ]
                if not _covers([key[1] for key in keys], part):
                    raise ScheduleError(
                        f"{where}: computes on {payload.value} {part} before it arrived"
                    )
                for key in keys:
                    self.used[key].append(index)
                if result is not None:
                    self._sum_up(result, part, heads, index, where)

    def _sum_up(self, result: Payload, part: Span, heads: Span, index: int, where: str) -> None:
        """A partial result joins those that will be sent off later."""
        keys = [
            key
            for key in self.sent_at
            if key[0] is result and key[2] == heads and key[1].meet(part).size > 0
        ]
        if not _covers([key[1] for key in keys], part):
            raise ScheduleError(f"{where}: {result.value} {part} is never returned")
        for key in keys:
            if self.sent_at[key] <= index:
                raise ScheduleError(f"{where}: {result.value} {part} was returned before this")
            self.summed[key].append(key[1].meet(part))

    def _check_receive(self, t: Transfer, index: int, where: str) -> None:
        if t.payload not in RETURNS:
            if t.key in self.held:
                raise ScheduleError(f"{where}: {t} arrives while it is still held")
            self.held[t.key], self.used[t.key] = index, []
        elif not self.layout.owns(self.rank, t.span):
            # a gateway: it must pass the sum on
            self._sum_up(t.payload, t.span, t.heads, index, where)

    def _check_free(self, key: Key, index: int, where: str) -> None:
        arrived = self.held.pop(key, None)
        if arrived is None:
            raise ScheduleError(f"{where}: frees {key} which it does not hold")
        uses = self.used.pop(key)
        if uses and min(uses) != arrived + 1:
            raise ScheduleError(
                f"{where}: {key} arrived {min(uses) - arrived} steps before its use"
            )
        if index > max([*uses, arrived + 1]):
            raise ScheduleError(f"{where}: {key} is freed late, its last use was {max(uses)}")


def _covers(parts: Iterable[Span], whole: Span) -> bool:
    """Whether the parts together contain `whole`."""
    end = whole.start
    for part in sorted(parts):
        if part.start > end:
            break
        end = max(end, part.stop)
    return end >= whole.stop
