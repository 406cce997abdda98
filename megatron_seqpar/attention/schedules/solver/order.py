# SPDX-License-Identifier: Apache-2.0
"""When every block is computed: steps of equal work on all ranks, transfers ahead of their use.

Each rank lines up its blocks: local ones, then those that need remote operands, then the rest of
the local ones, which hide the last results on their way back. All lines are cut at the same
fractions of their length, so in every step all ranks have the same share of their work to do and
nobody waits. The first cut is where the first rank runs out of local work.

Which remote block is next is decided step by step, for the ranks in turn: first those whose queries
were sent here, since their results go back; among them, one whose operands come from owners that
have the least to send at that time.
"""

from __future__ import annotations

from ...ir import Placed, Problem
from ...layouts import Span
from .assignment import Assignment, uncovered
from .blocks import KV, Block, Q, most, work

Rectangle = tuple[Span, Span]

SNAP = 512  # a cut moves to a block's end within 1/SNAP of a rank's work, over all its steps


def in_steps(problem: Problem, state: Assignment) -> list[Placed]:
    """The blocks of all ranks by step, as few rectangles as they make."""
    local, load = _least_local(state)
    count = _count(problem, state) if local < load else 0
    if count == 1 and local * 3 >= load * 2:
        count = 2  # room for results to return while local work goes on
    if local * (count + 1) > load:
        local, load = 1, count + 1
    elif local * SNAP < load:
        local = 0  # nothing worth a step of its own
    # where some rank runs short of local work at once, the others let it fetch first
    early = 1 if local * 2 * (count + 1) < load else 0
    lines = []
    for rank in range(state.size):
        total = state.load[rank]
        ends = [
            total * (local * count + (load - local) * step) // (load * count) if count else total
            for step in range(count + 1)
        ]
        lines.append(_Line(state, rank, ends, min(early, count)))
    placed = []
    for step in range(count + 1):
        sending = [0] * state.size  # what each owner has to send for this step
        for turn in range(state.size):
            line = lines[(turn + step) % state.size]
            rectangles = _joined([block.spans for block in line.fill(step, sending)])
            placed += [Placed(step, line.rank, q, kv) for q, kv in rectangles]
    return placed


