# SPDX-License-Identifier: Apache-2.0
"""Which rank computes which block, and what every rank must fetch for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...ir import Payload, Problem
from ...layouts import Span
from .blocks import KV, Block, Q

ITEM_SIZE = 2  # bytes of an element when routes are weighed up (bfloat16)
FAR = 8  # what a byte between nodes counts, against one inside a node


class Assignment:
    """The blocks of every rank, filed under their queries and under their keys.

    Costs are bytes of a forward and a backward pass together; bytes between nodes count `FAR`
    times. A rank fetches a token once, however many of its blocks need it.

    Attributes:
        owners: the rank that owns each piece of the token layout.
        load: pairs that each rank computes.
        held: `held[axis][rank][piece][span]` are the rank's blocks with that span of queries
            (axis Q) or keys (axis KV).
    """

    def __init__(self, problem: Problem, owners: Sequence[int]) -> None:
        self.owners, self.size = owners, problem.size
        self.load = [0] * self.size
        self.held: tuple[list[dict[int, dict[Span, list[Block]]]], ...] = tuple(
            [{} for _ in range(self.size)] for _ in (Q, KV)
        )
        token = _token_cost(problem, Q), _token_cost(problem, KV)
        nodes = [rank // problem.node_size for rank in range(self.size)]
        # [axis][owner][rank]: cost of one token
        self._unit = [
            [
                [
                    0 if owner == rank else cost * (1 if nodes[owner] == nodes[rank] else FAR)
                    for rank in range(self.size)
                ]
                for owner in range(self.size)
            ]
            for cost in token
        ]
        self.token_cost = token

    def add(self, rank: int, block: Block) -> None:
        """Give a block to a rank."""
        self.load[rank] += block.pairs
        for axis in (Q, KV):
            spans = self.held[axis][rank].setdefault(block.pieces[axis], {})
            spans.setdefault(block.spans[axis], []).append(block)

    def remove(self, rank: int, block: Block) -> None:
        """Take a block from a rank."""
        self.load[rank] -= block.pairs
        for axis in (Q, KV):
            spans = self.held[axis][rank][block.pieces[axis]]
            blocks = spans[block.spans[axis]]
            blocks.remove(block)
            if not blocks:
                del spans[block.spans[axis]]
                if not spans:
                    del self.held[axis][rank][block.pieces[axis]]

    def replace(self, rank: int, block: Block, parts: Iterable[tuple[Block | None, int]]) -> None:
        """Hand the parts of a rank's block (those that are any) to ranks."""
        self.remove(rank, block)
        for part, new in parts:
            if part is not None:
                self.add(new, part)

    def blocks(self, rank: int) -> list[Block]:
        """All blocks of a rank."""
        return [
            block
            for spans in self.held[Q][rank].values()
            for blocks in spans.values()
            for block in blocks
        ]

    def is_local(self, rank: int, block: Block) -> bool:
        """Whether a rank owns all that a block needs."""
        return all(self.owners[piece] == rank for piece in block.pieces)

    def unit(self, axis: int, piece: int, rank: int) -> int:
        """Cost of a token of a piece at a rank; 0 where it is owned."""
        return self._unit[axis][self.owners[piece]][rank]

    def fetch_cost(self, axis: int, piece: int, span: Span, rank: int) -> int:
        """Cost of having a span at a rank, with what the rank fetches already."""
        unit = self._unit[axis][self.owners[piece]][rank]
        if not unit:
            return 0
        spans = self.held[axis][rank].get(piece)
        if not spans:
            return unit * span.size
        return 0 if span in spans else unit * uncovered(span, spans)

    def exclusive_cost(self, axis: int, piece: int, span: Span, rank: int) -> int:
        """What a rank saves when no block of it needs a span any more that one does now."""
        unit = self._unit[axis][self.owners[piece]][rank]
        if not unit:
            return 0
        spans = self.held[axis][rank][piece]
        if len(spans) == 1:
            return unit * span.size
        return unit * uncovered(span, [other for other in spans if other != span])

    def cost(self, rank: int) -> int:
        """Cost of all that a rank fetches."""
        total = 0
        for axis in (Q, KV):
            for piece, spans in self.held[axis][rank].items():
                unit = self._unit[axis][self.owners[piece]][rank]
                if unit:
                    total += unit * covered(spans)
        return total

    def total_cost(self) -> int:
        """Cost of all ranks."""
        return sum(map(self.cost, range(self.size)))


def start(problem: Problem, owners: Sequence[int], blocks: Iterable[Block]) -> Assignment:
    """Every block at one of its owners: the one that needs to fetch less."""
    state = Assignment(problem, owners)
    for block in blocks:
        q_owner, kv_owner = (owners[piece] for piece in block.pieces)
        q_cost, kv_cost = (block.spans[axis].size * state.token_cost[axis] for axis in (Q, KV))
        state.add(q_owner if kv_cost <= q_cost else kv_owner, block)
    return state


def covered(spans: Iterable[Span]) -> int:
    """Tokens that the spans hold together."""
    size = end = 0
    for start, stop in sorted(spans):
        if stop > end:
            size += stop - max(start, end)
            end = stop
    return size


def uncovered(span: Span, spans: Iterable[Span]) -> int:
    """Tokens of a span that none of the others holds."""
    first, last = span
    return (
        last
        - first
        - covered(
            Span(max(start, first), min(stop, last))
            for start, stop in spans
            if start < last and stop > first
        )
    )


def _token_cost(problem: Problem, axis: int) -> int:
    payloads: tuple[Payload, ...]
    if axis == Q:
        payloads, heads = (Payload.Q, Payload.OUT, Payload.Q_GRAD, Payload.DQ), problem.query_heads
    else:
        payloads, heads = (Payload.KV, Payload.KV, Payload.DKV), problem.kv_heads
    return sum(problem.payload_bytes(payload, 1, heads, ITEM_SIZE) for payload in payloads)