def _count(problem: Problem, state: Assignment) -> int:
    """Steps after the first: one for every two chunks of keys and values that the busiest fetches.

    More steps would start on remote blocks earlier, but cut the work into smaller tiles.
    """
    chunk = max(1, state.token_cost[KV] * problem.seq_length // state.size)
    most_fetched = max(map(state.cost, range(state.size)))
    return min(max(1, -(-most_fetched // (2 * chunk))), -(-state.size // 4))


def _least_local(state: Assignment) -> tuple[int, int]:
    """(local work, all work) of the rank whose share of local work is least."""
    local, load = 1, 1
    for rank, total in enumerate(state.load):
        mine = sum(block.pairs for block in state.blocks(rank) if state.is_local(rank, block))
        if mine * load < local * total:
            local, load = mine, total
    return local, load


class _Line:
    """The blocks of one rank, taken one after another.

    Args:
        ends: work done at the end of each step.
        early: the step whose end local work should reach at the beginning, if there is as much.
    """

    def __init__(self, state: Assignment, rank: int, ends: list[int], early: int) -> None:
        self.state, self.rank, self.ends = state, rank, ends
        self.snap = ends[-1] // (SNAP * len(ends))
        self.done = 0
        blocks = sorted(state.blocks(rank), key=lambda block: block.spans)
        local = [block for block in blocks if state.is_local(rank, block)]
        self.first, self.last = self._split(local, ends[early])
        self.remote = [block for block in blocks if not state.is_local(rank, block)]
        self.fetched: dict[tuple[int, int], list[Span]] = {}
        self.rest: Block | None = None

    def fill(self, step: int, sending: list[int]) -> list[Block]:
        """The blocks of the next step; `sending` counts what they make the owners send."""
        taken: list[Block] = []
        final = step == len(self.ends) - 1
        while final or self.ends[step] - self.done > self.snap:
            block = self._next(sending)
            if block is None:
                break
            left = self.ends[step] - self.done
            if not final and block.pairs > left + self.snap:
                part, self.rest = self._cut(block, left)
                if part is None:
                    break
                block = part
            taken.append(block)
            self.done += block.pairs
            for owner, cost in self._fetch(block):
                sending[owner] += cost
            for axis in (Q, KV):
                self.fetched.setdefault((axis, block.pieces[axis]), []).append(block.spans[axis])
        return taken

    def _next(self, sending: list[int]) -> Block | None:
        if self.rest is not None:
            block, self.rest = self.rest, None
            return block
        if self.first:
            return self.first.pop(0)
        if self.remote:
            block = min(self.remote, key=lambda block: self._when(block, sending))
            self.remote.remove(block)
            return block
        return self.last.pop(0) if self.last else None

    def _when(self, block: Block, sending: list[int]) -> tuple[bool, int, int]:
        q_owner, kv_owner = (self.state.owners[piece] for piece in block.pieces)
        busiest = max((sending[owner] + cost for owner, cost in self._fetch(block)), default=0)
        partner = q_owner if kv_owner == self.rank else kv_owner
        return q_owner == self.rank, busiest, (self.rank - partner) % self.state.size

    def _fetch(self, block: Block) -> list[tuple[int, int]]:
        """(owner, cost) of the operands of a block that are not here yet."""
        needs = []
        for axis in (Q, KV):
            piece, span = block.pieces[axis], block.spans[axis]
            unit = self.state.unit(axis, piece, self.rank)
            if unit:
                size = uncovered(span, self.fetched.get((axis, piece), ()))
                needs.append((self.state.owners[piece], unit * size))
        return needs

    def _split(self, local: list[Block], begin: int) -> tuple[list[Block], list[Block]]:
        """Local blocks to begin with, at least `begin` pairs, and those for the end."""
        done = at = 0
        while at < len(local) and done < begin:
            done += local[at].pairs
            at += 1
        first, last = local[:at], local[at:]
        if len(self.ends) > 1 and (done - begin) * 2 > self.ends[-1] - self.ends[-2]:
            block = first.pop()
            part, rest = self._cut(block, begin - (done - block.pairs))
            first += [part] if part is not None else []
            last = [rest, *last] if rest is not None else last
        return first, last

    def _cut(self, block: Block, left: int) -> tuple[Block | None, Block | None]:
        """A part of at most `left` pairs, and the rest.

        What has to be fetched is cut, so that each step needs only its part; local blocks by rows.
        """
        costs = [
            self.state.unit(axis, block.pieces[axis], self.rank) * block.spans[axis].size
            for axis in (Q, KV)
        ]
        axis = KV if costs[KV] > costs[Q] else Q
        first, last = block.spans[axis]
        at = first + most(lambda n: work([block.part(axis, first, first + n)]), last - first, left)
        return block.part(axis, first, at), block.part(axis, at, last)


def _joined(rectangles: list[Rectangle]) -> list[Rectangle]:
    """Rectangles side by side made one, until none are."""
    before = -1
    while before != len(rectangles):
        before = len(rectangles)
        for axis in (KV, Q):
            rectangles = _joined_along(rectangles, axis)
    return rectangles


def _joined_along(rectangles: list[Rectangle], axis: int) -> list[Rectangle]:
    joined: list[Rectangle] = []
    for spans in sorted(rectangles, key=lambda spans: (spans[1 - axis], spans[axis])):
        if joined and joined[-1][1 - axis] == spans[1 - axis]:
            before, this = joined[-1][axis], spans[axis]
            if before.stop == this.start:
                both = Span(before.start, this.stop)
                joined[-1] = (both, spans[KV]) if axis == Q else (spans[Q], both)
                continue
        joined.append(spans)
    return joined
